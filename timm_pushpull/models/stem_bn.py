"""Re-estimates the BatchNorm after a push-pull stem, for weights that were trained with a plain stem."""

import copy
from collections.abc import Iterable
from typing import Any

import torch.nn as nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

from ..errors import InputError
from .convert import first_convs

__all__ = ['update_stem_bn']


def update_stem_bn(model: nn.Module, images: Iterable[Any]) -> None:
    """Re-estimate mean and variance of the BatchNorm after the first convolution, by PyTorch's ``update_bn``.

    A push-pull unit that replaces a pretrained convolution has other responses, and the BatchNorm after it still
    normalizes those of the convolution. Only the stem is run. The other layers and the modes stay as they are.

    Args:
        model: Model made by ``timm.create_model``, whose first convolution a BatchNorm follows.
        images: Batches of images (N, C, H, W), or of tuples that begin with images, such as a loader of timm gives:
            normalized as for the model, on any device. A few hundred images are enough.

    Raises:
        ValueError: If no BatchNorm follows the first convolution, or if there are no images.
    """
    for path, conv in first_convs(model).items():
        parent, _, name = path.rpartition('.')
        siblings = list(model.get_submodule(parent).named_children())
        place = [sibling for sibling, _ in siblings].index(name) + 1
        norm: Any = siblings[place][1] if place < len(siblings) else None
        if not isinstance(norm, _BatchNorm) or norm.num_features != conv.out_channels:
            raise InputError(f'model must have a BatchNorm after {path}, there is a {type(norm).__name__}.')
        stem, before = nn.Sequential(conv, norm), copy.deepcopy(norm.state_dict())
        modes, momentum = [(module, module.training) for module in stem.modules()], norm.momentum
        try:
            update_bn(images, stem, conv.weight.device)
            if not norm.num_batches_tracked:
                raise InputError('images must hold at least one batch, got none.')
        except BaseException:
            norm.load_state_dict(before)
            raise
        finally:
            norm.momentum = momentum
            for module, training in modes:
                module.training = training
