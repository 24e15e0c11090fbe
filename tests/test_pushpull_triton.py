"""The GPU's kernels against the equation; without a GPU, small ones in Triton's interpreter."""

import pytest
import torch

from timm_pushpull import PushPullConv2d, push_pull_conv2d
from timm_pushpull.stem_pieces import runs_in_pieces

pytest.importorskip('triton')
from timm_pushpull import pushpull_triton

CUDA = torch.cuda.is_available()
DEVICE = 'cuda' if CUDA else 'cpu'

# in_chans, out_chans, kernel, stride, padding, dilation, groups, averaging window, size of the images
CASES = {
    'imagenet': (3, 16, (7, 7), (2, 2), (3, 3), (1, 1), 1, 3, (19, 15)),
    'wide window': (3, 20, (3, 3), (1, 1), (1, 1), (1, 1), 1, 5, (13, 11)),
    'no window': (3, 16, (3, 3), (1, 1), (1, 1), (1, 1), 1, 1, (13, 11)),
    'groups': (4, 8, (3, 5), (1, 2), (2, 1), (2, 1), 2, 3, (12, 15)),
    'depthwise': (6, 6, (3, 3), (2, 2), (0, 1), (1, 2), 6, 3, (19, 15)),
    'line': (2, 16, (1, 9), (1, 1), (0, 0), (1, 1), 1, 5, (19, 9)),  # of one column
}


