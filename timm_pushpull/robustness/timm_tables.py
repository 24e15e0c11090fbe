"""Tables in the columns of timm's own ``results/results-*.csv``, so that its maintainers can merge them.

Files in a results folder, with one row for each model:

- ``results-clean.csv``: accuracy on the clean images;
- ``results-imagenet-c.csv``: mean accuracy over the 15 corruptions of ImageNet-C at 5 severities. Models that lack one
  of these 75 passes have no row. protocol.json says whether the corruptions are those of ImageNet-C or generated, and
  of which classes the images are;
- ``results-NAME.csv``: accuracy on the natural shift NAME.

As in timm's ``generate_csv_results.py``, rows are sorted by top-1, top-5 and name, ``top1_diff`` and ``top5_diff`` are
the accuracy minus that of the base table, and ``rank_diff`` is the rank in the base table minus the rank in the table.
The base is the table of the clean images, with the same classes. timm compares ImageNet-A and -R, of 200 classes, with
clean images of these classes; here they are measured as another shift, NAME-clean, which is then the base of NAME.
Without such a base the differences are empty.

Models that adapt their BatchNorm to the images have no row: timm's do not adapt. With ImageNet-ReaL labels the first
two tables are not written: timm's accuracies there are by the images' own labels.
"""

import functools
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .metrics import CLEAN, SEVERITIES, TEST_CORRUPTIONS
from .shifts import clean_name, find_clean
from .store import TOP, Predictions, find_shifted, read_predictions, read_protocol, readable_ranks, write_csv

__all__ = ['write_timm_tables']


def write_timm_tables(folder: str | os.PathLike[str]) -> list[Path]:
    """Write the tables from the predictions.

    Args:
        folder: Results folder.

    Returns:
        The files, which this module lists. A table without rows is not written.

    Raises:
        ValueError: If a folder holds no results, or if a file is damaged or does not belong to these results.
    """
    folder = Path(folder)
    read = functools.cache(lambda path: (read_protocol(path), read_predictions(path)))
    tables: dict[str, list[dict[str, Any]]] = {}
    if 'real_labels_sha256' not in read(folder)[0]['data']:
        clean = tables['clean'] = _accuracies(*read(folder), [(CLEAN, 0)])
        passes = [(name, severity) for name in TEST_CORRUPTIONS for severity in SEVERITIES]
        tables['imagenet-c'] = _with_differences(_accuracies(*read(folder), passes), clean)
    shifts = find_shifted(folder)
    for shift, path in shifts.items():
        rows, base = _accuracies(*read(path), [(CLEAN, 0)]), find_clean(folder, shift)
        if shift not in map(clean_name, shifts):
            rows = _with_differences(rows, _accuracies(*read(base), [(CLEAN, 0)]) if base else [])
        tables[path.name] = rows
    files = {folder / f'results-{name}.csv': rows for name, rows in tables.items() if rows}
    for file, rows in files.items():
        write_csv(file, [{column: _cell(column, value) for column, value in row.items()} for row in rows])
    return list(files)


def _accuracies(
    protocol: Mapping[str, Any], predictions: Predictions, passes: Collection[tuple[str, int]]
) -> list[dict[str, Any]]:
    """Return the rows of the models that have all these passes, in timm's order."""
    models, rows = protocol['models'], []
    for name, arrays in predictions.items():
        ranks = [readable_ranks(arrays[key]) for key in passes if key in arrays]
        details = models[name]
        if len(ranks) < len(passes) or not all(map(len, ranks)) or 'adapt_batch_norm' in details:
            continue
        # Rounded as in the file, from which timm computes the differences.
        top1, top5 = (round(100 * np.mean([np.mean(rank < top) for rank in ranks]), 3) for top in (1, TOP))
        rows.append(
            {'model': name, 'img_size': details['input_size'][-1]}
            | {'top1': top1, 'top1_err': 100 - top1, 'top5': top5, 'top5_err': 100 - top5}
            | {'param_count': details['param_count'], 'crop_pct': details['crop_pct']}
            | {'interpolation': details['interpolation']}
        )
    rows.sort(key=lambda row: (-row['top1'], -row['top5'], row['model']))
    return rows


def _with_differences(rows: Sequence[Mapping[str, Any]], base: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    ranks = {row['model']: rank for rank, row in enumerate(base)}
    table = []
    for rank, row in enumerate(rows):
        differences = dict.fromkeys(('top1_diff', 'top5_diff', 'rank_diff'), '')
        if row['model'] in ranks:
            before = ranks[row['model']]
            for top in ('top1', 'top5'):
                differences[f'{top}_diff'] = f'{row[top] - base[before][top]:+.3f}'
            differences['rank_diff'] = f'{before - rank:+d}' if before != rank else '0'
        table.append({**row, **differences})
    return table


def _cell(column: str, value: Any) -> Any:
    """Return a number in timm's format."""
    if isinstance(value, str) or column == 'img_size':
        return value
    return f'{value:,.2f}' if column == 'param_count' else f'{value:.3f}'
