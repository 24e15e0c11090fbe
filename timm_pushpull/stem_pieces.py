"""The stem of a network in inference, on pieces of the batch: its largest maps never leave the processor's cache."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from .contrast_norm import normalize_contrast
from .pushpull_conv import PushPullConv2d
from .pushpull_fast import CHUNK_BYTES, SHARED, Pieces, is_fast
from .pushpull_native import memory_format_of

__all__ = ['runs_in_pieces', 'stem_in_pieces']


def runs_in_pieces(stem: Sequence[nn.Module], x: Tensor) -> bool:
    """Decide whether a stem is computed in pieces.

    Args:
        stem: Convolution, normalization, activation and pooling.
        x: Images.

    Returns:
        True in inference on a CPU, for a push-pull convolution, BatchNorm by running statistics, ReLU and max-pool or
        none, where nobody looks in between and the convolution's response would not stay in the cache.
    """
    if isinstance(x, torch.fx.Proxy) or x.device.type != 'cpu' or torch.is_grad_enabled():
        return False
    conv, norm, act, pool = stem
    if not (isinstance(conv, PushPullConv2d) and type(norm) is nn.BatchNorm2d and norm.affine and type(act) is nn.ReLU):
        return False
    if norm.running_mean is None or type(pool) not in (nn.MaxPool2d, nn.Identity):
        return False
    if isinstance(pool, nn.MaxPool2d):
        numbers = pool.kernel_size, pool.stride, pool.padding
        if pool.ceil_mode or pool.return_indices or pool.dilation != 1 or not all(isinstance(n, int) for n in numbers):
            return False
    if any(module.training or module._forward_hooks for module in stem):
        return False
    if any(hook is not normalize_contrast for hook in conv._forward_pre_hooks.values()):
        return False
    if any(module._forward_pre_hooks for module in (norm, act, pool)):
        return False
    values = conv.out_channels * x.shape[2] * x.shape[3] // math.prod(conv.stride)
    return is_fast(conv.implementation, x, conv.weight) and 4 * len(x) * values > CHUNK_BYTES


def stem_in_pieces(stem: Sequence[nn.Module], x: Tensor) -> Tensor:
    """Compute a stem in pieces.

    Args:
        stem: As for :func:`runs_in_pieces`.
        x: Images (N, C, H, W).

    Returns:
        What the stem gives for them, in their memory format.
    """
    conv, norm, _, pool = stem
    if conv._forward_pre_hooks:
        (x,) = normalize_contrast(conv, (x,))
    *tensors, geometry, dtype = conv.operands(x)  # type: ignore[operator]
    scale, shift = _as_scale_and_shift(norm, conv.bias)  # type: ignore[arg-type]
    sizes = [pool.kernel_size, pool.stride, pool.padding] if isinstance(pool, nn.MaxPool2d) else [1, 1, 0]
    return _stem(*tensors, geometry, scale, shift, sizes, dtype)


def _as_scale_and_shift(norm: Any, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """BatchNorm by running statistics, and the bias before it."""
    scale = norm.weight.double() * (norm.running_var.double() + norm.eps).rsqrt()
    mean = norm.running_mean if bias is None else norm.running_mean - bias
    return scale, norm.bias - mean * scale


@torch.library.custom_op(
    'timm_pushpull::stem',
    mutates_args=(),
    schema=f'({SHARED}, Tensor scale, Tensor shift, SymInt[] pool, ScalarType dtype) -> Tensor',
)
def _stem(
    input: Tensor,
    weight: Tensor,
    c: Tensor,
    alpha: Tensor,
    geometry: Sequence[int],
    scale: Tensor,
    shift: Tensor,
    pool: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    kernel, stride, padding = pool
    channels_last = torch.channels_last  # in which pooling is much faster, and which one channel does not tell
    with torch.autocast('cpu', enabled=False):
        scale, shift = scale.to(alpha.dtype), shift.to(alpha.dtype)
        pieces = Pieces(input.contiguous(memory_format=channels_last), weight, c, alpha, geometry, dtype)
        height, width = ((length + 2 * padding - kernel) // stride + 1 for length in pieces.size)
        output = torch.empty(len(input), len(weight), height, width, dtype=dtype, memory_format=channels_last)
        steps = pieces.native_steps()
        if steps is not None:
            for place, _, push in pieces.convolved():
                push = push.contiguous(memory_format=channels_last)
                steps.respond_pooled(place, push, scale, shift, pool, output[place])
        else:
            for place, push, pull, strength in pieces.rectified():
                push.addcmul_(pull, strength)
                torch.addcmul(shift.view(-1, 1, 1), push, scale.view(-1, 1, 1), out=push)
                output[place] = F.max_pool2d(push, kernel, stride, padding).clamp_(min=0)  # fewer values than before it
        return output.contiguous(memory_format=memory_format_of(input))


@_stem.register_fake
def _(
    input: Tensor,
    weight: Tensor,
    c: Tensor,
    alpha: Tensor,
    geometry: Sequence[int],
    scale: Tensor,
    shift: Tensor,
    pool: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    response = torch.ops.timm_pushpull.push_pull_conv2d(input, weight, c, alpha, geometry, dtype)
    kernel, stride, padding = pool
    response = F.max_pool2d(response, kernel, stride, padding)
    return torch.empty_like(response, dtype=dtype, memory_format=memory_format_of(input))
