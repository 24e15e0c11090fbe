"""Models with weights: the folders that describe them, and their weights on the Hugging Face Hub.

Each folder of ``hub_configs`` is named by architecture and tag. It registers the model with timm, and it is the content
of the model's repository on the Hub:

- ``config.json``: the network and the preprocessing of its images, in timm's format;
- ``args.yaml``: the recipe, for ``train.py --config``;
- ``model.safetensors``: the weights; they may be on the Hub only;
- ``model.safetensors.sha256``: the checksum of the weights, as ``sha256sum`` writes it;
- ``README.md``: the model card.

The weights of a tag never change: better weights get another tag.
"""

import dataclasses
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from ..autoload import warn
from ..errors import InputError

__all__ = [
    'CARD',
    'CHECKSUM',
    'CONFIG',
    'HUB_ORG',
    'RECIPE',
    'WEIGHTS',
    'HubModel',
    'fetch_weights',
    'file_sha256',
    'hub_configs',
    'model_folders',
    'read_checksum',
    'read_hub_model',
    'read_hub_models',
]

HUB_ORG = os.environ.get('TIMM_PUSHPULL_HUB_ORG', 'timm-pushpull')
CONFIG, RECIPE, WEIGHTS, CARD = 'config.json', 'args.yaml', 'model.safetensors', 'README.md'
CHECKSUM = f'{WEIGHTS}.sha256'


class HubModel(NamedTuple):
    """What a folder of ``hub_configs`` says of a model."""

    pretrained_cfg: dict[str, Any]
    """Fields of timm's ``PretrainedCfg``, ``hf_hub_id`` among them."""
    model_args: dict[str, Any]
    """Arguments of ``timm.create_model`` that the weights need."""
    sha256: str
    """Checksum of the weights."""


def hub_configs() -> Path:
    """Find ``hub_configs``: inside an installed package, beside the package in a checkout.

    Returns:
        The folder of the models' folders.
    """
    package = Path(__file__).parent.parent
    installed = package / 'hub_configs'
    return installed if installed.is_dir() else package.parent / 'hub_configs'


def model_folders(folder: str | os.PathLike[str]) -> list[Path]:
    """List the models' folders in a folder: those named ``architecture.tag`` with a ``config.json``.

    Args:
        folder: Their parent, such as :func:`hub_configs`.

    Returns:
        The folders, by name.
    """
    return sorted(
        path.parent for path in Path(folder).glob(f'*/{CONFIG}') if re.fullmatch(r'\w+\.\w+', path.parent.name)
    )


def read_hub_models(folder: str | os.PathLike[str], org: str = HUB_ORG) -> dict[str, HubModel]:
    """Read the descriptions of models; warn of each folder that cannot be read, and leave it out.

    Args:
        folder: Parent of the models' folders.
        org: Organisation or user of the models on the Hub.

    Returns:
        The models by architecture and tag.
    """
    models = {}
    for path in model_folders(folder):
        try:
            models[path.name] = read_hub_model(path, org)
        except Exception as error:  # whatever it is, the other models are registered
            warn(f'timm-pushpull does not register {path.name}: {" ".join(str(error).split())}')
    return models


def read_hub_model(folder: Path, org: str = HUB_ORG) -> HubModel:
    """Read the description of a model.

    Args:
        folder: Folder of the model, named by architecture and tag.
        org: Organisation or user of the model on the Hub.

    Returns:
        The model.

    Raises:
        OSError: If ``config.json`` cannot be read.
        ValueError: If ``config.json`` does not describe a model, or if there is no readable checksum; the message names
            the file and the fault.
    """
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding='utf-8'))
    except ValueError as error:
        raise InputError(f'{path} is not JSON: {error}.') from error
    for key in ('pretrained_cfg', 'model_args'):
        if not isinstance(config, dict) or not isinstance(config.get(key), dict):
            raise InputError(f'{path} must hold an object {key}.')
    # timm reads config.json in the same way from a local folder and from the Hub.
    fields = config['pretrained_cfg'] | {
        key: config[key] for key in ('num_classes', 'label_names', 'label_descriptions') if key in config
    }
    cfg = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
    _check_fields(cfg, path)
    sha256 = read_checksum(folder)
    if sha256 is None:
        raise InputError(f'{folder / CHECKSUM} is missing.')
    cfg['hf_hub_id'] = f'{org}/{folder.name}'
    # timm takes these two from the pretrained cfg, which a caller may override.
    model_args = {key: value for key, value in config['model_args'].items() if key not in ('num_classes', 'in_chans')}
    return HubModel(cfg, model_args, sha256)


