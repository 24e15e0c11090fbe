"""The fast version against the reference: as accurate in every precision, and transparent to autograd and compilers."""

import copy
import functools
import shutil

import pytest
import torch
from accuracy import FLOOR, GEOMETRIES, PRECISIONS, Errors, draw, output_and_grads
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from timm_pushpull import PushPullConv2d, push_pull_conv2d
from timm_pushpull.ops import chunked, custom_op, push_pull


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=['nchw', 'nhwc'])
@pytest.mark.parametrize('window', [0, 3, 5])
@pytest.mark.parametrize('offset', [0, 20])
@pytest.mark.parametrize('geometry', GEOMETRIES)
@pytest.mark.parametrize('dtype, autocast', [(torch.float64, None), *PRECISIONS], ids=str)
def test_as_accurate_as_the_reference(dtype, autocast, geometry, offset, window, memory_format, monkeypatch):
    images = 3 if autocast is None else 12
    # several chunks, of several images where they are small
    monkeypatch.setattr(chunked, 'CHUNK_BYTES', 8_000 * images // 3)
    errors = Errors()
    for _ in range(4):
        drawn = [tensor.to(dtype) for tensor in draw(geometry, window, offset, images, memory_format)]
        ours, theirs = (output_and_grads(way, *drawn, geometry, window, autocast) for way in ('fast', 'reference'))
        errors.add(ours, theirs, output_and_grads('reference', *map(torch.Tensor.double, drawn), geometry, window))
    errors.check(floor={torch.float64: 1e-12, torch.float32: FLOOR[offset]}.get(autocast or dtype, 0))


@pytest.mark.parametrize('geometry', GEOMETRIES)
def test_negated_pull_kernel(geometry):
    drawn = [tensor.double() for tensor in draw(geometry, 3, 0, 3, torch.contiguous_format)]
    ways = ('fast', 'reference')
    ours, theirs = (output_and_grads(way, *drawn, geometry, 3, pull_kernel='negated') for way in ways)
    torch.testing.assert_close(ours, theirs)


def test_empty_and_single():
    layer = PushPullConv2d(3, 8, 3, implementation='fast')
    assert layer(torch.randn(0, 3, 9, 9)).shape == (0, 8, 7, 7)
    layer(torch.randn(1, 3, 3, 3)).sum().backward()
    reference = copy.deepcopy(layer)
    reference.implementation = 'reference'
    x = torch.randn(1, 3, 3, 3)
    torch.testing.assert_close(layer(x), reference(x))


def test_what_runs_where(monkeypatch):
    """The fast version runs wherever its conditions hold."""
    ran = []
    monkeypatch.setattr(push_pull, 'push_pull_conv2d_operator', lambda *arguments: ran.append('fast') or torch.zeros(1))
    layer, x = PushPullConv2d(3, 8, 3), torch.randn(2, 3, 9, 9)

    def runs(layer, x):
        ran.clear()
        layer(x)
        return ran == ['fast']

    assert runs(layer, x) and runs(layer.eval(), x) and runs(layer.to(memory_format=torch.channels_last), x)
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        assert runs(layer, x)
    assert not runs(layer, x[0])
    assert not runs(layer.to('meta'), x.to('meta'))
    reference = PushPullConv2d(3, 8, 3, implementation='reference')
    assert not runs(reference, x)
    with pytest.raises(ValueError, match="implementation must be 'auto', .*, got 'quick'"):
        push_pull_conv2d(x, reference.weight, 1.0, implementation='quick')


@pytest.mark.parametrize('works', [False, True])
def test_what_runs_on_a_gpu(works, monkeypatch):
    monkeypatch.setattr(push_pull, '_triton_works', lambda device: works)
    with FakeTensorMode():
        x, weight = torch.empty(2, 3, 9, 9, device='cuda'), torch.empty(4, 3, 3, 3, device='cuda')
        assert push_pull.use_fast('auto', x, weight) == works
        assert not push_pull.use_fast('auto', x, weight.cpu())
        assert not push_pull.use_fast('auto', x.half(), weight.half())
        monkeypatch.setattr(torch, 'is_autocast_enabled', lambda device: device == 'cuda')  # needs a GPU
        assert push_pull.use_fast('auto', x.bfloat16(), weight) == works
        assert not push_pull.use_fast('auto', x.double(), weight)
        assert not push_pull.use_fast('auto', x, weight.bfloat16())
        monkeypatch.setattr(torch.version, 'hip', '6.4')
        assert not push_pull.use_fast('auto', x, weight)


def test_gradients_on_a_gpu_avoid_channels_last_averages():
    """Whose gradient is wrong on a GPU, see https://github.com/pytorch/pytorch/issues/188344."""
    averaged = []

    class Averages(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten.avg_pool2d.default:
                averaged.append(args[0].is_contiguous())
            return function(*args, **(kwargs or {}))

    class OnGpu(torch.Tensor):
        is_cuda = True

    x = torch.randn(2, 6, 19, 15).to(memory_format=torch.channels_last).as_subclass(OnGpu).requires_grad_()
    weight = torch.randn(16, 3, 7, 7, requires_grad=True)
    call = functools.partial(push_pull_conv2d, x, weight, 1.0, groups=2, implementation='reference')
    with Averages():
        assert call().is_contiguous(memory_format=torch.channels_last)
        assert averaged and all(averaged)
        averaged.clear()
        with torch.no_grad():
            call()
        assert averaged and not all(averaged)  # no copy where there is no gradient


def test_mixed_precisions_are_refused_as_by_a_convolution():
    with pytest.raises(RuntimeError, match='type'):
        PushPullConv2d(3, 8, 3)(torch.randn(2, 3, 9, 9).bfloat16())


def test_gradients_of_gradients_vmap_and_forward_derivatives():
    x = torch.randn(2, 2, 6, 6, dtype=torch.double, requires_grad=True)
    weight = torch.randn(4, 1, 3, 3, dtype=torch.double, requires_grad=True)
    alpha = torch.rand(4, dtype=torch.double, requires_grad=True)

    def unit(x, weight, alpha, implementation='auto'):
        return push_pull_conv2d(x, weight, alpha, padding=1, groups=2, implementation=implementation)

    assert torch.autograd.gradgradcheck(lambda *inputs: unit(*inputs, 'fast'), (x, weight, alpha))
    one_by_one = torch.func.vmap(lambda image: unit(image.unsqueeze(0), weight, alpha)[0])(x)
    torch.testing.assert_close(one_by_one, unit(x, weight, alpha))
    tangent = torch.randn_like(x)
    _, ours = torch.func.jvp(lambda x: unit(x, weight, alpha), (x,), (tangent,))
    _, theirs = torch.func.jvp(lambda x: unit(x, weight, alpha, 'reference'), (x,), (tangent,))
    torch.testing.assert_close(ours, theirs)
    gradient = torch.func.grad(lambda weight: unit(x, weight, alpha).square().sum())(weight)
    torch.testing.assert_close(gradient, torch.autograd.grad(unit(x, weight, alpha).square().sum(), weight)[0])


def test_a_gradient_with_a_graph_is_the_same_gradient():
    """Optimizers of second order and gradient penalties ask for a graph."""
    torch.manual_seed(0)
    x = torch.randn(2, 2, 6, 6, dtype=torch.double, requires_grad=True)
    layer = PushPullConv2d(2, 3, 3, padding=1, dtype=torch.double)
    inputs = [x, *layer.parameters()]
    found = {}
    for implementation in ('reference', 'fast'):
        layer.implementation = implementation
        first = torch.autograd.grad(layer(x).sin().sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(gradient.square().sum() for gradient in first), inputs)
        found[implementation] = [*first, *second]
    for ours, theirs in zip(found['fast'], found['reference'], strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.skipif(not any(map(shutil.which, ('g++', 'clang++', 'cl'))), reason='needs a C++ compiler')
def test_compiled_it_is_one_node():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    layer, x = PushPullConv2d(3, 8, 3).eval(), torch.randn(2, 3, 9, 9)
    torch.compile(layer, fullgraph=True, backend=backend)(x)
    operators = {str(node.target) for graph in graphs for node in graph.graph.nodes}
    exporting = hasattr(torch.compiler, 'is_exporting')  # without it, compiling cannot be told from exporting
    assert any('timm_pushpull' in operator for operator in operators) == exporting
    program = torch.export.export(layer, (x,))
    assert not any('timm_pushpull' in str(node.target) for node in program.graph.nodes)


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=['nchw', 'nhwc'])
def test_the_operators_have_their_schemas_shapes_and_gradients(memory_format):
    x = torch.randn(3, 3, 9, 9).to(memory_format=memory_format).requires_grad_()
    weight = torch.randn(8, 3, 3, 3).to(memory_format=memory_format).requires_grad_()
    c, alpha = torch.randn(8, dtype=torch.double, requires_grad=True), torch.rand(8, requires_grad=True)
    geometry = [1, 1, 1, 1, 1, 1, 1, 3]
    tests = ('test_schema', 'test_faketensor', 'test_autograd_registration')
    torch.library.opcheck(
        push_pull.push_pull_conv2d_operator, (x, weight, c, alpha, geometry, torch.float32), test_utils=tests
    )
    inputs = [tensor.detach() for tensor in (torch.randn(3, 8, 9, 9), x, weight, c, alpha)]
    for needs_input in (True, False):
        torch.library.opcheck(
            custom_op.push_pull_conv2d_backward, (*inputs, geometry, needs_input), test_utils=tests[:2]
        )


def test_nothing_is_kept_for_the_backward_pass():
    kept = []
    layer, x = PushPullConv2d(3, 8, 3), torch.randn(2, 3, 32, 32)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        response = layer(x)
    assert max(tensor.numel() for tensor in kept) == x.numel() < response.numel()
