"""The compiled steps against the equation and against PyTorch's steps; and that nothing is lost without a compiler."""

import os
import shutil
import subprocess
import sys

import pytest
import timm
import torch
from accuracy import FLOOR, GEOMETRIES, Errors, differentiate, draw

from timm_pushpull import PushPullConv2d, pushpull_fast, pushpull_native, stem_pieces
from timm_pushpull.pushpull_native import NativeSteps, native_library

needs_compiler = pytest.mark.skipif(native_library(3) is None, reason='needs a C++ compiler')
FORMATS = pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=['nchw', 'nhwc'])


@pytest.fixture
def called(monkeypatch):
    """Serves small maps as well, in pieces of few images, and counts the calls of the compiled functions."""
    monkeypatch.setattr(pushpull_fast, 'FEWEST_VALUES', 0)
    for module in (pushpull_fast, stem_pieces):
        monkeypatch.setattr(module, 'CHUNK_BYTES', 20_000)
    names = []
    call = NativeSteps._call
    monkeypatch.setattr(NativeSteps, '_call', lambda steps, name, *rest: names.append(name) or call(steps, name, *rest))
    return names


@pytest.fixture
def no_compiler(monkeypatch):
    monkeypatch.setattr(pushpull_fast, 'native_library', lambda window: None)


@needs_compiler
@FORMATS
@pytest.mark.parametrize('window', [0, 3, 5])
@pytest.mark.parametrize('offset', [0, 20])
@pytest.mark.parametrize('geometry', ['imagenet', 'cifar', 'line'])
@pytest.mark.parametrize('autocast, half_push', [(None, False), (torch.bfloat16, True), (torch.bfloat16, False)])
def test_as_accurate_as_the_reference(
    autocast, half_push, geometry, offset, window, memory_format, called, monkeypatch
):
    # As on a processor with or without instructions for bfloat16.
    monkeypatch.setattr(torch.cpu, '_is_avx512_bf16_supported', lambda: half_push, raising=False)
    errors = Errors()
    for _ in range(4):
        drawn = draw(geometry, window, offset, 3 if autocast is None else 12, memory_format)
        ways = [
            differentiate(way, *drawn, geometry, window, autocast, needs_input=False) for way in ('fast', 'reference')
        ]
        exact = differentiate('reference', *map(torch.Tensor.double, drawn), geometry, window, needs_input=False)
        errors.add(*ways, exact)
    errors.check(floor=FLOOR[offset] if autocast is None else 0)
    assert set(called) == {'push_pull', 'push_pull_backward'}


@needs_compiler
@FORMATS
def test_the_same_as_pytorchs_steps(memory_format, called, monkeypatch):
    """The same responses on the same side of zero: nothing differs but the order of sums."""
    drawn = draw('cifar', 3, 20, 3, memory_format)
    ours = differentiate('fast', *drawn, 'cifar', 3, needs_input=False)
    assert called
    called.clear()
    monkeypatch.setattr(pushpull_fast, 'native_library', lambda window: None)
    theirs = differentiate('fast', *drawn, 'cifar', 3, needs_input=False)
    assert not called and ours[0].stride() == theirs[0].stride()
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-4, atol=1e-4 * their.abs().max().item())


@needs_compiler
@FORMATS
@pytest.mark.parametrize('amp', [False, True], ids=['float32', 'bfloat16'])
@pytest.mark.parametrize('window, in_chans', [(0, 3), (3, 3), (5, 3), (3, 1), (3, 12)])
def test_stem(window, in_chans, amp, memory_format, called):
    model = timm.create_model('pp_resnet18', avg_pool_size=window, in_chans=in_chans).to(memory_format=memory_format)
    x = torch.randn(3, in_chans, 66, 50).to(memory_format=memory_format)
    with torch.no_grad():
        model(x)  # running statistics unlike the initial ones
        model.bn1.weight.normal_()  # of both signs
        model.bn1.bias.normal_()
    model.eval()
    called.clear()
    with torch.autocast('cpu', torch.bfloat16, enabled=amp):
        with torch.inference_mode():
            found = model.forward_stem(x)
        assert set(called) == {'push_pull_pooled'}
        model.conv1.implementation = 'reference'
        expected = model.forward_stem(x)
    assert found.dtype == expected.dtype and (found.stride() == expected.stride() or in_chans == 1)
    tolerance = dict(rtol=5e-2, atol=5e-2) if amp else dict(rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found, expected, **tolerance)


