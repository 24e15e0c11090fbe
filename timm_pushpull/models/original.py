"""Checkpoints of the published code (PyTorch Lightning): their names, their settings, how to read them safely.

Code: https://github.com/bgswaroop/pushpull-conv
"""

import pathlib
import pickle
import tempfile
from typing import Any, NamedTuple

import torch
import torch.nn as nn

from ..layers.push_pull import PushPullConv2d

__all__ = [
    'OriginalCheckpoint',
    'allow_paths_in_checkpoints',
    'convert_original_checkpoint',
    'read_original_checkpoint',
    'rename_original',
]


def rename_original(state_dict: dict[str, Any], model: nn.Module, prefix: str = '') -> None:
    """Give published weights timm's names, in place; other weights stay as they are.

    The bias of the first convolution goes into the mean of the BatchNorm after it, which leaves the logits of a model
    in eval mode equal.

    Args:
        state_dict: Weights by name.
        model: ResNet that will load them.
        prefix: What stands before the ResNet's names.

    Raises:
        ValueError: If the model lacks the inhibition the weights were trained with.
    """
    if prefix + 'bn.running_mean' not in state_dict:
        return
    push_pull = prefix + 'conv1.push_conv.weight' in state_dict
    trained_alpha = prefix + 'conv1.pull_inhibition_strength' in state_dict
    stem: Any = model.conv1
    if push_pull and not isinstance(stem, PushPullConv2d):
        raise ValueError('The published checkpoint is one of a push-pull network, but the model has push_pull=False.')
    if push_pull and not trained_alpha and stem.trainable_alpha:
        raise ValueError(
            'The published checkpoint was trained with a fixed inhibition strength, which its weights do not hold: '
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
    for published, ours in names.items():
        for name in [name for name in state_dict if name.startswith(prefix + published)]:
            state_dict[prefix + ours + name[len(prefix + published) :]] = state_dict.pop(name)


def allow_paths_in_checkpoints() -> None:
    """Let ``torch.load(weights_only=True)`` read the file paths that published files hold among their settings.

    A path of either system is read as a pure one, which is a name and touches no file.
    """
    systems = {'Posix': pathlib.PurePosixPath, 'Windows': pathlib.PureWindowsPath}
    torch.serialization.add_safe_globals(
        [
            (path_class, f'{module}.{kind}{system}Path')
            for system, path_class in systems.items()
            for module in ('pathlib', 'pathlib._local')
            for kind in ('', 'Pure')
        ]
    )


class OriginalCheckpoint(NamedTuple):
    """What a published file holds of a network."""

    architecture: str
    """Name of the network for ``timm.create_model``."""
    model_args: dict[str, Any]
    """Its settings, as keyword arguments of ``timm.create_model``."""
    pretrained_cfg: dict[str, Any]
    """How its images were prepared, where that differs from the network's default."""
    state_dict: dict[str, torch.Tensor]
    """Weights by the published names, which our networks load."""
    left_out: list[str]
    """Classes of the settings that were not read."""


class _LeftOut:
    """Stands for an object of a class that is not known to be harmless: keeps nothing, does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> '_LeftOut':
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def read_original_checkpoint(path: str) -> OriginalCheckpoint:
    """Read a file of the published code, with its settings and without running anything it holds.

    The settings may hold objects of any class (an augmentation, a logger). Those that are not plain data are left out
    and named in the result.

    Args:
        path: A Lightning checkpoint (.ckpt).

    Returns:
        Architecture, settings, weights, and the classes that were left out.

    Raises:
        ValueError: If the file is not a checkpoint, if it is not a published ResNet, or if its settings cannot be read
            without running code.
    """
    try:
        left_out = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except (EOFError, KeyError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise ValueError(f'{path} is not a checkpoint of PyTorch: {error}') from error
    try:
        with torch.serialization.safe_globals([(_LeftOut, name) for name in left_out]):
            checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f'{path} cannot be read without running what it holds: {", ".join(left_out)}. If you trust where it comes '
            'from, load it with weights_only=False and save its state_dict and the plain hyper_parameters anew.'
        ) from error
    if not isinstance(checkpoint, dict) or not {'state_dict', 'hyper_parameters'} <= checkpoint.keys():
        raise ValueError(f'{path} is not a checkpoint of the published code: it lacks state_dict or hyper_parameters.')
    settings, state_dict = checkpoint['hyper_parameters'], checkpoint['state_dict']
    if not {'conv1.bias', 'bn.running_mean', 'classifier.weight'} <= state_dict.keys() or 'model' not in settings:
        raise ValueError(
            f'{path} is not a ResNet of the published code: it lacks conv1.bias, bn.running_mean, classifier.weight '
            "or hyper_parameters['model']."
        )

    weight = state_dict.get('conv1.push_conv.weight', state_dict.get('conv1.weight'))
    cifar = weight.shape[-1] == 3
    architecture = f'pp_{settings["model"]}' + ('_cifar' if cifar else '')
    pretrained_cfg = dict(std=(0.2023, 0.1994, 0.2010)) if cifar else dict(crop_pct=1.0)
    model_args: dict[str, Any] = dict(
        in_chans=weight.shape[1],
        num_classes=state_dict['classifier.weight'].shape[0],
        push_pull='conv1.push_conv.weight' in state_dict,
    )
    if model_args['push_pull']:
        model_args.update(avg_pool_size=settings['avg_kernel_size'] or 0)
        if 'conv1.pull_inhibition_strength' not in state_dict:
            model_args.update(alpha=float(settings['pull_inhibition_strength']), trainable_alpha=False)
    return OriginalCheckpoint(architecture, model_args, pretrained_cfg, state_dict, left_out)


def convert_original_checkpoint(path: str, folder: str) -> OriginalCheckpoint:
    """Write a file of the published code as a model folder of timm, for ``create_model('local-dir:...')``.

    Args:
        path: A Lightning checkpoint (.ckpt).
        folder: Where config.json and model.safetensors go; must not exist.

    Returns:
        What was read.

    Raises:
        FileExistsError: If the folder exists.
        ValueError: As :func:`read_original_checkpoint`, or if timm-pushpull has no such network.
    """
    # Importing timm registers the networks, whose module needs this one whole.
    from timm.models import create_model, is_model, list_models, save_for_hf

    target = pathlib.Path(folder)
    if target.exists():
        raise FileExistsError(f'{folder} exists: name a new folder.')
    checkpoint = read_original_checkpoint(path)
    if not is_model(checkpoint.architecture):
        raise ValueError(f'{path} holds a {checkpoint.architecture}, which is not one of {list_models("pp_*")}.')
    model = create_model(
        checkpoint.architecture, pretrained_cfg_overlay=checkpoint.pretrained_cfg, **checkpoint.model_args
    )
    model.load_state_dict(checkpoint.state_dict)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f'.{target.name}-') as unfinished:
        written = pathlib.Path(unfinished) / target.name
        save_for_hf(model, str(written), model_args=checkpoint.model_args, safe_serialization=True)
        written.rename(target)
    return checkpoint
