import json

import pytest
import timm
import torch
from timm.data import resolve_data_config
from timm.layers import BlurPool2d
from timm.models import save_for_hf
from torch import nn

from timm_pushpull import PushPullConv2d

PLAIN_OF = {
    'pp_resnet18': 'resnet18',
    'pp_resnet34': 'resnet34',
    'pp_resnet50': 'resnet50',
    'pp_resnet101': 'resnet101',
    'pp_resnet152': 'resnet152',
    'pp_resnext50_32x4d': 'resnext50_32x4d',
}
CIFAR = ('pp_resnet18_cifar', 'pp_resnet50_cifar')


@pytest.mark.parametrize('name', PLAIN_OF)
def test_stem_is_all_that_differs_from_timm(name):
    model = timm.create_model(name, device='meta')
    plain = timm.create_model(PLAIN_OF[name], device='meta')
    shapes, plain_shapes = ({k: v.shape for k, v in m.state_dict().items()} for m in (model, plain))
    assert {k: v for k, v in shapes.items() if k not in ('conv1.alpha', 'conv1.settings')} == plain_shapes
    assert [(n, type(m)) for n, m in model.named_modules()][2:] == [(n, type(m)) for n, m in plain.named_modules()][2:]
    geometry = ('kernel_size', 'stride', 'padding', 'dilation', 'groups', 'bias')
    assert [getattr(model.conv1, g) for g in geometry] == [getattr(plain.conv1, g) for g in geometry]


def test_without_push_pull_the_network_is_timms():
    torch.manual_seed(0)
    baseline = timm.create_model('pp_resnet50', push_pull=False)
    torch.manual_seed(0)
    plain = timm.create_model('resnet50')
    assert type(baseline.conv1) is nn.Conv2d
    for (name, ours), (plain_name, theirs) in zip(
        baseline.state_dict().items(), plain.state_dict().items(), strict=True
    ):
        assert name == plain_name and torch.equal(ours, theirs)
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(baseline.eval()(x), plain.eval()(x))


def test_push_kernels_get_timms_initialisation():
    torch.manual_seed(0)
    weight = timm.create_model('pp_resnet18').conv1.weight
    torch.manual_seed(0)
    assert torch.equal(weight, timm.create_model('resnet18').conv1.weight)


def test_settings_travel_as_model_arguments():
    stem = timm.create_model('pp_resnet18', avg_pool_size=5, alpha=0.5, trainable_alpha=False).conv1
    assert isinstance(stem, PushPullConv2d)
    assert (stem.avg_pool_size, stem.alpha, stem.trainable_alpha) == (5, 0.5, False)
    with pytest.raises(ValueError, match='avg_pool_size must be'):
        timm.create_model('pp_resnet18', avg_pool_size=4)
    with pytest.raises(ValueError, match="push_pull must be True or False, got 'no'"):
        timm.create_model('pp_resnet18', push_pull='no')
    with pytest.raises(ValueError, match="contrast_norm must be True or False, got 'no'"):
        timm.create_model('pp_resnet18', contrast_norm='no')


@pytest.mark.parametrize('name', CIFAR)
def test_cifar_stem(name):
    model = timm.create_model(name).eval()
    assert (model.conv1.kernel_size, model.conv1.stride, model.conv1.padding) == ((3, 3), (1, 1), (1, 1))
    assert model.num_classes == 10
    assert model.forward_features(torch.randn(1, 3, 32, 32)).shape[-2:] == (4, 4)
    std = model.conv1.weight.std().item()
    assert std == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.1)  # Kaiming, fan-out
    config = resolve_data_config({}, model=model)
    assert config['input_size'] == (3, 32, 32) and config['crop_pct'] == 1.0
    assert config['mean'] == (0.4914, 0.4822, 0.4465) and config['std'] == (0.2470, 0.2435, 0.2616)
    assert type(timm.create_model(name, push_pull=False).conv1) is nn.Conv2d


