"""Global contrast normalization: light matters less, whichever way the network is called."""

import copy

import pytest
import timm
import torch
from conftest import SMALL
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from timm_pushpull import convert_to_push_pull
from timm_pushpull.layers.contrast_norm import normalize_contrast


def pairs(**settings):
    """A network with the normalization, the same without it, images, and the images normalized in float64."""
    model = timm.create_model('pp_resnet18', num_classes=5, contrast_norm=True, **SMALL, **settings).eval()
    plain = timm.create_model('pp_resnet18', num_classes=5, **SMALL, **settings).eval()
    plain.load_state_dict({key: value for key, value in model.state_dict().items() if key != 'settings'})
    x = torch.rand(3, 3, 64, 48) * torch.tensor([0.3, 1.0, 3.0]).view(-1, 1, 1, 1) - 0.5
    double = x.double()
    mean, variance = double.mean((1, 2, 3), keepdim=True), double.var((1, 2, 3), correction=0, keepdim=True)
    return model, plain, x, ((double - mean) / (variance + 1e-5).sqrt()).float()


@pytest.mark.parametrize('settings', [{}, {'push_pull': False}, {'stem_type': 'deep'}, {'stem_type': 'cifar'}], ids=str)
def test_the_network_sees_normalized_images(settings):
    model, plain, x, normalized = pairs(**settings)
    expected = plain(normalized)
    assert not torch.allclose(plain(x), expected, rtol=1e-2)
    for network in (model, copy.deepcopy(model), torch.jit.script(model), torch.compile(model, backend='eager')):
        torch.testing.assert_close(network(x), expected, rtol=1e-3, atol=1e-4)
    channels_last = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(channels_last, expected, rtol=1e-3, atol=1e-4)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), expected, rtol=1e-3, atol=1e-4)


def test_features_are_those_of_normalized_images():
    model, plain, x, normalized = pairs()
    wrapped = timm.create_model('pp_resnet18', contrast_norm=True, features_only=True, **SMALL).eval()
    wrapped.load_state_dict({k: v for k, v in model.state_dict().items() if k[:3] != 'fc.'})
    expected = plain.forward_intermediates(normalized, intermediates_only=True)
    for features in (wrapped(x), model.forward_intermediates(x, intermediates_only=True)):
        for ours, theirs in zip(features, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_only_light_and_contrast_are_lost():
    model, _, x, _ = pairs()
    torch.testing.assert_close(model(0.5 * x - 0.2), model(x), rtol=1e-2, atol=1e-2)
    assert not torch.allclose(model(-x), model(x), rtol=1e-2)
    x[0] = 0.3
    assert normalize_contrast(model, (x,))[0][0].abs().max() == 0
    assert model(x).isfinite().all()


def test_dark_images_come_closer_to_bright_images():
    pixels = torch.rand(4, 3, 64, 48)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    for light in (0.5, 0.25, 0.1):
        bright, dark = (pixels - mean) / std, (light * pixels - mean) / std
        (bright_normalized,), (dark_normalized,) = (normalize_contrast(None, (x,)) for x in (bright, dark))
        left = (bright_normalized - dark_normalized).abs().mean() / (bright - dark).abs().mean()
        assert 0.05 < left < 0.35


def test_checkpoints_are_those_of_the_network_without_it():
    model, plain, _, _ = pairs()
    assert [key for key in model.state_dict() if key != 'settings'] == list(plain.state_dict())


def test_it_stays_when_the_convolution_is_replaced():
    model, plain, x, normalized = pairs(push_pull=False)
    for network in (model, plain):
        convert_to_push_pull(network, alpha=0.5)
    torch.testing.assert_close(model(x), plain(normalized), rtol=1e-3, atol=1e-4)
