"""Bytes that a network's push-pull unit moves through memory, counted from the code, without running it.

Memory, not arithmetic, limits the unit on a GPU. Bytes over the bandwidth of a card give the least time.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from timm.models import create_model
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from timm_pushpull.ops.one_convolution import one_convolution

__all__ = ['CountBytes', 'Traffic', 'unit_traffic']

ALLOCATIONS = {'empty', 'empty_like', 'empty_strided', 'new_empty', 'new_empty_strided'}
OVERWRITES = {'copy_', 'fill_', 'zero_'}
KERNELS = ('_sum_windows', '_combine', '_backward_pull', '_backward_push')


class Traffic(NamedTuple):
    """Bytes that one implementation of the unit moves for one batch."""

    implementation: str
    """``'floor'``, ``'plain'`` (the convolution of the plain network), or one of the unit's."""
    forward: int
    backward: int
    forward_passes: float
    """Bytes of the forward pass over those of the response."""
    backward_passes: float


def unit_traffic(
    network: str = 'pp_resnet50', batch_size: int = 256, img_size: int = 224, dtype: torch.dtype = torch.bfloat16
) -> list[Traffic]:
    """Count the bytes of the first layer in training: eager, channels_last, for images that need no gradient.

    The floor reads the images and writes the response; backward it reads the gradient of the response, and the images
    in the data type of the response.

    Args:
        network: Name of a push-pull network.
        batch_size: Images in a batch.
        img_size: Side of the images, in pixels.
        dtype: Data type of the response: torch.float32, or that of autocast.

    Returns:
        The floor, the plain convolution, and the implementations for a GPU; without Triton not its kernels.
    """
    found: list[Traffic] = []
    with FakeTensorMode():  # no memory, no arithmetic
        images = torch.empty(batch_size, 3, img_size, img_size).to(memory_format=torch.channels_last)
        for name in ('plain', 'reference', 'one_convolution', 'triton'):
            layer: Any = create_model(network.removeprefix('pp_') if name == 'plain' else network).conv1
            try:
                forward, backward, response = _count(name, layer, images, dtype)
            except ImportError:
                continue
            if not found:
                floors = _bytes(images) + response, _bytes(images.to(dtype)) + response
                found.append(Traffic('floor', *floors, *(floor / response for floor in floors)))
            found.append(Traffic(name, forward, backward, forward / response, backward / response))
    return found


def _count(name: str, layer: Any, images: Tensor, dtype: torch.dtype) -> tuple[int, int, int]:
    """Return the bytes of the forward and of the backward pass, and those of the response."""
    on_gpu = mock.patch(f'timm_pushpull.ops.{name}.conv_dtype', lambda weight, result_dtype: result_dtype)
    with CountBytes() as count:
        if name in ('plain', 'reference'):
            layer.implementation = name
            with torch.autocast('cpu', dtype, enabled=dtype != torch.float32):
                output = layer(images)
        else:
            operands: tuple[Tensor, Tensor, Tensor, Tensor, list[int]] = layer.operands(images)[:-1]
            if name == 'one_convolution':
                with on_gpu:
                    output = one_convolution(*operands, dtype)
            else:
                from timm_pushpull.ops import triton

                with on_gpu, count.kernels_of(triton):
                    output = triton.push_pull(*operands, dtype)
        forward = count.total
        gradient = torch.empty_like(output)
        if name == 'triton':
            with on_gpu, count.kernels_of(triton):
                triton.push_pull_backward(gradient, *operands, False)
        else:
            torch.autograd.grad(output, list(layer.parameters()), gradient)
    assert output.dtype == dtype
    return forward, count.total - forward, _bytes(output)


class CountBytes(TorchDispatchMode):
    """Sum the bytes that operators read and write: each operand once, each result once, a view nothing.

    Attributes:
        total: Bytes so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.split('::')[1]
        is_view = any(out.alias_info is not None and not out.alias_info.is_write for out in func._schema.returns)
        if func.namespace == 'aten' and name not in ALLOCATIONS and not is_view:
            self.total += _bytes(args[1:] if name in OVERWRITES else args) + _bytes(result)
        return result

    @contextlib.contextmanager
    def kernels_of(self, module: Any) -> Iterator[None]:
        """Count the operands of a module's Triton kernels in place of launching them."""

        def count(*operands: Any, **constants: Any) -> None:
            self.total += _bytes(operands)

        launcher = mock.MagicMock()
        launcher.__getitem__.return_value = count
        with mock.patch.multiple(module, **dict.fromkeys(KERNELS, launcher)):
            yield


def _bytes(values: Any) -> int:
    """Add up the tensors among values; an element that an expanded tensor repeats counts once."""
    return sum(
        math.prod(size for size, stride in zip(x.shape, x.stride(), strict=True) if stride) * x.element_size()
        for x in tree_leaves(values)
        if isinstance(x, Tensor)
    )
