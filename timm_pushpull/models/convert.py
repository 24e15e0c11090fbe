"""Replaces the first convolution of any timm model by a push-pull unit."""

from collections.abc import Sequence
from typing import TypeVar

import torch.nn as nn
from torch import Tensor

from ..errors import InputError
from ..layers.push_pull import PushPullConv2d
from ..ops.reference import PullKernel

__all__ = ['convert_to_push_pull']

ModelT = TypeVar('ModelT', bound=nn.Module)


def convert_to_push_pull(
    model: ModelT,
    avg_pool_size: int = 3,
    alpha: float | Sequence[float] | Tensor | None = None,
    trainable_alpha: bool = True,
    pull_kernel: PullKernel = 'inverted',
) -> ModelT:
    """Replace the first convolution of a timm model by a push-pull unit with the same weights.

    timm names the first convolution in ``model.pretrained_cfg['first_conv']``; where timm names several, each is
    replaced.

    Args:
        model: Model made by ``timm.create_model``; it is changed in place.
        avg_pool_size: Side of the window that averages the pull response, an odd number of output pixels; 0 for no
            averaging.
        alpha: Inhibition strength, one number or one for each output channel. For a trainable alpha its initial value;
            None draws it uniformly from [0, 1).
        trainable_alpha: Train one alpha for each output channel; False keeps the given number.
        pull_kernel: 'inverted' for the paper's kernel, or 'negated', see :func:`~timm_pushpull.push_pull_conv2d`.

    Returns:
        The model.

    Raises:
        ValueError: If timm names no first convolution, if it is not exactly an ``nn.Conv2d``, or if a setting is
            refused by :class:`~timm_pushpull.PushPullConv2d`.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f'model must be made by timm.create_model, got {model!r}.')
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    name = cfg.get('architecture') or type(model).__name__
    first_conv = cfg.get('first_conv')
    if not first_conv:
        raise InputError(f"{name} cannot be converted: timm names no first convolution (pretrained_cfg['first_conv']).")
    layers = {}
    for path in [first_conv] if isinstance(first_conv, str) else first_conv:
        try:
            conv = model.get_submodule(path)
        except AttributeError:
            raise InputError(f'{name} cannot be converted: it has no module {path!r}.') from None
        if type(conv) is not nn.Conv2d:
            raise InputError(f'{name} cannot be converted: {path} is a {type(conv).__name__}, not an nn.Conv2d.')
        if 'forward' in vars(conv):
            raise InputError(f'{name} cannot be converted: somebody replaced the forward of {path}; convert it first.')
        layers[path] = PushPullConv2d.from_conv2d(conv, avg_pool_size, alpha, trainable_alpha, pull_kernel)
    for path, layer in layers.items():
        model.set_submodule(path, layer)
    return model
