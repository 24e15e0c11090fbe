"""Turns a checkpoint of timm's ``train.py`` into the folder of a model for the Hugging Face Hub."""

import copy
import math
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import yaml
from timm.data import ImageNetInfo, resolve_data_config
from timm.models import create_model, is_model, load_checkpoint, save_for_hf

from ..checkpoint import label_names_of, model_args_of, read_training_options, set_data_config
from ..errors import InputError
from ..fields import TRAINING_OPTIONS
from ..recipes import list_recipes, read_args_yaml, read_recipe
from ..registry import CARD, CHECKSUM, CONFIG, HUB_ORG, PAPER, RECIPE, read_checksum
from ..robustness.classes import check_labels
from ..robustness.data import DatasetImages
from ..robustness.evaluate import evaluate_robustness
from ..robustness.inputs import as_input_error
from ..robustness.protocol import hash_modules, hash_weights
from ..robustness.store import read_classes, read_predictions, read_protocol
from ..robustness.summary import baseline_of, read_baseline, summarize
from ..weights import WEIGHTS, file_sha256
from .card import Evaluation, Rounding, has_unit, model_card

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
    """Write the folder of a model: configuration, training options, weights, checksum and model card.

    ``args.yaml`` has the options of the run, so that it trains the same network again; a path is cut to the name of its
    file.

    A second export into the folder must have the same weights, and makes all files anew. Each file is replaced whole.

    Args:
        checkpoint: Checkpoint of ``train.py``, beside the ``args.yaml`` of its run.
        name: Architecture and tag, such as ``pp_resnet18.pp3_in1k``.
        output: Parent of the model's folder; made if it does not exist.
        results: Results folder of :func:`~timm_pushpull.evaluate_robustness` with these weights among its models, for
            the card; None for a card without results.
        use_ema: Export the EMA weights of the checkpoint.
        dtype: Type of the exported weights: float32, float16 or bfloat16.
        dataset: Clean images (``timm.data.create_dataset`` without a transform), for the names of the classes and the
            effect of rounding the weights.
        org: Organisation or user on the Hub, for the card.
        **measurement: Other arguments of :func:`~timm_pushpull.evaluate_robustness`, which measures the effect of
            rounding, such as ``workers`` and ``progress``.

    Returns:
        The folder.

    Raises:
        ValueError: If the name has no tag or is not of the checkpoint's network, if the checkpoint lacks the weights,
            if the name is that of a recipe for another network, if a weight is too large for ``dtype``, if the results
            or images are of another model, or if the folder has other weights.
    """
    checkpoint, output = Path(checkpoint), Path(output)
    options = _training_options(checkpoint, name, use_ema)
    model = _build(name, options, checkpoint.with_name(RECIPE))
    architecture = model.pretrained_cfg['architecture']
    if architecture != name.partition('.')[0]:
        raise InputError(f'{checkpoint} is a checkpoint of {architecture}: begin the name with that, not {name}.')
    model_args = {**getattr(model, '_model_args', {}), **model_args_of(options)}  # also those of a tag that was trained
    if name in list_recipes():
        _check_network(model, name, options)
    _load(model, checkpoint, use_ema)
    stored = copy.deepcopy(model).to(dtype)
    rounded = copy.deepcopy(stored).float()
    if not all(tensor.isfinite().all() for tensor in rounded.state_dict().values()):
        raise InputError(f'dtype must hold all weights, some are not finite in {dtype}: take bfloat16.')

    labels, evaluation, rounding = _labels(name, options, model.num_classes), None, None
    of_training = labels if options.get('class_map') else []
    images = None if dataset is None else DatasetImages(dataset)
    if images is not None:
        labels = images.classes
    if results is not None:
        evaluation = _read_evaluation(Path(results), name, model, rounded)
        labels = read_classes(results)
    if labels and len(labels) != model.num_classes:
        raise InputError(f'{checkpoint} has {model.num_classes} classes, the data {len(labels)}.')
    check_labels(str(checkpoint), of_training, labels)

    label_config = _label_config(of_training or labels)
    folder = output / name
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output, prefix=f'.{name}-') as unfinished:
        written = Path(unfinished)
        save_for_hf(
            stored,
            str(written),
            model_config=dict(label_config),  # older versions of timm take the labels out
            model_args=model_args,
            safe_serialization=True,
        )
        # safetensors makes it readable for its owner only.
        (written / WEIGHTS).chmod((written / CONFIG).stat().st_mode)
        sha256 = file_sha256(written / WEIGHTS)
        if read_checksum(folder) not in (None, sha256):
            raise InputError(f'{folder} has other weights, and the weights of a name never change: give another name.')
        (written / CHECKSUM).write_text(f'{sha256}  {WEIGHTS}\n', encoding='utf-8')
        training = yaml.safe_dump(_without_paths(options), sort_keys=False)
        (written / RECIPE).write_text(training, encoding='utf-8')
        if images is not None and dtype != torch.float32:
            before, after = _top1((model, rounded), dataset, **measurement)
            rounding = Rounding(before, after, len(images.targets))
        card = model_card(
            name,
            rounded,
            model_args=model_args,
            weights=str(dtype).removeprefix('torch.') + ', running average (EMA) of the training' * use_ema,
            seed=options.get('seed'),
            label_config=label_config,
            org=org,
            rounding=rounding,
            evaluation=evaluation,
        )
        (written / CARD).write_text(str(card), encoding='utf-8')
        for file in (WEIGHTS, CHECKSUM, RECIPE, CARD, CONFIG):  # config.json last: it registers the model
            os.replace(written / file, folder / file)
    return folder


