"""Checks the folder of a model before an upload to the Hugging Face Hub, or after a download."""

import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.data import resolve_data_config
from timm.models import create_model
from yaml import YAMLError

from ..errors import InputError
from ..fields import TEXT, check_fields
from ..recipes import read_args_yaml
from ..registry import CARD, CHECKSUM, CONFIG, RECIPE, read_hub_model
from ..weights import WEIGHTS, file_sha256

__all__ = ['check_folder']

PICKLES = ('.bin', '.ckpt', '.pickle', '.pkl', '.pt', '.pth', '.tar')


def check_folder(folder: str | os.PathLike[str]) -> str:
    """Check that the folder of a model is complete and safe, and that its model runs.

    Builds the model from ``config.json`` and reads the card, whose metadata ``huggingface_hub`` must accept. If the
    folder holds the weights, compares their checksum, loads them strictly and runs one batch.

    Args:
        folder: Folder of the model, as :func:`timm_pushpull.hub.export.export_checkpoint` writes it.

    Returns:
        What was found, in words.

    Raises:
        ValueError: If anything is wrong; the message names the file and the fault.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f'{folder} is not a folder: give the path of the folder of a model, such as hub_configs/NAME.')
    for file in (CONFIG, RECIPE, CARD, CHECKSUM):
        if not (folder / file).is_file():
            raise InputError(f'{folder} lacks {file}.')
    for path in sorted(folder.iterdir()):
        if path.suffix in PICKLES:
            raise InputError(f'{path} may hold a pickle, which runs code when it is loaded: keep {WEIGHTS} only.')
    read_args_yaml(folder / RECIPE)
    sha256 = read_hub_model(folder).sha256
    try:
        model: Any = create_model(f'local-dir:{folder}').eval()
    except (AssertionError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f'{folder / CONFIG} does not describe a model: {error}') from error
    cfg = model.pretrained_cfg
    if f'{cfg["architecture"]}.{cfg.get("tag")}' != folder.resolve().name:
        raise InputError(
            f'{folder / CONFIG} describes {cfg["architecture"]}.{cfg.get("tag")}: give the folder this name.'
        )
    labels = cfg.get('label_names')
    if labels and len(labels) != model.num_classes:
        raise InputError(f'{folder / CONFIG} names {len(labels)} classes, the model has {model.num_classes}.')
    _check_card(folder)
    if not (folder / WEIGHTS).exists():
        return f'OK, without the weights of SHA-256 {sha256}'
    _check_weights(folder, sha256, model)
    try:
        config = resolve_data_config({}, model=model)
        images = torch.rand(2, *config['input_size'], generator=torch.Generator().manual_seed(0))
        mean, std = (torch.tensor(config[key]).view(-1, 1, 1) for key in ('mean', 'std'))
        with torch.inference_mode():
            logits = model((images - mean) / std)
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f'{folder / CONFIG} describes a model that does not run: {error}') from error
    if logits.shape != (2, model.num_classes):
        raise InputError(
            f'{folder} gives logits of shape {tuple(logits.shape)} for 2 images, must be {(2, model.num_classes)}.'
        )
    if not logits.isfinite().all():
        raise InputError(f'{folder / WEIGHTS} gives logits that are not finite.')
    return f'OK: {model.num_classes} classes, SHA-256 {sha256}'


def _check_weights(folder: Path, sha256: str, model: torch.nn.Module) -> None:
    path = folder / WEIGHTS
    found = file_sha256(path)
    if found != sha256:
        raise InputError(f'{path} has the SHA-256 {found}, {CHECKSUM} says {sha256}.')
    try:
        weights = load_file(path)
    except SafetensorError as error:
        raise InputError(f'{path} is not a file of safetensors: {error}') from error
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise InputError(f'{path} does not fit {folder / CONFIG}: {" ".join(str(error).split())}') from error


def _check_card(folder: Path) -> None:
    path = folder / CARD
    try:
        card = ModelCard.load(path)
    except (AttributeError, KeyError, TypeError, ValueError, YAMLError) as error:
        raise InputError(f'{path} is not a model card: {" ".join(str(error).split())}') from error
    for key, value in {'library_name': 'timm', 'pipeline_tag': 'image-classification'}.items():
        if card.data.get(key) != value:
            raise InputError(f'{path} must say {key}: {value}, got {card.data.get(key)!r}.')
    tags = card.data.get('tags')
    if not isinstance(tags, list) or not {'timm', 'push-pull'} <= set(map(str, tags)) or 'transformers' in tags:
        raise InputError(f'{path} must have the tags timm and push-pull, and not transformers, got {tags}.')
    check_fields(path, card.data.to_dict(), {'license': TEXT})
