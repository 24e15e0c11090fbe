"""The push-pull convolution on a CPU: one convolution, on chunks of the batch that stay in the processor's cache.

The arithmetic is that of :mod:`timm_pushpull.ops.one_convolution`. The backward pass computes the responses again, so
the forward pass stores no more than a plain convolution.
"""

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .one_convolution import compute_dtype, conv_dtype, memory_format_of, output_size, subtract_mean, unpack_geometry

__all__ = ['Chunks', 'push_pull', 'push_pull_backward']

aten = torch.ops.aten

CHUNK_BYTES = 4 << 20  # of the push response: as much as stays in the cache from one step to the next


def push_pull(
    input: Tensor, weight: Tensor, c: Tensor, alpha: Tensor, geometry: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """Compute the operator ``timm_pushpull::push_pull_conv2d`` on a CPU.

    Args:
        input: Images or feature maps (N, C, H, W).
        weight: Push kernels (O, C / groups, kh, kw).
        c: Offsets of the pull kernels (O,), float64.
        alpha: Inhibition strength (O,), of the data type of the arithmetic.
        geometry: Stride, padding and dilation, two numbers each, groups and averaging window.
        dtype: Data type of the response.

    Returns:
        Response (N, O, H', W').
    """
    with torch.autocast('cpu', enabled=False):
        chunks, output = Chunks(input, weight, c, alpha, geometry, dtype), None
        size = len(input), len(weight), *chunks.size
        for place, push, pull, strength in chunks.rectified():
            if output is None:
                output = torch.empty(size, dtype=dtype, device='cpu', memory_format=memory_format_of(push))
            if dtype == push.dtype:
                torch.addcmul(push, pull, strength, out=output[place])
            else:
                output[place] = push.addcmul_(pull, strength)
        return torch.empty(size, dtype=dtype, device='cpu') if output is None else output


def push_pull_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    c: Tensor,
    alpha: Tensor,
    geometry: Sequence[int],
    needs_input: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the operator ``timm_pushpull::push_pull_conv2d_backward`` on a CPU.

    Args:
        grad_output: Gradient of the response (N, O, H', W').
        input, weight, c, alpha, geometry: See :func:`push_pull`.
        needs_input: Compute the gradient of the input too.

    Returns:
        Gradients of input (empty where it is not needed), weight, c and alpha.
    """
    with torch.autocast('cpu', enabled=False):
        chunks = Chunks(input, weight, c, alpha, geometry, grad_output.dtype)
        groups, window = chunks.groups, chunks.window
        grad_input = torch.zeros_like(input) if needs_input else input.new_empty(0)
        grad_weight = torch.zeros_like(weight, dtype=chunks.dtype)
        grad_c, grad_alpha = torch.zeros_like(c), torch.zeros_like(alpha)
        grad_sums, grad_box_sums = torch.zeros_like(chunks.sums), torch.zeros_like(chunks.sums)
        alpha_map = alpha.view(-1, 1, 1)
        c_alpha = chunks.c_less_mean * alpha_map.view_as(chunks.c_less_mean)

        def conv_backward(grad: Tensor, x: Tensor, w: Tensor, mask: list[bool]) -> Sequence[Tensor]:
            return aten.convolution_backward(grad, x, w, None, *chunks.conv_numbers, False, [0, 0], groups, mask)

        buffers = None
        for place, x, push, pull in chunks:
            if buffers is None:
                buffers = tuple(torch.empty_like(push) for _ in range(3))
            shared, rows, box = (buffer[: len(push)] for buffer in buffers)
            grad = grad_output[place].to(chunks.dtype)
            # Where Q > 0: grad_Q / -alpha, divided equally over the values of the window.
            torch.mul(grad, chunks.inv_counts, out=shared)
            aten.hardtanh_backward.grad_input(shared, pull, -math.inf, 0, grad_input=shared)
            grad_alpha += pull.mul_(shared).sum((0, 2, 3))
            by_group, box_sums = shared.unflatten(1, (groups, -1)), chunks.box_sums[place]
            grad_c -= torch.einsum('ngohw,nghw->ngoh', by_group, box_sums).sum((0, 3)).flatten()
            grad_push = aten.threshold_backward.grad_input(grad, push, 0, grad_input=pull)
            if needs_input:
                grad_box_sums[place] = -(by_group * c_alpha).sum(2)
                grad_sums[place] = (grad_push.unflatten(1, (groups, -1)) * chunks.mean).sum(2)
            grad_push.addcmul_(_box(shared, window, rows, box), alpha_map)
            grad_x, grad_w, _ = conv_backward(grad_push.to(x.dtype), x, chunks.kernels, [needs_input, True, False])
            grad_weight += grad_w
            if needs_input:
                grad_input[place] = grad_x
        if needs_input:
            grad_sums += _box(grad_box_sums, window, torch.empty_like(grad_sums), torch.empty_like(grad_sums))
            grad_channel_sums, _, _ = conv_backward(grad_sums, chunks.channel_sums, chunks.ones, [True, False, False])
            grad_input.unflatten(1, (groups, -1)).add_(grad_channel_sums.unsqueeze(2))
        return grad_input, grad_weight.to(weight.dtype), grad_c * alpha, grad_alpha


class Chunks:
    """The responses P and Q of a batch, one chunk of images after the other, for the arguments of :func:`push_pull`."""

    def __init__(
        self,
        input: Tensor,
        weight: Tensor,
        c: Tensor,
        alpha: Tensor,
        geometry: Sequence[int],
        result_dtype: torch.dtype,
    ) -> None:
        self.input, self.alpha = input, alpha
        self.conv, self.window = unpack_geometry(geometry)
        self.conv_numbers = [self.conv[name] for name in ('stride', 'padding', 'dilation')]
        self.groups = groups = self.conv['groups']
        self.dtype = dtype = compute_dtype(weight)
        self.kernels, mean = subtract_mean(weight, c, conv_dtype(weight, result_dtype))
        # Shaped by group, to multiply the group's sum.
        self.mean = mean.to(dtype).view(groups, -1, 1, 1)
        self.c_less_mean = (c - mean).to(dtype).view(groups, -1, 1, 1)
        self.ones = self.mean.new_ones(groups, 1, *weight.shape[2:])
        self.size = output_size(input.shape[2:], weight.shape[2:], *self.conv_numbers)
        self.channel_sums = input.to(dtype).unflatten(1, (groups, -1)).sum(2)
        self.sums = F.conv2d(self.channel_sums, self.ones, **self.conv)
        self.box_sums = _box(self.sums, self.window, torch.empty_like(self.sums), torch.empty_like(self.sums))
        counts = torch.ones_like(self.sums[:1, :1])
        self.inv_counts = 1 / _box(counts, self.window, torch.empty_like(counts), torch.empty_like(counts))

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """Yield for each chunk its place in the batch, its input, P and -n Q for a window of n values.

        At the border n counts the values inside the map alone. All chunks share the memory of P and Q: new memory costs
        more than the arithmetic in it.
        """
        bytes_of_image = len(self.kernels) * math.prod(self.size) * self.dtype.itemsize
        images = max(1, CHUNK_BYTES // max(bytes_of_image, 1))
        buffers = None
        for start in range(0, len(self.input), images):
            place = slice(start, start + images)
            x = self.input[place].to(self.kernels.dtype)
            push = F.conv2d(x, self.kernels, **self.conv).to(self.dtype)
            if buffers is None:
                buffers = torch.empty_like(push), torch.empty_like(push)
            pull = _box(push, self.window, *(buffer[: len(push)] for buffer in buffers))
            by_group = pull.unflatten(1, (self.groups, -1))
            by_group.addcmul_(self.c_less_mean, self.box_sums[place].unsqueeze(2), value=-1)
            push.unflatten(1, (self.groups, -1)).addcmul_(self.mean, self.sums[place].unsqueeze(2))
            yield place, x, push, pull

    def rectified(self) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """Yield for each chunk its place, relu(P), -n relu(Q) and alpha / n for a window of n values."""
        strength = None
        for place, _, push, pull in self:
            if strength is None:
                strength = torch.empty_like(push[:1])
                torch.mul(self.alpha.view(-1, 1, 1), self.inv_counts, out=strength)
            yield place, push.clamp_(min=0), pull.clamp_(max=0), strength


def _box(x: Tensor, window: int, rows: Tensor, box: Tensor) -> Tensor:
    """Sum the part of each window that lies inside the map, into ``box``. The gradient is the same operation."""
    if window == 1:
        return box.copy_(x)
    return _line_sums(_line_sums(x, 2, window // 2, rows), 3, window // 2, box)


def _line_sums(x: Tensor, dim: int, reach: int, sums: Tensor) -> Tensor:
    length = x.shape[dim]
    if length == 1:
        return sums.copy_(x)
    for step in range(1, min(reach, length - 1) + 1):
        first, last = sums.narrow(dim, 0, length - step), sums.narrow(dim, step, length - step)
        if step == 1:  # saves a copy, and one more pass over it
            torch.add(x.narrow(dim, 0, length - 1), x.narrow(dim, 1, length - 1), out=first)
            sums.narrow(dim, length - 1, 1).copy_(x.narrow(dim, length - 1, 1))
        else:
            first.add_(x.narrow(dim, step, length - step))
        last.add_(x.narrow(dim, 0, length - step))
    return sums
