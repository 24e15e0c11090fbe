"""Runs models on clean and corrupted images and writes their predictions to a results folder."""

import contextlib
import io
import logging
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from PIL import Image
from timm.data import resolve_data_config
from torch.utils.data import DataLoader
from tqdm import tqdm

from ..errors import InputError, WorkerKilledError
from ..files import atomic_write
from .classes import check_labels, describe_targets, label_names, list_some
from .corruptions import check_corruption, import_imagecorruptions
from .data import DatasetImages, StoredArrays, StoredFolders, stratified_indices
from .metrics import CLEAN, SEVERITIES, TEST_CORRUPTIONS
from .protocol import describe_corruptions, describe_images, describe_models, versions
from .store import (
    PREDICTION,
    TOP,
    UNREADABLE,
    example_path,
    lock,
    merge_protocol,
    predictions_path,
    write_images,
    write_predictions,
    write_protocol,
)
from .summary import check_baseline, write_errors, write_summary
from .views import View, Views

__all__ = ['evaluate_robustness']

_logger = logging.getLogger(__name__)
EXAMPLES = 3  # images kept for the report


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
    """Measure the errors of models on clean and corrupted images, and write them to a results folder.

    Each image is decoded once for all models, and corrupted once for all models with the same image size and crop.
    Generated corruptions apply to the resized and cropped image. Stored corruptions are resized, not cropped. An
    interrupted run continues where it stopped. If ``torch.distributed`` is initialized, its processes share the
    batches and the first process writes.

    Args:
        models: Models of timm by name. They stay on ``device``, and in training mode if they were.
        folder: Results folder, made if it does not exist; see :mod:`timm_pushpull.robustness.store`.
        dataset: Clean images, as :func:`~timm_pushpull.open_dataset` returns them. None, with ``stored``, for no clean
            error.
        stored: Corrupted images, as :func:`~timm_pushpull.open_stored` returns them; None to generate them from
            ``dataset``.
        corruptions: Names of corruptions.
        severities: Severities, 1 to 5.
        limit: Number of images, spread over the classes; None for all.
        seed: Seed of generated corruptions.
        baseline: Baseline of relative mCE and R_net, see :func:`~timm_pushpull.robustness.summary.baseline_of`.
        skip_unreadable: Leave out and count unreadable images, instead of stopping at the first.
        data_configs: What ``timm.data.resolve_data_config`` returns for each model. By default the settings of the
            model: at its test size as in ``validate.py``, with stored corruptions at its train size.
        device: Device of the models.
        batch_size: Images in a batch.
        workers: Processes that decode and corrupt, for each process that runs models; 0 to use that process itself.
        amp_dtype: Data type of autocast; None for float32.
        progress: Show a progress bar and the number of images of the classes.

    Returns:
        The rows of ``summary.csv``, see :func:`~timm_pushpull.robustness.summary.summarize`; none in processes other
        than the first.

    Raises:
        ModuleNotFoundError: If corruptions are to be generated and imagecorruptions-imaug is not installed.
        ValueError: If there is no model, or neither ``dataset`` nor ``stored``; if these two hold different images; if
            a model does not fit RGB images, their size, or the number, names or order of the classes; if the images
            are those for training in place of another split; if an image cannot be read; if the folder holds results
            of another protocol; or if a corruption, a severity or the baseline does not exist.
        WorkerKilledError: If the system kills a worker. Finished work is kept.
    """
    folder = Path(folder)
    if not models:
        raise InputError('models must hold at least one model, got none.')
    if batch_size < 1:
        raise InputError(f'batch_size must be at least 1, got {batch_size}.')
    for corruption in corruptions:
        for severity in severities:
            check_corruption(corruption, severity)
    if dataset is None and stored is None:
        raise InputError('dataset must be given unless stored is, got None for both.')
    clean = None if dataset is None else DatasetImages(dataset)
    if clean is not None and stored is not None:
        _check_same_images(clean, stored)
    if stored is None and corruptions:
        import_imagecorruptions()  # fails here, not in each worker
    if data_configs is None:
        data_configs = {
            name: resolve_data_config({}, model=model, use_test_size=stored is None) for name, model in models.items()
        }
    for name, config in data_configs.items():
        if not 0 < config['crop_pct'] < math.inf or not all(0 < value < math.inf for value in config['std']):
            raise InputError(
                f'crop_pct and std of {name} must be positive, got crop_pct={config["crop_pct"]}, std={config["std"]}.'
            )
    if missing := [name for name in models if name not in data_configs]:
        raise InputError(f'data_configs must have an entry for each model, {", ".join(missing)} has none.')
    data_configs = {name: data_configs[name] for name in models}
    views = Views(clean, stored, seed, data_configs, skip_unreadable)
    images = views.images
    notes = images.notes
    for name, model in models.items():
        if model.num_classes != len(images.classes):
            raise InputError(
                f'{name} has {model.num_classes} classes, but the images have {len(images.classes)} '
                f'({list_some(images.classes)}). {" ".join(images.notes)}'.strip()
            )
        notes = [*notes, *filter(None, [check_labels(name, label_names(model), images.classes)])]
    indices = stratified_indices(images.targets, limit)
    passes = [(CLEAN, 0)] if clean is not None else []
    passes += [(corruption, severity) for corruption in corruptions for severity in severities]

    with _in_eval_mode(models, device):
        for name, model in models.items():
            _check_size(name, model, data_configs[name], torch.device(device), amp_dtype)
    plan: list[Any] = [None]
    if _rank() == 0:
        protocol = {
            'corruptions': describe_corruptions(stored, seed),
            'data': describe_images(images, indices, has_clean=clean is not None),
            'versions': versions(),
            'models': describe_models(models, data_configs, amp_dtype, device),
        }
        # Merged here too: what is refused must not make the folder.
        check_baseline(baseline, merge_protocol(folder, protocol)['models'])
        with lock(folder):
            write_protocol(folder, merge_protocol(folder, protocol))
        names, targets = [images.names[index] for index in indices], [images.targets[index] for index in indices]
        write_images(folder, names, targets, images.classes)
        if progress:
            print(describe_targets(images.classes, targets), file=sys.stderr)
        for note in notes:
            _logger.warning(note)
        unfinished = {
            key: [name for name in models if not predictions_path(folder, name, *key).exists()] for key in passes
        }
        plan[0] = {key: names for key, names in unfinished.items() if names}
    if _world_size() > 1:
        dist.broadcast_object_list(plan)
    with _in_eval_mode(models, device), _worker_errors():
        _run(
            plan[0],
            models,
            data_configs,
            views,
            indices,
            folder,
            torch.device(device),
            batch_size,
            workers,
            amp_dtype,
            progress,
        )

    if _rank() > 0:
        return []
    middle = sorted(severities)[len(severities) // 2 :][:1]
    _write_examples(folder, views, indices, [key for key in passes if key[0] == CLEAN or key[1] in middle])
    with lock(folder):
        write_errors(folder)
        return write_summary(folder, baseline)


@contextlib.contextmanager
def _in_eval_mode(models: Mapping[str, nn.Module], device: str | torch.device) -> Iterator[None]:
    modes = [(module, module.training) for model in models.values() for module in model.modules()]
    try:
        for model in models.values():
            model.to(device).eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def _worker_errors() -> Iterator[None]:
    """Say what to do where the system kills a worker, most often for lack of memory."""
    try:
        yield
    except RuntimeError as error:
        if not re.match(r'DataLoader worker \(pid', str(error)):
            raise
        raise WorkerKilledError(
            f'A process that reads images was killed ({str(error).splitlines()[0].rstrip(".")}), most often because '
            'memory ran out. Finished work is kept: repeat the command with fewer workers (--workers) or a smaller '
            'batch (--batch-size).'
        ) from error


def _check_size(
    name: str, model: nn.Module, data_config: Mapping[str, Any], device: torch.device, amp_dtype: torch.dtype | None
) -> None:
    """Refuse a size that a model does not take, such as another than its own for many vision transformers."""
    size = data_config['input_size']
    try:
        _logits(model, torch.zeros(1, *size, dtype=torch.uint8, device=device), data_config, amp_dtype)
    except torch.OutOfMemoryError:
        raise
    except (AssertionError, RuntimeError) as error:
        raise InputError(
            f'{name} does not take images of {"x".join(map(str, size))}: {" ".join(str(error).split())} Give its own '
            f'size (--input-size), or the model argument img_size={size[-1]} (--model-kwargs) if it has one.'
        ) from error


def _run(
    plan: Mapping[tuple[str, int], Sequence[str]],
    models: Mapping[str, nn.Module],
    data_configs: Mapping[str, Mapping[str, Any]],
    views: Views,
    indices: Sequence[int],
    folder: Path,
    device: torch.device,
    batch_size: int,
    workers: int,
    amp_dtype: torch.dtype | None,
    progress: bool,
) -> None:
    """Run each pass (corruption and severity) of the plan with the models that lack it, and write its predictions."""
    # Processes share whole batches: the batches are then the same for any number of processes.
    starts = range(0, len(indices), batch_size)[_rank() :: _world_size()]
    batches = [[View(*key, index) for index in indices[start : start + batch_size]] for key in plan for start in starts]
    # One loader for all passes: its workers start once, and do not wait for a pass to end.
    loader = DataLoader(
        views, batch_sampler=batches, num_workers=workers, pin_memory=device.type == 'cuda', worker_init_fn=_one_thread
    )
    with torch.device('cpu'):  # the loader draws a seed, on the program's default device
        batches_left = iter(loader)
    with tqdm(total=len(batches), unit='batch', disable=not (progress and batches and _rank() == 0)) as bar:
        for (corruption, severity), names in plan.items():
            bar.set_description(f'{corruption} {severity}' if severity else CLEAN)
            predictions: dict[str, list[np.ndarray]] = {name: [] for name in names}
            for start in starts:
                batch, targets = next(batches_left)
                batch = [images.to(device, non_blocking=True) for images in batch]
                for name in names:
                    images = batch[views.geometry[name]]
                    logits = _logits(models[name], images, data_configs[name], amp_dtype)
                    wrong = (~logits.isfinite().all(1).cpu() & (targets >= 0)).nonzero()[:1]
                    if len(wrong):
                        image = views.images.names[indices[start + int(wrong)]]
                        under = f'{corruption} {severity}' if severity else CLEAN
                        raise InputError(f'{name} gives logits that are not finite for image {image} ({under}).')
                    predictions[name].append(_predict(logits, targets))
                bar.update()
            for name, array in _gather(predictions).items():
                write_predictions(predictions_path(folder, name, corruption, severity), array)
            if _rank() == 0:
                with lock(folder):
                    write_errors(folder)


def _one_thread(worker: int) -> None:
    """Keep OpenCV, which some corruptions call, from starting threads in every worker."""
    if 'cv2' in sys.modules:
        sys.modules['cv2'].setNumThreads(0)


@torch.inference_mode()
def _logits(
    model: nn.Module, images: torch.Tensor, data_config: Mapping[str, Any], amp_dtype: torch.dtype | None
) -> torch.Tensor:
    # The arithmetic of timm's prefetcher.
    mean, std = (
        255 * torch.tensor(data_config[key], dtype=torch.float32, device=images.device).view(-1, 1, 1)
        for key in ('mean', 'std')
    )
    with torch.autocast(images.device.type, amp_dtype, enabled=amp_dtype is not None):
        return model(images.float().sub_(mean).div_(std))


def _predict(logits: torch.Tensor, targets: torch.Tensor) -> np.ndarray:
    first = logits.topk(min(TOP, logits.shape[1])).indices.cpu()
    right = first == targets[:, None]
    predictions = np.empty(len(targets), PREDICTION)
    predictions['prediction'] = first[:, 0]
    predictions['rank'] = torch.where(right.any(1), right.int().argmax(1), TOP)
    predictions[(targets < 0).numpy()] = (0, UNREADABLE)
    return predictions


def _gather(predictions: Mapping[str, list[np.ndarray]]) -> dict[str, np.ndarray]:
    """Join the batches of all processes in their order; only the first process gets them."""
    parts: list[Any] = [predictions]
    if _world_size() > 1:
        parts = [None] * _world_size()
        dist.all_gather_object(parts, predictions)
    if _rank() > 0:
        return {}
    joined = {}
    for name in predictions:
        batches = [part[name] for part in parts]  # of each process
        turns = range(len(batches[0]))  # the first process has the most batches
        joined[name] = np.concatenate([part[turn] for turn in turns for part in batches if turn < len(part)])
    return joined


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _write_examples(folder: Path, views: Views, indices: Sequence[int], keys: Sequence[tuple[str, int]]) -> None:
    """Keep a few images as the first model sees them, clean and corrupted."""
    count = len(indices)
    for row in sorted({(2 * number + 1) * count // (2 * EXAMPLES) for number in range(EXAMPLES)}):
        for corruption, severity in keys:
            path = example_path(folder, corruption, severity, row)
            if not path.exists():
                images, target = views[View(corruption, severity, indices[row])]
                if target >= 0:
                    buffer = io.BytesIO()
                    Image.fromarray(images[0].permute(1, 2, 0).numpy()).save(buffer, 'png')
                    atomic_write(path, buffer.getvalue())


def _check_same_images(clean: DatasetImages, stored: StoredFolders | StoredArrays) -> None:
    if len(clean.targets) != len(stored.targets):
        raise InputError(f'dataset has {len(clean.targets)} images, but stored has {len(stored.targets)}.')
    for index, (ours, theirs) in enumerate(zip(_identities(clean), _identities(stored), strict=True)):
        if ours != theirs:
            raise InputError(
                f'dataset and stored must hold the same images in the same order; image {index} is '
                f'{clean.names[index]} of class {clean.targets[index]} in dataset, '
                f'{stored.names[index]} of class {stored.targets[index]} in stored.'
            )


def _identities(images: DatasetImages | StoredFolders | StoredArrays) -> list[tuple[str, int]]:
    """Return the file stem and class of each image; folders and suffixes may differ."""
    return list(zip((Path(name).stem for name in images.names), images.targets, strict=True))
