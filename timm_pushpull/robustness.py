"""Evaluation under corruptions: every picture's answer is kept, and every figure follows from that.

A results folder holds

- ``protocol.json``: how the figures were made; a folder made in another way is refused;
- ``answers/MODEL/CORRUPTION-SEVERITY.npy``: for each picture the place of the right class among the model's first five
  answers, 0 to 4, or 5;
- ``errors.csv``: images and errors by model, corruption and severity;
- ``summary.csv``: E, CE and the means, each with its 95% interval.

The last two are written anew from the answers after each corruption and severity; what has its answers is not run
again.
"""

import csv
import hashlib
import importlib.metadata
import io
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn as nn
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch.utils.data import DataLoader, Dataset

from .corruptions import SEVERITIES, check_corruption, corrupt
from .measures import (
    TEST_CORRUPTIONS,
    corruption_error,
    net_error_reduction,
    normalized_mce,
    plain_mce,
    relative_mce,
)

__all__ = ['evaluate_robustness', 'read_answers', 'stratified_indices', 'summarize']

CLEAN = 'clean'
TOP = 5
RESAMPLES = 1000


def evaluate_robustness(
    models: Mapping[str, nn.Module],
    dataset: Any,
    folder: str | os.PathLike[str],
    corruptions: Sequence[str] = TEST_CORRUPTIONS,
    severities: Sequence[int] = SEVERITIES,
    limit: int | None = None,
    seed: int = 0,
    baseline: str | None = None,
    device: str | torch.device = 'cpu',
    batch_size: int = 64,
    workers: int = 0,
    amp_dtype: torch.dtype | None = None,
    progress: Callable[..., Iterable[Any]] = lambda batches, **_: batches,
) -> list[dict[str, Any]]:
    """Count the errors of models on clean and on corrupted pictures, and write them to a results folder.

    Each picture is decoded, resized, cropped and corrupted once and shown to all the models, which therefore must take
    it at the same size and crop. A run that was interrupted goes on where it was.

    Args:
        models: Models of timm by name.
        dataset: timm's dataset of pictures and classes, without a transform (``timm.data.create_dataset``).
        folder: Results folder, made if it does not exist.
        corruptions: Names of corruptions.
        severities: From 1 to 5.
        limit: Number of pictures, with as many of each class as can be; None for all.
        seed: Number of the draw of the corruptions.
        baseline: Name of the model that relative mCE and R_net are measured against.
        device: Where the models run.
        batch_size: Pictures at a time.
        workers: Processes that decode and corrupt; 0 for this one.
        amp_dtype: Data type of autocast; None for float32.
        progress: Wraps the batches of one pass, such as ``tqdm``.

    Returns:
        The rows of ``summary.csv``.

    Raises:
        ValueError: If the models need different pictures, if their classes are not the data's, if a picture
            cannot be read, if the folder was made under another protocol, or if a corruption, a severity or the
            baseline does not exist.
    """
    if baseline is not None and baseline not in models:
        raise ValueError(f'baseline must be one of the models {", ".join(models)}, got {baseline!r}.')
    for corruption in corruptions:
        for severity in severities:
            check_corruption(corruption, severity)
    folder = Path(folder)
    configs = {name: resolve_model_data_config(model) for name, model in models.items()}
    geometry = _common_geometry(configs)
    targets, classes = _targets_and_classes(dataset)
    for name, model in models.items():
        if model.num_classes != classes:
            raise ValueError(f'{name} has {model.num_classes} classes, the data {classes}.')
    indices = stratified_indices(targets, limit)
    _check_protocol(folder, _protocol(models, configs, dataset, classes, indices, seed, amp_dtype))
    for model in models.values():
        model.to(device).eval()

    passes = [(CLEAN, 0), *((corruption, severity) for corruption in corruptions for severity in severities)]
    for corruption, severity in passes:
        todo = {name: models[name] for name in models if not _answers_path(folder, name, corruption, severity).exists()}
        if todo:
            pictures = _CorruptedPictures(dataset, indices, geometry, corruption, severity, seed)
            loader = DataLoader(pictures, batch_size, num_workers=workers)
            batches = progress(loader, desc=f'{corruption} {severity}' if severity else CLEAN, unit='batch')
            answers = _answer(todo, configs, batches, device, amp_dtype)
            for name, places in answers.items():
                buffer = io.BytesIO()
                np.save(buffer, places)
                _write(_answers_path(folder, name, corruption, severity), buffer.getvalue())
            _write_errors(folder)
    _write_errors(folder)
    rows = summarize(folder, baseline)
    _write_csv(folder / 'summary.csv', rows)
    return rows


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


