import copy
import json

import pytest
import timm
import torch
from timm.models import save_for_hf
from torch import nn

from timm_pushpull import PRIME
from timm_pushpull.augment.in_model import augment_in_training
from timm_pushpull.robustness.protocol import describe_models

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Negative(nn.Module):
    """Inverts images, and keeps its input."""

    def forward(self, images):
        self.seen = images
        return 1 - images


class Show(nn.Module):
    pretrained_cfg = dict(mean=MEAN, std=STD)

    def forward(self, images):
        return images


def batch(mean=MEAN, std=STD, dtype=torch.float32):
    pixels = torch.randint(256, (4, 3, 8, 8), generator=torch.Generator().manual_seed(0)) / 255
    normalized = (pixels - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
    return pixels, normalized.to(dtype)


def augmented(model=None):
    model, augmentation = model or Show(), Negative()
    augment_in_training(model, augmentation)
    return model.train(), augmentation


@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 5e-3)])
def test_it_augments_pixels_and_normalizes_them_again(dtype, tolerance):
    pixels, normalized = batch(dtype=dtype)
    model, augmentation = augmented()
    output = model(normalized)
    torch.testing.assert_close(augmentation.seen, pixels, rtol=0, atol=tolerance)
    expected = (1 - pixels - torch.tensor(MEAN).view(-1, 1, 1)) / torch.tensor(STD).view(-1, 1, 1)
    assert output.dtype == dtype
    torch.testing.assert_close(output.float(), expected, rtol=0, atol=6 * tolerance)


def test_evaluation_mode_does_not_augment():
    model, augmentation = augmented()
    _, normalized = batch()
    assert model.eval()(normalized) is normalized and not hasattr(augmentation, 'seen')
    assert not model.state_dict() and len(list(model.modules())) == 1


def test_memory_format_is_kept():
    model, _ = augmented()
    _, normalized = batch()
    channels_last = normalized.contiguous(memory_format=torch.channels_last)
    assert model(channels_last).is_contiguous(memory_format=torch.channels_last)
    assert model(normalized).is_contiguous() and torch.equal(model(channels_last), model(normalized))


@pytest.mark.parametrize(
    'mean, std',
    [((0.5,) * 3, (0.5,) * 3), ((0.0,) * 3, (1.0,) * 3), ((0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616))],
)
def test_another_mean_and_std_are_refused(mean, std):
    model, _ = augmented()
    with pytest.raises(ValueError, match='augment needs the mean and std that the loader used'):
        model(batch(mean, std)[1])


def test_a_mean_and_std_that_fit_every_second_step_are_refused():
    """With mean and std 1 / 2 odd steps of 1 / 255 become such steps again, and a batch may have more of them."""
    model, _ = augmented()
    model.pretrained_cfg = dict(mean=(0.5,) * 3, std=(0.5,) * 3)
    steps = torch.tensor([*range(1, 22, 2), *range(0, 18, 2)]).view(4, 5).expand(2, 3, 4, 5)
    with pytest.raises(ValueError, match='augment needs the mean and std that the loader used'):
        model(steps / 255)


def test_channels_without_a_mean_are_refused():
    model, _ = augmented()
    with pytest.raises(ValueError, match='a mean and a std for each of 1 channels'):
        model(batch()[1][:, :1])


def test_half_precision_out_of_range_is_refused():
    model, _ = augmented()
    with pytest.raises(ValueError, match='augment needs the mean and std'):
        model(batch((0.5,) * 3, (0.02,) * 3, torch.bfloat16)[1])


def test_erased_regions_are_no_mismatch():
    model, _ = augmented()
    _, normalized = batch()
    normalized[:, :, :4, :6] = torch.randn(4, 3, 4, 6, generator=torch.Generator().manual_seed(1))
    model(normalized)


