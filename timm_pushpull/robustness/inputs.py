"""Opens a dataset and loads models as timm's ``validate.py`` does, with errors that name the argument to change."""

import contextlib
import logging
import os
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from timm.data import create_dataset
from timm.models import create_model, load_checkpoint

from ..checkpoint import augmentation_of, label_names_of, model_args_of, read_training_options, set_data_config
from ..class_lists import find_class_map
from ..errors import InputError
from ..fields import TRAINING_OPTIONS, check_fields, read_mapping
from ..layers.push_pull import PushPullConv2d
from ..recipes import read_args_yaml
from ..registry import RECIPE, hub_configs
from .classes import check_not_training

__all__ = ['as_input_error', 'load_model', 'load_models', 'open_dataset']

_logger = logging.getLogger(__name__)


def open_dataset(
    data_dir: str | os.PathLike[str] | None, name: str = '', split: str = 'validation', class_map: str = ''
) -> Any:
    """Open a dataset without a transform.

    If a folder lacks the split, timm takes all images in the folder. This function refuses training images, and takes a
    folder without the split ``'validation'`` as it is.

    Args:
        data_dir: Folder of the dataset.
        name: Type of the dataset, as in ``timm.data.create_dataset``; ``''`` for folders of images.
        split: Name of the split.
        class_map: File of class names, or ``imagenet_100``, ``imagenet_200`` or ``imagenet_1000``; not for ``torch/``.

    Returns:
        The dataset, for :func:`timm_pushpull.evaluate_robustness`.

    Raises:
        ValueError: If the folder, the split or the class map does not exist, or if timm refuses the dataset or would
            ignore the class map.
    """
    root = None if data_dir is None else os.fspath(data_dir)
    if not name and (root is None or not os.path.exists(root)):
        raise InputError(f'data_dir must be a folder of images, {root} is not one.')
    if class_map and name.startswith('torch/'):
        raise InputError(f'class_map must be left out for {name}, timm ignores it there: read folders without torch/.')
    options: dict[str, Any] = dict(root=root, split=split, class_map=find_class_map(class_map, root or ''))
    classes = f', of the classes in {class_map}' if class_map else ''
    with as_input_error(f'{name or "images"} in {root}{classes}'):
        dataset: Any = create_dataset(name, **options)
    if root is not None and not name and dataset.reader.root == root:
        if split != 'validation':
            raise InputError(f'split must be a folder in data_dir, there is no {split} in {root}.')
        if os.path.isdir(root):
            check_not_training(root, (file for file, _ in dataset.reader.samples), split)
    return dataset


def load_models(
    names: Sequence[str], checkpoints: Sequence[str | os.PathLike[str]] | None = None, **options: Any
) -> dict[str, Any]:
    """Load models for one evaluation, see :func:`load_model`.

    Args:
        names: Model names that ``timm.create_model`` takes, or ``LABEL=NAME``.
        checkpoints: One file for each model; None for timm's pretrained weights.
        **options: Options of :func:`load_model`, the same for all models.

    Returns:
        Models by label. The label of a model without one is its name.

    Raises:
        ValueError: If the numbers of models and checkpoints differ, if two models have one label, or for the reasons of
            :func:`load_model`.
    """
    if checkpoints and len(checkpoints) != len(names):
        raise InputError(f'checkpoint must name one file for each of the {len(names)} models, got {len(checkpoints)}.')
    models: dict[str, Any] = {}
    for number, name in enumerate(names):
        label, equals, model_name = name.partition('=')
        if not equals or '/' in label or ':' in label:
            label = model_name = name
        if not label:
            raise InputError(f'model must have a label before the =, got {name}.')
        if label in models:
            raise InputError(f'model {label} is given twice: give its models different labels, LABEL={model_name}.')
        models[label] = load_model(model_name, checkpoints[number] if checkpoints else None, **options)
    return models


