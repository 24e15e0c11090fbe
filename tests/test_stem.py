"""The stem in chunks of the batch: the same features as module by module, and only where nobody can tell."""

import functools
import shutil
import types

import pytest
import timm
import torch
from conftest import SMALL
from torch.utils.flop_counter import FlopCounterMode

from timm_pushpull import PushPullConv2d
from timm_pushpull.layers import stem as stem_module
from timm_pushpull.layers.contrast_norm import add_contrast_norm
from timm_pushpull.models import pushpull_resnet
from timm_pushpull.ops import chunked

STEM = ('conv1', 'bn1', 'act1', 'maxpool')


def create(**settings):
    return timm.create_model('pp_resnet18', **SMALL, **settings)


@pytest.fixture
def chunks(monkeypatch):
    """Counts the batches whose stem was computed in chunks."""
    for module in (chunked, stem_module):
        monkeypatch.setattr(module, 'CHUNK_BYTES', 600_000)  # two images of 64x64
    counted = []
    in_chunks = pushpull_resnet.stem_in_chunks
    monkeypatch.setattr(pushpull_resnet, 'stem_in_chunks', lambda stem, x: counted.append(x) or in_chunks(stem, x))
    return counted


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=['nchw', 'nhwc'])
@pytest.mark.parametrize(
    'settings',
    [{}, {'stem_type': 'cifar'}, {'avg_pool_size': 0}, {'pull_kernel': 'negated'}, {'contrast_norm': True}],
    ids=str,
)
def test_the_same_features(settings, memory_format, chunks):
    model = create(**settings).to(memory_format=memory_format)
    x = torch.randn(3, 3, 66, 50).to(memory_format=memory_format)
    with torch.no_grad():
        for _ in range(2):
            model(x)  # running statistics unlike the initial ones
    model.eval()
    expected = model(x)
    assert chunks == []
    with torch.inference_mode():
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
        stem = model.forward_stem(x)
    assert len(chunks) == 2 and stem.is_contiguous(memory_format=memory_format)
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        assert model.forward_stem(x).dtype == torch.bfloat16 and len(chunks) == 3


def test_modules_that_the_chunks_do_not_know_run_one_by_one(chunks):
    x = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        create().train()(x)
        create(push_pull=False).eval()(x)
        create().eval()(x[:2])
        model = create().eval()
        model.bn1.train()
        model(x)
        model.bn1.eval()
        normalized = create().eval()
        add_contrast_norm(normalized.bn1)
        normalized(x)
        create(norm_layer=torch.nn.InstanceNorm2d).eval()(x)
        for settings in ({'replace_stem_pool': True}, {'aa_layer': 'blur'}, {'act_layer': 'silu'}):
            create(**settings).eval()(x)
        torch.jit.script(model)(x)
        torch.nn.utils.parametrize.register_parametrization(normalized.conv1, 'weight', torch.nn.Identity())
        normalized.bn1._forward_pre_hooks.clear()
        normalized(x)
        assert chunks == []
        model(x)
        assert len(chunks) == 1
    model(x).sum().backward()
    assert len(chunks) == 1 and model.conv1.weight.grad is not None


def test_a_bias_of_the_convolution(chunks):
    conv, norm = PushPullConv2d(3, 8, 3, padding=1), torch.nn.BatchNorm2d(8)
    with torch.no_grad():
        for numbers in (conv.bias, norm.weight, norm.bias, norm.running_mean):
            numbers.normal_()
        norm.running_var.uniform_(0.5, 2)
    stem = torch.nn.Sequential(conv, norm, torch.nn.ReLU(), torch.nn.MaxPool2d(3, 2, 1)).eval()
    x = torch.randn(3, 3, 20, 18)
    torch.testing.assert_close(stem_module.stem_in_chunks(list(stem), x), stem(x), rtol=1e-4, atol=1e-5)


def local_hook(module, seen):
    return module.register_forward_hook(lambda module, inputs, output: seen.append(output))


def local_pre_hook(module, seen):
    return module.register_forward_pre_hook(lambda module, inputs: seen.append(*inputs))


def global_hook(module, seen):
    def see(called, inputs, output):
        if called is module:
            seen.append(output)

    return torch.nn.modules.module.register_module_forward_hook(see)


