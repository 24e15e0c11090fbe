"""The pictures that models are shown: those of a dataset that timm opens, or corruptions stored on disk."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image
from timm.data import ImageDataset
from torch.utils.data import IterableDataset

__all__ = ['DatasetImages', 'StoredArrays', 'StoredFolders', 'UnreadableImage', 'find_class_map', 'open_stored']


class UnreadableImage(ValueError):
    """A picture that is missing, truncated or not a picture; its message names it."""


class DatasetImages:
    """The pictures of a dataset, by their place in it.

    Args:
        dataset: What ``timm.data.create_dataset`` returns for folders, tar files, ``hfds/`` and ``torch/``, without a
            transform.

    Attributes:
        targets: Class of each picture.
        classes: Name of each class, '' where the dataset does not say it.
        names: Name of each picture, its place where it has none.

    Raises:
        ValueError: If the dataset gives its pictures one after the other only (``tfds/``, ``wds/``, ``hfids/``).
    """

    def __init__(self, dataset: Any) -> None:
        if isinstance(dataset, IterableDataset):
            raise ValueError(
                'dataset must give any picture by its place: image folders, tar files, hfds/ or torch/, '
                f'got {type(dataset).__name__}, which streams them.'
            )
        self._dataset = dataset
        self._reader: Any = getattr(dataset, 'reader', None)
        self.targets = self._read_targets()
        self.classes = self._read_classes()
        has_files = hasattr(self._reader, 'samples')
        self.names = dataset.filenames() if has_files else [str(place) for place in range(len(self.targets))]

    def image(self, place: int) -> Image.Image:
        """Decode one picture.

        Args:
            place: Its place in the dataset, from 0.

        Returns:
            The picture in RGB.

        Raises:
            UnreadableImage: If that cannot be done.
        """
        if self._reader is None:
            return _decode(lambda: self._dataset[place][0].convert('RGB'), self.names[place])
        # Not dataset[place]: timm's dataset puts the next picture in the place of one that it cannot read.
        return _decode(lambda: _load(self._reader[place][0]), self.names[place])

    def _read_targets(self) -> list[int]:
        samples, targets = getattr(self._reader, 'samples', None), getattr(self._reader, 'targets', None)
        if targets is None and samples is not None:
            targets = [target for _, target in samples]
        if targets is None and hasattr(self._reader, 'label_key'):  # hfds/, whose pictures need not be opened for it
            targets = list(self._reader.dataset[self._reader.label_key])
            if self._reader.remap_class:
                targets = [self._reader.class_to_idx[target] for target in targets]
        if targets is None and self._reader is None:
            targets = getattr(self._dataset, 'targets', None)
        if targets is None or np.ndim(targets) != 1:
            source = self._dataset if self._reader is None else self._reader
            targets = [source[place][1] for place in range(len(source))]
        return [int(target) for target in targets]

    def _read_classes(self) -> list[str]:
        for owner in (self._reader, self._dataset):
            for attribute in ('class_to_idx', 'class_name_to_idx'):
                indices = getattr(owner, attribute, None)
                if indices:
                    # Several names may have one index.
                    names = {index: str(name) for name, index in reversed(indices.items())}
                    return [names.get(index, '') for index in range(max(names) + 1)]
        return [''] * (max(self.targets) + 1)


class StoredFolders:
    """Corrupted pictures as ImageNet-C and Tiny-ImageNet-C are published: ``corruption/severity/class/file``.

    The corruptions may stand in folders of their kind (``noise``, ``blur``, ``weather``, ``digital``, ``extra``).

    Args:
        folder: Folder of the corruptions.
        corruptions: Those that will be asked for.
        severities: Those that will be asked for.
        class_map: Classes to keep and their indices, as timm's ``--class-map``; '' for all folders in their order.

    Attributes:
        targets: Class of each picture, the same in each corruption and severity.
        classes: Name of each class.
        names: File of each picture, below the folder of the severity.

    Raises:
        ValueError: If a corruption or severity is missing, or holds no pictures.
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
            raise ValueError(f'{folder} lacks {", ".join(missing)}: name corruptions and severities that it has.')
        first = next(iter(self._folders.values()))
        try:
            pictures = DatasetImages(ImageDataset(str(first), class_map=class_map))
        except RuntimeError as error:  # timm's, where no file is an image
            raise ValueError(str(error)) from None
        self.targets, self.classes, self.names = pictures.targets, pictures.classes, pictures.names

    def image(self, corruption: str, severity: int, place: int) -> Image.Image:
        """Decode one picture.

        Args:
            corruption: Name of the corruption.
            severity: Its severity.
            place: Place of the picture, from 0.

        Returns:
            The picture in RGB.

        Raises:
            UnreadableImage: If that cannot be done.
        """
        path = self._folders[corruption, severity] / self.names[place]
        return _decode(lambda: _load(open(path, 'rb')), str(path))