def load_model(
    name: str,
    checkpoint: str | os.PathLike[str] | None = None,
    use_ema: bool = False,
    num_classes: int | None = None,
    **model_kwargs: Any,
) -> Any:
    """Create a model and load its weights.

    A checkpoint of ``train.py`` holds the options of the training; where a file does not, as the averaged weights of
    timm's ``avg_checkpoints.py``, an ``args.yaml`` beside it does. The tag of the network, the model arguments, the
    number of classes, the names of the classes in their class map, and the size and normalization of the images in them
    are those of the model, unless they are given here. The augmentation in them, or in the ``args.yaml`` of a model
    folder, is kept as ``model.training_augmentation``. Options of another network count for nothing, which a warning
    says.

    Args:
        name: Model name that ``timm.create_model`` takes.
        checkpoint: File of the weights; None for timm's pretrained weights.
        use_ema: Load the EMA weights of the checkpoint.
        num_classes: Number of classes; None for that of the checkpoint, or else the default of the model.
        **model_kwargs: Other arguments of the model.

    Returns:
        The model.

    Raises:
        ValueError: If there is no such model, checkpoint or argument, if they do not fit, or if the model would keep a
            random classifier or alpha, because the weights hold none.
        OSError: If pretrained weights cannot be downloaded.
    """
    options: dict[str, Any] = {}
    source = name
    if checkpoint is not None:
        beside = Path(checkpoint).with_name(RECIPE)
        saved = read_training_options(checkpoint, use_ema)
        if saved:
            options = _check_training_options(name, checkpoint, saved, 'args')
        elif beside.is_file():
            options = _check_training_options(name, beside, read_mapping(beside))
        if options:
            source = f'{name} with {checkpoint if saved else beside}'
    if num_classes is not None:
        model_kwargs['num_classes'] = num_classes
    # The tag of the training has the mean, std, crop and interpolation that train.py took from it.
    created = options['model'] if options and '.' not in name else name
    with as_input_error(source):
        model: Any = create_model(created, pretrained=checkpoint is None, **{**model_args_of(options), **model_kwargs})
        if options:
            set_data_config(model, options)
    if checkpoint is None:
        if num_classes not in (None, trained_on := model.pretrained_cfg['num_classes']):
            raise InputError(
                f'num_classes must be {trained_on}, the classes of the weights of {name}, got {num_classes}: the '
                'classifier would be random. Give a checkpoint.'
            )
        folder = Path(name.removeprefix('local-dir:')) if name.startswith('local-dir:') else hub_configs() / name
        options = read_args_yaml(folder / RECIPE) if (folder / RECIPE).is_file() else {}
    model.training_augmentation = augmentation_of(options)
    if checkpoint is None:
        return model
    drawn = _erase_drawn_alpha(model)
    with as_input_error(f'{name} with {checkpoint}'):
        load_checkpoint(model, os.fspath(checkpoint), use_ema)
    if any(alpha.isnan().any() for alpha in drawn):
        raise InputError(
            f'checkpoint {checkpoint} holds no alpha, and {name} would keep a random one: give the model argument '
            'push_pull=False for a plain network, otherwise alpha.'
        )
    model.pretrained_cfg.pop('label_names', None)  # those of other weights
    if labels := label_names_of(options):
        model.pretrained_cfg['label_names'] = labels
    return model


def _check_training_options(
    name: str, path: str | os.PathLike[str], options: dict[str, Any], within: str = ''
) -> dict[str, Any]:
    """Check the options of a training in a file; return none, with a warning, if they are those of another network."""
    trained = options.get('model')
    if isinstance(trained, str) and _without_tag(trained) != _without_tag(name):
        _logger.warning(
            f'{path} has the options of {trained}: {name} takes neither model arguments nor the size and '
            'normalization of the images from them.'
        )
        return {}
    check_fields(path, options, TRAINING_OPTIONS, within)
    return options


def _without_tag(name: str) -> str:
    """Drop the tag of a network; folders and repositories (``local-dir:``, ``hf-hub:``) keep their whole names."""
    return name if ':' in name else name.partition('.')[0]


def _erase_drawn_alpha(model: Any) -> list[Any]:
    """Set each randomly drawn alpha to NaN: a checkpoint with an alpha then overwrites it."""
    layers = [layer for layer in model.modules() if isinstance(layer, PushPullConv2d)]
    drawn = [layer.alpha for layer in layers if layer.trainable_alpha and layer.initial_alpha is None]
    for alpha in drawn:
        alpha.data.fill_(float('nan'))
    return drawn


@contextlib.contextmanager
def as_input_error(subject: str) -> Iterator[None]:
    """Turn an error by which timm refuses an argument into a ``ValueError``.

    Args:
        subject: What timm refuses: the first words of the message.
    """
    try:
        yield
    except InputError:
        raise
    except (AssertionError, ImportError, RuntimeError, TypeError, ValueError) as error:
        message = textwrap.shorten(str(error), 300)
        if isinstance(error, TypeError) and 'argument' not in message:
            raise  # a bug: timm refuses arguments by their names
        if 'no pretrained weights' in message.lower():
            message = 'there are no pretrained weights, give a checkpoint.'
        elif 'size mismatch' in message:
            message += ' Give the num_classes and model arguments of the training.'
        raise InputError(f'{subject}: {message}') from error
