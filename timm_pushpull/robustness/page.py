"""HTML of a report: tables, figures and notes.

Unless they say otherwise, the functions return HTML, and ``rows`` are rows of a summary or of its means over training
runs.
"""

import base64
import html
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .calibration import CALIBRATION
from .examples import ExampleImage
from .intervals import columns_of
from .metrics import COMPARISONS, KINDS, MEASURES, display_name
from .paired import CAVEAT, comparison_sentence, significance, tenths
from .runs import RUN_MEASURES
from .shifts import SHIFT_MEASURES
from .summary import baseline_row, corruptions_of, not_compared, view_differences

__all__ = [
    'baseline_differences',
    'calibration_table',
    'checkpoint_differences',
    'corruption_table',
    'document',
    'example_strips',
    'figure',
    'folded',
    'lower_left_note',
    'measure_notes',
    'pair_differences',
    'protocol_field',
    'protocol_sentence',
    'protocol_table',
    'runs_table',
    'shifts_table',
    'table',
]

# Makes a button of each head of a sortable table. Cells sort by data-value: numbers as numbers, empty cells last.
SCRIPT = """
for (const table of document.querySelectorAll('table.sortable')) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  if (body.rows.length > 1) heads.forEach((head, column) => {
    const button = document.createElement('button');
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener('click', () => {
      const up = head.getAttribute('aria-sort') !== 'ascending', sign = up ? 1 : -1;
      const value = row => row.cells[column].dataset.value;
      const compare = (a, b) => isNaN(a) || isNaN(b) ? a.localeCompare(b, 'en', {numeric: true}) : a - b;
      const rows = [...body.rows].sort((a, b) => {
        const [x, y] = [value(a), value(b)];
        return (x === '') - (y === '') || sign * compare(x, y);
      });
      heads.forEach(other => other.removeAttribute('aria-sort'));
      head.setAttribute('aria-sort', up ? 'ascending' : 'descending');
      body.append(...rows);
    });
  });
}
"""
STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 46rem; margin: 0 auto;
       padding: 0 1rem 3rem; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 1.5rem 0 .5rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; }
