"""The program's default data type and device change nothing: every tensor of ours names both."""

import contextlib

import numpy as np
import pytest
import timm
import torch
from conftest import SMALL
from PIL import Image
from timm.data import create_dataset

from timm_pushpull import PRIME, evaluate_robustness, push_pull_conv2d


@contextlib.contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


DEFAULTS = {
    'float64': lambda: default_dtype(torch.float64),
    'bfloat16': lambda: default_dtype(torch.bfloat16),
    'meta': lambda: torch.device('meta'),
}
defaults = pytest.mark.parametrize('default', DEFAULTS)


def results():
    """Outputs and gradients of the unit, of a network, and of PRIME, for float32 inputs made beforehand."""
    found = []
    for implementation in ('fast', 'reference'):
        inputs = [tensor.clone().requires_grad_() for tensor in (X, WEIGHT, ALPHA)]
        for alpha in (inputs[2], 0.3):
            output = push_pull_conv2d(*inputs[:2], alpha, padding=1, implementation=implementation)
            found += [output, *torch.autograd.grad(output.square().sum(), inputs[:2])]
    for network in NETWORKS:
        network.zero_grad()
        logits = network.train()(IMAGES)
        logits.square().sum().backward()
        found += [logits, *(parameter.grad for parameter in network.parameters())]
        with torch.no_grad():
            found.append(network.eval()(IMAGES.repeat(8, 1, 1, 1)))  # the stem in chunks
        network.load_state_dict(network.state_dict())
    for preset in (PRIME.imagenet(), PRIME.cifar()):
        found.append(preset(IMAGES, torch.Generator('cpu').manual_seed(0)))
    return [tensor.detach().clone() for tensor in found]


X, WEIGHT, ALPHA = torch.randn(2, 3, 9, 8), torch.randn(8, 3, 3, 3), torch.rand(8)
IMAGES = torch.rand(2, 3, 96, 96)
NETWORKS = [
    timm.create_model('pp_resnet18', num_classes=3, contrast_norm=True, **SMALL),
    timm.create_model('pp_resnet18', num_classes=3, alpha=0.3, trainable_alpha=False, **SMALL),
]


@defaults
def test_results_are_the_same(default):
    state = [{key: value.clone() for key, value in network.state_dict().items()} for network in NETWORKS]
    expected = results()
    for network, before in zip(NETWORKS, state, strict=True):
        network.load_state_dict(before)
    with DEFAULTS[default]():
        found = results()
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype and ours.device == theirs.device
        torch.testing.assert_close(ours, theirs)


@defaults
@pytest.mark.parametrize('workers', [0, 1])
def test_evaluations_are_the_same(default, workers, tmp_path):
    pytest.importorskip('imagecorruptions')
    for label in 'ab':
        (tmp_path / 'data' / label).mkdir(parents=True)
        for place in range(3):
            pixels = np.random.default_rng(place).integers(256, size=(40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / 'data' / label / f'{place}.png')
    cfg = dict(input_size=(3, 32, 32), mean=(0.1, 0.2, 0.3), std=(0.2, 0.3, 0.4))
    model = timm.create_model('test_resnet', num_classes=2, pretrained_cfg_overlay=cfg)
    found = []
    for context in (contextlib.nullcontext, DEFAULTS[default]):
        folder = tmp_path / context.__name__
        with context():
            dataset = create_dataset('', root=str(tmp_path / 'data'))
            run = dict(corruptions=['fog', 'contrast'], severities=[3], workers=workers)
            evaluate_robustness({'a': model}, folder, dataset, **run)
        found.append({path.name: path.read_bytes() for path in folder.rglob('*.npy')})
    assert len(found[0]) == 3 and found[0] == found[1]


@defaults
def test_a_network_can_be_made(default):
    with DEFAULTS[default]():
        model = timm.create_model('pp_resnet18', num_classes=3, alpha=[0.1 * i for i in range(64)], contrast_norm=True)
    assert {parameter.dtype for parameter in model.parameters()} == {model.fc.weight.dtype}
    if default != 'meta':
        torch.testing.assert_close(model.conv1.alpha[3].item(), 0.3, rtol=1e-2, atol=0)
