import copy
import io
import itertools
import json
import pickle
import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn
from torch.utils.checkpoint import checkpoint

from timm_pushpull import PushPullConv2d, push_pull_conv2d

GOLDEN_CASES = (
    'k7_s2_p3_avg0_fixed1',
    'k7_s2_p3_avg3_trainable',
    'k7_s2_p3_avg5_trainable_bias',
    'k3_s1_p1_avg3_fixed0.5',
    'k3_s1_p1_avg5_trainable_gray',
)


def relative_error(actual, expected):
    expected = expected.double()
    return ((actual.double() - expected).norm() / expected.norm()).item()


def push_pull_by_loops(x, weight, alpha, bias, stride, padding, dilation, groups, avg_pool_size):
    """Compute the equation, one output value at a time."""
    x, weight = x.double(), weight.double()
    n, _, height, width = x.shape
    out_chans, group_chans, kh, kw = weight.shape
    padded = torch.zeros(n, x.shape[1], height + 2 * padding[0], width + 2 * padding[1], dtype=torch.float64)
    padded[:, :, padding[0] : padding[0] + height, padding[1] : padding[1] + width] = x
    out_h = (padded.shape[2] - dilation[0] * (kh - 1) - 1) // stride[0] + 1
    out_w = (padded.shape[3] - dilation[1] * (kw - 1) - 1) // stride[1] + 1
    push = torch.zeros(n, out_chans, out_h, out_w, dtype=torch.float64)
    pull, output = torch.zeros_like(push), torch.zeros_like(push)
    pixels = list(itertools.product(range(out_h), range(out_w)))
    for b, o, (i, j) in itertools.product(range(n), range(out_chans), pixels):
        first = o // (out_chans // groups) * group_chans
        top, left = i * stride[0], j * stride[1]
        window = padded[
            b,
            first : first + group_chans,
            top : top + dilation[0] * (kh - 1) + 1 : dilation[0],
            left : left + dilation[1] * (kw - 1) + 1 : dilation[1],
        ]
        push[b, o, i, j] = (window * weight[o]).sum()
        pull[b, o, i, j] = (window * (weight[o].max() + weight[o].min() - weight[o])).sum()
    reach = avg_pool_size // 2
    for b, o, (i, j) in itertools.product(range(n), range(out_chans), pixels):
        near = pull[b, o, max(i - reach, 0) : i + reach + 1, max(j - reach, 0) : j + reach + 1]
        output[b, o, i, j] = push[b, o, i, j].clamp(min=0) - alpha[o] * near.mean().clamp(min=0) + bias[o]
    return output


IMPLEMENTATIONS = pytest.mark.parametrize('implementation', ['reference', 'fast'])


@IMPLEMENTATIONS
def test_hand_worked_border_window(implementation):
    x = torch.arange(1.0, 10.0).view(1, 1, 3, 3)
    weight = torch.tensor([[[[2.0, 0.0], [0.0, -1.0]]]])
    # pull kernel [[-1, 1], [1, 2]]; P = [[-3, -2], [0, 1]], Q = [[15, 18], [24, 27]] of mean 21 in each window
    expected = torch.tensor([[[[-10.5, -10.5], [-10.5, -9.5]]]])
    output = push_pull_conv2d(x, weight, 0.5, avg_pool_size=3, implementation=implementation)
    torch.testing.assert_close(output, expected)
    expected = torch.tensor([[[[-7.5, -9.0], [-12.0, -12.5]]]])
    output = push_pull_conv2d(x, weight, 0.5, avg_pool_size=0, implementation=implementation)
    torch.testing.assert_close(output, expected)


@IMPLEMENTATIONS
def test_hand_worked_average_before_rectification(implementation):
    # The pull kernel of a 1x1 kernel is the kernel itself: Q = P = [4, -2], of mean 1 in both windows.
    x, weight = torch.tensor([[[[4.0, -2.0]]]]), torch.ones(1, 1, 1, 1)
    output = push_pull_conv2d(x, weight, 1.0, implementation=implementation)
    torch.testing.assert_close(output, torch.tensor([[[[3.0, -1.0]]]]))


@IMPLEMENTATIONS
def test_hand_worked_negated_pull_kernel(implementation):
    x = torch.arange(1.0, 10.0).view(1, 1, 3, 3)
    weight = torch.tensor([[[[2.0, 0.0], [0.0, -1.0]]]])
    # P = [[-3, -2], [0, 1]] and Q = -P, of mean 1 in each window
    output = push_pull_conv2d(x, weight, 0.5, avg_pool_size=3, pull_kernel='negated', implementation=implementation)
    torch.testing.assert_close(output, torch.tensor([[[[-0.5, -0.5], [-0.5, 0.5]]]]))
    output = push_pull_conv2d(x, weight, 0.5, avg_pool_size=0, pull_kernel='negated', implementation=implementation)
    torch.testing.assert_close(output, torch.tensor([[[[-1.5, -1.0], [0.0, 1.0]]]]))