def _check_fields(cfg: dict[str, Any], path: Path) -> None:
    """Refuse fields that timm does not know, or with a value of another type than timm's default."""
    from timm.models import PretrainedCfg

    defaults = dataclasses.asdict(PretrainedCfg())
    for key, value in cfg.items():
        if key not in defaults:
            raise InputError(f'{path} has the field {key}, which timm does not know.')
        kind: Any = type(defaults[key])
        if defaults[key] is not None and not isinstance(value, (int, float) if kind is float else kind):
            raise InputError(
                f'{path} must hold {"an" if kind is int else "a"} {kind.__name__} as {key}, got {value!r}.'
            )


def read_checksum(folder: str | os.PathLike[str]) -> str | None:
    """Read the checksum of a model's weights.

    Args:
        folder: Folder of the model.

    Returns:
        SHA-256 in hexadecimal digits; None if there is no file of the checksum.

    Raises:
        ValueError: If the file does not begin with a SHA-256.
    """
    path = Path(folder) / CHECKSUM
    try:
        words = path.read_text(encoding='utf-8').split()
    except FileNotFoundError:
        return None
    except ValueError:  # not text
        words = []
    if not words or not re.fullmatch('[0-9a-f]{64}', words[0]):
        raise InputError(f'{path} must begin with a SHA-256 of 64 hexadecimal digits.')
    return words[0]


def file_sha256(path: str | os.PathLike[str]) -> str:
    """Compute the checksum of a file.

    Args:
        path: The file.

    Returns:
        SHA-256 in hexadecimal digits.
    """
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def fetch_weights(repo_id: str, sha256: str, cache_dir: str | os.PathLike[str] | None = None) -> str:
    """Fetch the weights of a model from the cache, or from the Hub if the cache does not have them.

    Args:
        repo_id: Repository on the Hub, ``organisation/name``.
        sha256: Checksum of the weights.
        cache_dir: Cache folder; None for the default of ``huggingface_hub``.

    Returns:
        Path of the file in the cache; its checksum is ``sha256``.

    Raises:
        OSError: If the cache does not have the weights and the download fails; ``huggingface_hub`` raised the cause.
        RuntimeError: If the file is damaged, or holds other weights.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    cache = None if cache_dir is None else str(cache_dir)
    cached = try_to_load_from_cache(repo_id, WEIGHTS, cache_dir=cache)
    if isinstance(cached, str) and file_sha256(cached) == sha256:
        return cached
    try:
        path = hf_hub_download(repo_id, WEIGHTS, cache_dir=cache, library_name='timm-pushpull')
    except OSError as error:  # every error of the network, the server or the disk
        reasons = dict.fromkeys(' '.join(str(each).split()) for each in (error, error.__cause__) if each is not None)
        raise OSError(
            f'The weights of {repo_id} could not be fetched: {" ".join(reasons).rstrip(".")}. '
            "A copy of the model's folder loads as timm.create_model('local-dir:FOLDER', pretrained=True)."
        ) from error
    found = file_sha256(path)
    if found == sha256:
        return path
    # The file that path links to: if only the link were deleted, the next download would link to the same file.
    blob = os.path.realpath(path)
    if found == os.path.basename(blob):  # the Hub names a blob by its checksum, so this one arrived undamaged
        raise RuntimeError(
            f'{repo_id} holds other weights (SHA-256 {found}) than this release of timm-pushpull knows ({sha256}). '
            f"Update timm-pushpull, or load them as timm.create_model('hf-hub:{repo_id}', pretrained=True)."
        )
    raise RuntimeError(f'{blob} is damaged: its SHA-256 is {found}, not {sha256}. Delete the file and try again.')
