"""Any network of timm with a push-pull stem, by name."""

import json

import pytest
import timm
import torch
from timm.layers import Conv2dSame
from timm.models import PretrainedCfg, save_for_hf
from torch import nn

from timm_pushpull import PushPullConv2d, convert_to_push_pull
from timm_pushpull.models.convert import first_convs

BASE = 'mobilenetv3_small_050'


def create(base=BASE, **settings):
    return timm.create_model('pp_any', base=base, num_classes=3, **settings).eval()


def saved(model, folder, **settings):
    save_for_hf(model, folder, model_args=dict(base=BASE, num_classes=3, **settings), safe_serialization=True)
    return f'local-dir:{folder}'


def images():
    return torch.randn(2, 3, 64, 64)


@pytest.mark.parametrize('network', ['pp_mobilenetv3_small_100', 'pp_any'])
def test_the_unit_is_all_that_differs_from_timm(network):
    base = 'mobilenetv3_small_100'
    torch.manual_seed(0)
    kwargs = dict(base=base) if network == 'pp_any' else {}
    model = timm.create_model(network, avg_pool_size=5, alpha=0.25, pull_kernel='negated', num_classes=3, **kwargs)
    torch.manual_seed(0)
    converted = convert_to_push_pull(timm.create_model(base, num_classes=3), 5, 0.25, True, 'negated')
    assert str(model) == str(converted)
    assert torch.equal(model.eval()(x := images()), converted.eval()(x))
    assert {**model.pretrained_cfg, 'architecture': base} == timm.get_pretrained_cfg(base).to_dict()
    assert model.pretrained_cfg['architecture'] == network


@pytest.mark.parametrize(
    'settings',
    [
        {},
        dict(avg_pool_size=5, alpha=0.5, trainable_alpha=False),
        dict(pull_kernel='negated', contrast_norm=True),
        dict(push_pull=False),
        dict(push_pull=False, contrast_norm=True),
    ],
    ids=str,
)
def test_a_saved_network_comes_back(settings, tmp_path):
    model, x = create(**settings), images()
    name = saved(model, tmp_path, **settings)
    assert json.loads((tmp_path / 'config.json').read_text())['architecture'] == 'pp_any'
    again = timm.create_model(name, pretrained=True).eval()
    assert str(again) == str(model) and torch.equal(again(x), model(x))
    features = timm.create_model(name, pretrained=True, features_only=True).eval()
    assert torch.equal(features(x)[-1], model.forward_intermediates(x, intermediates_only=True)[-1])
    other = timm.create_model(name, pretrained=True, num_classes=7, in_chans=1).eval()
    assert other(x[:, :1]).shape == (2, 7)
    torch.save(model.state_dict(), tmp_path / 'last.pth')
    assert torch.equal(create(**settings, checkpoint_path=tmp_path / 'last.pth')(x), model(x))


@pytest.mark.parametrize(
    'settings', [dict(avg_pool_size=5), dict(alpha=torch.tensor(0.3), trainable_alpha=False)], ids=str
)
def test_a_model_that_python_converted_comes_back(settings, tmp_path):
    model = convert_to_push_pull(timm.create_model(BASE, num_classes=3), **settings).eval()
    given = {} if hasattr(timm.models, 'get_model_args') else dict(model_args=model._model_args)  # since timm 1.0.31
    save_for_hf(model, tmp_path, safe_serialization=True, **given)
    again, x = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval(), images()
    assert str(again) == str(model) and torch.equal(again(x), model(x))
    other = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, num_classes=7)
    assert isinstance(other.conv_stem, PushPullConv2d)


@pytest.mark.parametrize(
    'settings, words',
    [
        (dict(avg_pool_size=5), 'trained with avg_pool_size=3, the model has avg_pool_size=5'),
        (dict(contrast_norm=False), 'trained with contrast_norm=True, the model has no contrast_norm'),
        (dict(push_pull=False), 'are those of a push-pull unit: leave push_pull=False out'),
    ],
)
def test_other_settings_are_refused(settings, words, tmp_path):
    model = create(contrast_norm=True)
    name = saved(model, tmp_path, contrast_norm=True)
    with pytest.raises(RuntimeError) as error:
        timm.create_model(name, pretrained=True, **settings)
    assert words in str(error.value)
    if 'push_pull' not in settings:
        with pytest.raises(RuntimeError, match=words):
            create(**{'contrast_norm': True, **settings}).load_state_dict(model.state_dict())


def test_a_contrast_norm_that_the_weights_were_not_trained_with_is_refused(tmp_path):
    name = saved(create(), tmp_path)
    with pytest.raises(RuntimeError, match='trained with no contrast_norm, the model has contrast_norm=True'):
        timm.create_model(name, pretrained=True, contrast_norm=True)