@IMPLEMENTATIONS
def test_negated_without_averaging_at_alpha_1_it_is_the_convolution(implementation):
    x, weight, bias = torch.randn(2, 4, 11, 9) + 1, torch.randn(6, 2, 3, 5), torch.randn(6)
    geometry = dict(stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2)
    settings = dict(avg_pool_size=0, pull_kernel='negated', implementation=implementation)
    output = push_pull_conv2d(x, weight, 1.0, bias, **geometry, **settings)
    torch.testing.assert_close(output, F.conv2d(x, weight, bias, **geometry))


@IMPLEMENTATIONS
@pytest.mark.parametrize('case', GOLDEN_CASES)
def test_outputs_and_gradients_of_the_original_code(case, implementation, shared):
    with safe_open(shared / 'reference' / 'push_pull_conv_golden.safetensors', 'pt') as file:
        cases = json.loads(file.metadata()['cases'])
        golden = {k[len(case) + 1 :]: file.get_tensor(k) for k in file.keys() if k.startswith(f'{case}.')}
    assert set(cases) == set(GOLDEN_CASES)
    settings = cases[case]
    inputs = {k: golden[k].requires_grad_() for k in ('input', 'weight', 'alpha', 'bias') if k in golden}
    output = push_pull_conv2d(
        inputs['input'],
        inputs['weight'],
        inputs.get('alpha', settings['alpha']),
        inputs.get('bias'),
        stride=settings['stride'],
        padding=settings['padding'],
        avg_pool_size=settings['avg_pool_size'],
        implementation=implementation,
    )
    assert relative_error(output, golden['output']) < 1e-5
    output.backward(golden['grad_output'])
    for name, tensor in inputs.items():
        assert relative_error(tensor.grad, golden[f'grad_{name}']) < 1e-5, name


@pytest.mark.parametrize(
    'in_chans, out_chans, kernel, stride, padding, dilation, groups',
    [
        (1, 3, (3, 3), (1, 1), (1, 1), (1, 1), 1),
        (3, 4, (7, 7), (2, 2), (3, 3), (1, 1), 1),
        (2, 4, (4, 2), (2, 1), (1, 0), (1, 2), 1),
        (6, 4, (3, 5), (1, 2), (2, 1), (2, 1), 2),
        (4, 4, (2, 3), (1, 1), (0, 1), (1, 1), 4),
    ],
)
@pytest.mark.parametrize('avg_pool_size', [0, 3, 5])
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_geometries(in_chans, out_chans, kernel, stride, padding, dilation, groups, avg_pool_size, memory_format):
    layer = PushPullConv2d(
        in_chans, out_chans, kernel, stride, padding, dilation, groups, avg_pool_size=avg_pool_size
    ).to(memory_format=memory_format)
    x = (torch.randn(2, in_chans, 11, 9) + 0.5).to(memory_format=memory_format)
    output = layer(x)
    expected = push_pull_by_loops(
        x, layer.weight, layer.alpha, layer.bias, stride, padding, dilation, groups, avg_pool_size
    )
    assert output.dtype == torch.float32
    assert output.is_contiguous(memory_format=memory_format)
    assert output.shape == nn.Conv2d(in_chans, out_chans, kernel, stride, padding, dilation, groups)(x).shape
    assert relative_error(output, expected) < 1e-5


@pytest.mark.parametrize('padding_mode', ['zeros', 'reflect', 'replicate', 'circular'])
@pytest.mark.parametrize('padding', [1, (2, 1), 'same', 'valid'])
def test_padding_modes(padding, padding_mode):
    layer = PushPullConv2d(2, 3, (4, 3), padding=padding, padding_mode=padding_mode, avg_pool_size=0, alpha=0.0)
    plain = nn.Conv2d(2, 3, (4, 3), padding=padding, padding_mode=padding_mode)
    plain.load_state_dict({'weight': layer.weight, 'bias': torch.zeros(3)})
    x = torch.randn(1, 2, 9, 8)
    torch.testing.assert_close(layer(x), plain(x).relu() + layer.bias.view(-1, 1, 1))


