"""Prints measured robustness."""

import os
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
    print('\n' + ' ' * label + ''.join(f'  {row["model"]:>9}' for row in rows))
    for name in measures:
        places = 3 if name.endswith(('NLL', 'Brier')) else 2
        numbers = (f'{value:.{places}f}' if (value := row.get(name, '')) != '' else '' for row in rows)
        values = (f'{number:>{max(9, len(row["model"]))}}' for number, row in zip(numbers, rows, strict=True))
        print(f'{name:<{label}}  {"  ".join(values)}')
    units = 'in %, NLL in nats, Brier score from 0 to 2' if {*measures} & {*CALIBRATION} else 'in %'
    print(f'{units}; means over severities {rows[0]["severities"] or "of none"}', end='')
    print('.' if 'plain_mCE' in measures else '; mCE needs all 15 corruptions.')
    if unreadable := sum(row['unreadable'] for row in rows):
        print(f'{unreadable} predictions are missing: their images could not be read.')


def print_comparisons(folder: str | os.PathLike[str]) -> None:
    """Print whether the differences of the models of a results folder are significant."""
    from ..robustness.paired import CAVEAT, read_comparisons

    if sentences := read_comparisons(folder):
        print()
        for sentence in sentences:
            print(textwrap.fill(sentence, 100, break_long_words=False, break_on_hyphens=False))
        print(CAVEAT)
