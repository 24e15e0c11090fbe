"""Reads checkpoints of the original code, the code of the paper's authors, without running anything they hold.

Original code, with PyTorch Lightning: https://github.com/bgswaroop/pushpull-conv
"""

import pathlib
import pickle
import tempfile
from typing import Any, NamedTuple

import torch
import torch.nn as nn

from ..errors import InputError
from ..layers.push_pull import PushPullConv2d
from ..registry import CONFIG, PAPER
from ..weights import WEIGHTS

__all__ = [
    'OriginalCheckpoint',
    'convert_original_checkpoint',
    'read_original_checkpoint',
    'rename_original',
]


def rename_original(state_dict: dict[str, Any], model: nn.Module, prefix: str = '') -> None:
    """Give the weights of an original checkpoint timm's names, in place; other checkpoints stay as they are.

    The original first convolution has a bias. It is subtracted from the running mean of the next BatchNorm, which gives
    equal logits in evaluation mode.

    Args:
        state_dict: Weights by name.
        model: ResNet that will load the weights.
        prefix: Prefix of the ResNet's names in ``state_dict``.

    Raises:
        ValueError: If the model lacks the push-pull unit or the fixed inhibition strength of the checkpoint.
    """
    if prefix + 'bn.running_mean' not in state_dict:
        return
    push_pull = prefix + 'conv1.push_conv.weight' in state_dict
    trained_alpha = prefix + 'conv1.pull_inhibition_strength' in state_dict
    stem: Any = model.conv1
    if push_pull and not isinstance(stem, PushPullConv2d):
        raise InputError(
            'The original checkpoint has a push-pull unit, the model has none: create it without push_pull=False.'
        )
    if push_pull and not trained_alpha and stem.trainable_alpha:
        raise InputError(
            'The original checkpoint was trained with a fixed inhibition strength, which is not among its weights: '
            "create the model with alpha=<the file's hyper_parameters['pull_inhibition_strength']> and "
            'trainable_alpha=False.'
        )
    if prefix + 'conv1.bias' in state_dict:
        running_mean = state_dict[prefix + 'bn.running_mean']
        state_dict[prefix + 'bn.running_mean'] = running_mean - state_dict.pop(prefix + 'conv1.bias')
    names = {
        'conv1.push_conv.': 'conv1.',
        'conv1.pull_inhibition_strength': 'conv1.alpha',
        'bn.': 'bn1.',
        'classifier.': 'fc.',
    }
    for original, ours in names.items():
        for name in [name for name in state_dict if name.startswith(prefix + original)]:
            state_dict[prefix + ours + name.removeprefix(prefix + original)] = state_dict.pop(name)


class OriginalCheckpoint(NamedTuple):
    """Content of an original checkpoint."""

    architecture: str
    """Name of the network for ``timm.create_model``."""
    model_args: dict[str, Any]
    """Settings of the network, as keyword arguments of ``timm.create_model``."""
    pretrained_cfg: dict[str, Any]
    """Fields that differ from the network's default: preprocessing of the images, and source of the weights."""
    state_dict: dict[str, torch.Tensor]
    """Weights by their original names; the networks of this package load them."""
    left_out: list[str]
    """Classes of the settings that were not read."""


