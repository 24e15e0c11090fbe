"""The equation of the push-pull convolution, in plain PyTorch. Every faster version is tested against it.

Paper: `PushPull-Net: Inhibition-driven ResNet robust to image corruptions` - https://arxiv.org/abs/2408.04077
"""

from typing import TYPE_CHECKING, Literal, TypeVar, Union

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    _T = TypeVar('_T')
    BroadcastingList2 = Union[_T, tuple[_T, _T]]  # noqa: UP007
    PullKernel = Literal['inverted', 'negated']
else:
    # TorchScript knows "an int, or one for each axis" by this name only, and knows no Literal.
    from torch._jit_internal import BroadcastingList2

    PullKernel = str

__all__ = ['PullKernel', 'average', 'kernel_offsets', 'pull_kernels', 'push_pull_conv2d_reference']


def kernel_offsets(weight: Tensor, pull_kernel: PullKernel = 'inverted') -> Tensor:
    r"""Compute the numbers :math:`c_o` for which the pull kernels are :math:`K_o = c_o - W_o`.

    Args:
        weight: Push kernels W (O, C / groups, kh, kw).
        pull_kernel: ``'inverted'`` for :math:`c_o = \max(W_o) + \min(W_o)`, ``'negated'`` for :math:`c_o = 0`.

    Returns:
        Offsets (O, 1, 1, 1), of the data type of the weight.
    """
    if pull_kernel == 'negated':
        return weight.new_zeros([weight.shape[0], 1, 1, 1])
    return weight.amax((1, 2, 3), keepdim=True) + weight.amin((1, 2, 3), keepdim=True)


def pull_kernels(weight: Tensor, pull_kernel: PullKernel = 'inverted') -> Tensor:
    r"""Compute the pull kernels :math:`K_o = \max(W_o) + \min(W_o) - W_o`: the same range of values, inverted contrast.

    Args:
        weight: Push kernels W (O, C / groups, kh, kw).
        pull_kernel: ``'inverted'`` for the equation above, ``'negated'`` for :math:`K_o = -W_o`.

    Returns:
        Pull kernels (O, C / groups, kh, kw), of the data type of the weight.
    """
    # In half precision all elements would share the rounding error of max + min, which does not average out.
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    return (kernel_offsets(wide, pull_kernel) - wide).to(weight.dtype)


def average(maps: Tensor, window: int) -> Tensor:
    """Average over a window around each pixel, of what lies inside the map.

    Args:
        maps: Maps (N, C, H, W), or (C, H, W).
        window: Side of the window, an odd number of pixels.

    Returns:
        Maps of the same shape and data type.
    """
    if maps.is_cuda and maps.requires_grad:
        # In channels_last, PyTorch's gradient is wrong before https://github.com/pytorch/pytorch/pull/188345
        maps = maps.contiguous()
    return F.avg_pool2d(maps, window, 1, window // 2, count_include_pad=False)


def push_pull_conv2d_reference(
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
) -> Tensor:
    r"""Compute the push-pull convolution by two convolutions, as its equation stands.

    With :math:`W_o` the push kernel of output channel :math:`o`:

    .. math::
        K_o &= \max(W_o) + \min(W_o) - W_o \\
        P &= x * W, \qquad Q = \operatorname{avg}(x * K) \\
        R &= \operatorname{relu}(P) - \alpha \operatorname{relu}(Q) + b

    Gradients flow through the maximum and the minimum. The average has stride 1; a window at the border is divided by
    the number of real values in it. R may be negative.

    Source: `PushPull-Net` - https://arxiv.org/abs/2408.04077

    Args:
        input: Images or feature maps x (N, C, H, W), or (C, H, W).
        weight: Push kernels W (O, C / groups, kh, kw).
        alpha: Inhibition strength, one number or one for each output channel (O,).
        bias: Bias b (O,).
        stride: Stride of both convolutions, in pixels.
        padding: Zero padding of both convolutions on each side, in pixels.
        dilation: Spacing between kernel elements, in pixels.
        groups: Number of groups of channels.
        avg_pool_size: Side of the averaging window, an odd number of output pixels; 0 for no averaging.
        pull_kernel: ``'inverted'`` or ``'negated'``, see :func:`pull_kernels`.

    Returns:
        Response R (N, O, H', W'), of the spatial size and data type that ``F.conv2d`` gives.
    """
    push = F.conv2d(input, weight, None, stride, padding, dilation, groups)
    pull = F.conv2d(input, pull_kernels(weight, pull_kernel), None, stride, padding, dilation, groups)
    if avg_pool_size > 0:
        pull = average(pull, avg_pool_size)
    if isinstance(alpha, Tensor):
        inhibition = alpha.view(-1, 1, 1) * F.relu(pull)
    else:
        inhibition = alpha * F.relu(pull)
    output = F.relu(push) - inhibition
    if bias is not None:
        output = output + bias.view(-1, 1, 1)
    # Under autocast alpha and bias are float32, and so is the sum.
    return output.to(push.dtype)
