"""Global contrast normalization: every image gets mean 0 and standard deviation 1, so that light matters less.

The loader subtracted a fixed mean before, so a darker image is not just a scaled one: a dark image of low contrast
keeps a colour cast.
"""

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

__all__ = ['add_contrast_norm', 'normalize_contrast']


def normalize_contrast(layer: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    """Normalize each image over all its pixels and channels: (x - mean(x)) / sqrt(var(x) + 1e-5).

    Args:
        layer: Layer that the function is a forward pre-hook of.
        inputs: One tensor of images (N, C, H, W).

    Returns:
        One tensor of images (N, C, H, W). An image of one value becomes 0.
    """
    return (F.group_norm(inputs[0], 1),)


def add_contrast_norm(layer: nn.Module) -> None:
    """Put :func:`normalize_contrast` before the first layer of a network, wherever the layer is called.

    A hook, not a module: timm's feature extractors call the layers of a ResNet one by one, and a module would change
    the names in checkpoints.
    """
    layer.register_forward_pre_hook(normalize_contrast)  # type: ignore[arg-type]
