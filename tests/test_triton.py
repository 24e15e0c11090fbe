"""The GPU kernels against the reference; without a GPU on small images in Triton's interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accuracy import FLOOR, GEOMETRIES, Errors, draw, output_and_grads

from timm_pushpull import PushPullConv2d
from timm_pushpull.layers.stem import use_chunks

triton = pytest.importorskip('triton')
from timm_pushpull.ops import push_pull  # noqa: E402
from timm_pushpull.ops import triton as push_pull_triton  # noqa: E402

CUDA = torch.cuda.is_available()
slow = pytest.mark.slow if not CUDA else ()
DEVICE = 'cuda' if CUDA else 'cpu'


def by_kernels(x, weight, alpha, grad_output, geometry, window, dtype):
    """Return the output, and the gradients of weight, alpha and input."""
    x, weight, alpha, grad_output = (tensor.to(DEVICE) for tensor in (x, weight, alpha, grad_output))
    alpha = alpha.to(torch.promote_types(alpha.dtype, torch.float32))
    numbers = operator_geometry(geometry, window)
    weight.requires_grad_()
    wide = weight.double()
    c = wide.amax((1, 2, 3)) + wide.amin((1, 2, 3))
    with torch.no_grad():
        output = push_pull_triton.push_pull(x, weight, c, alpha, numbers, dtype)
        grad_input, grad_weight, grad_c, grad_alpha = push_pull_triton.push_pull_backward(
            grad_output.to(dtype), x, weight, c, alpha, numbers, True
        )
    assert (output.dtype, grad_input.dtype, grad_weight.dtype) == (dtype, x.dtype, weight.dtype)
    return output, grad_weight + torch.autograd.grad(c, weight, grad_c)[0], grad_alpha, grad_input


def operator_geometry(geometry, window):
    *_, stride, padding, dilation, groups, _ = GEOMETRIES[geometry]
    return [*stride, *padding, *dilation, groups, max(window, 1)]


@pytest.mark.parametrize(
    'offset, memory_format', [(20, torch.contiguous_format), (0, torch.channels_last)], ids=['nchw', 'nhwc']
)
@pytest.mark.parametrize(
    'geometry, window, dtype, autocast',
    [
        ('imagenet', 3, torch.float32, None),
        ('cifar', 5, torch.float32, None),
        ('cifar', 0, torch.float32, None),
        ('groups', 3, torch.float32, None),
        pytest.param('depthwise', 3, torch.float32, None, marks=slow),
        ('line', 5, torch.float32, None),
        ('imagenet', 3, torch.float64, None),
        ('imagenet', 3, torch.bfloat16, None),
        ('imagenet', 3, torch.float16, None),
        ('imagenet', 3, torch.float32, torch.bfloat16),
        ('imagenet', 3, torch.float32, torch.float16),
        pytest.param('groups', 3, torch.float32, torch.float16, marks=slow),
    ],
    ids=str,
)
def test_as_accurate_as_the_reference(geometry, window, dtype, autocast, offset, memory_format, monkeypatch):
    monkeypatch.setattr(
        push_pull_triton, 'conv_dtype', lambda *_: autocast or torch.promote_types(dtype, torch.float32)
    )
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)
    errors = Errors()
    torch.manual_seed(0)
    for _ in range(4 if CUDA else 1):  # the interpreter is slow
        images = 64 if CUDA else 2
        drawn = [tensor.to(dtype) for tensor in draw(geometry, window, offset, images, memory_format)]
        ours = by_kernels(*drawn, geometry, window, autocast or dtype)
        theirs = output_and_grads('reference', *drawn, geometry, window, autocast)
        errors.add(ours, theirs, output_and_grads('reference', *map(torch.Tensor.double, drawn), geometry, window))
    dtype = autocast or dtype
    # Triton's interpreter rounds bfloat16 towards zero.
    factor = 4 if dtype == torch.bfloat16 and not CUDA else 2
    errors.check(factor, floor={torch.float64: 1e-12, torch.float32: FLOOR[offset]}.get(dtype, 2e-4))


def test_where_the_input_needs_no_gradient():
    x, weight, alpha, grad_output = draw('imagenet', 3, 0, 2, torch.channels_last)
    tensors = [tensor.to(DEVICE) for tensor in (grad_output, x, weight, weight.double().sum((1, 2, 3)), alpha)]
    _, *others = push_pull_triton.push_pull_backward(*tensors, operator_geometry('imagenet', 3), True)
    nothing, *same = push_pull_triton.push_pull_backward(*tensors, operator_geometry('imagenet', 3), False)
    assert nothing.numel() == 0 and all(map(torch.equal, others, same))


def test_empty_batch():
    x, weight, alpha = torch.empty(0, 3, 9, 9, device=DEVICE), torch.randn(8, 3, 3, 3), torch.rand(8)
    weight, c, alpha = weight.to(DEVICE), torch.randn(8, device=DEVICE).double(), alpha.to(DEVICE)
    geometry = [1, 1, 0, 0, 1, 1, 1, 3]
    output = push_pull_triton.push_pull(x, weight, c, alpha, geometry, torch.float32)
    assert output.shape == (0, 8, 7, 7)
    gradients = push_pull_triton.push_pull_backward(output, x, weight, c, alpha, geometry, True)
    assert [grad_output.shape for grad_output in gradients] == [x.shape, weight.shape, c.shape, alpha.shape]
    assert not any(grad_output.any() for grad_output in gradients)


def test_without_a_c_compiler_the_reference_runs(monkeypatch, recwarn):
    device = torch.device(DEVICE)
    push_pull._triton_works.cache_clear()
    assert push_pull._triton_works(device) and not recwarn

    def fail(*arguments):
        raise RuntimeError('Failed to find C compiler.\nSet CC.')

    monkeypatch.setattr(push_pull_triton, 'push_pull', fail)
    push_pull._triton_works.cache_clear()
    with pytest.warns(UserWarning, match=rf'reference: Triton fails on {DEVICE} \(RuntimeError: .* C compiler.\)'):
        assert not push_pull._triton_works(device)
    push_pull._triton_works.cache_clear()


def test_nan_stays_nan():
    x = torch.randn(1, 3, 9, 9, device=DEVICE)
    x[0, 0, 4, 4] = float('nan')
    weight, alpha = torch.randn(4, 3, 3, 3, device=DEVICE), torch.rand(4, device=DEVICE)
    c = torch.ones(4, dtype=torch.double, device=DEVICE)
    output = push_pull_triton.push_pull(x, weight, c, alpha, [1, 1, 1, 1, 1, 1, 1, 3], torch.float32)
    expected = torch.zeros(9, 9, dtype=torch.bool)
    expected[2:7, 2:7] = True  # the kernel's reach plus the window's
    assert torch.equal(output[0, 0].isnan().cpu(), expected)


@pytest.mark.slow
@pytest.mark.parametrize('architecture', [80, 90, 100])
def test_compiled_for_a_gpu_no_register_spills(architecture, tmp_path):
    """Of any variant that pp_resnet50's stem can launch; ``pytest -s`` prints registers and shared memory."""
    assembler = Path(triton.__file__).parent / 'backends/nvidia/bin' / f'ptxas{"-blackwell" * (architecture >= 100)}'
    if not assembler.exists():
        pytest.skip(f'Triton {triton.__version__} brings no {assembler.name}, which assembles for sm_{architecture}')
    if triton.__version__.startswith('3.2.'):
        pytest.skip('Triton 3.2 spills a few registers of kernels that later releases compile without')
    environment = {name: value for name, value in os.environ.items() if name != 'TRITON_INTERPRET'}
    environment |= {'TRITON_CACHE_DIR': str(tmp_path)}
    program = Path(__file__).with_name('compile_kernels.py')
    command = [sys.executable, program, str(architecture), assembler]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert result.returncode == 0, result.stderr[-3000:]
    found = [json.loads(line) for line in result.stdout.splitlines()]
    for row in found:
        print(f'sm_{architecture}:', ', '.join(f'{name} {value}' for name, value in row.items()))
    kernels = {(row['kernel'], row['window'], row['response']) for row in found if row['kernel'] != '_sum_windows'}
    assert len(kernels) == 3 * 3 * 3
    assert [row for row in found if row['spilled']] == []
    assert all(0 < row['registers'] <= 255 and row['shared'] <= 48 << 10 for row in found)  # what any GPU has


