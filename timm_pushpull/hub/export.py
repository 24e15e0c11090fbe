"""Turns a checkpoint of timm's ``train.py`` into a model's folder for the Hugging Face Hub."""

import argparse
import copy
import math
import os
import re
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import yaml
from timm.data import ImageNetInfo, resolve_data_config
from timm.models import create_model, is_model, load_checkpoint, save_for_hf

from .registry import CARD, CHECKSUM, CONFIG, HUB_ORG, RECIPE, WEIGHTS, file_sha256, hub_configs, read_checksum
from .card import Evaluation, Rounding, model_card
from ..robustness.data import DatasetImages, find_class_map
from ..robustness.store import baseline_of, read_predictions, read_baseline, read_csv, read_protocol, summarize
from ..robustness.evaluate import evaluate_robustness, hash_modules, hash_weights

__all__ = ['export_checkpoint']


def export_checkpoint(
    checkpoint: str | os.PathLike[str],
    name: str,
    output: str | os.PathLike[str],
    results: str | os.PathLike[str] | None = None,
    use_ema: bool = False,
    dtype: torch.dtype = torch.float32,
    dataset: Any = None,
    org: str = HUB_ORG,
    **measurement: Any,
) -> Path:
    """Write a model's folder: configuration, recipe, weights, their checksum and the model card.

    A recipe that is in the folder stays, and the card names the options in which the run differs from it; otherwise the
    run's own options become the recipe. Weights that are in the folder stay too: what else is there is made anew. Each
    file is replaced whole.

    Args:
        checkpoint: File of ``train.py``, with the run's ``args.yaml`` beside it.
        name: Architecture and tag, such as ``pp_resnet18.pp3_in1k``.
        output: Folder that holds the model's folder; made if it does not exist.
        results: Results folder of :mod:`timm_pushpull.robustness.evaluate` with these weights among its models, for the card.
        use_ema: Take the averaged weights.
        dtype: Of the weights: float32, float16 or bfloat16.
        dataset: Clean pictures (``timm.data.create_dataset`` without a transform), to name the classes and to measure
            what rounding the weights changes.
        org: Organisation or user on the Hub that will publish the folder, for the card.
        **measurement: ``device``, ``batch_size``, ``workers`` and ``progress`` of that, as for ``evaluate_robustness``.

    Returns:
        The folder.

    Raises:
        ValueError: If the name is of no network or not of the checkpoint's, if the checkpoint does not hold what is
            asked for, if a weight is too large for the data type, if the results or pictures are of another model, or
            if the folder is of other weights.
    """
    checkpoint, output = Path(checkpoint), Path(output)
    options = _read_options(checkpoint, name)
    model = _build(name, options)
    _check_network(model, name, output / name / RECIPE, options)
    _load(model, checkpoint, use_ema)
    stored = copy.deepcopy(model).to(dtype)
    rounded = copy.deepcopy(stored).float()
    if not all(tensor.isfinite().all() for tensor in rounded.state_dict().values()):
        raise ValueError(f'dtype must hold all weights, got {dtype}, in which some are not finite: take bfloat16.')

    labels, evaluation, rounding = _labels(options, model.num_classes), None, None
    pictures = None if dataset is None else DatasetImages(dataset)
    if pictures is not None:
        labels = pictures.classes
    if results is not None:
        evaluation = _read_evaluation(Path(results), name, model, rounded)
        labels = [row['name'] for row in read_csv(Path(results) / 'classes.csv')]
    if labels and len(labels) != model.num_classes:
        raise ValueError(f'{checkpoint} has {model.num_classes} classes, the data {len(labels)}.')

    label_config = _label_config(labels)
    folder = output / name
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output, prefix=f'.{name}-') as unfinished:
        written = Path(unfinished)
        save_for_hf(
            stored,
            str(written),
            model_config=label_config,
            model_args=_model_args(options),
            safe_serialization=True,
        )
        (written / WEIGHTS).chmod(0o666 & ~_umask())  # safetensors lets nobody else read it
        sha256 = file_sha256(written / WEIGHTS)
        if read_checksum(folder) not in (None, sha256):
            raise ValueError(f'{folder} is of other weights, and those of a tag never change: give another tag.')
        (written / CHECKSUM).write_text(f'{sha256}  {WEIGHTS}\n')
        if not (folder / RECIPE).exists():
            (written / RECIPE).write_text(yaml.safe_dump(_without_paths(options)))
        if pictures is not None and dtype != torch.float32:
            before, after = _top1((model, rounded), dataset, **measurement)
            rounding = Rounding(before, after, len(pictures.targets))
        recipe = next(path for path in (written / RECIPE, folder / RECIPE) if path.exists()).read_text()
        card = model_card(
            name,
            rounded,
            model_args=_model_args(options),
            weights=str(dtype).removeprefix('torch.') + (', the running average (EMA) of the training' * use_ema),
            recipe=recipe,
            departures=_departures(yaml.safe_load(recipe), options),
            seed=options.get('seed'),
            label_config=label_config,
            org=org,
            rounding=rounding,
            evaluation=evaluation,
        )
        (written / CARD).write_text(str(card), encoding='utf-8')
        for file in (WEIGHTS, CHECKSUM, RECIPE, CARD, CONFIG):
            if (written / file).exists():
                os.replace(written / file, folder / file)
    return folder


