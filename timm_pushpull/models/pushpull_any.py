"""Push-pull networks of any kind: a network of timm, whose first convolution is a push-pull unit.

``pp_any`` takes timm's network as the model argument ``base``. The names in ``NETWORKS`` stand for it with a fixed
base, and have the tags of that base. The ResNets are in :mod:`timm_pushpull.models.pushpull_resnet`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch.nn as nn
from timm.models import (
    PretrainedCfg,
    generate_default_cfgs,
    is_model,
    load_state_dict,
    model_entrypoint,
    register_model,
    resolve_pretrained_cfg,
)
from timm.models._hub import load_state_dict_from_path

from ..augment.in_model import augment_in_training
from ..augment.prime import PRIME
from ..errors import InputError
from ..layers.contrast_norm import add_contrast_norm
from ..layers.settings import SETTINGS, guard_settings, match_settings
from ..ops.reference import PullKernel
from .arguments import check_arguments
from .convert import first_convs, replace_first_convs
from .pretrained import initial_unit_state, locate_weights, plain_cfgs, restore_sources, warn_to_fine_tune, weights_name

__all__ = ['create_push_pull']

NETWORKS = [
    'convnext_atto',
    'convnext_nano',
    'convnext_tiny',
    'convnext_small',
    'convnext_base',
    'convnextv2_nano',
    'convnextv2_tiny',
    'densenet121',
    'edgenext_small',
    'efficientnet_b0',
    'efficientnet_b1',
    'efficientnet_b3',
    'ghostnet_100',
    'hrnet_w18',
    'mnasnet_100',
    'mobilenetv2_100',
    'mobilenetv3_large_100',
    'mobilenetv3_small_100',
    'mobilenetv4_conv_medium',
    'mobilenetv4_conv_small',
    'regnety_008',
    'regnety_016',
    'regnety_032',
    'resnet50d',
    'resnetv2_50',
    'resnext101_32x8d',
    'seresnet50',
    'tf_efficientnet_lite0',
    'tf_efficientnetv2_s',
    'vgg16_bn',
    'wide_resnet50_2',
]
NETWORKS = [network for network in NETWORKS if is_model(network)]  # of the timm that is installed

default_cfgs = generate_default_cfgs(
    {name: cfg for network in NETWORKS for name, cfg in plain_cfgs(f'pp_{network}', network).items()}
    | {'pp_any': PretrainedCfg()}
)


def create_push_pull(
    variant: str,
    base: str,
    pretrained: bool = False,
    pretrained_cfg: str | dict[str, Any] | PretrainedCfg | None = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    cache_dir: str | Path | None = None,
    push_pull: bool = True,
    avg_pool_size: int = 3,
    alpha: float | Sequence[float] | None = None,
    trainable_alpha: bool = True,
    pull_kernel: PullKernel = 'inverted',
    contrast_norm: bool = False,
    augment: str | None = None,
    augment_splits: int = 1,
    **kwargs: Any,
) -> nn.Module:
    """Create a network of timm whose first convolution is a push-pull unit.

    Args:
        variant: Name of the push-pull network.
        base: Name of timm's network, with or without a tag.
        pretrained: Load weights: those of the pretrained cfg, otherwise those of the base.
        pretrained_cfg: Tag of the base, or a cfg of other weights for the push-pull network or for the base. The fields
            of a cfg without ``first_conv`` replace those of the base.
        pretrained_cfg_overlay: Fields that replace fields of the cfg.
        cache_dir: Cache of the downloads.
        push_pull, avg_pool_size, alpha, trainable_alpha, pull_kernel: See :class:`~timm_pushpull.PushPullResNet`.
        contrast_norm, augment, augment_splits: As there; 'prime' has the settings for ImageNet.
        **kwargs: Other arguments of timm's network (``num_classes``, ``in_chans``, ``features_only``, ...).

    Returns:
        timm's network with the unit.

    Raises:
        ValueError: If timm has no such base or it cannot be converted, or if a setting is refused by the unit.
        OSError: If the weights cannot be downloaded.
        RuntimeError: If the weights are damaged, or those of another network or of other settings.
    """
    check_arguments(push_pull, contrast_norm, augment, augment_splits)
    network, _, tag = base.partition('.') if isinstance(base, str) else ('', '', '')
    if not is_model(network) or network.startswith('pp_'):
        raise InputError(f'base must be a plain network of timm, such as convnext_tiny.fb_in1k, got {base!r}.')
    cfg: Any = pretrained_cfg
    overlay = dict(pretrained_cfg_overlay or {})
    if cfg and not isinstance(cfg, str):
        cfg = cfg if isinstance(cfg, PretrainedCfg) else PretrainedCfg(**cfg)
        if not cfg.first_conv:  # a few fields, or pp_any's own cfg with those that timm's scripts changed
            given = {key: value for key, value in vars(cfg).items() if value != getattr(PretrainedCfg, key)}
            given.pop('architecture', None)
            if cfg.url:
                given.setdefault('hf_hub_id', None)  # timm would prefer the base's weights on the Hub
            cfg, overlay = None, given | overlay
    cfg = cfg or tag or None
    resolved = resolve_pretrained_cfg(network, cfg, overlay)
    settings = {'contrast_norm': True} if contrast_norm else {}
    saved_units: list[dict[str, Any]] = []
    if pretrained:
        located = locate_weights(resolved, None, cache_dir)
        weights = _read_weights(dataclasses.replace(resolved, **located))
        if weights is not None:  # timm's network gets them without what it does not have
            _take_settings(weights, settings)
            saved_units = _take_units(weights, resolved.first_conv)
            located = dict(state_dict=weights, source=None, file=None, custom_load=False)
        overlay |= located
        if any(saved_units) and not push_pull:
            raise RuntimeError(f'The weights of {base} are those of a push-pull unit: leave push_pull=False out.')
    model: Any = model_entrypoint(network)(
        pretrained=pretrained, pretrained_cfg=cfg, pretrained_cfg_overlay=overlay, cache_dir=cache_dir, **kwargs
    )
    restore_sources(model, resolved)
    if push_pull:
        replace_first_convs(model, avg_pool_size, alpha, trainable_alpha, pull_kernel)
    layers = list(first_convs(model).values())
    model.pretrained_cfg['architecture'] = variant
    if push_pull and pretrained:
        if not any(saved_units):
            warn_to_fine_tune(weights_name(model) if variant != 'pp_any' else base)
            saved_units = [initial_unit_state(layer) for layer in layers]
        for layer, saved in zip(layers, saved_units, strict=True):
            layer.load_state_dict({**layer.state_dict(), **saved})
    if contrast_norm:
        for layer in layers:
            add_contrast_norm(layer)
    guard_settings(model, settings)
    if augment == 'prime':
        augment_in_training(model, PRIME.imagenet(), augment_splits)
    return model


def _read_weights(cfg: PretrainedCfg) -> dict[str, Any] | None:
    """Read the weights; None for those in a format of their own, and for those that timm downloads by address."""
    if cfg.source == 'local-dir':
        return dict(load_state_dict_from_path(Path(cfg.file or '')))
    if cfg.state_dict:
        return dict(cfg.state_dict)
    return dict(load_state_dict(cfg.file)) if cfg.file and not cfg.custom_load else None


def _take_units(weights: dict[str, Any], first_conv: Any) -> list[dict[str, Any]]:
    """Take out of the weights what each push-pull unit has beside its convolution; nothing for a plain network."""
    paths = [first_conv] if isinstance(first_conv, str) else first_conv or []
    paths = [f'{path}.0' if f'{path}.0.weight' in weights else path for path in paths]  # deep stem of a ResNet
    names = ('alpha', SETTINGS)
    return [{name: weights.pop(f'{path}.{name}') for name in names if f'{path}.{name}' in weights} for path in paths]


def _take_settings(weights: dict[str, Any], settings: dict[str, Any]) -> None:
    """Take the settings of the network out of the weights, and refuse others than the model has."""
    errors: list[str] = []
    match_settings(weights, '', settings, errors)
    weights.pop(SETTINGS, None)
    if errors:
        raise RuntimeError(errors[0])


def _entrypoint(network: str) -> Callable[..., nn.Module]:
    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return create_push_pull(create.__name__, network, pretrained, **kwargs)

    create.__name__ = create.__qualname__ = f'pp_{network}'
    create.__doc__ = f"""Constructs timm's {network} with a push-pull unit as its first convolution."""
    return create


for _network in NETWORKS:
    globals()[f'pp_{_network}'] = register_model(_entrypoint(_network))


@register_model
def pp_any(pretrained: bool = False, base: str = 'resnet50', **kwargs: Any) -> nn.Module:
    """Constructs a network of timm, its ``base``, with a push-pull unit as its first convolution.

    ``base`` has a default, because programs create each network that ``timm.list_models`` names.
    """
    return create_push_pull('pp_any', base, pretrained, **kwargs)
