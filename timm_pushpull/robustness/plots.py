"""Plots of a report, from the rows of a summary or from predictions."""

import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ..drawing import COLORS, new_figure
from .calibration import reliability_bins
from .examples import ExampleImage
from .intervals import columns_of
from .metrics import CLEAN, KINDS, TEST_CORRUPTIONS, display_name
from .store import Predictions, readable_ranks
from .summary import baseline_row, corruptions_of, model_of, other_corruptions

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

__all__ = [
    'measured_corruptions',
    'plot_error_by_corruption',
    'plot_error_by_severity',
    'plot_examples',
    'plot_mce_against_clean_error',
    'plot_overview',
    'plot_pairs',
    'plot_reliability',
]

MARKERS = 'osD^vPX<'  # one more than there are colours: the eighth model differs from the first
FEWEST_PREDICTIONS = 20  # of a bin in the reliability diagram
ZERO_LINE = 'R_net = 0'
SETS = {'E': 'clean (E)', 'other_mCE': 'other corruptions (other mCE)', 'plain_mCE': 'corrupted (plain mCE)'}
GAIN, LOSS, INCONCLUSIVE = COLORS[0], COLORS[1], '#999999'


def plot_overview(rows: Sequence[Mapping[str, Any]], shifts: Sequence[Mapping[str, Any]] = ()) -> 'Figure | None':
    """Plot the errors of each model on clean, corrupted and naturally shifted images, with intervals.

    Args:
        rows: Rows of a summary, or of its means over training runs.
        shifts: Errors of the same models on natural shifts, see
            :func:`~timm_pushpull.robustness.shifts.shift_rows`.

    Returns:
        The figure: models from the lowest plain mCE down, else in the order of the mean over other corruptions or of
        the clean error. None if no model has any of these errors.
    """
    points = {words: [(row, measure) for row in rows if row.get(measure, '') != ''] for measure, words in SETS.items()}
    for row in shifts:
        points.setdefault(row['shift'], []).append((row, 'top1_err'))
    points = {words: found for words, found in points.items() if found}
    if not points:
        return None
    by = next((measure for measure in reversed(SETS) if SETS[measure] in points), 'E')
    names = [row['model'] for row in sorted(rows, key=lambda row: (row.get(by, '') == '', row.get(by, '')))]
    titles = {name: _in_two_lines(name) if len(name) > 56 else name for name in names}
    starts, height = {}, 0.0  # of the errors of each model, below its name, in inches from the top
    for name in names:
        starts[name] = height + 0.05 + 0.17 * (titles[name].count('\n') + 1)
        height = starts[name] + 0.1 * (len(points) + 1)
    figure = new_figure(height + 0.6)
    axes = figure.subplots()
    for number, (words, found) in enumerate(points.items()):
        values, spread = (
            np.concatenate(parts, -1) for parts in zip(*(_with_spread(row, [m]) for row, m in found), strict=True)
        )
        heights = [starts[row['model']] + 0.08 + 0.1 * number for row, _ in found]
        axes.errorbar(values, heights, xerr=spread, linestyle='', lw=1, label=words, **_style(number))
    for name in names:
        axes.text(
            0.01,
            starts[name],
            titles[name],
            fontsize=9,
            va='bottom',
            linespacing=1,
            transform=axes.get_yaxis_transform(),
        )
        axes.axhline(starts[name] + 0.1 * (len(points) + 1), color='#999', lw=0.8)
    axes.set_yticks([])
    axes.set_ylim(height, 0)
    _label_error_axis(axes)
    _add_legend(figure, axes)
    return figure


