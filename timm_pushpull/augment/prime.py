"""PRIME: mixtures of random filters, deformations and colour curves, for batches of images on their own device.

Paper: `PRIME: A Few Primitives Can Boost Robustness to Common Corruptions` - https://arxiv.org/abs/2112.13547

:meth:`PRIME.draw` draws the random numbers, :func:`apply_prime` applies them, so that a draw can be kept and replayed.

Differences from the original code (https://github.com/amodas/PRIME-augmentations): here every image has its own draw,
and the strengths are those of the paper. The original code shares one displacement field, one first frequency and one
strength among all images of a step. It draws the strengths uniformly between 0 and those of the paper, and T and the
cut from arcsine laws, the cut below a random upper end. It leaves out colour frequencies above 500, the largest first
frequency. It puts the delta of the filter at a corner of the kernel, which shifts the image by a pixel.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError

__all__ = [
    'PRIME',
    'PrimeDraw',
    'apply_prime',
    'color_jitter',
    'deform',
    'displacement_fields',
    'mode_deviations',
    'spectral_filter',
    'temperature_range',
]

WIDTH = 3  # chains of an image
MAX_DEPTH = 3  # steps of a chain
SPECTRAL, SPATIAL, COLOR = range(3)
FLOAT = torch.float32  # of every draw, whatever the program's default is
NO_STEP = -1

# Displacement fields in one step: at most 32 MB of mode variances, and enough work for a GPU.
_FIELDS_AT_ONCE = 32
# Clenshaw's recurrence over so many terms loses at most one digit of float32.
_TERMS_AT_ONCE = 20


def spectral_filter(images: Tensor, kernels: Tensor) -> Tensor:
    r"""Convolve each image with its own kernel: :math:`\operatorname{clamp}_{[0, 1]}(x * k)`.

    Source: `PRIME` - https://arxiv.org/abs/2112.13547

    Args:
        images: Images (N, C, H, W) in [0, 1], float32 or float64.
        kernels: Kernels k (N, 3, 3); all channels of an image share its kernel.

    Returns:
        Images (N, C, H, W) in [0, 1], convolved with zero padding.
    """
    height, width = images.shape[2:]
    padded = F.pad(images, (1, 1, 1, 1))
    output = torch.zeros_like(images)
    # As fast as a grouped convolution, and never rounded to TF32.
    for i in range(3):
        for j in range(3):
            output.addcmul_(padded[:, :, i : i + height, j : j + width], kernels[:, i, j].view(-1, 1, 1, 1))
    return output.clamp_(0, 1)


def temperature_range(size: int, cuts: Tensor) -> tuple[Tensor, Tensor]:
    r"""Compute the range of temperatures T, from half a pixel of displacement to the first folds of the image.

    For images of side :math:`n` and modes up to the cut :math:`c`:

    .. math::
        T_1 = \frac{1}{\pi n^2 \ln c}, \qquad T_2 = \max\left(T_1, \frac{4}{\pi^3 c^2 \ln c}\right)

    Source: `PRIME` - https://arxiv.org/abs/2112.13547

    Args:
        size: Side of the images, in pixels.
        cuts: Cut c of each field (N,), at least 2.

    Returns:
        Lowest and highest temperatures, (N,) each.
    """
    cuts = cuts.to(torch.float32)
    lowest = 1 / (math.pi * size**2 * cuts.log())
    return lowest, torch.maximum(lowest, 4 / (math.pi**3 * cuts**2 * cuts.log()))


def mode_deviations(cuts: Tensor, highest: int, size: int) -> Tensor:
    r"""Compute the standard deviation of each sine mode below the Nyquist frequency, its aliases included.

    On a grid of :math:`n` pixels, mode :math:`2 k (n - 1) \pm i` has the same values as mode :math:`i`, up to the sign.
    The amplitudes of such aliases are independent and normally distributed, so their variances add up:

    .. math::
        \sigma_{ji}^2 = \sum_{i' \equiv \pm i,\; j' \equiv \pm j \pmod{2 (n - 1)},\; i'^2 + j'^2 < (c + 1/2)^2}
            \frac{1}{i'^2 + j'^2}

    Args:
        cuts: Cut c of each field (N,).
        highest: Largest of the cuts.
        size: Side of the images n, in pixels, at least 2.

    Returns:
        Standard deviations (N, M, M) of the modes 1 to M = min(highest, n - 2); vertical modes first.
    """
    number = torch.arange(1, highest + 1, device=cuts.device)
    period = 2 * (size - 1)
    alias = torch.remainder(number, period)
    alias = torch.minimum(alias, period - alias)
    modes = torch.arange(1, min(highest, size - 2) + 1, device=cuts.device)
    fold = (alias[:, None] == modes).to(FLOAT)
    square = number**2 + number[:, None] ** 2
    inside = square < (cuts.to(FLOAT).view(-1, 1, 1) + 0.5) ** 2
    with torch.autocast(cuts.device.type, enabled=False):
        return (fold.mT @ (inside.to(FLOAT) / square) @ fold).sqrt()


def displacement_fields(modes: Tensor, deviations: Tensor, temperatures: Tensor, size: int) -> Tensor:
    r"""Compute smooth random displacements that vanish at the border of the image.

    At column :math:`x` and row :math:`y` of images of side :math:`n`, for both components:

    .. math::
        d = \sqrt{T} \, n \sum_{i, j = 1}^{M} a_{ji} \sigma_{ji} \sin\frac{\pi i x}{n - 1} \sin\frac{\pi j y}{n - 1}

    With the deviations of :func:`mode_deviations` the displacements have the distribution of the paper's sum, over all
    modes up to the cut, with amplitudes :math:`a / \sqrt{i^2 + j^2}`.

    Source: `PRIME` - https://arxiv.org/abs/2112.13547

    Args:
        modes: Amplitudes a (N, 2, M, M) of the modes 1 to M, normally distributed; vertical modes first.
        deviations: Standard deviations (N, M, M).
        temperatures: Strength of each field T (N,), at least 0.
        size: Side of the images n, in pixels, at least 2.

    Returns:
        Displacements (N, 2, n, n) in pixels: along x, then along y.
    """
    number = torch.arange(1, modes.shape[-1] + 1, device=modes.device)
    pixel = torch.arange(size, device=modes.device)
    # Integers reduce the phase exactly: it may be hundreds of turns.
    phase = torch.remainder(number[:, None] * pixel, 2 * (size - 1)).to(modes.dtype)
    sines = torch.sin(phase * (math.pi / (size - 1)))
    amplitude = deviations * (temperatures.sqrt() * size).view(-1, 1, 1)
    with torch.autocast(modes.device.type, enabled=False):  # half a pixel matters
        return sines.mT @ ((modes * amplitude[:, None]) @ sines)


def deform(images: Tensor, displacements: Tensor) -> Tensor:
    """Deform images: the pixel at p gets the value :math:`x(p - d(p))`.

    Source: `PRIME` - https://arxiv.org/abs/2112.13547

    Args:
        images: Square images (N, C, n, n), n at least 2, float32 or float64.
        displacements: Displacements (N, 2, n, n) in pixels: along x, then along y.

    Returns:
        Images (N, C, n, n), interpolated bilinearly. Places outside the image are clamped to its border.
    """
    pixel = torch.arange(images.shape[-1], device=images.device, dtype=images.dtype)
    places = torch.stack((pixel - displacements[:, 0], pixel[:, None] - displacements[:, 1]), dim=-1)
    places = places.mul_(2 / (images.shape[-1] - 1)).sub_(1)
    return F.grid_sample(images, places, mode='bilinear', padding_mode='border', align_corners=True)


def color_jitter(images: Tensor, first: Tensor, coefficients: Tensor) -> Tensor:
    r"""Change the values of each channel by a smooth curve.

    .. math::
        \operatorname{clamp}_{[0, 1]}\left(x + \sum_{j=0}^{K-1} c_j \sin(\pi (k + j) x)\right)

    Source: `PRIME` - https://arxiv.org/abs/2112.13547

    Args:
        images: Images (N, C, H, W) in [0, 1], float32 or float64.
        first: Lowest frequency k of each image (N,), whole numbers from 1 to 1000, in half periods.
        coefficients: Strength of the frequencies k to k + K - 1, c (N, C, K).

    Returns:
        Images (N, C, H, W) in [0, 1].
    """
    # The product of the coarse part and a frequency is exact, so whole periods can be subtracted without an error.
    coarse = images.mul(4096).round_().div_(4096)
    fine = images - coarse

    def sine(frequency: Tensor) -> Tensor:
        return torch.remainder(coarse * frequency, 2).addcmul_(fine, frequency).mul_(math.pi).sin_()

    # Clenshaw's recurrence: three sines for 20 terms, and nothing larger than the images.
    doubled_cosine = images.mul(math.pi).cos_().mul_(2)
    output = images.clone()
    for start in range(0, coefficients.shape[-1], _TERMS_AT_ONCE):
        current, following = torch.zeros_like(images), torch.zeros_like(images)
        for coefficient in coefficients[..., start : start + _TERMS_AT_ONCE, None, None].unbind(2)[::-1]:
            torch.sub(coefficient, following, out=following).addcmul_(doubled_cosine, current)
            current, following = following, current
        frequency = (first + start).to(images.dtype).view(-1, 1, 1, 1)
        output.addcmul_(current, sine(frequency)).addcmul_(following, sine(frequency - 1), value=-1)
    return output.clamp_(0, 1)


class PrimeDraw(NamedTuple):
    """All random numbers of one batch of N images.

    A row of ``kernels``, ``displacements``, ``first`` or ``coefficients`` belongs to one step of one image that drew
    this family. The rows are in the order of ``families``: by chain, then by step, then by image.
    """

    families: Tensor  # (chains, steps, N) on the CPU: 0 spectral, 1 spatial, 2 colour, -1 after the end of a chain
    weights: Tensor  # w (N, chains), with sum 1
    blend: Tensor  # m (N,) in [0, 1]
    kernels: Tensor  # (spectral steps, 3, 3)
    displacements: Tensor  # (spatial steps, 2, n, n) in pixels
    first: Tensor  # (colour steps,), lowest frequency in half periods
    coefficients: Tensor  # (colour steps, C, K)


@torch.no_grad()
def apply_prime(images: Tensor, draw: PrimeDraw) -> Tensor:
    r"""Mix each image with chains of its transforms, as drawn.

    .. math::
        (1 - m) x + m \sum_i w_i \operatorname{chain}_i(x)

    Each transform runs only on the images that drew it.

    Source: `PRIME` - https://arxiv.org/abs/2112.13547

    Args:
        images: Images (N, C, n, n) in [0, 1], of any floating-point type. Half precision is computed in float32.
        draw: Draw of :meth:`PRIME.draw`, on any device.

    Returns:
        Images (N, C, n, n) in [0, 1], of the data type and memory format of the input.

    Raises:
        ValueError: If the images are not floating-point numbers, or if the draw is for another shape.
    """
    if not images.is_floating_point():
        raise InputError(f'images must be floating-point numbers in [0, 1], got {images.dtype}: divide them by 255.')
    drawn_for = (draw.families.shape[2], draw.coefficients.shape[1], *draw.displacements.shape[2:])
    if tuple(images.shape) != drawn_for:
        raise InputError(f'draw must be for images of shape {tuple(images.shape)}, got one for {drawn_for}.')

    clean = images.to(torch.promote_types(images.dtype, torch.float32)).contiguous()
    draw = PrimeDraw(draw.families, *(numbers.to(clean.device) for numbers in draw[1:]))
    weights, blend = (numbers.to(clean.dtype)[..., None, None, None] for numbers in (draw.weights, draw.blend))
    families = {
        SPECTRAL: (spectral_filter, (draw.kernels.to(clean.dtype),)),
        SPATIAL: (deform, (draw.displacements.to(clean.dtype),)),
        COLOR: (color_jitter, (draw.first, draw.coefficients.to(clean.dtype))),
    }
    # For each family and step: its images and their random numbers. On the CPU, so that nothing waits for a GPU.
    steps: list[tuple[Any, list[Any]]] = []
    for family, (transform, numbers) in families.items():
        chosen = draw.families == family
        counts = chosen.sum(2).flatten().tolist()
        rows = chosen.nonzero()[:, 2].to(clean.device, non_blocking=True)
        steps.append((transform, list(zip(*(each.split(counts) for each in (rows, *numbers)), strict=True))))

    mixture = torch.zeros_like(clean)
    for chain in range(WIDTH):
        transformed = clean.clone()
        for step in range(chain * MAX_DEPTH, (chain + 1) * MAX_DEPTH):
            for transform, per_step in steps:
                rows, *numbers = per_step[step]
                if len(rows):
                    transformed.index_copy_(0, rows, transform(transformed.index_select(0, rows), *numbers))
        mixture.addcmul_(transformed, weights[:, chain])
    return torch.empty_like(images).copy_(clean.lerp(mixture, blend))


class PRIME(nn.Module):
    """Augments a batch of images before they are normalized. The module has no weights and ignores its training mode.

    Each image gets three chains of one to three steps, mixed with weights from Dirichlet(1, 1, 1), and the mixture is
    blended with the image by a share from [0, 1). :meth:`imagenet` and :meth:`cifar` have the settings of the paper.

    Source: `PRIME` - https://arxiv.org/abs/2112.13547

    Args:
        sigma: Standard deviation of the filter kernels around the delta, at least 0.
        cut_max: Highest cutoff frequency of the displacement fields, in modes, at least 2; cutoffs are drawn from 2.
        color_temperature: Variance of the colour coefficients, at least 0.
        color_terms: Number of consecutive frequencies of a colour curve, at least 1.
        color_first_max: Largest lowest frequency of a colour curve, in half periods, at least 1; drawn from 1.

    Shape:
        (N, C, n, n) to (N, C, n, n).

    Raises:
        ValueError: If a setting is out of its range.
    """

    def __init__(
        self, sigma: float, cut_max: int, color_temperature: float, color_terms: int, color_first_max: int
    ) -> None:
        super().__init__()
        for name, value, lowest in (
            ('sigma', sigma, 0),
            ('cut_max', cut_max, 2),
            ('color_temperature', color_temperature, 0),
            ('color_terms', color_terms, 1),
            ('color_first_max', color_first_max, 1),
        ):
            if not lowest <= value < math.inf:
                raise InputError(f'{name} must be a finite number, at least {lowest}, got {value}.')
        self.sigma = sigma
        self.cut_max = cut_max
        self.color_temperature = color_temperature
        self.color_terms = color_terms
        self.color_first_max = color_first_max

    @classmethod
    def imagenet(cls) -> 'PRIME':
        """Return PRIME with the paper's settings for ImageNet: 20 colour frequencies from a random first one."""
        return cls(sigma=4.0, cut_max=500, color_temperature=0.05, color_terms=20, color_first_max=500)

    @classmethod
    def cifar(cls) -> 'PRIME':
        """Return PRIME with the paper's settings for CIFAR, 32x32: all colour frequencies up to 100."""
        return cls(sigma=4.0, cut_max=100, color_temperature=0.01, color_terms=100, color_first_max=1)

    @torch.no_grad()
    def draw(
        self,
        shape: tuple[int, ...] | torch.Size,
        device: torch.device | str = 'cpu',
        generator: torch.Generator | None = None,
    ) -> PrimeDraw:
        """Draw the random numbers for a batch.

        Args:
            shape: Shape of the images (N, C, n, n), n at least 2.
            device: Device of the images.
            generator: Generator on any device; None for PyTorch's global one of the CPU. Numbers on another device come
                from a generator there, which this one seeds.

        Returns:
            The draw, in float32.

        Raises:
            ValueError: If the images are not square.
        """
        # The displacement fields are defined on squares only.
        if len(shape) != 4 or shape[2] != shape[3] or shape[3] < 2:
            raise InputError(
                f'images must be square, of shape (N, C, n, n) with n at least 2, got {tuple(shape)}: crop them first.'
            )
        count, channels, _, size = shape
        device = torch.device(device)
        # The CPU draws the numbers that decide what runs, so that the program never waits for a GPU.
        host, local = _generator_on(torch.device('cpu'), generator), _generator_on(device, generator)
        on_host: dict[str, Any] = dict(device='cpu', generator=host)
        on_device: dict[str, Any] = dict(device=device, generator=local)

        depths = torch.randint(1, MAX_DEPTH + 1, (WIDTH, 1, count), **on_host)
        families = torch.randint(0, 3, (WIDTH, MAX_DEPTH, count), **on_host)
        families[torch.arange(MAX_DEPTH, device='cpu')[:, None] >= depths] = NO_STEP
        spectral, spatial, color = (int((families == family).sum()) for family in (SPECTRAL, SPATIAL, COLOR))

        # Dirichlet(1, 1, 1): exponential numbers over their sum. Beta(1, 1): uniform numbers.
        weights = torch.empty(count, WIDTH, dtype=FLOAT, device=device).exponential_(generator=local)
        kernels = torch.randn(spectral, 3, 3, dtype=FLOAT, **on_device).mul_(self.sigma)
        kernels[:, 1, 1] += 1
        coefficients = torch.randn(color, channels, self.color_terms, dtype=FLOAT, **on_device)
        return PrimeDraw(
            families=families,
            weights=weights / weights.sum(1, keepdim=True),
            blend=torch.rand(count, dtype=FLOAT, **on_device),
            kernels=kernels,
            displacements=self._draw_displacements(spatial, size, device, host, local),
            first=torch.randint(1, self.color_first_max + 1, (color,), **on_device),
            coefficients=coefficients.mul_(math.sqrt(self.color_temperature)),
        )

    def _draw_displacements(
        self, count: int, size: int, device: torch.device, host: torch.Generator | None, local: torch.Generator | None
    ) -> Tensor:
        cuts = torch.randint(2, self.cut_max + 1, (count,), device='cpu', generator=host)
        lowest, highest = temperature_range(size, cuts)
        temperatures = lowest + (highest - lowest) * torch.rand(count, dtype=FLOAT, device='cpu', generator=host)
        fields = torch.empty(count, 2, size, size, dtype=FLOAT, device=device)
        # Fields of similar cuts are computed together, because the largest cut decides how many modes all of them get.
        for part in cuts.argsort().split(_FIELDS_AT_ONCE) if count else ():
            highest_mode = int(cuts[part[-1]])
            place, cut, temperature = (
                each.to(device, non_blocking=True) for each in (part, cuts[part], temperatures[part])
            )
            deviations = mode_deviations(cut, highest_mode, size)
            modes = torch.randn(len(part), 2, *deviations.shape[1:], dtype=FLOAT, device=device, generator=local)
            fields.index_copy_(0, place, displacement_fields(modes, deviations, temperature, size))
        return fields

    def forward(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return apply_prime(images, self.draw(images.shape, images.device, generator))

    def extra_repr(self) -> str:
        return (
            f'sigma={self.sigma}, cut_max={self.cut_max}, color_temperature={self.color_temperature}, '
            f'color_terms={self.color_terms}, color_first_max={self.color_first_max}'
        )


def _generator_on(device: torch.device, generator: torch.Generator | None) -> torch.Generator | None:
    """Return the generator on its own device (None: the global one of the CPU), elsewhere a generator it seeds."""
    home = torch.device('cpu') if generator is None else generator.device
    if device == home:
        return generator
    seed = torch.randint(2**63 - 1, (), generator=generator, device=home)
    return torch.Generator(device).manual_seed(int(seed))
