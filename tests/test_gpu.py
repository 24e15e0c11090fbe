"""What only a GPU shows, beside float64 and the CPU; without a GPU the same checks run on the CPU."""

import copy

import pytest
import torch
from accuracy import FLOOR, PRECISIONS, Errors, draw, output_and_grads
from timm.models import create_model

from timm_pushpull import PRIME, evaluate_robustness
from timm_pushpull.augment.prime import apply_prime

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
WINDOWS = [0, 3, 5] if DEVICE == 'cuda' else [3]  # on the CPU tests/test_chunked.py has them all


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=['nchw', 'nhwc'])
@pytest.mark.parametrize('window', WINDOWS)
@pytest.mark.parametrize('dtype, autocast', PRECISIONS, ids=str)
@pytest.mark.parametrize('geometry', ['imagenet', 'groups'])
def test_unit_as_accurate_as_the_reference(geometry, dtype, autocast, window, memory_format, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)
    errors = Errors()
    for _ in range(4):
        drawn = [tensor.to(dtype) for tensor in draw(geometry, window, 20, 12, memory_format)]
        exact = output_and_grads('reference', *map(torch.Tensor.double, drawn), geometry, window)
        drawn = [tensor.to(DEVICE) for tensor in drawn]
        ours, theirs = (output_and_grads(way, *drawn, geometry, window, autocast) for way in ('fast', 'reference'))
        errors.add(ours, theirs, exact)
    errors.check(floor={torch.float32: FLOOR[20]}.get(autocast or dtype, 0))


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=['nchw', 'nhwc'])
@pytest.mark.parametrize('implementation', ['reference', 'fast'])
def test_float64_as_on_the_cpu(implementation, memory_format):
    drawn = [tensor.double() for tensor in draw('imagenet', 3, 0, 4, memory_format)]
    expected = output_and_grads('reference', *drawn, 'imagenet', 3)
    found = output_and_grads(implementation, *(tensor.to(DEVICE) for tensor in drawn), 'imagenet', 3)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason='needs two GPUs')
def test_on_another_gpu_than_the_current_one():
    drawn = draw('imagenet', 3, 0, 4, torch.contiguous_format)
    found = [
        output_and_grads('fast', *(tensor.to(device) for tensor in drawn), 'imagenet', 3)
        for device in ('cuda:0', 'cuda:1')
    ]
    for first, second in zip(*found, strict=True):
        torch.testing.assert_close(first.cpu(), second.cpu(), rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(DEVICE == 'cpu', reason='needs a GPU')
@pytest.mark.parametrize('amp', [False, True], ids=['float32', 'bfloat16'])
def test_compiled_network(amp):
    model = create_model('pp_resnet18', num_classes=8).to(DEVICE, memory_format=torch.channels_last)
    images = torch.randn(8, 3, 75, 61, device=DEVICE).to(memory_format=torch.channels_last)

    def loss_and_grads(model, images, amp=False, **settings):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=amp):
            loss = torch.compile(model, fullgraph=True, **settings)(images).float().square().mean()
        return loss.detach(), *torch.autograd.grad(loss, [model.conv1.weight, model.conv1.alpha])

    exact = copy.deepcopy(model).double()
    exact.conv1.implementation = 'reference'
    expected = [tensor.cpu() for tensor in loss_and_grads(exact, images.double(), backend='eager')]
    errors, found = Errors(), []
    for way in ('fast', 'reference'):
        model.conv1.implementation = way
        found.append(loss_and_grads(model, images, amp))
    errors.add(*found, expected)
    errors.check(floor=0.01)


def test_ddp_of_one_process(tmp_path):
    torch.distributed.init_process_group(
        'nccl' if DEVICE == 'cuda' else 'gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1
    )
    try:
        model = create_model('pp_resnet18', num_classes=8).to(DEVICE)
        images = torch.randn(4, 3, 40, 40, device=DEVICE)
        model(images).square().sum().backward()
        alone = [parameter.grad.clone() for parameter in model.parameters()]
        model.zero_grad()
        torch.nn.parallel.DistributedDataParallel(model)(images).square().sum().backward()
        for parameter, gradient in zip(model.parameters(), alone, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-2, atol=1e-2 * gradient.abs().max().item())
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize('preset', [PRIME.imagenet, PRIME.cifar])
def test_prime(preset, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)
    images = torch.rand(16, 3, 65, 65)
    augmented = preset()(images.to(DEVICE), torch.Generator().manual_seed(0))
    assert augmented.device.type == DEVICE and augmented.isfinite().all()
    assert 0 <= augmented.min() and augmented.max() <= 1
    changed = (augmented.cpu() - images).abs().mean((1, 2, 3))
    assert (changed > 1e-3).sum() >= 14
    draw = preset().draw(images.shape, torch.device('cpu'), torch.Generator().manual_seed(0))
    exact = apply_prime(images.double(), draw)
    assert (apply_prime(images.to(DEVICE), draw).cpu() - exact).abs().mean() < 1e-4


def test_robustness_as_on_the_cpu(tmp_path):
    pytest.importorskip('imagecorruptions')
    import numpy as np
    from PIL import Image
    from timm.data import create_dataset, resolve_data_config

    for index, pixels in enumerate(np.random.default_rng(0).integers(256, size=(40, 6, 6, 3), dtype=np.uint8)):
        path = tmp_path / 'images' / str(index % 4) / f'{index}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).resize((64, 64)).save(path)
    model = create_model('pp_resnet18', num_classes=4).eval()
    found = []
    for device in ('cpu', DEVICE):
        dataset = create_dataset('', root=str(tmp_path / 'images'), search_split=False)
        options = dict(corruptions=['gaussian_noise', 'contrast'], severities=[3], device=device)
        configs = {'a': resolve_data_config({'input_size': (3, 64, 64), 'crop_pct': 1.0})}
        folder = tmp_path / ('first' if not found else 'second')
        found.append(evaluate_robustness({'a': model.to(device)}, folder, dataset, data_configs=configs, **options))
    (ours,), (theirs,) = found
    for name, value in theirs.items():
        if isinstance(value, float):
            assert ours[name] == pytest.approx(value, abs=5), name  # two of 40 images at a tie
