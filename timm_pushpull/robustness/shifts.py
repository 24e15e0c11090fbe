"""Errors on natural shifts, such as ImageNet-A, beside those on the clean images: ``shifted.csv``."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from .classes import same_classes
from .intervals import interval_columns, resampled_errors
from .metrics import CLEAN
from .store import TOP, UNREADABLE, find_shifted, read_classes, read_predictions, read_protocol

__all__ = ['SHIFT_MEASURES', 'clean_name', 'find_clean', 'shift_rows']

SHIFT_MEASURES = {
    'top1_err': 'top-1 error on the shifted images, %',
    'top5_err': 'top-5 error on the shifted images, %',
    'error_increase': 'top-1 error on the shifted minus top-1 error on clean images of the same classes, points; clean '
    'images: the set NAME-clean if given, else --data-dir',
}


def shift_rows(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Compute the errors on the natural shifts of a results folder, from the predictions.

    An interval spans the middle 95% of the values over 1,000 resamples of the images; for ``error_increase`` the clean
    images and the shifted ones are resampled independently. Unreadable images count neither as images nor as errors.

    Args:
        folder: Results folder.

    Returns:
        One row for each model and shift: ``model``, ``shift``, the number of ``images`` that could be read and of
        ``classes``, then ``SHIFT_MEASURES``, with ``_low`` and ``_high`` for the ends of their intervals; '' where a
        value cannot be computed.

    Raises:
        ValueError: If a folder holds no results, or if a file is damaged or does not belong to these results.
    """
    rows = []
    for shift, path in find_shifted(folder).items():
        base = find_clean(folder, shift)
        clean = read_predictions(base) if base else {}
        count = read_protocol(path)['data']['classes']
        for name, passes in read_predictions(path).items():
            if (CLEAN, 0) not in passes:
                continue
            ranks = passes[CLEAN, 0]['rank']
            row = {'model': name, 'shift': shift, 'images': int((ranks != UNREADABLE).sum()), 'classes': count}
            top1, top5 = _errors(ranks, seed=1).T
            row |= interval_columns('top1_err', top1) | interval_columns('top5_err', top5)
            before = clean.get(name, {}).get((CLEAN, 0))
            increase = None if before is None else top1 - _errors(before['rank'], seed=0)[:, 0]
            rows.append(row | interval_columns('error_increase', increase))
    return rows


def find_clean(folder: str | os.PathLike[str], shift: str) -> Path | None:
    """Find the clean images with which a natural shift is compared: those with the same classes.

    Args:
        folder: Results folder.
        shift: Name of the shift.

    Returns:
        Results folder of another shift that has the name of :func:`clean_name`, otherwise ``folder``; None if
        neither has clean images with the same classes and labels of the same kind.
    """
    shifts = find_shifted(folder)
    bases = [Path(folder)] if 'real_labels_sha256' not in read_protocol(folder)['data'] else []
    if clean_name(shift) in shifts:
        bases.insert(0, shifts[clean_name(shift)])
    classes = read_classes(shifts[shift])
    return next((base for base in bases if same_classes(classes, read_classes(base))), None)


def clean_name(shift: str) -> str:
    """Name the clean images of the classes of a natural shift, as in timm's ``results-imagenet-a-clean.csv``."""
    return f'{shift}-clean'


def _errors(ranks: np.ndarray, seed: int) -> np.ndarray:
    """Return the top-1 and the top-5 error (1 + 1000, 2) in percent, on the images and on each resample."""
    return 100 * resampled_errors(np.stack([ranks, ranks], 1), (1, TOP), seed)
