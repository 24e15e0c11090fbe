r"""The push-pull convolution on a GPU: one convolution, and a Triton kernel for all that follows it.

The arithmetic is that of :mod:`timm_pushpull.ops.one_convolution`. cuDNN convolves, one kernel computes S in float32,
and one kernel reads the response once and writes the result. The backward pass computes the responses again and runs
two kernels; between them the gradient of Q lies in memory. Sums over the batch have a fixed order.
"""

# The arguments of kernels have Triton's own types.
# mypy: disable-error-code="no-untyped-def"

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .one_convolution import conv_dtype, memory_format_of, subtract_mean, unpack_geometry

__all__ = ['push_pull', 'push_pull_backward']

aten = torch.ops.aten

# Left alone, NVIDIA's assembler spills a few registers of some variants, to run more threads at a time.
NO_SPILLS = {} if torch.version.hip else {'maxnreg': 128}


def push_pull(
    input: Tensor,
    weight: Tensor,
    c: Tensor,
    alpha: Tensor,
    geometry: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """Compute the operator of :func:`timm_pushpull.ops.chunked.push_pull` on a GPU."""
    with torch.cuda.device_of(input), torch.autocast('cuda', enabled=False):  # Triton runs on the current GPU
        responses = _Responses(input, weight, c, alpha, geometry, dtype)
        output = torch.empty_like(responses.centred, dtype=dtype)
        responses.launch(_combine, output)
        return output


def push_pull_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    c: Tensor,
    alpha: Tensor,
    geometry: Sequence[int],
    needs_input: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the operator of :func:`timm_pushpull.ops.chunked.push_pull_backward` on a GPU."""
    with torch.cuda.device_of(input), torch.autocast('cuda', enabled=False):
        responses = _Responses(input, weight, c, alpha, geometry, grad_output.dtype)
        grad_output = grad_output.contiguous(memory_format=responses.memory_format)
        grad_pull, grad_push = torch.empty_like(responses.centred), torch.empty_like(responses.centred)
        partial = alpha.new_empty(2, responses.blocks, len(alpha))
        responses.launch(_backward_pull, grad_output, grad_pull, *partial)
        responses.launch(_backward_push, grad_output, grad_pull, grad_push)
        grad_alpha, grad_c = -partial.sum(1)
        shape = [responses.conv[key] for key in ('stride', 'padding', 'dilation')]
        groups = responses.groups
        x, mask = input.to(grad_push.dtype), [needs_input, True, False]
        grad_input, grad_weight, _ = aten.convolution_backward(
            grad_push, x, responses.kernels, None, *shape, False, [0, 0], groups, mask
        )
        if needs_input:
            by_mean = torch.einsum('ngohw,go->nghw', responses.by_group(grad_push), responses.mean.view(groups, -1))
            c_by_alpha = (c * alpha).to(alpha.dtype).view(groups, -1)
            grad_average = torch.einsum('ngohw,go->nghw', responses.by_group(grad_pull), c_by_alpha)
            window = responses.window
            grad_sums = by_mean - F.avg_pool2d(grad_average, window, 1, window // 2, divisor_override=1)
            channel_sums = grad_sums.new_empty(len(input), groups, *input.shape[2:], dtype=torch.double)
            ones = channel_sums.new_ones(groups, 1, *weight.shape[2:])  # in double, because float32 may become TF32
            grad_channel_sums, _, _ = aten.convolution_backward(
                grad_sums.double(), channel_sums, ones, None, *shape, False, [0, 0], groups, [True, False, False]
            )
            grad_channels = grad_input.unflatten(1, (groups, -1)) + grad_channel_sums.unsqueeze(2)
            grad_input = torch.empty_like(input).copy_(grad_channels.flatten(1, 2))
        else:
            grad_input = input.new_empty(0)
        return grad_input, grad_weight.to(weight.dtype), (grad_c * alpha).to(c.dtype), grad_alpha


class _Responses:
    """What the forward and the backward pass need: the convolution with W - m, and S."""

    def __init__(
        self,
        input: Tensor,
        weight: Tensor,
        c: Tensor,
        alpha: Tensor,
        geometry: Sequence[int],
        dtype: torch.dtype,
    ) -> None:
        self.conv, self.window = unpack_geometry(geometry)
        self.groups = self.conv['groups']
        self.kernels, mean = subtract_mean(weight, c, conv_dtype(weight, dtype))
        self.mean, self.c_less_mean = mean.to(alpha.dtype), (c - mean).to(alpha.dtype)
        self.alpha = alpha.contiguous()
        push = F.conv2d(input.to(self.kernels.dtype), self.kernels, **self.conv)
        self.memory_format = memory_format_of(push)
        channels_last = self.memory_format == torch.channels_last
        self.centred = push.contiguous(memory_format=self.memory_format)

        height, width = push.shape[2:]
        channels = len(weight) // self.groups
        self.pixels, self.channels = (
            min(most, triton.next_power_of_2(size))
            for most, size in zip((32, 64) if channels_last else (128, 16), (height * width, channels), strict=True)
        )
        self.blocks = len(input) * triton.cdiv(height * width, self.pixels)
        self.accumulator = tl.float64 if alpha.dtype == torch.float64 else tl.float32
        self.sums = alpha.new_empty(len(input), self.groups, height, width)
        if self.sums.numel():
            _sum_windows[len(input) * self.groups, triton.cdiv(height * width, 128)](
                *(input, *input.shape[2:], *input.stride(), self.sums, height, width),
                *geometry[:7],
                KERNEL_HEIGHT=weight.shape[2],
                KERNEL_WIDTH=weight.shape[3],
                CHANNELS=weight.shape[1],
                PIXELS=128,
                ACCUMULATOR=self.accumulator,
            )

    def launch(self, kernel: Any, *tensors: Tensor) -> None:
        """Launch a kernel on the whole response."""
        _, channels, height, width = self.centred.shape
        strides = (1, channels) if self.memory_format == torch.channels_last else (height * width, 1)
        in_group = channels // self.groups
        if self.centred.numel():
            kernel[self.blocks, self.groups * triton.cdiv(in_group, self.channels)](
                *(self.centred, self.sums, self.mean, self.c_less_mean, self.alpha, *tensors),
                *(height, width, self.groups, in_group, *strides),
                WINDOW=self.window,
                PIXELS=self.pixels,
                CHANNELS=self.channels,
                ACCUMULATOR=self.accumulator,
                num_warps=8,
                **NO_SPILLS,
            )

    def by_group(self, response: Tensor) -> Tensor:
        """View a map (N, O, H', W') as (N, groups, O / groups, H', W'), in the data type of the arithmetic."""
        return response.to(self.alpha.dtype).unflatten(1, (self.groups, -1))


@triton.jit
def _sum_windows(
    x, in_height, in_width, x_batch, x_channel, x_row, x_column, sums, height, width,
    stride_rows, stride_columns, padding_rows, padding_columns, dilation_rows, dilation_columns,
    groups, KERNEL_HEIGHT: tl.constexpr, KERNEL_WIDTH: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
):  # fmt: skip
    """Compute S, the sum of a group's channels under the kernel."""
    plane = tl.program_id(0).to(tl.int64)  # one for each image and group
    pixel = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)
    exists = pixel < height * width
    x += plane // groups * x_batch + plane % groups * CHANNELS * x_channel
    total = tl.zeros([PIXELS], ACCUMULATOR)
    for i in range(KERNEL_HEIGHT):
        row = pixel // width * stride_rows - padding_rows + i * dilation_rows
        for j in range(KERNEL_WIDTH):
            column = pixel % width * stride_columns - padding_columns + j * dilation_columns
            inside = exists & (row >= 0) & (row < in_height) & (column >= 0) & (column < in_width)
            for channel in range(CHANNELS):
                value = tl.load(x + channel * x_channel + row * x_row + column * x_column, mask=inside, other=0.0)
                total += value.to(ACCUMULATOR)
    tl.store(sums + plane * height * width + pixel, total, mask=exists)