@pytest.mark.skipif(not CUDA, reason='needs a GPU')
@pytest.mark.parametrize('torchcompile', [False, True], ids=['eager', 'compiled'])
@pytest.mark.parametrize('amp', [False, True], ids=['float32', 'bfloat16'])
def test_layer_on_cuda(amp, torchcompile, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)
    layer = PushPullConv2d(3, 64, 7, stride=2, padding=3).cuda().to(memory_format=torch.channels_last)
    x = torch.randn(8, 3, 64, 64, device='cuda').to(memory_format=torch.channels_last)
    found = []
    for implementation in ('fast', 'reference', 'auto'):
        layer.implementation = implementation
        call = torch.compile(layer, fullgraph=True) if torchcompile else layer
        with torch.autocast('cuda', torch.bfloat16, enabled=amp):
            output = call(x)
        found.append([output, *torch.autograd.grad(output.float().square().sum(), list(layer.parameters()))])
    tolerance = dict(rtol=5e-2, atol=5e-2) if amp else dict(rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(*found[:2], strict=True):
        scale = theirs.abs().max()
        torch.testing.assert_close(ours / scale, theirs / scale, **tolerance, check_dtype=False)
    assert torch.equal(found[0][0], found[2][0]) and not torch.equal(found[0][0], found[1][0])
    stem = [layer, torch.nn.BatchNorm2d(64).cuda(), torch.nn.ReLU(), torch.nn.MaxPool2d(3, 2, 1)]
    layer.implementation = 'fast'
    with torch.no_grad():
        assert not use_chunks([part.eval() for part in stem], x.repeat(64, 1, 1, 1))