@pytest.mark.parametrize('avg_pool_size', [0, 3])
@pytest.mark.parametrize('ties', [False, True])
@pytest.mark.parametrize('pull_kernel', ['inverted', 'negated'])
def test_gradients(avg_pool_size, ties, pull_kernel):
    torch.manual_seed(0)
    x = torch.randn(2, 2, 6, 5, dtype=torch.float64)
    weight = torch.randn(3, 2, 3, 3, dtype=torch.float64)
    if ties:  # of two, where the central difference and the shared gradient agree
        weight.view(3, -1)[:, 1:3] = 3.0
        weight.view(3, -1)[:, 5:7] = -2.5
    inputs = [x, weight, torch.rand(3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)]
    for tensor in inputs:
        tensor.requires_grad_()

    def unit(x, weight, alpha, bias):
        settings = dict(avg_pool_size=avg_pool_size, pull_kernel=pull_kernel)
        return push_pull_conv2d(x, weight, alpha, bias, stride=(2, 1), padding=1, **settings)

    assert torch.autograd.gradcheck(unit, inputs)


def test_fixed_alpha_is_exact_in_float64():
    x, weight = torch.randn(1, 2, 5, 5).double(), torch.randn(3, 2, 3, 3).double()
    alpha = torch.full((3,), 0.1, dtype=torch.float64)
    assert torch.equal(push_pull_conv2d(x, weight, 0.1), push_pull_conv2d(x, weight, alpha))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('autocast', [False, True])
@pytest.mark.parametrize('avg_pool_size', [0, 3, 5])
@pytest.mark.parametrize('offset', [0.0, 2.0])
def test_half_precision(dtype, autocast, avg_pool_size, offset):
    torch.manual_seed(0)
    layer = PushPullConv2d(3, 32, 7, stride=2, padding=3, bias=False, avg_pool_size=avg_pool_size)
    x = torch.randn(2, 3, 33, 35) + offset
    if not autocast:
        layer, x = layer.to(dtype), x.to(dtype)
    wide = copy.deepcopy(layer).double()

    def averaged(y):
        return F.avg_pool2d(y, avg_pool_size, 1, avg_pool_size // 2, count_include_pad=False) if avg_pool_size else y

    with torch.autocast('cpu', dtype, enabled=autocast):
        output = layer(x)
        plain = averaged(F.conv2d(x, layer.weight, None, layer.stride, layer.padding))
    assert output.dtype == plain.dtype == dtype
    error = relative_error(output, wide(x.double()))
    plain_error = relative_error(plain, averaged(F.conv2d(x.double(), wide.weight, None, 2, 3)))
    assert error <= 2 * plain_error
    output.float().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize(
    'settings, message',
    [
        (dict(avg_pool_size=2), 'avg_pool_size must be 0 or a positive odd integer, got 2'),
        (dict(avg_pool_size=True), 'avg_pool_size must be 0 or a positive odd integer, got True'),
        (dict(avg_pool_size=-3), 'avg_pool_size must be 0 or a positive odd integer, got -3'),
        (dict(avg_pool_size=3.0), 'avg_pool_size must be 0 or a positive odd integer, got 3.0'),
        (dict(avg_pool_size='3'), 'avg_pool_size must be 0 or a positive odd integer, got 3'),
        (dict(alpha='x'), "alpha must be one number or one for each output channel, got 'x'"),
        (dict(trainable_alpha='no'), "trainable_alpha must be True or False, got 'no'"),
        (dict(alpha=[0.5, 0.5]), r'alpha must be one number, or 4 for the output channels, got shape \(2,\)'),
        (dict(alpha=torch.ones(4, 1)), r'alpha must be .* got shape \(4, 1\)'),
        (dict(alpha=[0.5] * 4, trainable_alpha=False), 'alpha must be one number, got'),
        (dict(alpha=float('nan')), 'alpha must be finite, got nan'),
        (dict(alpha=float('inf'), trainable_alpha=False), 'alpha must be finite, got inf'),
        (dict(pull_kernel='mirrored'), "pull_kernel must be 'inverted' or 'negated', got 'mirrored'"),
        (dict(trainable_alpha=False), 'trainable_alpha=False needs a number for alpha'),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PushPullConv2d(3, 4, 3, **settings)


@pytest.mark.parametrize('alpha, avg_pool_size', [(torch.ones(2), 3), (torch.ones(1, 4), 3), (1.0, 4), (1.0, -1)])
def test_bad_arguments_are_refused(alpha, avg_pool_size):
    with pytest.raises(ValueError, match='must be'):
        push_pull_conv2d(torch.ones(1, 3, 5, 5), torch.ones(4, 3, 3, 3), alpha, avg_pool_size=avg_pool_size)


def test_alpha_and_state_dict():
    torch.manual_seed(0)
    alpha = PushPullConv2d(3, 1000, 1).alpha
    assert alpha.shape == (1000,) and alpha.requires_grad and 0 <= alpha.min() and alpha.max() < 1
    assert abs(alpha.mean() - 0.5) < 0.03 and abs(alpha.var() - 1 / 12) < 0.01
    assert PushPullConv2d(3, 2, 1, alpha=2).alpha.tolist() == [2.0, 2.0]
    assert PushPullConv2d(3, 2, 1, alpha=[1, 3]).alpha.tolist() == [1.0, 3.0]
    fixed = PushPullConv2d(3, 2, 1, bias=False, alpha=2, trainable_alpha=False)
    assert fixed.alpha == 2 and list(fixed.state_dict()) == ['weight', 'settings']
    assert set(PushPullConv2d(3, 2, 1).state_dict()) == {'weight', 'bias', 'alpha', 'settings'}
    on_meta = PushPullConv2d(3, 2, 1, alpha=0.25, device='meta').to_empty(device='cpu')
    on_meta.reset_parameters()
    assert on_meta.alpha.tolist() == [0.25, 0.25]


def layer_and_input(**settings):
    torch.manual_seed(0)
    layer = PushPullConv2d(3, 8, (3, 4), stride=2, padding=(1, 2), **settings)
    return layer, torch.randn(2, 3, 13, 12)


SETTINGS = [
    dict(),
    dict(alpha=2.0, trainable_alpha=False, bias=False, avg_pool_size=0),
    dict(padding_mode='reflect'),
    dict(pull_kernel='negated'),
]


@pytest.mark.parametrize('settings', SETTINGS)
def test_torchscript(settings):
    layer, x = layer_and_input(**settings)
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(layer), file)
    file.seek(0)
    torch.testing.assert_close(torch.jit.load(file)(x), layer(x))


@pytest.mark.parametrize('settings', SETTINGS)
def test_fx(settings):
    layer, x = layer_and_input(**settings)
    traced = torch.fx.symbolic_trace(layer)
    torch.testing.assert_close(traced(x), layer(x))
    torch.testing.assert_close(torch.jit.script(copy.deepcopy(traced))(x), layer(x))


@pytest.mark.parametrize('settings', SETTINGS)
def test_export(settings):
    layer, x = layer_and_input(**settings)
    batch = torch.export.Dim('batch', min=1, max=8)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: batch},))
    torch.testing.assert_close(program.module()(x[:1]), layer(x[:1]))


