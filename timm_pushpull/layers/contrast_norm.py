"""Global contrast normalization: every image gets mean 0 and standard deviation 1, so that its light matters less.

It sees the images as the loader gives them, less the mean of the data set in each channel. What scales and shifts these
values alike is lost; darker pixels do more: the means, which do not darken along, stay as a tint, the stronger the less
contrast is left. So the effect of light is much smaller, but not gone.
"""

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

__all__ = ['add_contrast_norm', 'normalize_contrast']


def normalize_contrast(layer: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    """Normalize each image by all its values: (x - mean(x)) / sqrt(var(x) + 1e-5).

    Args:
        layer: Layer before which it happens, as for a forward pre-hook.
        inputs: Images (N, C, H, W) alone.

    Returns:
        Images of that shape, alone; one whose values are all equal becomes 0.
    """
    return (F.group_norm(inputs[0], 1),)


def add_contrast_norm(layer: nn.Module) -> None:
    """Put :func:`normalize_contrast` before a layer, wherever in a network it is called.

    A hook and not a module: timm's feature extractors call the layers of a ResNet one by one, and the names in a
    checkpoint stay those of the network without it.

    Args:
        layer: First layer of a network.
    """
    layer.register_forward_pre_hook(normalize_contrast)  # type: ignore[arg-type]
