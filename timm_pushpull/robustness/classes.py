"""Identifies classes by their names: those of image folders, of models and of ImageNet."""

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from timm.data import ImageNetInfo, get_img_extensions
from timm.utils.misc import natural_key

from ..errors import InputError

__all__ = [
    'check_folders',
    'check_labels',
    'check_not_training',
    'classes_without_images',
    'describe_targets',
    'is_imagenet_1k',
    'label_names',
    'list_some',
    'numbers_sorted_as_text',
    'same_classes',
]


def list_some(names: Sequence[str]) -> str:
    """List names, the first three of many."""
    return ', '.join(names if len(names) <= 4 else [*names[:3], f'{len(names) - 3:,} more'])


def check_not_training(root: str, files: Iterable[str], split: str = 'other split') -> None:
    """Refuse training images in place of another split: timm takes all images of a folder that lacks the split.

    Args:
        root: Folder of the dataset.
        files: Paths of its images.
        split: Name of the split that was asked for.

    Raises:
        ValueError: If a class lies in a folder ``train`` or ``training`` inside the root.
    """
    for folder in sorted({os.path.dirname(file) for file in files}):
        parents = os.path.relpath(folder, root).split(os.sep)[:-1]  # a class may be named train
        if not {'train', 'training'}.isdisjoint(parents):
            raise InputError(
                f'split must be a folder in data_dir, there is no {split} in {root}: the images in {folder} are for '
                'training.'
            )


def check_folders(root: str, files: Sequence[str], class_to_idx: Mapping[str, int]) -> list[str]:
    """Compare image folders with the classes that timm made of them.

    Args:
        root: Folder of the dataset.
        files: Paths of its images.
        class_to_idx: Class indices by the names of folders.

    Returns:
        What was left aside, in sentences.

    Raises:
        ValueError: If the folder of a class is hidden, if images lie outside the folders of classes, or if a folder
            without images makes the indices of the next classes smaller.
    """
    types = get_img_extensions(as_set=True) | {os.path.splitext(file)[1].lower() for file in files}
    found: set[str] = set()
    without, odd = {}, []
    others: Counter[str] = Counter()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        parents = Path(folder).relative_to(root).parts
        label, hidden = ''.join(parents[-1:]), any(parent.startswith('.') for parent in parents)
        suffixes = {name: os.path.splitext(name)[1].lower() for name in names}
        if not types.isdisjoint(suffixes.values()):
            found.add(label)
            odd += [folder] if hidden or not label else []
        elif not (subfolders or hidden) and label:
            without[label] = folder
        if not hidden:
            others.update(suffixes[name] for name in names if suffixes[name] not in types and name[0] != '.')
    kinds = ', '.join(sorted(types))
    in_order = list(class_to_idx) == sorted(class_to_idx, key=natural_key)
    if in_order and class_to_idx.keys() == found:  # the classes are the folders, not those of a class map
        for folder in odd:
            fault = 'holds images outside the folders of classes' if folder == root else 'is hidden, but holds images'
            raise InputError(f'{folder} {fault}, and timm makes a class of them: move them, or give a class map.')
        for label in sorted(without.keys() - found, key=natural_key):
            raise InputError(
                f'{without[label]} holds no image ({kinds}), and the classes after it would get smaller indices: fill '
                'the folder, or move it.'
            )
    notes = []
    if unlisted := sorted(found - class_to_idx.keys() - {''}, key=natural_key):
        notes.append(f'Folders of images that the class map leaves out: {len(unlisted):,} ({list_some(unlisted)}).')
    if others:
        left_out = list_some([suffix or 'no suffix' for suffix, _ in others.most_common()])
        notes.append(f'Files left out in {root}: {others.total():,} ({left_out}), because images end in {kinds}.')
    return notes


def classes_without_images(classes: Sequence[str], targets: Iterable[int]) -> str:
    """Name the classes without images.

    Args:
        classes: Name of each class, '' for a class without a name.
        targets: Class index of each image.

    Returns:
        A sentence, or ''.
    """
    seen = set(targets)
    names = [name or f'class {index}' for index, name in enumerate(classes) if index not in seen]
    return f'Classes without images: {len(names):,} of {len(classes):,} ({list_some(names)}).' if names else ''


