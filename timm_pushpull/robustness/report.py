"""A page, and its pictures, from results folders of :mod:`timm_pushpull.robustness.evaluate`."""

import base64
import functools
import html
import json
import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from timm.data import ImageNetInfo

from ..drawing import COLORS, new_figure, to_png
from ..files import atomic_write
from .metrics import HELD_OUT_CORRUPTIONS, TEST_CORRUPTIONS
from .store import (
    CLEAN,
    COMPARISONS,
    UNREAD,
    baseline_of,
    check_baseline,
    columns_of,
    compare,
    differences,
    not_compared,
    other_views,
    places_read,
    read_predictions,
    read_baseline,
    read_csv,
    read_protocol,
    read_summary,
    summarize,
    without_run,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ['write_report']

KINDS = {
    'noise': TEST_CORRUPTIONS[:3],
    'blur': TEST_CORRUPTIONS[3:7],
    'weather': TEST_CORRUPTIONS[7:11],
    'digital': TEST_CORRUPTIONS[11:],
    'held out': HELD_OUT_CORRUPTIONS,
}
RUN_MEASURES = ('E', 'plain_mCE', 'alexnet_normalized_mCE', *KINDS)
MARKERS = 'osD^vPX<'  # one more than there are colours: the eighth model differs from the first
ZERO_LINE = 'R_net = 0'
MEANS = {
    'E': 'top-1 error on clean pictures, %',
    'plain_mCE': 'plain mean of the top-1 errors over 15 corruptions, %: the mCE of the push-pull paper',
    'alexnet_normalized_mCE': "mean of each corruption's error over AlexNet's, %: the mCE of most other papers",
    'relative_mCE': "mean of what each corruption adds to the error, divided by what it adds to the baseline's, %",
    'R_net': 'net reduction in error: 100 ((mCE_b - mCE) + (E_b - E)) / (2 E_b), mCE being the plain one and b the '
    "baseline; inferred from the push-pull paper's table",
}
STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 46rem; margin: 0 auto;
       padding: 0 1rem 3rem; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 1.5rem 0 .5rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; }
