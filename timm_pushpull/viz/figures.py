"""What a push-pull unit sees: its kernels, its answer to an edge in noise, its spectra, its inhibition strengths.

For each of the four, :func:`draw_figures` writes a picture and the numbers that it shows:

- ``kernels``: push kernels and their pull kernels;
- ``edge``: responses to a vertical edge in Gaussian noise, and their signal-to-noise ratio;
- ``spectra``: Fourier spectra of the kernels and of their linear combinations;
- ``alpha``: the distribution of the inhibition strength.

Paper: `PushPull-Net: Inhibition-driven ResNet robust to image corruptions` - https://arxiv.org/abs/2408.04077, whose
figures 3 to 5 they follow.
"""

import csv
import io
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..drawing import COLORS, new_figure, to_png
from ..files import atomic_write
from ..layers.push_pull import PushPullConv2d
from ..ops.push_pull import push_pull_conv2d
from ..ops.reference import pull_kernels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ['combined_spectrum', 'draw_figures', 'edge_responses', 'radial_mean', 'snr_db']

KERNELS = 5
PICTURE_SIZE = 64
EDGE_WIDTH = 5
NOISE_STDS = tuple(step / 10 for step in range(11))
NOISE_DRAWS = 16
SHOWN_NOISE_STD = 0.5
SPECTRUM_SIZE = 32
SPECTRUM_ALPHAS = (0.5, 1.0, 2.0, 4.0)
SPECTRUM_WINDOWS = (0, 3, 5)
RESPONSES = ('push', 'pull', 'push-pull')

BLUE, VERMILION, _, _, BLACK, ORANGE, SKY = COLORS
# Push is a broad band, as push-pull lies upon it where the inhibition is weak.
LINES: dict[str, dict[str, Any]] = {
    'push': {'color': SKY, 'linewidth': 5},
    'pull': {'color': ORANGE, 'linestyle': '--', 'marker': 's', 'markersize': 5},
    'push-pull': {'color': BLACK, 'marker': 'o', 'markersize': 4},
}


def draw_figures(model: nn.Module, folder: str | os.PathLike[str], seed: int = 0) -> list[Path]:
    """Draw what the first push-pull unit of a model sees, and write the numbers beside the pictures.

    The files are ``kernels``, ``edge``, ``spectra`` and ``alpha``, each as ``.png`` and as ``.csv``.

    - ``kernels``: the five filters whose values spread widest (max - min over the whole filter), of each the channel
      that spreads widest, in the grey scale from the kernel's least value to its greatest. The table holds all the
      channels.
    - ``edge``: the :func:`edge_responses` of one filter. The picture is 64 pixels wide and high, 0 with a bar of 1, 5
      pixels wide, the same in every channel; to each pixel and channel Gaussian noise is added, and not clipped. A_s is
      the mean response over the bar, A_n the mean over all else, each over 16 draws of the noise, and :func:`snr_db`
      their ratio. The picture goes on beyond what is measured, so that no response is one to its border. The filter is,
      of the half with the greatest alpha, the one that best tells the bar from even light and from noise, of greatest
      ``A_s / (A_u + |W|)``: A_s its push response to the bar without noise, A_u that to the bar's brightness
      everywhere, ``|W|`` its Euclidean norm, the std of its response to unit noise; the pull response has no part in
      the choice. A ratio that is infinite is ``inf`` in the table, one that does not exist is empty, and neither is
      drawn.
    - ``spectra``: :func:`combined_spectrum` of the push kernels (alpha 0), of the pull kernels, and of combinations for
      several alpha and windows; the table holds their :func:`radial_mean`.
    - ``alpha``: the inhibition strength of each channel.

    Args:
        model: Model with a :class:`~timm_pushpull.PushPullConv2d`, on any device and of any data type; left as it is.
        folder: Where the files go, made if it does not exist.
        seed: Number of the draws of the noise.

    Returns:
        Paths of the files.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
        ValueError: If the model has no push-pull unit, or one whose weights are not finite.
    """
    path, layer = _first_unit(model)
    weight = layer.weight.detach().float().cpu()
    pull = pull_kernels(weight, layer.pull_kernel)
    alpha = torch.as_tensor(layer.alpha).detach().float().cpu().expand(layer.out_channels)
    dilation = (int(layer.dilation[0]), int(layer.dilation[1]))
    figures = {
        'kernels': _kernels(weight, pull),
        'edge': _edge(weight, alpha, dilation, layer.avg_pool_size, layer.pull_kernel, seed),
        'spectra': _spectra(weight, pull, dilation),
        'alpha': _alpha(alpha, f'{path}.alpha'.lstrip('.'), layer.trainable_alpha),
    }
    written = []
    for name, (figure, columns, rows) in figures.items():
        written += [Path(folder) / f'{name}.png', Path(folder) / f'{name}.csv']
        atomic_write(written[-2], _to_png(figure))
        atomic_write(written[-1], _to_csv(columns, rows))
    return written


