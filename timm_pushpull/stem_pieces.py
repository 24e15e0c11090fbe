"""The stem of a network in inference, on pieces of the batch: its largest maps never leave the processor's cache."""

from collections.abc import Sequence

import torch
import torch.nn as nn
from torch import Tensor

from .pushpull_conv import PushPullConv2d
from .pushpull_fast import CHUNK_BYTES, is_fast

__all__ = ['runs_in_pieces', 'stem_in_pieces']


def runs_in_pieces(stem: Sequence[nn.Module], x: Tensor) -> bool:
    """Decide whether a stem is computed in pieces of the batch.

    Args:
        stem: Push-pull convolution, normalization, activation and pooling.
        x: Images.

    Returns:
        True in inference on a CPU, where no image's result depends on another's and nobody looks in between.
    """
    if type(x) is not Tensor or x.device.type != 'cpu' or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    conv, norm, *_ = stem
    if not isinstance(conv, PushPullConv2d) or getattr(norm, 'running_mean', None) is None:
        return False
    if not is_fast(conv.implementation, x, conv.weight) or len(x) <= _images(conv, x):
        return False
    modules = [module for part in stem for module in part.modules()]
    return not any(module.training or module._forward_hooks or module._forward_pre_hooks for module in modules)


def stem_in_pieces(stem: Sequence[nn.Module], x: Tensor) -> Tensor:
    """Compute a stem in pieces of the batch, in channels_last, which pooling is much faster in.

    Args:
        stem: As for :func:`runs_in_pieces`.
        x: Images (N, C, H, W).

    Returns:
        What the stem gives for them, in their memory format.
    """
    conv, *others = stem
    output = None
    for place, piece in conv.in_pieces(x.contiguous(memory_format=torch.channels_last)):  # type: ignore[operator]
        for part in others:
            piece = part(piece)
        if output is None:
            channels_last = x.is_contiguous(memory_format=torch.channels_last)
            memory_format = torch.channels_last if channels_last else torch.contiguous_format
            output = piece.new_empty((len(x), *piece.shape[1:])).contiguous(memory_format=memory_format)
        output[place] = piece
    assert output is not None
    return output


def _images(conv: PushPullConv2d, x: Tensor) -> int:
    """How many images make a piece whose convolved map stays in the cache."""
    values = conv.out_channels * x.shape[2] * x.shape[3] // (conv.stride[0] * conv.stride[1])
    return max(1, CHUNK_BYTES // (4 * max(values, 1)))
