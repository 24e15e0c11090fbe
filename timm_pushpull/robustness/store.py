"""A results folder: every picture's answer is kept in it, and every figure follows from that.

It holds

- ``protocol.json``: how the figures were made; a run of another protocol is refused;
- ``pictures.csv``, ``classes.csv``: name and class of each picture, name of each class;
- ``answers/MODEL/CORRUPTION-SEVERITY.npy``: of each picture the model's answer, and the place of the right class among
  its first five answers, 0 to 4, or 5; 255 where the picture could not be read;
- ``errors.csv``: pictures and errors by model, corruption and severity;
- ``summary.csv``: E, CE and the means, each with its 95% interval;
- ``examples/CORRUPTION-SEVERITY-PICTURE.png``: a few pictures as the models saw them.

``errors.csv`` and ``summary.csv`` can be made anew from the answers.
"""

import csv
import io
import json
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .corruptions import SEVERITIES
from ..files import atomic_write
from .metrics import (
    TEST_CORRUPTIONS,
    corruption_error,
    net_error_reduction,
    normalized_mce,
    plain_mce,
    relative_mce,
)

__all__ = [
    'ANSWER',
    'CLEAN',
    'COMPARISONS',
    'ENDS',
    'MEANS',
    'TOP',
    'UNREAD',
    'predictions_path',
    'baseline_of',
    'check_baseline',
    'columns_of',
    'compare',
    'differences',
    'join_protocol',
    'not_compared',
    'other_views',
    'places_read',
    'read_predictions',
    'read_baseline',
    'read_csv',
    'read_protocol',
    'read_summary',
    'summarize',
    'without_run',
    'write_predictions',
    'write_errors',
    'write_images',
    'write_summary',
]

CLEAN = 'clean'
TOP = 5
UNREAD = 255
ANSWER = np.dtype([('answer', '<u2'), ('place', 'u1')])
RESAMPLES = 1000
COMPARISONS = ('relative_mCE', 'R_net')
MEANS = ('plain_mCE', 'alexnet_normalized_mCE', *COMPARISONS)
ENDS = ('_low', '_high')  # of an interval
NAMES = ('model', 'interpolation', 'severities', 'baseline')  # columns of a summary that hold no number


