"""Statistics of a results folder: ``errors.csv`` and ``summary.csv``, both made from the predictions.

- ``errors.csv``: number of images and of errors by model, corruption and severity.
- ``summary.csv``: one row for each model, with E, CE of each corruption and the means, each with its 95% interval.
  :func:`summarize` and :func:`read_summary` return such rows as dictionaries, by column.
"""

import math
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import InputError
from .calibration import CALIBRATION, expected_calibration_error
from .intervals import ENDS, columns_of, interval_columns, resampled_errors, resampled_means, rounded
from .metrics import (
    CLEAN,
    COMPARISONS,
    HELD_OUT_CORRUPTIONS,
    MEASURES,
    SEVERITIES,
    TEST_CORRUPTIONS,
    corruption_error,
    net_error_reduction,
    normalized_mce,
    plain_mce,
    relative_mce,
)
from .store import (
    TOP,
    UNREADABLE,
    Predictions,
    read_csv,
    read_predictions,
    read_protocol,
    readable_ranks,
    write_csv,
)

__all__ = [
    'baseline_of',
    'baseline_row',
    'check_baseline',
    'corruptions_of',
    'measures_of',
    'model_of',
    'not_compared',
    'other_corruptions',
    'read_baseline',
    'read_summary',
    'resampled_measures',
    'severities_of',
    'summarize',
    'view_differences',
    'write_errors',
    'write_summary',
]

FEWEST_ERRORS = 20  # of a baseline: a ratio to fewer errors depends on luck
NEVER_EMPTY = ('model', 'img_size', 'param_count', 'crop_pct', 'interpolation', 'unreadable')
TEXT_COLUMNS = ('model', 'interpolation', 'severities', 'baseline')


def measures_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Name the measures in the columns of some rows.

    Args:
        rows: Rows of a summary.

    Returns:
        E, CE of each corruption, the means, then the calibration, if the rows have it.
    """
    columns = dict.fromkeys(column for row in rows for column in row)
    errors = [f'CE_{name}' for name in corruptions_of(rows)]
    optional = [measure for measure in ('other_mCE', *CALIBRATION) if measure in columns]
    return ['E', *errors, *(measure for measure in MEASURES if measure not in ('E', 'other_mCE')), *optional]


def corruptions_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Name the corruptions of the CE columns of some rows of a summary, in their order."""
    columns = dict.fromkeys(column for row in rows for column in row if not column.endswith(ENDS))
    return [column.removeprefix('CE_') for column in columns if column.startswith('CE_')]


def model_of(name: str) -> str:
    """Return ``MODEL`` for the training run ``MODEL@RUN``, and any other name as it is."""
    return name.rpartition('@')[0] or name


def check_baseline(baseline: str | None, models: Collection[str]) -> None:
    """Refuse a baseline without results.

    Args:
        baseline: Name of a model or, for training runs, the name before the ``@``; None for no baseline.
        models: Names of the models with results.

    Raises:
        ValueError: If the baseline is not among these names.
    """
    names = dict.fromkeys([*models, *map(model_of, models)])
    if baseline is not None and baseline not in names:
        raise InputError(f'baseline must be one of the models {", ".join(names)}, got {baseline!r}.')


def baseline_of(model: str, baseline: str | None, models: Collection[str]) -> str | None:
    """Find the results with which a model is compared.

    Args:
        model: Name of the model.
        baseline: Name of a model, or the name before the ``@`` of training runs. A run is then compared with the run
            of the baseline that has the same text after the ``@``.
        models: Names of the models with results.

    Returns:
        One of the models, None if there is no baseline for this model.
    """
    if baseline is None or baseline in models:
        return baseline
    same_run = _same_run(baseline, model)
    return same_run if same_run in models else None