def draw(case, offset, memory_format):
    in_chans, out_chans, kernel, *geometry, groups, window, size = CASES[case]
    x = torch.randn(64 if CUDA else 2, in_chans, *size) + offset
    weight = torch.randn(out_chans, in_chans // groups, *kernel)
    if offset:  # a mean of max + min: large responses, whose difference is small
        flat = weight.flatten(1)
        weight += (flat.mean(1) - flat.amax(1) - flat.amin(1)).view(-1, 1, 1, 1)
    inputs = x, weight, torch.rand(out_chans) * 2 - 0.5
    gradient = torch.randn_like(push_pull_conv2d(*inputs, None, *geometry, groups, 0))
    if not CUDA:  # so few responses that one which rounding puts on the other side of zero would decide
        push = torch.conv2d(x, weight, None, *geometry, groups)
        c = weight.amax((1, 2, 3), keepdim=True) + weight.amin((1, 2, 3), keepdim=True)
        pull = torch.conv2d(x, c - weight, None, *geometry, groups)
        pull = torch.nn.functional.avg_pool2d(pull, window, 1, window // 2, count_include_pad=False)
        for response in (push, pull):
            gradient *= response.abs() > 0.05 * response.std()
    return [tensor.to(memory_format=memory_format) for tensor in (x, weight)], inputs[2], gradient


def by_kernels(x, weight, alpha, gradient, case, dtype):
    """The output and the gradients of input, weight and alpha."""
    *_, stride, padding, dilation, groups, window, _ = CASES[case]
    x, weight, alpha, gradient = (tensor.to(DEVICE) for tensor in (x, weight, alpha, gradient))
    alpha = alpha.to(torch.promote_types(alpha.dtype, torch.float32))
    geometry = [*stride, *padding, *dilation, groups, window]
    weight.requires_grad_()
    wide = weight.double()
    c = wide.amax((1, 2, 3)) + wide.amin((1, 2, 3))
    with torch.no_grad():
        output = pushpull_triton.push_pull(x, weight, c, alpha, geometry, dtype)
        of_input, of_weight, of_c, of_alpha = pushpull_triton.push_pull_backward(
            gradient.to(dtype), x, weight, c, alpha, geometry, True
        )
    assert (output.dtype, of_input.dtype, of_weight.dtype) == (dtype, x.dtype, weight.dtype)
    return [output, of_input, of_weight + torch.autograd.grad(c, weight, of_c)[0], of_alpha]


def by_equation(x, weight, alpha, gradient, case, dtype):
    *_, stride, padding, dilation, groups, window, _ = CASES[case]
    inputs = [tensor.detach().clone().requires_grad_() for tensor in (x, weight, alpha)]
    with torch.autocast('cpu', dtype, enabled=dtype != x.dtype):
        output = push_pull_conv2d(*inputs, None, stride, padding, dilation, groups, window, implementation='reference')
    return [output, *torch.autograd.grad(output, inputs, gradient.to(dtype))]


def errors(found, exact):
    return [
        ((ours.double().cpu() - right).norm() / right.norm()).item() for ours, right in zip(found, exact, strict=True)
    ]


@pytest.mark.parametrize(
    'offset, memory_format', [(20, torch.contiguous_format), (0, torch.channels_last)], ids=['nchw', 'nhwc']
)
@pytest.mark.parametrize(
    'case, dtype, autocast',
    [
        *((case, torch.float32, None) for case in CASES),
        ('imagenet', torch.float64, None),
        ('imagenet', torch.bfloat16, None),
        ('imagenet', torch.float16, None),
        ('imagenet', torch.float32, torch.bfloat16),
        ('imagenet', torch.float32, torch.float16),
        ('groups', torch.float32, torch.float16),
    ],
    ids=str,
)
def test_as_accurate_as_the_reference(case, dtype, autocast, offset, memory_format, monkeypatch):
    monkeypatch.setattr(
        pushpull_triton, 'convolution_dtype', lambda *_: autocast or torch.promote_types(dtype, torch.float32)
    )
    (x, weight), *others = draw(case, offset, memory_format)
    rounded = [tensor.to(dtype) for tensor in (x, weight, *others)]
    exact = by_equation(*(tensor.double() for tensor in rounded), case, torch.float64)
    dtype = autocast or dtype
    ours, theirs = (errors(way(*rounded, case, dtype), exact) for way in (by_kernels, by_equation))
    # Triton's interpreter cuts off where it should round to bfloat16, always towards zero.
    factor = 4 if dtype == torch.bfloat16 and not CUDA else 2
    floor = {torch.float64: 1e-12, torch.float32: 5e-7}.get(dtype, 2e-4)  # a few roundings are no loss
    for name, our, their in zip(('output', 'input', 'weight', 'alpha'), ours, theirs, strict=True):
        assert our <= max(factor * their, floor), f'{name}: {our:.1e}, the reference {their:.1e}'


def test_where_the_input_needs_no_gradient():
    (x, weight), alpha, gradient = draw('imagenet', 0, torch.channels_last)
    *_, stride, padding, dilation, groups, window, _ = CASES['imagenet']
    tensors = [tensor.to(DEVICE) for tensor in (gradient, x, weight, weight.double().sum((1, 2, 3)), alpha)]
    geometry = [*stride, *padding, *dilation, groups, window]
    _, *others = pushpull_triton.push_pull_backward(*tensors, geometry, True)
    nothing, *same = pushpull_triton.push_pull_backward(*tensors, geometry, False)
    assert nothing.numel() == 0 and all(map(torch.equal, others, same))


def test_nothing_in_nothing_out():
    x, weight, alpha = torch.empty(0, 3, 9, 9, device=DEVICE), torch.randn(8, 3, 3, 3), torch.rand(8)
    weight, c, alpha = weight.to(DEVICE), torch.randn(8, device=DEVICE).double(), alpha.to(DEVICE)
    geometry = [1, 1, 0, 0, 1, 1, 1, 3]
    output = pushpull_triton.push_pull(x, weight, c, alpha, geometry, torch.float32)
    assert output.shape == (0, 8, 7, 7)
    gradients = pushpull_triton.push_pull_backward(output, x, weight, c, alpha, geometry, True)
    assert [gradient.shape for gradient in gradients] == [x.shape, weight.shape, c.shape, alpha.shape]
    assert not any(gradient.any() for gradient in gradients)


def test_what_is_not_a_number_stays_so():
    x = torch.randn(1, 3, 9, 9, device=DEVICE)
    x[0, 0, 4, 4] = float('nan')
    weight, alpha = torch.randn(4, 3, 3, 3, device=DEVICE), torch.rand(4, device=DEVICE)
    c = torch.ones(4, dtype=torch.double, device=DEVICE)
    output = pushpull_triton.push_pull(x, weight, c, alpha, [1, 1, 1, 1, 1, 1, 1, 3], torch.float32)
    expected = torch.zeros(9, 9, dtype=torch.bool)
    expected[2:7, 2:7] = True  # what the kernel sees of it, and the window around that
    assert torch.equal(output[0, 0].isnan().cpu(), expected)


@pytest.mark.skipif(not CUDA, reason='needs a GPU')
@pytest.mark.parametrize('torchcompile', [False, True], ids=['eager', 'compiled'])
@pytest.mark.parametrize('amp', [False, True], ids=['float32', 'bfloat16'])
def test_layer_on_cuda(amp, torchcompile):
    layer = PushPullConv2d(3, 64, 7, stride=2, padding=3).cuda().to(memory_format=torch.channels_last)
    x = torch.randn(8, 3, 64, 64, device='cuda').to(memory_format=torch.channels_last)
    found = []
    for implementation in ('fast', 'reference', 'auto'):
        layer.implementation = implementation
        call = torch.compile(layer, fullgraph=True) if torchcompile else layer
        with torch.autocast('cuda', torch.bfloat16, enabled=amp):
            output = call(x)
        found.append([output, *torch.autograd.grad(output.float().square().sum(), list(layer.parameters()))])
    tolerance = dict(rtol=5e-2, atol=5e-2) if amp else dict(rtol=1e-2, atol=1e-3)  # cuDNN may take TF32
    for ours, theirs in zip(*found[:2], strict=True):
        scale = theirs.abs().max()
        torch.testing.assert_close(ours / scale, theirs / scale, **tolerance, check_dtype=False)
    assert all(map(torch.equal, found[1], found[2]))  # off unless it is asked for
    stem = [layer, torch.nn.BatchNorm2d(64).cuda(), torch.nn.ReLU(), torch.nn.MaxPool2d(3, 2, 1)]
    layer.implementation = 'fast'
    with torch.no_grad():
        assert not runs_in_pieces([part.eval() for part in stem], x.repeat(64, 1, 1, 1))