def global_pre_hook(module, seen):
    def see(called, inputs):
        if called is module:
            seen.append(*inputs)

    return torch.nn.modules.module.register_module_forward_pre_hook(see)


def own_forward(module, seen):
    """An instance's ``forward``, as accelerate puts it around the one of the class."""
    forward = module.forward

    @functools.wraps(forward)
    def wrapped(x):
        seen.append(x)
        return forward(x)

    module.forward = wrapped
    return types.SimpleNamespace(remove=lambda: module.__dict__.pop('forward'))


def subclass(module, seen):
    cls = type(module)

    def forward(self, x):
        seen.append(x)
        return cls.forward(self, x)

    module.__class__ = type(f'Other{cls.__name__}', (cls,), {'forward': forward})
    return types.SimpleNamespace(remove=lambda: setattr(module, '__class__', cls))


@pytest.mark.parametrize('watch', [local_hook, local_pre_hook, global_hook, global_pre_hook, own_forward, subclass])
@pytest.mark.parametrize('name', STEM)
def test_what_a_user_puts_on_a_module_of_the_stem_is_called(name, watch, chunks):
    model, x = create().eval(), torch.randn(3, 3, 64, 64)
    expected, seen = model(x), []
    with torch.no_grad():
        handle = watch(model.get_submodule(name), seen)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
        assert [len(tensor) for tensor in seen] == [3] and not chunks
        handle.remove()
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
        assert len(seen) == len(chunks) == 1


@pytest.mark.parametrize('settings', [{}, {'stem_type': 'cifar'}, {'in_chans': 4}], ids=str)
def test_flops_are_those_of_one_convolution_and_the_sum(settings, chunks):
    """As many as the reference has, minus one of its two convolutions; S has one channel of input and output."""

    def count(implementation, use):
        conv.implementation = implementation
        with FlopCounterMode(display=False) as counter:
            use()
        return counter.get_total_flops()

    model = create(**settings).eval()
    conv, x = model.conv1, torch.randn(3, settings.get('in_chans', 3), 64, 48)
    pixels = 64 * 48 if 'stem_type' in settings else 32 * 24
    kernel, operation = conv.weight[0, 0].numel(), 2 * 3 * pixels
    convolution, sums = operation * kernel * 64 * conv.in_channels, operation * kernel
    with torch.no_grad():
        twice = count('reference', lambda: model(x))
        assert count('auto', lambda: model(x)) == twice - convolution + sums
        assert not chunks  # the counter has hooks on all modules
        stem = [model.get_submodule(name) for name in STEM]
        assert count('auto', lambda: stem_module.stem_in_chunks(stem, x)) == convolution + sums
        assert count('auto', lambda: conv(x)) == convolution + sums
    # In the backward pass the responses once more, and the gradients of the weight and, here, of the input.
    x.requires_grad_()
    assert count('auto', lambda: conv(x).sum().backward()) == 4 * (convolution + sums)
    assert count('reference', lambda: conv(x).sum().backward()) == 6 * convolution


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=['nchw', 'nhwc'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_the_operator_has_its_schema_and_shapes(dtype, memory_format):
    x, weight = (torch.randn(8, 3, 9, 9).to(memory_format=memory_format) for _ in range(2))
    c, alpha, scale, shift = (torch.randn(8, dtype=torch.double) for _ in range(4))
    arguments = x, weight[..., :3, :3], c, alpha.float(), [1, 1, 1, 1, 1, 1, 1, 3], scale, shift, [3, 2, 1], dtype
    torch.library.opcheck(stem_module.stem_operator, arguments, test_utils=('test_schema', 'test_faketensor'))


@pytest.mark.skipif(not any(map(shutil.which, ('g++', 'clang++', 'cl'))), reason='needs a C++ compiler')
def test_compiled_it_is_one_node(chunks):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    model, x = create().eval(), torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        found = torch.compile(model, fullgraph=True, backend=backend)(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    operators = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    exporting = hasattr(torch.compiler, 'is_exporting')  # without it, compiling cannot be told from exporting
    assert sum('timm_pushpull.stem' in operator for operator in operators) == exporting
    with torch.no_grad():
        program = torch.export.export(model, (x,))
    assert not any('timm_pushpull' in str(node.target) for node in program.graph.nodes)
