"""A checkpoint knows the settings that its weights depend on, and does not load into others."""

import copy
import json

import pytest
import timm
import torch
from conftest import SMALL
from safetensors.torch import load_file, save_file
from timm.models import load_checkpoint
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from timm_pushpull import convert_to_push_pull

NAME = 'pp_resnet18'
# Settings of the training, settings of the model, what the error says of both.
MISMATCHES = [
    (dict(avg_pool_size=5), {}, 'trained with avg_pool_size=5, the model has avg_pool_size=3'),
    (dict(avg_pool_size=0), dict(avg_pool_size=5), 'trained with avg_pool_size=0, the model has avg_pool_size=5'),
    (dict(pull_kernel='negated'), {}, "trained with pull_kernel='negated', the model has pull_kernel='inverted'"),
    (dict(alpha=2.0, trainable_alpha=False), {}, 'trained with alpha=2.0, the model has no alpha'),
    (
        dict(alpha=2.0, trainable_alpha=False),
        dict(alpha=0.5, trainable_alpha=False),
        'trained with alpha=2.0, the model has alpha=0.5',
    ),
    (dict(contrast_norm=True), {}, 'trained with contrast_norm=True, the model has no contrast_norm'),
    (
        dict(contrast_norm=True, push_pull=False),
        dict(push_pull=False),
        'trained with contrast_norm=True, the model has no contrast_norm',
    ),
    ({}, dict(contrast_norm=True), 'trained with no contrast_norm, the model has contrast_norm=True'),
    ({}, dict(aa_layer='avg'), "trained with no aa_layer, the model has aa_layer='AvgPool2d'"),
    (dict(aa_layer='blur'), {}, "trained with aa_layer='BlurPool2d', the model has no aa_layer"),
    (
        dict(aa_layer='blur', push_pull=False),
        dict(aa_layer='avg', push_pull=False),
        "trained with aa_layer='BlurPool2d', the model has aa_layer='AvgPool2d'",
    ),
]
mismatches = pytest.mark.parametrize('trained, given, message', MISMATCHES)


def create(name=NAME, **settings):
    return timm.create_model(name, num_classes=3, **SMALL, **settings).eval()


@mismatches
@pytest.mark.parametrize('ending', ['pth.tar', 'safetensors'])
def test_other_settings_are_refused_and_both_are_named(trained, given, message, ending, tmp_path):
    model, path = create(**trained), tmp_path / f'last.{ending}'
    if ending == 'safetensors':
        save_file(model.state_dict(), path)
    else:
        torch.save({'state_dict': model.state_dict(), 'state_dict_ema': model.state_dict()}, path)
    for load in (
        lambda: load_checkpoint(create(**given), str(path)),  # --checkpoint, --resume, --initial-checkpoint
        lambda: load_checkpoint(create(**given), str(path), use_ema=True),
        lambda: load_checkpoint(create(**given), str(path), strict=False),
        lambda: create(**given, checkpoint_path=str(path)),
        lambda: create(**given, pretrained=True, pretrained_cfg_overlay=dict(file=str(path), num_classes=3)),
    ):
        with pytest.raises(RuntimeError) as error:
            load()
        assert message in ' '.join(str(error.value).split())
    same = create(**trained)
    load_checkpoint(same, str(path))
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(same(x), model(x))


@mismatches
def test_state_dicts_without_settings_load_as_they_are(trained, given, message):
    older = {key: value for key, value in create(**trained).state_dict().items() if not key.endswith('settings')}
    model = create(**given)
    own = {key: value for key, value in model.state_dict().items() if key.endswith('settings')}
    fits = 'alpha' not in trained and trained.get('push_pull', True) == given.get('push_pull', True)
    assert model.load_state_dict(older, strict=fits).missing_keys == [] or not fits
    for key, value in own.items():
        assert torch.equal(model.state_dict()[key], value)


def test_plain_networks_have_no_settings_and_exchange_weights_with_timm():
    plain, ours = create('resnet18'), create(push_pull=False)
    assert list(ours.state_dict()) == list(plain.state_dict())
    ours.load_state_dict(plain.state_dict())
    plain.load_state_dict(ours.state_dict())
    assert create().load_state_dict(plain.state_dict()).missing_keys == []
    with pytest.raises(RuntimeError, match='conv1.settings'):
        plain.load_state_dict(create(alpha=1.0, trainable_alpha=False).state_dict())


