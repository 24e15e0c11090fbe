"""Push-pull convolution with one convolution instead of two, on pieces of the batch that stay in the processor's cache.

With :math:`c_o = \\max(W_o) + \\min(W_o)`, or 0 for the negated pull kernel, :math:`K_o = c_o - W_o`: the pull response
needs no convolution of its own. Both follow from the sum of the input under the kernel, :math:`S`, one channel for each
group, and from the response of the push kernel less a number :math:`m`, :math:`\\tilde P = x * (W - m)`:

.. math::
    P = \\tilde P + m S, \\qquad Q = (c - m) \\operatorname{avg}(S) - \\operatorname{avg}(\\tilde P)

Q is a small difference of large numbers where W's mean is near c and the input far from zero, unless m is that mean; P
may be one if it is. So m is the mean where a flat image has a smaller Q than P, and 0 elsewhere. Half precision is
computed in float32, but for the convolution under autocast.

The backward pass computes the responses once more instead of keeping them, so that it keeps nothing that a plain
convolution does not keep. Both are custom operators: ``torch.compile`` sees one node with a gradient.
"""

import ctypes
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .pushpull_native import FEWEST_VALUES, NativeSteps, memory_format_of, native_library, sum_under_kernel

__all__ = [
    'Pieces',
    'convolution_dtype',
    'fast_push_pull_conv2d',
    'is_fast',
    'less_mean',
    'operands',
]

aten = torch.ops.aten

# Arguments that the two operators share; before torch 2.7 they cannot be inferred from Sequence[int].
SHARED = 'Tensor input, Tensor weight, Tensor c, Tensor alpha, SymInt[] geometry'
CHUNK_BYTES = 4 << 20  # of the push response: as much as stays in cache from one step to the next


def is_fast(implementation: str, input: Tensor, weight: Tensor) -> bool:
    """Decide whether :func:`fast_push_pull_conv2d` computes a push-pull convolution, or the reference does.

    Args:
        implementation: ``'fast'``, ``'reference'``, or ``'auto'`` to decide by what follows.
        input: Images or feature maps.
        weight: Push kernels.

    Returns:
        True for batches on a CPU, eager or compiled; False where a program is traced or exported and where ``vmap`` or
        forward derivatives need each step of the equation. On a GPU ``'fast'`` is
        :mod:`timm_pushpull.pushpull_triton`, and must be asked for until its speed is known.

    Raises:
        ValueError: If there is no such implementation.
    """
    if implementation not in ('auto', 'fast', 'reference'):
        raise ValueError(f"implementation must be 'auto', 'fast' or 'reference', got {implementation!r}.")
    if implementation != 'auto':
        return implementation == 'fast'
    if torch.compiler.is_compiling():
        if not hasattr(torch.compiler, 'is_exporting') or torch.compiler.is_exporting():
            return False
    elif torch.jit.is_tracing() or torch._C._functorch.maybe_current_level() is not None:
        return False
    elif torch.autograd.forward_ad._current_level >= 0:
        return False
    if input.dim() != 4 or not input.device.type == weight.device.type == 'cpu' or not input.is_floating_point():
        return False
    if torch.is_autocast_enabled('cpu'):
        return torch.float64 not in (input.dtype, weight.dtype)
    return input.dtype == weight.dtype


def fast_push_pull_conv2d(
    input: Tensor,
    weight: Tensor,
    alpha: float | Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    avg_pool_size: int,
    pull_kernel: str,
) -> Tensor:
    """Compute :func:`timm_pushpull.push_pull_conv2d` without bias, for what :func:`is_fast` admits.

    Args:
        input: Images or feature maps (N, C, H, W).
        weight: Push kernels (O, C / groups, kh, kw).
        alpha: Inhibition strength, one number or one for each output channel.
        stride: Of rows and columns.
        padding: Of rows and columns.
        dilation: Of rows and columns.
        groups: Number of blocked connections.
        avg_pool_size: Side of the averaging window, odd, or 0.
        pull_kernel: ``'inverted'``, or ``'negated'``, for which c is 0.

    Returns:
        Response (N, O, H', W').
    """
    if torch.compiler.is_compiling():  # as the compiler lays out the maps of plain convolutions
        input = input.contiguous(memory_format=torch.channels_last)
    return _push_pull(*operands(input, weight, alpha, stride, padding, dilation, groups, avg_pool_size, pull_kernel))


