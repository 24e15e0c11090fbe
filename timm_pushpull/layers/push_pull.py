"""The layer that applies the push-pull convolution in place of an ``nn.Conv2d``.

Paper: `PushPull-Net: Inhibition-driven ResNet robust to image corruptions` - https://arxiv.org/abs/2408.04077
"""

import logging
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.fx
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import Conv2dSame, pad_same
from torch import Tensor

from ..errors import InputError
from ..ops.one_convolution import operands
from ..ops.push_pull import Implementation, check_avg_pool_size, check_pull_kernel, push_pull_conv2d
from ..ops.reference import PullKernel
from .settings import match_settings, set_settings, write_settings

__all__ = ['PushPullConv2d']

_logger = logging.getLogger(__name__)

# Attributes of a module that hold its hooks and their flags.
HOOKS = [name for name in vars(nn.Identity()) if '_hooks' in name or name == '_is_full_backward_hook']

# One node each for fx: they read shapes, which a traced value does not have.
torch.fx.wrap('push_pull_conv2d')
torch.fx.wrap('pad_same')


class PushPullConv2d(nn.Conv2d):
    r"""Convolution layer that applies :func:`~timm_pushpull.push_pull_conv2d`, in place of an ``nn.Conv2d``.

    .. math::
        R = \operatorname{relu}(x * W) - \alpha \operatorname{relu}(\operatorname{avg}(x * K)) + b,
        \qquad K_o = \max(W_o) + \min(W_o) - W_o

    The push kernel W keeps the name ``weight``, so the weights of a plain convolution load unchanged. If the
    checkpoint has no alpha, a trainable alpha keeps its current values. The state dict also holds the window, the pull
    kernel and a fixed alpha (``settings``), and does not load into a layer with others.

    The layer is an ``nn.Conv2d``, but not linear in its weight. Tools that fold something into the weight of a
    convolution (a BatchNorm that follows, an adapter) give other responses here. The tools of ``torch.fx`` and
    ``torch.ao`` skip the layer; a layer without a bias refuses the bias that ``fuse_conv_bn_eval`` would give it.

    Source: `PushPull-Net` - https://arxiv.org/abs/2408.04077

    Args:
        in_channels: Channels of the input, C.
        out_channels: Channels of the output, O.
        kernel_size: Height and width of the push kernel, in pixels.
        stride: Stride of the convolution, in pixels.
        padding: Padding of each side, in pixels, or ``'same'`` or ``'valid'``.
        dilation: Spacing between kernel elements, in pixels.
        groups: Number of groups of channels.
        bias: Add a trainable bias b to the response.
        padding_mode: ``'zeros'``, ``'reflect'``, ``'replicate'`` or ``'circular'``.
        avg_pool_size: Side of the window that averages the pull response, an odd number of output pixels; 0 for no
            averaging.
        alpha: Inhibition strength, one finite number. For a trainable alpha its initial value, one number or one for
            each output channel (O,); None draws it uniformly from [0, 1).
        trainable_alpha: Train one alpha for each output channel; False keeps the given number, in ``settings``.
        pull_kernel: ``'inverted'`` for the paper's K, or ``'negated'`` for :math:`K_o = -W_o`.
        device: Device of the parameters.
        dtype: Data type of the parameters.
        implementation: ``'auto'``, ``'fast'`` or ``'reference'``, see :func:`~timm_pushpull.push_pull_conv2d`.

    Shape:
        (N, C, H, W) to (N, O, H', W'), as ``nn.Conv2d``.

    Raises:
        ValueError: If the window is even or negative, if alpha is not finite, of the wrong shape, or neither trainable
            nor given, or if there is no such pull kernel or implementation.
    """

    __jit_unused_properties__ = ['_settings']

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
        pull_kernel: PullKernel = 'inverted',
        device: Any = None,
        dtype: torch.dtype | None = None,
        implementation: Implementation = 'auto',
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
        check_avg_pool_size(avg_pool_size)
        self.avg_pool_size = avg_pool_size
        check_pull_kernel(pull_kernel)
        self.pull_kernel = pull_kernel
        self.implementation = implementation
        if not isinstance(trainable_alpha, bool):
            raise InputError(f'trainable_alpha must be True or False, got {trainable_alpha!r}.')
        self.trainable_alpha = trainable_alpha
        self.initial_alpha = _check_initial_alpha(alpha, trainable_alpha, out_channels)
        if trainable_alpha:
            self.alpha = nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype))
            self.reset_alpha()
        else:
            self.alpha = self.initial_alpha  # type: ignore[assignment]

        set_settings(self, self._settings, device)

        # TorchScript cannot type a padding that is int or str, so F.pad applies a str padding first.
        self._pads_input = padding_mode != 'zeros' or isinstance(self.padding, str)
        self._pad_mode = 'constant' if padding_mode == 'zeros' else padding_mode
        self._conv_padding = (0, 0) if self._pads_input else self.padding
        self._pads_same = False

    @classmethod
    def from_conv2d(
        cls,
        conv: nn.Conv2d,
        avg_pool_size: int = 3,
        alpha: float | Sequence[float] | Tensor | None = None,
        trainable_alpha: bool = True,
        pull_kernel: PullKernel = 'inverted',
    ) -> 'PushPullConv2d':
        """Build a push-pull layer with the geometry, weight and bias of a convolution.

        Args:
            conv: Convolution; the new layer shares its parameters. timm's convolutions with TensorFlow's padding keep
                that padding.
            avg_pool_size, alpha, trainable_alpha, pull_kernel: See :class:`PushPullConv2d`.

        Returns:
            The layer, with the parameters, hooks and training mode of ``conv``.
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
        layer._pads_same = isinstance(conv, Conv2dSame) or getattr(conv, 'same_pad', False)
        layer.requires_grad_(conv.weight.requires_grad)
        for name in HOOKS:
            vars(layer)[name] = vars(conv)[name]  # the same dict, so that hook handles can still remove their hooks
        return layer.train(conv.training)

    @property
    def _settings(self) -> dict[str, Any]:
        """Settings that the weights depend on. A trainable alpha is among the weights."""
        alpha = {} if self.trainable_alpha else {'alpha': self.alpha}
        return {'avg_pool_size': self.avg_pool_size, 'pull_kernel': self.pull_kernel, **alpha}

    @torch.jit.unused
    def reset_alpha(self) -> None:
        """Set a trainable alpha to its initial value, or draw it where no initial value was given."""
        with torch.no_grad():
            if self.initial_alpha is None:
                self.alpha.uniform_(0, 1)
            else:
                self.alpha.copy_(torch.tensor(self.initial_alpha, dtype=torch.float64, device='cpu'))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if 'alpha' in self._parameters:  # not yet while nn.Conv2d is being built
            self.reset_alpha()

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name == 'bias' and param is not None and self._parameters.get(name, param) is None:
            raise InputError(
                'A push-pull unit without a bias gets none later: a BatchNorm that is folded into its weight and bias '
                'would change the responses, which are not linear in the weight.'
            )
        super().register_parameter(name, param)

    def kernels(self) -> Tensor:
        """Return the push kernels W (O, C / groups, kh, kw)."""
        return self.weight

    def _padded(self, input: Tensor) -> Tensor:
        if self._pads_same:
            return pad_same(input, self.kernel_size, self.stride, self.dilation)  # type: ignore[arg-type]
        if self._pads_input:
            return F.pad(input, self._reversed_padding_repeated_twice, mode=self._pad_mode)
        return input

    def forward(self, input: Tensor) -> Tensor:
        return push_pull_conv2d(
            self._padded(input),
            self.kernels(),
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
        """Prepare the arguments of the operators for an input (N, C, H, W).

        Returns:
            The operands, see :func:`timm_pushpull.ops.one_convolution.operands`.
        """
        return operands(
            self._padded(input),
            self.kernels(),
            self.alpha,
            self.stride,
            self._conv_padding,  # type: ignore[arg-type]
            self.dilation,
            self.groups,
            self.avg_pool_size,
            self.pull_kernel,
        )

    def extra_repr(self) -> str:
        alpha = 'trainable' if self.trainable_alpha else self.alpha
        pull_kernel = '' if self.pull_kernel == 'inverted' else f', pull_kernel={self.pull_kernel}'
        return f'{super().extra_repr()}, avg_pool_size={self.avg_pool_size}, alpha={alpha}{pull_kernel}'

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        write_settings(destination, prefix, self._settings)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        weight, alpha = prefix + 'weight', prefix + 'alpha'
        if self.trainable_alpha and weight in state_dict and alpha not in state_dict:
            _logger.info(
                f'The checkpoint has no {alpha}: alpha keeps its present values. If it is one of a plain network, give '
                'push_pull=False.'
            )
            state_dict[alpha] = self.alpha.detach()
        match_settings(state_dict, prefix, self._settings, args[-1])
        super()._load_from_state_dict(state_dict, prefix, *args)


def _check_initial_alpha(
    alpha: float | Sequence[float] | Tensor | None,
    trainable_alpha: bool,
    out_channels: int,
) -> float | list[float] | None:
    if alpha is None:
        if not trainable_alpha:
            raise InputError('trainable_alpha=False needs a number for alpha, got alpha=None.')
        return None
    try:
        values = torch.as_tensor(alpha, dtype=torch.float64, device='cpu')
    except (TypeError, ValueError, RuntimeError):
        raise InputError(f'alpha must be one number or one for each output channel, got {alpha!r}.') from None
    if values.dim() and not (trainable_alpha and values.shape == (out_channels,)):
        allowed = f'one number, or {out_channels} for the output channels' if trainable_alpha else 'one number'
        raise InputError(f'alpha must be {allowed}, got shape {tuple(values.shape)}.')
    if not values.isfinite().all():
        raise InputError(f'alpha must be finite, got {alpha}.')
    return values.tolist()
