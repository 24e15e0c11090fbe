"""The push-pull layer in place of timm's convolutions with standardized weights, those of BiT and NFNet.

Papers: `Micro-Batch Training with Batch-Channel Normalization and Weight Standardization` -
https://arxiv.org/abs/1903.10520, `Characterizing signal propagation to close the performance gap in unnormalized
ResNets` - https://arxiv.org/abs/2101.08692
"""

from typing import Any

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from .push_pull import PushPullConv2d

__all__ = ['PushPullStdConv2d']


class PushPullStdConv2d(PushPullConv2d):
    r"""Push-pull layer whose push kernels are standardized, each over its own values:

    .. math::
        W'_o = g_o s \frac{W_o - \operatorname{mean}(W_o)}{\sqrt{\operatorname{var}(W_o) + \epsilon}}

    :math:`g` is a trainable gain and :math:`s` a constant of timm's ``ScaledStdConv2d``; both are 1 for ``StdConv2d``.
    Made by :meth:`from_conv2d` from one of these layers of timm.
    """

    eps: float
    scale: float
    gain: nn.Parameter | None

    @classmethod
    def from_conv2d(cls, conv: Any, *args: Any, **kwargs: Any) -> 'PushPullStdConv2d':
        """Build a push-pull layer from timm's ``StdConv2d``, ``ScaledStdConv2d`` or their variants with SAME padding.

        Args:
            conv: The convolution; the new layer shares its parameters.
            *args: Settings of :meth:`PushPullConv2d.from_conv2d`.
            **kwargs: Settings by name.

        Returns:
            The layer, with the parameters, hooks and training mode of ``conv``.
        """
        layer: Any = super().from_conv2d(conv, *args, **kwargs)
        layer.eps = conv.eps
        layer.scale = getattr(conv, 'scale', 1.0)
        layer.gain = getattr(conv, 'gain', None)
        return layer

    def kernels(self) -> Tensor:
        """Return the standardized push kernels (O, C / groups, kh, kw)."""
        gain: Tensor | None = self.gain
        if gain is not None:
            gain = (gain * self.scale).view(-1)
        values = self.weight.reshape(1, self.out_channels, -1)
        return F.batch_norm(values, None, None, gain, training=True, eps=self.eps).reshape_as(self.weight)
