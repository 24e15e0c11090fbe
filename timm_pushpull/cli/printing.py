"""Prints measured robustness."""

import os
import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

__all__ = ['print_comparisons', 'print_summary']


def print_summary(rows: Sequence[dict[str, Any]]) -> None:
    """Print the measures of a summary, one column for each model."""
    from ..robustness.calibration import CALIBRATION
    from ..robustness.summary import measures_of

    measures = [name for name in measures_of(rows) if any(row.get(name, '') != '' for row in rows)]
    label = max(map(len, measures), default=0)
    for models in _side_by_side(rows, label):
        print('\n' + ' ' * label + ''.join(f'  {row["model"]:>9}' for row in models))
        for name in measures:
            places = 3 if name.endswith(('NLL', 'Brier')) else 2
            numbers = (f'{value:.{places}f}' if (value := row.get(name, '')) != '' else '' for row in models)
            values = (f'{number:>{_width(row)}}' for number, row in zip(numbers, models, strict=True))
            print(f'{name:<{label}}  {"  ".join(values)}')
    units = 'in %, NLL in nats, Brier score from 0 to 2' if {*measures} & {*CALIBRATION} else 'in %'
    print(f'{units}; means over severities {rows[0]["severities"] or "of none"}', end='')
    if any(row.get(name, '') == '' for name in measures if name.startswith('CE_') for row in rows):
        print(', without the errors of models that lack one of these', end='')
    print('.' if 'plain_mCE' in measures else '; mCE needs all 15 corruptions.')
    if unreadable := sum(row['unreadable'] for row in rows):
        print(f'{unreadable} predictions are missing: their images could not be read.')


def _side_by_side(rows: Sequence[dict[str, Any]], label: int) -> list[list[dict[str, Any]]]:
    """Part the models so that each part fits the width of the terminal; the lines of a file have no limit."""
    limit = shutil.get_terminal_size(fallback=(sys.maxsize, 24)).columns
    parts: list[list[dict[str, Any]]] = []
    for row in rows:
        if not parts or label + sum(2 + _width(each) for each in (*parts[-1], row)) > limit:
            parts.append([])
        parts[-1].append(row)
    return parts


def _width(row: dict[str, Any]) -> int:
    return max(9, len(row['model']))


def print_comparisons(folder: str | os.PathLike[str]) -> None:
    """Print whether the differences of the models of a results folder are significant."""
    from ..robustness.paired import CAVEAT, read_comparisons

    if sentences := read_comparisons(folder):
        print()
        for sentence in sentences:
            print(textwrap.fill(sentence, 100, break_long_words=False, break_on_hyphens=False))
        print(CAVEAT)