class StoredArrays:
    """Corrupted pictures as CIFAR-10-C and CIFAR-100-C are published: ``corruption.npy`` and ``labels.npy``.

    Each array holds the pictures at severity 1, then the same at severity 2, and so on to 5.

    Args:
        folder: Folder of the arrays.
        corruptions: Those that will be asked for.

    Attributes:
        targets: Class of each picture, the same in each corruption and severity.
        classes: '' for each class.
        names: Place of each picture.

    Raises:
        ValueError: If an array is missing or of another shape or type.
    """

    layout = 'corruption.npy'

    def __init__(self, folder: str | os.PathLike[str], corruptions: Iterable[str]) -> None:
        self._folder = Path(folder)
        corruptions = list(corruptions)
        missing = [f'{name}.npy' for name in corruptions if not self._path(name).is_file()]
        if missing:
            raise ValueError(f'{folder} lacks {", ".join(missing)}: name corruptions that it has.')
        labels = np.load(self._path('labels'), allow_pickle=False)
        if labels.ndim != 1 or len(labels) % 5 or (labels.reshape(5, -1) != labels[: len(labels) // 5]).any():
            raise ValueError(f'{self._path("labels")} must hold the same classes five times, once for each severity.')
        for name in corruptions:
            array = self._array(name)
            if array.dtype != np.uint8 or array.ndim != 4 or array.shape[0] != len(labels) or array.shape[3] != 3:
                raise ValueError(
                    f'{self._path(name)} must hold {len(labels)} RGB pictures of 8 bits (N, H, W, 3), '
                    f'got {array.dtype} {array.shape}.'
                )
        self.targets = [int(label) for label in labels[: len(labels) // 5]]
        self.classes = [''] * (max(self.targets) + 1)
        self.names = [str(place) for place in range(len(self.targets))]

    def image(self, corruption: str, severity: int, place: int) -> Image.Image:
        """Read one picture; arguments as for :meth:`StoredFolders.image`."""
        return Image.fromarray(self._array(corruption)[(severity - 1) * len(self.targets) + place])

    def _path(self, name: str) -> Path:
        return self._folder / f'{name}.npy'

    def _array(self, name: str) -> np.ndarray:
        return np.load(self._path(name), mmap_mode='r', allow_pickle=False)


def open_stored(
    folder: str | os.PathLike[str],
    corruptions: Iterable[str],
    severities: Iterable[int],
    class_map: str = '',
) -> StoredFolders | StoredArrays:
    """Open corrupted pictures in the layout of ImageNet-C or in that of CIFAR-10-C, which has a ``labels.npy``.

    Args:
        folder: Folder of the corruptions.
        corruptions: Those that will be asked for.
        severities: Those that will be asked for.
        class_map: Classes to keep and their indices, as timm's ``--class-map``; for folders only.

    Returns:
        The pictures.

    Raises:
        ValueError: If the folder does not exist or lacks something.
    """
    if not Path(folder).is_dir():
        raise ValueError(f'stored must be a folder of corruptions, {folder} is none.')
    if not (Path(folder) / 'labels.npy').exists():
        return StoredFolders(folder, corruptions, severities, class_map)
    if class_map:
        raise ValueError(f'class_map chooses among folders of classes, {folder} holds arrays.')
    return StoredArrays(folder, corruptions)


def find_class_map(name: str, folder: str = '') -> str:
    """Find a class list: a file, or by name one of this package, ``imagenet_100`` or ``imagenet_200``.

    The two are the classes of ImageNet that PushPull-Net's subsets keep.

    Args:
        name: File, there or below the folder, as timm's ``--class-map`` takes it; or a name; or ''.
        folder: Folder of the dataset.

    Returns:
        Path of the file, or ''.

    Raises:
        ValueError: If there is no such file or name.
    """
    lists = Path(__file__).parent.parent / 'class_lists'
    for path in (name, os.path.join(folder, name), lists / f'{name}_synsets.txt'):
        if not name or os.path.isfile(path):
            return str(path)
    ours = ', '.join(sorted(path.name.removesuffix('_synsets.txt') for path in lists.iterdir()))
    raise ValueError(f'class_map must be a file of class names or one of {ours}, got {name!r}.')


def _load(file: IO[bytes]) -> Image.Image:
    with file:
        return Image.open(file).convert('RGB')


def _decode(load: Callable[[], Image.Image], name: str) -> Image.Image:
    try:
        return load()
    except Exception as error:  # decoders raise errors of many kinds
        raise UnreadableImage(f'{name} cannot be read: {str(error).rstrip(".")}.') from None
