"""Replaces the first convolution of any timm model by a push-pull unit."""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch.nn as nn
from timm.layers import Conv2dSame, ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from timm.models import is_model
from torch import Tensor

from ..errors import InputError
from ..layers.push_pull import PushPullConv2d
from ..layers.std_conv import PushPullStdConv2d
from ..ops.reference import PullKernel

__all__ = ['architecture_of', 'convert_to_push_pull', 'first_convs', 'replace_first_convs']

ModelT = TypeVar('ModelT', bound=nn.Module)

UNITS: dict[type[nn.Module], type[PushPullConv2d]] = {
    nn.Conv2d: PushPullConv2d,
    Conv2dSame: PushPullConv2d,
    **dict.fromkeys((StdConv2d, StdConv2dSame, ScaledStdConv2d, ScaledStdConv2dSame), PushPullStdConv2d),
}


def convert_to_push_pull(
    model: ModelT,
    avg_pool_size: int = 3,
    alpha: float | Sequence[float] | Tensor | None = None,
    trainable_alpha: bool = True,
    pull_kernel: PullKernel = 'inverted',
) -> ModelT:
    """Replace the first convolution of a timm model by a push-pull unit with the same weights.

    timm names the first convolution in ``model.pretrained_cfg['first_conv']``; where timm names several, each is
    replaced. timm's convolutions with TensorFlow's SAME padding or with standardized weights keep these. The model is
    then a ``pp_any`` with the network as its ``base``: timm's ``save_for_hf`` (since timm 1.0.31) saves it as that.

    Args:
        model: Model made by ``timm.create_model``, with or without ``features_only``; it is changed in place.
        avg_pool_size: Side of the window that averages the pull response, an odd number of output pixels; 0 for no
            averaging.
        alpha: Inhibition strength, one number. For a trainable alpha its initial value, one number or one for each
            output channel; None draws it uniformly from [0, 1).
        trainable_alpha: Train one alpha for each output channel; False keeps the given number.
        pull_kernel: 'inverted' for the paper's kernel, or 'negated', see :func:`~timm_pushpull.push_pull_conv2d`.

    Returns:
        The model.

    Raises:
        ValueError: If timm names no first convolution, if it is of a class that is not known here, or if a setting is
            refused by :class:`~timm_pushpull.PushPullConv2d`.
    """
    base = architecture_of(model)
    replace_first_convs(model, avg_pool_size, alpha, trainable_alpha, pull_kernel)
    if is_model(base) and not base.startswith('pp_'):
        named: Any = model
        settings = dict(avg_pool_size=avg_pool_size, trainable_alpha=trainable_alpha, pull_kernel=pull_kernel)
        fixed = {} if trainable_alpha else {'alpha': float(alpha)}  # type: ignore[arg-type]  # one number
        named.pretrained_cfg['architecture'] = 'pp_any'
        named._model_args = {**getattr(model, '_model_args', {}), 'base': base, **settings, **fixed}
    return model


def replace_first_convs(
    model: nn.Module,
    avg_pool_size: int,
    alpha: float | Sequence[float] | Tensor | None,
    trainable_alpha: bool,
    pull_kernel: PullKernel,
) -> None:
    """Replace each first convolution by a unit, see :func:`convert_to_push_pull`."""
    name, layers = architecture_of(model), {}
    for path, conv in first_convs(model).items():
        if type(conv) not in UNITS:
            raise InputError(f'{name} cannot be converted: {path} is a {type(conv).__name__}, not an nn.Conv2d.')
        if 'forward' in vars(conv):
            raise InputError(f'{name} cannot be converted: the forward of {path} was patched; convert before patching.')
        layers[path] = UNITS[type(conv)].from_conv2d(conv, avg_pool_size, alpha, trainable_alpha, pull_kernel)
    for path, layer in layers.items():
        model.set_submodule(path, layer)


def first_convs(model: nn.Module) -> dict[str, Any]:
    """Find the layers that timm names as first convolutions.

    Args:
        model: Model made by ``timm.create_model``.

    Returns:
        The layers by their names in the model. timm's feature extractors give them other names than the network has.

    Raises:
        ValueError: If timm names none, or one that the model does not have.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f'model must be made by timm.create_model, got {model!r}.')
    architecture, first_conv = architecture_of(model), (getattr(model, 'pretrained_cfg', None) or {}).get('first_conv')
    if not first_conv:
        raise InputError(
            f"{architecture} cannot be converted: timm names no first convolution (pretrained_cfg['first_conv'])."
        )
    found, modules = {}, dict(model.named_modules())
    for path in [first_conv] if isinstance(first_conv, str) else first_conv:
        inside = [f'{extractor}.{path}' for extractor in ('model', 'body', 'graph_module')]
        name = next((name for name in (path, path.replace('.', '_'), *inside) if name in modules), None)
        if name is None:
            raise InputError(f'{architecture} cannot be converted: it has no module {path!r}.')
        if isinstance(modules[name], nn.Sequential):  # the deep stem of a ResNet
            name += '.0'
        found[name] = modules[name]
    return found


def architecture_of(model: Any) -> str:
    """Return timm's name of a model's architecture, or else the name of its class."""
    return (getattr(model, 'pretrained_cfg', None) or {}).get('architecture') or type(model).__name__
