"""Warm starts: `pretrained=True` loads the weights of timm's plain networks, here random ones from a local Hub."""

import copy
import logging
import os
import shutil
import subprocess
import sys
import textwrap

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import save_plain
from safetensors.torch import load_file, save_file
from timm.models import get_arch_pretrained_cfgs, save_for_hf
from torch import nn

from timm_pushpull import convert_to_push_pull, update_stem_bn
from timm_pushpull.errors import InputError
from timm_pushpull.layers.push_pull import PushPullConv2d
from timm_pushpull.models.pretrained import HUB_MODELS
from timm_pushpull.models.pushpull_any import NETWORKS

RESNETS = ['resnet18', 'resnet34', 'resnet50', 'resnet101', 'resnet152', 'resnext50_32x4d']
TIMM, ANY = 'timm/resnet18.a1_in1k', 'timm/mobilenetv3_small_100.lamb_in1k'


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    """Repositories of timm's plain networks."""
    folders = {repo_id: tmp_path_factory.mktemp('plain') for repo_id in (TIMM, ANY)}
    for repo_id, folder in folders.items():
        save_plain(repo_id.removeprefix('timm/'), folder)
    return folders


@pytest.fixture
def published(hub, folders):
    for repo_id, folder in folders.items():
        hub.host(repo_id, folder)
    return hub


@pytest.fixture
def warnings_of_timm(caplog):
    with caplog.at_level(logging.WARNING, 'timm'):
        yield caplog


def images(number=2):
    return torch.randn(number, 3, 64, 64, generator=torch.Generator().manual_seed(3))


# Registration


@pytest.mark.parametrize('plain', [*RESNETS, *NETWORKS])
def test_a_network_has_the_tags_of_its_plain_network(plain):
    theirs = get_arch_pretrained_cfgs(plain)
    ours = {name: cfg for name, cfg in get_arch_pretrained_cfgs(f'pp_{plain}').items() if name not in HUB_MODELS}
    assert ours.keys() == {f'pp_{name}' for name in theirs}
    for name, cfg in theirs.items():
        fields = {**cfg.to_dict(), 'architecture': f'pp_{plain}'}
        assert ours[f'pp_{name}'].to_dict() == fields and fields['hf_hub_id'] == f'timm/{name}'
    assert timm.get_pretrained_cfg(f'pp_{plain}').tag == timm.get_pretrained_cfg(plain).tag


def test_the_registered_names():
    cifar = {'pp_resnet18_cifar', 'pp_resnet50_cifar'}
    names = {*(f'pp_{name}' for name in (*RESNETS, *NETWORKS)), *cifar, 'pp_any'}
    assert set(timm.list_models('pp_*')) == names and len(names) == 40
    assert set(timm.list_models(module='pushpull_resnet')) == {f'pp_{name}' for name in RESNETS} | cifar
    assert {name for name in names if timm.is_model_pretrained(name)} == names - cifar - {'pp_any'}


@pytest.mark.parametrize('name', ['pp_resnet18', 'pp_resnet50.tv_in1k', 'pp_convnext_atto'])
def test_without_weights_a_network_is_the_papers(name):
    model = timm.create_model(name)
    assert model.num_classes == 1000 and model.pretrained_cfg['input_size'][1:] in ((224, 224), (288, 288))
    (unit,) = (module for module in model.modules() if isinstance(module, PushPullConv2d))
    assert len(unit.alpha.unique()) > 1  # drawn


# Warm starts


