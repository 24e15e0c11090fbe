"""Figures of the push-pull unit of a model, after figures 3 to 5 of the paper.

Paper: `PushPull-Net: Inhibition-driven ResNet robust to image corruptions` - https://arxiv.org/abs/2408.04077
"""

import math
import os
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from ..drawing import COLORS, new_figure, to_png
from ..errors import InputError
from ..files import atomic_write, write_table
from ..layers.push_pull import PushPullConv2d
from ..models.convert import architecture_of
from ..ops.reference import PullKernel, pull_kernels
from .responses import edge_responses, snr_db
from .spectra import combined_spectrum, radial_mean

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ['draw_figures']

KERNELS = 5
IMAGE_SIZE = 64
EDGE_WIDTH = 5
NOISE_STDS = tuple(step / 10 for step in range(11))
NOISE_DRAWS = 16
SHOWN_NOISE_STD = 0.5
SPECTRUM_ALPHAS = (0.5, 1.0, 2.0, 4.0)
SPECTRUM_WINDOWS = (0, 3, 5)
RESPONSES = ('push', 'pull', 'push-pull')

BLUE, VERMILION, _, _, BLACK, ORANGE, SKY = COLORS
# Push is a broad band: where the inhibition is weak, push-pull lies on top of it.
LINES: dict[str, dict[str, Any]] = {
    'push': {'color': SKY, 'linewidth': 5},
    'pull': {'color': ORANGE, 'linestyle': '--', 'marker': 's', 'markersize': 5},
    'push-pull': {'color': BLACK, 'marker': 'o', 'markersize': 4},
}


def draw_figures(
    model: nn.Module, folder: str | os.PathLike[str], seed: int = 0, name: str | None = None
) -> list[Path]:
    """Draw the first push-pull unit of a model, and write the numbers of each figure beside it.

    The files are ``kernels``, ``edge``, ``spectra`` and ``alpha``, each as ``.png`` and as ``.csv``.

    - ``kernels``: the five filters with the largest range of values (max - min over the filter), each by the channel
      with the largest range. Grey goes from the filter's minimum to its maximum. The table has all channels.
    - ``edge``: the responses (:func:`~timm_pushpull.viz.responses.edge_responses`) of one filter to a bar of value 1, 5
      pixels wide, on a background of 0, in an image of 64x64 pixels, the same in all channels, plus Gaussian noise. A_s
      is the mean response over the bar, A_n the mean over the rest, each over 16 draws of the noise, and
      :func:`~timm_pushpull.viz.responses.snr_db` is their ratio. An infinite ratio is ``inf`` or ``-inf`` in the table,
      an undefined ratio is empty; the figure has words for them. The image extends beyond the measured part, so that no
      response is a response to the border.

      Among the half of the filters with the largest alpha, the filter with the
      largest ``A_s / (A_u + |W|)`` is drawn: A_s is its push response to the bar without noise, A_u that to an even
      image of value 1, and the Euclidean norm ``|W|`` the standard deviation of its response to unit noise.
    - ``spectra``: :func:`~timm_pushpull.viz.spectra.combined_spectrum` of the push kernels (alpha 0), of the pull
      kernels, and of combinations for several alpha and windows. The table has their radial means.
    - ``alpha``: the inhibition strength of each channel.

    Args:
        model: Model with a :class:`~timm_pushpull.PushPullConv2d`, on any device and of any data type. The model stays
            as it is.
        folder: Folder of the files, made if it does not exist.
        seed: Seed of the noise.
        name: Name of the model in the titles; None for its architecture.

    Returns:
        Paths of the files.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
        ValueError: If the model has no push-pull unit, or one whose weights are not finite.
    """
    architecture = architecture_of(model)
    path, layer = _first_unit(model, architecture)
    weight = layer.kernels().detach().float().cpu()
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
    for kind, (figure, columns, rows) in figures.items():
        lines = textwrap.wrap(name or architecture, 56)
        figure.suptitle('\n'.join([*lines, figure.get_suptitle()]))
        figure.set_figheight(figure.get_figheight() + 0.17 * len(lines))
        written += [Path(folder) / f'{kind}.png', Path(folder) / f'{kind}.csv']
        atomic_write(written[-2], _to_png(figure))
        write_table(written[-1], columns, ([_shown(value) for value in row] for row in rows))
    return written


_Drawn = tuple['Figure', Sequence[str], Iterable[Sequence[Any]]]  # figure, columns and rows of its table


