"""The fast push-pull convolution as operators of PyTorch, so that ``torch.compile`` sees one node with a gradient.

``timm_pushpull::push_pull_conv2d`` and ``timm_pushpull::push_pull_conv2d_backward`` run
:mod:`timm_pushpull.ops.chunked` on a CPU and :mod:`timm_pushpull.ops.triton` on a GPU.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

from . import chunked
from .one_convolution import memory_format_of, unpack_geometry
from .reference import average

__all__ = ['OPERANDS', 'conv_flops', 'push_pull_conv2d_operator']

# Arguments that the operators share. torch < 2.7 cannot infer the schema.
OPERANDS = 'Tensor input, Tensor weight, Tensor c, Tensor alpha, SymInt[] geometry'

push_pull_conv2d_operator = torch.library.custom_op(
    'timm_pushpull::push_pull_conv2d',
    chunked.push_pull,
    mutates_args=(),
    device_types='cpu',
    schema=f'({OPERANDS}, ScalarType dtype) -> Tensor',
)
push_pull_conv2d_backward = torch.library.custom_op(
    'timm_pushpull::push_pull_conv2d_backward',
    chunked.push_pull_backward,
    mutates_args=(),
    device_types='cpu',
    schema=f'(Tensor grad_output, {OPERANDS}, bool needs_input) -> (Tensor, Tensor, Tensor, Tensor)',
)


@push_pull_conv2d_operator.register_kernel('cuda')
def _(*operands: Any) -> Tensor:
    from . import triton  # where there is a GPU, there is Triton

    return triton.push_pull(*operands)


@push_pull_conv2d_backward.register_kernel('cuda')
def _(*operands: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from . import triton

    return triton.push_pull_backward(*operands)


@push_pull_conv2d_operator.register_fake
def _(input: Tensor, weight: Tensor, c: Tensor, alpha: Tensor, geometry: Sequence[int], dtype: torch.dtype) -> Tensor:
    conv, _ = unpack_geometry(geometry)
    push = F.conv2d(input.to(alpha.dtype), weight.to(alpha.dtype), **conv)
    return torch.empty_like(push, dtype=dtype, memory_format=memory_format_of(push))


@push_pull_conv2d_backward.register_fake
def _(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    c: Tensor,
    alpha: Tensor,
    geometry: Sequence[int],
    needs_input: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_input = torch.empty_like(input) if needs_input else input.new_empty(0)
    return grad_input, torch.empty_like(weight), torch.empty_like(c), torch.empty_like(alpha)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.geometry, ctx.dtype = inputs[4:]


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad[:4]
    tensors: tuple[Tensor, Tensor, Tensor, Tensor] = ctx.saved_tensors
    if torch.is_grad_enabled():  # for gradients of gradients: the equation as it stands
        # Views, because c depends on the weight: the gradient of the weight itself would hold that of c too.
        input, weight, c, alpha = (tensor.view_as(tensor) for tensor in tensors)
        conv, window = unpack_geometry(ctx.geometry)
        with torch.autocast(input.device.type, enabled=False):
            kernels = weight, c.view(-1, 1, 1, 1) - weight
            push, pull = (F.conv2d(input.to(alpha.dtype), kernel.to(alpha.dtype), **conv) for kernel in kernels)
            output = (F.relu(push) - alpha.view(-1, 1, 1) * F.relu(average(pull, window))).to(ctx.dtype)
        wanted = [x for x, need in zip((input, weight, c, alpha), needed, strict=True) if need]
        grads = iter(torch.autograd.grad(output, wanted, grad_output, create_graph=True))
        return *(next(grads) if need else None for need in needed), None, None
    grad_input, *others = push_pull_conv2d_backward(grad_output, *tensors, ctx.geometry, needed[0])
    return grad_input if needed[0] else None, *others, None, None


push_pull_conv2d_operator.register_autograd(_backward, setup_context=_setup_context)


def conv_flops(input: list[int], weight: list[int], response: list[int], groups: int) -> int:
    """Count the floating-point operations of the convolution and of the sum S, from the shapes."""
    sums = [response[0], groups, *response[2:]]
    sums_input, ones = [input[0], groups, *input[2:]], [groups, 1, *weight[2:]]
    return conv_flop_count(input, weight, response) + conv_flop_count(sums_input, ones, sums)


@register_flop_formula(torch.ops.timm_pushpull.push_pull_conv2d)
def _(input: Any, weight: Any, c: Any, alpha: Any, geometry: Any, *_: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return conv_flops(input, weight, out_shape, geometry[-2])


@register_flop_formula(torch.ops.timm_pushpull.push_pull_conv2d_backward)
def _(grad_output: Any, input: Any, weight: Any, c: Any, alpha: Any, geometry: Any, needs_input: Any, **_: Any) -> int:
    # The response again, and a convolution of the same size for each of the gradients.
    return (2 + bool(needs_input)) * conv_flops(input, weight, grad_output, geometry[-2])
