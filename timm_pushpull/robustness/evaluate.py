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
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from PIL import Image
from timm.data import resolve_data_config
from torch.utils.data import DataLoader, IterableDataset
from tqdm import tqdm

from ..errors import InputError, WorkerKilledError
from ..files import atomic_write
from .adaptation import adapted_batch_norm, adapted_name, check_adaptation
from .calibration import brier_scores, negative_log_likelihoods
from .classes import describe_targets
from .corruptions import check_corruption, import_imagecorruptions
from .data import DatasetImages, StoredArrays, StoredFolders, stratified_indices
from .labels import find_model_classes, find_right_classes, read_real_labels, read_valid_labels
from .metrics import CLEAN, SEVERITIES, TEST_CORRUPTIONS
from .protocol import describe_corruptions, describe_images, describe_models, versions
from .shifts import shift_rows
from .store import (
    PREDICTION,
    TOP,
    UNREADABLE,
    example_path,
    find_examples,
    lock,
    merge_protocol,
    predictions_path,
    shifted_folder,
    write_csv,
    write_images,
    write_predictions,
    write_protocol,
)
from .stream import StreamedImages, keep_stream
from .summary import check_baseline, write_errors, write_summary
from .timm_tables import write_timm_tables
from .views import View, Views

__all__ = ['evaluate_robustness']

_logger = logging.getLogger(__name__)
EXAMPLES = 3  # images kept for the report
ORDER_SEED = 0  # shuffles the images for adapt_batch_norm: in folder order a batch holds one class


