"""Lists of ImageNet classes: timm's of all 1,000, and the subsets of 100 and of 200 classes in the push-pull paper."""

import importlib.util
import os
from pathlib import Path

from ..errors import InputError
from ..fields import read_text

__all__ = ['find_class_map', 'read_class_map']


def find_class_map(name: str, folder: str = '') -> str:
    """Find a file of class names.

    Args:
        name: Path of a file, as timm's ``--class-map`` takes it, relative to the working directory or to ``folder``;
            or the name of a list, ``imagenet_100``, ``imagenet_200`` or ``imagenet_1000``; or '' for no file.
        folder: Folder of the dataset.

    Returns:
        Path of the file; '' for no file. The path of a list is absolute.

    Raises:
        ValueError: If there is no such file or list; or if timm would read other names from the file than it shows, for
            a byte-order mark, a line without a name, or a name on two lines.
    """
    if not name:
        return name
    lists = _lists()
    for path in (name, os.path.join(folder, name), lists.get(name, '')):
        if os.path.isfile(path):
            _check_lines(Path(path))
            return str(path)
    raise InputError(f'class_map must be a file of class names or one of {", ".join(lists)}, got {name!r}.')


def read_class_map(path: str | os.PathLike[str]) -> list[str]:
    """Read a text file of class names.

    Args:
        path: Text file with one name a line, in the order of the logits.

    Returns:
        The names.

    Raises:
        ValueError: If the file is not text in UTF-8.
    """
    return [line.strip() for line in read_text(path).rstrip('\n').split('\n')]


def _lists() -> dict[str, Path]:
    """Find the lists by name. That of all 1,000 classes is timm's, found without the slow import of timm."""
    ours, timm = Path(__file__).parent.absolute(), importlib.util.find_spec('timm')
    lists = {name: ours / f'{name}_synsets.txt' for name in ('imagenet_100', 'imagenet_200')}
    if timm is not None and timm.origin is not None:
        lists['imagenet_1000'] = Path(timm.origin).parent.absolute() / 'data' / '_info' / 'imagenet_synsets.txt'
    return {name: path for name, path in lists.items() if path.is_file()}


def _check_lines(path: Path) -> None:
    """Refuse lines of a text file that would shift or leave out a class: timm takes each line for a name, even ''."""
    if path.suffix.lower() != '.txt':
        return
    names = read_class_map(path)
    if names[0].startswith('\ufeff'):
        raise InputError(
            f'class_map must be without a byte-order mark, {path} begins with one: save it as plain UTF-8.'
        )
    numbers: dict[str, int] = {}
    for number, name in enumerate(names, 1):
        if not name:
            raise InputError(f'class_map must have a name on each line, line {number} of {path} is empty.')
        if number != numbers.setdefault(name, number):
            raise InputError(
                f'class_map must name each class once, {path} has {name} on the lines {numbers[name]} and {number}.'
            )