def read_protocol(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Read how the figures of a results folder were made.

    Args:
        folder: Results folder.

    Returns:
        Content of ``protocol.json``.

    Raises:
        ValueError: If the folder holds no results.
    """
    try:
        return json.loads((Path(folder) / 'protocol.json').read_text())
    except FileNotFoundError:
        raise ValueError(f'{folder} holds no results: there is no protocol.json.') from None


def join_protocol(folder: str | os.PathLike[str], protocol: dict[str, Any], baseline: str | None = None) -> None:
    """Write the protocol, or compare it with that of the results which are there; new models and passes may join.

    Args:
        folder: Results folder.
        protocol: Protocol of a run.
        baseline: Model that must be among those of the run and of the results.

    Raises:
        ValueError: If the results there were made in another way, the field that differs is named; or if the baseline
            is not among the models.
    """
    path = Path(folder) / 'protocol.json'
    protocol = json.loads(json.dumps(protocol))
    if path.exists():
        finished = read_protocol(folder)
        joined = {**finished['models'], **protocol['models']}
        # What the folder holds is compared; models that are new to it are not.
        ours = {**protocol, 'models': {name: joined[name] for name in finished['models']}}
        for field, there, here in differences(finished, ours):
            raise ValueError(
                f'{folder} holds results of another protocol: {field} is {there} there and {here} here. '
                'Name another folder.'
            )
        protocol['models'] = joined
    check_baseline(baseline, protocol['models'])
    atomic_write(path, (json.dumps(protocol, indent=2) + '\n').encode())


def check_baseline(baseline: str | None, models: Collection[str]) -> None:
    """Refuse a baseline that was not measured.

    Args:
        baseline: Name of a model, or of a model with training runs, or None.
        models: Names of those that were.

    Raises:
        ValueError: If it is not among them.
    """
    names = dict.fromkeys([*models, *map(without_run, models)])
    if baseline is not None and baseline not in names:
        raise ValueError(f'baseline must be one of the models {", ".join(names)}, got {baseline!r}.')


def without_run(model: str) -> str:
    """Tell what a training run is a run of.

    Args:
        model: Name of a model, ``MODEL@RUN`` if it is one training run of several.

    Returns:
        ``MODEL``.
    """
    return model.rpartition('@')[0] or model


def baseline_of(model: str, baseline: str | None, models: Collection[str]) -> str | None:
    """Find what a model is compared with.

    Args:
        model: Its name.
        baseline: Name of a model, or what comes before the ``@`` in the names of its training runs: then a run is
            compared with the run of the same name, as a rule the same seed.
        models: Names of the models that were measured.

    Returns:
        One of these names, None if there is nothing to compare with.
    """
    if baseline is None or baseline in models:
        return baseline
    same_run = _same_run(baseline, model)
    return same_run if same_run in models else None


def _same_run(of: str, model: str) -> str:
    return of + model.removeprefix(without_run(model))


def differences(there: Any, here: Any, field: str = '') -> Iterable[tuple[str, Any, Any]]:
    """Compare two protocols.

    Args:
        there: One of them, or a part of it.
        here: The other.
        field: Name of the part.

    Yields:
        Name of a field that differs, and its two values.
    """
    if isinstance(there, dict) and isinstance(here, dict):
        for key in [*there, *(key for key in here if key not in there)]:
            yield from differences(there.get(key), here.get(key), f'{field}.{key}' if field else key)
    elif there != here:
        yield field, there, here


def write_images(
    folder: str | os.PathLike[str], names: Sequence[str], targets: Sequence[int], classes: Sequence[str]
) -> None:
    """Write ``pictures.csv`` and ``classes.csv``.

    Args:
        folder: Results folder.
        names: Name of each picture.
        targets: Class of each picture.
        classes: Name of each class.
    """
    pictures = [{'picture': name, 'class': target} for name, target in zip(names, targets, strict=True)]
    _write_csv(Path(folder) / 'pictures.csv', pictures)
    _write_csv(Path(folder) / 'classes.csv', [{'class': index, 'name': name} for index, name in enumerate(classes)])


def predictions_path(folder: str | os.PathLike[str], model: str, corruption: str, severity: int) -> Path:
    """Name the file of one model's answers to one corruption at one severity.

    Args:
        folder: Results folder.
        model: Name of the model.
        corruption: Name of the corruption, or ``'clean'``.
        severity: Its severity, 0 for clean pictures.

    Returns:
        The file, which may not exist.
    """
    safe_name = ''.join(c if c.isalnum() or c in '._-' else '_' for c in model)
    return Path(folder) / 'answers' / safe_name / f'{corruption}-{severity}.npy'


def write_predictions(path: Path, answers: np.ndarray) -> None:
    """Write the answers of one model to one corruption at one severity.

    Args:
        path: What :func:`predictions_path` names.
        answers: Array of type ``ANSWER``.
    """
    buffer = io.BytesIO()
    np.save(buffer, answers)
    atomic_write(path, buffer.getvalue())


def read_predictions(folder: str | os.PathLike[str]) -> dict[str, dict[tuple[str, int], np.ndarray]]:
    """Read the answers in a results folder.

    Args:
        folder: Results folder.

    Returns:
        By model, then by corruption and severity (``('clean', 0)`` for clean pictures): of each picture the class that
        the model gave (``answer``), and the place of the right class among its first five (``place``): 0 to 4, or 5,
        or 255 where the picture could not be read.
    """
    answers: dict[str, dict[tuple[str, int], np.ndarray]] = {}
    for name in read_protocol(folder)['models']:
        answers[name] = {}
        for path in sorted(predictions_path(folder, name, CLEAN, 0).parent.glob('*.npy')):
            corruption, severity = path.stem.rsplit('-', 1)
            answers[name][corruption, int(severity)] = np.load(path, allow_pickle=False)
    return answers


def write_errors(folder: str | os.PathLike[str]) -> None:
    """Write ``errors.csv`` from the answers.

    Args:
        folder: Results folder.
    """
    rows = []
    for name, passes in sorted(read_predictions(folder).items()):
        for (corruption, severity), answers in sorted(passes.items()):
            read = places_read(answers)
            row = {'model': name, 'corruption': corruption, 'severity': severity, 'images': len(read)}
            rows.append({**row, 'errors': int((read != 0).sum()), 'unreadable': len(answers) - len(read)})
    _write_csv(Path(folder) / 'errors.csv', rows)


def write_summary(folder: str | os.PathLike[str], baseline: str | None = None) -> list[dict[str, Any]]:
    """Write ``summary.csv`` from the answers.

    Args:
        folder: Results folder.
        baseline: What relative mCE and R_net are measured against, see :func:`baseline_of`; None for that of the
            summary which is there, if it has one.

    Returns:
        Its rows, see :func:`summarize`.

    Raises:
        ValueError: If the baseline is not among the models.
    """
    rows = summarize(read_protocol(folder), read_predictions(folder), baseline or read_baseline(folder))
    _write_csv(Path(folder) / 'summary.csv', rows)
    return rows


def read_baseline(folder: str | os.PathLike[str]) -> str | None:
    """Read which model ``summary.csv`` compares with.

    Args:
        folder: Results folder.

    Returns:
        Name of the model, None if there is none.
    """
    path = Path(folder) / 'summary.csv'
    rows = read_csv(path) if path.exists() else []
    return rows[0]['baseline'] or None if rows else None


def summarize(
    protocol: Mapping[str, Any],
    answers: Mapping[str, Mapping[tuple[str, int], np.ndarray]],
    baseline: str | None = None,
) -> list[dict[str, Any]]:
    """Derive the measures of each model from its answers.

    The intervals hold the middle 95% of what 1,000 resamples of the pictures give, the same resamples for each model.
    A picture that could not be read counts neither as an error nor as a picture. CE is the mean over the severities
    that the answers hold; a corruption that a model was not shown at all of them, as after an interruption, has none.

    Args:
        protocol: How the answers were made (:func:`read_protocol`).
        answers: Answers by model, corruption and severity (:func:`read_predictions`).
        baseline: What relative mCE and R_net are measured against, see :func:`baseline_of`.

    Returns:
        One row a model: timm's own columns, the number of answers that unreadable pictures cost, then E, CE and means
        in percent, ``_low`` and ``_high`` beside each. What needs pictures, corruptions, classes or a baseline that are
        not there is left empty ('').

    Raises:
        ValueError: If the baseline is not among the models.
    """
    check_baseline(baseline, protocol['models'])
    answers = {name: passes for name, passes in answers.items() if passes}
    rates = _error_rates(answers, protocol['data']['images'])
    severities = sorted({severity for passes in answers.values() for _, severity in passes if severity})
    rows = []
    for name, passes in answers.items():
        details = protocol['models'][name]
        row: dict[str, Any] = {'model': name, 'img_size': details['input_size'][-1]}
        row.update(_accuracy(passes.get((CLEAN, 0))))
        row.update({key: details[key] for key in ('param_count', 'crop_pct', 'interpolation')})
        row['unreadable'] = sum(int((places['place'] == UNREAD).sum()) for places in passes.values())
        row['severities'] = ' '.join(map(str, severities))
        row['baseline'] = baseline or ''
        with np.errstate(divide='ignore', invalid='ignore'):
            of_baseline = rates.get(baseline_of(name, baseline, protocol['models']) or '')
            measures = _measures(rates[name], of_baseline, severities, protocol['data']['imagenet_1k'])
        for measure, values in measures.items():
            numbers = [None] * 3 if values is None else [values[0], *_interval(values[1:])]
            row.update(zip(columns_of(measure), map(_rounded, numbers), strict=True))
        rows.append(row)
    return rows


def columns_of(measure: str) -> tuple[str, ...]:
    """Name the columns of a summary that hold a measure.

    Args:
        measure: Its name.

    Returns:
        The name, for the figure, and those of the low and the high end of its interval.
    """
    return measure, *(f'{measure}{end}' for end in ENDS)


def read_summary(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read a ``summary.csv`` back, or a table of the rows of several.

    Args:
        path: The file.

    Returns:
        Its rows, as :func:`summarize` makes them.

    Raises:
        ValueError: If the file is no such table, or if it names a model twice.
    """
    try:
        rows = [{name: _from_text(name, text) for name, text in row.items()} for row in read_csv(path)]
    except (AttributeError, ValueError, csv.Error):  # a line with another number of cells, no text, no table
        rows = []
    columns = rows[0].keys() if rows else ()
    measures = ['E', *(name for name in columns if name.startswith('CE_') and not name.endswith(ENDS)), *MEANS]
    needed = {*NAMES, 'img_size', 'crop_pct', 'unreadable', *(name for of in measures for name in columns_of(of))}
    if not needed <= {*columns}:
        raise ValueError(f'{path} is not a summary.csv of timm-pushpull robustness.')
    models = [row['model'] for row in rows]
    if twice := next((model for model in models if models.count(model) > 1), None):
        raise ValueError(f'{path} names {twice} twice: leave one of its rows out, or rename it.')
    return rows


def _from_text(name: str, text: str) -> Any:
    if name in NAMES or text == '':
        return text
    return int(text) if text.isdecimal() else float(text)


def compare(rows: Sequence[Mapping[str, Any]], baseline: str) -> list[dict[str, Any]]:
    """Compare the rows of a summary with a baseline.

    The answers are not there to be resampled: relative mCE and R_net have no intervals.

    Args:
        rows: What :func:`summarize` or :func:`read_summary` returns.
        baseline: What relative mCE and R_net are measured against, see :func:`baseline_of`.

    Returns:
        The rows, with these two.

    Raises:
        ValueError: If the baseline is not among the models.
    """
    models = {row['model']: row for row in rows}
    check_baseline(baseline, models)
    needed = ('E', *(f'CE_{name}' for name in TEST_CORRUPTIONS))
    compared = []
    for row in rows:
        of_baseline = models.get(baseline_of(row['model'], baseline, models) or '')
        numbers: dict[str, Any] = {name: '' for measure in COMPARISONS for name in columns_of(measure)}
        if of_baseline and all(other.get(name, '') != '' for other in (row, of_baseline) for name in needed):
            with np.errstate(divide='ignore', invalid='ignore'):
                values = _comparisons(*_as_rates(row), *_as_rates(of_baseline))
            numbers |= {name: _rounded(value) for name, value in values.items()}
        compared.append({**row, **numbers, 'baseline': baseline})
    return compared


def _as_rates(row: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """E and CE, in [0, 1]."""
    return np.float64(row['E']) / 100, {name: np.float64(row[f'CE_{name}']) / 100 for name in TEST_CORRUPTIONS}


def other_views(rows: Sequence[Mapping[str, Any]]) -> str:
    """Tell in which ways the models were shown the pictures, where that is more than one.

    Args:
        rows: What :func:`summarize` returns.

    Returns:
        Sizes, crops and interpolations, or ''.
    """
    ways = {f'{row["img_size"]} pixels, crop {row["crop_pct"]}, {row["interpolation"]}' for row in rows}
    return f'The models do not see the same: {"; ".join(sorted(ways))}.' if len(ways) > 1 else ''


def not_compared(rows: Sequence[Mapping[str, Any]]) -> str:
    """Tell which models have no run of the baseline to be compared with.

    Args:
        rows: What :func:`summarize` returns.

    Returns:
        Their names, each with that of the run it lacks, or ''.
    """
    models = [row['model'] for row in rows]
    baseline = rows[0]['baseline'] if rows else ''
    alone = [model for model in models if baseline and not baseline_of(model, baseline, models)]
    lacks = ', '.join(f'{model} (no {_same_run(baseline, model)})' for model in alone)
    return f'Without {" and ".join(COMPARISONS)}: {lacks}.' if lacks else ''


def places_read(answers: np.ndarray) -> np.ndarray:
    """Leave out the pictures that could not be read.

    Args:
        answers: Array of type ``ANSWER``.

    Returns:
        Place of the right class, 0 to 5, of each picture that was read.
    """
    return answers['place'][answers['place'] != UNREAD]


def _interval(resampled: np.ndarray) -> np.ndarray:
    # A ratio to a baseline without errors is infinite; such a resample counts as the worst.
    return np.percentile(np.nan_to_num(resampled, nan=np.inf, posinf=np.inf), (2.5, 97.5), method='nearest')


def _rounded(number: float | None) -> float | str:
    """To a thousandth; '' where there is no finite number."""
    return '' if number is None or not np.isfinite(number) else round(float(number), 3)


class _Rates(NamedTuple):
    """Error rates of one model: arrays, the rate on the pictures themselves and then on each resample."""

    clean: Any
    by_corruption: dict[str, dict[int, Any]]

    def corruption_errors(self, severities: Collection[int]) -> dict[str, Any]:
        """CE of the corruptions that were measured at all of these severities."""
        return {
            name: corruption_error(errors)
            for name, errors in self.by_corruption.items()
            if errors.keys() == set(severities)
        }


def _error_rates(answers: Mapping[str, Mapping[tuple[str, int], np.ndarray]], images: int) -> dict[str, _Rates]:
    places = [(name, *of, array['place']) for name, passes in answers.items() for of, array in passes.items()]
    if not places:
        return {}
    wrong = np.stack([(place != 0) & (place != UNREAD) for *_, place in places], 1).astype(np.float32)
    read = np.stack([place != UNREAD for *_, place in places], 1).astype(np.float32)
    generator = np.random.default_rng(0)
    draws = [np.arange(images)[None]]
    draws += [generator.integers(images, size=(RESAMPLES // 20, images)) for _ in range(20)]
    rates = np.concatenate([_rates_of(draw, wrong, read) for draw in draws])
    of_models = {name: _Rates(None, {}) for name in answers}
    for (name, corruption, severity, _), of_pass in zip(places, rates.T, strict=True):
        if corruption == CLEAN:
            of_models[name] = of_models[name]._replace(clean=of_pass)
        else:
            of_models[name].by_corruption.setdefault(corruption, {})[severity] = of_pass
    return of_models


def _rates_of(draws: np.ndarray, wrong: np.ndarray, read: np.ndarray) -> np.ndarray:
    counts = np.stack([np.bincount(draw, minlength=draws.shape[1]) for draw in draws]).astype(np.float32)
    return np.divide(counts @ wrong, counts @ read, dtype=np.float64)


def _accuracy(clean: np.ndarray | None) -> dict[str, Any]:
    columns = ('top1', 'top1_err', 'top5', 'top5_err')
    if clean is None:
        return dict.fromkeys(columns, '')
    read = places_read(clean)
    top1, top5 = 100 * np.mean(read == 0), 100 * np.mean(read < TOP)
    return dict(zip(columns, map(_rounded, (top1, 100 - top1, top5, 100 - top5)), strict=True))


def _measures(rates: _Rates, baseline: _Rates | None, severities: Sequence[int], imagenet: bool) -> dict[str, Any]:
    errors = rates.corruption_errors(severities)
    tested = errors.keys() >= set(TEST_CORRUPTIONS)
    measures: dict[str, Any] = {'E': None if rates.clean is None else 100 * rates.clean}
    measures.update({f'CE_{name}': 100 * errors[name] for name in sorted(errors, key=_place_in_table)})
    measures['plain_mCE'] = 100 * plain_mce(errors) if tested else None
    # AlexNet's errors are means over the five severities.
    normalize = tested and imagenet and tuple(severities) == SEVERITIES
    measures['alexnet_normalized_mCE'] = 100 * normalized_mce(errors) if normalize else None
    measures.update(dict.fromkeys(COMPARISONS))
    if tested and baseline is not None and rates.clean is not None and baseline.clean is not None:
        of_baseline = baseline.corruption_errors(severities)
        if of_baseline.keys() >= set(TEST_CORRUPTIONS):
            measures.update(_comparisons(rates.clean, errors, baseline.clean, of_baseline))
    return measures


def _comparisons(
    clean: Any, errors: Mapping[str, Any], of_baseline: Any, errors_of_baseline: Mapping[str, Any]
) -> dict[str, Any]:
    relative = 100 * relative_mce(clean, errors, of_baseline, errors_of_baseline)
    net = net_error_reduction(clean, plain_mce(errors), of_baseline, plain_mce(errors_of_baseline))
    return dict(zip(COMPARISONS, (relative, net), strict=True))


def _place_in_table(corruption: str) -> tuple[int, str]:
    place = TEST_CORRUPTIONS.index(corruption) if corruption in TEST_CORRUPTIONS else len(TEST_CORRUPTIONS)
    return place, corruption


def read_csv(path: str | os.PathLike[str]) -> list[dict[str, str]]:
    """Read a table of a results folder.

    Args:
        path: The file.

    Returns:
        Its rows.
    """
    with open(path, newline='') as file:
        return list(csv.DictReader(file))


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    columns = dict.fromkeys(column for row in rows for column in row)
    text = io.StringIO(newline='')
    writer = csv.DictWriter(text, list(columns), lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)
    atomic_write(path, text.getvalue().encode())