def operands(
    input: Tensor,
    weight: Tensor,
    alpha: float | Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    avg_pool_size: int,
    pull_kernel: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[int], torch.dtype]:
    """Prepare what the operator takes.

    Args:
        input: As for :func:`fast_push_pull_conv2d`, and so for all that follow.
        weight: Push kernels.
        alpha: Inhibition strength.
        stride: Of rows and columns.
        padding: Of rows and columns.
        dilation: Of rows and columns.
        groups: Number of blocked connections.
        avg_pool_size: Side of the averaging window.
        pull_kernel: ``'inverted'`` or ``'negated'``.

    Returns:
        Input, push kernels, c, alpha of each channel, geometry, precision of the result.
    """
    device = input.device.type
    autocast = torch.is_autocast_enabled(device) and input.dtype != torch.float64
    dtype = torch.get_autocast_dtype(device) if autocast else input.dtype
    wide = weight.double()  # an error in c would count once for each value of the input
    c = wide.new_zeros(len(wide)) if pull_kernel == 'negated' else wide.amax((1, 2, 3)) + wide.amin((1, 2, 3))
    alpha = alpha if isinstance(alpha, Tensor) else torch.tensor(alpha, dtype=torch.float64)
    alpha = alpha.to(weight.device, _computing_dtype(weight)).expand(weight.shape[0])
    return input, weight, c, alpha, [*stride, *padding, *dilation, groups, max(avg_pool_size, 1)], dtype


def _unpack(geometry: Sequence[int]) -> tuple[dict[str, Any], int]:
    """The arguments of a convolution, and the averaging window."""
    *_, groups, window = geometry
    return dict(stride=geometry[0:2], padding=geometry[2:4], dilation=geometry[4:6], groups=groups), window


def _computing_dtype(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)


