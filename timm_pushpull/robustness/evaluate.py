"""Evaluation of timm models on clean pictures and on corrupted ones, stored or generated."""

import hashlib
import importlib.metadata
import io
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from .corruptions import SEVERITIES, check_corruption, corrupt, import_imagecorruptions
from ..files import atomic_write
from .metrics import TEST_CORRUPTIONS
from .data import DatasetImages, StoredArrays, StoredFolders, UnreadableImage
from .store import (
    ANSWER,
    CLEAN,
    TOP,
    UNREAD,
    predictions_path,
    join_protocol,
    write_predictions,
    write_errors,
    write_images,
    write_summary,
)

__all__ = ['evaluate_robustness', 'hash_modules', 'hash_weights', 'stratified_indices']

EXAMPLES = 3  # pictures kept for the report


def evaluate_robustness(
    models: Mapping[str, nn.Module],
    folder: str | os.PathLike[str],
    dataset: Any = None,
    stored: StoredFolders | StoredArrays | None = None,
    corruptions: Sequence[str] = TEST_CORRUPTIONS,
    severities: Sequence[int] = SEVERITIES,
    limit: int | None = None,
    seed: int = 0,
    baseline: str | None = None,
    skip_unreadable: bool = False,
    data_configs: Mapping[str, Mapping[str, Any]] | None = None,
    device: str | torch.device = 'cpu',
    batch_size: int = 64,
    workers: int = 0,
    amp_dtype: torch.dtype | None = None,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """Count the errors of models on clean and on corrupted pictures, and write them to a results folder.

    Each picture is decoded and corrupted once and shown to all the models; models that take it at another size or crop
    cost it once more for each. Generated corruptions apply to the resized and cropped picture; stored ones are resized
    where the model takes another size, and not cropped. A run that was interrupted goes on where it was. Where
    ``torch.distributed`` is initialized its processes share the batches, and the first one writes.

    Args:
        models: Models of timm by name.
        folder: Results folder, made if it does not exist; see :mod:`timm_pushpull.robustness.store`.
        dataset: Clean pictures: timm's dataset without a transform (``timm.data.create_dataset``). None, with stored
            corruptions, for no clean error.
        stored: Corrupted pictures (``open_stored``); None to generate them from the dataset.
        corruptions: Names of corruptions.
        severities: From 1 to 5.
        limit: Number of pictures, with as many of each class as can be; None for all.
        seed: Number of the draw of generated corruptions.
        baseline: What relative mCE and R_net are measured against, see :func:`~timm_pushpull.robustness.store.baseline_of`.
        skip_unreadable: Count pictures that cannot be read, instead of stopping at the first.
        data_configs: What ``timm.data.resolve_data_config`` returns, by model. By default that of the model: at its
            test size as ``validate.py``, at its train size with stored corruptions.
        device: Where the models run.
        batch_size: Pictures at a time.
        workers: Processes that decode and corrupt, for each process that runs the models; 0 for that one.
        amp_dtype: Data type of autocast; None for float32.
        progress: Show the progress.

    Returns:
        The rows of ``summary.csv``.

    Raises:
        ModuleNotFoundError: If corruptions are to be generated and imagecorruptions-imaug is not installed.
        ValueError: If there is neither a dataset nor stored pictures or these are not of the same pictures, if the
            models' classes are not the data's, if a picture cannot be read, if the folder was made under another
            protocol, or if a corruption, a severity or the baseline does not exist.
    """
    folder = Path(folder)
    if batch_size < 1:
        raise ValueError(f'batch_size must be at least 1, got {batch_size}.')
    for corruption in corruptions:
        for severity in severities:
            check_corruption(corruption, severity)
    clean = None if dataset is None else DatasetImages(dataset)
    pictures = clean or stored
    if pictures is None:
        raise ValueError('dataset must be given where there are no stored corruptions, got None.')
    if clean is not None and stored is not None:
        _check_same_pictures(clean, stored)
    if stored is None and corruptions:
        import_imagecorruptions()  # here, not in each worker
    for name, model in models.items():
        if model.num_classes != len(pictures.classes):
            raise ValueError(f'{name} has {model.num_classes} classes, the data {len(pictures.classes)}.')
    if data_configs is None:
        configs = {
            name: resolve_data_config({}, model=model, use_test_size=stored is None) for name, model in models.items()
        }
    else:
        configs = {name: dict(data_configs[name]) for name in models}
    indices = stratified_indices(pictures.targets, limit)
    views = _Views(pictures, clean, stored, indices, seed, configs, skip_unreadable)
    passes = [(CLEAN, 0)] if clean is not None else []
    passes += [(corruption, severity) for corruption in corruptions for severity in severities]

    plan: list[Any] = [None]
    if _rank() == 0:
        protocol = _protocol(models, configs, views, amp_dtype, device)
        join_protocol(folder, protocol, baseline)
        names, targets = [pictures.names[i] for i in indices], [pictures.targets[i] for i in indices]
        write_images(folder, names, targets, pictures.classes)
        plan[0] = [
            (of_pass, todo)
            for of_pass in passes
            if (todo := [name for name in models if not predictions_path(folder, name, *of_pass).exists()])
        ]
    if _world_size() > 1:
        dist.broadcast_object_list(plan)
    _run(plan[0], models, configs, views, folder, torch.device(device), batch_size, workers, amp_dtype, progress)

    if _rank() > 0:
        return []
    _write_examples(folder, views, corruptions, severities)
    write_errors(folder)
    return write_summary(folder, baseline)


def stratified_indices(targets: Sequence[int], limit: int | None = None) -> list[int]:
    """Choose pictures with as many of each class as can be: the first of each class, then the second, and so on.

    Args:
        targets: Class of each picture.
        limit: Number of pictures; None for all.

    Returns:
        Their places, ascending.

    Raises:
        ValueError: If the limit is not positive.
    """
    if limit is None:
        return list(range(len(targets)))
    if limit < 1:
        raise ValueError(f'limit must be at least 1, got {limit}.')
    seen: dict[int, int] = {}
    turns = []
    for index, target in enumerate(targets):
        seen[target] = seen.get(target, 0) + 1
        turns.append((seen[target], target, index))
    return sorted(index for _, _, index in sorted(turns)[:limit])


class _View(NamedTuple):
    """What a loader is asked for: one picture in one pass."""

    corruption: str
    severity: int
    place: int


class _Views(Dataset):
    """The pictures as the models see them, uint8 (C, H, W), one for each way in which a model takes them."""

    def __init__(
        self,
        pictures: DatasetImages | StoredFolders | StoredArrays,
        clean: DatasetImages | None,
        stored: StoredFolders | StoredArrays | None,
        indices: Sequence[int],
        seed: int,
        configs: Mapping[str, Mapping[str, Any]],
        skip_unreadable: bool,
    ) -> None:
        self.pictures, self.clean, self.stored = pictures, clean, stored
        self.indices, self.seed, self.skip_unreadable = indices, seed, skip_unreadable
        geometries: list[dict[str, Any]] = []
        self.geometry_of = {}
        for name, config in configs.items():
            geometry = {key: config[key] for key in ('input_size', 'crop_pct', 'crop_mode', 'interpolation')}
            if geometry['input_size'][0] != 3:
                raise ValueError(f'{name} takes {geometry["input_size"][0]} channels; corruptions are of 3, RGB.')
            if geometry not in geometries:
                geometries.append(geometry)
            self.geometry_of[name] = geometries.index(geometry)
        self._sizes = [geometry['input_size'] for geometry in geometries]
        self._resize_and_crop = [_transforms(geometry) for geometry in geometries]
        # Stored pictures have been cropped by those who made them.
        self._resize = [_transforms({**geometry, 'crop_pct': 1.0}) for geometry in geometries]

    def __getitem__(self, view: _View) -> tuple[list[torch.Tensor], int]:
        try:
            images = self._images(view)
        except UnreadableImage as error:
            if not self.skip_unreadable:
                raise UnreadableImage(
                    f'{error} Such pictures can be left out and counted (skip_unreadable).'
                ) from None
            return [torch.zeros(size, dtype=torch.uint8) for size in self._sizes], -1
        target = self.pictures.targets[view.place]
        return [torch.from_numpy(image.copy()).permute(2, 0, 1) for image in images], target

    def _images(self, view: _View) -> list[np.ndarray]:
        is_clean = view.corruption == CLEAN
        if self.stored is not None and not is_clean:
            image, transforms = self.stored.image(*view), self._resize
        else:
            assert self.clean is not None, 'no clean pictures, no such view'
            image, transforms = self.clean.image(view.place), self._resize_and_crop
        images = []
        for steps in transforms:
            shown = image
            for step in steps:
                shown = step(shown)
            if self.stored is None and not is_clean:
                shown = corrupt(shown, *view, self.seed)
            images.append(np.asarray(shown))
        return images


def _transforms(geometry: Mapping[str, Any]) -> list[Any]:
    """timm's resize and crop, without the conversion to a tensor."""
    return create_transform(**geometry, is_training=False, normalize=False).transforms[:-1]


def _run(
    plan: Sequence[tuple[tuple[str, int], Sequence[str]]],
    models: Mapping[str, nn.Module],
    configs: Mapping[str, Mapping[str, Any]],
    views: _Views,
    folder: Path,
    device: torch.device,
    batch_size: int,
    workers: int,
    amp_dtype: torch.dtype | None,
    progress: bool,
) -> None:
    """Run the passes that are planned, each with the models that lack it, and write the answers of each as it ends."""
    for model in models.values():
        model.to(device).eval()
    places = range(0, len(views.indices), batch_size)
    # Whole batches are shared, so that each is the same in one process and in many.
    mine = places[_rank() :: _world_size()]
    batches = [
        [_View(*of_pass, index) for index in views.indices[place : place + batch_size]]
        for of_pass, _ in plan
        for place in mine
    ]
    # One loader for all passes: its workers start once and do not wait for one pass to end.
    loader = DataLoader(
        views, batch_sampler=batches, num_workers=workers, pin_memory=device.type == 'cuda', worker_init_fn=_one_thread
    )
    arriving = iter(loader)
    with tqdm(total=len(batches), unit='batch', disable=not (progress and batches and _rank() == 0)) as bar:
        for (corruption, severity), todo in plan:
            bar.set_description(f'{corruption} {severity}' if severity else CLEAN)
            answers: dict[str, list[np.ndarray]] = {name: [] for name in todo}
            for _ in mine:
                images, targets = next(arriving)
                images = [image.to(device, non_blocking=True) for image in images]
                for name in todo:
                    shown = images[views.geometry_of[name]]
                    answers[name].append(_answer(models[name], shown, targets, configs[name], amp_dtype))
                bar.update()
            for name, of_model in _in_order(answers).items():
                write_predictions(predictions_path(folder, name, corruption, severity), of_model)
            if _rank() == 0:
                write_errors(folder)


def _one_thread(worker: int) -> None:
    """Keep OpenCV, which some corruptions call, from starting threads in every worker."""
    if 'cv2' in sys.modules:
        sys.modules['cv2'].setNumThreads(0)


@torch.inference_mode()
def _answer(
    model: nn.Module,
    images: torch.Tensor,
    targets: torch.Tensor,
    config: Mapping[str, Any],
    amp_dtype: torch.dtype | None,
) -> np.ndarray:
    # timm's own arithmetic, that of its prefetcher.
    mean, std = (255 * torch.tensor(config[key], device=images.device).view(-1, 1, 1) for key in ('mean', 'std'))
    with torch.autocast(images.device.type, amp_dtype, enabled=amp_dtype is not None):
        logits = model(images.float().sub_(mean).div_(std))
    first = logits.topk(min(TOP, logits.shape[1])).indices.cpu()
    right = first == targets[:, None]
    answers = np.empty(len(targets), ANSWER)
    answers['answer'] = first[:, 0]
    answers['place'] = torch.where(right.any(1), right.int().argmax(1), TOP)
    answers[(targets < 0).numpy()] = (0, UNREAD)
    return answers


def _in_order(answers: Mapping[str, list[np.ndarray]]) -> dict[str, np.ndarray]:
    """Bring the batches of all processes together in the first one; the others get nothing."""
    shares: list[Any] = [answers]
    if _world_size() > 1:
        shares = [None] * _world_size()
        dist.all_gather_object(shares, answers)
    if _rank() > 0:
        return {}
    ordered = {}
    for name in answers:
        of_processes = [share[name] for share in shares]
        turns = range(len(of_processes[0]))  # the first process has as many batches as any
        ordered[name] = np.concatenate([share[turn] for turn in turns for share in of_processes if turn < len(share)])
    return ordered


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _write_examples(folder: Path, views: _Views, corruptions: Sequence[str], severities: Sequence[int]) -> None:
    """Keep a few pictures as the first model sees them, at the middle severity."""
    count = len(views.indices)
    severity = sorted(severities)[len(severities) // 2] if severities else 0
    passes = [(CLEAN, 0)] if views.clean is not None else []
    passes += [(corruption, severity) for corruption in corruptions]
    for place in sorted({(2 * turn + 1) * count // (2 * EXAMPLES) for turn in range(EXAMPLES)}):
        for of_pass in passes:
            path = folder / 'examples' / f'{of_pass[0]}-{of_pass[1]}-{place}.png'
            if not path.exists():
                images, target = views[_View(*of_pass, views.indices[place])]
                if target >= 0:
                    buffer = io.BytesIO()
                    Image.fromarray(images[0].permute(1, 2, 0).numpy()).save(buffer, 'png')
                    atomic_write(path, buffer.getvalue())


def _check_same_pictures(clean: DatasetImages, stored: StoredFolders | StoredArrays) -> None:
    if len(clean.targets) != len(stored.targets):
        raise ValueError(f'dataset has {len(clean.targets)} pictures, the stored corruptions {len(stored.targets)}.')
    for place, (ours, theirs) in enumerate(zip(_identities(clean), _identities(stored), strict=True)):
        if ours != theirs:
            raise ValueError(
                'dataset and stored corruptions must hold the same pictures in the same order; '
                f'picture {place} is {clean.names[place]} of class {clean.targets[place]} here '
                f'and {stored.names[place]} of class {stored.targets[place]} there.'
            )


def _identities(pictures: DatasetImages | StoredFolders | StoredArrays) -> list[tuple[str, int]]:
    """Name, without folder and ending, and class of each picture; the endings may differ between the two."""
    stems = (Path(name).stem for name in pictures.names)
    return list(zip(stems, pictures.targets, strict=True))


def _protocol(
    models: Mapping[str, nn.Module],
    configs: Mapping[str, Mapping[str, Any]],
    views: _Views,
    amp_dtype: torch.dtype | None,
    device: str | torch.device,
) -> dict[str, Any]:
    pictures, indices = views.pictures, views.indices
    names = '\n'.join(f'{pictures.names[index]} {pictures.targets[index]}' for index in indices)
    if views.stored is None:
        corruptions: dict[str, Any] = {
            'generated_by': f'imagecorruptions-imaug {_version("imagecorruptions-imaug")}',
            'seed': views.seed,
            'applied_to': 'the resized and cropped picture',
        }
    else:
        corruptions = {
            'stored_as': views.stored.layout,
            'stored_names_sha256': _sha256('\n'.join(views.stored.names)),
            'crop': 'none: short side to input_size, centre',
        }
    classes = len(pictures.classes)
    return {
        'corruptions': corruptions,
        'data': {
            'images': len(indices),
            'classes': classes,
            'imagenet_1k': classes == 1000 == len(set(pictures.targets)),
            'clean': views.clean is not None,
            'names_sha256': _sha256(names),
        },
        'versions': {name: _version(name) for name in ('timm-pushpull', 'timm', 'torch', 'numpy', 'pillow')},
        'models': {
            name: {
                'architecture': (getattr(model, 'pretrained_cfg', None) or {}).get('architecture'),
                # What timm keeps of create_model's arguments, since 1.0.31.
                'model_args': {key: str(value) for key, value in getattr(model, '_model_args', {}).items()},
                **configs[name],
                'param_count': round(sum(p.numel() for p in model.parameters()) / 1e6, 2),
                'weights_sha256': hash_weights(model),
                # What the weights do not hold, such as a fixed alpha or the averaging window.
                'modules_sha256': hash_modules(model),
                'precision': str(amp_dtype or torch.float32).removeprefix('torch.'),
                'device': torch.device(device).type,
            }
            for name, model in models.items()
        },
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def hash_modules(model: nn.Module) -> str:
    """Compute the checksum of a model's modules and their settings, as far as PyTorch prints them.

    Args:
        model: The model.

    Returns:
        SHA-256 in hexadecimal digits.
    """
    return _sha256(re.sub(' at 0x[0-9a-f]+', '', str(model)))  # functions print their address


def hash_weights(model: nn.Module) -> str:
    """Compute the checksum of a model's weights and buffers: names, data types, shapes and values.

    Args:
        model: The model.

    Returns:
        SHA-256 in hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f'{name} {tensor.dtype} {tuple(tensor.shape)}'.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