def snr_db(edge: float, background: float) -> float | None:
    """Signal-to-noise ratio ``20 * log10(A_s / A_n)``.

    Args:
        edge: A_s, the mean rectified response over the edge; 0 or more.
        background: A_n, the mean rectified response over the background; 0 or more.

    Returns:
        Decibels; ``inf`` where only the background is silent, ``-inf`` where only the edge is, None where both are.
    """
    if background == 0:
        return math.inf if edge > 0 else None
    return 20 * math.log10(edge / background) if edge > 0 else -math.inf


def edge_responses(
    pictures: Tensor,
    weight: Tensor,
    alpha: float | Tensor,
    dilation: tuple[int, int] = (1, 1),
    avg_pool_size: int = 3,
    pull_kernel: str = 'inverted',
) -> dict[str, Tensor]:
    """Rectified responses to pictures at stride 1, of the pictures' size.

    With P and Q the push and the averaged pull response: ``relu(P)``, ``relu(Q)``, and
    ``relu(relu(P) - alpha * relu(Q))`` as after the ReLU that follows the unit in a network, the bias and the
    normalisation between the two left out.

    Args:
        pictures: (N, C, H, W).
        weight: Push kernels (O, C, kh, kw).
        alpha: Inhibition strength, one number or one for each filter (O,).
        dilation: Spacing between kernel elements, down and across, in pixels.
        avg_pool_size: Side of the window that averages the pull response, in pixels; 0 for no averaging.
        pull_kernel: As for :func:`~timm_pushpull.push_pull_conv2d`.

    Returns:
        ``push``, ``pull`` and ``push-pull``, each (N, O, H, W). Within half a kernel and half a window
        from the border they come in part from the zeros around the picture.
    """
    down, across = ((size - 1) * step for size, step in zip(weight.shape[2:], dilation, strict=True))
    padded = F.pad(pictures, (across // 2, across - across // 2, down // 2, down - down // 2))

    def respond(strength: float | Tensor) -> Tensor:
        return push_pull_conv2d(
            padded, weight, strength, dilation=dilation, avg_pool_size=avg_pool_size, pull_kernel=pull_kernel
        )

    push = respond(0.0)
    # The unit gives relu(P) - alpha * relu(Q) only; at alpha 1 the pull response is what it lacks of relu(P).
    return {'push': push, 'pull': push - respond(1.0), 'push-pull': respond(alpha).relu()}


def combined_spectrum(
    push: Tensor, pull: Tensor, alpha: float, window: int, dilation: tuple[int, int] = (1, 1)
) -> np.ndarray:
    r"""Mean over the filters of the Fourier magnitude of :math:`W - \alpha \operatorname{avg}_a(K)`.

    .. math::
        \frac{1}{O} \sum_o \Big| \sum_c \hat W_{oc}(f) - \alpha D_a(f_y) D_a(f_x) \hat K_{oc}(f) \Big|,
        \qquad D_a(f) = \frac{1}{a} \sum_{j=-(a-1)/2}^{(a-1)/2} \cos(2 \pi f j)

    The sum over the channels makes it the gain for a grey grating of frequency f, the same in every channel. The unit
    rectifies P and Q before it combines them, which is not linear and has no spectrum: it is left out here.

    Args:
        push: Push kernels W (O, C, kh, kw).
        pull: Pull kernels K, of the same shape.
        alpha: Inhibition strength.
        window: Side a of the averaging window, an odd number of pixels; 0 for no averaging (D = 1).
        dilation: Spacing between kernel elements, down and across, in pixels.

    Returns:
        Magnitudes (size, size), the frequency 0 in place [size // 2, size // 2], frequencies
        ``numpy.fft.fftshift(numpy.fft.fftfreq(size))`` cycles per pixel; size is 32, or the extent of a larger kernel.
    """
    extent = [(side - 1) * step + 1 for side, step in zip(push.shape[2:], dilation, strict=True)]
    size = max(SPECTRUM_SIZE, *extent)
    transforms = []
    for kernels in (push, pull):
        spread = np.zeros((len(kernels), *extent))
        spread[:, :: dilation[0], :: dilation[1]] = kernels.double().sum(1).numpy()
        transforms.append(np.fft.fft2(spread, (size, size)))
    offsets = np.arange(window) - (window - 1) / 2
    average = np.cos(2 * np.pi * np.outer(np.fft.fftfreq(size), offsets)).mean(1) if window else np.ones(size)
    combined = transforms[0] - alpha * np.outer(average, average) * transforms[1]
    return np.fft.fftshift(np.abs(combined).mean(0))


def radial_mean(spectrum: np.ndarray) -> np.ndarray:
    """Mean of a spectrum over rings around the frequency 0.

    Args:
        spectrum: Magnitudes (size, size), as :func:`combined_spectrum` gives them.

    Returns:
        Means for the frequencies 0, 1 / size, 2 / size, ... up to 0.5 cycles per pixel, each over the ring of width
        1 / size. The corners, of higher frequencies, are left out.
    """
    size = len(spectrum)
    places = np.arange(size) - size // 2
    ring = np.rint(np.hypot(places[:, None], places)).astype(int)
    return np.array([spectrum[ring == radius].mean() for radius in range(size // 2 + 1)])


_Drawn = tuple['Figure', Sequence[str], Iterable[Sequence[Any]]]  # the picture, and the columns and rows of its table


def _first_unit(model: nn.Module) -> tuple[str, PushPullConv2d]:
    name = (getattr(model, 'pretrained_cfg', None) or {}).get('architecture') or type(model).__name__
    for path, layer in model.named_modules():
        if isinstance(layer, PushPullConv2d):
            for parameter, value in layer.named_parameters(path):
                if not value.isfinite().all():
                    raise ValueError(f'{name} cannot be drawn: {parameter} has values that are not finite.')
            return path, layer
    raise ValueError(
        f'{name} has no push-pull unit to draw: take one of timm.list_models("pp_*"), or convert it first '
        '(timm_pushpull.convert_to_push_pull).'
    )


def _kernels(weight: Tensor, pull: Tensor) -> _Drawn:
    spread = weight.amax((1, 2, 3)) - weight.amin((1, 2, 3))
    filters = spread.sort(descending=True, stable=True).indices[:KERNELS].tolist()
    kernels = {'push': weight, 'pull': pull}
    channels = (weight.amax((2, 3)) - weight.amin((2, 3))).argmax(1).tolist()

    figure = new_figure(3.1)
    axes = figure.subplots(2, KERNELS, squeeze=False)
    for column in range(KERNELS):
        for axis, (name, values) in zip(axes[:, column], kernels.items(), strict=True):
            axis.set(xticks=[], yticks=[])
            if column >= len(filters):
                axis.set_axis_off()
                continue
            number = filters[column]
            low, high = values[number].min().item(), values[number].max().item()
            axis.imshow(values[number, channels[number]].numpy(), cmap='gray', vmin=low, vmax=high)
            if column == 0:
                axis.set_ylabel(name)
            if name == 'push':
                axis.set_title(f'filter {number}\nchannel {channels[number]}')
            else:
                axis.set_xlabel(f'min {low:#.2g}\nmax {high:#.2g}')
    figure.suptitle("Filters; black: the kernel's min, white: its max")
    rows = (
        (number, name, *place, value.item())
        for number in filters
        for name, values in kernels.items()
        for place, value in np.ndenumerate(values[number].numpy())
    )
    return figure, ('filter', 'kernel', 'channel', 'row', 'column', 'value'), rows


def _reach(weight: Tensor, dilation: tuple[int, int], avg_pool_size: int) -> int:
    """Distance up to which a pixel has a part in the averaged pull response, in pixels."""
    return max(size * step for size, step in zip(weight.shape[2:], dilation, strict=True)) // 2 + avg_pool_size // 2


def _edge(
    weight: Tensor, alpha: Tensor, dilation: tuple[int, int], avg_pool_size: int, pull_kernel: str, seed: int
) -> _Drawn:
    # The picture is wider than what is measured and shown, as zeros around a picture make an edge of their own.
    margin = _reach(weight, dilation, avg_pool_size)
    size = PICTURE_SIZE + 2 * margin
    first = (size - EDGE_WIDTH) // 2
    on_edge = torch.zeros(size, dtype=torch.bool, device='cpu')
    on_edge[first : first + EDGE_WIDTH] = True
    # Every group of input channels sees the same picture, so that the groups need not be told apart. A background of 0
    # is the mean grey of a normalised picture.
    clean = on_edge.float().expand(1, weight.shape[1], size, size)
    generator = torch.Generator('cpu').manual_seed(seed)
    shape = (NOISE_DRAWS, weight.shape[1], size, size)
    noise = torch.randn(shape, generator=generator, dtype=torch.float32, device='cpu')

    def inner(maps: Tensor) -> Tensor:
        return maps[..., margin : size - margin, margin : size - margin]

    inner_on_edge = on_edge[margin : size - margin]
    push = inner(edge_responses(clean, weight, 0.0, dilation, 0)['push'])
    others = weight.sum((1, 2, 3)).relu() + weight.flatten(1).norm(dim=1)
    merit = push[..., inner_on_edge].mean((0, 2, 3)) / others.clamp_min(1e-12)
    number = int(merit.where(alpha >= alpha.median(), -1).argmax())

    rows: list[tuple[Any, ...]] = []
    shown: dict[str, Tensor] = {}
    kernel, strength = weight[number : number + 1], alpha[number : number + 1]
    for noise_std in NOISE_STDS:
        pictures = clean + noise_std * noise
        maps = edge_responses(pictures, kernel, strength, dilation, avg_pool_size, pull_kernel)
        for name in RESPONSES:
            response = inner(maps[name])
            amplitudes = [response[..., place].mean().item() for place in (inner_on_edge, ~inner_on_edge)]
            rows.append((number, noise_std, name, *amplitudes, snr_db(*amplitudes)))
        if noise_std == SHOWN_NOISE_STD:
            shown = {'input': inner(pictures)[0, 0], **{name: inner(maps[name])[0, 0] for name in RESPONSES}}

    figure = new_figure(4.8)
    grid = figure.add_gridspec(2, 1, height_ratios=(1, 1.7), hspace=0.08)
    axes = grid[0].subgridspec(1, len(shown)).subplots(squeeze=False)[0]
    brightest = max(shown[name].max().item() for name in RESPONSES)
    snr = {(noise_std, name): value for _, noise_std, name, _, _, value in rows}
    for axis, (name, picture) in zip(axes, shown.items(), strict=True):
        low, high = (-1, 2) if name == 'input' else (0, brightest)
        axis.imshow(picture.numpy(), cmap='gray', vmin=low, vmax=high)
        below = f'noise std {SHOWN_NOISE_STD}' if name == 'input' else _decibels(snr[SHOWN_NOISE_STD, name])
        axis.set(xticks=[], yticks=[], title=name, xlabel=below)
    axis = figure.add_subplot(grid[1])
    for name in RESPONSES:
        values = [snr[noise_std, name] for noise_std in NOISE_STDS]
        heights = [value if value is not None and math.isfinite(value) else math.nan for value in values]
        label = f'{name}: none that is finite' if all(map(math.isnan, heights)) else name
        axis.plot(NOISE_STDS, heights, label=label, **LINES[name])
    axis.set(
        xlim=(-0.05, 1.05), xlabel="noise std (the edge's height is 1)", ylabel=f'SNR over {NOISE_DRAWS} draws (dB)'
    )
    axis.grid(color='0.88')
    axis.legend()
    window = f'window {avg_pool_size}' if avg_pool_size else 'no averaging'
    figure.suptitle(f'Filter {number}, α = {strength.item():.2g}, {window}')
    columns = ('filter', 'noise_std', 'response', 'edge_amplitude', 'background_amplitude', 'snr_db')
    return figure, columns, rows


def _decibels(snr: float | None) -> str:
    if snr is None:
        return 'no response'
    return f'{snr:.1f} dB' if math.isfinite(snr) else f'{"−" if snr < 0 else ""}∞ dB'


def _spectra(weight: Tensor, pull: Tensor, dilation: tuple[int, int]) -> _Drawn:
    from matplotlib.colors import LogNorm

    spectra: dict[tuple[str, Any, Any], np.ndarray] = {
        ('push', '', ''): combined_spectrum(weight, pull, 0.0, 0, dilation),
        ('pull', '', ''): combined_spectrum(pull, weight, 0.0, 0, dilation),
    }
    for alpha in SPECTRUM_ALPHAS:
        for window in SPECTRUM_WINDOWS:
            spectra['push-pull', alpha, window] = combined_spectrum(weight, pull, alpha, window, dilation)

    figure = new_figure(8.2)
    axes = figure.subplots(1 + len(SPECTRUM_ALPHAS), len(SPECTRUM_WINDOWS), sharex=True, sharey=True)
    # One scale for all: from the gain that 2% fall short of, as the spectra have zeros, to the greatest.
    least, greatest = np.percentile(list(spectra.values()), (2, 100))
    greatest = greatest or 1.0
    scale = LogNorm(max(least, greatest / 10_000), greatest, clip=True)
    size = len(spectra['push', '', ''])
    low, high = (-(size // 2) - 0.5) / size, (size - size // 2 - 0.5) / size  # sides of the outermost pixels
    drawn = [*axes[0, :2], *axes[1:].flat]
    for axis, spectrum in zip(drawn, spectra.values(), strict=True):
        image = axis.imshow(spectrum, cmap='cividis', norm=scale, extent=(low, high, low, high), origin='lower')
        axis.set(xticks=(-0.4, 0, 0.4), yticks=(-0.4, 0, 0.4))
    for axis, name in zip(axes[0, :2], ('push', 'pull'), strict=True):
        axis.set_title(name)
    for axis, window in zip(axes[1], SPECTRUM_WINDOWS, strict=True):
        axis.set_title(f'window {window}' if window else 'no averaging')
    for axis, alpha in zip(axes[1:, 0], SPECTRUM_ALPHAS, strict=True):
        axis.set_ylabel(f'α = {alpha:g}')
    axes[0, 2].set_axis_off()
    figure.colorbar(image, cax=axes[0, 2].inset_axes((0.1, 0, 0.15, 1)), label='gain')
    figure.suptitle('Mean over the filters; lower rows: push − α × pull')
    figure.supxlabel('frequency across (cycles/pixel)')
    figure.supylabel('frequency down (cycles/pixel)')
    rows = (
        (*combination, radius / size, magnitude.item())
        for combination, spectrum in spectra.items()
        for radius, magnitude in enumerate(radial_mean(spectrum))
    )
    return figure, ('combination', 'alpha', 'window', 'frequency', 'magnitude'), rows


def _alpha(alpha: Tensor, name: str, trainable: bool) -> _Drawn:
    from matplotlib.ticker import MaxNLocator

    mean, negative = alpha.mean().item(), (alpha < 0).float().mean().item()
    figure = new_figure(3.2)
    axis = figure.subplots()
    axis.hist(alpha.numpy(), bins=21, color=BLUE, edgecolor='white')
    axis.axvline(mean, color=VERMILION, linestyle='--', linewidth=2, label=f'mean {mean:#.3g}')
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set(xlabel=f'inhibition strength α ({name})', ylabel='channels')
    axis.set_title(f'{len(alpha)} channels, {negative:.0%} negative' if trainable else f'fixed, {len(alpha)} channels')
    axis.legend()
    return figure, ('channel', 'alpha'), enumerate(alpha.tolist())


def _to_png(figure: 'Figure') -> bytes:
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_fontsize(10)  # type: ignore[attr-defined]
    return to_png(figure)


def _to_csv(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> bytes:
    text = io.StringIO(newline='')
    writer = csv.writer(text, lineterminator='\n')
    writer.writerow(columns)
    for row in rows:
        writer.writerow([f'{value:.7g}' if isinstance(value, float) else value for value in row])
    return text.getvalue().encode()