p, figcaption, dd { max-width: 42rem; }
/* A wide table grows beyond the text to both sides of the page, and scrolls where the page ends. */
.wide { overflow-x: auto; width: max-content; min-width: 100%; max-width: calc(100vw - 3rem); position: relative;
        left: 50%; transform: translateX(-50%); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem .3rem 0; text-align: right; vertical-align: top; border-bottom: 1px solid #ddd; }
th { font-weight: 600; max-width: 14rem; }
th:first-child, td:first-child { text-align: left; }
.wide th:first-child, .wide td:first-child { position: sticky; left: 0; background: #fff; min-width: 7.5rem;
                                             max-width: 18rem; overflow-wrap: anywhere; }
th button { font: inherit; color: inherit; text-align: inherit; background: none; border: 0; padding: 0;
            cursor: pointer; }
th button::after { content: " \\2195"; color: #767676; }
th[aria-sort=ascending] button::after { content: " \\2191"; color: inherit; }
th[aria-sort=descending] button::after { content: " \\2193"; color: inherit; }
summary { cursor: pointer; font-size: 1.2rem; font-weight: 600; margin: 2.5rem 0 .5rem; }
td small { display: block; color: #555; white-space: nowrap; font-weight: 400; }
figure { margin: 1.5rem 0; }
figure img { width: 100%; max-width: 36rem; height: auto; }
.strip { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .8rem; margin: 1rem 0; }
.strip div { font-size: .85rem; line-height: 1.3; }
.strip img { width: 100%; height: auto; display: block; image-rendering: pixelated; margin-bottom: .2rem; }
.right { color: #00664a; } .wrong { color: #a33c00; }
dt { font-weight: 600; } dd { margin: 0 0 .4rem; }
.protocol { font-size: .85rem; } .protocol td { text-align: left; max-width: 18rem; }
@media (max-width: 30rem) { table { font-size: .85rem; } th, td { padding-right: .45rem; }
                            th { min-width: 3.6rem; max-width: 7rem; overflow-wrap: anywhere; }
                            th:not([aria-sort]) button::after { content: none; }
                            .wide { max-width: 100%; }
                            .wide th:first-child, .wide td:first-child { min-width: 6rem; max-width: 6rem; } }
@media print { th button::after { content: none !important; }
               body { max-width: none; font-size: 10pt; } figure, .strip div { break-inside: avoid; }
               figure img { max-width: 11cm; } h2 { break-after: avoid; }
               .strip { grid-template-columns: repeat(6, 1fr); } }
"""


def document(sections: Iterable[str]) -> str:
    """Return the whole page, which needs no other file, from the HTML of its parts."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Robustness to corruptions</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>\n'
        f'<body>\n<h1>Robustness to corruptions</h1>\n{"".join(sections)}<script>{SCRIPT}</script></body></html>\n'
    )


def figure(png: bytes, caption: str) -> str:
    """Return a figure with its caption, which is also the alternative text of the image."""
    return f'<figure>{_image(png, caption)}<figcaption>{html.escape(caption)}</figcaption></figure>'


def _image(png: bytes, words: str) -> str:
    return f'<img alt="{html.escape(words)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def folded(title: str, sections: Iterable[str]) -> str:
    """Return a part of the page that opens on a click on its title."""
    return f'<details><summary>{html.escape(title)}</summary>{"".join(sections)}</details>'


def table(rows: Sequence[Mapping[str, Any]], labels: Sequence[str], measures: Sequence[str]) -> str:
    """Return a table with one line for each row, which sorts by a click on the head of a column.

    Args:
        rows: Rows of a summary, or rows with the same columns.
        labels: Columns without an interval, which come first.
        measures: Measures with an interval. A measure that no row has is left out.
    """
    measures = _known(rows, measures)
    heads = [name.replace('_', ' ') for name in (*labels, *measures)]
    lines = [
        [
            *(_cell(row[label]) for label in labels),
            *(_cell(row.get(name, ''), _with_interval(row, name)) for name in measures),
        ]
        for row in rows
    ]
    return _sortable(heads, lines)


def _sortable(heads: Iterable[str], lines: Iterable[Sequence[str]]) -> str:
    """Return a table that sorts, from the words of its head and the cells of its lines."""
    head = ''.join(f'<th scope="col">{html.escape(words)}</th>' for words in heads)
    body = ''.join(f'<tr>{"".join(cells)}</tr>' for cells in lines)
    return (
        f'<div class="wide"><table class="sortable"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _cell(value: Any, shown: str | None = None) -> str:
    """Return a cell that sorts by its value; its HTML is given if it is not the value itself."""
    words = html.escape(str(value))
    return f'<td data-value="{words}">{words if shown is None else shown}</td>'


def _known(rows: Sequence[Mapping[str, Any]], measures: Iterable[str]) -> list[str]:
    return [name for name in measures if any(row.get(name, '') != '' for row in rows)]


def _definitions(rows: Sequence[Mapping[str, Any]], meanings: Mapping[str, str]) -> str:
    """Return the meaning of each measure that a row has."""
    terms = (
        f'<dt>{name.replace("_", " ")}</dt><dd>{html.escape(meanings[name])}</dd>' for name in _known(rows, meanings)
    )
    return f'<dl>{"".join(terms)}</dl>'


def _with_interval(row: Mapping[str, Any], measure: str) -> str:
    if row.get(measure, '') == '':
        return '–'
    value, low, high = (row[column] for column in columns_of(measure))
    words = '{:.3f}'.format if measure.endswith(('NLL', 'Brier')) else tenths
    interval = '' if '' in (low, high) else f'{words(low)} to {words(high)}'
    return f'{words(value)}<small>{interval}</small>'


def measure_notes(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return what limits the measures and their comparison, and the definition of each measure."""
    notes = [f'Means over severities {severities}.'] if (severities := rows[0]['severities']) else []
    if any(row['plain_mCE'] == '' for row in rows):
        notes.append('A mean over corruptions needs all 15 corruptions at all these severities.')
    if views := view_differences(rows):
        notes.append(f'<b>{html.escape(views)}</b>')
    if baseline := next((row['baseline'] for row in rows if row['baseline']), ''):
        notes.append(f'Baseline: {html.escape(baseline)}. {html.escape(not_compared(rows))}'.rstrip())
    if unreadable := sum(row['unreadable'] for row in rows):
        notes.append(f'{unreadable} predictions are missing: their images could not be read.')
    return f'<p>{" ".join(notes)}</p>{_definitions(rows, MEASURES)}'


def shifts_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of errors on natural shifts, and what its columns hold.

    Args:
        rows: What :func:`~timm_pushpull.robustness.shifts.shift_rows` returns, or their means over training runs.
    """
    over_runs = 'runs' in rows[0]
    labels = ['model', *(['runs'] if over_runs else []), 'shift', 'images', 'classes']
    note = f'<p>{RUNS_NOTE}</p>' if over_runs else ''
    return table(rows, labels, list(SHIFT_MEASURES)) + note + _definitions(rows, SHIFT_MEASURES)


def calibration_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of the calibration, and what its columns hold; '' if no row has a calibration."""
    known = _known(rows, CALIBRATION)
    if not known:
        return ''
    note = '' if 'runs' in rows[0] else '<p>ECE has no interval: it is larger on resampled images by construction.</p>'
    return f'{table(rows, ["model"], known)}{note}{_definitions(rows, CALIBRATION)}'


RUNS_NOTE = 'Mean of the training runs, with the lowest and the highest run.'


def runs_table(means: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of means over training runs.

    Args:
        means: What :func:`~timm_pushpull.robustness.runs.means_over_runs` returns.
        rows: Rows of the summary.
    """
    # Comparisons with a single run of the baseline would depend on the luck of that run.
    comparisons = COMPARISONS if baseline_row(rows) is None else ()
    note = f'{RUNS_NOTE} Columns noise, blur, ...: mean CE.'
    if any(row['R_net'] != '' for row in means) and comparisons:
        baseline = html.escape(rows[0]['baseline'])
        note += f' Relative mCE and R net compare each run with the run of {baseline} with the same text after the @.'
    return f'{table(means, ["model", "runs"], [*RUN_MEASURES, *comparisons])}<p>{note}</p>'


INTERVAL_NOTE = (
    "The interval is Welch's 95% interval for the difference of two means over training runs, on these images. An "
    'interval that holds 0 does not tell which mean is larger. About one interval in 20 misses the difference that '
    'more runs would give.'
)


def baseline_differences(differences: Sequence[Mapping[str, Any]], baseline: str) -> str:
    """Return the table of differences from the baseline.

    Args:
        differences: What :func:`~timm_pushpull.robustness.runs.differences_from_baseline` returns.
        baseline: Name of the baseline.
    """
    note = (
        f'Points: the mean over the training runs of a model minus the mean over those of {html.escape(baseline)}. '
        f'Models with a single run are left out. {INTERVAL_NOTE}'
    )
    return f'{table(differences, ["model", "runs", "baseline runs"], RUN_MEASURES)}<p>{note}</p>'


def pair_differences(differences: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of differences of pairs.

    Args:
        differences: What :func:`~timm_pushpull.robustness.runs.difference_of_means` returns for each pair, with its
            names as ``pair`` and its numbers of training runs as ``runs (from, to)``.
    """
    note = (
        'Points: the mean over the training runs of the second model minus the mean over those of the first. A single '
        f'run has no such interval. {INTERVAL_NOTE}'
    )
    return f'{table(differences, ["pair", "runs (from, to)"], RUN_MEASURES)}<p>{note}</p>'


def checkpoint_differences(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a sentence on each pair of checkpoints, and the table of their differences with one line a measure.

    Args:
        rows: What :func:`~timm_pushpull.robustness.paired.paired_differences` returns.
    """
    sentences = ''.join(f'<p>{html.escape(sentence)}</p>' for row in rows if (sentence := comparison_sentence(row)))
    head = ''.join(f'<th>{html.escape(row["to"])} minus {html.escape(row["from"])}</th>' for row in rows)
    lines = [f'<tr><th>points</th>{head}</tr>']
    errors = [f'CE_{name}' for name in corruptions_of(rows)]
    for measure in (*RUN_MEASURES, *errors):
        cells = [_with_interval(row, measure) for row in rows]
        if any(significance(row, measure) for row in rows):
            bold = (significance(row, measure) in ('lower', 'higher') for row in rows)
            cells = [f'<b>{cell}</b>' if is_bold else cell for cell, is_bold in zip(cells, bold, strict=True)]
            lines.append(
                f'<tr>{"".join(f"<td>{cell}</td>" for cell in (_display_name_of_measure(measure), *cells))}</tr>'
            )
    note = (
        'The interval spans the middle 95% of the differences over 1,000 resamples of the images, which both models '
        'share. Bold: the interval excludes 0. About one interval in 20 misses the difference that more images would '
        f'give. {CAVEAT}'
    )
    return f'{sentences}<div class="wide"><table>{"".join(lines)}</table></div><p>{note}</p>'


def _display_name_of_measure(measure: str) -> str:
    if measure in KINDS:
        return f'{measure}: mean CE'
    if measure.startswith('CE_'):
        return f'CE {display_name(measure.removeprefix("CE_"))}'
    return measure.replace('_', ' ')


def lower_left_note(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return how to read a plot of plain mCE against the clean error of these rows, as text."""
    words = 'lower and further left is better.'
    if baseline_row(rows) is not None:
        words += (
            ' On the line, the gain on corrupted images against the baseline equals the loss on clean images '
            '(R_net = 0); below the line the gain is larger.'
        )
    elif rows and not rows[0]['baseline']:
        words += ' With a baseline the plot would show the line on which gain and loss are equal.'
    return words


def corruption_table(rows: Sequence[Mapping[str, Any]], corruptions: Sequence[str]) -> str:
    """Return the table of CE by corruption and model."""
    lines = [
        [
            _cell(display_name(name)),
            *(_cell(row.get(f'CE_{name}', ''), _with_interval(row, f'CE_{name}')) for row in rows),
        ]
        for name in corruptions
    ]
    note = f'Means over severities {rows[0]["severities"]}; –: not measured at all severities.'
    if 'runs' in rows[0]:
        note += f' {RUNS_NOTE}'
    return f'{_sortable(["CE, %", *(row["model"] for row in rows)], lines)}<p>{note}</p>'


def example_strips(examples: Sequence[ExampleImage], name_models: bool) -> str:
    """Return images as a model saw them, with the predictions of the models.

    Args:
        examples: The images.
        name_models: Put the name of the model before its prediction.
    """
    strips = []
    for image in examples:
        tiles = []
        for view in image.views:
            lines = [f'<b>{view.title}</b>']
            for model, label, correct in view.predictions:
                words = html.escape(f'{"✓" if correct else "✗"}\u00a0{label}')
                prefix = f'{html.escape(model)}: ' if name_models else ''
                lines.append(f'{prefix}<span class="{"right" if correct else "wrong"}">{words}</span>')
            tiles.append(f'<div>{_image(view.path.read_bytes(), view.title)}{"<br>".join(lines)}</div>')
        title = html.escape(f'{image.label}: {image.name}')
        strips.append(f'<p>{title}</p><div class="strip">{"".join(tiles)}</div>')
    return '\n'.join(strips)


def protocol_sentence(protocol: Mapping[str, Any]) -> str:
    """Return the main facts of a protocol, as text."""
    data, corruptions = protocol['data'], protocol['corruptions']
    if 'generated_by' in corruptions:
        source = (
            f'corruptions generated by {corruptions["generated_by"]}, seed {corruptions["seed"]}, on the cropped image'
        )
    elif 'stored_as' in corruptions:
        source = f'corruptions stored ({corruptions["stored_as"]})'
    else:
        source = f'natural shift {corruptions["shift"]}, without corruptions'
    sentences = [f'{data["images"]:,} images of {data["classes"]:,} classes; {source}.']
    restricted = {name: found for name, each in protocol['models'].items() if (found := each.get('predicts_among'))}
    if restricted:
        among = '; '.join(f'{name} {classes}' for name, classes in restricted.items())
        sentences.append(f'Predictions among the classes of the images alone: {among}.')
    if adapted := [name for name, each in protocol['models'].items() if 'adapt_batch_norm' in each]:
        sentences.append(f'BatchNorm adapted to each batch of images, a protocol of its own: {", ".join(adapted)}.')
    if 'real_labels_sha256' in data:
        sentences.append('Labels: ImageNet-ReaL.')
    sentences.append('Intervals: the middle 95% of 1,000 resamples of the images.')
    return ' '.join(sentences)


def protocol_table(protocol: Mapping[str, Any]) -> str:
    """Return the whole protocol: the fields that all models share, then one column for each model."""
    shared = _flat({key: value for key, value in protocol.items() if key != 'models'})
    models = {name: _flat(details) for name, details in protocol['models'].items()}
    fields = dict.fromkeys(field for details in models.values() for field in details)
    lines = [[protocol_field(field), *(details.get(field) for details in models.values())] for field in fields]
    of_models = _plain_table([['', *models], *lines])
    of_all = _plain_table((protocol_field(field), value) for field, value in shared.items())
    return f'<div class="protocol">{of_all}<p></p>{of_models}</div>'


PROTOCOL_FIELDS = {
    'corruptions.generated_by': 'corruptions generated by',
    'corruptions.seed': 'seed of the corruptions',
    'corruptions.applied_to': 'corruptions applied to',
    'corruptions.shift': 'natural shift',
    'corruptions.stored_as': 'layout of the stored corruptions',
    'corruptions.stored_names_sha256': 'hash of the names of the stored images',
    'corruptions.crop': 'crop of the stored images',
    'data.images': 'images',
    'data.classes': 'classes',
    'data.imagenet_1k': 'classes are the 1,000 of ImageNet',
    'data.clean': 'clean images among them',
    'data.names_sha256': 'hash of the image names',
    'data.stream_sha256': 'hash of the images of the stream',
    'data.real_labels_sha256': 'hash of the ImageNet-ReaL labels',
    'input_size': 'channels, height, width',
    'mean': 'mean of each channel',
    'std': 'standard deviation of each channel',
    'crop_pct': 'fraction of the image in the crop',
    'param_count': 'parameters, millions',
    'weights_sha256': 'hash of the weights',
    'modules_sha256': 'hash of the modules',
    'adapt_batch_norm.source_images': 'weight of the running BatchNorm statistics, in images',
    'adapt_batch_norm.batch_size': 'images in a batch that the BatchNorm adapts to',
    'adapt_batch_norm.order_seed': 'seed of the order of these images',
    'predicts_among': 'predicts among',
    'valid_labels_sha256': 'hash of the indices of these classes',
}


def protocol_field(field: str) -> str:
    """Return what a field of a protocol holds, in words; dots join the keys that lead to the field."""
    part, _, key = field.rpartition('.')
    words = {
        'model_args': f'argument {key}',
        'augmentation': f'in training: {key}',
        'versions': f'version of {key}',
    }.get(part)
    return words or PROTOCOL_FIELDS.get(field) or field.replace('.', ' ').replace('_', ' ')


def _flat(value: Any, field: str = '') -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {field: value}
    return {name: leaf for key in value for name, leaf in _flat(value[key], f'{field}.{key}'.strip('.')).items()}


def _plain_table(lines: Iterable[Sequence[Any]]) -> str:
    rows = (''.join(f'<td>{html.escape(_value_words(cell))}</td>' for cell in line) for line in lines)
    return f'<div class="wide"><table>{"".join(f"<tr>{row}</tr>" for row in rows)}</table></div>'


def _value_words(value: Any) -> str:
    if value is None:
        return '–'
    if isinstance(value, bool):
        return 'yes' if value else 'no'
    if isinstance(value, list):
        return ', '.join(map(str, value))
    text = str(value)
    return text[:12] if re.fullmatch('[0-9a-f]{64}', text) else text  # protocol.json has the whole hash
