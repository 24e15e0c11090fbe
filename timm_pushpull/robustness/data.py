"""Reads images: those of a dataset that timm opens, and corruptions stored on disk."""

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image
from timm.data import ImageDataset
from torch.utils.data import IterableDataset

from ..class_lists import find_class_map
from ..errors import InputError
from .classes import check_folders, check_not_training, classes_without_images, numbers_sorted_as_text
from .metrics import CLEAN, HELD_OUT_CORRUPTIONS, SEVERITIES, TEST_CORRUPTIONS

__all__ = [
    'DatasetImages',
    'StoredArrays',
    'StoredFolders',
    'UnreadableImageError',
    'open_stored',
    'stored_corruptions',
    'stratified_indices',
    'to_rgb',
]


class UnreadableImageError(InputError):
    """An image file that is missing, truncated or not an image; the message names it."""


class DatasetImages:
    """The images of a dataset, by index.

    Args:
        dataset: What ``timm.data.create_dataset`` returns for folders, tar files, ``hfds/`` and ``torch/``, without a
            transform; or the images of a stream, see :mod:`timm_pushpull.robustness.stream`.

    Attributes:
        targets: Class index of each image.
        classes: Name of each class, '' where the dataset has none.
        names: Name of each image, its index where it has none.
        notes: What is odd about the classes or left out, in sentences.
        stream_sha256: Hash of the images of a stream, otherwise ''.

    Raises:
        ValueError: If the dataset is a stream itself, if its images are those for training in place of another split,
            or for the reasons of :func:`~timm_pushpull.robustness.classes.check_folders`.
    """

    def __init__(self, dataset: Any) -> None:
        if isinstance(dataset, IterableDataset):
            raise InputError(
                'dataset must give access by index, as image folders, tar files, hfds/ and torch/ do; '
                f'{type(dataset).__name__} is a stream.'
            )
        self._dataset = dataset
        self._reader: Any = getattr(dataset, 'reader', None)
        self.notes = self._check_folders()
        self.targets = self._read_targets()
        self.classes = self._read_classes()
        has_files = hasattr(self._reader, 'samples')
        self.names = dataset.filenames() if has_files else [str(index) for index in range(len(self.targets))]
        self.stream_sha256 = getattr(dataset, 'stream_sha256', '')
        sentences = classes_without_images(self.classes, self.targets), numbers_sorted_as_text(self.classes)
        self.notes += filter(None, sentences)

    def image(self, index: int) -> Image.Image:
        """Decode one image.

        Args:
            index: Index of the image, from 0.

        Returns:
            RGB image.

        Raises:
            UnreadableImageError: If the image cannot be read.
        """
        if self._reader is None:
            return _decode(lambda: to_rgb(self._dataset[index][0]), self.names[index])
        # Not dataset[index]: for an image that it cannot read, timm's dataset returns the next image.
        return _decode(lambda: _load(self._reader[index][0]), self.names[index])

    def _check_folders(self) -> list[str]:
        folders = self._dataset if self._reader is None else self._reader
        samples = getattr(folders, 'samples', None)
        if not isinstance(samples, list) or not os.path.isdir(getattr(folders, 'root', '')):
            return []  # not folders of images
        files = [file for file, _ in samples]
        check_not_training(folders.root, files)
        # torchvision's classes are the outer folders, and its reader refuses a class without images.
        return [] if self._reader is None else check_folders(folders.root, files, folders.class_to_idx)

    def _read_targets(self) -> list[int]:
        samples, targets = getattr(self._reader, 'samples', None), getattr(self._reader, 'targets', None)
        if targets is None and samples is not None:
            targets = [target for _, target in samples]
        # hfds/: without reading the images; a class map may be by names or by numbers, which timm tells apart.
        if targets is None and hasattr(self._reader, 'label_key') and not self._reader.remap_class:
            targets = list(self._reader.dataset[self._reader.label_key])
        if targets is None and self._reader is None:
            targets = getattr(self._dataset, 'targets', None)
        if targets is None or np.ndim(targets) != 1:
            source = self._dataset if self._reader is None else self._reader
            targets = [source[index][1] for index in range(len(source))]
        return [int(target) for target in targets]

    def _read_classes(self) -> list[str]:
        for owner in (self._reader, self._dataset):
            for attribute in ('wnid_to_idx', 'class_to_idx', 'class_name_to_idx'):  # torchvision's ImageNet: the first
                indices = getattr(owner, attribute, None)
                if indices:
                    # Several names may share an index; the first name counts.
                    names = {index: str(name) for name, index in reversed(indices.items())}
                    return [names.get(index, '') for index in range(max(names) + 1)]
        return [''] * (max(self.targets) + 1)


