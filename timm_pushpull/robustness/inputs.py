"""What is evaluated: the dataset, the models and their checkpoints, with errors that name them."""

import contextlib
import os
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from timm.data import create_dataset
from timm.models import create_model, load_checkpoint

from ..layers.push_pull import PushPullConv2d
from .data import find_class_map

__all__ = ['load_model', 'load_models', 'open_dataset', 'refused_by_timm']


def open_dataset(data_dir: str | None, name: str = '', split: str = 'validation', class_map: str = '') -> Any:
    """Open a dataset as timm's ``validate.py`` does, without a transform.

    Where a folder has no such split, timm takes all its images, those of the training too. That is refused here, unless
    the folder has no splits at all.

    Args:
        data_dir: Folder of the dataset.
        name: Type of the dataset, as in ``timm.data.create_dataset``; ``''`` for folders of images.
        split: Name of the split.
        class_map: File of class names, or ``imagenet_100`` or ``imagenet_200``.

    Returns:
        The dataset, for :func:`timm_pushpull.evaluate_robustness`.

    Raises:
        ValueError: If the folder, the split or the class map does not exist, or if timm refuses the dataset.
    """
    if not name and (data_dir is None or not os.path.exists(data_dir)):
        raise ValueError(f'data_dir must be a folder of images, {data_dir} is not one.')
    options: dict[str, Any] = dict(root=data_dir, split=split, class_map=find_class_map(class_map, data_dir or ''))
    with refused_by_timm(f'{name or "images"} in {data_dir}'):
        dataset: Any = create_dataset(name, **options)
    whole = data_dir is not None and not name and dataset.reader.root == data_dir
    if whole and (split != 'validation' or os.path.isdir(os.path.join(str(data_dir), 'train'))):
        raise ValueError(f'split must be a folder of data_dir, there is no {split} in {data_dir}.')
    return dataset


def load_models(names: Sequence[str], checkpoints: Sequence[str] | None = None, **options: Any) -> dict[str, Any]:
    """Load models for one evaluation, see :func:`load_model`.

    Args:
        names: Model names of timm, or ``LABEL=NAME``.
        checkpoints: One file for each model; None for timm's pretrained weights.
        **options: Options of :func:`load_model`, the same for all models.

    Returns:
        Models by label.

    Raises:
        ValueError: If there is not one checkpoint for each model, if a label is given twice, or as for
            :func:`load_model`.
    """
    if checkpoints and len(checkpoints) != len(names):
        raise ValueError(f'checkpoint must name one file for each of the models, got {len(checkpoints)}.')
    models: dict[str, Any] = {}
    for name, checkpoint in zip(names, checkpoints or [None] * len(names), strict=True):
        label, equals, model_name = name.partition('=')
        if not equals or '/' in label or ':' in label:
            label = model_name = name
        if label in models:
            raise ValueError(f'model {label} is given twice: tell them apart as LABEL={model_name}.')
        models[label] = load_model(model_name, checkpoint, **options)
    return models


def load_model(
    name: str,
    checkpoint: str | None = None,
    use_ema: bool = False,
    num_classes: int | None = None,
    **model_kwargs: Any,
) -> Any:
    """Create a model and load its weights as timm's ``validate.py`` does, with errors that name the model.

    Args:
        name: Model name that ``timm.create_model`` takes.
        checkpoint: File of the weights; None for timm's pretrained weights.
        use_ema: Load the EMA weights of the checkpoint.
        num_classes: Number of classes; None for the default of the model.
        **model_kwargs: Other arguments of the model.

    Returns:
        The model.

    Raises:
        ValueError: If there is no such model, checkpoint or setting, if they do not fit, or if the checkpoint holds no
            alpha and the model would keep a random one.
    """
    if checkpoint is not None and not os.path.isfile(checkpoint):
        raise ValueError(f'checkpoint must be a file, {checkpoint} is not one.')
    with refused_by_timm(name):
        model = create_model(name, pretrained=checkpoint is None, num_classes=num_classes, **model_kwargs)
        if checkpoint is not None:
            drawn = _erase_drawn_alpha(model)
            load_checkpoint(model, checkpoint, use_ema)
            if any(alpha.isnan().any() for alpha in drawn):
                raise RuntimeError(
                    f'{checkpoint} holds no alpha, and a random one would be used. For a plain network give the model '
                    'argument push_pull=False, otherwise alpha.'
                )
    return model


def _erase_drawn_alpha(model: Any) -> list[Any]:
    """Set each alpha that was drawn, not given, to NaN, to see whether a checkpoint sets it."""
    layers = [layer for layer in model.modules() if isinstance(layer, PushPullConv2d)]
    drawn = [layer.alpha for layer in layers if layer.trainable_alpha and layer.initial_alpha is None]
    for alpha in drawn:
        alpha.data.fill_(float('nan'))
    return drawn


@contextlib.contextmanager
def refused_by_timm(subject: str) -> Iterator[None]:
    """Turn the errors by which timm refuses an argument into a ``ValueError`` that names the subject."""
    try:
        yield
    except (AssertionError, ImportError, RuntimeError, TypeError) as error:
        message = textwrap.shorten(str(error), 300)
        if 'No pretrained weights' in message:
            message = 'there are no pretrained weights, give a checkpoint.'
        elif 'size mismatch' in message:
            message += ' Give the num_classes and model arguments of the training, or the name with its tag.'
        raise ValueError(f'{subject}: {message}') from None
