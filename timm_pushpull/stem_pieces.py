"""The stem of a network in inference, on pieces of the batch: its largest maps never leave the processor's cache."""

from collections.abc import Sequence

import torch
import torch.nn as nn
from torch import Tensor

from .pushpull_conv import PushPullConv2d
from .pushpull_fast import is_fast

__all__ = ['runs_in_pieces', 'stem_in_pieces']


def runs_in_pieces(stem: Sequence[nn.Module], x: Tensor) -> bool:
    """Decide whether a stem is computed image by image.

    Args:
        stem: Push-pull convolution, normalization, activation and pooling.
        x: Images.

    Returns:
        True in inference on a CPU, where no image's result depends on another's and nobody looks in between.
    """
    if type(x) is not Tensor or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    conv, norm, *_ = stem
    if not isinstance(conv, PushPullConv2d) or getattr(norm, 'running_mean', None) is None:
        return False
    if len(x) < 2 or not is_fast(conv.implementation, x, conv.weight):
        return False
    modules = [module for part in stem for module in part.modules()]
    return not any(module.training or module._forward_hooks or module._forward_pre_hooks for module in modules)


def stem_in_pieces(stem: Sequence[nn.Module], x: Tensor) -> Tensor:
    """Compute a stem image by image, in channels_last, which pooling is much faster in.

    Args:
        stem: As for :func:`runs_in_pieces`.
        x: Images (N, C, H, W).

    Returns:
        What the stem gives for them, in their memory format.
    """
    channels_last = x.is_contiguous(memory_format=torch.channels_last)
    output = None
    for place in range(len(x)):
        piece = x[place : place + 1].contiguous(memory_format=torch.channels_last)
        for part in stem:
            piece = part(piece)
        if output is None:
            memory_format = torch.channels_last if channels_last else torch.contiguous_format
            output = piece.new_empty((len(x), *piece.shape[1:])).contiguous(memory_format=memory_format)
        output[place] = piece[0]
    assert output is not None
    return output