@pytest.mark.parametrize('name', ['pp_resnet18', 'pp_resnet18.a1_in1k', 'pp_mobilenetv3_small_100'])
def test_a_warm_start(name, published, folders, warnings_of_timm):
    model = timm.create_model(name, pretrained=True).eval()
    plain_name = name.removeprefix('pp_')
    repo_id = TIMM if 'resnet18' in name else ANY
    plain = timm.create_model(f'local-dir:{folders[repo_id]}', pretrained=True).eval()
    (path,) = (name for name, module in model.named_modules() if isinstance(module, PushPullConv2d))
    ours, theirs = model.state_dict(), plain.state_dict()
    assert ours.keys() - theirs.keys() == {f'{path}.alpha', f'{path}.settings'}
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    unit = model.get_submodule(path)
    assert (
        unit.avg_pool_size == 3
        and unit.pull_kernel == 'inverted'
        and torch.equal(unit.alpha, torch.full_like(unit.alpha, 0.5))
    )
    (record,) = warnings_of_timm.records
    assert record.levelname == 'WARNING' and record.name.startswith('timm') and '\n' not in record.message
    tagged = name if '.' in name else f'{name}.{timm.get_pretrained_cfg(name).tag}'
    assert record.message.startswith(
        f"{tagged}: timm's weights of the plain network in a network with a push-pull unit. Fine-tune"
    )
    assert 'timm_pushpull.update_stem_bn(model' in record.message
    cfg = timm.get_pretrained_cfg(name).to_dict()
    assert model.pretrained_cfg == cfg and cfg['hf_hub_id'] == repo_id
    assert len(published.downloads()) == 1
    # The negated kernel with alpha 1 and no average is the plain network.
    settings = dict(pull_kernel='negated', alpha=1.0, avg_pool_size=0)
    model = timm.create_model(name, pretrained=True, **settings).eval()
    torch.testing.assert_close(model(images()), plain(images()), rtol=1e-4, atol=1e-4)
    # And without the unit it is timm's, to the last bit and without a warning.
    warnings_of_timm.clear()
    model = timm.create_model(name, pretrained=True, push_pull=False).eval()
    theirs = timm.create_model(plain_name, pretrained=True).eval()
    assert torch.equal(model(images()), theirs(images())) and not warnings_of_timm.records
    assert type(model.get_submodule(path)) is type(theirs.get_submodule(path))


@pytest.mark.parametrize('name', ['pp_resnet18', 'pp_mobilenetv3_small_100'])
def test_alpha_of_a_warm_start(name, published):
    def alpha(**settings):
        model = timm.create_model(name, pretrained=True, **settings)
        return next(module for module in model.modules() if isinstance(module, PushPullConv2d)).alpha

    channels = len(alpha())
    values = [index / channels for index in range(channels)]
    assert alpha(alpha=values).tolist() == pytest.approx(values)
    assert set(alpha(alpha=2.0).tolist()) == {2.0}
    assert alpha(alpha=0.25, trainable_alpha=False) == 0.25


@pytest.mark.parametrize('name', ['pp_resnet18', 'pp_mobilenetv3_small_100'])
def test_adapted_as_timm_does(name, published):
    negated = dict(pull_kernel='negated', alpha=1.0, avg_pool_size=0)  # the plain network

    def both(**kwargs):
        torch.manual_seed(0)  # of a new classifier
        ours = timm.create_model(name, pretrained=True, **negated, **kwargs).eval()
        torch.manual_seed(0)
        theirs = timm.create_model(name.removeprefix('pp_'), pretrained=True, **kwargs).eval()
        x = images()[:, : kwargs.get('in_chans', 3)]
        return ours(x), theirs(x), ours

    for kwargs in (dict(in_chans=1), dict(num_classes=0), dict(num_classes=0, global_pool='')):
        ours, theirs, _ = both(**kwargs)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert both(num_classes=5)[0].shape == (2, 5)
    for kwargs in (dict(), dict(out_indices=(1, 3)), dict(in_chans=1)):
        ours, theirs, model = both(features_only=True, **kwargs)
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert model.pretrained_cfg['architecture'] == name and 'file' not in model.pretrained_cfg


def test_weights_of_a_plain_network_from_a_file(published, folders, warnings_of_timm, tmp_path):
    weights = load_file(folders[TIMM] / 'model.safetensors')
    save_file({**weights, 'fc.bias': weights['fc.bias'] + 1}, tmp_path / 'other.safetensors')
    overlay = dict(file=str(tmp_path / 'other.safetensors'))
    model = timm.create_model('pp_resnet18', pretrained=True, pretrained_cfg_overlay=overlay)
    assert set(model.conv1.alpha.tolist()) == {0.5} and len(warnings_of_timm.records) == 1
    assert torch.equal(model.fc.bias, weights['fc.bias'] + 1) and not published.downloads()


