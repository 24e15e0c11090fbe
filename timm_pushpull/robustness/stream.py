"""Images of a stream (``wds/``, ``hfids/``, ``tfds/``), kept on disk: each pass of an evaluation reads them again."""

import hashlib
import io
import json
import logging
import os
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.data import Dataset
from tqdm import tqdm

from ..errors import InputError
from ..fields import COUNT, INTEGER, MAPPING, TEXT, Kind, check_fields, optional, read_mapping
from ..files import atomic_write
from .data import to_rgb

__all__ = ['StreamedImages', 'keep_stream']

_logger = logging.getLogger(__name__)
DESCRIPTION = 'stream.json'
INDICES = Kind('indices of classes', lambda value: isinstance(value, list) and all(map(INTEGER.fits, value)))


class StreamedImages(Dataset):
    """The images of a stream in their order; the place of an image is its count in the stream, from 0.

    Args:
        folder: Folder that :func:`keep_stream` wrote.

    Attributes:
        targets: Class index of each image.
        class_to_idx: Index of each class by its name; none where the stream has no names.
        stream_sha256: Hash of all pixels.

    Raises:
        ValueError: If the folder holds no images of a stream.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder = Path(folder)
        stream = _read_stream(self._folder)
        self.targets, self.class_to_idx, self.stream_sha256 = stream['targets'], stream['classes'], stream['sha256']

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.open(_image_path(self._folder, index)), self.targets[index]


def keep_stream(dataset: Any, folder: str | os.PathLike[str], limit: int | None = None, progress: bool = False) -> None:
    """Read the first images of a stream and write them to a folder, unless the folder has them.

    Args:
        dataset: What ``timm.data.create_dataset`` returns for a stream, without a transform.
        folder: Folder of the images, made if it does not exist.
        limit: Number of images; None for all.
        progress: Show a progress bar.

    Raises:
        ValueError: If the stream gives no images, or each process a share of them; if the limit is not positive; or if
            the folder has the images of another stream, with other classes, or fewer.
    """
    folder, reader = Path(folder), getattr(dataset, 'reader', None)
    source = ' '.join(str(getattr(reader, field, '')) for field in ('root', 'name', 'split', 'split_info'))
    source = f'{type(reader or dataset).__name__} {source}'
    classes = getattr(reader, 'class_to_idx', None) or {}
    if (folder / DESCRIPTION).exists():
        kept = _read_stream(folder)
        if (kept['source'], kept['classes']) != (source, classes):
            raise InputError(f'{folder} has the images of another stream: name another results folder.')
        if kept.get('limit') is not None and (limit is None or limit > kept['limit']):
            raise InputError(f'{folder} has the first {kept["limit"]} images alone: name another results folder.')
        return
    if getattr(reader, 'dist_num_replicas', 1) > 1:
        raise InputError('dataset, a stream, must be opened before torch.distributed is initialized.')
    if limit is not None and limit < 1:
        raise InputError(f'limit must be at least 1, got {limit}.')
    if reader is not None:
        reader.input_img_mode = ''  # to_rgb converts images of 16 bits, timm would make them white
    targets, digest = [], hashlib.sha256()
    for place, (image, target) in enumerate(tqdm(islice(dataset, limit), 'stream', unit='image', disable=not progress)):
        rgb, buffer = to_rgb(image), io.BytesIO()
        rgb.save(buffer, 'png', compress_level=1)
        atomic_write(_image_path(folder, place), buffer.getvalue())
        targets.append(int(target))
        digest.update(f'{rgb.size}'.encode() + rgb.tobytes())
    if not targets:
        raise InputError(f'dataset gives no images: {source}.')
    if limit is None and len(targets) < len(dataset):
        _logger.warning(
            f'The stream gave {len(targets):,} of {len(dataset):,} images: timm leaves out unreadable ones.'
        )
    stream = {'source': source, 'limit': limit, 'sha256': digest.hexdigest(), 'classes': classes, 'targets': targets}
    atomic_write(folder / DESCRIPTION, json.dumps(stream).encode())  # last: it says that the images are complete


def _read_stream(folder: Path) -> dict[str, Any]:
    path = folder / DESCRIPTION
    stream = read_mapping(path)
    kinds = {'source': TEXT, 'limit': optional(COUNT), 'sha256': TEXT, 'classes': MAPPING, 'targets': INDICES}
    check_fields(path, stream, kinds)
    check_fields(path, stream['classes'], dict.fromkeys(stream['classes'], INTEGER), 'classes')
    return stream


def _image_path(folder: Path, place: int) -> Path:
    return folder / f'{place}.png'