def baseline_row(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Find the row of the baseline.

    Args:
        rows: Rows of a summary, or of its means over training runs.

    Returns:
        The row; None if there is no baseline, or if its training runs have a row each.
    """
    return next((row for row in rows if row['model'] == row['baseline']), None)


def _same_run(baseline: str, model: str) -> str:
    return baseline + model.removeprefix(model_of(model))


def write_errors(folder: str | os.PathLike[str]) -> None:
    """Write ``errors.csv`` of a results folder from its predictions."""
    rows = []
    for name, passes in sorted(read_predictions(folder).items()):
        for (corruption, severity), predictions in sorted(passes.items()):
            ranks = readable_ranks(predictions)
            row = {'model': name, 'corruption': corruption, 'severity': severity, 'images': len(ranks)}
            rows.append({**row, 'errors': int((ranks != 0).sum()), 'unreadable': len(predictions) - len(ranks)})
    write_csv(Path(folder) / 'errors.csv', rows)


def write_summary(folder: str | os.PathLike[str], baseline: str | None = None) -> list[dict[str, Any]]:
    """Write ``summary.csv`` from the predictions.

    Args:
        folder: Results folder.
        baseline: Baseline of relative mCE and R_net, see :func:`baseline_of`; None for the baseline of the present
            ``summary.csv``, if there is one.

    Returns:
        Its rows, see :func:`summarize`.

    Raises:
        ValueError: If the baseline is not among the models.
    """
    rows = summarize(read_protocol(folder), read_predictions(folder), baseline or read_baseline(folder))
    write_csv(Path(folder) / 'summary.csv', rows)
    return rows


def read_baseline(folder: str | os.PathLike[str]) -> str | None:
    """Read the baseline of ``summary.csv``.

    Args:
        folder: Results folder.

    Returns:
        Name of the baseline, None if there is no baseline or no such file.

    Raises:
        ValueError: If the file is not such a table, or if the baseline is none of its models.
    """
    path = Path(folder) / 'summary.csv'
    return _baseline_in(path, read_csv(path, 'model', 'baseline')) if path.exists() else None


def _baseline_in(path: str | os.PathLike[str], rows: Sequence[Mapping[str, Any]]) -> str | None:
    if not rows:
        raise InputError(f'{path} has no rows: delete it, it is made again from the predictions.')
    baseline = rows[0]['baseline'] or None
    try:
        check_baseline(baseline, [row['model'] for row in rows])
    except InputError as error:
        raise InputError(f'{path}: {error}') from None
    return baseline


def read_summary(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read a ``summary.csv``, or a table with rows of several.

    Args:
        path: CSV file.

    Returns:
        Its rows, see :func:`summarize`.

    Raises:
        ValueError: If the file is not such a table, if a cell is wrong, if rows differ in ``severities`` or
            ``baseline``, or if a model is named twice.
    """
    table = read_csv(path)
    columns = {column for measure in measures_of(table) for column in columns_of(measure)}
    columns |= {column.removesuffix(end) for end in ENDS for column in (table or [{}])[0] if column.endswith(end)}
    columns |= {*TEXT_COLUMNS, *NEVER_EMPTY}
    if not table or not columns <= table[0].keys():
        raise InputError(f'{path} is not a summary.csv of timm-pushpull robustness.')
    rows = []
    for number, row in enumerate(table, 1):
        try:
            rows.append({column: _parse(column, text) for column, text in row.items()})
        except ValueError as error:
            raise InputError(f'{path}, row {number}: {error}') from None
        for measure, low, high in map(columns_of, measures_of(table)):
            if row[measure] == '' != row[low] + row[high]:
                raise InputError(f'{path}, row {number}: {measure} must be a number, its interval is given.')
    _baseline_in(path, rows)
    for column in ('severities', 'baseline'):
        values = dict.fromkeys(row[column] for row in rows)
        if len(values) > 1:
            raise InputError(
                f'{path} must have one value of {column} in all rows, it has {", ".join(map(repr, values))}: give rows '
                'with different values in different files.'
            )
    models = [row['model'] for row in rows]
    if twice := next((model for model in models if models.count(model) > 1), None):
        raise InputError(f'{path} names {twice} twice: delete or rename one of its rows.')
    return rows


def _parse(column: str, text: str) -> Any:
    if text == '' and column in NEVER_EMPTY:
        raise ValueError(f'{column} must not be empty.')
    if column in TEXT_COLUMNS or text == '':
        return text
    try:
        number = int(text) if text.isdecimal() else float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f'{column} must be a number, got {text!r}.')
    return number