def _read_options(checkpoint: Path, name: str) -> dict[str, Any]:
    """Options of the run, which ``train.py`` writes beside its checkpoints."""
    if not checkpoint.is_file():
        raise ValueError(f'checkpoint must be a file of train.py, {checkpoint} is none.')
    path = checkpoint.with_name(RECIPE)
    if not path.is_file():
        raise ValueError(f'{checkpoint} must lie beside the {RECIPE} that train.py wrote for it; there is none.')
    options = yaml.safe_load(path.read_text())
    architecture, _, tag = name.partition('.')
    if not re.fullmatch(r'\w+', tag, re.ASCII) or not is_model(architecture):
        raise ValueError(
            'tag must be the name of a network, a point, and letters, digits or underscores of your own, such as '
            f'pp_resnet18.pp3_in1k, got {name!r}.'
        )
    if options['model'].partition('.')[0] != architecture:
        raise ValueError(f'{checkpoint} is of {options["model"]}, not of {architecture}.')
    return options


def _model_args(options: Mapping[str, Any]) -> dict[str, Any]:
    model_args = {key: value for key, value in (options.get('model_kwargs') or {}).items() if key != 'augment'}
    named = {'num_classes': 'num_classes', 'in_chans': 'in_chans', 'gp': 'global_pool'}
    given = {argument: options[option] for option, argument in named.items() if options.get(option) is not None}
    return {**model_args, **given}


def _build(name: str, options: Mapping[str, Any]) -> Any:
    """The network that ``train.py`` builds of these options, which knows how its pictures are prepared."""
    architecture, _, tag = name.partition('.')
    model: Any = create_model(architecture, **_model_args(options))
    data: dict[str, Any] = resolve_data_config(dict(options), model=model)
    reduction = model.feature_info[-1]['reduction']
    pool_size = tuple(math.ceil(side / reduction) for side in data['input_size'][1:])
    model.pretrained_cfg.update(data, tag=tag, num_classes=model.num_classes, pool_size=pool_size)
    return model.eval()


def _check_network(model: nn.Module, name: str, recipe: Path, options: Mapping[str, Any]) -> None:
    """Refuse a network that is not the one of its tag, where the tag has a recipe already."""
    known = next((path for path in (recipe, hub_configs() / name / RECIPE) if path.is_file()), None)
    if known is None:
        return
    expected = yaml.safe_load(known.read_text())
    if hash_modules(_build(name, expected)) != hash_modules(model):
        ours, theirs = (
            ', '.join(f'{argument}={value}' for argument, value in _model_args(each).items())
            for each in (options, expected)
        )
        raise ValueError(f"The checkpoint's network has {ours}; that of {name} has {theirs}: give another tag.")


