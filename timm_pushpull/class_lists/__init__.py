"""Lists of ImageNet classes: the subsets of 100 and of 200 classes in the push-pull paper."""

import os
from pathlib import Path

from ..errors import InputError

__all__ = ['find_class_map']


def find_class_map(name: str, folder: str = '') -> str:
    """Find a file of class names.

    Args:
        name: Path of a file, as timm's ``--class-map`` takes it, relative to the working directory or to ``folder``;
            or the name of a list of this package, ``imagenet_100`` or ``imagenet_200``; or '' for no file.
        folder: Folder of the dataset.

    Returns:
        Path of the file; '' for no file. The path of a list of this package is absolute.

    Raises:
        ValueError: If there is no such file or list.
    """
    lists = Path(__file__).parent.absolute()
    for path in (name, os.path.join(folder, name), lists / f'{name}_synsets.txt'):
        if not name or os.path.isfile(path):
            return str(path)
    ours = ', '.join(sorted(path.name.removesuffix('_synsets.txt') for path in lists.glob('*_synsets.txt')))
    raise InputError(f'class_map must be a file of class names or one of {ours}, got {name!r}.')