class StoredFolders:
    """Corrupted images in the layout of ImageNet-C and Tiny-ImageNet-C: ``corruption/severity/class/file``.

    The corruptions may lie in folders of their kind (``noise``, ``blur``, ``weather``, ``digital``, ``extra``).

    Args:
        folder: Folder of the corruptions.
        corruptions: Names of the corruptions to read.
        severities: Severities to read, 1 to 5.
        class_map: Classes to keep and their indices, as ``--class-map`` of timm; '' for all folders in their order.

    Attributes:
        passes: Corruptions and severities to read.
        targets: Class index of each image, the same for each corruption and severity.
        classes: Name of each class.
        names: File of each image, relative to the folder of the severity.
        notes: What is odd about the classes or left out, in sentences.

    Raises:
        ValueError: If a corruption or a severity is missing, if it holds no images, or for the reasons of
            :func:`~timm_pushpull.robustness.classes.check_folders`.
    """

    layout = 'corruption/severity/class/file'

    def __init__(
        self,
        folder: str | os.PathLike[str],
        corruptions: Iterable[str],
        severities: Iterable[int],
        class_map: str = '',
    ) -> None:
        folder, severities = Path(folder), list(severities)
        self._folders: dict[tuple[str, int], Path] = {}
        missing: list[str] = []
        for corruption in corruptions:
            candidates = [folder / corruption, *sorted(folder.glob(f'*/{corruption}'))]
            found = next((candidate for candidate in candidates if candidate.is_dir()), folder / corruption)
            paths = {severity: found / str(severity) for severity in severities}
            self._folders.update({(corruption, severity): path for severity, path in paths.items()})
            lacking = [severity for severity, path in paths.items() if not path.is_dir()]
            missing += [corruption] if not found.is_dir() else [f'{corruption}/{severity}' for severity in lacking]
        if missing:
            raise InputError(
                f'{folder} lacks {", ".join(missing)}: name corruptions and severities that it has, or all corruptions.'
            )
        self.passes = set(self._folders)
        first = next(iter(self._folders.values()))
        try:
            images = DatasetImages(ImageDataset(str(first), class_map=class_map))
        except RuntimeError as error:  # timm found no image file
            raise InputError(str(error)) from None
        self.targets, self.classes, self.names = images.targets, images.classes, images.names
        self.notes = images.notes

    def image(self, corruption: str, severity: int, index: int) -> Image.Image:
        """Decode one image.

        Args:
            corruption: Name of the corruption.
            severity: Severity, 1 to 5.
            index: Index of the image, from 0.

        Returns:
            RGB image.

        Raises:
            UnreadableImageError: If the image cannot be read.
        """
        path = self._folders[corruption, severity] / self.names[index]
        return _decode(lambda: _load(open(path, 'rb')), str(path))