@pytest.mark.parametrize(
    'settings, words',
    [
        (dict(avg_pool_size=5), 'trained with avg_pool_size=3, the model has avg_pool_size=5: give'),
        (dict(pull_kernel='negated'), "trained with pull_kernel='inverted', the model has pull_kernel='negated': give"),
        (dict(contrast_norm=True), 'trained with no contrast_norm, the model has contrast_norm=True: give'),
        (dict(trainable_alpha=False, alpha=0.5), 'it has no place for conv1.alpha. Give the model the arguments'),
        (dict(push_pull=False), 'it has no place for conv1.alpha, conv1.settings. Give the model the arguments'),
        (dict(aa_layer='avg'), "trained with no aa_layer, the model has aa_layer='AvgPool2d': give"),
    ],
)
def test_our_weights_do_not_load_under_other_settings(settings, words):
    name = 'pp_resnet18.pp3_r64_imagenette'
    with pytest.raises((RuntimeError, InputError), match=words):
        timm.create_model(name, pretrained=True, **settings)
    timm.create_model(name, **settings)


def test_settings_that_the_weights_were_trained_with_may_be_given():
    name = 'pp_resnet18.pp3_negated_prime_contrastnorm_r64_imagenette'
    model = timm.create_model(name, pretrained=True, pull_kernel='negated', contrast_norm=True, augment=None)
    assert model.conv1.pull_kernel == 'negated'
    with pytest.raises(RuntimeError, match="trained with pull_kernel='negated', the model has pull_kernel='inverted'"):
        timm.create_model(name, pretrained=True, pull_kernel='inverted')


def test_without_a_network(hub, monkeypatch, tmp_path):
    """One short error, at once, that names what works."""
    code = """
        import timm
        timm.create_model('pp_resnet18.pp3_r64_imagenette', pretrained=True)
        timm.create_model('pp_resnet50', pretrained=True)
    """
    run = [sys.executable, '-c', textwrap.dedent(code)]
    environment = {**os.environ, 'HF_HOME': str(tmp_path), 'HF_HUB_OFFLINE': '1'}
    result = subprocess.run(run, env=environment, capture_output=True, text=True)
    assert result.returncode == 1 and result.stderr.count('Traceback') == 1
    *_, message = result.stderr.strip().splitlines()
    assert message == (
        'OSError: The weights of timm/resnet50.a1_in1k could not be fetched: HF_HUB_OFFLINE is set, and the cache does '
        f'not have them. Without a network these work: {", ".join(HUB_MODELS)}; and a file of weights, by '
        'pretrained_cfg_overlay=dict(file=FILE) or --pretrained-path FILE of train.py.'
    )
    assert hub.requests == []


# Damage, of all three kinds of names


@pytest.mark.parametrize(
    'name, repo_id',
    [('pp_resnet18', TIMM), ('pp_mobilenetv3_small_100', ANY), ('hf-hub:someone/ours', 'someone/ours')],
)
def test_damaged_bytes_are_never_used(name, repo_id, published, tmp_path):
    if repo_id == 'someone/ours':
        base = dict(base='mobilenetv3_small_050')  # timm keeps the arguments of a model since 1.0.31
        ours = timm.create_model('pp_any', **base)
        save_for_hf(ours, tmp_path / 'ours', model_args=base, safe_serialization=True)
        published.host(repo_id, tmp_path / 'ours')
    published.damage = -1
    for _ in range(2):  # the second time from the cache
        with pytest.raises(RuntimeError, match='is damaged: its SHA-256 is .*Delete the file and try again') as error:
            timm.create_model(name, pretrained=True)
        published.damage = None
    (blob,) = (path for path in (tmp_path / 'cache').rglob('blobs/*') if path.stat().st_size > 1e5)
    assert str(blob) in str(error.value)
    blob.unlink()
    timm.create_model(name, pretrained=True)


def test_pickled_weights_and_revisions(published, folders, tmp_path):
    """A repository without safetensors, as some of timm's were, and one of a revision."""
    model = timm.create_model(f'local-dir:{folders[TIMM]}', pretrained=True)
    torch.save(model.state_dict(), tmp_path / 'pytorch_model.bin')
    published.repositories.pop(TIMM)
    repository = published.host(TIMM, tmp_path)
    shutil.copy(folders[TIMM] / 'config.json', tmp_path)
    repository.tags['v1'] = repository.branch
    other = {key: value + 1 if key == 'fc.bias' else value for key, value in model.state_dict().items()}
    torch.save(other, tmp_path / 'pytorch_model.bin')
    published.host(TIMM, tmp_path)
    bias = model.fc.bias.detach()
    loaded = timm.create_model('pp_resnet18', pretrained=True, pretrained_cfg_overlay=dict(hf_hub_id=f'{TIMM}@v1'))
    assert torch.equal(loaded.fc.bias, bias)
    assert torch.equal(timm.create_model('pp_resnet18', pretrained=True).fc.bias, bias + 1)