def _load(model: nn.Module, checkpoint: Path, use_ema: bool) -> None:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # train.py's options, which it keeps inside too
            content = torch.load(checkpoint, map_location='cpu', weights_only=True)
    except Exception as error:  # of many kinds, by what is wrong with the file
        raise ValueError(f'{checkpoint} cannot be read as a checkpoint: {" ".join(str(error).split())}') from error
    if use_ema and 'state_dict_ema' not in content:
        raise ValueError(f'{checkpoint} holds no running average of weights: it was trained without --model-ema.')
    try:
        load_checkpoint(model, str(checkpoint), use_ema)
    except RuntimeError as error:
        raise ValueError(
            f'{checkpoint} does not fit the model of its {RECIPE}: {" ".join(str(error).split())}'
        ) from error


def _labels(options: Mapping[str, Any], num_classes: int) -> Sequence[str]:
    """Names of the classes in the order of the logits, as far as the options tell; empty where they do not."""
    if options.get('class_map'):
        return Path(find_class_map(Path(options['class_map']).stem.removesuffix('_synsets'))).read_text().split()
    return ImageNetInfo().label_names() if num_classes == 1000 else []


def _label_config(labels: Sequence[str]) -> dict[str, Any]:
    imagenet = ImageNetInfo()
    if not labels or not all(labels):
        return {}
    if not set(labels) <= set(imagenet.label_names()):
        return {'label_names': list(labels)}
    descriptions = {label: imagenet.label_name_to_description(label) for label in labels}
    return {'label_names': list(labels), 'label_descriptions': descriptions}


def _top1(models: Sequence[nn.Module], dataset: Any, **measurement: Any) -> list[float]:
    by_name = {str(place): model for place, model in enumerate(models)}
    with tempfile.TemporaryDirectory() as folder:
        rows = evaluate_robustness(by_name, folder, dataset, corruptions=(), **measurement)
    accuracy = {row['model']: row['top1'] for row in rows}
    return [accuracy[name] for name in by_name]


def _read_evaluation(results: Path, name: str, model: nn.Module, rounded: nn.Module) -> Evaluation:
    """The row of these weights, as they are stored or, failing that, as they were trained."""
    protocol = read_protocol(results)
    labels = {details['weights_sha256']: label for label, details in protocol['models'].items()}
    for of, weights in (('stored', rounded), ('trained', model)):
        label = labels.get(hash_weights(weights))
        if label is not None:
            rows = {row['model']: row for row in summarize(protocol, read_predictions(results), read_baseline(results))}
            if label in rows:
                baseline = baseline_of(label, rows[label]['baseline'], rows)
                return Evaluation(protocol, rows[label], rows.get(baseline or ''), of == 'stored')
    raise ValueError(
        f'{results} holds no results of these weights, its models are {", ".join(labels.values())}: measure them by '
        f'timm-pushpull robustness {name}=local-dir:FOLDER, FOLDER being the exported one.'
    )


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def _without_paths(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options without what holds on one machine only."""
    here = {'data_dir', 'device', 'local_rank', 'log_interval', 'output', 'resume', 'workers'}
    return {
        key: value
        for key, value in options.items()
        if key not in here and not (isinstance(value, str) and os.path.isabs(value))
    }


def _departures(recipe: Mapping[str, Any], options: Mapping[str, Any]) -> str:
    """The options of ``train.py`` that turn the recipe into the run."""
    words = []
    for key, value in recipe.items():
        if options.get(key) != value and key not in ('class_map', 'experiment'):
            given = options.get(key)
            words += [f'--{key.replace("_", "-")}', *map(str, given if isinstance(given, list) else [given])]
    return shlex.join(words)
