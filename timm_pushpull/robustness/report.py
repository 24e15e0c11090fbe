"""Writes the report: an HTML page and its plots, from results folders or from one ``summary.csv``."""

import html
import json
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..drawing import to_png
from ..errors import InputError
from ..files import atomic_write
from . import page, plots
from .examples import read_examples
from .fairness import unfair_comparisons
from .intervals import columns_of
from .metrics import COMPARISONS, MEASURES
from .paired import checkpoint_pairs, paired_differences, significance
from .runs import (
    Runs,
    difference_of_means,
    differences_from_baseline,
    group_runs,
    means_over_runs,
    parse_pairs,
    select_runs,
    shift_means_over_runs,
)
from .shifts import shift_rows
from .store import differences, read_predictions, read_protocol
from .summary import baseline_of, check_baseline, model_of, read_baseline, read_summary, summarize

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ['write_report']


def write_report(
    results: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    baseline: str | None = None,
    note: str = '',
    pairs: Sequence[str] = (),
) -> Path:
    """Write a page with the tables and plots of measured robustness, and each plot as a PNG file.

    Results with different protocols never share a table or a plot: each protocol has its own part of the page. Models
    whose names differ only after an ``@`` are training runs of one model: the page then starts with their means and
    ranges. Single checkpoints are compared on the images, see :mod:`timm_pushpull.robustness.paired`.

    Args:
        results: Results folders; or one ``summary.csv``, whose page lacks the plots that need predictions.
        output: Folder of the page, made if it does not exist.
        baseline: Model that the others are compared with, see
            :func:`~timm_pushpull.robustness.summary.baseline_of`; None for the baseline of the summaries.
        note: A sentence for the top of the page.
        pairs: Pairs ``'FROM:TO'`` of models, or of names before the ``@`` of training runs. The page then has the
            difference of each pair (TO minus FROM), and a plot with an arrow from FROM to TO.

    Returns:
        The page, ``report.html``. It needs no other file.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed or, for differences, scipy.
        ValueError: If a folder holds no results, if a summary is not such a table or not the only one, or if the
            baseline or a name in a pair is not among the models.
    """
    output = Path(output)
    summary = next((Path(path) for path in results if Path(path).is_file()), None)
    if summary is None:
        sections = _folder_sections(_group_by_protocol(results), output, baseline, pairs)
    elif len(results) == 1:
        sections = _summary_sections(summary, output, baseline, pairs)
    else:
        raise InputError(f'{summary} is a file: name results folders, or one summary.csv.')
    if note:
        sections = [f'<p>{html.escape(note)}</p>', *sections]
    # Names of files may be any bytes.
    atomic_write(output / 'report.html', page.document(sections).encode(errors='replace'))
    return output / 'report.html'


class _Part:
    """Results of one protocol, from one folder or several."""

    def __init__(self, folder: Path, protocol: Mapping[str, Any]) -> None:
        self.folder = folder
        self.protocol = {**protocol, 'models': {}}
        self.folders: list[Path] = []
        self.predictions: dict[str, dict[tuple[str, int], np.ndarray]] = {}
        self.shifts: list[dict[str, Any]] = []
        self.baseline: str | None = None

    def add(self, folder: Path, protocol: Mapping[str, Any]) -> None:
        """Add a folder. Models of one name in several folders get different labels, if they differ."""
        self.folders.append(folder)
        predictions = {name: passes for name, passes in read_predictions(folder).items() if passes}
        if not predictions:
            raise InputError(f'{folder} holds no results yet: repeat the command that started it.')
        label_of = {}
        for name, passes in predictions.items():
            details = protocol['models'][name]
            labels = name, f'{name} ({folder.name})', f'{name} ({folder.resolve()})'
            label = next(label for label in labels if self.protocol['models'].get(label, details) == details)
            self.protocol['models'][label] = details
            label_of[name] = label
            self.predictions[label] = {**self.predictions.get(label, {}), **passes}
        shifts = [{**row, 'model': label_of[row['model']]} for row in shift_rows(folder) if row['model'] in label_of]
        self.shifts += [row for row in shifts if row not in self.shifts]
        self.baseline = self.baseline or read_baseline(folder)