def plot_mce_against_clean_error(rows: Sequence[Mapping[str, Any]]) -> 'Figure | None':
    """Plot plain mCE against the clean error, with intervals.

    Args:
        rows: Rows of a summary, or of its means over training runs.

    Returns:
        The figure, None if no row has both measures.
    """
    rows = [row for row in rows if row['E'] != '' and row['plain_mCE'] != '']
    if not rows:
        return None
    figure = new_figure(4)
    axes = figure.subplots()
    for number, row in enumerate(rows):
        (x, y), spread = _with_spread(row, ['E', 'plain_mCE'])
        axes.errorbar(
            x, y, xerr=spread[:, :1], yerr=spread[:, 1:], linestyle='', lw=1, label=row['model'], **_style(number)
        )
    baseline = baseline_row(rows)
    if baseline is not None:
        # R_net = 0: the gain in mCE equals the loss in E.
        limits = axes.get_xlim(), axes.get_ylim()
        axes.axline((baseline['E'], baseline['plain_mCE']), slope=-1, color='#777', lw=1, ls='--', label=ZERO_LINE)
        axes.set(xlim=limits[0], ylim=limits[1])
    _label_errors(axes)
    _add_legend(figure, axes)
    return figure


def plot_error_by_corruption(rows: Sequence[Mapping[str, Any]]) -> 'Figure | None':
    """Plot CE of each corruption and model, with intervals.

    Args:
        rows: Rows of a summary, or of its means over training runs.

    Returns:
        The figure, None if no row has a CE.
    """
    names = measured_corruptions(rows)
    if not names:
        return None
    figure = new_figure(1 + max(0.3, 0.07 * len(rows)) * len(names))
    axes = figure.subplots()
    for number, row in enumerate(rows):
        shift = 0.8 * (number - (len(rows) - 1) / 2) / len(rows)
        lines = [(height + shift, name) for height, name in enumerate(names) if row.get(f'CE_{name}', '') != '']
        if not lines:
            continue
        errors, spread = _with_spread(row, [f'CE_{name}' for _, name in lines])
        heights = [height for height, _ in lines]
        axes.errorbar(errors, heights, xerr=spread, linestyle='', lw=1, label=row['model'], **_style(number))
    kinds = [next((kind for kind, members in KINDS.items() if name in members), 'other') for name in names]
    for place in range(1, len(names)):
        if kinds[place] != kinds[place - 1]:
            axes.axhline(place - 0.5, color='#999', lw=0.8)
    axes.set_yticks(range(len(names)), [display_name(name) for name in names], fontsize=9)
    axes.set_ylim(len(names) - 0.5, -0.5)
    _label_error_axis(axes)
    _add_legend(figure, axes)
    return figure


def _label_error_axis(axes: 'Axes') -> None:
    axes.set_xlabel('top-1 error, %', fontsize=9)
    axes.grid(axis='x', color='#ddd', lw=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9)