p, figcaption, dd { max-width: 42rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem .3rem 0; text-align: right; vertical-align: top; border-bottom: 1px solid #ddd; }
th { font-weight: 600; }
th:first-child, td:first-child { text-align: left; }
td small { display: block; color: #555; white-space: nowrap; }
figure { margin: 1.5rem 0; }
figure img { width: 100%; max-width: 36rem; height: auto; }
.strip { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .8rem; margin: 1rem 0; }
.strip div { font-size: .85rem; line-height: 1.3; }
.strip img { width: 100%; height: auto; display: block; image-rendering: pixelated; margin-bottom: .2rem; }
.right { color: #00664a; } .wrong { color: #a33c00; }
dt { font-weight: 600; } dd { margin: 0 0 .4rem; }
.protocol { font-size: .85rem; } .protocol td { text-align: left; overflow-wrap: anywhere; }
@media (max-width: 30rem) { table { font-size: .85rem; } th, td { padding-right: .45rem; }
                            td small { white-space: normal; } }
@media print { body { max-width: none; font-size: 10pt; } figure, .strip div { break-inside: avoid; }
               figure img { max-width: 11cm; } h2 { break-after: avoid; }
               .strip { grid-template-columns: repeat(6, 1fr); } }
"""


def write_report(
    results: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    baseline: str | None = None,
    note: str = '',
) -> Path:
    """Write a page on the models of results folders, or of one summary, and the PNG files that it holds.

    Models whose protocols differ in more than the model never share a table or a picture: each protocol has its own
    part of the page. Models whose names differ only in what follows an ``@`` are training runs of one: their mean and
    range are told too.

    Args:
        results: Results folders; or one ``summary.csv``, whose page has what its figures can give.
        output: Folder of the page, made if it does not exist.
        baseline: What relative mCE and R_net are measured against, see :func:`~timm_pushpull.robustness.store.baseline_of`; by
            default that of the summaries.
        note: A sentence for the top of the page.

    Returns:
        The page, ``report.html``; it needs no other file.

    Raises:
        ModuleNotFoundError: If matplotlib or, for training runs, scipy is not installed.
        ValueError: If a folder holds no results, if a summary is no such table or is not alone, or if the baseline is
            not among the models.
    """
    output = Path(output)
    sections = [f'<p>{html.escape(note)}</p>' if note else '']
    if summary := next((path for path in results if Path(path).is_file()), None):
        if len(results) > 1:
            raise ValueError(f'{summary} is a file: name results folders, or one summary.csv.')
        sections.append(_summary_section(Path(summary), output, baseline))
    else:
        sections += _folder_sections(_by_protocol(results), output, baseline)
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Robustness to corruptions</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>\n'
        f'<body>\n<h1>Robustness to corruptions</h1>\n{"".join(sections)}</body></html>\n'
    )
    atomic_write(output / 'report.html', page.encode())
    return output / 'report.html'


class _Part:
    """Results of one protocol, from one folder or several."""

    def __init__(self, folder: Path, protocol: dict[str, Any]) -> None:
        self.folder, self.protocol = folder, {**protocol, 'models': {}}
        self.shared = _shared(protocol)
        self.folders: list[Path] = []
        self.answers: dict[str, dict[tuple[str, int], np.ndarray]] = {}
        self.baseline: str | None = None

    def add(self, folder: Path, protocol: Mapping[str, Any]) -> None:
        self.folders.append(folder)
        answers = {name: passes for name, passes in read_predictions(folder).items() if passes}
        if not answers:
            raise ValueError(f'{folder} holds no results yet: run the command again that began them.')
        for name, passes in answers.items():
            details = protocol['models'][name]
            labels = name, f'{name} ({folder.name})', f'{name} ({folder.resolve()})'
            label = next(label for label in labels if self.protocol['models'].get(label, details) == details)
            self.protocol['models'][label] = details
            self.answers[label] = {**self.answers.get(label, {}), **passes}
        self.baseline = self.baseline or read_baseline(folder)

    @functools.cached_property
    def pictures(self) -> list[dict[str, str]]:
        return read_csv(self.folder / 'pictures.csv')

    @functools.cached_property
    def classes(self) -> list[str]:
        """Names of the classes, in words where they are ImageNet's."""
        names = [row['name'] for row in read_csv(self.folder / 'classes.csv')]
        imagenet = ImageNetInfo()
        if not set(names) <= set(imagenet.label_names()):
            return names
        return [imagenet.label_name_to_description(name).split(',')[0] for name in names]

    @functools.cached_property
    def examples(self) -> dict[int, list[tuple[str, int, Path]]]:
        """Corruption, severity and file of the pictures that were kept, by the place of the picture."""
        names = [CLEAN, *(name for kind in KINDS.values() for name in kind)]
        found: dict[int, list[tuple[str, int, Path]]] = {}
        for path in self.folder.glob('examples/*.png'):
            corruption, severity, place = path.stem.rsplit('-', 2)
            found.setdefault(int(place), []).append((corruption, int(severity), path))
        return {place: sorted(found[place], key=lambda example: names.index(example[0])) for place in sorted(found)}


def _shared(protocol: Mapping[str, Any]) -> dict[str, Any]:
    """What holds for all models."""
    return {key: value for key, value in protocol.items() if key != 'models'}


def _by_protocol(folders: Sequence[str | os.PathLike[str]]) -> list[_Part]:
    parts: dict[str, _Part] = {}
    for folder in map(Path, folders):
        protocol = read_protocol(folder)
        key = json.dumps(_shared(protocol), sort_keys=True)
        parts.setdefault(key, _Part(folder, protocol)).add(folder, protocol)
    return list(parts.values())


def _folder_sections(parts: Sequence[_Part], output: Path, baseline: str | None) -> list[str]:
    check_baseline(baseline, [name for part in parts for name in part.answers])
    if len(parts) == 1:
        return [_folder_section(parts[0], output, '', baseline)]
    fields = dict.fromkeys(field for part in parts for field, *_ in differences(parts[0].shared, part.shared))
    sections = [
        f'<p>The folders were measured in {len(parts)} ways, which differ in {html.escape(", ".join(fields))}: do '
        'not compare the numbers of one part with those of another.</p>'
    ]
    for number, part in enumerate(parts, 1):
        title = ', '.join(folder.name for folder in part.folders)
        sections.append(f'<hr><h1>Part {number}: {html.escape(title)}</h1>')
        sections.append(_folder_section(part, output, f'{number}-', baseline))
    return sections


def _folder_section(part: _Part, output: Path, prefix: str, baseline: str | None) -> str:
    baseline = baseline or part.baseline
    is_here = any(baseline_of(name, baseline, part.answers) for name in part.answers)
    rows = summarize(part.protocol, part.answers, baseline if is_here else None)
    of_answers = {'error_by_severity': _error_by_severity(part.answers), 'examples': _examples(part)}
    return '\n'.join(
        [
            f'<p>{_in_words(part.protocol)}</p>',
            *_tables_and_pictures(rows, of_answers, output, prefix),
            *(['<h2>What the models saw and answered</h2>', *strips] if (strips := _strips(part)) else []),
            '<h2>How it was measured</h2>',
            '<p>All of it, with whole hashes, is in protocol.json.</p>',
            _protocol_table(part.protocol),
        ]
    )


def _summary_section(path: Path, output: Path, baseline: str | None) -> str:
    rows = read_summary(path)
    if baseline is not None and baseline != rows[0]['baseline']:
        rows = compare(rows, baseline)
    words = f'From {path.name}. How it was measured is in protocol.json of the results folder it comes from.'
    return '\n'.join([f'<p>{html.escape(words)}</p>', *_tables_and_pictures(rows, {}, output, '')])


def _tables_and_pictures(
    rows: Sequence[Mapping[str, Any]], of_answers: Mapping[str, 'Figure | None'], output: Path, prefix: str
) -> list[str]:
    models = _by_model(rows)
    over_runs = _over_runs(models) if len(models) < len(rows) else []
    shown = over_runs or rows  # every single run would be a crowd, and is in the tables
    pictures = {
        'mce_against_clean_error': _mce_against_clean_error(shown),
        'error_by_corruption': _error_by_corruption(shown),
        **of_answers,
    }
    spread = 'mean of the training runs, and their range' if over_runs else 'with 95% intervals'
    captions = {
        'mce_against_clean_error': f'Plain mCE against the clean error, {spread}; {_lower_left(shown)}',
        'error_by_corruption': f'Top-1 error by corruption, mean over the severities, {spread}.',
        'error_by_severity': 'Top-1 error by severity, mean over the corruptions of a kind; 0 is clean.',
    }
    figures = []
    for name, figure in pictures.items():
        if figure is not None:
            png = to_png(figure)
            atomic_write(output / f'{prefix}{name}.png', png)
            if name in captions:
                caption = captions[name]
                figures.append(f'<figure>{_img(png, caption)}<figcaption>{caption}</figcaption></figure>')
    return [
        '<h2>Measures</h2>',
        _table(rows),
        *(['<h2>Over training runs</h2>', _runs_table(over_runs, rows)] if over_runs else []),
        *_differences(models, rows[0]['baseline']),
        '<h2>Where the errors are</h2>',
        *figures,
        _corruption_table(rows),
    ]


def _lower_left(rows: Sequence[Mapping[str, Any]]) -> str:
    words = 'lower and further left is better.'
    if _row_of_baseline(rows) is not None:
        words += (
            ' On the line, the gain on corrupted pictures against the baseline equals the loss on clean ones '
            '(R_net = 0); below it the gain is larger.'
        )
    elif rows and not rows[0]['baseline']:
        words += ' With a baseline it would have the line on which gain and loss are equal.'
    return words


def _row_of_baseline(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    return next((row for row in rows if row['model'] == row['baseline']), None)


def _in_words(protocol: Mapping[str, Any]) -> str:
    data, corruptions = protocol['data'], protocol['corruptions']
    if 'generated_by' in corruptions:
        source = f'generated by {corruptions["generated_by"]}, seed {corruptions["seed"]}, on the cropped picture'
    else:
        source = f'stored ({corruptions["stored_as"]})'
    return html.escape(
        f'{data["images"]:,} pictures of {data["classes"]:,} classes; corruptions {source}. '
        'Intervals: the middle 95% of 1,000 resamples of the pictures.'
    )


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    means = _known(rows, MEANS)
    words = ''.join(f'<dt>{mean.replace("_", " ")}</dt><dd>{html.escape(MEANS[mean])}</dd>' for mean in means)
    notes = [f'Means over severities {severities}.'] if (severities := rows[0]['severities']) else []
    if any(row['plain_mCE'] == '' for row in rows):
        notes.append('Means over corruptions are left out where not all 15 were measured at all these severities.')
    if views := other_views(rows):
        notes.append(f'<b>{html.escape(views)}</b>')
    if baseline := next((row['baseline'] for row in rows if row['baseline']), ''):
        notes.append(f'Baseline: {html.escape(baseline)}. {html.escape(not_compared(rows))}'.rstrip())
    if unreadable := sum(row['unreadable'] for row in rows):
        notes.append(f'{unreadable} answers to pictures that could not be read are left out.')
    return f'{_measures_table(rows, ["model"], means)}<p>{" ".join(notes)}</p><dl>{words}</dl>'


def _by_model(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The training runs of each model, with the mean CE of each kind of corruption."""
    models: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        of_kinds = {kind: _mean_error_of(row, names) for kind, names in KINDS.items()}
        models.setdefault(without_run(row['model']), []).append({**row, **of_kinds})
    return models


def _over_runs(models: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """A row for each model: over its training runs the mean of each figure, its ends the range."""
    names = dict.fromkeys(name for runs in models.values() for run in runs for name in run)
    measured = [name for name in names if {*columns_of(name)} <= names.keys()]
    found = []
    for model, runs in models.items():
        figures: dict[str, Any] = {'model': model, 'runs': len(runs), 'baseline': runs[0]['baseline']}
        for name in (*measured, *KINDS):
            of_runs = [run.get(name, '') for run in runs]
            ends = ('', '', '') if '' in of_runs else (np.mean(of_runs), min(of_runs), max(of_runs))
            figures |= dict(zip(columns_of(name), ends, strict=True))
        found.append(figures)
    return found


def _less_baseline(models: Mapping[str, Sequence[Mapping[str, Any]]], baseline: str) -> list[dict[str, Any]]:
    """A row for each model that, as the baseline, has several training runs: its means less the baseline's.

    The ends are those of Welch's 95% interval: runs of one seed have no more in common than others.
    """
    several = {model: runs for model, runs in models.items() if len(runs) > 1}
    of_baseline = several.pop(baseline, None)
    if of_baseline is None:
        return []
    found = []
    for model, runs in several.items():
        difference: dict[str, Any] = {'model': model, 'runs': len(runs), 'of baseline': len(of_baseline)}
        for measure in RUN_MEASURES:
            errors, theirs = ([run[measure] for run in side] for side in (runs, of_baseline))
            ends = ('', '', '') if '' in errors + theirs else _difference(errors, theirs)
            difference |= dict(zip(columns_of(measure), ends, strict=True))
        found.append(difference)
    return found


def _difference(errors: Sequence[float], theirs: Sequence[float]) -> tuple[Any, Any, Any]:
    """The difference of two means, and the ends of its interval, none where no run differs from another."""
    try:
        from scipy.stats import ttest_ind
    except ModuleNotFoundError as error:
        message = "Intervals of differences need scipy: pip install 'timm-pushpull[report]'"
        raise ModuleNotFoundError(message, name=error.name) from error

    difference = np.mean(errors) - np.mean(theirs)
    if len(set(errors)) == len(set(theirs)) == 1:
        return difference, '', ''
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', RuntimeWarning)  # of runs that are equal on one side
        return difference, *ttest_ind(errors, theirs, equal_var=False).confidence_interval()


def _mean_error_of(row: Mapping[str, Any], corruptions: Sequence[str]) -> float | str:
    errors = [row.get(f'CE_{name}', '') for name in corruptions]
    return '' if '' in errors else float(np.mean(errors))


def _runs_table(over_runs: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> str:
    # Ratios to one run would tell that run's luck.
    measures = _known(over_runs, RUN_MEASURES + (COMPARISONS if _row_of_baseline(rows) is None else ()))
    note = 'Mean of the runs, and the smallest and the largest; of a kind of corruption, the mean CE.'
    if 'R_net' in measures:
        baseline = html.escape(rows[0]['baseline'])
        note += f' Relative mCE and R net compare each run with that of {baseline} with the same ending after the @.'
    return f'{_measures_table(over_runs, ["model", "runs"], measures)}<p>{note}</p>'


def _differences(models: Mapping[str, Sequence[Mapping[str, Any]]], baseline: str) -> list[str]:
    differences = _less_baseline(models, baseline)
    if not differences:
        return []
    note = (
        f"Points that the mean over a model's training runs is above that of {html.escape(baseline)}, with "
        "Welch's 95% interval for the difference of two means, on these pictures: one that holds 0 leaves open which "
        'is the larger, and one in 20 misses what more runs would give. A single run is not among them.'
    )
    table = _measures_table(differences, ['model', 'runs', 'of baseline'], _known(differences, RUN_MEASURES))
    return ['<h2>Less the baseline</h2>', f'{table}<p>{note}</p>']


def _known(rows: Sequence[Mapping[str, Any]], measures: Iterable[str]) -> list[str]:
    return [name for name in measures if any(row[name] != '' for row in rows)]


def _measures_table(rows: Sequence[Mapping[str, Any]], labels: Sequence[str], measures: Sequence[str]) -> str:
    """A line for each row: what it is of, then the measures with their intervals."""
    head = ''.join(f'<th>{name.replace("_", " ")}</th>' for name in (*labels, *measures))
    lines = [f'<tr>{head}</tr>']
    for row in rows:
        cells = [html.escape(str(row[label])) for label in labels] + [_with_interval(row, name) for name in measures]
        lines.append(f'<tr>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>')
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def _with_interval(row: Mapping[str, Any], measure: str) -> str:
    if row.get(measure, '') == '':
        return '–'
    value, low, high = (row[name] for name in columns_of(measure))
    interval = '' if '' in (low, high) else f'{_tenths(low)} to {_tenths(high)}'
    return f'{_tenths(value)}<small>{interval}</small>'


def _tenths(number: float) -> str:
    return f'{round(number, 1) + 0.0:.1f}'  # -0.0 is 0.0


def _measured(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    names = [name for kind in KINDS.values() for name in kind]
    return [name for name in names if any(row.get(f'CE_{name}', '') != '' for row in rows)]


def _words(corruption: str) -> str:
    return {'jpeg_compression': 'JPEG', 'elastic_transform': 'elastic'}.get(corruption, corruption.replace('_', ' '))


def _corruption_table(rows: Sequence[Mapping[str, Any]]) -> str:
    head = ''.join(f'<th>{html.escape(row["model"])}</th>' for row in rows)
    lines = [f'<tr><th>CE, %</th>{head}</tr>']
    for name in _measured(rows):
        cells = ''.join(f'<td>{_with_interval(row, f"CE_{name}")}</td>' for row in rows)
        lines.append(f'<tr><td>{_words(name)}</td>{cells}</tr>')
    note = f'Means over severities {rows[0]["severities"]}; – where a model was not shown all of them.' if rows else ''
    return f'<div class="wide"><table>{"".join(lines)}</table></div><p>{note}</p>'


def _img(png: bytes, words: str) -> str:
    return f'<img alt="{html.escape(words)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def _look(place: int) -> dict[str, Any]:
    return dict(color=COLORS[place % len(COLORS)], marker=MARKERS[place % len(MARKERS)], markersize=5)


def _legend(figure: 'Figure', axes: 'Axes') -> None:
    handles, labels = axes.get_legend_handles_labels()
    if labels[0] == ZERO_LINE:  # lines come before points
        handles, labels = handles[1:] + handles[:1], labels[1:] + labels[:1]
    figure.legend(handles, labels, loc='outside upper left', ncols=min(2, len(labels)), fontsize=9, frameon=False)


def _with_spread(row: Mapping[str, Any], measures: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Figures, and how far the ends of their intervals are below and above: two lines, as matplotlib's error bars."""
    figures = np.array([[row[name] for name in columns_of(measure)] for measure in measures], float)
    return figures[:, 0], np.abs(figures[:, 1:].T - figures[:, 0])  # a rounded mean may lie beside equal ends


def _error_by_corruption(rows: Sequence[Mapping[str, Any]]) -> 'Figure | None':
    names = _measured(rows)
    if not names:
        return None
    figure = new_figure(1.2 + max(0.3, 0.07 * len(rows)) * len(names) + 0.2 * len(rows) / 2)
    axes = figure.subplots()
    for place, row in enumerate(rows):
        shift = 0.8 * (place - (len(rows) - 1) / 2) / len(rows)
        here = [(height + shift, name) for height, name in enumerate(names) if row.get(f'CE_{name}', '') != '']
        if not here:
            continue
        errors, spread = _with_spread(row, [f'CE_{name}' for _, name in here])
        heights = [height for height, _ in here]
        axes.errorbar(errors, heights, xerr=spread, linestyle='', lw=1, label=row['model'], **_look(place))
    for kind in KINDS.values():
        if kind[0] in names and names.index(kind[0]):
            axes.axhline(names.index(kind[0]) - 0.5, color='#999', lw=0.8)
    axes.set_yticks(range(len(names)), [_words(name) for name in names], fontsize=9)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel('top-1 error, %', fontsize=9)
    axes.grid(axis='x', color='#ddd', lw=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9)
    _legend(figure, axes)
    return figure


def _error_by_severity(answers: Mapping[str, Mapping[tuple[str, int], np.ndarray]]) -> 'Figure | None':
    measured = {corruption for passes in answers.values() for corruption, _ in passes}
    kinds = {kind: [name for name in names if name in measured] for kind, names in KINDS.items()}
    kinds = {kind: names for kind, names in kinds.items() if names}
    if set(TEST_CORRUPTIONS) <= measured:
        kinds = {'all 15': list(TEST_CORRUPTIONS), **kinds}
    if not kinds:
        return None
    lines = (len(kinds) + 1) // 2
    figure = new_figure(0.6 + 1.9 * lines)
    panels = figure.subplots(lines, 2, sharex=True, sharey=True, squeeze=False)
    for panel, (kind, names) in zip(panels.flat, kinds.items(), strict=False):
        for place, (model, passes) in enumerate(answers.items()):
            severities, errors = _mean_errors(passes, names)
            panel.plot(severities, errors, lw=1.5, label=model, **_look(place))
        panel.set_title(kind, fontsize=9)
        panel.grid(color='#ddd', lw=0.6)
        panel.tick_params(labelsize=9, labelbottom=True)
        panel.set_xticks(range(6))
    if len(kinds) % 2:
        panels[-1, 1].remove()
    figure.supxlabel('severity', fontsize=9)
    figure.supylabel('top-1 error, %', fontsize=9)
    _legend(figure, panels[0, 0])
    return figure


def _mean_errors(passes: Mapping[tuple[str, int], np.ndarray], names: Iterable[str]) -> tuple[list[int], list[float]]:
    """Mean error over the corruptions at each severity at which all of them were measured."""
    points = {0: _error(passes[CLEAN, 0])} if (CLEAN, 0) in passes else {}
    for severity in range(1, 6):
        cells = [(name, severity) for name in names]
        if all(cell in passes for cell in cells):
            points[severity] = float(np.mean([_error(passes[cell]) for cell in cells]))
    return list(points), list(points.values())


def _error(answers: np.ndarray) -> float:
    read = places_read(answers)
    return 100 * float(np.mean(read != 0)) if len(read) else float('nan')


def _mce_against_clean_error(rows: Sequence[Mapping[str, Any]]) -> 'Figure | None':
    rows = [row for row in rows if row['E'] != '' and row['plain_mCE'] != '']
    if not rows:
        return None
    figure = new_figure(max(4.2, 3 + 0.1 * len(rows)))  # room for the legend
    axes = figure.subplots()
    for place, row in enumerate(rows):
        (x, y), spread = _with_spread(row, ['E', 'plain_mCE'])
        axes.errorbar(
            x, y, xerr=spread[:, :1], yerr=spread[:, 1:], linestyle='', lw=1, label=row['model'], **_look(place)
        )
    of_baseline = _row_of_baseline(rows)
    if of_baseline is not None:
        # R_net = 0: what mCE wins, E loses.
        point = (of_baseline['E'], of_baseline['plain_mCE'])
        limits = axes.get_xlim(), axes.get_ylim()
        axes.axline(point, slope=-1, color='#777', lw=1, ls='--', label=ZERO_LINE)
        axes.set(xlim=limits[0], ylim=limits[1])
    axes.set_xlabel('E: top-1 error on clean pictures, %', fontsize=9)
    axes.set_ylabel('plain mCE, %', fontsize=9)
    axes.grid(color='#ddd', lw=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9)
    _legend(figure, axes)
    return figure


def _strips(part: _Part) -> list[str]:
    classes = part.classes
    strips = []
    for place, examples in part.examples.items():
        target = int(part.pictures[place]['class'])
        tiles = []
        for corruption, severity, path in examples:
            lines = [f'<b>{_words(corruption)}{f" {severity}" if severity else ""}</b>']
            for model, answer in _answers_to(part, corruption, severity, place):
                right = answer == target
                words = f'{"✓" if right else "✗"}\u00a0{classes[answer] or answer}'
                models = f'{html.escape(model)}: ' if len(part.answers) > 1 else ''
                lines.append(f'{models}<span class="{"right" if right else "wrong"}">{html.escape(words)}</span>')
            tiles.append(f'<div>{_img(path.read_bytes(), corruption)}{"<br>".join(lines)}</div>')
        title = f'{classes[target] or f"class {target}"}: {part.pictures[place]["picture"]}'
        strips.append(f'<p>{html.escape(title)}</p><div class="strip">{"".join(tiles)}</div>')
    return strips


def _answers_to(part: _Part, corruption: str, severity: int, place: int) -> list[tuple[str, int]]:
    return [
        (model, int(passes[corruption, severity]['answer'][place]))
        for model, passes in part.answers.items()
        if (corruption, severity) in passes and passes[corruption, severity]['place'][place] != UNREAD
    ]


def _examples(part: _Part) -> 'Figure | None':
    """The first of the pictures that were kept, with each model's answer."""
    if not part.examples:
        return None
    place, examples = next(iter(part.examples.items()))
    classes, target = part.classes, int(part.pictures[place]['class'])
    lines = (len(examples) + 3) // 4
    figure = new_figure((1.35 + 0.14 * len(part.answers)) * lines + 0.3)
    panels = figure.subplots(lines, 4, squeeze=False)
    for panel in panels.flat:
        panel.axis('off')
    for panel, (corruption, severity, path) in zip(panels.flat, examples, strict=False):
        panel.imshow(np.asarray(Image.open(path)))
        panel.set_title(f'{_words(corruption)}{f" {severity}" if severity else ""}', fontsize=8, pad=2)
        for line, (model, answer) in enumerate(_answers_to(part, corruption, severity, place)):
            words = f'{"✓" if answer == target else "✗"} {classes[answer] or answer}'
            color = COLORS[list(part.answers).index(model) % len(COLORS)]
            spot = dict(xy=(0, 0), xycoords='axes fraction', xytext=(0, -9 - 9 * line), textcoords='offset points')
            panel.annotate(words[:20], fontsize=7, color=color, annotation_clip=False, **spot)
    for index, model in enumerate(part.answers):
        panels[0, 0].plot([], [], color=COLORS[index % len(COLORS)], lw=4, label=model)
    _legend(figure, panels[0, 0])
    return figure


def _protocol_table(protocol: Mapping[str, Any]) -> str:
    """What holds for all models, then a column for each."""
    general = _flat(_shared(protocol))
    models = {name: _flat(details) for name, details in protocol['models'].items()}
    fields = dict.fromkeys(field for details in models.values() for field in details)
    lines = [[field, value] for field, value in general.items()]
    columns = [['', *models], *([field, *(details.get(field, '–') for details in models.values())] for field in fields)]
    return f'<div class="protocol">{_plain_table(lines)}<p></p><div class="wide">{_plain_table(columns)}</div></div>'


def _flat(value: Any, field: str = '') -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {field: value}
    return {name: leaf for key in value for name, leaf in _flat(value[key], f'{field} {key}'.strip()).items()}


def _plain_table(lines: Iterable[Sequence[Any]]) -> str:
    rows = (''.join(f'<td>{html.escape(_short(cell))}</td>' for cell in line) for line in lines)
    return f'<table>{"".join(f"<tr>{row}</tr>" for row in rows)}</table>'


def _short(cell: Any) -> str:
    """A hash by its first digits: the whole is in protocol.json."""
    text = str(cell)
    return text[:12] if re.fullmatch('[0-9a-f]{64}', text) else text
