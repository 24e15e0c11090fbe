"""The stem in pieces of the batch: the same features, and only where nobody can tell."""

import shutil

import pytest
import timm
import torch

from timm_pushpull.layers import stem as stem_module
from timm_pushpull.layers.contrast_norm import add_contrast_norm
from timm_pushpull.models import pushpull_resnet
from timm_pushpull.ops import chunked


@pytest.fixture
def pieces(monkeypatch):
    """Counts the batches whose stem was computed in pieces."""
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
def test_the_same_features(settings, memory_format, pieces):
    model = timm.create_model('pp_resnet18', num_classes=10, **settings).to(memory_format=memory_format)
    x = torch.randn(3, 3, 66, 50).to(memory_format=memory_format)
    with torch.no_grad():
        for _ in range(2):
            model(x)  # running statistics unlike the initial ones
    model.eval()
    expected = model(x)
    assert pieces == []
    with torch.inference_mode():
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
        stem = model.forward_stem(x)
    assert len(pieces) == 2 and stem.is_contiguous(memory_format=memory_format)
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        assert model.forward_stem(x).dtype == torch.bfloat16 and len(pieces) == 3


def test_where_it_would_be_noticed_it_is_not_in_chunks(pieces):
    x = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        timm.create_model('pp_resnet18').train()(x)
        timm.create_model('pp_resnet18', push_pull=False).eval()(x)
        timm.create_model('pp_resnet18').eval()(x[:2])
        model = timm.create_model('pp_resnet18').eval()
        model.bn1.train()
        model(x)
        model.bn1.eval()
        seen = []
        hook = model.bn1.register_forward_hook(lambda module, inputs, output: seen.append(output))
        model(x)
        assert [len(output) for output in seen] == [3]
        hook.remove()
        hook = model.conv1.register_forward_pre_hook(lambda module, inputs: seen.append(*inputs))
        model(x)
        assert [len(output) for output in seen] == [3, 3]
        hook.remove()
        normalized = timm.create_model('pp_resnet18').eval()
        add_contrast_norm(normalized.bn1)
        normalized(x)
        timm.create_model('pp_resnet18', norm_layer=torch.nn.InstanceNorm2d).eval()(x)
        for settings in ({'replace_stem_pool': True}, {'aa_layer': 'blur'}, {'act_layer': 'silu'}):
            timm.create_model('pp_resnet18', **settings).eval()(x)
        torch.jit.script(model)(x)
        assert pieces == []
        model(x)
        assert len(pieces) == 1
    model(x).sum().backward()
    assert len(pieces) == 1 and model.conv1.weight.grad is not None


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=['nchw', 'nhwc'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_the_operator_keeps_its_promises(dtype, memory_format):
    x, weight = (torch.randn(8, 3, 9, 9).to(memory_format=memory_format) for _ in range(2))
    c, alpha, scale, shift = (torch.randn(8, dtype=torch.double) for _ in range(4))
    arguments = x, weight[..., :3, :3], c, alpha.float(), [1, 1, 1, 1, 1, 1, 1, 3], scale, shift, [3, 2, 1], dtype
    torch.library.opcheck(stem_module.stem_operator, arguments, test_utils=('test_schema', 'test_faketensor'))


@pytest.mark.skipif(not any(map(shutil.which, ('g++', 'clang++', 'cl'))), reason='needs a C++ compiler')
def test_compiled_it_is_one_node(pieces):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    model, x = timm.create_model('pp_resnet18', num_classes=10).eval(), torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        found = torch.compile(model, fullgraph=True, backend=backend)(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    operators = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    exporting = hasattr(torch.compiler, 'is_exporting')  # without it, a graph that is compiled may be one for export
    assert sum('timm_pushpull.stem' in operator for operator in operators) == exporting
    with torch.no_grad():
        program = torch.export.export(model, (x,))
    assert not any('timm_pushpull' in str(node.target) for node in program.graph.nodes)