def evaluate_robustness(
    models: Mapping[str, nn.Module],
    folder: str | os.PathLike[str],
    dataset: Any = None,
    stored: StoredFolders | StoredArrays | None = None,
    shifted: Mapping[str, Any] | None = None,
    corruptions: Sequence[str] = TEST_CORRUPTIONS,
    severities: Sequence[int] = SEVERITIES,
    limit: int | None = None,
    seed: int = 0,
    valid_labels: str | os.PathLike[str] | None = None,
    real_labels: str | os.PathLike[str] | None = None,
    baseline: str | None = None,
    adapt_batch_norm: int | None = None,
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

    Where a model has more classes than the images, its predictions are restricted to the classes of the images, see
    :func:`~timm_pushpull.robustness.labels.find_model_classes`. A class map of all classes of the model, such as
    ``imagenet_1000``, keeps the predictions among all.

    Args:
        models: Models of timm by name. They stay on ``device``, and in training mode if they were.
        folder: Results folder, made if it does not exist; see :mod:`timm_pushpull.robustness.store`.
        dataset: Clean images, as :func:`~timm_pushpull.open_dataset` returns them. None, with ``stored``, for no clean
            error. Images of a stream are read once and kept in the folder.
        stored: Corrupted images, as :func:`~timm_pushpull.open_stored` returns them; None to generate them from
            ``dataset``.
        shifted: Naturally shifted images by name, such as ImageNet-A, each as
            :func:`~timm_pushpull.open_dataset` returns them: measured beside the clean images, without corruptions.
        corruptions: Names of corruptions: those that can be generated, or those with which ``stored`` was opened.
        severities: Severities, 1 to 5.
        limit: Number of images of each set, spread over the classes, or the first of a stream; None for all.
        seed: Seed of generated corruptions.
        valid_labels: File with the logit index of each image class, as ``validate.py`` takes it; None to find the
            classes by their names.
        real_labels: File of ImageNet-ReaL labels, as ``validate.py`` takes it, in place of the labels of the images.
            Images without a right class are left out.
        baseline: Baseline of relative mCE and R_net, see :func:`~timm_pushpull.robustness.summary.baseline_of`.
        adapt_batch_norm: Measure each model twice: unchanged, and as ``MODEL+bnN`` with its running BatchNorm
            statistics blended with those of each batch. N: weight of the running statistics, in images; see
            :func:`~timm_pushpull.robustness.adaptation.adapted_batch_norm`. The batches then hold the images in an
            order drawn once, and their size is a part of the protocol.
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
            a model does not fit RGB images, their size, or the number, names or order of the classes; if a file of
            labels is wrong, or not of these images; if the images are those for training in place of another split; if
            an image cannot be read; if a model has no BatchNorm to adapt; if the folder holds results of another
            protocol, or of other images with the same names; or if a corruption, a severity or the baseline does not
            exist.
        WorkerKilledError: If the system kills a worker. Finished work is kept.
    """
    folder = Path(folder)
    if not models:
        raise InputError('models must hold at least one model, got none.')
    if batch_size < 1:
        raise InputError(f'batch_size must be at least 1, got {batch_size}.')
    for name, value in (('workers', workers), ('seed', seed)):
        if value < 0:
            raise InputError(f'{name} must be 0 or more, got {value}.')
    passes = [(corruption, severity) for corruption in corruptions for severity in severities]
    for corruption, severity in passes:
        if stored is None:
            check_corruption(corruption, severity)
        elif (corruption, severity) not in stored.passes:
            raise InputError(f'stored must be opened with {corruption} at severity {severity}.')
    if dataset is None and stored is None:
        raise InputError('dataset must be given unless stored is, got None for both.')
    clean = None if dataset is None else _open_images(dataset, folder, limit, progress)
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
    source_images, adapted = adapt_batch_norm or 0, {}
    if adapt_batch_norm is not None:
        for name, model in models.items():
            check_adaptation(name, model, source_images)
            twin = adapted_name(name, source_images)
            if twin in models:
                raise InputError(f'models must not have the label {twin}: rename it, adapt_batch_norm adds that name.')
            adapted[twin], data_configs[twin] = name, data_configs[name]
    device = torch.device(device)
    run = _Run(models, data_configs, adapted, source_images, device, batch_size, workers, amp_dtype, progress)
    if clean is not None:
        passes = [(CLEAN, 0), *passes]
    views = Views(clean, stored, seed, data_configs, skip_unreadable)
    source = describe_corruptions(stored, seed)
    sets = [_prepare(run, folder, views, passes, source, limit, valid_labels, real_labels)]
    for name, shift in (shifted or {}).items():
        shift_folder = shifted_folder(folder, name)
        try:
            views = Views(_open_images(shift, shift_folder, limit, progress), None, seed, data_configs, skip_unreadable)
            sets.append(_prepare(run, shift_folder, views, [(CLEAN, 0)], {'shift': name}, limit))
        except InputError as error:
            raise InputError(f'shifted {name}: {error}') from None
    with _in_eval_mode(models, device):
        for name, model in models.items():
            _check_size(name, model, data_configs[name], run.device, amp_dtype)
    if _rank() == 0:
        # Merged before a folder is made: what is refused must not make it.
        merged = [merge_protocol(images.folder, images.protocol) for images in sets]
        check_baseline(baseline, merged[0]['models'])
        for images, protocol in zip(sets, merged, strict=True):
            _check_examples(images, protocol['models'])
    for images in sets:
        _measure(run, images)
    if _rank() > 0:
        return []
    with lock(folder):
        if shifted:
            write_csv(folder / 'shifted.csv', shift_rows(folder))
            for images in sets[1:]:
                write_summary(images.folder)
        write_timm_tables(folder)
        return write_summary(folder, baseline)


def _open_images(dataset: Any, folder: Path, limit: int | None, progress: bool) -> DatasetImages:
    if not isinstance(dataset, IterableDataset):
        return DatasetImages(dataset)
    if _rank() == 0:
        with lock(folder):
            keep_stream(dataset, folder / 'stream', limit, progress)
    if _world_size() > 1:
        dist.barrier()
    return DatasetImages(StreamedImages(folder / 'stream'))


class _Run(NamedTuple):
    """Models, and how they run."""

    models: Mapping[str, nn.Module]
    data_configs: Mapping[str, Mapping[str, Any]]
    adapted: Mapping[str, str]
    """Maps ``MODEL+bnN`` to ``MODEL``."""
    source_images: int
    """Weight of the running statistics then, in images."""
    device: torch.device
    batch_size: int
    workers: int
    amp_dtype: torch.dtype | None
    progress: bool


class _Images(NamedTuple):
    """Images that the models see, and the passes (corruption and severity) over them."""

    folder: Path
    """Results folder of these images."""
    views: Views
    indices: list[int]
    passes: list[tuple[str, int]]
    right: list[list[int]]
    """Right classes of each image in ``views``."""
    valid_labels: dict[str, list[int] | None]
    """For each model the logit index per image class, None for all logits."""
    notes: list[str]
    protocol: dict[str, Any]


def _prepare(
    run: _Run,
    folder: Path,
    views: Views,
    passes: list[tuple[str, int]],
    corruptions: dict[str, Any],
    limit: int | None,
    valid_labels: str | os.PathLike[str] | None = None,
    real_labels: str | os.PathLike[str] | None = None,
) -> _Images:
    """Choose the images, and match their classes with those of the models."""
    images = views.images
    valid = None if valid_labels is None else read_valid_labels(valid_labels)
    found = {name: find_model_classes(name, model, images, valid) for name, model in run.models.items()}
    labels_of = {name: classes.valid_labels for name, classes in found.items()}
    notes = [*images.notes, *(classes.note for classes in found.values() if classes.note)]
    right = [[target] for target in images.targets]
    if real_labels is not None:
        right = find_right_classes(read_real_labels(real_labels), images.names, images.classes, valid)
    labeled = [index for index, labels in enumerate(right) if labels]
    if len(labeled) < len(right):
        notes.append(f'Images left out, because no real label is among the classes: {len(right) - len(labeled):,}.')
    indices = [labeled[place] for place in stratified_indices([images.targets[index] for index in labeled], limit)]
    described = describe_models(run.models, run.data_configs, labels_of, run.amp_dtype, run.device)
    batch_size = min(run.batch_size, len(indices))
    adaptation = {'source_images': run.source_images, 'batch_size': batch_size, 'order_seed': ORDER_SEED}
    for twin, name in run.adapted.items():
        labels_of[twin] = labels_of[name]
        described[twin] = {**described[name], 'adapt_batch_norm': adaptation}
    protocol = {
        'corruptions': corruptions,
        'data': describe_images(images, indices, (CLEAN, 0) in passes, real_labels),
        'versions': versions(),
        'models': described,
    }
    return _Images(folder, views, indices, passes, right, labels_of, notes, protocol)


def _measure(run: _Run, images: _Images) -> None:
    """Run the passes that the folder lacks, and write its tables."""
    folder = images.folder
    plan: list[Any] = [None]
    if _rank() == 0:
        with lock(folder):
            write_protocol(folder, merge_protocol(folder, images.protocol))
        source = images.views.images
        targets = [source.targets[index] for index in images.indices]
        write_images(folder, [source.names[index] for index in images.indices], targets, source.classes)
        if run.progress:
            of_set = f'{shift}: ' if (shift := images.protocol['corruptions'].get('shift')) else ''
            print(of_set + describe_targets(source.classes, targets), file=sys.stderr)
        for note in images.notes:
            _logger.warning(note)
        unfinished = {
            key: [name for name in (*run.models, *run.adapted) if not predictions_path(folder, name, *key).exists()]
            for key in images.passes
        }
        plan[0] = {key: names for key, names in unfinished.items() if names}
    if _world_size() > 1:
        dist.broadcast_object_list(plan)
    with _in_eval_mode(run.models, run.device), _worker_errors():
        _run_passes(plan[0], run, images)
    if _rank() > 0:
        return
    severities = sorted({severity for _, severity in images.passes if severity})
    middle = severities[len(severities) // 2 :][:1]
    _write_examples(images, [key for key in images.passes if key[0] == CLEAN or key[1] in middle])
    with lock(folder):
        write_errors(folder)


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
    except (ConnectionError, EOFError, RuntimeError) as error:  # the first two from the pipe of the worker
        if isinstance(error, RuntimeError) and not re.match(r'DataLoader worker \(pid', str(error)):
            raise
        cause = (str(error) or repr(error)).splitlines()[0].rstrip('.')
        raise WorkerKilledError(
            f'A process that reads images was killed ({cause}), most often because memory ran out. Finished work is '
            'kept: repeat the command with fewer workers (--workers) or a smaller batch (--batch-size).'
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


def _run_passes(plan: Mapping[tuple[str, int], Sequence[str]], run: _Run, images: _Images) -> None:
    """Run each pass of the plan with the models that lack it, and write its predictions."""
    folder, views, indices, size = images.folder, images.views, images.indices, run.batch_size
    # Processes share whole batches: the batches are then the same for any number of processes.
    starts = range(0, len(indices), size)[_rank() :: _world_size()]
    order = np.arange(len(indices))
    if run.adapted:
        order = np.random.default_rng(ORDER_SEED).permutation(order)
    indices = [indices[place] for place in order]
    batches = [[View(*key, index) for index in indices[start : start + size]] for key in plan for start in starts]
    # One loader for all passes: its workers start once, and do not wait for a pass to end.
    pin = run.device.type == 'cuda'
    loader = DataLoader(
        views, batch_sampler=batches, num_workers=run.workers, pin_memory=pin, worker_init_fn=_one_thread
    )
    with torch.device('cpu'):  # the loader draws a seed, on the program's default device
        batches_left = iter(loader)
    with tqdm(total=len(batches), unit='batch', disable=not (run.progress and batches and _rank() == 0)) as bar:
        clean = images.protocol['corruptions'].get('shift', CLEAN)
        for (corruption, severity), names in plan.items():
            bar.set_description(f'{corruption} {severity}' if severity else clean)
            predictions: dict[str, list[np.ndarray]] = {name: [] for name in names}
            for start in starts:
                batch, targets = next(batches_left)
                batch = [pixels.to(run.device, non_blocking=True) for pixels in batch]
                rows = indices[start : start + size]
                for name in names:
                    pixels, valid = batch[views.geometry[name]], images.valid_labels[name]
                    logits = _run_model(run, name, pixels, targets >= 0)
                    logits = logits if valid is None else logits[:, valid]
                    wrong = (~logits.isfinite().all(1).cpu() & (targets >= 0)).nonzero()[:1]
                    if len(wrong):
                        image = views.images.names[rows[int(wrong)]]
                        under = f'{corruption} {severity}' if severity else CLEAN
                        raise InputError(f'{name} gives logits that are not finite for image {image} ({under}).')
                    predictions[name].append(_predict(logits, [images.right[row] for row in rows], targets < 0))
                bar.update()
            for name, array in _gather(predictions).items():
                in_order = np.empty_like(array)
                in_order[order] = array
                write_predictions(predictions_path(folder, name, corruption, severity), in_order)
            if _rank() == 0:
                with lock(folder):
                    write_errors(folder)


def _run_model(run: _Run, name: str, pixels: torch.Tensor, readable: torch.Tensor) -> torch.Tensor:
    model, data_config = run.models[run.adapted.get(name, name)], run.data_configs[name]
    if name not in run.adapted or not readable.any():
        return _logits(model, pixels, data_config, run.amp_dtype)
    with adapted_batch_norm(model, run.source_images):  # not to black images in place of those that cannot be read
        of_readable = _logits(model, pixels[readable], data_config, run.amp_dtype)
    logits = of_readable.new_zeros(len(pixels), of_readable.shape[1])
    logits[readable] = of_readable
    return logits


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


def _predict(logits: torch.Tensor, right: Sequence[Sequence[int]], unreadable: torch.Tensor) -> np.ndarray:
    first = logits.topk(min(TOP, logits.shape[1])).indices.tolist()
    log_probabilities = logits.double().log_softmax(1).cpu().numpy()
    predictions = np.zeros(len(right), PREDICTION)
    for image, (row, labels) in enumerate(zip(first, right, strict=True)):
        ranks = [rank for rank, label in enumerate(row) if label in labels]
        predictions['prediction'][image], predictions['rank'][image] = row[0], min(ranks, default=TOP)
    predictions['confidence'] = np.exp(log_probabilities.max(1))
    if all(len(labels) == 1 for labels in right):
        targets = np.array([label for labels in right for label in labels])
        predictions['nll'] = negative_log_likelihoods(log_probabilities, targets)
        predictions['brier'] = brier_scores(np.exp(log_probabilities), targets)
    else:
        predictions['nll'] = predictions['brier'] = np.nan
    predictions[unreadable.numpy()] = (0, UNREADABLE, np.nan, np.nan, np.nan)
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


def _write_examples(images: _Images, keys: Sequence[tuple[str, int]]) -> None:
    """Keep a few images as the first model sees them, clean and corrupted."""
    count = len(images.indices)
    for row in sorted({(2 * number + 1) * count // (2 * EXAMPLES) for number in range(EXAMPLES)}):
        for corruption, severity in keys:
            path = example_path(images.folder, corruption, severity, row)
            if not path.exists():
                views, target = images.views[View(corruption, severity, images.indices[row])]
                if target >= 0:
                    buffer = io.BytesIO()
                    Image.fromarray(views[0].permute(1, 2, 0).numpy()).save(buffer, 'png')
                    atomic_write(path, buffer.getvalue())


def _check_examples(images: _Images, models: Mapping[str, Any]) -> None:
    """Refuse images that have the names of those in the folder, but other pixels: the examples in the folder tell."""
    if not (images.folder / 'protocol.json').exists():
        return
    views = images.views.seen_by(models)
    # Only what is read from disk: to corrupt images takes long, and the protocol has the seed.
    read = images.passes if 'stored_as' in images.protocol['corruptions'] else [(CLEAN, 0)]
    for row, corruption, severity, path in sorted(find_examples(images.folder)):
        if (corruption, severity) in read:
            index = images.indices[row]
            seen, _ = views[View(corruption, severity, index)]
            kept = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)
            if not any(torch.equal(pixels, kept) for pixels in seen):
                raise InputError(
                    f'{images.folder} holds results of other images with the same names, such as '
                    f'{images.views.images.names[index]}. Name another folder.'
                )


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