class _CorruptedPictures(Dataset):
    def __init__(
        self, dataset: Any, indices: Sequence[int], geometry: dict[str, Any], corruption: str, severity: int, seed: int
    ) -> None:
        self.dataset = dataset
        self.indices = indices
        self.resize_and_crop = create_transform(**geometry, is_training=False, normalize=False).transforms[:-1]
        self.corruption, self.severity, self.seed = corruption, severity, seed

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> tuple[torch.Tensor, int]:
        index = self.indices[place]
        # Not dataset[index]: timm's dataset puts the next picture in the place of one that it cannot read.
        file, target = self.dataset.reader[index]
        try:
            image = Image.open(file).convert('RGB')
        except OSError as error:
            raise ValueError(f'{self.dataset.filename(index)} cannot be read: {error}.') from None
        for transform in self.resize_and_crop:
            image = transform(image)
        if self.corruption != CLEAN:
            image = corrupt(image, self.corruption, self.severity, index, self.seed)
        return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1), target


@torch.inference_mode()
def _answer(
    models: Mapping[str, nn.Module],
    configs: Mapping[str, dict[str, Any]],
    batches: Iterable[Any],
    device: str | torch.device,
    amp_dtype: torch.dtype | None,
) -> dict[str, np.ndarray]:
    places: dict[str, list[torch.Tensor]] = {name: [] for name in models}
    for images, targets in batches:
        images, targets = images.to(device).float() / 255, targets.to(device)
        for name, model in models.items():
            mean, std = (torch.tensor(configs[name][key], device=device).view(-1, 1, 1) for key in ('mean', 'std'))
            with torch.autocast(torch.device(device).type, amp_dtype, enabled=amp_dtype is not None):
                logits = model((images - mean) / std)
            first = logits.topk(min(TOP, logits.shape[1])).indices == targets[:, None]
            place = torch.where(first.any(1), first.int().argmax(1), TOP)
            places[name].append(place.to('cpu', torch.uint8))
    return {name: torch.cat(of_batches).numpy() for name, of_batches in places.items()}


def read_answers(folder: str | os.PathLike[str]) -> dict[str, dict[tuple[str, int], np.ndarray]]:
    """Read the answers in a results folder.

    Args:
        folder: Results folder.

    Returns:
        By model, then by corruption and severity (``('clean', 0)`` for clean pictures): the place of each picture's
        right class among the first five answers, from 0, or 5.
    """
    answers: dict[str, dict[tuple[str, int], np.ndarray]] = {}
    for name in json.loads((Path(folder) / 'protocol.json').read_text())['models']:
        answers[name] = {}
        for path in sorted(_answers_path(Path(folder), name, CLEAN, 0).parent.glob('*.npy')):
            corruption, severity = path.stem.rsplit('-', 1)
            answers[name][corruption, int(severity)] = np.load(path)
    return answers


class _Errors(NamedTuple):
    """Errors of one model: rates, one number each or one for each resample."""

    clean: Any
    by_corruption: dict[str, Any]


