"""Settings that weights depend on, kept beside the weights in the state dict.

Weights that were trained with another averaging window, pull kernel, fixed alpha, contrast normalization or
anti-aliasing fit a model by names and shapes, and give wrong predictions. So a module with such settings has a buffer
``settings``, the settings as JSON in bytes, and refuses a state dict with other settings. The bytes are written anew
into each state dict, because some running averages (EMA) average the buffer too. A network without settings of its own
has no such buffer, but its unit has one. State dicts without any load as they are: those of plain networks and of the
original code.
"""

import functools
import json
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

__all__ = ['SETTINGS', 'guard_settings', 'is_settings', 'match_settings', 'set_settings', 'write_settings']

SETTINGS = 'settings'


def is_settings(key: str) -> bool:
    """Tell whether a key of a state dict is that of a module's settings."""
    return key.rpartition('.')[2] == SETTINGS


def set_settings(module: nn.Module, settings: Mapping[str, Any], device: Any = None) -> None:
    """Give a module the buffer ``settings``.

    Args:
        module: Module whose weights depend on the settings.
        settings: Settings by name, of types that JSON has.
        device: Device of the buffer.
    """
    module.register_buffer(SETTINGS, _encode(settings).to(device))


def write_settings(state_dict: dict[str, Any], prefix: str, settings: Mapping[str, Any]) -> None:
    """Write the settings of a module over its buffer in a state dict.

    Args:
        state_dict: State dict of the module, or of a network around it.
        prefix: Prefix of the module's names.
        settings: Settings of the module.
    """
    state_dict[prefix + SETTINGS] = _encode(settings).to(state_dict[prefix + SETTINGS].device)


def guard_settings(model: nn.Module, settings: Mapping[str, Any]) -> None:
    """Keep the settings of a network in its state dict, and make it refuse a state dict with others.

    Args:
        model: The network.
        settings: Settings by name; empty for a network without any.
    """
    if settings:
        set_settings(model, settings)
        model.register_state_dict_post_hook(functools.partial(_write_after_save, dict(settings)))
    model.register_load_state_dict_pre_hook(functools.partial(_match_before_load, dict(settings)))


def _write_after_save(
    settings: Mapping[str, Any], model: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any
) -> None:
    write_settings(state_dict, prefix, settings)


def _match_before_load(
    settings: Mapping[str, Any], model: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any
) -> None:
    match_settings(state_dict, prefix, settings, args[-1])


def _encode(settings: Mapping[str, Any]) -> Tensor:
    text = json.dumps(dict(settings), sort_keys=True)
    return torch.tensor(list(text.encode()), dtype=torch.uint8, device='cpu')


def match_settings(state_dict: dict[str, Any], prefix: str, settings: Mapping[str, Any], errors: list[str]) -> None:
    """Compare the settings in a state dict with those of a module that loads it.

    Args:
        state_dict: Weights by name. The settings of the module overwrite those in it, so that torch reports no second
            error.
        prefix: Prefix of the module's names.
        settings: Settings of the module; empty for a module without the buffer.
        errors: Gets a message if the settings differ.
    """
    keys = [key for key in state_dict if key.startswith(prefix) and is_settings(key)]
    saved = state_dict.pop(prefix + SETTINGS, None)
    if settings:
        state_dict[prefix + SETTINGS] = _encode(settings)
    if not keys:
        return
    try:
        # Tools that average checkpoints, such as timm's avg_checkpoints.py, turn integers into floats.
        text = '{}' if saved is None else bytes(saved.double().round().to(torch.uint8).tolist())
        trained: dict[str, Any] = dict(json.loads(text))
    except (AttributeError, TypeError, ValueError):
        errors.append(f'{prefix}{SETTINGS} of the checkpoint cannot be read: delete it from the state dict.')
        return
    names = [name for name in sorted({*trained, *settings}) if trained.get(name) != settings.get(name)]
    if names:
        theirs, ours = (
            ', '.join(f'{name}={values[name]!r}' if name in values else f'no {name}' for name in names)
            for values in (trained, settings)
        )
        errors.append(
            f'The checkpoint was trained with {theirs}, the model has {ours}: give the model the arguments of the '
            f'training. To load the weights all the same, delete {" and ".join(map(repr, keys))} from the state dict.'
        )
