"""The images as models see them: decoded, resized, cropped and corrupted."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from timm.data import create_transform
from torch.utils.data import Dataset

from ..errors import InputError
from .corruptions import corrupt
from .data import DatasetImages, StoredArrays, StoredFolders, UnreadableImageError
from .metrics import CLEAN

__all__ = ['View', 'Views']


class View(NamedTuple):
    """Key of :class:`Views`: one image under one corruption."""

    corruption: str
    """Name of the corruption, or ``'clean'``."""
    severity: int
    """1 to 5, or 0 for a clean image."""
    image: int
    """Index of the image in its dataset, from 0."""


class Views(Dataset):
    """Dataset of images, decoded once and returned once for each geometry (size, crop, interpolation) of the models.

    Args:
        clean: Clean images, None if there are none.
        stored: Stored corruptions, None to generate them from the clean images.
        seed: Seed of generated corruptions.
        data_configs: ``input_size``, ``crop_pct``, ``crop_mode`` and ``interpolation`` of each model.
        skip_unreadable: Return black images with the class -1 for an image that cannot be read.

    Attributes:
        images: Clean images where there are any, otherwise the stored ones.
        geometry: For each model, the position of its geometry in an item.

    Raises:
        ValueError: If a model does not take RGB images.
    """

    images: DatasetImages | StoredFolders | StoredArrays

    def __init__(
        self,
        clean: DatasetImages | None,
        stored: StoredFolders | StoredArrays | None,
        seed: int,
        data_configs: Mapping[str, Mapping[str, Any]],
        skip_unreadable: bool = False,
    ) -> None:
        images = clean or stored
        assert images is not None, 'clean or stored must be given'
        self.images, self._clean, self._stored = images, clean, stored
        self._seed, self._skip_unreadable = seed, skip_unreadable
        geometries: list[dict[str, Any]] = []
        self.geometry = {}
        for name, config in data_configs.items():
            geometry = {key: config[key] for key in ('input_size', 'crop_pct', 'crop_mode', 'interpolation')}
            if geometry['input_size'][0] != 3:
                raise InputError(f'{name} takes {geometry["input_size"][0]} channels, but corruptions need 3 (RGB).')
            if geometry not in geometries:
                geometries.append(geometry)
            self.geometry[name] = geometries.index(geometry)
        self._sizes = [geometry['input_size'] for geometry in geometries]
        self._resize_and_crop = [_transforms(geometry) for geometry in geometries]
        # Stored corruptions were cropped when they were made.
        self._resize = [_transforms({**geometry, 'crop_pct': 1.0}) for geometry in geometries]

    def __getitem__(self, view: View) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Return one image for each geometry, uint8 (3, H, W), and its class."""
        try:
            arrays = self._arrays(view)
        except UnreadableImageError as error:
            if not self._skip_unreadable:
                raise UnreadableImageError(
                    f'{error} To leave out and count such images, set skip_unreadable.'
                ) from None
            return [torch.zeros(size, dtype=torch.uint8, device='cpu') for size in self._sizes], _cpu_tensor(-1)
        images = [torch.from_numpy(array.copy()).permute(2, 0, 1) for array in arrays]
        return images, _cpu_tensor(self.images.targets[view.image])

    def seen_by(self, data_configs: Mapping[str, Mapping[str, Any]]) -> 'Views':
        """Return the same images as other models see them."""
        return Views(self._clean, self._stored, self._seed, data_configs, self._skip_unreadable)

    def _arrays(self, view: View) -> list[np.ndarray]:
        is_clean = view.corruption == CLEAN
        if self._stored is not None and not is_clean:
            image, transforms = self._stored.image(*view), self._resize
        else:
            assert self._clean is not None, 'only clean images have this view'
            image, transforms = self._clean.image(view.image), self._resize_and_crop
        arrays = []
        for steps in transforms:
            seen = image
            for step in steps:
                seen = step(seen)
            if self._stored is None and not is_clean:
                seen = corrupt(seen, *view, self._seed)
            arrays.append(np.asarray(seen))
        return arrays


def _cpu_tensor(target: int) -> torch.Tensor:
    """Return a class as a tensor: a loader would collect numbers on the program's default device."""
    return torch.tensor(target, device='cpu')


def _transforms(geometry: Mapping[str, Any]) -> list[Any]:
    """Create timm's resize and crop, without its conversion to a tensor."""
    return create_transform(**geometry, is_training=False, normalize=False).transforms[:-1]
