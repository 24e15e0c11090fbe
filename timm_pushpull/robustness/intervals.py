"""95% intervals of errors over images: the 2.5th and the 97.5th percentile of 1,000 resamples of the images."""

from collections.abc import Sequence

import numpy as np

from .store import UNREADABLE

__all__ = ['ENDS', 'columns_of', 'interval_columns', 'resampled_errors', 'resampled_means', 'rounded']

RESAMPLES = 1000
ENDS = ('_low', '_high')  # of an interval


def resampled_errors(ranks: np.ndarray, top: int | Sequence[int] = 1, seed: int = 0) -> np.ndarray:
    """Compute error rates on the images and on 1,000 resamples of the images.

    Args:
        ranks: Rank of the right class, (images, columns). Unreadable images count neither as images nor as errors.
        top: A prediction is right if the right class is among this many of the highest logits: one number, or one for
            each column.
        seed: Seed of the resamples. Equal seeds give the same resamples of equally many images.

    Returns:
        Array (1 + 1000, columns): the error rate of each column, in [0, 1], then its rate on each resample.
    """
    readable = ranks != UNREADABLE
    wrong = readable & (ranks >= np.array(top))
    return resampled_means(wrong.astype(np.float32), readable.astype(np.float32), seed)


def resampled_means(values: np.ndarray, counted: np.ndarray, seed: int = 0) -> np.ndarray:
    """Compute means on the images and on 1,000 resamples of the images.

    Args:
        values: Values (images, columns), 0 where an image does not count.
        counted: 1 where an image counts in a column, 0 elsewhere, (images, columns).
        seed: Seed of the resamples. Equal seeds give the same resamples of equally many images.

    Returns:
        Array (1 + 1000, columns): the mean of each column over the images that count, then on each resample.
    """
    images, generator = len(values), np.random.default_rng(seed)
    draws = [np.arange(images)[None]]
    draws += [generator.integers(images, size=(RESAMPLES // 20, images)) for _ in range(20)]
    with np.errstate(divide='ignore', invalid='ignore'):
        return np.concatenate([_resampled_rates(draw, values, counted) for draw in draws])


def _resampled_rates(draws: np.ndarray, values: np.ndarray, counted: np.ndarray) -> np.ndarray:
    counts = np.stack([np.bincount(draw, minlength=draws.shape[1]) for draw in draws]).astype(np.float32)
    return np.divide(counts @ values, counts @ counted, dtype=np.float64)


def interval_columns(measure: str, values: np.ndarray | None) -> dict[str, float | str]:
    """Return the columns of a row that hold a measure and its 95% interval.

    Args:
        measure: Name of the measure.
        values: Value on the images, then on each resample of the images, if there are any; None if the measure cannot
            be computed.

    Returns:
        The columns of :func:`columns_of`, rounded to three decimals; '' where there is no finite number.
    """
    numbers = (
        [None] * 3 if values is None else [values[0], *(_interval(values[1:]) if len(values) > 1 else (None, None))]
    )
    return dict(zip(columns_of(measure), map(rounded, numbers), strict=True))


def _interval(resampled: np.ndarray) -> np.ndarray:
    # A ratio to a baseline without errors is infinite; such a resample counts as the worst.
    return np.percentile(np.nan_to_num(resampled, nan=np.inf, posinf=np.inf), (2.5, 97.5), method='nearest')


def columns_of(measure: str) -> tuple[str, str, str]:
    """Name the columns of a row that hold a measure.

    Args:
        measure: ``'E'``, ``'CE_...'`` or a mean.

    Returns:
        Columns of the value and of the low and the high end of its interval.
    """
    low, high = ENDS
    return measure, f'{measure}{low}', f'{measure}{high}'


def rounded(number: float | None) -> float | str:
    """Round a number to three decimals; '' for None and for an infinite number."""
    return '' if number is None or not np.isfinite(number) else round(float(number), 3)
