"""Maps image classes to logits of models with more classes, and reads ImageNet-ReaL labels."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from timm.data import ImageNetInfo, infer_imagenet_subset

from ..errors import InputError
from ..fields import read_text
from .classes import check_labels, label_names, list_some

__all__ = ['ModelClasses', 'find_model_classes', 'find_right_classes', 'read_real_labels', 'read_valid_labels']


class ModelClasses(NamedTuple):
    """The classes among which a model predicts."""

    valid_labels: list[int] | None
    """Logit index per image class; None if the logits are those of the classes."""
    note: str
    """What is special about the classes, in a sentence, or ''."""


def find_model_classes(name: str, model: Any, images: Any, valid_labels: Sequence[int] | None = None) -> ModelClasses:
    """Match the classes of images with the logits of a model.

    Where the model has more classes than the images, its predictions are restricted to those of the images: they are
    found by name among the class names of the model or, for a model of ImageNet, among its synsets.

    Args:
        name: Name of the model.
        model: Model of timm.
        images: Images with ``classes`` and ``notes``, such as :class:`~timm_pushpull.robustness.data.DatasetImages`.
        valid_labels: Index of the logit of each class; None to find the logits.

    Returns:
        The logits of the classes, and what to tell about them.

    Raises:
        ValueError: If the model lacks a class, or has its classes in another order.
    """
    classes, count, of_model = images.classes, len(images.classes), model.num_classes
    subset = infer_imagenet_subset(model)
    names = [label_names(model), ImageNetInfo(subset).label_names() if subset else []]
    names = [labels if len(labels) == of_model else [] for labels in names]  # others are those of another head
    known = [labels for labels in names if labels and set(classes) <= set(labels)]
    if valid_labels is None and of_model > count and known:
        places = {label: index for index, label in enumerate(known[0])}
        valid_labels = [places[label] for label in classes]
    elif valid_labels is None and of_model != count:
        raise InputError(
            f'{name} has {of_model} classes, but the images have {count} ({list_some(classes)}). Give images of its '
            f'own classes, or fine-tune it on these. {" ".join(images.notes)}'.strip()
        )
    labels = next(iter(known), names[0])
    if valid_labels is None:
        return ModelClasses(None, check_labels(name, labels, classes))
    if len(valid_labels) != count:
        raise InputError(f'valid_labels must have one line for each of the {count} classes, got {len(valid_labels)}.')
    if wrong := [label for label in valid_labels if not 0 <= label < of_model]:
        raise InputError(f'valid_labels must be indices of the {of_model} classes of {name}, got {wrong[0]}.')
    note = check_labels(name, [labels[label] for label in valid_labels] if labels else [], classes)
    restricted = f'{name} predicts among the {count:,} classes of the images, out of its {of_model:,}.'
    if subset == 'imagenet-1k' and len(known) and count < of_model:
        restricted += ' The class map imagenet_1000 (--class-map) gives the errors among all.'
    return ModelClasses(list(valid_labels), f'{restricted} {note}'.strip())


def read_valid_labels(path: str | os.PathLike[str]) -> list[int]:
    """Read the file that ``validate.py`` takes as ``--valid-labels``.

    Args:
        path: Text file with one index of a logit a line: that of the first class of the images, of the second, ...

    Returns:
        The indices.

    Raises:
        ValueError: If the file does not exist, or if a line is not an index or repeats one.
    """
    labels: dict[int, int] = {}
    for number, line in enumerate(_read(path, 'valid_labels').splitlines(), 1):
        if not line.strip().isdecimal() or labels.setdefault(int(line), number) != number:
            raise InputError(f'valid_labels must have another index on each line, line {number} of {path} is {line!r}.')
    return list(labels)


def read_real_labels(path: str | os.PathLike[str]) -> list[list[int]]:
    """Read the file that ``validate.py`` takes as ``--real-labels``: ImageNet-ReaL (https://arxiv.org/abs/2006.07159).

    Args:
        path: JSON file: for each of ImageNet's validation images, in the order of their numbers, the list of right
            classes, 0 to 999.

    Returns:
        Content of the file.

    Raises:
        ValueError: If the file does not exist or holds anything else.
    """
    try:
        content = json.loads(_read(path, 'real_labels'))
    except (ValueError, RecursionError) as error:
        raise InputError(f'real_labels must be a JSON file, {path} is not one: {error}') from None
    if not isinstance(content, list) or not content or not all(map(_is_list_of_classes, content)):
        raise InputError(f'real_labels must list the right classes, 0 to 999, of each image, {path} does not.')
    return content


def _is_list_of_classes(value: Any) -> bool:
    return isinstance(value, list) and all(type(label) is int and 0 <= label < 1000 for label in value)


def _read(path: str | os.PathLike[str], argument: str) -> str:
    if not os.path.isfile(path):
        raise InputError(f'{argument} must be a file, {path} is not one.')
    return read_text(path)


def find_right_classes(
    real_labels: Sequence[Sequence[int]],
    images: Sequence[str],
    classes: Sequence[str],
    valid_labels: Sequence[int] | None,
) -> list[list[int]]:
    """Translate ImageNet's reassessed labels into the classes of images.

    Args:
        real_labels: What :func:`read_real_labels` returns.
        images: Name of each image: a file ``ILSVRC2012_val_00000001``, with any folder and suffix.
        classes: Name of each class of the images.
        valid_labels: Index of each class among the 1,000 of ImageNet, where the classes are not named by synsets; None
            where they are the 1,000.

    Returns:
        Right classes of each image; none if no right class is among the classes of the images.

    Raises:
        ValueError: If an image is none of those with labels, or if the classes are not known.
    """
    synsets = {label: index for index, label in enumerate(ImageNetInfo().label_names())}
    if set(classes) <= synsets.keys():  # not by valid_labels: those of another model than of the 1,000 classes differ
        valid_labels = [synsets[label] for label in classes]
    elif valid_labels is None and len(classes) == len(synsets):
        valid_labels = range(len(classes))
    if valid_labels is None:
        raise InputError(
            f'real_labels are of ImageNet, and the classes {list_some(classes)} are none of its synsets: give '
            'valid_labels.'
        )
    places: Mapping[int, int] = {label: index for index, label in enumerate(valid_labels)}
    found = []
    for image in images:
        match = re.fullmatch(r'ILSVRC2012_val_(\d{8})', os.path.splitext(os.path.basename(image))[0])
        if not match or not 1 <= int(match[1]) <= len(real_labels):
            raise InputError(
                f'real_labels are of {len(real_labels):,} images named ILSVRC2012_val_00000001 and so on, {image} is '
                'none of them.'
            )
        found.append([places[label] for label in real_labels[int(match[1]) - 1] if label in places])
    return found
