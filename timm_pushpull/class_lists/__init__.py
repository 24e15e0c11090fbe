"""Lists of ImageNet classes: all 1,000, and the subsets of 100 and of 200 classes in the push-pull paper."""

import os
from pathlib import Path

from ..errors import InputError
from ..fields import read_text

__all__ = ['find_class_map']


def find_class_map(name: str, folder: str = '') -> str:
    """Find a file of class names.

    Args:
        name: Path of a file, as timm's ``--class-map`` takes it, relative to the working directory or to ``folder``;
            or the name of a list of this package, ``imagenet_100``, ``imagenet_200`` or ``imagenet_1000``; or '' for no
            file.
        folder: Folder of the dataset.

    Returns:
        Path of the file; '' for no file. The path of a list of this package is absolute.

    Raises:
        ValueError: If there is no such file or list; or if timm would read other names from the file than it shows, for
            a byte-order mark, a line without a name, or a name on two lines.
    """
    lists = Path(__file__).parent.absolute()
    for path in (name, os.path.join(folder, name), lists / f'{name}_synsets.txt'):
        if not name:
            return name
        if os.path.isfile(path):
            _check_lines(Path(path))
            return str(path)
    names = (path.name.removesuffix('_synsets.txt') for path in lists.glob('*_synsets.txt'))
    ours = ', '.join(sorted(names, key=lambda name: (len(name), name)))
    raise InputError(f'class_map must be a file of class names or one of {ours}, got {name!r}.')


def _check_lines(path: Path) -> None:
    """Refuse lines of a text file that would shift or leave out a class: timm takes each line for a name, even ''."""
    if path.suffix.lower() != '.txt':
        return
    lines = read_text(path).rstrip('\n').split('\n')
    if lines[0].startswith('\ufeff'):
        raise InputError(
            f'class_map must be without a byte-order mark, {path} begins with one: save it as plain UTF-8.'
        )
    numbers: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            raise InputError(f'class_map must have a name on each line, line {number} of {path} is empty.')
        if number != numbers.setdefault(line.strip(), number):
            raise InputError(
                f'class_map must name each class once, {path} has {line.strip()} on the lines '
                f'{numbers[line.strip()]} and {number}.'
            )