def summarize(folder: str | os.PathLike[str], baseline: str | None = None) -> list[dict[str, Any]]:
    """Derive the measures of each model from its answers.

    The intervals hold the middle 95% of what 1,000 resamples of the pictures give, the same resamples for each model.

    Args:
        folder: Results folder.
        baseline: Name of the model that relative mCE and R_net are measured against.

    Returns:
        One row a model: timm's own columns, then E, CE and means in percent, ``_low`` and ``_high`` beside each. A mean
        that needs corruptions, classes or a baseline that are not there is left empty.
    """
    protocol = json.loads((Path(folder) / 'protocol.json').read_text())
    answers = {name: cells for name, cells in read_answers(folder).items() if (CLEAN, 0) in cells}
    images = protocol['data']['images']
    resamples = np.random.default_rng(0).multinomial(images, [1 / images] * images, size=RESAMPLES) / images
    once = np.full((1, images), 1 / images)
    imagenet = protocol['data']['classes'] == 1000
    measured: dict[str, list[dict[str, Any]]] = {name: [] for name in answers}
    for weights in (once, resamples):
        errors = {name: _errors(cells, weights) for name, cells in answers.items()}
        of_baseline = errors[baseline] if baseline in errors else None
        for name in answers:
            measured[name].append(_measures(errors[name], of_baseline, imagenet))
    rows = []
    for name, (values, resampled) in measured.items():
        details, places = protocol['models'][name], answers[name][CLEAN, 0]
        top1, top5 = 100 * float(np.mean(places == 0)), 100 * float(np.mean(places < TOP))
        row = {
            'model': name,
            'img_size': details['input_size'][-1],
            'top1': top1,
            'top1_err': 100 - top1,
            'top5': top5,
            'top5_err': 100 - top5,
            'param_count': details['param_count'],
            'crop_pct': details['crop_pct'],
            'interpolation': details['interpolation'],
        }
        for measure, value in values.items():
            interval = (None, None) if value is None else np.percentile(resampled[measure], (2.5, 97.5))
            for column, number in zip((measure, f'{measure}_low', f'{measure}_high'), (value, *interval), strict=True):
                row[column] = '' if number is None else round(float(np.squeeze(number)), 3)
        rows.append({column: round(v, 3) if isinstance(v, float) else v for column, v in row.items()})
    return rows


def _errors(cells: Mapping[tuple[str, int], np.ndarray], weights: np.ndarray) -> _Errors:
    rates = {cell: weights @ (places != 0) for cell, places in cells.items()}
    by_corruption: dict[str, dict[int, Any]] = {}
    for (corruption, severity), rate in rates.items():
        by_corruption.setdefault(corruption, {})[severity] = rate
    clean = by_corruption.pop(CLEAN)[0]
    return _Errors(clean, {name: corruption_error(errors) for name, errors in by_corruption.items()})


def _measures(errors: _Errors, baseline: _Errors | None, imagenet: bool) -> dict[str, Any]:
    tested = errors.by_corruption.keys() >= set(TEST_CORRUPTIONS)
    measures = {'E': 100 * errors.clean}
    measures.update({f'CE_{name}': 100 * error for name, error in errors.by_corruption.items()})
    measures['plain_mCE'] = 100 * plain_mce(errors.by_corruption) if tested else None
    measures['alexnet_normalized_mCE'] = 100 * normalized_mce(errors.by_corruption) if tested and imagenet else None
    measures['relative_mCE'] = measures['R_net'] = None
    if tested and baseline is not None and baseline.by_corruption.keys() >= set(TEST_CORRUPTIONS):
        measures['relative_mCE'] = 100 * relative_mce(*errors, *baseline)
        measures['R_net'] = net_error_reduction(
            errors.clean, plain_mce(errors.by_corruption), baseline.clean, plain_mce(baseline.by_corruption)
        )
    return measures