def numbers_sorted_as_text(classes: Sequence[str]) -> str:
    """Notice names that are numbers in the order of text, as torchvision and ``datasets`` sort folders.

    Args:
        classes: Name of each class.

    Returns:
        A sentence, or ''.
    """
    if (
        not all(name.isdecimal() for name in classes)
        or sorted(classes) != list(classes)
        or list(classes) == sorted(classes, key=int)
    ):
        return ''
    return (
        f'The class names are numbers in the order of text ({list_some(classes)}). For weights that were trained in '
        'the order of the numbers, give a class map with the numbers in their order, or read the folders without '
        'torch/ or hfds/.'
    )


def describe_targets(classes: Sequence[str], targets: Sequence[int]) -> str:
    """Say how many images each class has.

    Args:
        classes: Name of each class, '' for a class without a name.
        targets: Class index of each image.

    Returns:
        A sentence with the number of images, the classes, and the least and the largest number of images of a class.
    """
    count = Counter(targets)
    least, most = (end(count[index] for index in range(len(classes))) for end in (min, max))
    names = f' ({list_some(classes)})' if all(classes) else ''
    each = f'{least:,}' if least == most else f'{least:,} to {most:,}'
    return f'{len(targets):,} images of {len(classes):,} classes{names}, {each} of each.'


def label_names(model: Any) -> list[str]:
    """Return the class names that a model of timm brings along, in the order of its logits; none if it has none."""
    names = (getattr(model, 'pretrained_cfg', None) or {}).get('label_names')
    return list(names) if isinstance(names, (list, tuple)) else []


def check_labels(name: str, labels: Sequence[str], classes: Sequence[str]) -> str:
    """Compare the class names of a model with those of images.

    Args:
        name: Name of the model.
        labels: Class names of the model, none if they are not known.
        classes: Class names of the images, '' for a class without a name.

    Returns:
        A sentence about names that differ, or ''.

    Raises:
        ValueError: If a class has another index in the model than in the images.
    """
    if len(labels) != len(classes):
        return ''  # label names of another head, as after training on other classes
    places = {label: index for index, label in enumerate(classes) if label}
    different = [index for index, label in enumerate(classes) if label and label != labels[index]]
    if not different:
        return ''
    first = f'class {different[0]} is {labels[different[0]]!r} in {name}, {classes[different[0]]!r} in the images'
    if any(places.get(labels[index], index) != index for index in different):
        raise InputError(
            f'{name} has its classes in another order than the images: {first}. Give a class map (--class-map): a file '
            f'with the names of the classes, one a line, in the order of {name}.'
        )
    return f'{name} and the images name {len(different):,} of {len(classes):,} classes differently: {first}.'


def same_classes(classes: Sequence[str], others: Sequence[str]) -> bool:
    """Tell whether two sets of images have the same classes with the same indices.

    Args:
        classes: Name of each class, '' for a class without a name.
        others: Names of the classes of the other images. Names that are the indices themselves, as in ImageNet-V2,
            fit any names.

    Returns:
        Whether all names are known and equal.
    """
    indices = [str(index) for index in range(len(classes))]
    if len(classes) != len(others) or not all((*classes, *others)):
        return False
    return list(classes) == list(others) or indices in (list(classes), list(others))


def is_imagenet_1k(classes: Sequence[str]) -> bool:
    """Tell whether classes are the 1,000 of ImageNet.

    Args:
        classes: Names: synsets such as n01440764; or, in ImageNet's order, descriptions such as 'tench, Tinca tinca'.

    Returns:
        Whether they are these classes, and all of them.
    """
    imagenet = ImageNetInfo()
    if len(classes) != imagenet.num_classes():
        return False
    words = [description.split(',')[0] for description in imagenet.label_descriptions()]
    # Some collections add a word or a number to the second class of one name, as crane.
    described = all(name.startswith(first) for name, first in zip(classes, words, strict=True))
    return described or set(classes) == set(imagenet.label_names())
