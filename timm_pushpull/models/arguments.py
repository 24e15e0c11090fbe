"""Checks of the arguments that all push-pull networks take beside those of the unit."""

from typing import Any

from ..errors import InputError

__all__ = ['check_arguments']


def check_arguments(push_pull: Any, contrast_norm: Any, augment: Any, augment_splits: Any) -> None:
    """Refuse values of another type: ``'False'``, as a command line may give it, would count as true.

    Raises:
        ValueError: If one of the first two is not a bool, if there is no such augmentation, or if it is missing.
    """
    for name, value in {'push_pull': push_pull, 'contrast_norm': contrast_norm}.items():
        if not isinstance(value, bool):
            raise InputError(f'{name} must be True or False, got {value!r}.')
    if augment not in (None, 'prime'):
        raise InputError(f"augment must be 'prime' or None, got {augment!r}.")
    if augment is None and augment_splits != 1:
        raise InputError(f"augment_splits={augment_splits!r} needs an augmentation: give augment='prime' too.")
