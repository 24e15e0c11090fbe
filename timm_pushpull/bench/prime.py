"""Benchmark of PRIME: time and memory of ours and of the plain formulation, over a lower bound."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..augment.prime import MAX_DEPTH, PRIME, WIDTH, temperature_range
from ..errors import InputError
from .timing import Comparison, check_device, compare

__all__ = ['bench_prime']


def bench_prime(
    batch_size: int = 16,
    img_size: int = 224,
    rounds: int = 6,
    device: str = 'cpu',
    preset: str = 'imagenet',
) -> Comparison:
    """Compare PRIME with its plain formulation, which applies every family to every image at every step.

    Both are given over a lower bound: one copy of the image for each step that PRIME draws, since a step reads and
    writes the image at least once. The plain formulation follows the original code, where the images of a step share
    one displacement field, so it computes fewer fields. The times include the draw.

    Args:
        batch_size: RGB images in a batch.
        img_size: Side of the images, in pixels.
        rounds: Number of rounds.
        device: Device of the images.
        preset: ``'imagenet'`` or ``'cifar'``.

    Returns:
        The comparison; the lower bound stands for the plain network.

    Raises:
        ValueError: If there is no such preset or device.
    """
    presets: dict[str, Callable[[], PRIME]] = {'imagenet': PRIME.imagenet, 'cifar': PRIME.cifar}
    if preset not in presets:
        raise InputError(f'preset must be one of {", ".join(presets)}, got {preset!r}.')
    check_device(device)
    prime = presets[preset]()
    images = torch.rand(batch_size, 3, img_size, img_size, device=device)
    steps = WIDTH * (1 + MAX_DEPTH) // 2  # of an image, on average

    def copy() -> None:
        for _ in range(steps):
            images.clone()

    calls = {'plain': copy, 'ours': lambda: prime(images), 'reference': lambda: _plain_prime(prime, images)}
    return compare(calls, device, rounds, f'PRIME, {preset}', use='augment')


@torch.no_grad()
def _plain_prime(prime: PRIME, images: Tensor) -> Tensor:
    count, channels, _, size = images.shape
    device = images.device
    repeated = images.repeat(WIDTH, 1, 1, 1)
    depths = torch.randint(1, MAX_DEPTH + 1, (len(repeated), 1, 1, 1), device=device)
    transformed = repeated
    for step in range(MAX_DEPTH):
        family = torch.randint(0, 3, (len(repeated), 1, 1, 1), device=device)
        every = (_plain_spectral, _plain_spatial, _plain_color)
        made = sum((family == number) * transform(prime, transformed) for number, transform in enumerate(every))
        transformed = torch.where(step < depths, made, transformed)
    weights = torch.distributions.Dirichlet(torch.ones(WIDTH, device=device)).sample((count,))
    blend = torch.rand(count, 1, 1, 1, device=device)
    chains = transformed.view(WIDTH, count, channels, size, size)
    return (1 - blend) * images + blend * torch.einsum('nw,wnchv->nchv', weights, chains)


def _plain_spectral(prime: PRIME, images: Tensor) -> Tensor:
    kernels = prime.sigma * torch.randn(len(images), 1, 3, 3, device=images.device)
    kernels[:, 0, 1, 1] += 1
    filtered = F.conv2d(images.transpose(0, 1), kernels, padding=1, groups=len(images))
    return filtered.transpose(0, 1).contiguous().clamp(0, 1)


def _plain_spatial(prime: PRIME, images: Tensor) -> Tensor:
    size = images.shape[-1]
    cut = torch.randint(2, prime.cut_max + 1, ())
    lowest, highest = (float(bound) for bound in temperature_range(size, cut))
    temperature = lowest + (highest - lowest) * float(torch.rand(()))
    number = torch.arange(1, int(cut) + 1, device=images.device)
    radius = (number**2 + number[:, None] ** 2).sqrt()
    sines = torch.sin(math.pi * torch.linspace(0, 1, size, device=images.device) * number[:, None])
    modes = torch.randn(2, int(cut), int(cut), device=images.device) * (radius < cut.item() + 0.5) / radius
    shift = math.sqrt(temperature) * size * (sines.mT @ modes @ sines)
    pixel = torch.arange(size, device=images.device)
    x, y = (pixel - shift[0]).clamp(0, size - 1), (pixel[:, None] - shift[1]).clamp(0, size - 1)
    left, right, top, bottom = x.floor().long(), x.ceil().long(), y.floor().long(), y.ceil().long()
    x, y = x - left, y - top
    return (
        (1 - y) * (1 - x) * images[..., top, left]
        + (1 - y) * x * images[..., top, right]
        + y * (1 - x) * images[..., bottom, left]
        + y * x * images[..., bottom, right]
    )


def _plain_color(prime: PRIME, images: Tensor) -> Tensor:
    first = torch.randint(1, prime.color_first_max + 1, (), device=images.device)
    frequencies = first + torch.arange(prime.color_terms, device=images.device)
    coefficients = torch.randn(*images.shape[:2], prime.color_terms, device=images.device)
    values = images.flatten(2)
    sines = torch.sin(values[..., None] * frequencies * math.pi)
    curve = torch.einsum('nck,ncpk->ncp', coefficients * math.sqrt(prime.color_temperature), sines)
    return (values + curve).clamp(0, 1).view_as(images)
