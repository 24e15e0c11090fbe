"""BatchNorm statistics that are adapted to each batch of images."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import InputError

__all__ = ['adapted_batch_norm', 'adapted_name', 'check_adaptation']


def adapted_name(name: str, source_images: int) -> str:
    """Name the adapted model.

    Args:
        name: Name of a model, or ``MODEL@RUN``.
        source_images: N of :func:`adapted_batch_norm`.

    Returns:
        ``MODEL+bnN``, or ``MODEL+bnN@RUN``.
    """
    model, at, run = name.rpartition('@')
    return f'{model}+bn{source_images}@{run}' if at and model else f'{name}+bn{source_images}'


def check_adaptation(name: str, model: nn.Module, source_images: int) -> None:
    """Refuse a model that has nothing to adapt.

    Args:
        name: Name of the model.
        model: The model.
        source_images: N of :func:`adapted_batch_norm`.

    Raises:
        ValueError: If N is negative or no whole number, or if the model has no BatchNorm with running statistics.
    """
    if isinstance(source_images, bool) or not isinstance(source_images, int) or source_images < 0:
        raise InputError(f'adapt_batch_norm must be a whole number, 0 or more, got {source_images!r}.')
    if not _batch_norms(model):
        raise InputError(f'adapt_batch_norm needs a BatchNorm, {name} has none.')


@contextlib.contextmanager
def adapted_batch_norm(model: nn.Module, source_images: int) -> Iterator[None]:
    r"""Blend the statistics of each BatchNorm with those of the n images of the batch that it normalizes.

    .. math::
        \mu = \frac{N \mu_s + n \mu_t}{N + n}, \qquad \sigma^2 = \frac{N \sigma_s^2 + n \sigma_t^2}{N + n}

    Here s marks the running statistics of the training and t those of the batch, as PyTorch computes them in training.
    They last for one forward pass of the BatchNorm: the model stays as it is.

    Source: `Improving robustness against common corruptions by covariate shift adaptation` -
    https://arxiv.org/abs/2006.16971

    Args:
        model: Model in evaluation mode.
        source_images: N, the weight of the running statistics, in images; 0 for the batch alone.

    Returns:
        Context manager, in which the model adapts.
    """
    before: dict[nn.Module, tuple[Any, Any]] = {}
    images = 0

    def count(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        nonlocal images  # not the length of the features: some networks flatten the pixels of all images into it
        images = len(inputs[0])

    def blend(norm: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        (features,) = inputs
        before[norm] = norm.running_mean, norm.running_var
        if features.numel() > features.shape[1]:  # one value for each channel has no variance
            norm.running_mean, norm.running_var = norm.running_mean.clone(), norm.running_var.clone()
            share = images / (source_images + images)
            F.batch_norm(features, norm.running_mean, norm.running_var, training=True, momentum=share)

    def restore(norm: Any, *_: Any) -> None:
        norm.running_mean, norm.running_var = before.pop(norm)

    hooks: list[Any] = [model.register_forward_pre_hook(count)]
    try:
        for norm in _batch_norms(model):
            hooks += norm.register_forward_pre_hook(blend), norm.register_forward_hook(restore, always_call=True)
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _batch_norms(model: nn.Module) -> list[Any]:
    return [norm for norm in model.modules() if isinstance(norm, _BatchNorm) and norm.running_mean is not None]
