"""The push-pull convolution for users: checks its arguments and decides which implementation runs."""

import functools
import warnings
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ..errors import InputError
from .custom_op import push_pull_conv2d_operator
from .one_convolution import operands
from .reference import BroadcastingList2, PullKernel, push_pull_conv2d_reference

if TYPE_CHECKING:
    Implementation = Literal['auto', 'fast', 'reference']
else:
    Implementation = str  # TorchScript knows no Literal

__all__ = ['check_avg_pool_size', 'check_pull_kernel', 'push_pull_conv2d', 'use_fast']


def push_pull_conv2d(
    input: Tensor,
    weight: Tensor,
    alpha: float | Tensor,
    bias: Tensor | None = None,
    stride: BroadcastingList2[int] = 1,
    padding: BroadcastingList2[int] = 0,
    dilation: BroadcastingList2[int] = 1,
    groups: int = 1,
    avg_pool_size: int = 3,
    pull_kernel: PullKernel = 'inverted',
    implementation: Implementation = 'auto',
) -> Tensor:
    r"""Convolve, and inhibit the response by the response of a pull kernel of inverted contrast.

    .. math::
        R = \operatorname{relu}(x * W) - \alpha \operatorname{relu}(\operatorname{avg}(x * K)) + b,
        \qquad K_o = \max(W_o) + \min(W_o) - W_o

    See :func:`~timm_pushpull.ops.reference.push_pull_conv2d_reference` for the equation in full.

    Source: `PushPull-Net` - https://arxiv.org/abs/2408.04077

    Args:
        input: Images or feature maps x (N, C, H, W), or (C, H, W).
        weight: Push kernels W (O, C / groups, kh, kw).
        alpha: Inhibition strength, one number or one for each output channel (O,). Any finite value; 0 leaves the
            rectified convolution.
        bias: Bias b (O,).
        stride: Stride of both convolutions, in pixels.
        padding: Zero padding of both convolutions on each side, in pixels.
        dilation: Spacing between kernel elements, in pixels.
        groups: Number of groups of channels.
        avg_pool_size: Side of the averaging window, an odd number of output pixels; 0 for no averaging.
        pull_kernel: ``'inverted'`` for K as above, the paper's; ``'negated'`` for :math:`K_o = -W_o`. With alpha 1 and
            no averaging the negated kernel gives the plain convolution.
        implementation:
            - ``'reference'``: the equation as written;
            - ``'fast'``: the faster version of the device;
            - ``'auto'``: ``'fast'`` where :func:`use_fast` allows it, otherwise ``'reference'``.

    Returns:
        Response R (N, O, H', W'), of the spatial size and data type that ``F.conv2d`` gives. R may be negative.

    Raises:
        ValueError: If the window is even or negative, if alpha is neither one number nor one for each channel, or if
            there is no such pull kernel or implementation.
    """
    check_avg_pool_size(avg_pool_size)
    check_pull_kernel(pull_kernel)
    if isinstance(alpha, Tensor):
        if alpha.dim() > 1 or (alpha.dim() == 1 and alpha.shape[0] != weight.shape[0]):
            raise InputError(
                f'alpha must be one number or one for each of the {weight.shape[0]} output channels, '
                f'got shape {list(alpha.shape)}.'
            )

    if not torch.jit.is_scripting():
        if use_fast(implementation, input, weight):
            if torch.compiler.is_compiling():  # the memory format that the compiler gives to plain convolutions
                input = input.contiguous(memory_format=torch.channels_last)
            settings = stride, padding, dilation, groups, avg_pool_size, pull_kernel
            response = push_pull_conv2d_operator(*operands(input, weight, alpha, *settings))
            return response if bias is None else (response + bias.view(-1, 1, 1)).to(response.dtype)

    return push_pull_conv2d_reference(
        input, weight, alpha, bias, stride, padding, dilation, groups, avg_pool_size, pull_kernel
    )


def use_fast(implementation: Implementation, input: Tensor, weight: Tensor) -> bool:
    """Decide whether the fast version computes a push-pull convolution, or the reference.

    Args:
        implementation: ``'auto'``, ``'fast'`` or ``'reference'``.
        input: Images or feature maps.
        weight: Push kernels.

    Returns:
        For ``'auto'``:
        - True for batches on a CPU, and for batches and float32 weights on an NVIDIA GPU where Triton works, eager or
          compiled;
        - False where a program is traced or exported;
        - False under ``vmap`` and forward-mode AD, which need each step of the equation.

    Raises:
        ValueError: If there is no such implementation.
    """
    if implementation not in ('auto', 'fast', 'reference'):
        raise InputError(f"implementation must be 'auto', 'fast' or 'reference', got {implementation!r}.")
    if implementation != 'auto':
        return implementation == 'fast'
    if torch.compiler.is_compiling():
        if not hasattr(torch.compiler, 'is_exporting') or torch.compiler.is_exporting():
            return False
    elif torch.jit.is_tracing() or torch._C._functorch.maybe_current_level() is not None:
        return False
    elif torch.autograd.forward_ad._current_level >= 0:
        return False
    device = input.device.type
    if device not in ('cpu', 'cuda') or input.device != weight.device:
        return False
    if input.dim() != 4 or not input.is_floating_point():
        return False
    if torch.is_autocast_enabled(device):
        if torch.float64 in (input.dtype, weight.dtype):
            return False
    elif input.dtype != weight.dtype:
        return False
    if device == 'cpu':
        return True
    if weight.dtype != torch.float32 or torch.version.hip:  # never tried on AMD
        return False
    return torch.compiler.is_compiling() or _triton_works(input.device)  # a compiler for the GPU needs Triton itself


@functools.cache
def _triton_works(device: torch.device) -> bool:
    """Tell whether Triton builds and runs kernels on a GPU: it may lack a C compiler, or the GPU be too old."""
    x, one = torch.zeros(1, 1, 3, 3, device=device), torch.ones(1, device=device)
    try:
        from . import triton

        triton.push_pull(x, x, one.double(), one, [1, 1, 1, 1, 1, 1, 1, 3], x.dtype)
    except Exception as error:
        reason = f'{type(error).__name__}: {str(error).strip()}'.splitlines()[0]
        message = f'push-pull convolutions run the slower reference: Triton fails on {device} ({reason}).'
        warnings.warn(message, stacklevel=2)
        return False
    return True


def check_avg_pool_size(avg_pool_size: int) -> None:
    """Raise ``ValueError`` unless the averaging window is 0 or a positive odd integer."""
    whole = isinstance(avg_pool_size, int) and not isinstance(avg_pool_size, bool)
    if not whole or avg_pool_size < 0 or (avg_pool_size > 0 and avg_pool_size % 2 == 0):
        raise InputError(f'avg_pool_size must be 0 or a positive odd integer, got {avg_pool_size}.')


def check_pull_kernel(pull_kernel: PullKernel) -> None:
    """Raise ``ValueError`` unless the pull kernel is ``'inverted'`` or ``'negated'``."""
    if pull_kernel not in ('inverted', 'negated'):
        raise InputError(f"pull_kernel must be 'inverted' or 'negated', got '{pull_kernel}'.")