def measured_corruptions(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Name the corruptions for which some row has a CE: test corruptions first, those that ImageNet-C lacks last."""
    names = dict.fromkeys([*(name for kind in KINDS.values() for name in kind), *corruptions_of(rows)])
    return [name for name in names if any(row.get(f'CE_{name}', '') != '' for row in rows)]


def plot_error_by_severity(predictions: Predictions) -> 'Figure | None':
    """Plot the mean error over all test corruptions, and over each kind, against the severity.

    Args:
        predictions: Predictions of the models. Several training runs of a model share a line, their mean.

    Returns:
        The figure, None if there are no predictions for a corruption.
    """
    measured = {corruption for passes in predictions.values() for corruption, _ in passes}
    kinds = {kind: [name for name in names if name in measured] for kind, names in KINDS.items()}
    kinds['other'] = other_corruptions(predictions)
    kinds = {kind: names for kind, names in kinds.items() if names}
    if set(TEST_CORRUPTIONS) <= measured:
        kinds = {'all 15': list(TEST_CORRUPTIONS), **kinds}
    if not kinds:
        return None
    models = _runs_of_models(predictions)
    lines = (len(kinds) + 1) // 2
    figure = new_figure(0.4 + 1.9 * lines)
    panels = figure.subplots(lines, 2, sharex=True, sharey=True, squeeze=False)
    for panel, (kind, names) in zip(panels.flat, kinds.items(), strict=False):
        for number, (model, runs) in enumerate(models.items()):
            points = [_mean_errors(passes, names) for passes in runs]
            severities = [severity for severity in range(6) if all(severity in run for run in points)]
            errors = [np.mean([run[severity] for run in points]) for severity in severities]
            panel.plot(severities, errors, lw=1.5, label=model, **_style(number))
        panel.set_title(kind, fontsize=9)
        panel.grid(color='#ddd', lw=0.6)
        panel.tick_params(labelsize=9, labelbottom=True)
        panel.set_xticks(range(6))
    if len(kinds) % 2:
        panels[-1, 1].remove()
    figure.supxlabel('severity', fontsize=9)
    figure.supylabel('top-1 error, %', fontsize=9)
    _add_legend(figure, panels[0, 0])
    return figure


def plot_reliability(predictions: Predictions) -> 'Figure | None':
    """Plot the accuracy of predictions against their confidence: on clean images, and over all test corruptions.

    Args:
        predictions: Predictions of the models. Several training runs of a model share a line, from all their
            predictions.

    Returns:
        The figure, None if no bin has enough predictions.
    """
    panels: dict[str, dict[str, list[np.ndarray]]] = {'clean': {}, 'corrupted': {}}
    for name, runs in _runs_of_models(predictions).items():
        for (corruption, _), array in (item for passes in runs for item in passes.items()):
            known = array[~np.isnan(array['confidence'])]
            if len(known) and corruption in (CLEAN, *TEST_CORRUPTIONS):
                panels['clean' if corruption == CLEAN else 'corrupted'].setdefault(name, []).append(known)
    lines = {
        title: {name: line for name, arrays in models.items() if len(line := _reliability(np.concatenate(arrays)))}
        for title, models in panels.items()
    }
    lines = {title: models for title, models in lines.items() if models}
    if not lines:
        return None
    figure = new_figure(2.9)
    names = list(_runs_of_models(predictions))
    for axes, (title, models) in zip(np.atleast_1d(figure.subplots(1, len(lines))), lines.items(), strict=True):
        axes.plot([0, 1], [0, 1], color='#777', lw=1, ls='--')
        for name, line in models.items():
            axes.plot(*line.T, lw=1.5, label=name, clip_on=False, **_style(names.index(name)))
        axes.set_title(title, fontsize=9)
        axes.set_aspect('equal')
        axes.set(xlim=(0, 1), ylim=(0, 1))
        axes.grid(color='#ddd', lw=0.6)
        axes.tick_params(labelsize=9)
    figure.supxlabel('confidence', fontsize=9)
    figure.supylabel('accuracy', fontsize=9)
    _add_legend(figure, max(figure.axes, key=lambda axes: len(axes.lines)))
    return figure


def _reliability(predictions: np.ndarray) -> np.ndarray:
    """Return mean confidence and accuracy (B, 2) of the bins with enough predictions."""
    bins = reliability_bins(predictions['confidence'], predictions['rank'] == 0)
    return bins[bins[:, 0] >= FEWEST_PREDICTIONS, 1:]


def _runs_of_models(predictions: Predictions) -> dict[str, list[Mapping[tuple[str, int], np.ndarray]]]:
    """Group training runs by model; where no model has several, each keeps its name with the run."""
    models: dict[str, list[Mapping[tuple[str, int], np.ndarray]]] = {}
    for name, passes in predictions.items():
        models.setdefault(model_of(name), []).append(passes)
    return models if len(models) < len(predictions) else {name: [predictions[name]] for name in predictions}


def _mean_errors(passes: Mapping[tuple[str, int], np.ndarray], names: Iterable[str]) -> dict[int, float]:
    """Compute the mean error over the corruptions at each severity for which all of them have predictions."""
    points = {0: _error(passes[CLEAN, 0])} if (CLEAN, 0) in passes else {}
    for severity in range(1, 6):
        keys = [(name, severity) for name in names]
        if all(key in passes for key in keys):
            points[severity] = float(np.mean([_error(passes[key]) for key in keys]))
    return points


def _error(predictions: np.ndarray) -> float:
    ranks = readable_ranks(predictions)
    return 100 * float(np.mean(ranks != 0)) if len(ranks) else float('nan')


def plot_examples(example: ExampleImage, models: Sequence[str]) -> 'Figure':
    """Draw one image, clean and corrupted, with the predictions of the models below each view.

    Args:
        example: The image.
        models: Names of the models, in the order of their colours.

    Returns:
        The figure.
    """
    lines = (len(example.views) + 3) // 4
    figure = new_figure((1.35 + 0.14 * len(models)) * lines + 0.1)
    panels = figure.subplots(lines, 4, squeeze=False)
    for panel in panels.flat:
        panel.axis('off')
    colors = {model: COLORS[number % len(COLORS)] for number, model in enumerate(models)}
    for panel, view in zip(panels.flat, example.views, strict=False):
        panel.imshow(np.asarray(Image.open(view.path)))
        panel.set_title(view.title, fontsize=8, pad=2)
        for line, (model, label, correct) in enumerate(view.predictions):
            spot = dict(xy=(0, 0), xycoords='axes fraction', xytext=(0, -9 - 9 * line), textcoords='offset points')
            words = f'{"✓" if correct else "✗"} {label}'
            panel.annotate(words[:20], fontsize=7, color=colors[model], annotation_clip=False, **spot)
    for model, color in colors.items():
        panels[0, 0].plot([], [], color=color, lw=4, label=model)
    _add_legend(figure, panels[0, 0])
    return figure


def plot_pairs(
    pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]], findings: Sequence[str] = ()
) -> 'Figure | None':
    """Plot plain mCE against the clean error for pairs of models, with an arrow between the models of a pair.

    Args:
        pairs: Rows of the two models of each pair: rows of a summary, or of its means over training runs.
        findings: The :func:`~timm_pushpull.robustness.paired.significance` of the difference in plain mCE of each pair.
            An arrow whose difference is not significant is grey.

    Returns:
        The figure, None if no pair has both measures.
    """
    arrows = [
        (pair, finding)
        for pair, finding in zip(pairs, findings or [''] * len(pairs), strict=True)
        if all(row[measure] != '' for row in pair for measure in ('E', 'plain_mCE'))
    ]
    if not arrows:
        return None
    points = {row['model']: (row['E'], row['plain_mCE']) for pair, _ in arrows for row in pair}
    lines = [(points[start['model']], points[end['model']]) for (start, end), _ in arrows]
    figure = new_figure(4)
    axes = figure.subplots()
    for (start, end), (_, finding) in zip(lines, arrows, strict=True):
        color = GAIN if end[1] < start[1] else LOSS
        if finding not in ('', 'lower', 'higher'):
            color = INCONCLUSIVE
        style = dict(arrowstyle='-|>', color=color, lw=1.6, mutation_scale=11, shrinkA=3, shrinkB=3)
        axes.annotate('', xy=end, xytext=start, arrowprops=style)
    axes.plot(*zip(*points.values(), strict=True), 'o', color='#333', markersize=4, zorder=4)
    axes.margins(x=0.22, y=0.14)  # room for names
    words_of_colors = [(GAIN, 'plain mCE falls'), (LOSS, 'plain mCE does not fall')]
    if findings:
        words_of_colors.append((INCONCLUSIVE, 'plain mCE: interval holds 0'))
    for color, words in words_of_colors:
        axes.plot([], [], color=color, lw=1.6, label=words)
    _label_errors(axes)
    _add_legend(figure, axes)
    _label_points(figure, axes, points, lines)
    return figure


def _label_points(
    figure: 'Figure',
    axes: 'Axes',
    points: Mapping[str, tuple[float, float]],
    lines: Sequence[tuple[tuple[float, float], tuple[float, float]]],
) -> None:
    """Write the name of each point beside it, where it hides least and no other point is nearer."""
    figure.draw_without_rendering()  # the layout decides where a point is
    frame = axes.get_window_extent()
    pixels = {name: axes.transData.transform(point) for name, point in points.items()}
    steps = np.linspace(0, 1, 60)[:, None]
    ends = axes.transData.transform(np.reshape(lines, (-1, 2))).reshape(-1, 2, 2)
    marks = np.concatenate([start * (1 - steps) + end * steps for start, end in ends])

    def candidates(name: str) -> Iterator[tuple[float, 'Bbox', 'Text']]:
        for distance in (6, 12, 18):
            for right, up in ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1)):
                label = axes.annotate(
                    _in_two_lines(name),
                    points[name],
                    xytext=(distance * right, distance * up),
                    textcoords='offset points',
                    ha=('right', 'center', 'left')[right + 1],
                    va=('top', 'center', 'bottom')[up + 1],
                    fontsize=8,
                    linespacing=1,
                )
                box = label.get_window_extent().padded(2)
                gaps = {
                    other: np.hypot(*np.maximum(0, [box.min - at, at - box.max]).max(0)) for other, at in pixels.items()
                }
                cost = distance + ((marks > box.min) & (marks < box.max)).all(1).sum()
                cost += 100 * (box.x0 < frame.x0 or box.x1 > frame.x1 or box.y0 < frame.y0 or box.y1 > frame.y1)
                cost += 50 * any(gap <= gaps[name] for other, gap in gaps.items() if other != name)
                yield cost, box, label

    choices = {name: list(candidates(name)) for name in points}
    chosen: dict[str, tuple[float, Bbox, Text]] = {}
    for name in [*points] * 3:  # three rounds: a name can make room for a later name
        others = [box for other, (_, box, _) in chosen.items() if other != name]
        chosen[name] = min(choices[name], key=lambda choice: choice[0] + 100 * sum(map(choice[1].overlaps, others)))
    for name, labels in choices.items():
        for choice in labels:
            if choice is not chosen[name]:
                choice[2].remove()


def _in_two_lines(name: str) -> str:
    """Break a long name near its middle."""
    breaks = [match.end() for match in re.finditer('[-_./:@ ]', name)] if len(name) > 14 else []
    middle = min(breaks, key=lambda place: abs(place - len(name) / 2), default=0)
    return f'{name[:middle]}\n{name[middle:]}' if middle else name


def _label_errors(axes: 'Axes') -> None:
    axes.set_xlabel('E: top-1 error on clean images, %', fontsize=9)
    axes.set_ylabel('plain mCE, %', fontsize=9)
    axes.grid(color='#ddd', lw=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9)


def _with_spread(row: Mapping[str, Any], measures: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return values (M,) and the distances (2, M) to the low and the high ends of their intervals, NaN without one."""
    cells = [[row[column] for column in columns_of(measure)] for measure in measures]
    numbers = np.array([[np.nan if cell == '' else cell for cell in three] for three in cells], float)
    # Rounding can put a mean beside two equal ends, and error bars refuse negative lengths.
    return numbers[:, 0], np.abs(numbers[:, 1:].T - numbers[:, 0])


def _style(number: int) -> dict[str, Any]:
    return dict(color=COLORS[number % len(COLORS)], marker=MARKERS[number % len(MARKERS)], markersize=5)


def _add_legend(figure: 'Figure', axes: 'Axes') -> None:
    handles, labels = axes.get_legend_handles_labels()
    if labels[0] == ZERO_LINE:  # lines come before points
        handles, labels = handles[1:] + handles[:1], labels[1:] + labels[:1]
    columns = 2 if len(labels) > 1 and max(map(len, labels)) <= 24 else 1
    labels = [textwrap.fill(label, 50 // columns) for label in labels]
    lines = sum(label.count('\n') + 1 for label in labels) / columns
    figure.set_figheight(figure.get_figheight() + 0.18 * lines)  # room for the legend
    figure.legend(handles, labels, loc='outside upper left', ncols=columns, fontsize=9, frameon=False)