@triton.jit
def _locate(height, width, groups, in_group, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    """Return the image, the pixels, the group and the channels of a program, and which pixels and channels exist."""
    blocks = tl.cdiv(height * width, PIXELS)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    pixel = tl.program_id(0) % blocks * PIXELS + tl.arange(0, PIXELS)
    blocks_of_group = tl.cdiv(in_group, CHANNELS)
    group = tl.program_id(1) // blocks_of_group
    channel = tl.program_id(1) % blocks_of_group * CHANNELS + tl.arange(0, CHANNELS)
    return image, pixel, pixel < height * width, group, group * in_group + channel, channel < in_group


@triton.jit
def _respond(
    push, sums, mean, c_less_mean, image, pixel, is_pixel, group, channel, is_channel, height, width, groups,
    channel_stride, pixel_stride, WINDOW: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
):  # fmt: skip
    """Compute P, Q, the average of S, and one over the number of values in the window."""
    sums += (image * groups + group) * height * width
    push_window = tl.zeros([PIXELS, CHANNELS], ACCUMULATOR)
    sums_window = tl.zeros([PIXELS], ACCUMULATOR)
    count = tl.zeros([PIXELS], ACCUMULATOR)
    for i in range(WINDOW):
        row = pixel // width + i - WINDOW // 2
        for j in range(WINDOW):
            column = pixel % width + j - WINDOW // 2
            inside = is_pixel & (row >= 0) & (row < height) & (column >= 0) & (column < width)
            place = row * width + column
            mask = inside[:, None] & is_channel[None, :]
            values = tl.load(push + place[:, None] * pixel_stride + channel[None, :] * channel_stride, mask, other=0.0)
            push_window += values.to(ACCUMULATOR)
            sums_window += tl.load(sums + place, inside, other=0.0)
            count += inside.to(ACCUMULATOR)
    inv_count = 1 / tl.where(is_pixel, count, 1)
    average = sums_window * inv_count
    mask = is_pixel[:, None] & is_channel[None, :]
    centre = tl.load(push + pixel[:, None] * pixel_stride + channel[None, :] * channel_stride, mask, other=0.0)
    m = tl.load(mean + channel, is_channel, other=0.0)
    c = tl.load(c_less_mean + channel, is_channel, other=0.0)
    p = centre.to(ACCUMULATOR) + m[None, :] * tl.load(sums + pixel, is_pixel, other=0.0)[:, None]
    q = c[None, :] * average[:, None] - push_window * inv_count[:, None]
    return p, q, average, inv_count


@triton.jit
def _combine(
    push, sums, mean, c_less_mean, alpha, output, height, width, groups, in_group, channel_stride, pixel_stride,
    WINDOW: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr, ACCUMULATOR: tl.constexpr,
):  # fmt: skip
    """Compute R = relu(P) - alpha relu(Q)."""
    image, pixel, is_pixel, group, channel, is_channel = _locate(height, width, groups, in_group, PIXELS, CHANNELS)
    start = image * groups * in_group * height * width
    p, q, _, _ = _respond(
        push + start, sums, mean, c_less_mean, image, pixel, is_pixel, group, channel, is_channel, height, width,
        groups, channel_stride, pixel_stride, WINDOW, PIXELS, CHANNELS, ACCUMULATOR,
    )  # fmt: skip
    strength = tl.load(alpha + channel, is_channel, other=0.0)
    # Comparisons, because they leave NaN as it is.
    response = tl.where(p < 0, 0, p) - strength[None, :] * tl.where(q < 0, 0, q)
    place = pixel[:, None] * pixel_stride + channel[None, :] * channel_stride
    tl.store(output + start + place, response.to(output.dtype.element_ty), is_pixel[:, None] & is_channel[None, :])


@triton.jit
def _backward_pull(
    push, sums, mean, c_less_mean, alpha, grad_output, grad_pull, grad_alpha, grad_c, height, width, groups, in_group,
    channel_stride, pixel_stride, WINDOW: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of Q, divided by -alpha and by the number of values in the window.

    Each block also stores its sums for -grad_alpha and for grad_c / -alpha.
    """
    image, pixel, is_pixel, group, channel, is_channel = _locate(height, width, groups, in_group, PIXELS, CHANNELS)
    start = image * groups * in_group * height * width
    _, q, average, inv_count = _respond(
        push + start, sums, mean, c_less_mean, image, pixel, is_pixel, group, channel, is_channel, height, width,
        groups, channel_stride, pixel_stride, WINDOW, PIXELS, CHANNELS, ACCUMULATOR,
    )  # fmt: skip
    place = start + pixel[:, None] * pixel_stride + channel[None, :] * channel_stride
    mask = is_pixel[:, None] & is_channel[None, :]
    passed = tl.where(q <= 0, 0, tl.load(grad_output + place, mask, other=0.0).to(ACCUMULATOR))
    tl.store(grad_pull + place, (passed * inv_count[:, None]).to(grad_pull.dtype.element_ty), mask)
    sum_place = tl.program_id(0).to(tl.int64) * groups * in_group + channel
    tl.store(grad_alpha + sum_place, tl.sum(passed * q, 0), is_channel)
    tl.store(grad_c + sum_place, tl.sum(passed * average[:, None], 0), is_channel)


@triton.jit
def _backward_push(
    push, sums, mean, c_less_mean, alpha, grad_output, grad_pull, grad_push, height, width, groups, in_group,
    channel_stride, pixel_stride, WINDOW: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of P: through its own rectification, and through the Q of each window that holds it."""
    image, pixel, is_pixel, group, channel, is_channel = _locate(height, width, groups, in_group, PIXELS, CHANNELS)
    start = image * groups * in_group * height * width
    total = tl.zeros([PIXELS, CHANNELS], ACCUMULATOR)
    for i in range(WINDOW):
        row = pixel // width + i - WINDOW // 2
        for j in range(WINDOW):
            column = pixel % width + j - WINDOW // 2
            inside = is_pixel & (row >= 0) & (row < height) & (column >= 0) & (column < width)
            place = start + (row * width + column)[:, None] * pixel_stride + channel[None, :] * channel_stride
            total += tl.load(grad_pull + place, inside[:, None] & is_channel[None, :], other=0.0).to(ACCUMULATOR)
    place = start + pixel[:, None] * pixel_stride + channel[None, :] * channel_stride
    mask = is_pixel[:, None] & is_channel[None, :]
    m = tl.load(mean + channel, is_channel, other=0.0)
    sums += (image * groups + group) * height * width
    centre = tl.load(push + place, mask, other=0.0).to(ACCUMULATOR)
    p = centre + m[None, :] * tl.load(sums + pixel, is_pixel, other=0.0)[:, None]
    passed = tl.where(p <= 0, 0, tl.load(grad_output + place, mask, other=0.0).to(ACCUMULATOR))
    strength = tl.load(alpha + channel, is_channel, other=0.0)
    tl.store(grad_push + place, (passed + strength[None, :] * total).to(grad_push.dtype.element_ty), mask)
