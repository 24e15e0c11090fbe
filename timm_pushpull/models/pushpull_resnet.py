"""Push-pull ResNets: timm's ResNet with a push-pull unit as its first convolution.

Paper: `PushPull-Net: Inhibition-driven ResNet robust to image corruptions` - https://arxiv.org/abs/2408.04077
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
from timm.layers import BlurPool2d
from timm.models import (
    build_model_with_cfg,
    checkpoint_seq,
    generate_default_cfgs,
    register_model,
    resolve_pretrained_cfg,
)
from timm.models.resnet import BasicBlock, Bottleneck, ResNet

from ..augment.in_model import augment_in_training
from ..augment.prime import PRIME
from ..errors import InputError
from ..layers.contrast_norm import add_contrast_norm
from ..layers.push_pull import PushPullConv2d
from ..layers.settings import SETTINGS, guard_settings, is_settings
from ..layers.stem import stem_in_chunks, use_chunks
from ..ops.reference import PullKernel
from ..registry import PAPER
from .arguments import check_arguments
from .original import rename_original
from .pretrained import (
    HUB_MODELS,
    initial_unit_state,
    locate_weights,
    plain_cfgs,
    restore_sources,
    warn_to_fine_tune,
    weights_name,
)

__all__ = ['PushPullResNet']

CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2470, 0.2435, 0.2616)


class PushPullResNet(ResNet):
    """timm's ResNet with a :class:`~timm_pushpull.PushPullConv2d` as its first convolution.

    Args:
        *args: Arguments of timm's ``ResNet``.
        push_pull: Use the push-pull unit; False keeps the plain convolution, for a baseline.
        avg_pool_size: Side of the window that averages the pull response, an odd number of output pixels; 0 for no
            averaging.
        alpha: Inhibition strength, one number. For a trainable alpha its initial value, one number or one for each
            output channel; None draws it uniformly from [0, 1), or takes 0.5 where timm's weights are loaded.
        trainable_alpha: Train one alpha for each output channel; False keeps the given number.
        pull_kernel: 'inverted' for the paper's kernel, or 'negated', see :func:`~timm_pushpull.push_pull_conv2d`.
        stem_type: '', 'deep' or 'deep_tiered', as for timm's ``ResNet``, or 'cifar' for images of about 32x32: a 3x3
            convolution of stride 1 and no max-pool. Every feature map then has four times the side.
        output_stride: Stride of the last feature map: 32, 16 or 8; with the 'cifar' stem 8, 4 or 2.
        aa_layer: Anti-aliasing layer: a class, as for timm's ``ResNet``, or 'blur' or 'avg'.
        contrast_norm: Give each image mean 0 and standard deviation 1 before the stem, see
            :func:`~timm_pushpull.layers.contrast_norm.normalize_contrast`.
        augment: 'prime' augments each batch with :class:`~timm_pushpull.PRIME` in training mode, with the settings for
            32x32 under the 'cifar' stem and those for ImageNet otherwise; None for no augmentation.
        augment_splits: Number of ``train.py --aug-splits``, whose first split ``augment`` leaves clean; 1 without it.
        **kwargs: Keyword arguments of timm's ``ResNet``.

    Raises:
        ValueError: If a setting is refused by :class:`~timm_pushpull.PushPullConv2d`, or if there is no such stride,
            anti-aliasing layer or augmentation.
    """

    def __init__(
        self,
        *args: Any,
        push_pull: bool = True,
        avg_pool_size: int = 3,
        alpha: float | Sequence[float] | None = None,
        trainable_alpha: bool = True,
        pull_kernel: PullKernel = 'inverted',
        stem_type: str = '',
        output_stride: int = 32,
        aa_layer: str | type[nn.Module] | None = None,
        contrast_norm: bool = False,
        augment: str | None = None,
        augment_splits: int = 1,
        **kwargs: Any,
    ) -> None:
        check_arguments(push_pull, contrast_norm, augment, augment_splits)
        if isinstance(aa_layer, str):
            aa_layer = _aa_layer(aa_layer)
        cifar = stem_type == 'cifar'
        if cifar:
            if output_stride not in (2, 4, 8, 16, 32):
                raise InputError(f"output_stride must be 8, 4 or 2 with stem_type='cifar', got {output_stride}.")
            stem_type, output_stride = '', min(4 * output_stride, 32)
        kwargs.update(stem_type=stem_type, output_stride=output_stride, aa_layer=aa_layer)
        super().__init__(*args, **kwargs)
        if cifar:
            self._shrink_stem()
        name = 'conv1.0' if isinstance(self.conv1, nn.Sequential) else 'conv1'  # deep stem or a single convolution
        if push_pull:
            conv: Any = self.get_submodule(name)
            unit = PushPullConv2d.from_conv2d(conv, avg_pool_size, alpha, trainable_alpha, pull_kernel)
            self.set_submodule(name, unit)
        self.contrast_norm = contrast_norm
        if contrast_norm:
            add_contrast_norm(self.get_submodule(name))
        _guard_and_augment(self, contrast_norm, aa_layer, augment, augment_splits, cifar)

    def _shrink_stem(self) -> None:
        conv = nn.Conv2d(self.in_chans, 64, kernel_size=3, padding=1, bias=False).to(next(self.conv1.parameters()))
        nn.init.kaiming_normal_(conv.weight, mode='fan_out', nonlinearity='relu')
        self.set_submodule('conv1', conv)
        self.set_submodule('maxpool', nn.Identity())
        for stage in self.feature_info:
            info: dict[str, Any] = stage
            info['reduction'] //= 2 if info['module'] == 'act1' else 4

    def extra_repr(self) -> str:
        return 'contrast_norm=True' if self.contrast_norm else ''

    def forward_stem(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layers before the first stage; in inference on a CPU on chunks of the batch."""
        if not torch.jit.is_scripting():
            stem: Any = (self.conv1, self.bn1, self.act1, self.maxpool)
            if use_chunks(stem, x):
                return stem_in_chunks(stem, x)
        return self.maxpool(self.act1(self.bn1(self.conv1(x))))

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the last feature map, as timm's ``ResNet`` does."""
        x = self.forward_stem(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq([self.layer1, self.layer2, self.layer3, self.layer4], x, flatten=True)
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))  # type: ignore[operator]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Renamed here too, because timm's `--initial-checkpoint` calls no filter function.
        rename_original(state_dict, self, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _guard_and_augment(
    model: nn.Module,
    contrast_norm: bool = False,
    aa_layer: str | type[nn.Module] | None = None,
    augment: str | None = None,
    augment_splits: int = 1,
    cifar: bool = False,
) -> None:
    settings: dict[str, Any] = {'contrast_norm': True} if contrast_norm else {}
    if aa_layer is not None:
        layer = _aa_layer(aa_layer) if isinstance(aa_layer, str) else aa_layer
        settings['aa_layer'] = getattr(layer, '__name__', repr(layer))
    guard_settings(model, settings)
    if augment == 'prime':
        augment_in_training(model, PRIME.cifar() if cifar else PRIME.imagenet(), augment_splits)


def _aa_layer(name: str) -> type[nn.Module]:
    """Return a layer by its name: timm's ``ResNet`` takes the class alone."""
    layers: dict[str, type[nn.Module]] = {'blur': BlurPool2d, 'avg': nn.AvgPool2d}
    if name not in layers:
        raise InputError(f'aa_layer must be a class or one of {", ".join(layers)}, got {name!r}.')
    return layers[name]


def checkpoint_filter_fn(state_dict: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Fit a checkpoint of this package, of timm's ResNet or of the original code to a model.

    Args:
        state_dict: Weights by name.
        model: Network that will load the weights.

    Returns:
        Weights by the model's names; with the initial alpha for those of timm's ResNet.

    Raises:
        ValueError: If weights are missing or left over. The classifier may be: timm adapts it.
    """
    state_dict = dict(state_dict)
    original_unit = 'conv1.push_conv.weight' in state_dict
    rename_original(state_dict, model)
    if not original_unit:
        for name, module in model.named_modules():
            plain = not {f'{name}.alpha', f'{name}.{SETTINGS}'} & state_dict.keys()
            if isinstance(module, PushPullConv2d) and plain:
                state_dict |= {f'{name}.{key}': value for key, value in initial_unit_state(module).items()}
                warn_to_fine_tune(weights_name(model))
    names = model.state_dict().keys()
    optional = ('.alpha', '.num_batches_tracked')
    missing = [k for k in names - state_dict.keys() if not k.endswith(optional) and not is_settings(k)]
    unexpected = [k for k in state_dict.keys() - names if k != SETTINGS]  # settings raise their own error
    reasons = [
        f'{what} {", ".join(keys[:4])}{f" and {len(keys) - 4} more" if len(keys) > 4 else ""}'
        for what, found in (('it lacks', missing), ('it has no place for', unexpected))
        if (keys := sorted(k for k in found if not k.startswith('fc.')))
    ]
    if reasons:
        raise InputError(
            f'The checkpoint does not fit the model: {"; ".join(reasons)}. Give the model the arguments of the '
            'training.'
        )
    return state_dict


def _cifar_cfg() -> dict[str, Any]:
    return {
        'num_classes': 10,
        'input_size': (3, 32, 32),
        'pool_size': (4, 4),
        'crop_pct': 1.0,
        'interpolation': 'bilinear',
        'mean': CIFAR10_MEAN,
        'std': CIFAR10_STD,
        'first_conv': 'conv1',
        'classifier': 'fc',
        'license': 'apache-2.0',
        **PAPER,
    }


default_cfgs = generate_default_cfgs(
    {
        **plain_cfgs('pp_resnet18', 'resnet18'),
        **plain_cfgs('pp_resnet34', 'resnet34'),
        **plain_cfgs('pp_resnet50', 'resnet50'),
        **plain_cfgs('pp_resnet101', 'resnet101'),
        **plain_cfgs('pp_resnet152', 'resnet152'),
        **plain_cfgs('pp_resnext50_32x4d', 'resnext50_32x4d'),
        'pp_resnet18_cifar': _cifar_cfg(),
        'pp_resnet50_cifar': _cifar_cfg(),
        **{name: model.pretrained_cfg for name, model in HUB_MODELS.items()},
    }
)


def _create_pushpull_resnet(variant: str, pretrained: bool = False, **kwargs: Any) -> PushPullResNet:
    cfg, overlay = kwargs.pop('pretrained_cfg', None), dict(kwargs.pop('pretrained_cfg_overlay', None) or {})
    if cfg and isinstance(cfg, str) and cfg not in default_cfgs[variant].cfgs:
        raise RuntimeError(_no_such_tag(variant, cfg))
    resolved = resolve_pretrained_cfg(variant, cfg, overlay)
    hub_model = None if resolved.source else HUB_MODELS.get(f'{variant}.{resolved.tag}')
    if hub_model is not None:
        kwargs = {**hub_model.model_args, **kwargs}
    if pretrained:
        if not (resolved.has_weights or resolved.state_dict):
            raise RuntimeError(
                f'There are no pretrained weights of {variant}. Train the network ("timm-pushpull recipes" lists '
                f'recipes), use pretrained=False, or use weights of another network: {", ".join(HUB_MODELS)}.'
            )
        overlay.update(locate_weights(resolved, hub_model, kwargs.get('cache_dir')))
    model: Any = build_model_with_cfg(
        PushPullResNet,
        variant,
        pretrained,
        pretrained_cfg=cfg,
        pretrained_cfg_overlay=overlay,
        pretrained_filter_fn=checkpoint_filter_fn,
        **kwargs,
    )
    restore_sources(model, resolved)
    if hub_model is not None:
        model._model_args = hub_model.model_args  # timm adds the arguments of its caller
    # features_only: timm takes the layers out of the network; but feature_cls='hook' runs the network, its body.
    if not isinstance(getattr(model, 'body', model), PushPullResNet):
        names = ('contrast_norm', 'aa_layer', 'augment', 'augment_splits')
        arguments = {name: kwargs[name] for name in names if name in kwargs}
        _guard_and_augment(model, **arguments, cifar=kwargs.get('stem_type') == 'cifar')
    return model


def _no_such_tag(variant: str, tag: str) -> str:
    # Not at the top: the import of timm has no need of them.
    from ..checkpoint import model_args_of
    from ..recipes import list_recipes, read_recipe

    name = f'{variant}.{tag}'
    if name not in list_recipes():
        known = ', '.join(tag for tag in default_cfgs[variant].tags if tag)
        return f'{name} is not a model with weights; the tags of {variant} are {known or "none"}.'
    recipe = read_recipe(name)
    settings: dict[str, Any] = {
        **model_args_of(recipe),
        **{key: recipe[key] for key in ('input_size', 'crop_pct') if key in recipe},
    }
    words = ', '.join(f'{key}={value}' for key, value in settings.items())
    return (
        f'{name} is a recipe without weights ("timm-pushpull recipes" tells how to train it). Load a checkpoint into '
        f'{variant} with {words}.'
    )


@register_model
def pp_resnet18(pretrained: bool = False, **kwargs: Any) -> PushPullResNet:
    """Constructs a ResNet-18 with a push-pull stem."""
    model_args = dict(block=BasicBlock, layers=(2, 2, 2, 2))
    return _create_pushpull_resnet('pp_resnet18', pretrained, **dict(model_args, **kwargs))


@register_model
def pp_resnet34(pretrained: bool = False, **kwargs: Any) -> PushPullResNet:
    """Constructs a ResNet-34 with a push-pull stem."""
    model_args = dict(block=BasicBlock, layers=(3, 4, 6, 3))
    return _create_pushpull_resnet('pp_resnet34', pretrained, **dict(model_args, **kwargs))


@register_model
def pp_resnet50(pretrained: bool = False, **kwargs: Any) -> PushPullResNet:
    """Constructs a ResNet-50 with a push-pull stem."""
    model_args = dict(block=Bottleneck, layers=(3, 4, 6, 3))
    return _create_pushpull_resnet('pp_resnet50', pretrained, **dict(model_args, **kwargs))


@register_model
def pp_resnet101(pretrained: bool = False, **kwargs: Any) -> PushPullResNet:
    """Constructs a ResNet-101 with a push-pull stem."""
    model_args = dict(block=Bottleneck, layers=(3, 4, 23, 3))
    return _create_pushpull_resnet('pp_resnet101', pretrained, **dict(model_args, **kwargs))


@register_model
def pp_resnet152(pretrained: bool = False, **kwargs: Any) -> PushPullResNet:
    """Constructs a ResNet-152 with a push-pull stem."""
    model_args = dict(block=Bottleneck, layers=(3, 8, 36, 3))
    return _create_pushpull_resnet('pp_resnet152', pretrained, **dict(model_args, **kwargs))


@register_model
def pp_resnext50_32x4d(pretrained: bool = False, **kwargs: Any) -> PushPullResNet:
    """Constructs a ResNeXt-50 32x4d with a push-pull stem."""
    model_args = dict(block=Bottleneck, layers=(3, 4, 6, 3), cardinality=32, base_width=4)
    return _create_pushpull_resnet('pp_resnext50_32x4d', pretrained, **dict(model_args, **kwargs))


@register_model
def pp_resnet18_cifar(pretrained: bool = False, **kwargs: Any) -> PushPullResNet:
    """Constructs a ResNet-18 for 32x32 images with a push-pull stem."""
    model_args = dict(block=BasicBlock, layers=(2, 2, 2, 2), stem_type='cifar')
    return _create_pushpull_resnet('pp_resnet18_cifar', pretrained, **dict(model_args, **kwargs))


@register_model
def pp_resnet50_cifar(pretrained: bool = False, **kwargs: Any) -> PushPullResNet:
    """Constructs a ResNet-50 for 32x32 images with a push-pull stem."""
    model_args = dict(block=Bottleneck, layers=(3, 4, 6, 3), stem_type='cifar')
    return _create_pushpull_resnet('pp_resnet50_cifar', pretrained, **dict(model_args, **kwargs))
