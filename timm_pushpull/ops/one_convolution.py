r"""The push-pull convolution by one convolution instead of two: the arithmetic that the fast versions share.

With :math:`c_o = \max(W_o) + \min(W_o)`, or 0 for the negated pull kernel, the pull kernel is :math:`K_o = c_o - W_o`.
So Q needs no convolution of its own: it follows from P and from S, the sum of the input under the kernel, one channel
for each group:

.. math::
    Q = \operatorname{avg}(c S - P)

Where c is far from the mean of W and the input far from zero, Q is a small difference of large numbers. The fast
versions therefore convolve with :math:`W - m`, m being the mean of W, and add what m leaves out:

.. math::
    \tilde P = x * (W - m), \qquad P = \tilde P + m S,
    \qquad Q = (c - m) \operatorname{avg}(S) - \operatorname{avg}(\tilde P)

A large m costs P precision in turn, so m is 0 where \|mean\| is at most \|c - mean\|.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.utils import _pair

from .reference import PullKernel, kernel_offsets

__all__ = [
    'compute_dtype',
    'conv_dtype',
    'memory_format_of',
    'operands',
    'output_size',
    'subtract_mean',
    'unpack_geometry',
]


def operands(
    input: Tensor,
    weight: Tensor,
    alpha: float | Tensor,
    stride: int | Sequence[int],
    padding: int | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
    avg_pool_size: int,
    pull_kernel: PullKernel,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[int], torch.dtype]:
    """Prepare the arguments of the operator ``timm_pushpull::push_pull_conv2d``.

    Args:
        input: Images or feature maps (N, C, H, W).
        weight: Push kernels W (O, C / groups, kh, kw).
        alpha: Inhibition strength, one number or one for each output channel (O,).
        stride: Stride, int or (rows, columns), in pixels.
        padding: Zero padding on each side, int or (rows, columns), in pixels.
        dilation: Spacing between kernel elements, int or (rows, columns), in pixels.
        groups: Number of groups of channels.
        avg_pool_size: Side of the averaging window, odd, or 0.
        pull_kernel: ``'inverted'`` or ``'negated'``.

    Returns:
        Input; W; c (O,), float64; alpha (O,); geometry: stride, padding and dilation, two numbers each, groups and
        window; data type of the response.
    """
    device = input.device.type
    autocast = torch.is_autocast_enabled(device) and input.dtype != torch.float64
    dtype = torch.get_autocast_dtype(device) if autocast else input.dtype
    c = kernel_offsets(weight.double(), pull_kernel).flatten()  # c multiplies the sum S: an error in c is amplified
    alpha = alpha if isinstance(alpha, Tensor) else torch.tensor(alpha, dtype=torch.float64, device=weight.device)
    alpha = alpha.to(weight.device, compute_dtype(weight)).expand(weight.shape[0])
    geometry = [*_pair(stride), *_pair(padding), *_pair(dilation), groups, max(avg_pool_size, 1)]
    return input, weight, c, alpha, geometry, dtype


def unpack_geometry(geometry: Sequence[int]) -> tuple[dict[str, Any], int]:
    """Split the operator's geometry into the keyword arguments of ``F.conv2d`` and the averaging window."""
    *_, groups, window = geometry
    return dict(stride=geometry[0:2], padding=geometry[2:4], dilation=geometry[4:6], groups=groups), window


def output_size(
    size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """Return the height and width that ``F.conv2d`` gives; each argument is (rows, columns), in pixels."""
    lengths = zip(size, kernel_size, stride, padding, dilation, strict=True)
    return [(length + 2 * pad - step * (side - 1) - 1) // stride + 1 for length, side, stride, pad, step in lengths]


def compute_dtype(weight: Tensor) -> torch.dtype:
    """Return the data type of all arithmetic after the convolution: at least float32."""
    return torch.promote_types(weight.dtype, torch.float32)


def conv_dtype(weight: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Choose the data type of the convolution.

    Half precision rounds P and Q, which may change their sign. So only autocast, which rounds input and weights anyway,
    convolves in half precision. Half-precision weights are convolved in float32.

    Args:
        weight: Push kernels.
        dtype: Data type of the response.

    Returns:
        ``dtype`` under autocast, where the device has instructions for it; else at least float32.
    """
    supported = getattr(torch.cpu, '_is_avx512_bf16_supported', bool)  # absent from some releases
    if dtype.itemsize < weight.dtype.itemsize and (weight.is_cuda or (dtype == torch.bfloat16 and supported())):
        return dtype
    return compute_dtype(weight)


def subtract_mean(weight: Tensor, c: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Compute m and the kernels W - m that are convolved.

    Args:
        weight: Push kernels W (O, C / groups, kh, kw).
        c: Offsets c (O,), float64.
        dtype: Data type of the convolution.

    Returns:
        W - m in that data type, and m (O,), float64: the mean of W, or 0 where \\|mean\\| is at most \\|c - mean\\|.
    """
    wide = weight.double()
    mean = wide.mean((1, 2, 3))
    mean *= mean.abs() > (c - mean).abs()
    kernels = (wide - mean.view(-1, 1, 1, 1)).to(dtype)
    return kernels, (wide - kernels).mean((1, 2, 3))  # corrects m for the rounding of W - m


def memory_format_of(maps: Tensor) -> torch.memory_format:
    """Return the memory format of maps (N, C, H, W): ``torch.contiguous_format`` for maps that are in both."""
    channels_last = maps.is_contiguous(memory_format=torch.channels_last) and not maps.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format