def _first_unit(model: nn.Module, name: str) -> tuple[str, PushPullConv2d]:
    for path, layer in model.named_modules():
        if isinstance(layer, PushPullConv2d):
            for parameter, value in layer.named_parameters(path):
                if not value.isfinite().all():
                    raise InputError(f'{name} cannot be drawn: {parameter} has values that are not finite.')
            return path, layer
    raise InputError(
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


def _edge(
    weight: Tensor, alpha: Tensor, dilation: tuple[int, int], avg_pool_size: int, pull_kernel: PullKernel, seed: int
) -> _Drawn:
    # Kernel and window reach beyond the measured part: zero padding inside it would make an edge of its own.
    margin = max(side * step for side, step in zip(weight.shape[2:], dilation, strict=True)) // 2 + avg_pool_size // 2
    size = IMAGE_SIZE + 2 * margin
    first = (size - EDGE_WIDTH) // 2
    on_edge = torch.zeros(size, dtype=torch.bool, device='cpu')
    on_edge[first : first + EDGE_WIDTH] = True
    # All groups of channels see the same image, so groups need no special case. A background of 0 is the mean grey of a
    # normalized image.
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
        images = clean + noise_std * noise
        maps = edge_responses(images, kernel, strength, dilation, avg_pool_size, pull_kernel)
        for name in RESPONSES:
            response = inner(maps[name])
            amplitudes = [response[..., place].mean().item() for place in (inner_on_edge, ~inner_on_edge)]
            rows.append((number, noise_std, name, *amplitudes, snr_db(*amplitudes)))
        if noise_std == SHOWN_NOISE_STD:
            shown = {'input': inner(images)[0, 0], **{name: inner(maps[name])[0, 0] for name in RESPONSES}}

    figure = new_figure(4.8)
    grid = figure.add_gridspec(2, 1, height_ratios=(1, 1.7), hspace=0.08)
    axes = grid[0].subgridspec(1, len(shown)).subplots(squeeze=False)[0]
    brightest = max(shown[name].max().item() for name in RESPONSES)
    snr = {(noise_std, name): value for _, noise_std, name, _, _, value in rows}
    for axis, (name, image) in zip(axes, shown.items(), strict=True):
        low, high = (-1, 2) if name == 'input' else (0, brightest)
        axis.imshow(image.numpy(), cmap='gray', vmin=low, vmax=high)
        below = f'noise std {SHOWN_NOISE_STD}' if name == 'input' else _snr_words(snr[SHOWN_NOISE_STD, name])
        axis.set(xticks=[], yticks=[], title=name, xlabel=below)
    axis = figure.add_subplot(grid[1])
    for name in RESPONSES:
        values = [snr[noise_std, name] for noise_std in NOISE_STDS]
        heights = [value if value is not None and math.isfinite(value) else math.nan for value in values]
        words = ', '.join(dict.fromkeys(map(_snr_words, values))) if all(map(math.isnan, heights)) else ''
        axis.plot(NOISE_STDS, heights, label=f'{name}: {words}' if words else name, **LINES[name])
    axis.set(
        xlim=(-0.05, 1.05), xlabel="noise std (the edge's height is 1)", ylabel=f'SNR over {NOISE_DRAWS} draws (dB)'
    )
    axis.grid(color='0.88')
    axis.legend()
    window = f'window {avg_pool_size}' if avg_pool_size else 'no averaging'
    figure.suptitle(f'Filter {number}, α = {strength.item():.2g}, {window}')
    columns = ('filter', 'noise_std', 'response', 'edge_amplitude', 'background_amplitude', 'snr_db')
    return figure, columns, rows


def _snr_words(snr: float | None) -> str:
    if snr is None:
        return 'no response'
    if math.isinf(snr):
        return 'edge only' if snr > 0 else 'noise only'
    return f'{snr:.1f} dB'


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
    # One scale for all: from the 2% quantile, because the spectra have zeros, to the largest gain.
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
    axis.legend()
    channels = f'{len(alpha)} channels'
    figure.suptitle(f'{channels}, {negative:.0%} negative' if trainable else f'fixed, {channels}')
    return figure, ('channel', 'alpha'), enumerate(alpha.tolist())


def _to_png(figure: 'Figure') -> bytes:
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_fontsize(10)  # type: ignore[attr-defined]
    return to_png(figure)


def _shown(value: Any) -> Any:
    return f'{value:.7g}' if isinstance(value, float) else value
