"""Push-pull convolution: the equation, and the convolution layer that applies it.

Paper: `PushPull-Net: Inhibition-driven ResNet robust to image corruptions` - https://arxiv.org/abs/2408.04077
"""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union

import torch
import torch.fx
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.utils import _pair

from .pushpull_fast import fast_push_pull_conv2d, is_fast, operands

if TYPE_CHECKING:
    _T = TypeVar('_T')
    BroadcastingList2 = Union[_T, tuple[_T, _T]]  # noqa: UP007
else:
    # TorchScript knows "an int, or one for each axis" by this name only.
    from torch._jit_internal import BroadcastingList2

__all__ = ['PushPullConv2d', 'pull_kernels', 'push_pull_conv2d']

_logger = logging.getLogger(__name__)


def _check_avg_pool_size(avg_pool_size: int) -> None:
    if not isinstance(avg_pool_size, int) or avg_pool_size < 0 or (avg_pool_size > 0 and avg_pool_size % 2 == 0):
        raise ValueError(f'avg_pool_size must be 0 or a positive odd integer, got {avg_pool_size}.')


def _check_pull_kernel(pull_kernel: str) -> None:
    if pull_kernel not in ('inverted', 'negated'):
        raise ValueError(f"pull_kernel must be 'inverted' or 'negated', got '{pull_kernel}'.")


def pull_kernels(weight: Tensor, pull_kernel: str = 'inverted') -> Tensor:
    r"""Pull kernels :math:`K_o = \max(W_o) + \min(W_o) - W_o`: the same range of values, the contrast inverted.

    Args:
        weight: Push kernels (O, C / groups, kh, kw).
        pull_kernel: ``'inverted'`` for these, ``'negated'`` for :math:`K_o = -W_o`.

    Returns:
        Pull kernels, of the same shape and data type.
    """
    if pull_kernel == 'negated':
        return -weight
    # In half precision max + min would be rounded once for the whole kernel, an error that adds up over the window.
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    return (wide.amax((1, 2, 3), keepdim=True) + wide.amin((1, 2, 3), keepdim=True) - wide).to(weight.dtype)