class _LeftOut:
    """Takes the place of an object whose class may be harmful: keeps nothing, does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def read_original_checkpoint(path: str) -> OriginalCheckpoint:
    """Read weights and settings of an original checkpoint, without running anything it holds.

    The settings may hold objects of any class, such as an augmentation or a logger. Objects that are not plain data are
    left out; the result names their classes.

    Args:
        path: Lightning checkpoint (.ckpt).

    Returns:
        Architecture, settings, weights, and the classes that were left out.

    Raises:
        ValueError: If the file is not a checkpoint, if it does not hold a ResNet of the original code, or if its
            settings cannot be read without running code.
    """
    try:
        left_out = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except (EOFError, KeyError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise InputError(f'{path} is not a checkpoint of PyTorch: {error}') from error
    try:
        with torch.serialization.safe_globals([(_LeftOut, name) for name in left_out]):
            checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f'{path} cannot be read without running code that it names: {", ".join(left_out)}. If you trust its '
            'source, load it with weights_only=False, and save its state_dict and plain hyper_parameters in a new file.'
        ) from error
    parts = ('hyper_parameters', 'state_dict')
    if not isinstance(checkpoint, dict) or not all(isinstance(checkpoint.get(part), dict) for part in parts):
        raise InputError(f'{path} is not a checkpoint of the original code: it lacks state_dict or hyper_parameters.')
    settings, state_dict = (checkpoint[part] for part in parts)
    push_pull = 'conv1.push_conv.weight' in state_dict
    fixed_alpha = push_pull and 'conv1.pull_inhibition_strength' not in state_dict
    stem = 'conv1.push_conv.weight' if push_pull else 'conv1.weight'
    missing = [name for name in (stem, 'conv1.bias', 'bn.running_mean', 'classifier.weight') if name not in state_dict]
    used = ['model', *['avg_kernel_size'] * push_pull, *['pull_inhibition_strength'] * fixed_alpha]
    missing += [f"hyper_parameters['{name}']" for name in used if name not in settings]
    if missing:
        raise InputError(f'{path} is not a ResNet of the original code: it lacks {", ".join(missing)}.')

    weight = state_dict[stem]
    cifar = weight.shape[-1] == 3
    architecture = f'pp_{settings["model"]}' + ('_cifar' if cifar else '')
    # The default cfg of the other networks is that of timm's weights.
    of_timm = dict(tag=None, test_input_size=None, test_crop_pct=None)
    imagenet = dict(interpolation='bilinear', crop_pct=1.0, **of_timm, **PAPER)
    pretrained_cfg: dict[str, Any] = dict(std=(0.2023, 0.1994, 0.2010)) if cifar else imagenet
    pretrained_cfg['license'] = 'unknown'
    model_args: dict[str, Any] = dict(
        in_chans=weight.shape[1],
        num_classes=state_dict['classifier.weight'].shape[0],
        push_pull=push_pull,
    )
    if push_pull:
        model_args.update(avg_pool_size=settings['avg_kernel_size'] or 0)
    if fixed_alpha:
        model_args.update(alpha=float(settings['pull_inhibition_strength']), trainable_alpha=False)
    return OriginalCheckpoint(architecture, model_args, pretrained_cfg, state_dict, left_out)


def convert_original_checkpoint(path: str, folder: str) -> OriginalCheckpoint:
    """Turn an original checkpoint into a folder for ``timm.create_model('local-dir:FOLDER', pretrained=True)``.

    Args:
        path: Lightning checkpoint (.ckpt).
        folder: New folder for ``config.json`` and ``model.safetensors``.

    Returns:
        Content of the checkpoint.

    Raises:
        FileExistsError: If the folder exists.
        ValueError: If :func:`read_original_checkpoint` refuses the file, or if timm-pushpull has no such network.
    """
    # Not at the top: importing timm registers the networks, whose module imports this one.
    from timm.models import create_model, is_model, list_models, save_for_hf

    target = pathlib.Path(folder)
    if target.exists():
        raise FileExistsError(f'{folder} exists: name a new folder.')
    checkpoint = read_original_checkpoint(path)
    if not is_model(checkpoint.architecture):
        raise InputError(
            f'{path} holds a {checkpoint.architecture}, which is not one of '
            f'{", ".join(list_models(module="pushpull_resnet"))}.'
        )
    model = create_model(
        checkpoint.architecture, pretrained_cfg_overlay=checkpoint.pretrained_cfg, **checkpoint.model_args
    )
    model.load_state_dict(checkpoint.state_dict)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f'.{target.name}-') as unfinished:
        written = pathlib.Path(unfinished) / target.name
        save_for_hf(model, str(written), model_args=checkpoint.model_args, safe_serialization=True)
        # safetensors makes it readable for its owner only.
        (written / WEIGHTS).chmod((written / CONFIG).stat().st_mode)
        written.rename(target)
    return checkpoint