def summarize(
    protocol: Mapping[str, Any], predictions: Predictions, baseline: str | None = None
) -> list[dict[str, Any]]:
    """Compute the measures of each model from its predictions.

    An interval spans the middle 95% of the values over 1,000 resamples of the images; all models share the resamples.
    Unreadable images count neither as images nor as errors. CE is the mean error over all severities in the
    predictions. A model has no CE for a corruption that it has not seen at all these severities, as after an
    interruption.

    Args:
        protocol: Protocol of the predictions, see :func:`~timm_pushpull.robustness.store.read_protocol`.
        predictions: Predictions, see :func:`~timm_pushpull.robustness.store.read_predictions`.
        baseline: Baseline of relative mCE and R_net, see :func:`baseline_of`.

    Returns:
        One row for each model with predictions: the columns of timm's result tables, the number of predictions missing
        for unreadable images, then E, CE and means in percent and the ``CALIBRATION``, with ``_low`` and ``_high``
        for the ends of their intervals; '' where a value cannot be computed, or is a ratio to fewer than 20 errors of
        the baseline.

    Raises:
        ValueError: If the baseline is not among the models.
    """
    check_baseline(baseline, protocol['models'])
    predictions = {name: passes for name, passes in predictions.items() if passes}
    rates = _error_rates(predictions)
    severities, others = severities_of(predictions), other_corruptions(predictions)
    rows = []
    for name, passes in predictions.items():
        details = protocol['models'][name]
        row: dict[str, Any] = {'model': name, 'img_size': details['input_size'][-1]}
        row.update(_accuracy(passes.get((CLEAN, 0))))
        row.update({key: details[key] for key in ('param_count', 'crop_pct', 'interpolation')})
        row['unreadable'] = sum(int((array['rank'] == UNREADABLE).sum()) for array in passes.values())
        row['severities'] = ' '.join(map(str, severities))
        row['baseline'] = baseline or ''
        with np.errstate(divide='ignore', invalid='ignore'):
            baseline_rates = rates.get(baseline_of(name, baseline, protocol['models']) or '')
            measures = _measures(rates[name], baseline_rates, severities, others, protocol['data'])
        measures |= _calibration(passes, severities)
        for measure, values in measures.items():
            row |= interval_columns(measure, values)
        rows.append(row)
    return rows


def severities_of(predictions: Predictions) -> list[int]:
    """Return the severities over which CE is a mean: those in the predictions of all models, in order."""
    return sorted({severity for passes in predictions.values() for _, severity in passes if severity})


def other_corruptions(predictions: Predictions) -> list[str]:
    """Name the corruptions in the predictions that ImageNet-C lacks, in alphabetical order."""
    measured = {corruption for passes in predictions.values() for corruption, _ in passes}
    return sorted(measured - {CLEAN, *TEST_CORRUPTIONS, *HELD_OUT_CORRUPTIONS})