@torch.fx.wrap  # fx keeps it as one node: its checks read shapes, which a traced value does not have
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
    pull_kernel: str = 'inverted',
    implementation: str = 'auto',
) -> Tensor:
    r"""Convolution inhibited by the response of its contrast-inverted kernel.

    With :math:`W_o` the push kernel of output channel :math:`o`:

    .. math::
        K_o &= \max(W_o) + \min(W_o) - W_o \\
        P &= x * W, \qquad Q = \operatorname{avg}(x * K) \\
        R &= \operatorname{relu}(P) - \alpha \operatorname{relu}(Q) + b

    The pull kernel :math:`K_o` keeps the range of values of the push kernel; gradients flow through its maximum and
    minimum. The average of the pull response has stride 1 and divides the windows at the border by the number of
    values they hold. The result may be negative.

    Args:
        input: Images or feature maps (N, C, H, W), or (C, H, W).
        weight: Push kernels (O, C / groups, kh, kw).
        alpha: Inhibition strength, one number or one for each output channel (O,). Any finite value; 0 leaves the
            rectified convolution.
        bias: Added to the result (O,).
        stride: Step of both convolutions, in pixels.
        padding: Zeros added to each side, in pixels.
        dilation: Spacing between kernel elements, in pixels.
        groups: Number of blocked connections from input channels to output channels.
        avg_pool_size: Side of the window that averages the pull response, an odd number of output pixels; 0 for no
            averaging.
        pull_kernel: ``'inverted'`` for K as above, the paper's; ``'negated'`` for :math:`K_o = -W_o`, which at alpha 1
            and without averaging gives the plain convolution.
        implementation: ``'reference'`` is the equation as it stands here, ``'fast'`` that of
            :mod:`timm_pushpull.pushpull_fast`, and ``'auto'`` the fast one where it serves.

    Returns:
        Response (N, O, H', W'), of the spatial size and data type that ``F.conv2d`` would give.

    Raises:
        ValueError: If the window is even or negative, if alpha is neither one number nor one for each channel, or if
            there is no such pull kernel or implementation.
    """
    _check_avg_pool_size(avg_pool_size)
    _check_pull_kernel(pull_kernel)
    if isinstance(alpha, Tensor):
        if alpha.dim() > 1 or (alpha.dim() == 1 and alpha.shape[0] != weight.shape[0]):
            raise ValueError(
                f'alpha must be one number or one for each of the {weight.shape[0]} output channels, '
                f'got shape {list(alpha.shape)}.'
            )

    if not torch.jit.is_scripting():
        if is_fast(implementation, input, weight):
            settings = *map(_pair, (stride, padding, dilation)), groups, avg_pool_size, pull_kernel
            response = fast_push_pull_conv2d(input, weight, alpha, *settings)
            return response if bias is None else (response + bias.view(-1, 1, 1)).to(response.dtype)

    push = F.conv2d(input, weight, None, stride, padding, dilation, groups)
    pull = F.conv2d(input, pull_kernels(weight, pull_kernel), None, stride, padding, dilation, groups)
    if avg_pool_size > 0:
        pull = F.avg_pool2d(pull, avg_pool_size, 1, avg_pool_size // 2, count_include_pad=False)
    if isinstance(alpha, Tensor):
        inhibition = alpha.view(-1, 1, 1) * F.relu(pull)
    else:
        inhibition = alpha * F.relu(pull)
    output = F.relu(push) - inhibition
    if bias is not None:
        output = output + bias.view(-1, 1, 1)
    # Under autocast alpha and bias are float32, and so was the sum.
    return output.to(push.dtype)


class PushPullConv2d(nn.Conv2d):
    r"""Convolution layer that applies :func:`push_pull_conv2d`, in place of an ``nn.Conv2d``.

    The push kernel keeps the name ``weight``, so the weights of a plain convolution load as they are; a trainable
    inhibition strength that they lack keeps its present value.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output, O.
        kernel_size: Height and width of the push kernel, in pixels.
        stride: Step of the convolution, in pixels.
        padding: Pixels added to each side, or ``'same'`` or ``'valid'``.
        dilation: Spacing between kernel elements, in pixels.
        groups: Number of blocked connections from input channels to output channels.
        bias: Add a trainable bias to the response.
        padding_mode: ``'zeros'``, ``'reflect'``, ``'replicate'`` or ``'circular'``.
        avg_pool_size: Side of the window that averages the pull response, an odd number of output pixels; 0 for no
            averaging.
        alpha: Inhibition strength, a finite number. Where it is trainable this is its initial value, which may differ
            between output channels (O,), and None draws it uniformly from [0, 1).
        trainable_alpha: Make alpha a parameter of shape (O,); otherwise it stays the given number, outside the
            state dict.
        pull_kernel: As for the function.
        device: Device of the parameters.
        dtype: Data type of the parameters.
        implementation: As for the function.

    Shape:
        (N, C, H, W) to (N, O, H', W'), as ``nn.Conv2d``.

    Raises:
        ValueError: If the window is even or negative, if alpha is not finite or of the wrong shape, if it is neither
            trainable nor given, if there is no such pull kernel, or if a setting is of another type.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal['zeros', 'reflect', 'replicate', 'circular'] = 'zeros',
        avg_pool_size: int = 3,
        alpha: float | Sequence[float] | Tensor | None = None,
        trainable_alpha: bool = True,
        pull_kernel: str = 'inverted',
        device: Any = None,
        dtype: torch.dtype | None = None,
        implementation: str = 'auto',
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            bias=bias,
            padding_mode=padding_mode,
            device=device,
            dtype=dtype,
        )
        _check_avg_pool_size(avg_pool_size)
        self.avg_pool_size = avg_pool_size
        _check_pull_kernel(pull_kernel)
        self.pull_kernel = pull_kernel
        self.implementation = implementation
        if not isinstance(trainable_alpha, bool):
            raise ValueError(f'trainable_alpha must be True or False, got {trainable_alpha!r}.')
        self.trainable_alpha = trainable_alpha
        self.initial_alpha = _check_initial_alpha(alpha, trainable_alpha, out_channels)
        if trainable_alpha:
            self.alpha = nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype))
            self.reset_alpha()
        else:
            self.alpha = self.initial_alpha  # type: ignore[assignment]

        # TorchScript has no type for a padding that is either numbers or a word, so a word is padded beforehand.
        self._pads_input = padding_mode != 'zeros' or isinstance(self.padding, str)
        self._pad_mode = 'constant' if padding_mode == 'zeros' else padding_mode
        self._conv_padding = (0, 0) if self._pads_input else self.padding

    @classmethod
    def from_conv2d(
        cls,
        conv: nn.Conv2d,
        avg_pool_size: int = 3,
        alpha: float | Sequence[float] | Tensor | None = None,
        trainable_alpha: bool = True,
        pull_kernel: str = 'inverted',
    ) -> 'PushPullConv2d':
        """Build the push-pull layer of the geometry of ``conv`` that takes over its weight and bias.

        Args:
            conv: Convolution whose parameters become those of the new layer.
            avg_pool_size: As for the class.
            alpha: As for the class.
            trainable_alpha: As for the class.
            pull_kernel: As for the class.

        Returns:
            The layer, sharing ``conv.weight`` and ``conv.bias``.

        Raises:
            ValueError: As for the class.
        """
        layer = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,  # type: ignore[arg-type]
            stride=conv.stride,  # type: ignore[arg-type]
            padding=conv.padding,  # type: ignore[arg-type]
            dilation=conv.dilation,  # type: ignore[arg-type]
            groups=conv.groups,
            bias=conv.bias is not None,
            padding_mode=conv.padding_mode,
            avg_pool_size=avg_pool_size,
            alpha=alpha,
            trainable_alpha=trainable_alpha,
            pull_kernel=pull_kernel,
            device=conv.weight.device,
            dtype=conv.weight.dtype,
        )
        layer.weight = conv.weight
        layer.bias = conv.bias
        return layer.train(conv.training)

    @torch.jit.unused
    def reset_alpha(self) -> None:
        """Give a trainable alpha its initial value, or draw it afresh where none was given."""
        with torch.no_grad():
            if self.initial_alpha is None:
                self.alpha.uniform_(0, 1)
            else:
                self.alpha.copy_(torch.tensor(self.initial_alpha))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if 'alpha' in self._parameters:  # not yet while nn.Conv2d is being built
            self.reset_alpha()

    def _padded(self, input: Tensor) -> Tensor:
        if self._pads_input:
            return F.pad(input, self._reversed_padding_repeated_twice, mode=self._pad_mode)
        return input

    def forward(self, input: Tensor) -> Tensor:
        return push_pull_conv2d(
            self._padded(input),
            self.weight,
            self.alpha,
            self.bias,
            self.stride,  # type: ignore[arg-type]
            self._conv_padding,  # type: ignore[arg-type]
            self.dilation,  # type: ignore[arg-type]
            self.groups,
            self.avg_pool_size,
            self.pull_kernel,
            self.implementation,
        )

    def operands(self, input: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, list[int], torch.dtype]:
        """Prepare what the operators of :mod:`timm_pushpull.pushpull_fast` take.

        Args:
            input: Images or feature maps (N, C, H, W).

        Returns:
            As :func:`timm_pushpull.pushpull_fast.operands`.
        """
        geometry = *map(_pair, (self.stride, self._conv_padding, self.dilation)), self.groups
        settings = *geometry, self.avg_pool_size, self.pull_kernel
        return operands(self._padded(input), self.weight, self.alpha, *settings)

    def extra_repr(self) -> str:
        alpha = 'trainable' if self.trainable_alpha else self.alpha
        pull_kernel = '' if self.pull_kernel == 'inverted' else f', pull_kernel={self.pull_kernel}'
        return f'{super().extra_repr()}, avg_pool_size={self.avg_pool_size}, alpha={alpha}{pull_kernel}'

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        weight, alpha = prefix + 'weight', prefix + 'alpha'
        if self.trainable_alpha and weight in state_dict and alpha not in state_dict:
            _logger.info(f'{alpha} is not in the checkpoint and keeps its initial values.')
            state_dict[alpha] = self.alpha.detach()
        super()._load_from_state_dict(state_dict, prefix, *args)


def _check_initial_alpha(
    alpha: float | Sequence[float] | Tensor | None,
    trainable_alpha: bool,
    out_channels: int,
) -> float | list[float] | None:
    if alpha is None:
        if not trainable_alpha:
            raise ValueError('trainable_alpha=False needs a number for alpha, got alpha=None.')
        return None
    try:
        values = torch.as_tensor(alpha, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f'alpha must be one number or one for each output channel, got {alpha!r}.') from None
    if values.dim() and not (trainable_alpha and values.shape == (out_channels,)):
        allowed = f'one number, or {out_channels} for the output channels' if trainable_alpha else 'one number'
        raise ValueError(f'alpha must be {allowed}, got shape {tuple(values.shape)}.')
    if not values.isfinite().all():
        raise ValueError(f'alpha must be finite, got {alpha}.')
    return values.tolist()