@needs_compiler
@FORMATS
def test_what_is_not_a_number_stays_so(memory_format, called):
    layer = PushPullConv2d(3, 20, 3, padding=1).to(memory_format=memory_format)
    x = torch.randn(1, 3, 9, 9).to(memory_format=memory_format)
    x[0, 0, 4, 4] = float('nan')
    expected = torch.zeros(9, 9, dtype=torch.bool)
    expected[2:7, 2:7] = True  # what the kernel sees of it, and the window around that
    assert all(torch.equal(response.isnan(), expected) for response in layer(x)[0])
    with torch.autocast('cpu', torch.bfloat16):
        found = layer(x).isnan()
        layer.implementation = 'reference'
        assert torch.equal(found, layer(x).isnan())  # some convolutions spread it further
        layer.implementation = 'auto'
    stem = [layer, torch.nn.BatchNorm2d(20), torch.nn.ReLU(), torch.nn.MaxPool2d(3, 2, 1)]
    with torch.no_grad():
        pooled = stem_pieces.stem_in_pieces([part.eval() for part in stem], x)
    assert called[-1] == 'push_pull_pooled'
    assert all(torch.equal(response.isnan(), expected[::2, ::2]) for response in pooled[0])


@needs_compiler
def test_the_same_sums_with_any_number_of_threads(called, monkeypatch):
    monkeypatch.setattr(pushpull_fast, 'CHUNK_BYTES', 1_000_000)  # five images, which the threads share
    drawn = draw('cifar', 3, 0, 5, torch.channels_last)
    found = []
    for number in (1, 2, 3):
        # Told to the compiled steps alone: with other threads PyTorch's convolution may round in another way.
        monkeypatch.setattr(torch, 'get_num_threads', lambda number=number: number)
        layer = PushPullConv2d(3, 20, 3, padding=1)
        layer.load_state_dict({'weight': drawn[1], 'alpha': drawn[2], 'bias': torch.zeros(20)})
        (layer(drawn[0]) * drawn[3]).sum().backward()
        found.append(layer.alpha.grad)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_small_maps_need_no_compiler(monkeypatch):
    monkeypatch.setattr(pushpull_fast, 'native_library', lambda window: pytest.fail('compiled for a small map'))
    PushPullConv2d(3, 8, 3)(torch.randn(2, 3, 9, 9)).sum().backward()


@pytest.mark.parametrize('compiler', ['', '/nowhere/c++', 'false'])
def test_without_a_compiler(compiler, tmp_path):
    """The same result, and no word of it."""
    script = (
        'import torch, timm\n'
        'from timm_pushpull import pushpull_native\n'
        "model = timm.create_model('pp_resnet18').eval()\n"
        'with torch.no_grad():\n'
        '    print(model(torch.randn(8, 3, 96, 96)).shape, pushpull_native.native_library(3))\n'
    )
    environment = os.environ | {'CXX': compiler, 'TORCH_EXTENSIONS_DIR': str(tmp_path)}
    if not compiler:
        environment['PATH'] = ''
    result = subprocess.run([sys.executable, '-c', script], env=environment, capture_output=True, text=True)
    assert result.stdout == 'torch.Size([8, 1000]) None\n', result.stderr
    assert 'Traceback' not in result.stderr and 'pushpull' not in result.stderr


@needs_compiler
def test_compiled_once(tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_EXTENSIONS_DIR', str(tmp_path))
    compiler = shutil.which('g++') or shutil.which('clang++')
    if compiler is None:
        pytest.skip('needs a compiler by its usual name')
    options = [*pushpull_native.OPTIONS, '-DREACH=1']
    path = pushpull_native._compile(compiler, options)
    assert [path] == list((tmp_path / 'timm_pushpull').iterdir())  # and nothing unfinished
    before = path.stat().st_mtime_ns
    assert pushpull_native._compile(compiler, options) == path and path.stat().st_mtime_ns == before
    monkeypatch.setattr(pushpull_native, '_processor', lambda: 'another')
    assert pushpull_native._compile(compiler, options) != path


def test_every_geometry_without_a_compiler(no_compiler):
    for geometry in GEOMETRIES:
        drawn = draw(geometry, 3, 0, 2, torch.channels_last)
        ours, theirs = (differentiate(way, *drawn, geometry, 3) for way in ('fast', 'reference'))
        for our, their in zip(ours, theirs, strict=True):
            torch.testing.assert_close(our, their, rtol=1e-4, atol=1e-4 * their.abs().max().item())