@pytest.mark.parametrize('settings', [{}, {'push_pull': False}])
def test_networks_take_its_name(settings):
    model = timm.create_model('pp_resnet18', num_classes=10, augment='prime', **settings)
    plain = timm.create_model('pp_resnet18', num_classes=10, **settings)
    assert list(model.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(model.state_dict())
    normalized = (torch.randint(256, (2, 3, 64, 64)) / 255 - 0.45) / 0.225
    model.pretrained_cfg.update(mean=(0.45,) * 3, std=(0.225,) * 3)
    assert torch.equal(model.eval()(normalized), plain.eval()(normalized))
    assert not torch.allclose(model.train()(normalized), plain.train()(normalized))
    ema = copy.deepcopy(model).eval()
    plain.load_state_dict(ema.state_dict())
    assert torch.equal(ema(normalized), plain.eval()(normalized))


@pytest.mark.parametrize(
    'name, base', [('pp_resnet18', {}), ('pp_mobilenetv3_small_100', {}), ('pp_any', {'base': 'test_resnet'})]
)
def test_a_saved_network_does_not_augment(name, base, tmp_path):
    given = dict(push_pull=False, num_classes=3, **base)
    model = timm.create_model(name, augment='prime', augment_splits=2, **given)
    described = describe_models({'net': model}, {'net': {}}, {'net': None}, None, 'cpu')['net']['model_args']
    save_for_hf(copy.deepcopy(model), tmp_path, safe_serialization=True)
    saved = json.loads((tmp_path / 'config.json').read_text()).get('model_args', {})
    assert not any(name.startswith('augment') for name in {**described, **saved})
    if hasattr(timm.models, 'get_model_args'):  # timm keeps the arguments since 1.0.31
        assert described.keys() == given.keys() and given.items() <= saved.items()


@pytest.mark.parametrize('feature_cls', ['list', 'hook', 'getter'])
@pytest.mark.parametrize('name', ['pp_resnet18', 'pp_resnet18_cifar', 'pp_convnext_atto'])
def test_feature_extractors_augment_once(name, feature_cls, monkeypatch):
    models, batches = [], []
    augment_batch = PRIME.forward
    monkeypatch.setattr(PRIME, 'forward', lambda *args: batches.append(args[1]) or augment_batch(*args))
    for augment in ({'augment': 'prime', 'augment_splits': 2}, {}):
        torch.manual_seed(0)
        models.append(timm.create_model(name, features_only=True, feature_cls=feature_cls, **augment))
    model, plain = models
    assert list(model.state_dict()) == list(plain.state_dict())
    cfg = model.pretrained_cfg
    normalized = batch(cfg['mean'], cfg['std'])[1].repeat_interleave(4, 2).repeat_interleave(4, 3)
    torch.testing.assert_close(model.eval()(normalized), plain.eval()(normalized))
    seen = []
    for each in models:
        next(m for m in each.modules() if isinstance(m, nn.Conv2d)).register_forward_pre_hook(
            lambda _, args: seen.append(args[0])
        )
        each.train()(normalized)
    assert torch.equal(seen[0][:2], normalized[:2]) and torch.equal(seen[1], normalized)
    assert not torch.allclose(seen[0][2:], normalized[2:]) and len(batches) == 1


def test_another_name_is_refused():
    with pytest.raises(ValueError, match="augment must be 'prime' or None, got 'cutout'"):
        timm.create_model('pp_resnet18', augment='cutout')


def test_compiled_and_under_autocast():
    model, augmentation = augmented(nn.Sequential(nn.Conv2d(3, 4, 3)))
    model.pretrained_cfg = Show.pretrained_cfg
    pixels, normalized = batch()
    with torch.autocast('cpu', torch.bfloat16):
        output = torch.compile(model, backend='eager')(normalized)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(augmentation.seen, pixels, rtol=0, atol=1e-5)


def test_export_has_no_augmentation():
    x = torch.randn(2, 3, 32, 32)
    graphs = []
    for settings in ({'augment': 'prime'}, {}):
        torch.manual_seed(0)
        model = timm.create_model('pp_resnet18_cifar', **settings).eval()
        graphs.append([node.target for node in torch.export.export(model, (x,), strict=False).graph.nodes])
    assert graphs[0] == graphs[1]


def test_under_distributed_data_parallel(tmp_path):
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/rendezvous', rank=0, world_size=1)
    try:
        model, augmentation = augmented(nn.Sequential(nn.Conv2d(3, 4, 3)))
        model.pretrained_cfg = Show.pretrained_cfg
        pixels, normalized = batch()
        nn.parallel.DistributedDataParallel(model)(normalized).sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    torch.testing.assert_close(augmentation.seen, pixels, rtol=0, atol=1e-5)
    assert model[0].weight.grad.abs().sum() > 0


def test_the_clean_split_stays_clean():
    """As train.py --aug-splits 3 lays out a batch: first all clean images, then their augmented versions."""
    model, augmentation = Show(), Negative()
    augment_in_training(model.train(), augmentation, splits=3)
    pixels, normalized = (torch.cat([each, each, each[:1]])[:6] for each in batch())
    output = model(normalized)
    assert torch.equal(output[:2], normalized[:2])
    torch.testing.assert_close(augmentation.seen, pixels[2:], rtol=0, atol=1e-5)
    assert not torch.allclose(output[2:], normalized[2:])
    with pytest.raises(ValueError, match='augment_splits must divide the batch of 5 images, got 3'):
        model(normalized[:5])
    for splits in (0, 2.5, '3'):
        with pytest.raises(ValueError, match='augment_splits must be a positive integer'):
            timm.create_model('pp_resnet18', augment='prime', augment_splits=splits)
    with pytest.raises(ValueError, match="augment_splits=2 needs an augmentation: give augment='prime' too"):
        timm.create_model('pp_resnet18', augment_splits=2)
