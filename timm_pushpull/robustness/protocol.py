"""Describes how predictions were made: the content of ``protocol.json``, with hashes of the models."""

import hashlib
import importlib.metadata
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn as nn

from ..augment.in_model import without_augmentation
from ..fields import read_text
from ..layers.settings import is_settings
from .classes import is_imagenet_1k
from .data import DatasetImages, StoredArrays, StoredFolders

__all__ = ['describe_corruptions', 'describe_images', 'describe_models', 'hash_modules', 'hash_weights', 'versions']


def describe_corruptions(stored: StoredFolders | StoredArrays | None, seed: int) -> dict[str, Any]:
    """Describe where the corrupted images come from.

    Args:
        stored: Stored corruptions; None for generated ones.
        seed: Seed of generated corruptions.

    Returns:
        Field ``corruptions`` of the protocol.
    """
    if stored is None:
        return {
            'generated_by': f'imagecorruptions-imaug {_version("imagecorruptions-imaug")}',
            'seed': seed,
            'applied_to': 'the resized and cropped image',
        }
    return {
        'stored_as': stored.layout,
        'stored_names_sha256': _sha256('\n'.join(stored.names)),
        'crop': 'none: short side to input_size, centre',
    }


def describe_images(
    images: DatasetImages | StoredFolders | StoredArrays,
    indices: Sequence[int],
    has_clean: bool,
    real_labels: str | os.PathLike[str] | None,
) -> dict[str, Any]:
    """Describe the images.

    Args:
        images: All images.
        indices: Indices of the images that the models see.
        has_clean: Whether the models see the images without corruption too.
        real_labels: File of the labels, if they are not those of the images.

    Returns:
        Field ``data`` of the protocol.
    """
    return {
        'images': len(indices),
        'classes': len(images.classes),
        'imagenet_1k': is_imagenet_1k(images.classes) and len(set(images.targets)) == len(images.classes),
        'clean': has_clean,
        'names_sha256': _sha256('\n'.join(f'{images.names[index]} {images.targets[index]}' for index in indices)),
        **({'stream_sha256': of_stream} if (of_stream := getattr(images, 'stream_sha256', '')) else {}),
        **({} if real_labels is None else {'real_labels_sha256': _sha256(read_text(real_labels))}),
    }


def describe_models(
    models: Mapping[str, nn.Module],
    data_configs: Mapping[str, Mapping[str, Any]],
    valid_labels: Mapping[str, Sequence[int] | None],
    amp_dtype: torch.dtype | None,
    device: str | torch.device,
) -> dict[str, dict[str, Any]]:
    """Describe the models.

    Args:
        models: Models of timm by name.
        data_configs: Image size, crop, mean and std of each model.
        valid_labels: Index of the logit of each class for each model, None for all logits.
        amp_dtype: Data type of autocast; None for float32.
        device: Device of the models.

    Returns:
        Field ``models`` of the protocol.
    """
    described: dict[str, dict[str, Any]] = {}
    for name, model in models.items():
        described[name] = {
            'architecture': (getattr(model, 'pretrained_cfg', None) or {}).get('architecture'),
            # The arguments of create_model, which timm keeps since 1.0.31.
            'model_args': {
                key: str(value) for key, value in without_augmentation(getattr(model, '_model_args', {})).items()
            },
            **data_configs[name],
            'param_count': round(sum(p.numel() for p in model.parameters()) / 1e6, 2),
            'weights_sha256': hash_weights(model),
            # For settings that are no weights, such as a fixed alpha or the averaging window.
            'modules_sha256': hash_modules(model),
            'precision': str(amp_dtype or torch.float32).removeprefix('torch.'),
            'device': torch.device(device).type,
        }
        if (labels := valid_labels[name]) is not None:
            described[name]['predicts_among'] = f'{len(labels)} of {model.num_classes} classes'
            described[name]['valid_labels_sha256'] = _sha256(' '.join(map(str, labels)))
        if augmentation := getattr(model, 'training_augmentation', {}):
            described[name]['augmentation'] = augmentation
    return described


def versions() -> dict[str, str | None]:
    """Return the versions of this package and of the packages that predictions depend on.

    Returns:
        Field ``versions`` of the protocol: None for a package that is not installed.
    """
    return {name: _version(name) for name in ('timm-pushpull', 'timm', 'torch', 'numpy', 'pillow')}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def hash_modules(model: nn.Module) -> str:
    """Compute a SHA-256 of the modules of a model and their settings, from the text that PyTorch prints."""
    return _sha256(re.sub(' at 0x[0-9a-f]+', '', str(model)))  # functions print their address


def hash_weights(model: nn.Module) -> str:
    """Compute a SHA-256 of the weights and buffers of a model: names, data types, shapes and values.

    The settings in the state dict are not among them: :func:`hash_modules` has them.
    """
    digest = hashlib.sha256()
    weights = {name: tensor for name, tensor in model.state_dict().items() if not is_settings(name)}
    for name, tensor in sorted(weights.items()):
        digest.update(f'{name} {tensor.dtype} {tuple(tensor.shape)}'.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode(errors='surrogateescape')).hexdigest()