@pytest.mark.parametrize('name', ['pp_resnet18', 'pp_resnet50', 'pp_resnet18_cifar'])
@pytest.mark.parametrize('out_indices', [None, (0, 2), (1, 4)])
def test_features_only(name, out_indices):
    kwargs = dict() if out_indices is None else dict(out_indices=out_indices)
    model = timm.create_model(name, features_only=True, **kwargs).eval()
    features = model(torch.randn(1, 3, 64, 64))
    assert [64 // f.shape[-1] for f in features] == model.feature_info.reduction()
    assert [f.shape[1] for f in features] == model.feature_info.channels()
    assert len(features) == len(out_indices or range(5))


@pytest.mark.parametrize('settings', [{}, {'contrast_norm': True}], ids=str)
@pytest.mark.parametrize('feature_cls', ['dict', 'hook', 'fx'])
def test_every_feature_extractor_of_timm(feature_cls, settings):
    x, found = torch.randn(1, 3, 64, 64), []
    for cls in ({}, {'feature_cls': feature_cls}):
        torch.manual_seed(0)
        model = timm.create_model('pp_resnet18', features_only=True, **cls, **settings).eval()
        features = model(x)
        found.append(features.values() if isinstance(features, dict) else features)
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    'name, output_stride, reductions',
    [
        ('pp_resnet18', 8, [2, 4, 8, 8, 8]),
        ('pp_resnet50', 16, [2, 4, 8, 16, 16]),
        ('pp_resnet18_cifar', 4, [1, 1, 2, 4, 4]),
        ('pp_resnet18_cifar', 32, [1, 1, 2, 4, 8]),
    ],
)
def test_output_stride(name, output_stride, reductions):
    model = timm.create_model(name, features_only=True, output_stride=output_stride).eval()
    assert model.feature_info.reduction() == reductions
    assert [64 // f.shape[-1] for f in model(torch.randn(1, 3, 64, 64))] == reductions


def test_output_stride_that_does_not_exist():
    with pytest.raises(ValueError, match='output_stride must be 8, 4 or 2'):
        timm.create_model('pp_resnet18_cifar', output_stride=3)


@pytest.mark.parametrize('name', ['pp_resnet18', 'pp_resnet50', 'pp_resnet18_cifar'])
def test_forward_intermediates(name):
    """The checks of timm's own two tests, which choose networks by the names of timm's modules."""
    model = timm.create_model(name).eval()
    x = torch.randn(1, 3, 64, 64)
    final, intermediates = model.forward_intermediates(x)
    assert torch.equal(final, model.forward_features(x)) and torch.equal(final, intermediates[-1])
    wrapped = timm.create_model(name, features_only=True)
    wrapped.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith('fc.')})
    for ours, theirs in zip(intermediates, wrapped.eval()(x), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert model.prune_intermediate_layers([0, 2]) == [0, 2]
    kept = model.forward_intermediates(x, [0, 2], stop_early=True, intermediates_only=True)
    for ours, theirs in zip(kept, intermediates[0:3:2], strict=True):
        torch.testing.assert_close(ours, theirs)


def test_inputs_and_heads():
    x = torch.randn(2, 1, 64, 64)
    model = timm.create_model('pp_resnet18', in_chans=1, num_classes=5, global_pool='max').eval()
    assert model.conv1.weight.shape[1] == 1 and model(x).shape == (2, 5)
    assert model.get_classifier() is model.fc and model.get_classifier(name_only=True) == 'fc'
    model.reset_classifier(7, 'avg')
    assert model(x).shape == (2, 7)
    model.reset_classifier(0)
    assert model(x).shape == (2, 512)
    assert timm.create_model('pp_resnet18', num_classes=0)(torch.randn(2, 3, 32, 32)).shape == (2, 512)


def test_every_parameter_gets_a_gradient():
    model = timm.create_model('pp_resnet18', drop_rate=0.1, drop_path_rate=0.1, drop_block_rate=0.1)
    model(torch.randn(2, 3, 64, 64)).mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_gradient_checkpointing():
    torch.manual_seed(0)
    model, x = timm.create_model('pp_resnet18', num_classes=3), torch.randn(2, 3, 64, 64)
    model(x).square().mean().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.set_grad_checkpointing()
    model(x).square().mean().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name])


def test_alpha_is_not_decayed():
    from timm.optim import param_groups_weight_decay

    model = timm.create_model('pp_resnet18')
    not_decayed, decayed = param_groups_weight_decay(model, 0.1)
    assert any(p is model.conv1.alpha for p in not_decayed['params'])
    assert any(p is model.conv1.weight for p in decayed['params'])


@pytest.mark.parametrize(
    'name, settings',
    [
        ('pp_resnet18', dict(avg_pool_size=5, alpha=0.5, trainable_alpha=False, num_classes=3)),
        ('pp_resnet18_cifar', dict(avg_pool_size=0, in_chans=1)),
        ('pp_resnet18', dict(push_pull=False)),
        ('pp_resnet18', dict(contrast_norm=True)),
    ],
)
def test_saved_and_reloaded_from_a_folder(name, settings, tmp_path):
    model = timm.create_model(name, **settings).eval()
    # timm 1.0.31 and later keep the settings.
    given = {} if hasattr(model, '_model_args') else dict(model_args=settings)
    save_for_hf(model, tmp_path, safe_serialization=True, **given)
    assert settings.items() <= json.loads((tmp_path / 'config.json').read_text())['model_args'].items()
    reloaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert str(reloaded) == str(model)
    x = torch.randn(1, settings.get('in_chans', 3), 64, 64)
    assert torch.equal(reloaded(x), model(x))


def test_deep_stem():
    model = timm.create_model('pp_resnet18', stem_type='deep', stem_width=32)
    assert isinstance(model.conv1[0], PushPullConv2d)
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 1000)


def test_anti_aliasing_by_name():
    named, given = (timm.create_model('pp_resnet18', aa_layer=layer) for layer in ('blur', BlurPool2d))
    named.load_state_dict(given.state_dict())
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(named.eval()(x), given.eval()(x))
    plain = timm.create_model('pp_resnet18', aa_layer='blur', push_pull=False)
    assert str(plain.layer2) == str(timm.create_model('resnetblur18').layer2)
    with pytest.raises(ValueError, match="aa_layer must be a class or one of blur, avg, got 'sinc'"):
        timm.create_model('pp_resnet18', aa_layer='sinc')