def _shared(protocol: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that hold for all models."""
    return {key: value for key, value in protocol.items() if key != 'models'}


def _group_by_protocol(folders: Sequence[str | os.PathLike[str]]) -> list[_Part]:
    parts: dict[str, _Part] = {}
    for folder in map(Path, folders):
        protocol = read_protocol(folder)
        key = json.dumps(_shared(protocol), sort_keys=True)
        parts.setdefault(key, _Part(folder, protocol)).add(folder, protocol)
    return list(parts.values())


def _folder_sections(parts: Sequence[_Part], output: Path, baseline: str | None, pairs: Sequence[str]) -> list[str]:
    check_baseline(baseline, [name for part in parts for name in part.predictions])
    _check_pairs(pairs, [part.predictions.keys() for part in parts])
    if len(parts) == 1:
        return _folder_section(parts[0], output, '', baseline, pairs)
    first, *others = (_shared(part.protocol) for part in parts)
    fields = dict.fromkeys(page.protocol_field(field) for other in others for field, *_ in differences(first, other))
    sections = [
        f'<p>These folders have {len(parts)} protocols, which differ in {html.escape("; ".join(fields))}: do not '
        'compare numbers across the parts of this page.</p>'
    ]
    for number, part in enumerate(parts, 1):
        title = ', '.join(folder.name for folder in part.folders)
        sections.append(f'<hr><h1>Part {number}: {html.escape(title)}</h1>')
        sections += _folder_section(part, output, f'{number}-', baseline, pairs)
    return sections


def _folder_section(part: _Part, output: Path, prefix: str, baseline: str | None, pairs: Sequence[str]) -> list[str]:
    baseline = baseline or part.baseline
    has_baseline = any(baseline_of(name, baseline, part.predictions) for name in part.predictions)
    baseline = baseline if has_baseline else None
    rows = summarize(part.protocol, part.predictions, baseline)
    compared = [*checkpoint_pairs(part.predictions, baseline), *_single_checkpoints(group_runs(rows), pairs)]
    paired = paired_differences(part.protocol, part.predictions, dict.fromkeys(compared))
    examples = read_examples(part.folder, part.predictions)
    figures = {
        'reliability': plots.plot_reliability(part.predictions),
        'error_by_severity': plots.plot_error_by_severity(part.predictions),
        'examples': plots.plot_examples(examples[0], list(part.predictions)) if examples else None,
    }
    strips = [page.example_strips(examples, len(part.predictions) > 1)] if examples else []
    return [
        f'<p>{html.escape(page.protocol_sentence(part.protocol))}</p>',
        *_tables_and_plots(rows, part.shifts, paired, figures, strips, output, prefix, pairs),
        '<h2>Protocol</h2>',
        *(f'<p><b>{html.escape(sentence)}</b></p>' for sentence in unfair_comparisons(part.protocol, rows)),
        '<p>protocol.json has the same with whole hashes.</p>',
        page.protocol_table(part.protocol),
    ]


def _single_checkpoints(models: Runs, pairs: Sequence[str]) -> list[tuple[str, str]]:
    """Name the checkpoints of the pairs in which both sides have only one."""
    checkpoints = []
    for pair in parse_pairs(pairs, [run['model'] for runs in models.values() for run in runs]).values():
        runs = select_runs(models, pair)
        start, end = ([run['model'] for run in runs[name]] for name in pair)
        if len(start) == len(end) == 1:
            checkpoints.append((start[0], end[0]))
    return checkpoints


def _summary_sections(path: Path, output: Path, baseline: str | None, pairs: Sequence[str]) -> list[str]:
    rows = read_summary(path)
    if baseline is not None and baseline != rows[0]['baseline']:
        check_baseline(baseline, [row['model'] for row in rows])
        ratios = {column: '' for measure in COMPARISONS for column in columns_of(measure)}  # need the predictions
        rows = [{**row, **ratios, 'baseline': baseline} for row in rows]
    _check_pairs(pairs, [[row['model'] for row in rows]])
    words = html.escape(f'From {path.name}. The protocol is in protocol.json of its results folder.')
    return [f'<p>{words}</p>', *_tables_and_plots(rows, [], [], {}, [], output, '', pairs)]


def _check_pairs(pairs: Sequence[str], parts: Sequence[Collection[str]]) -> None:
    for pair in pairs:
        if not any(parse_pairs([pair], models) for models in parts):
            names = dict.fromkeys(name for models in parts for name in (*map(model_of, models), *models))
            raise InputError(
                f'pairs must be FROM:TO, names of models with one protocol, got {pair!r}. Models: {", ".join(names)}.'
            )


def _tables_and_plots(
    rows: Sequence[Mapping[str, Any]],
    shifts: Sequence[Mapping[str, Any]],
    paired: Sequence[Mapping[str, Any]],
    figures: Mapping[str, 'Figure | None'],
    strips: Sequence[str],
    output: Path,
    prefix: str,
    pairs: Sequence[str],
) -> list[str]:
    models = group_runs(rows)
    means = means_over_runs(models) if len(models) < len(rows) else []
    shown = means or rows  # tables and plots of every single run would be too full
    shown_shifts = shift_means_over_runs(shifts) if means else shifts
    spread = 'mean of the training runs, and their range' if means else 'with 95% intervals'
    corrupted = any(row.get(measure, '') != '' for row in rows for measure in ('plain_mCE', 'other_mCE'))
    ranked_by = 'under corruptions' if corrupted else 'on clean images'
    captions = {
        'overview': f'Top-1 error, {spread}; further left is better. The sets may differ in their classes.'
        + (f' The model with the lowest error {ranked_by} is on top.' if len(shown) > 1 else ''),
        'mce_against_clean_error': f'Plain mCE against the clean error, {spread}; {page.lower_left_note(shown)}',
        'error_by_corruption': f'Top-1 error by corruption, mean over the severities, {spread}.',
        'error_by_severity': 'Top-1 error by severity, mean over the corruptions of a kind; 0 is clean.',
        'reliability': 'Accuracy of predictions by their confidence, in 15 bins of equal width, on clean images and '
        'over all corruptions; below the line a model is too confident. Bins of fewer than 20 predictions are missing.',
    }
    drawn = {
        'mce_against_clean_error': plots.plot_mce_against_clean_error(shown),
        'error_by_corruption': plots.plot_error_by_corruption(shown),
        **figures,
    }
    reliability = drawn.pop('reliability', None)  # stands beside the calibration
    sections = _write_plot(
        plots.plot_overview(shown, shown_shifts), output / f'{prefix}overview.png', captions['overview']
    )
    measures = page.table(rows, ['model'], [*MEASURES])
    if means:
        sections += ['<h2>Over training runs</h2>', page.runs_table(means, rows), page.measure_notes(rows)]
    else:
        sections += ['<h2>Measures</h2>', measures, page.measure_notes(rows)]
    if shifts:
        sections += ['<h2>Natural shifts</h2>', page.shifts_table(shown_shifts)]
    baseline = rows[0]['baseline']
    if from_baseline := differences_from_baseline(models, baseline):
        sections += ['<h2>Difference from the baseline</h2>', page.baseline_differences(from_baseline, baseline)]
    if paired:
        sections += ['<h2>Differences of checkpoints</h2>', page.checkpoint_differences(paired)]
    if found := [*parse_pairs(pairs, [row['model'] for row in rows]).values()]:
        sections += _pair_sections(models, found, paired, output / f'{prefix}pairs.png')
    if calibration := page.calibration_table(shown):
        sections += ['<h2>Calibration</h2>', calibration]
        sections += _write_plot(reliability, output / f'{prefix}reliability.png', captions['reliability'])
    sections.append('<h2>Where the errors are</h2>')
    for name, figure in drawn.items():
        sections += _write_plot(figure, output / f'{prefix}{name}.png', captions.get(name, ''))
    corruptions = plots.measured_corruptions(rows)
    sections.append(page.corruption_table(shown, corruptions))
    if means:
        tables = [measures, *([page.shifts_table(shifts)] if shifts else [])]
        tables.append(page.corruption_table(rows, corruptions))
        return [*sections, page.folded(f'The {len(rows)} single training runs', [*tables, *strips])]
    return [*sections, '<h2>Images and predictions</h2>', *strips] if strips else sections


def _pair_sections(
    models: Runs, pairs: Sequence[tuple[str, str]], paired: Sequence[Mapping[str, Any]], path: Path
) -> list[str]:
    runs = select_runs(models, dict.fromkeys(name for pair in pairs for name in pair))
    means = {row['model']: row for row in means_over_runs(runs)}
    of_checkpoints = {(row['from'], row['to']): row for row in paired}
    over_runs, findings = [], []
    for start, end in pairs:
        checkpoints = tuple(run['model'] for name in (start, end) for run in runs[name])
        row = of_checkpoints.get(checkpoints)
        if row is None:
            row = {'pair': f'{start} → {end}', 'runs (from, to)': f'{len(runs[start])}, {len(runs[end])}'}
            row |= difference_of_means(runs[start], runs[end])
            over_runs.append(row)
        findings.append(significance(row, 'plain_mCE'))
    caption = (
        'Plain mCE against the clean error, mean of the training runs. An arrow leads from the first model of a pair '
        'to the second.'
    )
    figure = plots.plot_pairs([(means[start], means[end]) for start, end in pairs], findings)
    tables = [page.pair_differences(over_runs)] if over_runs else []
    return ['<h2>Differences of pairs</h2>', *tables, *_write_plot(figure, path, caption)]


def _write_plot(figure: 'Figure | None', path: Path, caption: str) -> list[str]:
    """Write a plot, and return its part of the page: a plot without a caption has none."""
    if figure is None:
        return []
    png = to_png(figure)
    atomic_write(path, png)
    return [page.figure(png, caption)] if caption else []
