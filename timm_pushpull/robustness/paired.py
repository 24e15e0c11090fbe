"""Paired differences between two models that saw the same images, and the sentence that sums them up.

Both models share the resamples of the images: what makes an image hard for both cancels out, so that the interval of a
difference is narrower than the intervals of the two errors suggest. Such a difference compares two checkpoints, not two
ways of training: for those see :mod:`timm_pushpull.robustness.runs`.
"""

import os
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from .intervals import columns_of, interval_columns
from .metrics import COMPARISONS, KINDS, kind_errors
from .store import UNREADABLE, Predictions, read_predictions, read_protocol
from .summary import baseline_of, corruptions_of, model_of, read_baseline, resampled_measures, severities_of

__all__ = [
    'CAVEAT',
    'checkpoint_pairs',
    'comparison_sentence',
    'paired_differences',
    'read_comparisons',
    'significance',
    'tenths',
]

CAVEAT = 'This compares single checkpoints: other training runs may differ.'
COMPARED = {'E': 'the clean error', 'plain_mCE': 'plain mCE'}


def checkpoint_pairs(models: Collection[str], baseline: str | None) -> list[tuple[str, str]]:
    """Pair each model that has a single checkpoint with the checkpoint that it is compared with.

    Args:
        models: Names of the models with results. Models that differ only after an ``@`` are training runs of one model;
            they are compared over the runs, see :func:`~timm_pushpull.robustness.runs.differences_from_baseline`.
        baseline: Baseline, see :func:`~timm_pushpull.robustness.summary.baseline_of`; None to compare the second of
            exactly two models with the first.

    Returns:
        Names of the model to compare with, and of the model.
    """
    names = list(models)
    if baseline is None:
        baseline = names[0] if len(names) == 2 else None
    runs = [model_of(name) for name in names]
    found = []
    for name in names:
        other = baseline_of(name, baseline, names)
        if other is None or other == name or runs.count(model_of(name)) > 1:
            continue
        # Of several runs of a baseline, one counts only if it was named.
        if other == baseline or runs.count(model_of(other)) == 1:
            found.append((other, name))
    return found


def paired_differences(
    protocol: Mapping[str, Any], predictions: Predictions, pairs: Collection[tuple[str, str]]
) -> list[dict[str, Any]]:
    """Compute the difference between the two models of each pair, on the images that both could read.

    The interval spans the middle 95% of the differences over 1,000 resamples of the images.

    Args:
        protocol: Protocol of the predictions, see :func:`~timm_pushpull.robustness.store.read_protocol`.
        predictions: Predictions of all models of the protocol.
        pairs: Names FROM and TO of each pair.

    Returns:
        One row for each pair: ``from``, ``to``, the number of ``images`` that both could read in a pass, then TO
        minus FROM, in points, for E, each CE, the means, and the mean CE of each kind of corruption, with the ends of
        its interval; '' where one of the two models lacks a pass. A pair without any interval has no row.
    """
    severities = severities_of(predictions)
    rows = []
    for pair in pairs:
        common = _common(predictions, pair)
        both = resampled_measures(common, severities, protocol['data'])
        start, end = (_with_kinds(both[name]) for name in pair)
        read_by_both = np.any([array['rank'] != UNREADABLE for array in common[pair[0]].values()], 0)
        row: dict[str, Any] = {'from': pair[0], 'to': pair[1], 'images': int(read_by_both.sum())}
        for measure in start:  # both have the same passes, so the same measures
            difference = None if start[measure] is None else end[measure] - start[measure]
            row |= interval_columns(measure, difference)
        if any(significance(row, measure) for measure in start):
            rows.append(row)
    return rows


def _common(predictions: Predictions, pair: tuple[str, str]) -> dict[str, dict[tuple[str, int], np.ndarray]]:
    """Return the passes of both models, in which an image that one of them could not read counts for neither."""
    common: dict[str, dict[tuple[str, int], np.ndarray]] = {name: {} for name in pair}
    for key in predictions[pair[0]]:
        if key not in predictions[pair[1]]:
            continue
        arrays = [predictions[name][key].copy() for name in pair]
        unreadable = (arrays[0]['rank'] == UNREADABLE) | (arrays[1]['rank'] == UNREADABLE)
        for name, array in zip(pair, arrays, strict=True):
            array['rank'][unreadable] = UNREADABLE
            common[name][key] = array
    return common


def _with_kinds(measures: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out the ratios to a baseline, and add the mean CE of each kind of corruption with all its corruptions."""
    kinds = kind_errors({name: measures[f'CE_{name}'] for name in corruptions_of([measures])})
    return dict.fromkeys(KINDS) | {name: measures[name] for name in measures if name not in COMPARISONS} | kinds


def significance(row: Mapping[str, Any], measure: str) -> str:
    """Say whether a measure of the second model is significantly lower or higher than that of the first.

    Args:
        row: Row of :func:`paired_differences`.
        measure: Name of a measure.

    Returns:
        ``'lower'`` or ``'higher'`` if the 95% interval of the difference, rounded to tenths, excludes 0; otherwise
        ``'not significantly different'``; '' without an interval.
    """
    numbers = [row.get(column, '') for column in columns_of(measure)]
    if '' in numbers:
        return ''
    _, low, high = (round(number, 1) for number in numbers)
    return 'lower' if high < 0 else 'higher' if low > 0 else 'not significantly different'


def comparison_sentence(row: Mapping[str, Any]) -> str:
    """Say in one sentence whether the differences of two models are significant: the 95% interval excludes 0.

    Args:
        row: Row of :func:`paired_differences`.

    Returns:
        The sentence; '' if neither the clean error nor plain mCE has an interval.
    """
    parts = []
    for measure, words in COMPARED.items():
        if found := significance(row, measure):
            difference, low, high = (tenths(row[column]) for column in columns_of(measure))
            parts.append(f'{words} is {found} ({difference} points, 95% interval {low} to {high})')
    return f'{row["to"]} against {row["from"]}, by these {row["images"]:,} images: {"; ".join(parts)}.' if parts else ''


def tenths(number: float) -> str:
    """Return a percentage or points with one decimal, as pages and sentences show them."""
    return f'{round(number, 1) + 0.0:.1f}'  # 0.0 for -0.0


def read_comparisons(folder: str | os.PathLike[str]) -> list[str]:
    """Sum up a results folder.

    Args:
        folder: Results folder.

    Returns:
        The :func:`comparison_sentence` of each of the :func:`checkpoint_pairs`, with the baseline of ``summary.csv``.
    """
    predictions = {name: passes for name, passes in read_predictions(folder).items() if passes}
    pairs = checkpoint_pairs(predictions, read_baseline(folder))
    return [*filter(None, map(comparison_sentence, paired_differences(read_protocol(folder), predictions, pairs)))]