def test_the_warning_names_the_base(published, warnings_of_timm):
    timm.create_model('pp_any', base=ANY.removeprefix('timm/'), pretrained=True)
    (record,) = warnings_of_timm.records
    assert record.message.startswith("mobilenetv3_small_100.lamb_in1k: timm's weights of the plain network")


# The BatchNorm after the stem


@pytest.mark.parametrize(
    'name, settings',
    [
        ('pp_resnet18', {}),
        ('pp_resnet18', {'stem_type': 'deep'}),
        ('pp_resnet18', {'stem_type': 'deep', 'contrast_norm': True}),
        ('resnet50d', {}),
        ('regnety_002', {}),
        ('tf_efficientnet_lite0', {}),
    ],
)
def test_the_batch_norm_after_the_stem_is_measured(name, settings):
    model = timm.create_model(name, **settings).eval()
    if not name.startswith('pp_'):
        convert_to_push_pull(model, alpha=0.5)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    batches = [images(number) * 3 + 1 for number in (5, 5)]
    update_stem_bn(model, ((batch, 'labels') for batch in batches))
    changed = [key for key, value in model.state_dict().items() if not torch.equal(value, before[key])]
    assert {key.rpartition('.')[2] for key in changed} == {'running_mean', 'running_var', 'num_batches_tracked'}
    (norm,) = {key.rpartition('.')[0] for key in changed}
    (unit,) = (module for module in model.modules() if isinstance(module, PushPullConv2d))
    x = F.group_norm(torch.cat(batches), 1) if settings.get('contrast_norm') else torch.cat(batches)
    responses = unit(x)
    found = model.get_submodule(norm)
    torch.testing.assert_close(found.running_mean, responses.mean((0, 2, 3)), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.running_var, responses.var((0, 2, 3)), rtol=0.05, atol=1e-3)
    assert not any(module.training for module in model.modules()) and found.momentum is not None


def stem_of(*layers):
    model = nn.Sequential(nn.Identity(), nn.Sequential(*layers))
    model.pretrained_cfg = {'first_conv': f'1.{len(layers) - 2}'}
    return model


def test_the_batch_norm_is_the_next_module():
    unit, other, norm = PushPullConv2d(3, 8, 3, alpha=0.5), nn.BatchNorm2d(8), nn.BatchNorm2d(8)
    update_stem_bn(stem_of(other, unit, norm), [images()])
    assert norm.num_batches_tracked == 1 and other.num_batches_tracked == 0


@pytest.mark.parametrize('features', [7, 9])
def test_a_batch_norm_of_other_channels_does_not_follow(features):
    with pytest.raises(ValueError, match='model must have a BatchNorm after 1.1, there is a BatchNorm2d'):
        update_stem_bn(stem_of(nn.Identity(), PushPullConv2d(3, 8, 3, alpha=0.5), nn.BatchNorm2d(features)), [images()])


def test_nothing_follows_the_first_convolution():
    model = stem_of(nn.Identity(), PushPullConv2d(3, 8, 3, alpha=0.5))
    model.pretrained_cfg = {'first_conv': '1.1'}
    with pytest.raises(ValueError, match='model must have a BatchNorm after 1.1, there is a NoneType'):
        update_stem_bn(model, [images()])


def test_no_batch_norm_to_measure():
    with pytest.raises(ValueError, match='model must have a BatchNorm after stem.0, there is a LayerNorm'):
        update_stem_bn(timm.create_model('pp_convnext_atto'), [images()])
    model = timm.create_model('pp_resnet18')
    before = model.bn1.running_mean.clone().add_(0)
    model.bn1.running_mean.fill_(2)
    with pytest.raises(ValueError, match='images must hold at least one batch'):
        update_stem_bn(model, [])
    assert torch.equal(model.bn1.running_mean, before + 2) and model.training


def test_a_batch_that_does_not_fit_changes_nothing():
    model = timm.create_model('pp_resnet18')
    model.bn1.eval()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match='to have 3 channels'):
        update_stem_bn(model, [images(), images()[:, :1]])
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert model.conv1.training and not model.bn1.training and model.bn1.momentum == 0.1