def resampled_measures(
    predictions: Predictions, severities: Sequence[int], data: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Compute the measures that need no baseline, on the images and on each resample of the images.

    Args:
        predictions: Predictions of the models.
        severities: Severities over which CE is a mean.
        data: Field ``data`` of the protocol.

    Returns:
        Measures by model: arrays (1 + 1000,) with the value in percent on the images, then on each resample; None for a
        mean that cannot be computed. All models share the resamples.
    """
    rates = _error_rates(predictions)
    others = other_corruptions(predictions)
    return {name: _measures(rates[name], None, severities, others, data) for name in predictions}


def view_differences(rows: Sequence[Mapping[str, Any]]) -> str:
    """Say how the models see the images: size, crop and interpolation; '' if all rows of a summary have the same."""
    views = {f'{row["img_size"]} pixels, crop {row["crop_pct"]}, {row["interpolation"]}' for row in rows}
    return f'The models see the images in different ways: {"; ".join(sorted(views))}.' if len(views) > 1 else ''


def not_compared(rows: Sequence[Mapping[str, Any]]) -> str:
    """Say which models have no baseline to be compared with, and which ratios to the baseline are left out.

    Args:
        rows: Rows of a summary.

    Returns:
        Sentences with the names of these models, of the missing runs and of the ratios, or ''.
    """
    models = [row['model'] for row in rows]
    baseline = rows[0]['baseline'] if rows else ''
    alone = [model for model in models if baseline and not baseline_of(model, baseline, models)]
    missing = ', '.join(f'{model} (no {_same_run(baseline, model)})' for model in alone)
    compared = [row for row in rows if baseline and row['model'] not in alone and row['E'] != '' != row['plain_mCE']]
    left_out = [measure for measure in COMPARISONS if any(row[measure] == '' for row in compared)]
    sentences = [f'Without {" and ".join(COMPARISONS)}: {missing}.'] if missing else []
    if left_out:
        reason = f'a ratio needs the predictions of the baseline, with {FEWEST_ERRORS} errors or more.'
        sentences.append(f'Without {" and ".join(left_out)}: {reason}')
    return ' '.join(sentences)


class _Rates(NamedTuple):
    """Error rates of one model: arrays with the rate on the images, then the rate on each resample."""

    clean: Any
    corrupted: dict[str, dict[int, Any]]

    def corruption_errors(self, severities: Collection[int]) -> dict[str, Any]:
        """Compute CE of the corruptions with results at all of these severities."""
        return {
            name: corruption_error(errors)
            for name, errors in self.corrupted.items()
            if errors.keys() == set(severities)
        }


def _error_rates(predictions: Predictions) -> dict[str, _Rates]:
    by_model = {name: _Rates(None, {}) for name in predictions}
    ranks = [(name, *key, array['rank']) for name, passes in predictions.items() for key, array in passes.items()]
    if not ranks:
        return by_model
    rates = resampled_errors(np.stack([rank for *_, rank in ranks], 1))
    for (name, corruption, severity, _), rate in zip(ranks, rates.T, strict=True):
        if corruption == CLEAN:
            by_model[name] = by_model[name]._replace(clean=rate)
        else:
            by_model[name].corrupted.setdefault(corruption, {})[severity] = rate
    return by_model


def _accuracy(clean: np.ndarray | None) -> dict[str, Any]:
    columns = ('top1', 'top1_err', 'top5', 'top5_err')
    if clean is None:
        return dict.fromkeys(columns, '')
    ranks = readable_ranks(clean)
    top1, top5 = 100 * np.mean(ranks == 0), 100 * np.mean(ranks < TOP)
    return dict(zip(columns, map(rounded, (top1, 100 - top1, top5, 100 - top5)), strict=True))


def _measures(
    rates: _Rates,
    baseline: _Rates | None,
    severities: Sequence[int],
    others: Sequence[str],
    data: Mapping[str, Any],
) -> dict[str, Any]:
    errors = rates.corruption_errors(severities)
    complete = errors.keys() >= set(TEST_CORRUPTIONS)
    measures: dict[str, Any] = {'E': None if rates.clean is None else 100 * rates.clean}
    measures.update({f'CE_{name}': 100 * errors[name] for name in sorted(errors, key=_table_order)})
    measures['plain_mCE'] = 100 * plain_mce(errors) if complete else None
    # AlexNet's errors are means over the five severities, by the labels of the images.
    normalize = complete and data['imagenet_1k'] and 'real_labels_sha256' not in data
    normalize = normalize and tuple(severities) == SEVERITIES
    measures['alexnet_normalized_mCE'] = 100 * normalized_mce(errors) if normalize else None
    measures.update(dict.fromkeys(COMPARISONS))
    if complete and baseline is not None and rates.clean is not None and baseline.clean is not None:
        baseline_errors = baseline.corruption_errors(severities)
        if baseline_errors.keys() >= set(TEST_CORRUPTIONS):
            added = min((baseline_errors[name] - baseline.clean)[0] for name in TEST_CORRUPTIONS)
            if round(added * data['images'] * len(severities), 6) >= FEWEST_ERRORS:
                measures['relative_mCE'] = 100 * relative_mce(rates.clean, errors, baseline.clean, baseline_errors)
            if round(baseline.clean[0] * data['images'], 6) >= FEWEST_ERRORS:
                mce, baseline_mce = plain_mce(errors), plain_mce(baseline_errors)
                measures['R_net'] = net_error_reduction(rates.clean, mce, baseline.clean, baseline_mce)
    if others:
        errors_of_others = [errors[name] for name in others if name in errors]
        is_whole = len(errors_of_others) == len(others)
        measures['other_mCE'] = 100 * np.mean(errors_of_others, 0) if is_whole else None
    return measures


def _calibration(passes: Mapping[tuple[str, int], np.ndarray], severities: Sequence[int]) -> dict[str, Any]:
    """Compute the calibration of one model. ECE has no interval: resampled images have a larger one by construction."""
    measures: dict[str, Any] = dict.fromkeys(CALIBRATION)
    corrupted = [(name, severity) for name in TEST_CORRUPTIONS for severity in severities]
    for prefix, keys in (('', [(CLEAN, 0)]), ('mean_', corrupted)):
        if not keys or not passes.keys() >= set(keys):
            continue
        arrays = [passes[key] for key in keys]
        known = [array[array['rank'] != UNREADABLE] for array in arrays]
        errors = [expected_calibration_error(array['confidence'], array['rank'] == 0) for array in known]
        readable = np.stack([array['rank'] != UNREADABLE for array in arrays], 1)
        measures[f'{prefix}ECE'] = np.array([100 * np.mean(errors)])
        for name in ('NLL', 'Brier'):
            values = np.where(readable, np.stack([array[name.lower()] for array in arrays], 1), 0)
            measures[f'{prefix}{name}'] = resampled_means(values, readable.astype(np.float32)).mean(1)
    return measures


def _table_order(corruption: str) -> tuple[int, str]:
    order = TEST_CORRUPTIONS.index(corruption) if corruption in TEST_CORRUPTIONS else len(TEST_CORRUPTIONS)
    return order, corruption