def convolution_dtype(weight: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Decide in which precision the push kernels are convolved.

    Half precision rounds the response, and P and Q, taken from it, may lose their sign. Beside autocast's rounding of
    input and weights that counts for little, but not where these were in half precision before.

    Args:
        weight: Push kernels.
        dtype: Of the result.

    Returns:
        That of the result under autocast, where the device has instructions for it; else at least float32.
    """
    supported = getattr(torch.cpu, '_is_avx512_bf16_supported', bool)  # absent from some releases
    if dtype.itemsize < weight.dtype.itemsize and (weight.is_cuda or (dtype == torch.bfloat16 and supported())):
        return dtype
    return _computing_dtype(weight)


def less_mean(weight: Tensor, c: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Take the mean from the push kernels whose pull response would be a small difference of large numbers.

    Args:
        weight: Push kernels (O, C / groups, kh, kw).
        c: Maximum and minimum of each push kernel, added (O,), float64.
        dtype: That the convolution is computed in.

    Returns:
        The kernels less a number each, in that precision, and these numbers, float64 (O,).
    """
    wide = weight.double()
    mean = wide.mean((1, 2, 3))
    mean *= mean.abs() > (c - mean).abs()
    kernels = (wide - mean.view(-1, 1, 1, 1)).to(dtype)
    return kernels, (wide - kernels).mean((1, 2, 3))  # with what was rounded off


class Pieces:
    """What both directions need of each piece of the batch."""

    def __init__(
        self,
        input: Tensor,
        weight: Tensor,
        c: Tensor,
        alpha: Tensor,
        geometry: Sequence[int],
        result_dtype: torch.dtype,
    ) -> None:
        self.input, self.alpha, self.result_dtype = input, alpha, result_dtype
        self.conv, self.window = _unpack(geometry)
        self.conv_numbers = [self.conv[name] for name in ('stride', 'padding', 'dilation')]
        self.groups = groups = self.conv['groups']
        self.dtype = dtype = _computing_dtype(weight)
        self.kernels, mean = less_mean(weight, c, convolution_dtype(weight, result_dtype))
        # By group, to multiply the group's sum.
        self.mean = mean.to(dtype).view(groups, -1, 1, 1)
        self.c_less_mean = (c - mean).to(dtype).view(groups, -1, 1, 1)
        self.ones = self.mean.new_ones(groups, 1, *weight.shape[2:])
        lengths = zip(input.shape[2:], weight.shape[2:], *self.conv_numbers, strict=True)
        self.size = [
            (length + 2 * padding - dilation * (side - 1) - 1) // stride + 1
            for length, side, stride, padding, dilation in lengths
        ]
        self.library = self._native_library()
        if self.library is None:
            self.sums = F.conv2d(self.channel_sums, self.ones, **self.conv)
        else:
            self.sums = sum_under_kernel(self.library, input, self.conv_numbers, weight.shape[2:], self.size)
        self.box_sums = _box(self.sums, self.window, torch.empty_like(self.sums), torch.empty_like(self.sums))
        counts = torch.ones_like(self.sums[:1, :1])
        self.inverse_counts = 1 / _box(counts, self.window, torch.empty_like(counts), torch.empty_like(counts))

    @functools.cached_property
    def channel_sums(self) -> Tensor:
        """The input, summed over the channels of each group."""
        return self.input.to(self.dtype).unflatten(1, (self.groups, -1)).sum(2)

    def _native_library(self) -> ctypes.CDLL | None:
        """The compiled steps, where they serve."""
        if len(self.input) * math.prod(self.size) * len(self.kernels) < FEWEST_VALUES:
            return None
        single, half = torch.float32, torch.bfloat16
        dtypes = self.input.dtype, self.kernels.dtype, self.result_dtype
        if self.dtype != single or any(dtype not in (single, half) for dtype in dtypes) or self.groups > 1:
            return None
        if (self.kernels.dtype, self.result_dtype) == (half, single):
            return None
        return native_library(self.window)

    def native_steps(self) -> NativeSteps | None:
        """The compiled steps on these pieces, where they serve."""
        if self.library is None:
            return None
        averages = self.box_sums * self.inverse_counts
        numbers = (numbers.flatten() for numbers in (self.mean, self.c_less_mean, self.alpha))
        return NativeSteps(self.library, self.sums, averages, self.inverse_counts, *numbers)

    def convolved(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield for each piece its place, its input and the response of the kernels."""
        itemsize = (self.dtype if self.library is None else self.kernels.dtype).itemsize
        bytes_of_image = len(self.kernels) * math.prod(self.size) * itemsize
        size = max(1, CHUNK_BYTES // max(bytes_of_image, 1))
        for start in range(0, len(self.input), size):
            piece = slice(start, start + size)
            x = self.input[piece].to(self.kernels.dtype)
            yield piece, x, F.conv2d(x, self.kernels, **self.conv)

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """Yield for each piece its place, its input, P, and -Q times the number of values in the window."""
        memory = None  # the same for each piece: to take new memory costs more than to compute in it
        for piece, x, push in self.convolved():
            push = push.to(self.dtype)
            if memory is None:
                memory = torch.empty_like(push), torch.empty_like(push)
            pull = _box(push, self.window, *(buffer[: len(push)] for buffer in memory))
            by_group = pull.unflatten(1, (self.groups, -1))
            by_group.addcmul_(self.c_less_mean, self.box_sums[piece].unsqueeze(2), value=-1)
            push.unflatten(1, (self.groups, -1)).addcmul_(self.mean, self.sums[piece].unsqueeze(2))
            yield piece, x, push, pull

    def rectified(self) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """Yield for each piece its place, relu(P), -relu(Q) times the number of values, and alpha over that number."""
        strength = None
        for piece, _, push, pull in self:
            if strength is None:
                strength = torch.empty_like(push[:1])
                torch.mul(self.alpha.view(-1, 1, 1), self.inverse_counts, out=strength)
            yield piece, push.clamp_(min=0), pull.clamp_(max=0), strength


def _box(x: Tensor, window: int, rows: Tensor, box: Tensor) -> Tensor:
    """Sum over a window around each value, as far as it lies inside, into ``box``: its own adjoint."""
    if window == 1:
        return box.copy_(x)
    return _line_sums(_line_sums(x, 2, window // 2, rows), 3, window // 2, box)


def _line_sums(x: Tensor, dim: int, reach: int, sums: Tensor) -> Tensor:
    length = x.shape[dim]
    if length == 1:
        return sums.copy_(x)
    for step in range(1, min(reach, length - 1) + 1):
        first, last = sums.narrow(dim, 0, length - step), sums.narrow(dim, step, length - step)
        if step == 1:  # instead of a copy, and another pass over it
            torch.add(x.narrow(dim, 0, length - 1), x.narrow(dim, 1, length - 1), out=first)
            sums.narrow(dim, length - 1, 1).copy_(x.narrow(dim, length - 1, 1))
        else:
            first.add_(x.narrow(dim, step, length - step))
        last.add_(x.narrow(dim, 0, length - step))
    return sums


@torch.library.custom_op(
    'timm_pushpull::push_pull_conv2d', mutates_args=(), schema=f'({SHARED}, ScalarType dtype) -> Tensor'
)
def _push_pull(
    input: Tensor,
    weight: Tensor,
    c: Tensor,
    alpha: Tensor,
    geometry: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    with torch.autocast('cpu', enabled=False):
        pieces, output = Pieces(input, weight, c, alpha, geometry, dtype), None
        size = len(input), len(weight), *pieces.size
        steps = pieces.native_steps()
        if steps is not None:
            for piece, _, push in pieces.convolved():
                if output is None:
                    output = torch.empty(size, dtype=dtype, memory_format=memory_format_of(push))
                steps.respond(piece, push, output[piece])
        else:
            for piece, push, pull, strength in pieces.rectified():
                if output is None:
                    output = torch.empty(size, dtype=dtype, memory_format=memory_format_of(push))
                if dtype == push.dtype:
                    torch.addcmul(push, pull, strength, out=output[piece])
                else:
                    output[piece] = push.addcmul_(pull, strength)
        return torch.empty(size, dtype=dtype) if output is None else output


@_push_pull.register_kernel('cuda')
def _(
    input: Tensor,
    weight: Tensor,
    c: Tensor,
    alpha: Tensor,
    geometry: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    from .pushpull_triton import push_pull  # where there is a GPU, there is Triton

    return push_pull(input, weight, c, alpha, geometry, dtype)


@_push_pull.register_fake
def _(
    input: Tensor,
    weight: Tensor,
    c: Tensor,
    alpha: Tensor,
    geometry: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    conv, _ = _unpack(geometry)
    push = F.conv2d(input.to(alpha.dtype), weight.to(alpha.dtype), **conv)
    return torch.empty_like(push, dtype=dtype, memory_format=memory_format_of(push))


@torch.library.custom_op(
    'timm_pushpull::push_pull_conv2d_backward',
    mutates_args=(),
    schema=f'(Tensor gradient, {SHARED}, bool needs_input) -> (Tensor, Tensor, Tensor, Tensor)',
)
def _push_pull_backward(
    gradient: Tensor,
    input: Tensor,
    weight: Tensor,
    c: Tensor,
    alpha: Tensor,
    geometry: Sequence[int],
    needs_input: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with torch.autocast('cpu', enabled=False):
        pieces = Pieces(input, weight, c, alpha, geometry, gradient.dtype)
        groups, window = pieces.groups, pieces.window
        of_input = torch.zeros_like(input) if needs_input else input.new_empty(0)
        of_weight = torch.zeros_like(weight, dtype=pieces.dtype)
        of_c, of_alpha = torch.zeros_like(c), torch.zeros_like(alpha)

        def backward(of_output: Tensor, x: Tensor, w: Tensor, mask: list[bool]) -> Sequence[Tensor]:
            return aten.convolution_backward(of_output, x, w, None, *pieces.conv_numbers, False, [0, 0], groups, mask)

        steps = None if needs_input else pieces.native_steps()
        if steps is not None:
            less_of_alpha, of_pushes = torch.zeros_like(of_c), None
            for piece, x, push in pieces.convolved():
                of_pushes = torch.empty_like(push) if of_pushes is None else of_pushes
                of_push = of_pushes[: len(push)]
                of_output = gradient[piece].contiguous(memory_format=memory_format_of(push))
                steps.differentiate(piece, push, of_output, of_push, less_of_alpha, of_c)
                of_weight += backward(of_push, x, pieces.kernels, [False, True, False])[1]
            return of_input, of_weight.to(weight.dtype), -of_c * alpha, -less_of_alpha.to(alpha.dtype)

        of_sums, of_box_sums = torch.zeros_like(pieces.sums), torch.zeros_like(pieces.sums)
        strength = alpha.view(-1, 1, 1)
        c_by_strength = pieces.c_less_mean * strength.view_as(pieces.c_less_mean)
        memory = None
        for piece, x, push, pull in pieces:
            if memory is None:
                memory = tuple(torch.empty_like(push) for _ in range(3))
            shared, rows, box = (buffer[: len(push)] for buffer in memory)
            of_output = gradient[piece].to(pieces.dtype)
            # Where Q > 0, the gradient of -alpha Q over -alpha, shared among the window's values.
            torch.mul(of_output, pieces.inverse_counts, out=shared)
            aten.hardtanh_backward.grad_input(shared, pull, -math.inf, 0, grad_input=shared)
            of_alpha += pull.mul_(shared).sum((0, 2, 3))
            by_group, box_sums = shared.unflatten(1, (groups, -1)), pieces.box_sums[piece]
            of_c -= torch.einsum('ngohw,nghw->ngoh', by_group, box_sums).sum((0, 3)).flatten()
            of_push = aten.threshold_backward.grad_input(of_output, push, 0, grad_input=pull)
            if needs_input:
                of_box_sums[piece] = -(by_group * c_by_strength).sum(2)
                of_sums[piece] = (of_push.unflatten(1, (groups, -1)) * pieces.mean).sum(2)
            of_push.addcmul_(_box(shared, window, rows, box), strength)
            of_x, of_w, _ = backward(of_push.to(x.dtype), x, pieces.kernels, [needs_input, True, False])
            of_weight += of_w
            if needs_input:
                of_input[piece] = of_x
        if needs_input:
            of_sums += _box(of_box_sums, window, torch.empty_like(of_sums), torch.empty_like(of_sums))
            of_channel_sums, _, _ = backward(of_sums, pieces.channel_sums, pieces.ones, [True, False, False])
            of_input.unflatten(1, (groups, -1)).add_(of_channel_sums.unsqueeze(2))
        return of_input, of_weight.to(weight.dtype), of_c * alpha, of_alpha


@_push_pull_backward.register_kernel('cuda')
def _(
    gradient: Tensor,
    input: Tensor,
    weight: Tensor,
    c: Tensor,
    alpha: Tensor,
    geometry: Sequence[int],
    needs_input: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from .pushpull_triton import push_pull_backward

    return push_pull_backward(gradient, input, weight, c, alpha, geometry, needs_input)


@_push_pull_backward.register_fake
def _(
    gradient: Tensor,
    input: Tensor,
    weight: Tensor,
    c: Tensor,
    alpha: Tensor,
    geometry: Sequence[int],
    needs_input: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    of_input = torch.empty_like(input) if needs_input else input.new_empty(0)
    return of_input, torch.empty_like(weight), torch.empty_like(c), torch.empty_like(alpha)


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.geometry, ctx.dtype = inputs[4:]  # type: ignore[attr-defined]


def _differentiate(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    needed, (input, weight, c, alpha) = ctx.needs_input_grad[:4], ctx.saved_tensors
    if torch.is_grad_enabled():  # the gradient is to be differentiated in its turn
        output = _step_by_step(input, weight, c, alpha, ctx.geometry, ctx.dtype)
        wanted = [x for x, need in zip((input, weight, c, alpha), needed, strict=True) if need]
        found = iter(torch.autograd.grad(output, wanted, gradient, create_graph=True))
        return *(next(found) if need else None for need in needed), None, None
    of_input, *others = _push_pull_backward(gradient, input, weight, c, alpha, ctx.geometry, needed[0])
    return of_input if needed[0] else None, *others, None, None


def _step_by_step(
    input: Tensor,
    weight: Tensor,
    c: Tensor,
    alpha: Tensor,
    geometry: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """The same in PyTorch's own differentiable steps."""
    conv, window = _unpack(geometry)
    groups = conv['groups']
    input, weight, c = (x.to(alpha.dtype) for x in (input, weight, c))
    push = F.conv2d(input, weight, **conv)
    sums = input.unflatten(1, (groups, -1)).sum(2)
    sums = F.conv2d(sums, c.new_ones(groups, 1, *weight.shape[2:]), **conv)
    pull = c.view(-1, 1, 1) * sums.repeat_interleave(len(c) // groups, 1) - push
    pull = F.avg_pool2d(pull, window, 1, window // 2, count_include_pad=False)
    return (F.relu(push) - alpha.view(-1, 1, 1) * F.relu(pull)).to(dtype)


_push_pull.register_autograd(_differentiate, setup_context=_setup_context)