class StoredArrays:
    """Corrupted images in the layout of CIFAR-10-C and CIFAR-100-C: ``corruption.npy`` and ``labels.npy``.

    Each array holds all images at severity 1, then all images at severity 2, and so on to 5.

    Args:
        folder: Folder of the arrays.
        corruptions: Names of the corruptions to read.

    Attributes:
        passes: Corruptions and severities that the arrays hold.
        targets: Class index of each image, the same for each corruption and severity.
        classes: '' for each class: the layout has no names.
        names: Index of each image.
        notes: Empty: nothing is left out.

    Raises:
        ValueError: If an array is missing or damaged, or has another shape or data type.
    """

    layout = 'corruption.npy'

    def __init__(self, folder: str | os.PathLike[str], corruptions: Iterable[str]) -> None:
        self._folder = Path(folder)
        corruptions = list(corruptions)
        missing = [f'{name}.npy' for name in corruptions if not self._path(name).is_file()]
        if missing:
            raise InputError(f'{folder} lacks {", ".join(missing)}: name corruptions that it has, or all.')
        labels = self._array('labels')
        if labels.ndim != 1 or len(labels) % 5 or (labels.reshape(5, -1) != labels[: len(labels) // 5]).any():
            raise InputError(f'{self._path("labels")} must hold the same classes five times, once for each severity.')
        for name in corruptions:
            array = self._array(name)
            if array.dtype != np.uint8 or array.ndim != 4 or array.shape[0] != len(labels) or array.shape[3] != 3:
                raise InputError(
                    f'{self._path(name)} must hold {len(labels)} RGB images of 8 bits (N, H, W, 3), '
                    f'got {array.dtype} {array.shape}.'
                )
        self.passes = {(name, severity) for name in corruptions for severity in SEVERITIES}
        self.targets = [int(label) for label in labels[: len(labels) // 5]]
        self.classes = [''] * (max(self.targets) + 1)
        self.names = [str(index) for index in range(len(self.targets))]
        self.notes: list[str] = []

    def image(self, corruption: str, severity: int, index: int) -> Image.Image:
        """Read one image, with the arguments of :meth:`StoredFolders.image`."""
        return Image.fromarray(self._array(corruption)[(severity - 1) * len(self.targets) + index])

    def _path(self, name: str) -> Path:
        return self._folder / f'{name}.npy'

    def _array(self, name: str) -> np.ndarray:
        try:
            return np.load(self._path(name), mmap_mode='r', allow_pickle=False)
        except (EOFError, ValueError) as error:
            raise InputError(f'{self._path(name)} is damaged, or holds no array of numbers.') from error


def stored_corruptions(folder: str | os.PathLike[str]) -> list[str]:
    """List the corruptions in a folder, in either layout of :func:`open_stored`.

    Args:
        folder: Folder of the corruptions.

    Returns:
        Their names: the 15 of ImageNet-C first, then the others in alphabetical order.

    Raises:
        ValueError: If the folder does not exist or holds no corruption.
    """
    if (Path(folder) / 'labels.npy').exists():
        found = {path.stem for path in Path(folder).glob('*.npy')} - {'labels'}
    else:
        direct = {path.parent for path in Path(folder).glob('*/[1-5]/')}
        of_kinds = {path.parent for path in Path(folder).glob('*/*/[1-5]/') if path.parent.parent not in direct}
        found = {path.name for path in direct | of_kinds}
    if not found:
        raise InputError(f'stored must be a folder of corruptions, {folder} is not one.')
    return sorted(found, key=lambda name: (name not in TEST_CORRUPTIONS, name not in HELD_OUT_CORRUPTIONS, name))


def open_stored(
    folder: str | os.PathLike[str],
    corruptions: Iterable[str],
    severities: Iterable[int],
    class_map: str = '',
) -> StoredFolders | StoredArrays:
    """Open stored corruptions: in the layout of CIFAR-10-C where there is a ``labels.npy``, else that of ImageNet-C.

    Args:
        folder: Folder of the corruptions.
        corruptions: Names of the corruptions to read.
        severities: Severities to read, 1 to 5.
        class_map: File of class names, or ``imagenet_100``, ``imagenet_200`` or ``imagenet_1000``, as for
            :func:`~timm_pushpull.open_dataset`; only in the layout of ImageNet-C.

    Returns:
        The images, for :func:`timm_pushpull.evaluate_robustness`.

    Raises:
        ValueError: If the folder or the class map does not exist, or if the folder lacks a corruption or a severity.
    """
    if not Path(folder).is_dir():
        raise InputError(f'stored must be a folder of corruptions, {folder} is not one.')
    corruptions = list(corruptions)
    if CLEAN in corruptions:
        raise InputError(f'corruptions must not be named {CLEAN}: give clean images as the dataset.')
    if not (Path(folder) / 'labels.npy').exists():
        return StoredFolders(folder, corruptions, severities, find_class_map(class_map, os.fspath(folder)))
    if class_map:
        raise InputError(f'class_map selects folders of classes, but {folder} holds arrays: leave class_map out.')
    return StoredArrays(folder, corruptions)


def stratified_indices(targets: Sequence[int], limit: int | None = None) -> list[int]:
    """Select images evenly over the classes: the first image of each class, then the second of each, and so on.

    The last of these rounds may have more images than the limit leaves: its images are then of evenly spread classes.

    Args:
        targets: Class index of each image.
        limit: Number of images; None for all.

    Returns:
        Indices of the images, ascending.

    Raises:
        ValueError: If the limit is not positive.
    """
    if limit is not None and limit < 1:
        raise InputError(f'limit must be at least 1, got {limit}.')
    if limit is None or limit >= len(targets):
        return list(range(len(targets)))
    seen: dict[int, int] = {}
    turns = []
    for index, target in enumerate(targets):
        seen[target] = seen.get(target, 0) + 1
        turns.append((seen[target], target, index))
    turns.sort()
    last, _, _ = turns[limit]
    chosen = [index for turn, _, index in turns if turn < last]
    of_last = [index for turn, _, index in turns if turn == last]
    left = limit - len(chosen)
    return sorted([*chosen, *(of_last[place * len(of_last) // left] for place in range(left))])


def _load(file: IO[bytes]) -> Image.Image:
    with file:
        return to_rgb(Image.open(file))


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to RGB of 8 bits. Pillow would cut 16-bit grey values off at 255, which makes them white.

    Args:
        image: Image of any mode.

    Returns:
        RGB image.

    Raises:
        ValueError: If the mode has no fixed range of values (``I`` and ``F``).
    """
    if image.mode.startswith('I;16'):
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    if image.mode in ('I', 'F'):
        raise InputError(f'mode {image.mode} has no fixed range of values, convert the image to 8 or 16 bits')
    return image.convert('RGB')


def _decode(load: Callable[[], Image.Image], name: str) -> Image.Image:
    try:
        return load()
    except Exception as error:  # decoders raise many kinds of errors
        raise UnreadableImageError(f'{name} cannot be read: {str(error).rstrip(".")}.') from None