def _training_options(checkpoint: Path, name: str, use_ema: bool) -> dict[str, Any]:
    """Read the options of the run, which ``train.py`` writes beside its checkpoints."""
    if not checkpoint.is_file():
        raise InputError(f'checkpoint must be a file of train.py, {checkpoint} is not one.')
    path = checkpoint.with_name(RECIPE)
    if not path.is_file():
        raise InputError(f'{checkpoint} must be beside the {RECIPE} of its run, which train.py wrote; it is missing.')
    options = read_args_yaml(path)
    architecture, _, tag = name.partition('.')
    if not re.fullmatch(r'\w+', tag, re.ASCII) or not is_model(architecture):
        raise InputError(
            'name must be ARCHITECTURE.TAG: a network name, a dot, then letters, digits or underscores, such as '
            f'pp_resnet18.pp3_in1k, got {name!r}.'
        )
    # train.py writes the number of classes into the checkpoint's options after it has written the file.
    shared = TRAINING_OPTIONS.keys() - {'num_classes'}
    for key, value in read_training_options(checkpoint, use_ema).items():
        if key in shared and (yaml.safe_load(yaml.safe_dump(value)) or None) != (options.get(key) or None):
            raise InputError(f'{path} says {key}: {options.get(key)}, but its {checkpoint.name} says {value}.')
    return options


def _build(name: str, options: Mapping[str, Any], path: Path) -> Any:
    """Build the network as ``train.py`` does, with the preprocessing of its images in ``pretrained_cfg``."""
    tag = name.partition('.')[2]
    with as_input_error(str(path)):
        model: Any = create_model(options['model'], **model_args_of(options))
        set_data_config(model, options)
    paper = PAPER if has_unit(model) else {}
    for key in ('label_names', 'label_descriptions'):  # of the weights that the training started from
        model.pretrained_cfg.pop(key, None)
    reduction = model.feature_info[-1]['reduction']
    pool_size = tuple(math.ceil(side / reduction) for side in model.pretrained_cfg['input_size'][1:])
    model.pretrained_cfg.update(
        tag=tag,
        num_classes=model.num_classes,
        pool_size=pool_size,
        license=_license(options, model.pretrained_cfg.get('license')),
        **paper,
    )
    return model.eval()


def _license(options: Mapping[str, Any], of_pretrained: str | None) -> str:
    """Return the license of the weights that the training started from; nobody knows that of a file."""
    if not options.get('pretrained') and not options.get('initial_checkpoint'):
        return 'apache-2.0'
    from_file = options.get('initial_checkpoint') or options.get('pretrained_path')
    return (None if from_file else of_pretrained) or 'unknown'


def _check_network(model: nn.Module, name: str, options: Mapping[str, Any]) -> None:
    """Refuse a network other than that of the recipe whose name it gets."""
    recipe = read_recipe(name)
    if hash_modules(_build(name, recipe, Path(name))) != hash_modules(model):
        of_run, of_recipe = (
            ', '.join(f'{argument}={value}' for argument, value in model_args_of(each).items())
            for each in (options, recipe)
        )
        raise InputError(f'The checkpoint has {of_run}, but the recipe {name} has {of_recipe}: give another name.')


