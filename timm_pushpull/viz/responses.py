"""Responses of a push-pull unit to images, and their signal-to-noise ratio: the numbers of the paper's figure 4.

Paper: `PushPull-Net: Inhibition-driven ResNet robust to image corruptions` - https://arxiv.org/abs/2408.04077
"""

import math

import torch.nn.functional as F
from torch import Tensor

from ..ops.push_pull import push_pull_conv2d
from ..ops.reference import PullKernel

__all__ = ['edge_responses', 'snr_db']


def edge_responses(
    images: Tensor,
    weight: Tensor,
    alpha: float | Tensor,
    dilation: tuple[int, int] = (1, 1),
    avg_pool_size: int = 3,
    pull_kernel: PullKernel = 'inverted',
) -> dict[str, Tensor]:
    """Compute the rectified responses to images, at stride 1 and at the size of the images.

    With P the push response and Q the averaged pull response: ``relu(P)``, ``relu(Q)`` and
    ``relu(relu(P) - alpha * relu(Q))``. In a network a bias, a BatchNorm and a ReLU follow the unit: only the ReLU is
    computed here.

    Args:
        images: Images (N, C, H, W).
        weight: Push kernels (O, C, kh, kw).
        alpha: Inhibition strength, one number or one for each filter (O,).
        dilation: Spacing between kernel elements, down and across, in pixels.
        avg_pool_size: Side of the window that averages the pull response, in pixels; 0 for no averaging.
        pull_kernel: ``'inverted'`` or ``'negated'``, see :func:`~timm_pushpull.push_pull_conv2d`.

    Returns:
        ``push``, ``pull`` and ``push-pull``, each (N, O, H, W). Responses within half a kernel and half a window of the
        border also respond to the zero padding.
    """
    down, across = ((size - 1) * step for size, step in zip(weight.shape[2:], dilation, strict=True))
    padded = F.pad(images, (across // 2, across - across // 2, down // 2, down - down // 2))

    def respond(strength: float | Tensor) -> Tensor:
        return push_pull_conv2d(
            padded, weight, strength, dilation=dilation, avg_pool_size=avg_pool_size, pull_kernel=pull_kernel
        )

    push = respond(0.0)
    # The unit returns relu(P) - alpha * relu(Q) only: relu(Q) is the difference between alpha 0 and alpha 1.
    return {'push': push, 'pull': push - respond(1.0), 'push-pull': respond(alpha).relu()}


def snr_db(edge: float, background: float) -> float | None:
    """Compute the signal-to-noise ratio ``20 * log10(A_s / A_n)``.

    Args:
        edge: A_s, the mean rectified response over the edge; 0 or more.
        background: A_n, the mean rectified response over the background; 0 or more.

    Returns:
        Decibels; ``inf`` where only the background has no response, ``-inf`` where only the edge has none, None where
        neither has one.
    """
    if background == 0:
        return math.inf if edge > 0 else None
    return 20 * math.log10(edge / background) if edge > 0 else -math.inf
