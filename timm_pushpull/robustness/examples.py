"""Images that a results folder keeps for its report, with the prediction of each model."""

import os
from pathlib import Path
from typing import NamedTuple

from timm.data import ImageNetInfo

from .metrics import CLEAN, KINDS, display_name
from .store import UNREADABLE, Predictions, find_examples, read_classes, read_images

__all__ = ['ExampleImage', 'ModelPrediction', 'View', 'read_examples']


class ModelPrediction(NamedTuple):
    """The prediction of one model."""

    model: str
    label: str
    """Class in words."""
    correct: bool


class View(NamedTuple):
    """An image, clean or corrupted, as a model saw it."""

    title: str
    path: Path
    predictions: list[ModelPrediction]


class ExampleImage(NamedTuple):
    """One image with all its views."""

    name: str
    label: str
    """Its class in words."""
    views: list[View]


def read_examples(folder: str | os.PathLike[str], predictions: Predictions) -> list[ExampleImage]:
    """Read the examples of a results folder.

    Args:
        folder: Results folder.
        predictions: Predictions of the models, see :func:`~timm_pushpull.robustness.store.read_predictions`.

    Returns:
        Images in the order of ``images.csv``, their views in the order of the test corruptions.
    """
    files = find_examples(folder)
    if not files:
        return []
    images, classes = read_images(folder), _class_labels(folder)
    order = [CLEAN, *(name for names in KINDS.values() for name in names)]
    order += sorted({file.corruption for file in files} - {*order})
    examples: dict[int, ExampleImage] = {}
    for row, corruption, severity, path in sorted(files, key=lambda file: (file.row, order.index(file.corruption))):
        name, target = images[row]
        label = classes[target] or f'class {target}'
        found = []
        for model, passes in predictions.items():
            array = passes.get((corruption, severity))
            if array is not None and array['rank'][row] != UNREADABLE:
                prediction = int(array['prediction'][row])
                correct = bool(array['rank'][row] == 0)
                found.append(ModelPrediction(model, classes[prediction] or str(prediction), correct))
        title = f'{display_name(corruption)} {severity}' if severity else display_name(corruption)
        examples.setdefault(row, ExampleImage(name, label, [])).views.append(View(title, path, found))
    return list(examples.values())


def _class_labels(folder: str | os.PathLike[str]) -> list[str]:
    """Read the names of the classes, in words where they are ImageNet's."""
    names = read_classes(folder)
    imagenet = ImageNetInfo()
    if not set(names) <= set(imagenet.label_names()):
        return names
    return [imagenet.label_name_to_description(name).split(',')[0] for name in names]