def _load(model: nn.Module, checkpoint: Path, use_ema: bool) -> None:
    try:
        load_checkpoint(model, str(checkpoint), use_ema)
    except RuntimeError as error:
        raise InputError(
            f'{checkpoint} does not fit the model in {checkpoint.with_name(RECIPE)}: {" ".join(str(error).split())}'
        ) from error


def _labels(name: str, options: Mapping[str, Any], num_classes: int) -> Sequence[str]:
    """Name the classes in the order of the logits; empty if the options do not tell them."""
    labels = label_names_of(options)
    if not options.get('class_map') and name.endswith('in1k'):
        labels = ImageNetInfo().label_names()
    return labels if len(labels) == num_classes else []


def _label_config(labels: Sequence[str]) -> dict[str, Any]:
    imagenet = ImageNetInfo()
    if not labels or not all(labels):
        return {}
    if not set(labels) <= set(imagenet.label_names()):
        return {'label_names': list(labels)}
    descriptions = {label: imagenet.label_name_to_description(label) for label in labels}
    return {'label_names': list(labels), 'label_descriptions': descriptions}


def _top1(models: Sequence[nn.Module], dataset: Any, **measurement: Any) -> list[float]:
    by_name = {str(index): model for index, model in enumerate(models)}
    with tempfile.TemporaryDirectory() as folder:
        rows = evaluate_robustness(by_name, folder, dataset, corruptions=(), **measurement)
    accuracy = {row['model']: row['top1'] for row in rows}
    return [accuracy[name] for name in by_name]


def _read_evaluation(results: Path, name: str, model: nn.Module, rounded: nn.Module) -> Evaluation:
    """Find the results of the rounded weights or, if there are none, of the weights before rounding."""
    protocol, predictions = read_protocol(results), read_predictions(results)
    if 'shift' in protocol['corruptions'] or 'real_labels_sha256' in protocol['data']:
        kind = 'on a natural shift' if 'shift' in protocol['corruptions'] else 'by ImageNet-ReaL labels'
        raise InputError(
            f'{results} holds results {kind}, but a model card has the errors on clean and corrupted images by their '
            'own labels: give results of these.'
        )
    # A model that adapts its BatchNorm has these weights too, but other errors.
    hashes = {
        label: details['weights_sha256']
        for label, details in protocol['models'].items()
        if predictions[label] and 'adapt_batch_norm' not in details
    }
    for weights in (rounded, model):
        of_weights = hash_weights(weights)
        labels = [label for label, sha256 in hashes.items() if sha256 == of_weights]
        if len(labels) > 1:
            raise InputError(
                f'{results} holds several results of these weights: {", ".join(labels)}. Give a results folder with '
                'one of them.'
            )
        if labels:
            (label,) = labels
            if 'valid_labels_sha256' in protocol['models'][label]:
                raise InputError(
                    f'{results} must hold results on all classes of the model in its order, those of {label} are '
                    'not: measure images of all its classes, without valid_labels.'
                )
            rows = {row['model']: row for row in summarize(protocol, predictions, read_baseline(results))}
            baseline = baseline_of(label, rows[label]['baseline'], rows)
            unlike_default = _unlike_default(protocol, label, rounded)
            return Evaluation(protocol, rows[label], rows.get(baseline or ''), weights is rounded, unlike_default)
    raise InputError(
        f'{results} holds no results of these weights; its models are {", ".join(protocol["models"])}. Export without '
        f'results into FOLDER, then measure the model: timm-pushpull robustness {name}=local-dir:FOLDER/{name}.'
    )


def _unlike_default(protocol: Mapping[str, Any], label: str, model: nn.Module) -> dict[str, Any]:
    """Return how the images and the precision differed from those by which the command would measure the model."""
    config = resolve_data_config({}, model=model, use_test_size='stored_as' not in protocol['corruptions'])
    default = {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()}
    default['precision'] = 'float32'
    details = {**default, **protocol['models'][label]}
    return {key: details[key] for key in default if details[key] != default[key]}


def _without_paths(options: Mapping[str, Any]) -> dict[str, Any]:
    """Drop the options of one machine, and the folders of files."""
    local = {'data_dir', 'device', 'local_rank', 'log_interval', 'output', 'resume', 'workers'}
    kept = {key: value for key, value in options.items() if key not in local}
    for key, value in kept.items():
        source = 'local-dir:' if str(value).startswith('local-dir:') else ''
        path = str(value).removeprefix(source)
        if source or os.path.isabs(path):
            kept[key] = source + Path(path).name
    return kept