@pytest.mark.parametrize('push_pull', [True, False])
def test_contrast_norm(push_pull):
    model, x = create(contrast_norm=True, push_pull=push_pull), images()
    torch.testing.assert_close(model(3 * x + 2), model(x), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(create(push_pull=push_pull)(3 * x + 2), create(push_pull=push_pull)(x))


def test_augment():
    model = create(augment='prime')
    seen = []
    (layer,) = first_convs(model).values()
    layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(-1, 1, 1) for key in ('mean', 'std'))
    x = (torch.randint(256, (4, 3, 64, 64)) / 255 - mean) / std
    model(x)
    model.train()(x)
    assert torch.equal(seen[0], x) and not torch.allclose(seen[1], x)
    assert create(augment='prime', augment_splits=2).train()(x).shape == (4, 3)


@pytest.mark.parametrize(
    'arguments, words',
    [
        (dict(base='nowhere'), "base must be a plain network of timm, such as convnext_tiny.fb_in1k, got 'nowhere'"),
        (dict(base=50), 'got 50'),
        (dict(base='pp_resnet18'), "got 'pp_resnet18'"),
        (dict(base='csatv2'), 'csatv2 cannot be converted: timm names no first convolution'),
        (dict(base=BASE, push_pull='no'), "push_pull must be True or False, got 'no'"),
        (dict(base=BASE, augment='mix'), "augment must be 'prime' or None, got 'mix'"),
        (dict(base=BASE, augment_splits=3), 'augment_splits=3 needs an augmentation'),
        (dict(base=BASE, avg_pool_size=2), 'avg_pool_size must be'),
    ],
)
def test_refused(arguments, words):
    with pytest.raises(ValueError) as error:
        timm.create_model('pp_any', **arguments)
    assert words in str(error.value)


def test_a_tag_that_the_base_does_not_have():
    for arguments in (dict(model_name='pp_mobilenetv3_small_100.typo'), dict(model_name='pp_any', base=f'{BASE}.typo')):
        with pytest.raises(RuntimeError, match='Invalid pretrained tag .typo.'):
            timm.create_model(**arguments)


def test_fields_of_a_cfg_change_those_of_the_base(tmp_path, monkeypatch):
    """timm's scripts resolve the cfg of pp_any, which has no fields of a network, and pass that with their changes."""
    name, model = saved(create(), tmp_path), create(pretrained_cfg=dict(mean=(0.1, 0.2, 0.3), num_classes=7))
    changed = {**timm.get_pretrained_cfg(BASE).to_dict(), 'mean': (0.1, 0.2, 0.3), 'num_classes': 7}
    assert {**model.pretrained_cfg, 'architecture': BASE} == changed
    assert timm.create_model('pp_any', base=BASE, pretrained_cfg=dict(num_classes=7)).num_classes == 7
    ours, file = timm.create_model(name, pretrained=True), str(tmp_path / 'model.safetensors')
    again = create(pretrained=True, pretrained_cfg=PretrainedCfg(file=file, num_classes=3, std=(0.4, 0.5, 0.6)))
    assert torch.equal(again(x := images()), ours.eval()(x))
    assert again.pretrained_cfg['std'] == (0.4, 0.5, 0.6) and again.pretrained_cfg['first_conv'] == 'conv_stem'
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    torch.save(create(push_pull=False).state_dict(), tmp_path / 'plain.pth')
    elsewhere = create(pretrained=True, pretrained_cfg=dict(url=f'file://{tmp_path}/plain.pth', num_classes=3))
    assert elsewhere.pretrained_cfg['url'].endswith('plain.pth') and 'hf_hub_id' not in elsewhere.pretrained_cfg


@pytest.mark.parametrize('settings', [dict(base='crossvit_9_240'), dict(base='resnet18', stem_type='deep')], ids=str)
def test_units_elsewhere_come_back(settings, tmp_path):
    """Two first convolutions, and one that timm's cfg names otherwise."""
    model = create(**settings)
    torch.save(model.state_dict(), tmp_path / 'last.pth')
    overlay = dict(file=str(tmp_path / 'last.pth'), num_classes=3)
    again = create(**settings, pretrained=True, pretrained_cfg_overlay=overlay)
    for ours, theirs in zip(first_convs(again).values(), first_convs(model).values(), strict=True):
        assert torch.equal(ours.alpha, theirs.alpha)


@pytest.mark.parametrize('base', ['crossvit_9_240', 'test_vit', 'test_nfnet', 'test_byobnet', 'tf_efficientnet_lite0'])
def test_kinds_of_networks(base):
    model = create(base)
    size = model.pretrained_cfg['input_size']
    layers = first_convs(model).values()
    assert len(layers) == (2 if 'crossvit' in base else 1) and all(
        isinstance(layer, PushPullConv2d) for layer in layers
    )
    model.train()(torch.randn(2, *size)).square().mean().backward()
    assert all(parameter.grad is not None for layer in layers for parameter in layer.parameters())
    plain = create(base, push_pull=False)
    assert all(type(layer) in (nn.Conv2d, Conv2dSame) or 'nfnet' in base for layer in first_convs(plain).values())
