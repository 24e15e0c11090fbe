"""Augmentation of training batches inside the model: ``train.py --model-kwargs augment=prime``."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from ..errors import InputError

__all__ = ['augment_in_training', 'without_augmentation']


def augment_in_training(model: nn.Module, augmentation: nn.Module, splits: int = 1) -> None:
    """Make a model augment its batches in training mode: undo the normalization, augment, normalize again.

    The mean and std are those of ``model.pretrained_cfg``, which timm's loaders use. The first batch is checked: with
    this mean and std it must consist of 8-bit pixels. Evaluation mode, modules and state dict stay as they are.
    Methods such as ``forward_features``, called without the model around them, do not augment: timm's
    ``FeatureDistillationTask`` does so with its student. ``torch.jit.script`` refuses such a model: script a model
    without the augmentation.

    Args:
        model: Model of timm.
        augmentation: Maps images (N, C, H, W) in [0, 1] to augmented images.
        splits: Number of ``train.py --aug-splits``. The first split of a batch then stays as it is: it holds the clean
            images of the consistency loss. 1 augments the whole batch.
    """
    if not isinstance(splits, int) or splits < 1:
        raise InputError(f'augment_splits must be a positive integer, got {splits!r}.')
    model.register_forward_pre_hook(_AugmentInTraining(augmentation, splits))
    model.register_state_dict_pre_hook(_forget_augmentation)


def without_augmentation(model_args: Mapping[str, Any]) -> dict[str, Any]:
    """Drop the augmentation from the arguments of a network: it belongs to one training, not to the weights."""
    return {name: value for name, value in model_args.items() if not name.startswith('augment')}


def _forget_augmentation(model: Any, *args: Any) -> None:
    """Keep the augmentation out of config.json: timm's ``save_for_hf`` takes the weights first, then the arguments."""
    if hasattr(model, '_model_args'):  # timm sets them since 1.0.31
        model._model_args = without_augmentation(model._model_args)


class _AugmentInTraining:
    def __init__(self, augmentation: nn.Module, splits: int) -> None:
        self._augmentation = augmentation
        self._splits = splits
        self._checked = False

    def __call__(self, model: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not model.training:
            return None
        return self._augment(args[0], model.pretrained_cfg['mean'], model.pretrained_cfg['std']), *args[1:]

    @torch.compiler.disable  # a graph would break at the draws
    @torch.no_grad()
    def _augment(self, batch: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
        if batch.shape[1] != len(mean):
            raise InputError(f'augment needs a mean and a std for each of {batch.shape[1]} channels, got mean={mean}.')
        shift, scale = (batch.new_tensor(values, dtype=torch.float32).view(-1, 1, 1) for values in (mean, std))
        images = batch.float() * scale + shift
        if not self._checked:
            _check_pixels(images, batch.dtype, mean, std)
            self._checked = True
        if len(batch) % self._splits:
            raise InputError(f'augment_splits must divide the batch of {len(batch)} images, got {self._splits}.')
        clean = len(batch) // self._splits if self._splits > 1 else 0
        augmented = (self._augmentation(images[clean:].clamp(0, 1)) - shift) / scale
        batch = batch.clone()  # of the same data type and memory format
        batch[clean:] = augmented
        return batch


def _check_pixels(images: Tensor, dtype: torch.dtype, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    """Refuse images of which too few values are n / 255. Random erasing writes other values, so not all must be."""
    # Half precision rounds the steps of 1 / 255 away: only the range can be checked.
    fine = torch.finfo(dtype).bits >= 32
    levels = images * 255
    pixels = (levels - levels.round()).abs() < 0.02 if fine else (levels > -2) & (levels < 257)
    if pixels.float().mean() < 0.6:
        raise InputError(
            f'augment needs the mean and std that the loader used: with those of the model, mean={mean} and std={std}, '
            'the batch does not hold 8-bit pixels. Leave --mean and --std out, or give the model the same values by '
            '--model-kwargs "pretrained_cfg_overlay=dict(mean=..., std=...)". With mixup do not use --no-prefetcher.'
        )
