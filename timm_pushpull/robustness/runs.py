"""Statistics over training runs: means, ranges, and differences of means with Welch's interval.

Models whose names differ only after an ``@`` (``pp3@1``, ``pp3@2``) are training runs of one model (``pp3``).
"""

import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import MissingExtraError
from .intervals import columns_of
from .metrics import KINDS, kind_errors
from .shifts import SHIFT_MEASURES
from .summary import corruptions_of, model_of

__all__ = [
    'RUN_MEASURES',
    'Runs',
    'difference_of_means',
    'differences_from_baseline',
    'group_runs',
    'means_over_runs',
    'parse_pairs',
    'select_runs',
    'shift_means_over_runs',
]

RUN_MEASURES = ('E', 'plain_mCE', 'alexnet_normalized_mCE', *KINDS)
Runs = Mapping[str, Sequence[Mapping[str, Any]]]
"""Rows of a summary, one for each training run, by model."""


def group_runs(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Group the rows of a summary by model.

    Each row gets the mean CE of each kind of corruption, '' where a CE is missing.
    """
    models: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        errors = {name: row[f'CE_{name}'] for name in corruptions_of([row]) if row[f'CE_{name}'] != ''}
        kinds = dict.fromkeys(KINDS, '') | kind_errors(errors)
        models.setdefault(model_of(row['model']), []).append({**row, **kinds})
    return models


def means_over_runs(models: Runs) -> list[dict[str, Any]]:
    """Compute the mean and the range of each measure over the training runs of each model.

    Args:
        models: What :func:`group_runs` returns.

    Returns:
        One row for each model: the number of ``runs``, then the mean of each measure, with the lowest and the highest
        value in the columns for the ends of an interval.
    """
    columns = dict.fromkeys(column for runs in models.values() for run in runs for column in run)
    measures = [column for column in columns if {*columns_of(column)} <= columns.keys()]
    rows = []
    for model, runs in models.items():
        row: dict[str, Any] = {'model': model, 'runs': len(runs)}
        row |= {name: runs[0][name] for name in ('baseline', 'severities')}
        for measure in (*measures, *KINDS):
            row |= _mean_and_range(runs, measure)
        rows.append(row)
    return rows


def _mean_and_range(runs: Sequence[Mapping[str, Any]], measure: str) -> dict[str, Any]:
    values = [run.get(measure, '') for run in runs]
    numbers = ('', '', '') if '' in values else (np.mean(values), min(values), max(values))
    return dict(zip(columns_of(measure), numbers, strict=True))


def shift_means_over_runs(shifts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Compute the mean and the range of the errors on natural shifts over the training runs of each model.

    Args:
        shifts: What :func:`~timm_pushpull.robustness.shifts.shift_rows` returns.

    Returns:
        One row for each model and shift, with the number of ``runs`` and the columns of a row of one run.
    """
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in shifts:
        groups.setdefault((model_of(row['model']), row['shift']), []).append(row)
    rows = []
    for (model, _), runs in groups.items():
        means = [_mean_and_range(runs, measure) for measure in SHIFT_MEASURES]
        rows.append({**runs[0], 'model': model, 'runs': len(runs), **{k: v for mean in means for k, v in mean.items()}})
    return rows


def differences_from_baseline(models: Runs, baseline: str) -> list[dict[str, Any]]:
    """Compare each model that has several training runs with a baseline that has several.

    Args:
        models: What :func:`group_runs` returns.
        baseline: Name of the baseline before the ``@``.

    Returns:
        One row for each model: the number of ``runs`` and of ``baseline runs``, then the difference of the means,
        see :func:`difference_of_means`. No row if the baseline has fewer than two runs.
    """
    several = {model: runs for model, runs in models.items() if len(runs) > 1}
    baseline_runs = several.pop(baseline, None)
    if baseline_runs is None:
        return []
    return [
        {'model': model, 'runs': len(runs), 'baseline runs': len(baseline_runs)}
        | difference_of_means(baseline_runs, runs)
        for model, runs in several.items()
    ]


def parse_pairs(pairs: Iterable[str], names: Collection[str]) -> dict[str, tuple[str, str]]:
    """Split pairs ``FROM:TO`` into known names. A name may hold colons itself, as ``hf-hub:timm/...`` does.

    Args:
        pairs: Pairs of names: models, or single training runs.
        names: Names of the models with results.

    Returns:
        FROM and TO of each pair. Pairs with an unknown name are left out.
    """
    known = {*names, *map(model_of, names)}
    found = {}
    for pair in pairs:
        for place, letter in enumerate(pair):
            if letter == ':' and known.issuperset(ends := (pair[:place], pair[place + 1 :])):
                found[pair] = ends
    return found


def select_runs(models: Runs, names: Iterable[str]) -> dict[str, Sequence[Mapping[str, Any]]]:
    """Select models, or single training runs, by their names.

    Args:
        models: What :func:`group_runs` returns.
        names: Names before the ``@``, or whole names.

    Returns:
        Training runs by name.
    """
    single = {run['model']: [run] for runs in models.values() for run in runs}
    return {name: models.get(name) or single[name] for name in names}


def difference_of_means(from_runs: Sequence[Mapping[str, Any]], to_runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Subtract the mean of some training runs from the mean of others.

    Args:
        from_runs: Training runs of one model, with the measures of :func:`group_runs`.
        to_runs: Training runs of the other model.

    Returns:
        For each of ``RUN_MEASURES`` the mean over ``to_runs`` minus the mean over ``from_runs``, in points, with the
        ends of Welch's 95% interval. No interval ('') for a single run or where no run differs from another.

    Raises:
        ModuleNotFoundError: If scipy is not installed.
    """
    row: dict[str, Any] = {}
    for measure in RUN_MEASURES:
        left, right = ([run[measure] for run in runs] for runs in (from_runs, to_runs))
        numbers = ('', '', '') if '' in left + right else _welch(left, right)
        row |= dict(zip(columns_of(measure), numbers, strict=True))
    return row


def _welch(left: Sequence[float], right: Sequence[float]) -> tuple[Any, Any, Any]:
    # Unpaired: runs of one seed have no more in common than other runs.
    try:
        from scipy.stats import ttest_ind
    except ModuleNotFoundError as error:
        message = 'Intervals of differences need scipy: pip install scipy'
        raise MissingExtraError(message, name=error.name) from error

    difference = np.mean(right) - np.mean(left)
    if min(len(left), len(right)) < 2 or len(set(left)) == len(set(right)) == 1:
        return difference, '', ''
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', RuntimeWarning)  # equal runs on one side
        return difference, *ttest_ind(right, left, equal_var=False).confidence_interval()
