"""What ``pretrained=True`` loads: weights of this package, or those of timm's plain network of the same name.

No network here has ImageNet weights of its own. So each tag of timm's plain network is a tag of ours: timm's weights
are the initial weights for fine-tuning.
"""

import dataclasses
import logging
import sys
from typing import Any

import torch
from timm.models import PretrainedCfg, model_entrypoint

from ..layers.push_pull import PushPullConv2d
from ..registry import HubModel, find_weights, hub_configs, read_hub_models
from ..weights import fetch_weights

__all__ = [
    'HUB_MODELS',
    'initial_unit_state',
    'locate_weights',
    'plain_cfgs',
    'restore_sources',
    'warn_to_fine_tune',
    'weights_name',
]

_logger = logging.getLogger('timm.models')

HUB_MODELS = read_hub_models(hub_configs())
START_ALPHA = 0.5  # where timm's weights are loaded: the mean of the paper's random values, and the same in each call
SOURCES = ('source', 'file', 'state_dict', 'custom_load')  # fields of a pretrained cfg that say where weights come from


def plain_cfgs(network: str, plain: str) -> dict[str, PretrainedCfg | dict[str, Any]]:
    """Name the weights of a plain network of timm as those of a push-pull network.

    Args:
        network: Name of the push-pull network.
        plain: Name of timm's network.

    Returns:
        timm's pretrained cfgs by ``network.tag``; ``*`` marks timm's default.
    """
    # timm's own table: the functions that timm offers copy each entry deeply, which costs the import of timm 20 ms.
    default_cfg = sys.modules[model_entrypoint(plain).__module__].default_cfgs[plain]
    cfgs: dict[str, PretrainedCfg | dict[str, Any]] = {}
    for tag in default_cfg.tags:  # the first is the default
        cfg = default_cfg.cfgs[tag]
        hub_id = f'timm/{plain}.{tag}' if cfg.hf_hub_id == 'timm/' else cfg.hf_hub_id
        cfgs[f'{network}.{tag}{"" if cfgs else "*"}'] = dataclasses.replace(cfg, hf_hub_id=hub_id)
    return cfgs


def locate_weights(cfg: PretrainedCfg, hub_model: HubModel | None, cache_dir: Any) -> dict[str, Any]:
    """Find the weights that timm would download from the Hub, and verify them.

    Args:
        cfg: Pretrained cfg of the network.
        hub_model: Description of the weights, if this package has them.
        cache_dir: Cache folder; None for the default of ``huggingface_hub``.

    Returns:
        Fields of the pretrained cfg that make timm load the verified file; none where the weights come from elsewhere.

    Raises:
        OSError: If the weights cannot be downloaded.
        RuntimeError: If the file is damaged, or the Hub holds other weights.
    """
    given = cfg.source == 'local-dir' or (cfg.source != 'hf-hub' and (cfg.state_dict or cfg.file))
    if given or not cfg.hf_hub_id:
        return {}
    try:
        if hub_model is not None and cfg.hf_hub_id == hub_model.pretrained_cfg['hf_hub_id']:
            file = find_weights(hub_model, cache_dir)
        else:
            file = fetch_weights(cfg.hf_hub_id, cfg.hf_hub_filename, None, cache_dir)
    except OSError as error:
        installed = ', '.join(name for name, model in HUB_MODELS.items() if model.weights is not None)
        raise OSError(
            f'{error} Without a network these work: {installed}; and a file of weights, by '
            'pretrained_cfg_overlay=dict(file=FILE) or --pretrained-path FILE of train.py.'
        ) from None
    return dict(source=None, file=file, custom_load=cfg.custom_load == 'hf')


def restore_sources(model: Any, cfg: PretrainedCfg) -> None:
    """Make ``model.pretrained_cfg`` say where its weights came from, in place of the file in the cache."""
    for field in SOURCES:
        value = getattr(cfg, field)
        if value is None or field == 'state_dict':
            model.pretrained_cfg.pop(field, None)
        else:
            model.pretrained_cfg[field] = value


def weights_name(model: Any) -> str:
    """Name the weights of a network, ``network.tag``, as ``model.pretrained_cfg`` has them."""
    cfg = model.pretrained_cfg
    return f'{cfg["architecture"]}.{cfg["tag"]}' if cfg.get('tag') else cfg['architecture']


def initial_unit_state(unit: PushPullConv2d) -> dict[str, torch.Tensor]:
    """Return the initial alpha of a unit that gets the weights of a plain network, if it trains one.

    Returns:
        ``alpha`` (O,): the initial alpha of the unit, 0.5 where none was given.
    """
    if not unit.trainable_alpha:
        return {}
    return {'alpha': torch.full_like(unit.alpha, START_ALPHA) if unit.initial_alpha is None else unit.alpha.detach()}


def warn_to_fine_tune(name: str) -> None:
    """Warn that a network with a push-pull unit must be fine-tuned after it gets the weights of a plain network."""
    _logger.warning(
        f"{name}: timm's weights of the plain network in a network with a push-pull unit. Fine-tune the network before "
        'use, or at least re-estimate the BatchNorm after the stem: timm_pushpull.update_stem_bn(model, images).'
    )
