"""Checkpoints of timm's ``train.py``: weights, and the options of the training that are kept beside them."""

import argparse
import os
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from timm.data import resolve_data_config

from .augment.in_model import without_augmentation
from .class_lists import find_class_map, read_class_map
from .errors import InputError

__all__ = ['augmentation_of', 'label_names_of', 'model_args_of', 'read_training_options', 'set_data_config']

AUGMENTATION = 'aa color_jitter color_jitter_prob gaussian_blur_prob grayscale_prob no_aug reprob'.split()


def read_training_options(path: str | os.PathLike[str], use_ema: bool) -> dict[str, Any]:
    """Read the options of the training from a checkpoint, without running anything that the file holds.

    Args:
        path: Checkpoint.
        use_ema: Refuse a checkpoint without EMA weights.

    Returns:
        Options of ``train.py`` by name; empty for files of weights alone, such as safetensors.

    Raises:
        ValueError: If the file does not exist, cannot be read, holds no weights, or lacks EMA weights that are asked
            for.
    """
    if not os.path.isfile(path):
        raise InputError(f'checkpoint must be a file, {path} is not one.')
    content: Any
    try:
        if str(path).endswith('.safetensors'):
            content = load_file(path)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):  # the type of the options
                content = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # its type depends on the fault of the file
        raise InputError(f'{path} cannot be read as a checkpoint: {" ".join(str(error).split())}') from error
    if not isinstance(content, Mapping):
        raise InputError(f'{path} must hold weights by name, it holds a {type(content).__name__}.')
    if use_ema and not {'state_dict_ema', 'model_ema'} & content.keys():
        raise InputError(f'{path} holds no EMA weights: train with --model-ema, or leave --use-ema out.')
    wanted = [*(('state_dict_ema', 'model_ema') if use_ema else ()), 'state_dict', 'model']  # as timm looks for them
    key = next((key for key in wanted if content.get(key) is not None), '')
    weights = content[key] if key else content
    if not isinstance(weights, Mapping) or not weights:
        raise InputError(f'{path}: {key or "the content"} must be weights by name, got {reprlib.repr(weights)}.')
    for name, tensor in weights.items():
        if not isinstance(tensor, torch.Tensor):
            raise InputError(f'{path}: {name} must be a tensor, got {reprlib.repr(tensor)}.')
    options = content.get('args')
    return vars(options) if isinstance(options, argparse.Namespace) else {}


def augmentation_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return how a training changed its images, apart from crop and flip.

    Args:
        options: Options of ``train.py``.

    Returns:
        Those of the options that choose operations and are switched on, and ``augment``, the argument of a push-pull
        network; empty if there are no options.
    """
    if not options:
        return {}
    given = {'color_jitter': 0.4, **options}  # the default of train.py
    found = {name: given[name] for name in AUGMENTATION if given.get(name)}
    augment = (options.get('model_kwargs') or {}).get('augment')
    return found | ({'augment': augment} if augment else {})


def label_names_of(options: Mapping[str, Any]) -> list[str]:
    """Read the names of the classes, in the order of the logits, from the class map of a training.

    Args:
        options: Options of ``train.py``.

    Returns:
        The names; empty without a class map, or where its file is neither there nor a list of this package.
    """
    class_map = options.get('class_map') or ''
    for name in (class_map, Path(class_map).stem.removesuffix('_synsets')):  # a list has another path elsewhere
        try:
            path = find_class_map(name, options.get('data_dir') or '')
        except InputError:
            continue
        return read_class_map(path) if path.endswith('.txt') else []
    return []


def model_args_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of ``timm.create_model`` in the options of a training, all but the augmentation."""
    model_args = without_augmentation(options.get('model_kwargs') or {})
    named = {'num_classes': 'num_classes', 'in_chans': 'in_chans', 'gp': 'global_pool', 'bn_eps': 'bn_eps'}
    given = {argument: options[option] for option, argument in named.items() if options.get(option) is not None}
    if (channels := (options.get('input_size') or [3])[0]) != 3:  # as train.py does
        given.setdefault('in_chans', channels)
    return {**model_args, **given}


def set_data_config(model: Any, options: Mapping[str, Any]) -> None:
    """Write the size, crop, interpolation, mean and std of a training into ``model.pretrained_cfg``.

    Args:
        model: Model of timm.
        options: Options of ``train.py``. What they leave out stays as the model has it.
    """
    cfg = model.pretrained_cfg
    cfg.update(resolve_data_config(dict(options), model=model))
    if options.get('input_size') or options.get('img_size'):
        cfg.pop('test_input_size', None)
    if options.get('crop_pct'):
        cfg.pop('test_crop_pct', None)