@pytest.mark.skipif(not any(map(shutil.which, ('g++', 'clang++', 'cl'))), reason='needs a C++ compiler')
def test_compile_fullgraph():
    layer, x = layer_and_input()
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True)
    output, expected = compiled(x), layer(x)
    torch.testing.assert_close(output, expected)
    grad_output = torch.randn_like(expected)
    output.backward(grad_output)
    expected.backward(grad_output)
    for parameter, reference in zip(compiled.parameters(), layer.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, reference.grad)


@pytest.mark.parametrize('settings', SETTINGS)
@pytest.mark.parametrize('dynamo', [False, True])
def test_onnx(settings, dynamo, tmp_path):
    onnxruntime = pytest.importorskip('onnxruntime')
    pytest.importorskip('onnxscript')
    layer, x = layer_and_input(**settings)
    path = str(tmp_path / 'layer.onnx')
    torch.onnx.export(layer.eval(), (x,), path, dynamo=dynamo, input_names=['x'])
    (output,) = onnxruntime.InferenceSession(path).run(None, {'x': x.numpy()})
    torch.testing.assert_close(torch.from_numpy(output), layer(x), rtol=1e-5, atol=1e-5)


def test_copies():
    layer, x = layer_and_input()
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))
        assert twin.alpha is not layer.alpha


def test_gradient_checkpointing():
    layer, x = layer_and_input()
    layer(x).square().sum().backward()
    expected = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    checkpoint(layer, x, use_reentrant=False).square().sum().backward()
    for parameter, grad in zip(layer.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, grad)


def train_on_a_share(rank, folder):
    torch.distributed.init_process_group('gloo', init_method=f'file://{folder}/rendezvous', rank=rank, world_size=2)
    layer, x = layer_and_input()
    ddp = nn.parallel.DistributedDataParallel(layer)
    ddp(x[rank : rank + 1]).square().mean().backward()
    torch.save([p.grad for p in layer.parameters()], f'{folder}/{rank}.pt')
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_distributed_data_parallel(tmp_path):
    torch.multiprocessing.spawn(train_on_a_share, (str(tmp_path),), nprocs=2)
    layer, x = layer_and_input()
    layer(x).square().mean().backward()
    for rank in range(2):
        grads = torch.load(tmp_path / f'{rank}.pt', weights_only=True)
        for parameter, grad in zip(layer.parameters(), grads, strict=True):
            torch.testing.assert_close(grad, parameter.grad)
