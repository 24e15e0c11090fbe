"""Checks a model's folder before it goes to the Hugging Face Hub, or after it came from there."""

import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import create_model

from .registry import CARD, CHECKSUM, CONFIG, RECIPE, WEIGHTS, file_sha256, read_checksum

__all__ = ['check_folder']

PICKLES = ('.bin', '.ckpt', '.pickle', '.pkl', '.pt', '.pth', '.tar')


def check_folder(folder: str | os.PathLike[str]) -> str:
    """Check that a model's folder is complete, sound and safe.

    The model is built from ``config.json`` and, where there are weights, their checksum is compared, they are loaded
    strictly, one batch is run and the card is read. The card's metadata must be what ``huggingface_hub`` accepts.

    Args:
        folder: The model's, as :func:`timm_pushpull.hub.export.export_checkpoint` writes it.

    Returns:
        What was found, in a sentence.

    Raises:
        ValueError: If anything is wrong: the file and the fault are named.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: give the path of a model's, such as hub_configs/NAME.")
    published = (folder / CHECKSUM).exists()
    required = [CONFIG, RECIPE, *([CARD] if published else [])]
    for file in required:
        if not (folder / file).is_file():
            raise ValueError(f'{folder} lacks {file}.')
    for path in sorted(folder.iterdir()):
        if path.suffix in PICKLES:
            raise ValueError(f'{path} may hold a pickle, which runs code when it is loaded: keep {WEIGHTS} alone.')
    try:
        model: Any = create_model(f'local-dir:{folder}').eval()
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f'{folder / CONFIG} does not describe a model: {error}') from error
    cfg = model.pretrained_cfg
    if f'{cfg["architecture"]}.{cfg.get("tag")}' != folder.resolve().name:
        raise ValueError(f'{folder / CONFIG} describes {cfg["architecture"]}.{cfg.get("tag")}, not {folder.name}.')
    labels = cfg.get('label_names')
    if labels and len(labels) != model.num_classes:
        raise ValueError(f'{folder / CONFIG} names {len(labels)} classes, the model has {model.num_classes}.')
    if published:
        _check_card(folder)
    if not (folder / WEIGHTS).exists():
        return 'published, its weights are on the Hub only' if published else 'a recipe, without weights'
    _check_weights(folder, model)
    with torch.inference_mode():
        logits = model(torch.randn(2, *cfg['input_size'], generator=torch.Generator().manual_seed(0)))
    if logits.shape != (2, model.num_classes) or not logits.isfinite().all():
        raise ValueError(f'{folder / WEIGHTS} gives logits of shape {tuple(logits.shape)} or not finite.')
    return f'sound: {model.num_classes} classes, SHA-256 {read_checksum(folder)}'


def _check_weights(folder: Path, model: torch.nn.Module) -> None:
    path, expected = folder / WEIGHTS, read_checksum(folder)
    found = file_sha256(path)
    if expected != found:
        raise ValueError(f'{path} has the SHA-256 {found}, {CHECKSUM} says {expected}.')
    try:
        weights = load_file(path)
    except SafetensorError as error:
        raise ValueError(f'{path} is not a file of safetensors: {error}') from error
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    for key in sorted(shapes.keys() | weights.keys()):
        given = tuple(weights[key].shape) if key in weights else None
        if shapes.get(key) != given:
            raise ValueError(f'{path} does not fit: {key} is {given} there and {shapes.get(key)} in the model.')
    model.load_state_dict(weights)


def _check_card(folder: Path) -> None:
    path = folder / CARD
    try:
        card = ModelCard.load(path)
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from error
    required = {'library_name': 'timm', 'pipeline_tag': 'image-classification'}
    for key, value in required.items():
        if card.data.get(key) != value:
            raise ValueError(f'{path} must say {key}: {value}, got {card.data.get(key)!r}.')
    tags = card.data.get('tags') or []
    if not {'timm', 'push-pull'} <= set(tags) or 'transformers' in tags:
        raise ValueError(f'{path} must have the tags timm and push-pull and not transformers, got {tags}.')
    if not card.data.get('license'):
        raise ValueError(f'{path} must say a license.')