def _common_geometry(configs: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    geometries = {
        name: {key: config[key] for key in ('input_size', 'crop_pct', 'crop_mode', 'interpolation')}
        for name, config in configs.items()
    }
    (first, geometry), *others = geometries.items()
    for name, other in others:
        for key, value in other.items():
            if value != geometry[key]:
                raise ValueError(
                    f'{name} takes pictures of {key}={value}, {first} of {geometry[key]}: evaluate them apart.'
                )
    return geometry


def _targets_and_classes(dataset: Any) -> tuple[list[int], int]:
    samples = getattr(dataset.reader, 'samples', None)
    if samples is None:
        raise ValueError(f'dataset must be one of image files in folders, got a {type(dataset.reader).__name__}.')
    return [target for _, target in samples], len(dataset.reader.class_to_idx)


def _protocol(
    models: Mapping[str, nn.Module],
    configs: Mapping[str, dict[str, Any]],
    dataset: Any,
    classes: int,
    indices: Sequence[int],
    seed: int,
    amp_dtype: torch.dtype | None,
) -> dict[str, Any]:
    names = '\n'.join(f'{dataset.filename(index)} {dataset.reader.samples[index][1]}' for index in indices)
    return {
        'corruptions': {
            'generated_by': f'imagecorruptions-imaug {_version("imagecorruptions-imaug")}',
            'seed': seed,
        },
        'data': {
            'images': len(indices),
            'classes': classes,
            'names_sha256': hashlib.sha256(names.encode()).hexdigest(),
        },
        'precision': str(amp_dtype or torch.float32).removeprefix('torch.'),
        'versions': {name: _version(name) for name in ('timm-pushpull', 'timm', 'torch', 'numpy', 'pillow')},
        'models': {
            name: {
                **configs[name],
                'param_count': round(sum(p.numel() for p in model.parameters()) / 1e6, 2),
                'weights_sha256': _hash_weights(model),
            }
            for name, model in models.items()
        },
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _hash_weights(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f'{name} {tensor.dtype} {tuple(tensor.shape)}'.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _check_protocol(folder: Path, protocol: dict[str, Any]) -> None:
    """Write the protocol, or compare it with the one of the results that are there; models may join."""
    path = folder / 'protocol.json'
    protocol = json.loads(json.dumps(protocol))
    if path.exists():
        finished = json.loads(path.read_text())
        joined = {**finished['models'], **protocol['models']}
        # What the folder holds is compared; models that are new to it are not.
        ours = {**protocol, 'models': {name: joined[name] for name in finished['models']}}
        for field, there, here in _differences(finished, ours):
            raise ValueError(
                f'{folder} holds results of another protocol: {field} is {there} there and {here} here. '
                'Name another folder.'
            )
        protocol['models'] = joined
    _write(path, (json.dumps(protocol, indent=2) + '\n').encode())


def _differences(there: Any, here: Any, field: str = '') -> Iterable[tuple[str, Any, Any]]:
    if isinstance(there, dict) and isinstance(here, dict):
        for key in [*there, *(key for key in here if key not in there)]:
            yield from _differences(there.get(key), here.get(key), f'{field}.{key}' if field else key)
    elif there != here:
        yield field, there, here


def _answers_path(folder: Path, name: str, corruption: str, severity: int) -> Path:
    safe_name = ''.join(c if c.isalnum() or c in '._-' else '_' for c in name)
    return folder / 'answers' / safe_name / f'{corruption}-{severity}.npy'


def _write_errors(folder: Path) -> None:
    _write_csv(
        folder / 'errors.csv',
        [
            {
                'model': name,
                'corruption': corruption,
                'severity': severity,
                'images': len(places),
                'errors': int((places != 0).sum()),
            }
            for name, cells in sorted(read_answers(folder).items())
            for (corruption, severity), places in sorted(cells.items())
        ],
    )


def _write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    columns = dict.fromkeys(column for row in rows for column in row)
    text = io.StringIO(newline='')
    writer = csv.DictWriter(text, list(columns), lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)
    _write(path, text.getvalue().encode())


def _write(path: Path, content: bytes) -> None:
    """Write the file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f'.{path.name}.unfinished')
    unfinished.write_bytes(content)
    os.replace(unfinished, path)
