"""How accurate a fast push-pull convolution is, compared with the reference in the same precision."""

import math

import pytest
import torch
import torch.nn.functional as F

from timm_pushpull import push_pull_conv2d

# in_chans, out_chans, kernel, stride, padding, dilation, groups, size of the images. Enough output channels to average
# the error of alpha, which has one number for each.
GEOMETRIES = {
    'imagenet': (3, 16, (7, 7), (2, 2), (3, 3), (1, 1), 1, (19, 15)),
    'cifar': (3, 20, (3, 3), (1, 1), (1, 1), (1, 1), 1, (13, 11)),
    'groups': (4, 16, (3, 5), (1, 2), (2, 1), (2, 1), 2, (19, 15)),
    'depthwise': (24, 24, (3, 3), (2, 2), (0, 1), (1, 2), 24, (19, 15)),
    'line': (2, 16, (1, 9), (1, 1), (0, 0), (1, 1), 1, (19, 9)),  # one column of output
}

PRECISIONS = [  # data type of the tensors, and that of autocast
    (torch.float32, None),
    (torch.bfloat16, None),
    (torch.float16, None),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
]

FLOOR = {0: 5e-7, 20: 4e-6}  # by offset, for float32: a few roundings


def draw(geometry, window, offset, images, memory_format):
    """Draw images, weights, alpha and the gradient of the response.

    The gradient is zero where P or Q is close to zero. There rounding may change the sign of a response, which is no
    loss of accuracy, but a few such gradients would decide the comparison.
    """
    in_chans, out_chans, kernel, *geometry, groups, size = GEOMETRIES[geometry]
    x = torch.randn(images, in_chans, *size) + offset
    weight = torch.randn(out_chans, in_chans // groups, *kernel)
    if offset:  # makes the mean of W equal to max + min: Q is then a small difference of large numbers
        flat = weight.flatten(1)
        weight += (flat.mean(1) - flat.amax(1) - flat.amin(1)).view(-1, 1, 1, 1)
    push = F.conv2d(x, weight, None, *geometry, groups)
    c = weight.amax((1, 2, 3), keepdim=True) + weight.amin((1, 2, 3), keepdim=True)
    pull = F.conv2d(x, c - weight, None, *geometry, groups)
    if window:
        pull = F.avg_pool2d(pull, window, 1, window // 2, count_include_pad=False)
    gradient = torch.randn_like(push) / 32  # gradients of weights fit into float16
    for response in (push, pull):
        gradient *= response.abs() > 0.05 * response.std()
    x, weight = (tensor.to(memory_format=memory_format) for tensor in (x, weight))
    return x, weight, torch.rand(out_chans) * 2 - 0.5, gradient


def output_and_grads(
    implementation, x, weight, alpha, gradient, geometry, window, autocast=None, needs_input=True, **settings
):
    """Return the output, and the gradients of weight, alpha and, if needed, the input."""
    *_, stride, padding, dilation, groups, _ = GEOMETRIES[geometry]
    inputs = [tensor.detach().clone().requires_grad_() for tensor in (weight, alpha)]
    x = x.detach().clone().requires_grad_(needs_input)
    with torch.autocast(x.device.type, autocast, enabled=autocast is not None):
        output = push_pull_conv2d(
            x, *inputs, None, stride, padding, dilation, groups, window, implementation=implementation, **settings
        )
    return output, *torch.autograd.grad(output, [*inputs, x][: 2 + needs_input], gradient.to(output.dtype))


class Errors:
    """Errors of ours and of the reference over several draws, relative to float64."""

    def __init__(self):
        self.ours, self.theirs = [], []

    def add(self, ours, theirs, exact):
        for errors, found in ((self.ours, ours), (self.theirs, theirs)):
            errors.append([relative(one, right) for one, right in zip(found, exact, strict=True)])

    def check(self, factor=2.0, floor=0.0):
        """Fail if the root mean square of our errors exceeds the reference's, times the factor, and the floor."""
        squares = (torch.tensor(errors).square().mean(0).sqrt().tolist() for errors in (self.ours, self.theirs))
        for name, our, their in zip(('output', 'weight', 'alpha', 'input'), *squares, strict=False):
            assert math.isfinite(their), f'{name}: the reference has {their}, which hides any error'
            if not our <= max(factor * their, floor):
                pytest.fail(f'{name}: {our:.1e}, the reference {their:.1e}')


def relative(found, exact):
    return ((found.double().cpu() - exact).norm() / exact.norm()).item()
