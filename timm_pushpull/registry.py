"""Models with weights: the folders that describe them.

Each folder of ``hub_configs`` is named by architecture and tag. It registers the model with timm, if the model is a
push-pull ResNet, and it is the content of the model's repository on the Hub:

- ``config.json``: the network and the preprocessing of its images, in timm's format;
- ``args.yaml``: the options of the training, for ``train.py --config``;
- ``model.safetensors``: the weights; large ones may be on the Hub only;
- ``model.safetensors.sha256``: the checksum of the weights, as ``sha256sum`` writes it;
- ``README.md``: the model card.

The weights of a name never change: better weights get another name.
"""

import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from .autoload import warn
from .errors import InputError
from .fields import CHANNELS, COUNT, CROP_MODE, FLAG, INTERPOLATION, MAPPING, POSITIVE, SIZE, check_fields, read_mapping
from .weights import WEIGHTS, fetch_weights, file_sha256

__all__ = [
    'CARD',
    'CHECKSUM',
    'CONFIG',
    'HUB_ORG',
    'PAPER',
    'RECIPE',
    'HubModel',
    'find_weights',
    'hub_configs',
    'model_folders',
    'read_checksum',
    'read_hub_model',
    'read_hub_models',
]

HUB_ORG = os.environ.get('TIMM_PUSHPULL_HUB_ORG', 'timm-pushpull')
CONFIG, RECIPE, CARD = 'config.json', 'args.yaml', 'README.md'
CHECKSUM = f'{WEIGHTS}.sha256'
PRETRAINED_CFG = {
    'input_size': SIZE,
    'interpolation': INTERPOLATION,
    'crop_pct': POSITIVE,
    'crop_mode': CROP_MODE,
    'mean': CHANNELS,
    'std': CHANNELS,
    'num_classes': COUNT,
    'custom_load': FLAG,
    'fixed_input_size': FLAG,
}
PAPER = {  # pretrained_cfg fields of our weights
    'origin_url': 'https://github.com/bgswaroop/pushpull-conv',
    'paper_name': 'PushPull-Net: Inhibition-driven ResNet robust to image corruptions',
    'paper_ids': 'arXiv:2408.04077',
}


class HubModel(NamedTuple):
    """What a folder of ``hub_configs`` says of a model."""

    pretrained_cfg: dict[str, Any]
    """Fields of timm's ``PretrainedCfg``, ``hf_hub_id`` among them."""
    model_args: dict[str, Any]
    """Arguments of ``timm.create_model`` that the weights need."""
    sha256: str
    """Checksum of the weights."""
    weights: Path | None
    """File of the weights; None if they are on the Hub only."""


def hub_configs() -> Path:
    """Find ``hub_configs``: inside an installed package, beside the package in a checkout.

    Returns:
        Parent of the model folders.
    """
    package = Path(__file__).parent
    installed = package / 'hub_configs'
    return installed if installed.is_dir() else package.parent / 'hub_configs'


def model_folders(folder: str | os.PathLike[str]) -> list[Path]:
    """List the models' folders in a folder: those named ``architecture.tag`` with a ``config.json``.

    Args:
        folder: Parent of the model folders, such as :func:`hub_configs`.

    Returns:
        The folders, by name.
    """
    return sorted(
        path.parent for path in Path(folder).glob(f'*/{CONFIG}') if re.fullmatch(r'\w+\.\w+', path.parent.name)
    )


def read_hub_models(folder: str | os.PathLike[str]) -> dict[str, HubModel]:
    """Read the descriptions of models; warn of each folder that cannot be read, and leave it out.

    Args:
        folder: Parent of the models' folders.

    Returns:
        The models by architecture and tag.
    """
    models = {}
    for path in model_folders(folder):
        try:
            models[path.name] = read_hub_model(path)
        except Exception as error:  # whatever it is, the other models are registered
            warn(f'timm-pushpull does not register {path.name}: {" ".join(str(error).split())}')
    return models


def read_hub_model(folder: Path) -> HubModel:
    """Read the description of a model.

    Args:
        folder: Folder of the model, named by architecture and tag.

    Returns:
        The model.

    Raises:
        OSError: If ``config.json`` cannot be read.
        ValueError: If ``config.json`` does not describe a model, or if there is no readable checksum; the message names
            the file and the fault.
    """
    from timm.models import PretrainedCfg

    path = folder / CONFIG
    config = read_mapping(path)
    check_fields(path, config, {'pretrained_cfg': MAPPING, 'model_args': MAPPING})
    # timm reads config.json in the same way from a local folder and from the Hub.
    fields = config['pretrained_cfg'] | {
        key: config[key] for key in ('num_classes', 'label_names', 'label_descriptions') if key in config
    }
    cfg = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
    check_fields(path, cfg, PRETRAINED_CFG, 'pretrained_cfg')
    for key in cfg:
        if key not in PretrainedCfg.__dataclass_fields__:
            raise InputError(f'{path} has the field {key}, which timm does not know.')
    sha256 = read_checksum(folder)
    if sha256 is None:
        raise InputError(f'{folder / CHECKSUM} is missing.')
    cfg['hf_hub_id'] = f'{HUB_ORG}/{folder.name}'
    # timm takes these two from the pretrained cfg, which a caller may override.
    model_args = {key: value for key, value in config['model_args'].items() if key not in ('num_classes', 'in_chans')}
    weights = folder / WEIGHTS
    return HubModel(cfg, model_args, sha256, weights if weights.exists() else None)


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


def find_weights(model: HubModel, cache_dir: str | os.PathLike[str] | None) -> str:
    """Find the weights of a model: beside its description, in the cache, or on the Hub.

    Args:
        model: Description of the model.
        cache_dir: Cache folder; None for the default of ``huggingface_hub``.

    Returns:
        Path of the file; its checksum is the model's.

    Raises:
        OSError: If the weights are to be downloaded, and the download fails.
        RuntimeError: If the file is damaged, or the Hub holds other weights.
    """
    if model.weights is None:
        return fetch_weights(model.pretrained_cfg['hf_hub_id'], None, model.sha256, cache_dir)
    found = file_sha256(model.weights)
    if found != model.sha256:
        raise RuntimeError(
            f'{model.weights} is damaged: its SHA-256 is {found}, not {model.sha256}. Install timm-pushpull again.'
        )
    return str(model.weights)
