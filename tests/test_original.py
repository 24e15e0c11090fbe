"""Checkpoints of timm's ResNets and of the original code, loaded in each way that timm knows."""

import datetime
import logging
import pathlib
from types import SimpleNamespace

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.data import resolve_data_config
from torch import nn

from timm_pushpull import convert_original_checkpoint, read_original_checkpoint

WAYS = ['pretrained_cfg_overlay', 'checkpoint_path']


def create(name, path, way, **kwargs):
    """Create a network with weights, as `--pretrained-path` and `--initial-checkpoint` do."""
    if way == 'checkpoint_path':
        return timm.create_model(name, checkpoint_path=str(path), **kwargs).eval()
    overlay = dict(file=str(path), num_classes=kwargs.get('num_classes', 1000))
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).eval()


class OriginalResNet(nn.Module):
    """ResNet-18 of the original code: its names, and a stem with a bias."""

    def __init__(self, stem, num_classes):
        super().__init__()
        blocks = timm.create_model('resnet18', num_classes=num_classes)
        self.conv1 = stem
        self.bn = blocks.bn1
        for name in ('layer1', 'layer2', 'layer3', 'layer4'):
            setattr(self, name, getattr(blocks, name))
        self.classifier = blocks.fc

    def forward(self, x):
        x = nn.functional.max_pool2d(self.bn(self.conv1(x)).relu(), 3, 2, 1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.classifier(x.mean((2, 3)))


class OriginalUnit(nn.Module):
    def __init__(self, avg_kernel_size, alpha):
        super().__init__()
        self.push_conv = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.avg = nn.AvgPool2d(avg_kernel_size, 1, avg_kernel_size // 2, count_include_pad=False)
        self.bias = nn.Parameter(torch.rand(64) * 2 - 1)
        if alpha is None:
            self.pull_inhibition_strength = nn.Parameter(torch.rand(64))
        else:
            self.pull_inhibition_strength = alpha

    def forward(self, x):
        weight = self.push_conv.weight
        pull_kernel = weight.amax((1, 2, 3), True) + weight.amin((1, 2, 3), True) - weight
        pull = self.avg(nn.functional.conv2d(x, pull_kernel, None, 2, 3)).relu()
        alpha = torch.as_tensor(self.pull_inhibition_strength).view(-1, 1, 1)
        return self.push_conv(x).relu() - alpha * pull + self.bias.view(-1, 1, 1)


def save_original(stem, path, **hyper_parameters):
    torch.manual_seed(0)
    model = OriginalResNet(stem, num_classes=10)
    with torch.no_grad():
        for _ in range(2):
            model(torch.randn(2, 3, 64, 64))  # running statistics other than the initial ones
        for block in (model.layer1[0], model.layer4[1]):
            block.bn2.weight.fill_(1)
    torch.save(
        {
            'epoch': 19,
            'pytorch-lightning_version': '2.1.3',
            'state_dict': model.state_dict(),
            'hyper_parameters': {'model': 'resnet18', 'num_classes': 10, **hyper_parameters},
        },
        path,
    )
    return model.eval()


STEMS = {
    'pp3': (lambda: OriginalUnit(3, None), dict(avg_kernel_size=3), dict()),
    'pp5 fixed': (
        lambda: OriginalUnit(5, 2.0),
        dict(avg_kernel_size=5, pull_inhibition_strength=2.0, trainable_pull_inhibition=False),
        dict(avg_pool_size=5, alpha=2.0, trainable_alpha=False),
    ),
    'plain': (lambda: nn.Conv2d(3, 64, 7, 2, 3), dict(use_push_pull=False), dict(push_pull=False)),
}


@pytest.mark.parametrize('stem', STEMS)
@pytest.mark.parametrize('way', WAYS)
def test_an_original_checkpoint_gives_equal_logits(stem, way, tmp_path):
    make_stem, hyper_parameters, model_args = STEMS[stem]
    path = tmp_path / 'last.ckpt'
    theirs = save_original(make_stem(), path, **hyper_parameters)
    ours = create('pp_resnet18', path, way, num_classes=10, **model_args)
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('stem', STEMS)
def test_original_settings_are_read(stem, tmp_path):
    make_stem, hyper_parameters, model_args = STEMS[stem]
    # Objects of classes that torch.load refuses with weights_only=True, nested and built by calls.
    objects = dict(
        augmentation=nn.Sequential(nn.Dropout(0.5)), logger=datetime.timedelta(days=2), ns=SimpleNamespace(a=1)
    )
    objects['folder'] = pathlib.Path('/data')
    theirs = save_original(make_stem(), tmp_path / 'last.ckpt', **hyper_parameters, **objects)
    checkpoint = read_original_checkpoint(tmp_path / 'last.ckpt')
    assert checkpoint.architecture == 'pp_resnet18'
    assert model_args.items() <= checkpoint.model_args.items()
    assert any(name.startswith('pathlib') for name in checkpoint.left_out)
    assert {'datetime.timedelta', 'torch.nn.modules.container.Sequential', 'types.SimpleNamespace'} <= set(
        checkpoint.left_out
    )
    ours = timm.create_model(checkpoint.architecture, **checkpoint.model_args).eval()
    ours.load_state_dict(checkpoint.state_dict)
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


def test_a_folder_says_what_the_paper_did(tmp_path):
    """Not the tag, the license, the paper and the images for evaluation of timm's weights of that name."""
    save_original(OriginalUnit(3, None), tmp_path / 'last.ckpt', avg_kernel_size=3)
    convert_original_checkpoint(tmp_path / 'last.ckpt', tmp_path / 'model')
    model = timm.create_model(f'local-dir:{tmp_path / "model"}', pretrained=True)
    images = resolve_data_config({}, model=model, use_test_size=True)
    assert (*images['input_size'], images['crop_pct'], images['interpolation']) == (3, 224, 224, 1.0, 'bilinear')
    assert 'tag' not in model.pretrained_cfg and model.pretrained_cfg['license'] == 'unknown'
    assert model.pretrained_cfg['paper_ids'] == 'arXiv:2408.04077'


@pytest.mark.parametrize('way', WAYS)
def test_unsafe_objects_are_named(way, tmp_path):
    save_original(OriginalUnit(3, None), tmp_path / 'last.ckpt', logger=datetime.timedelta(days=2))
    with pytest.raises(RuntimeError, match='datetime.timedelta'):
        create('pp_resnet18', tmp_path / 'last.ckpt', way, num_classes=10)


class RunsCode:
    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path('code-was-run'),)


def test_reading_an_original_checkpoint_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_original(OriginalUnit(3, None), tmp_path / 'last.ckpt', trap=RunsCode())
    with pytest.raises(ValueError, match='cannot be read without running code that it names: .*getattr'):
        read_original_checkpoint(tmp_path / 'last.ckpt')
    assert not (tmp_path / 'code-was-run').exists()


@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize(
    'stem, model_args, message',
    [
        ('pp5 fixed', dict(), 'trained with a fixed inhibition strength'),
        ('pp3', dict(push_pull=False), 'push_pull=False'),
    ],
)
def test_the_original_inhibition_must_fit(stem, model_args, message, way, tmp_path):
    make_stem, hyper_parameters, _ = STEMS[stem]
    save_original(make_stem(), tmp_path / 'last.ckpt', **hyper_parameters)
    with pytest.raises(ValueError, match=message):
        create('pp_resnet18', tmp_path / 'last.ckpt', way, num_classes=10, **model_args)


@pytest.mark.parametrize('way', WAYS)
def test_timm_resnet(way, tmp_path, caplog):
    plain = timm.create_model('resnet18').eval()
    save_file(plain.state_dict(), tmp_path / 'resnet18.safetensors')
    with caplog.at_level(logging.INFO):
        model = create('pp_resnet18', tmp_path / 'resnet18.safetensors', way, alpha=0.25)
    words = (
        'in a network with a push-pull unit'
        if way == 'pretrained_cfg_overlay'
        else 'alpha keeps its present values. If it is one of a plain network, give push_pull=False'
    )
    assert sum(words in record.message for record in caplog.records) == 1
    assert model.conv1.alpha.tolist() == [0.25] * 64
    state_dict = model.state_dict()
    assert all(torch.equal(state_dict[name], weight) for name, weight in plain.state_dict().items())
    # Without inhibition the unit is the plain convolution, rectified.
    with torch.no_grad():
        model.conv1.alpha.zero_()
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(model.conv1(x), plain.conv1(x).relu())


@pytest.mark.parametrize('way', WAYS)
def test_own_checkpoint(way, tmp_path):
    model = timm.create_model('pp_resnet18').eval()
    torch.save({'state_dict': model.state_dict()}, tmp_path / 'last.pth.tar')
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(create('pp_resnet18', tmp_path / 'last.pth.tar', way)(x), model(x))


def test_pretrained_weights_are_adapted(tmp_path):
    model = timm.create_model('pp_resnet18')
    save_file(model.state_dict(), tmp_path / 'model.safetensors')
    overlay = dict(file=str(tmp_path / 'model.safetensors'))

    def adapted(**kwargs):
        return timm.create_model('pp_resnet18', pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)

    assert torch.equal(adapted(num_classes=5).conv1.alpha, model.conv1.alpha)
    assert torch.equal(adapted(num_classes=0).layer4[1].conv2.weight, model.layer4[1].conv2.weight)
    gray = adapted(in_chans=1).conv1
    torch.testing.assert_close(gray.weight, model.conv1.weight.sum(1, keepdim=True))
    assert torch.equal(adapted(features_only=True).layer1[0].conv1.weight, model.layer1[0].conv1.weight)


@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('num_classes', [1000, 10])
@pytest.mark.parametrize(
    'source, kwargs, keys',
    [
        ('resnet34', dict(), ['layer1.2.bn1.bias']),
        ('resnet18d', dict(), ['conv1.0.weight', 'conv1.weight']),
        ('test_convnext', dict(), ['bn1.bias']),
        ('pp_resnet18', dict(push_pull=False), ['conv1.alpha']),
        ('pp_resnet18', dict(alpha=1.0, trainable_alpha=False), ['conv1.alpha']),
    ],
)
def test_a_checkpoint_of_another_network_is_refused(source, kwargs, keys, num_classes, way, tmp_path):
    if way == 'checkpoint_path' and num_classes != 1000:
        pytest.skip('timm does not adapt the classifier with checkpoint_path')
    torch.save(timm.create_model(source).state_dict(), tmp_path / 'other.pth')
    with pytest.raises((ValueError, RuntimeError)) as error:
        create('pp_resnet18', tmp_path / 'other.pth', way, num_classes=num_classes, **kwargs)
    assert any(key in str(error.value) for key in keys), error.value


def test_a_checkpoint_of_other_code_is_refused(tmp_path):
    of_timm, settings = timm.create_model('resnet18').state_dict(), datetime.timedelta(days=2)
    for other in (
        of_timm,
        {'state_dict': of_timm},
        dict(state_dict=[1], hyper_parameters={}),
        dict(state_dict={}, hyper_parameters=settings),
    ):
        torch.save(other, tmp_path / 'other.ckpt')
        with pytest.raises(ValueError, match='lacks state_dict or hyper_parameters'):
            read_original_checkpoint(tmp_path / 'other.ckpt')


@pytest.mark.parametrize(
    'part, name',
    [
        ('state_dict', 'conv1.bias'),
        ('state_dict', 'conv1.weight'),
        ('state_dict', 'bn.running_mean'),
        ('state_dict', 'classifier.weight'),
        ('hyper_parameters', 'model'),
        ('hyper_parameters', 'avg_kernel_size'),
        ('hyper_parameters', 'pull_inhibition_strength'),
    ],
)
def test_a_checkpoint_without_what_is_needed_is_refused(part, name, tmp_path):
    stem = nn.Conv2d(3, 64, 7, stride=2, padding=3) if name == 'conv1.weight' else OriginalUnit(3, alpha=0.5)
    save_original(stem, tmp_path / 'file.ckpt', avg_kernel_size=3, pull_inhibition_strength=0.5)
    checkpoint = torch.load(tmp_path / 'file.ckpt', weights_only=True)
    del checkpoint[part][name]
    torch.save(checkpoint, tmp_path / 'file.ckpt')
    with pytest.raises(ValueError, match=f'is not a ResNet of the original code: it lacks [^,]*{name}[^,]*$'):
        read_original_checkpoint(tmp_path / 'file.ckpt')
