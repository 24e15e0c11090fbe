"""Models on the Hugging Face Hub: the folders that describe them, and their weights, fetched and verified.

A folder in ``hub_configs``, named by architecture and tag, is at once the model's registration with timm, its recipe
and its repository on the Hub. It holds

- ``config.json``: the model and how its pictures are prepared, in timm's format;
- ``args.yaml``: the recipe, for ``train.py --config``;

and where the model is published

- ``model.safetensors``: the weights, unless they are too large to live beside the code;
- ``model.safetensors.sha256``: their checksum, as ``sha256sum`` writes it;
- ``README.md``: the model card.

The weights of a tag never change: better ones get another tag.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ['CARD', 'CHECKSUM', 'CONFIG', 'HUB_ORG', 'RECIPE', 'WEIGHTS', 'HubModel']
__all__ += ['fetch_weights', 'file_sha256', 'hub_configs', 'read_checksum', 'read_hub_models']

HUB_ORG = os.environ.get('TIMM_PUSHPULL_HUB_ORG', 'timm-pushpull')
CONFIG, RECIPE, WEIGHTS, CARD = 'config.json', 'args.yaml', 'model.safetensors', 'README.md'
CHECKSUM = f'{WEIGHTS}.sha256'


class HubModel(NamedTuple):
    """What a folder of ``hub_configs`` says of a model."""

    pretrained_cfg: dict[str, Any]
    """Fields of timm's ``PretrainedCfg``; with ``hf_hub_id`` if the model is published."""
    model_args: dict[str, Any]
    """Arguments of ``timm.create_model`` that the weights need."""
    sha256: str | None
    """Checksum of the weights, if the model is published."""


def hub_configs() -> Path:
    """Find the folders of the models: in an installed package they lie inside it, in a checkout beside it.

    Returns:
        The folder that holds them.
    """
    package = Path(__file__).parent.parent
    return next(folder for folder in (package / 'hub_configs', package.parent / 'hub_configs') if folder.is_dir())


def read_hub_models(folder: str | os.PathLike[str], org: str = HUB_ORG) -> dict[str, HubModel]:
    """Read the descriptions of models.

    Args:
        folder: Holds a folder for each of them, named by architecture and tag.
        org: Organisation on the Hub that publishes them.

    Returns:
        The models by their names.
    """
    return {path.parent.name: _read_hub_model(path, org) for path in sorted(Path(folder).glob(f'*/{CONFIG}'))}


def _read_hub_model(path: Path, org: str) -> HubModel:
    config = json.loads(path.read_text(encoding='utf-8'))
    # As timm reads it, where it loads the folder or the repository by itself.
    fields = config['pretrained_cfg'] | {
        key: config[key] for key in ('num_classes', 'label_names', 'label_descriptions') if key in config
    }
    cfg = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
    sha256 = read_checksum(path.parent)
    if sha256 is not None:
        cfg['hf_hub_id'] = f'{org}/{path.parent.name}'
    # timm takes these two from the fields, where an overlay or an argument may stand against them.
    model_args = {key: value for key, value in config['model_args'].items() if key not in ('num_classes', 'in_chans')}
    return HubModel(cfg, model_args, sha256)


def read_checksum(folder: str | os.PathLike[str]) -> str | None:
    """Read the checksum of a model's weights.

    Args:
        folder: The model's.

    Returns:
        SHA-256 in hexadecimal digits; None if the model is not published.
    """
    try:
        return (Path(folder) / CHECKSUM).read_text().split()[0]
    except FileNotFoundError:
        return None


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
    """Fetch the weights of a published model: from the cache, where it has them, or from the Hub.

    Args:
        repo_id: Repository on the Hub, ``organisation/name``.
        sha256: Checksum of the weights.
        cache_dir: Of ``huggingface_hub``; its default where None.

    Returns:
        The file in the cache, whose checksum is the one given.

    Raises:
        OSError: If they are not in the cache and cannot be downloaded; the cause is that of ``huggingface_hub``.
        RuntimeError: If the file is damaged, or of other weights.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    cache = None if cache_dir is None else str(cache_dir)
    cached = try_to_load_from_cache(repo_id, WEIGHTS, cache_dir=cache)
    if isinstance(cached, str) and file_sha256(cached) == sha256:
        return cached
    try:
        path = hf_hub_download(repo_id, WEIGHTS, cache_dir=cache, library_name='timm-pushpull')
    except OSError as error:  # all that huggingface_hub raises for the network, the server and the disk
        reasons = dict.fromkeys(' '.join(str(each).split()) for each in (error, error.__cause__) if each is not None)
        raise OSError(
            f'The weights of {repo_id} could not be fetched: {" ".join(reasons).rstrip(".")}. '
            "A copy of its folder loads as timm.create_model('local-dir:FOLDER', pretrained=True)."
        ) from error
    found = file_sha256(path)
    if found == sha256:
        return path
    blob = os.path.realpath(path)  # a link to it, deleted alone, would come back
    if found == os.path.basename(blob):  # the Hub's own checksum names it: it is as it was sent
        raise RuntimeError(
            f'{repo_id} holds other weights (SHA-256 {found}) than this release of timm-pushpull knows ({sha256}). '
            f"Update timm-pushpull, or load them as timm.create_model('hf-hub:{repo_id}', pretrained=True)."
        )
    raise RuntimeError(
        f'{blob} is damaged: its SHA-256 is {found}, not {sha256}. Delete it, and the next try downloads it again.'
    )