@pytest.mark.parametrize('settings', [dict(contrast_norm=True), dict(aa_layer='blur')], ids=str)
@pytest.mark.parametrize('feature_cls', ['list', 'hook'])
def test_feature_extractors_have_the_settings(feature_cls, settings):
    trained, other = (
        timm.create_model(NAME, features_only=True, feature_cls=feature_cls, **each) for each in (settings, {})
    )
    with pytest.raises(RuntimeError, match=f'trained with {next(iter(settings))}=.*, the model has no'):
        other.load_state_dict(trained.state_dict())
    timm.create_model(NAME, features_only=True, feature_cls=feature_cls, **settings).load_state_dict(
        trained.state_dict()
    )


def test_the_error_says_how_to_load_all_the_same():
    state_dict = create(avg_pool_size=5).state_dict()
    with pytest.raises(RuntimeError, match="delete 'conv1.settings' from the state dict"):
        create().load_state_dict(state_dict)
    del state_dict['conv1.settings']
    create().load_state_dict(state_dict)
    state_dict['conv1.settings'] = torch.zeros(3, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match='conv1.settings of the checkpoint cannot be read'):
        create().load_state_dict(state_dict)


def test_averaged_checkpoints_load():
    """timm's avg_checkpoints.py averages in float64 and writes float32."""
    model = create(avg_pool_size=5, contrast_norm=True)
    averaged = {key: tensor.double().div(2).mul(2).float() for key, tensor in model.state_dict().items()}
    create(avg_pool_size=5, contrast_norm=True).load_state_dict(averaged)
    with pytest.raises(RuntimeError, match='avg_pool_size=5, the model has avg_pool_size=3'):
        create(contrast_norm=True).load_state_dict(averaged)


def test_settings_are_json():
    model = create(avg_pool_size=5, alpha=0.1, trainable_alpha=False, contrast_norm=True)
    unit, network = (json.loads(bytes(model.state_dict()[key].tolist())) for key in ('conv1.settings', 'settings'))
    assert unit == {'avg_pool_size': 5, 'pull_kernel': 'inverted', 'alpha': 0.1} and network == {'contrast_norm': True}


def test_copies_casts_averages_and_devices_keep_the_settings(tmp_path):
    model = create(avg_pool_size=5, contrast_norm=True)
    ema = ModelEmaV3(model, decay=0.5, foreach=False)
    ema.update(model)
    foreach = ModelEmaV3(model, decay=0.5, foreach=True)
    foreach.update(model)
    second = ModelEmaV2(model, decay=0.9999)
    of_torch = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9999), use_buffers=True)
    for _ in range(100):  # both average the bytes of the buffers too
        second.update(model)
        of_torch.update_parameters(model)
    meta = create(avg_pool_size=5, contrast_norm=True, device='meta').to_empty(device='cpu')
    meta.load_state_dict(model.state_dict())
    averages = (average.module for average in (ema, foreach, second, of_torch))
    for other in (copy.deepcopy(model), copy.deepcopy(model).half(), *averages, meta):
        create(avg_pool_size=5, contrast_norm=True).load_state_dict(other.float().state_dict())
        with pytest.raises(RuntimeError, match='avg_pool_size=5'):
            create(contrast_norm=True).load_state_dict(other.state_dict())
    save_file(model.state_dict(), tmp_path / 'model.safetensors')
    assert load_file(tmp_path / 'model.safetensors').keys() == model.state_dict().keys()


def test_converted_models_and_layers_in_a_sequence():
    five, three = (convert_to_push_pull(timm.create_model('convnext_atto', num_classes=3), size) for size in (5, 3))
    with pytest.raises(RuntimeError, match='avg_pool_size=5, the model has avg_pool_size=3'):
        three.load_state_dict(five.state_dict())
    deep = create(stem_type='deep', avg_pool_size=5)
    with pytest.raises(RuntimeError, match="delete 'conv1.0.settings'"):
        create(stem_type='deep').load_state_dict(deep.state_dict())
    with pytest.raises(RuntimeError, match="delete '0.conv1.settings'"):
        nn.Sequential(create()).load_state_dict(nn.Sequential(create(avg_pool_size=5)).state_dict())
