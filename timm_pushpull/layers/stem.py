"""The stem of a network in inference, on chunks of the batch, so that its largest maps stay in the cache."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules import module as module_hooks
from torch.utils.flop_counter import register_flop_formula

from ..ops.chunked import CHUNK_BYTES, Chunks
from ..ops.custom_op import OPERANDS, conv_flops
from ..ops.one_convolution import memory_format_of, output_size
from ..ops.push_pull import use_fast
from .contrast_norm import normalize_contrast
from .push_pull import PushPullConv2d

__all__ = ['stem_in_chunks', 'use_chunks']


def use_chunks(stem: Sequence[nn.Module], x: Tensor) -> bool:
    """Decide whether :func:`stem_in_chunks` computes a stem, or its modules do, one after the other.

    Args:
        stem: Convolution, normalization, activation and pooling.
        x: Images (N, C, H, W).

    Returns:
        True in inference on a CPU, for a push-pull convolution, BatchNorm with running statistics, ReLU and max-pool or
        none, where the response of the convolution is larger than the cache. False where a user hooked,
        subclassed or patched one of the modules.
    """
    if isinstance(x, torch.fx.Proxy) or x.device.type != 'cpu' or torch.is_grad_enabled():
        return False
    conv, norm, act, pool = stem
    if type(conv) is not PushPullConv2d or type(norm) is not nn.BatchNorm2d or type(act) is not nn.ReLU:
        return False
    if not norm.affine or norm.running_mean is None or type(pool) not in (nn.MaxPool2d, nn.Identity):
        return False
    if isinstance(pool, nn.MaxPool2d):
        numbers = pool.kernel_size, pool.stride, pool.padding
        if pool.ceil_mode or pool.return_indices or pool.dilation != 1 or not all(isinstance(n, int) for n in numbers):
            return False
    if any(module.training or _has_user_code(module) for module in stem):
        return False
    if module_hooks._global_forward_hooks or module_hooks._global_forward_pre_hooks:
        return False
    values = conv.out_channels * x.shape[2] * x.shape[3] // math.prod(conv.stride)
    return use_fast(conv.implementation, x, conv.weight) and 4 * len(x) * values > CHUNK_BYTES


def _has_user_code(module: nn.Module) -> bool:
    """Tell whether a call of the module does more than its class's ``forward`` and the contrast normalization."""
    ours = [normalize_contrast] if isinstance(module, PushPullConv2d) else []
    hooks = [hook for hook in module._forward_pre_hooks.values() if hook not in ours]
    return bool(hooks or module._forward_hooks or 'forward' in module.__dict__)


def stem_in_chunks(stem: Sequence[nn.Module], x: Tensor) -> Tensor:
    """Compute a stem on chunks of the batch.

    Args:
        stem: Convolution, normalization, activation and pooling, which :func:`use_chunks` allows.
        x: Images (N, C, H, W).

    Returns:
        Feature maps of the stem, in the memory format of the images.
    """
    conv, norm, _, pool = stem
    if conv._forward_pre_hooks:
        (x,) = normalize_contrast(conv, (x,))
    *tensors, geometry, dtype = conv.operands(x)  # type: ignore[operator]
    scale, shift = _scale_and_shift(norm, conv.bias)  # type: ignore[arg-type]
    sizes = [pool.kernel_size, pool.stride, pool.padding] if isinstance(pool, nn.MaxPool2d) else [1, 1, 0]
    return stem_operator(*tensors, geometry, scale, shift, sizes, dtype)


def _scale_and_shift(norm: Any, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Write BatchNorm with running statistics, and the bias before it, as scale * R + shift."""
    scale = norm.weight.double() * (norm.running_var.double() + norm.eps).rsqrt()
    mean = norm.running_mean if bias is None else norm.running_mean - bias
    return scale, norm.bias - mean * scale


@torch.library.custom_op(
    'timm_pushpull::stem',
    mutates_args=(),
    device_types='cpu',
    schema=f'({OPERANDS}, Tensor scale, Tensor shift, SymInt[] pool, ScalarType dtype) -> Tensor',
)
def stem_operator(
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
    channels_last = torch.channels_last  # pooling is much faster in it; with one channel the format is ambiguous
    with torch.autocast('cpu', enabled=False):
        scale, shift = scale.to(alpha.dtype), shift.to(alpha.dtype)
        chunks = Chunks(input.contiguous(memory_format=channels_last), weight, c, alpha, geometry, dtype)
        height, width = ((length + 2 * padding - kernel) // stride + 1 for length in chunks.size)
        size = len(input), len(weight), height, width
        output = torch.empty(size, dtype=dtype, device='cpu', memory_format=channels_last)
        for place, push, pull, strength in chunks.rectified():
            push.addcmul_(pull, strength)
            torch.addcmul(shift.view(-1, 1, 1), push, scale.view(-1, 1, 1), out=push)
            # ReLU after pooling: fewer values, same result.
            output[place] = F.max_pool2d(push, kernel, stride, padding).clamp_(min=0)
        return output.contiguous(memory_format=memory_format_of(input))


@stem_operator.register_fake
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


@register_flop_formula(torch.ops.timm_pushpull.stem)
def _(input: Any, weight: Any, c: Any, alpha: Any, geometry: Sequence[int], *_: Any, **kwargs: Any) -> int:
    size = output_size(input[2:], weight[2:], geometry[0:2], geometry[2:4], geometry[4:6])
    return conv_flops(input, weight, [input[0], weight[0], *size], geometry[-2])
