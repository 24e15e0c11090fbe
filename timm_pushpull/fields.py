"""Reads text, JSON and YAML, and checks fields: an error names the file, the field, and what the field must be."""

import json
import math
import os
import reprlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from .errors import InputError

__all__ = [
    'CHANNELS',
    'COUNT',
    'CROP_MODE',
    'FLAG',
    'INTEGER',
    'INTERPOLATION',
    'MAPPING',
    'NUMBER',
    'POSITIVE',
    'SIZE',
    'TEXT',
    'TRAINING_OPTIONS',
    'Kind',
    'check_fields',
    'optional',
    'read_mapping',
    'read_text',
]


class Kind(NamedTuple):
    """What a field may hold."""

    words: str
    """For the message: what the field must be."""
    fits: Callable[[Any], bool]


def _is_number(value: Any, types: Any = (int, float)) -> bool:
    return isinstance(value, types) and not isinstance(value, bool) and math.isfinite(value)


def _all_fit(value: Any, kind: Kind) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(map(kind.fits, value))


TEXT = Kind('a string', lambda value: isinstance(value, str) and value.strip() != '')
FLAG = Kind('true or false', lambda value: isinstance(value, bool))
INTEGER = Kind('an integer', lambda value: _is_number(value, int))
COUNT = Kind('a positive integer', lambda value: _is_number(value, int) and value > 0)
NUMBER = Kind('a number', _is_number)
POSITIVE = Kind('a positive number', lambda value: _is_number(value) and value > 0)
SIZE = Kind('channels, height and width', lambda value: _all_fit(value, COUNT) and len(value) == 3)
CHANNELS = Kind('a number for each channel', lambda value: _all_fit(value, NUMBER))
MAPPING = Kind('a mapping', lambda value: isinstance(value, dict))
CROP_MODES = ('center', 'squash', 'border')
CROP_MODE = Kind(f'one of {", ".join(CROP_MODES)}', lambda value: value in CROP_MODES)
PIL_FILTERS = ('nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos')
INTERPOLATION = Kind(f'one of {", ".join(PIL_FILTERS)}', lambda value: value in PIL_FILTERS)


def optional(kind: Kind) -> Kind:
    """Let a field be missing, null or an empty text."""
    return Kind(f'{kind.words}, or nothing', lambda value: value is None or value == '' or kind.fits(value))


TRAINING_OPTIONS = {  # those of train.py that this package reads
    'model': TEXT,
    'model_kwargs': optional(MAPPING),
    'num_classes': optional(INTEGER),
    'in_chans': optional(COUNT),
    'gp': optional(TEXT),
    'bn_eps': optional(POSITIVE),
    'img_size': optional(COUNT),
    'input_size': optional(SIZE),
    'crop_pct': optional(POSITIVE),
    'interpolation': optional(INTERPOLATION),
    'mean': optional(CHANNELS),
    'std': optional(CHANNELS),
    'seed': optional(INTEGER),
    'class_map': optional(TEXT),
    'no_aug': optional(FLAG),
    'aa': optional(TEXT),
    'color_jitter': optional(Kind('a number, or several', lambda value: NUMBER.fits(value) or CHANNELS.fits(value))),
    **dict.fromkeys(('color_jitter_prob', 'gaussian_blur_prob', 'grayscale_prob', 'reprob'), optional(NUMBER)),
}


def read_text(path: str | os.PathLike[str]) -> str:
    """Read a text file.

    Args:
        path: Text file in UTF-8.

    Returns:
        Its content.

    Raises:
        ValueError: If the file is not text in UTF-8.
        OSError: If the file cannot be read.
    """
    try:
        return Path(path).read_text(encoding='utf-8')
    except UnicodeDecodeError:
        raise InputError(f'{path} must be text in UTF-8.') from None


def read_mapping(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read fields by name.

    Args:
        path: JSON file if its name ends in ``.json``, otherwise YAML file.

    Returns:
        Its fields.

    Raises:
        ValueError: If the file is not JSON or YAML, or holds no mapping.
        OSError: If the file cannot be read.
    """
    text, is_json = read_text(path), Path(path).suffix == '.json'
    try:
        content = json.loads(text) if is_json else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise InputError(f'{path} is not {"JSON" if is_json else "YAML"}: {" ".join(str(error).split())}') from error
    if not isinstance(content, dict):
        raise InputError(f'{path} must hold a mapping, got {reprlib.repr(content)}.')
    return content


def check_fields(
    path: str | os.PathLike[str], content: Mapping[str, Any], kinds: Mapping[str, Kind], within: str = ''
) -> None:
    """Check fields.

    Args:
        path: File named in the error.
        content: Fields by name. Fields without a kind may hold anything.
        kinds: What each field must be.
        within: Name of the field that holds these fields.

    Raises:
        ValueError: If a field is missing or holds something else.
    """
    for name, kind in kinds.items():
        if not kind.fits(content.get(name)):
            got = reprlib.repr(content[name]) if name in content else 'nothing'
            field = f'{within}.{name}' if within else name
            raise InputError(f'{path}: {field} must be {kind.words}, got {got}.')
