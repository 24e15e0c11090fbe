"""The steps after the convolution in compiled code: see ``pushpull_native.cpp``.

A C++ compiler translates it for the processor it runs on, once, where large maps are to be computed. Without a
compiler PyTorch's own operators do the same.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

__all__ = ['NativeSteps', 'memory_format_of', 'native_library', 'sum_under_kernel']

_logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name('pushpull_native.cpp')
OPTIONS = [
    '-O3',
    '-std=c++17',
    '-march=native',
    '-fopenmp',
    '-shared',
    '-fPIC',
    '-fno-math-errno',
    '-fno-trapping-math',
    *(['-mprefer-vector-width=512'] if platform.machine() == 'x86_64' else []),  # compilers prefer half of it
]
FEWEST_VALUES = 1 << 18  # of a response, for which a compiler is called: less is done sooner without


@functools.cache
def native_library(window: int) -> ctypes.CDLL | None:
    """Load the compiled steps, after compiling them where that was not done before.

    They are kept in the folder of PyTorch's extensions (``TORCH_EXTENSIONS_DIR``, or ``torch_extensions`` in the user's
    cache).

    Args:
        window: Side of the averaging window, odd.

    Returns:
        The library, or None where there is no compiler or it fails.
    """
    compiler = os.environ.get('CXX') or shutil.which('g++') or shutil.which('clang++')
    if not compiler:
        return None
    try:
        return ctypes.CDLL(str(_compile(compiler, [*OPTIONS, f'-DREACH={window // 2}'])))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: there is no home
        _logger.info(f'{SOURCE.name} could not be compiled, PyTorch does its work: {error}')
        return None


def _compile(compiler: str, options: Sequence[str]) -> Path:
    source = SOURCE.read_bytes()
    key = hashlib.sha256(repr((source, compiler, options, _processor())).encode()).hexdigest()[:16]
    cache = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'torch_extensions'
    folder = Path(os.environ.get('TORCH_EXTENSIONS_DIR') or cache) / 'timm_pushpull'
    path = folder / f'pushpull_native-{key}.so'
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as unfinished:
            compiled = Path(unfinished) / path.name
            command = [compiler, *options, str(SOURCE), '-o', str(compiled)]
            subprocess.run(command, check=True, capture_output=True, stdin=subprocess.DEVNULL, timeout=120)
            os.replace(compiled, path)
    return path


def _processor() -> str:
    """What decides whether code for one machine runs on another that shares its home."""
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        return platform.platform() + platform.processor()
    return next((line for line in lines if line.startswith(('flags', 'Features'))), platform.machine())


def memory_format_of(maps: Tensor) -> torch.memory_format:
    """Tell the memory format of maps; what could be either is contiguous.

    Args:
        maps: (N, C, H, W).

    Returns:
        ``torch.channels_last`` or ``torch.contiguous_format``.
    """
    channels_last = maps.is_contiguous(memory_format=torch.channels_last) and not maps.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format


def sum_under_kernel(
    library: ctypes.CDLL,
    input: Tensor,
    conv: Sequence[Sequence[int]],
    kernel_size: Sequence[int],
    size: Sequence[int],
) -> Tensor:
    """Compute S, the sum of all channels under the kernel.

    Args:
        library: As :func:`native_library` gives it.
        input: Images or feature maps (N, C, H, W), float32 or bfloat16.
        conv: Stride, padding and dilation, each of rows and columns.
        kernel_size: Of rows and columns.
        size: H' and W'.

    Returns:
        S (N, 1, H', W'), float32.
    """
    input = input.contiguous(memory_format=memory_format_of(input))
    sums = torch.empty(len(input), 1, *size)
    kernel = [*conv[0], *conv[1], *conv[2], *kernel_size]
    half = int(input.dtype == torch.bfloat16)
    _run(library.push_pull_sums, _int64s(input.shape), _channels_last(input), half, input, _int64s(kernel), *size, sums)
    return sums


def _channels_last(maps: Tensor) -> int:
    return int(memory_format_of(maps) == torch.channels_last)


def _int64s(numbers: Sequence[int]) -> ctypes.Array:
    return (ctypes.c_int64 * len(numbers))(*numbers)


def _run(function: Callable[..., object], *arguments: Tensor | int | ctypes.Array | ctypes.Structure) -> None:
    """Call a compiled function, in as many threads as PyTorch takes."""
    pointers = (
        ctypes.c_void_p(value.data_ptr())
        if isinstance(value, Tensor)
        else ctypes.c_int64(value)
        if isinstance(value, int)
        else ctypes.byref(value)
        for value in (*arguments, torch.get_num_threads())
    )
    function(*pointers)


class _Numbers(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ('images', 'channels', 'height', 'width')),
        *((name, ctypes.c_void_p) for name in ('sums', 'averages', 'shares', 'mean', 'c_less_mean', 'alpha')),
    ]


class NativeSteps:
    """The compiled steps on the pieces of a batch.

    Args:
        library: As :func:`native_library` gives it.
        sums: S (N, 1, H', W'), float32, as all that follow.
        averages: The average of S over the window, of the same shape.
        shares: One over the number of values in the window (1, 1, H', W').
        mean: What was taken from each push kernel (O,).
        c_less_mean: Its maximum and minimum added, less that (O,).
        alpha: Inhibition strength (O,).
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        sums: Tensor,
        averages: Tensor,
        shares: Tensor,
        mean: Tensor,
        c_less_mean: Tensor,
        alpha: Tensor,
    ) -> None:
        self.library = library
        self.by_image = sums.contiguous(), averages.contiguous()
        self.others = [numbers.contiguous() for numbers in (shares, mean, c_less_mean, alpha)]

    def respond(self, images: slice, push: Tensor, output: Tensor) -> None:
        """Compute R.

        Args:
            images: Which of the batch they are.
            push: Response of the push kernels less the mean, dense in channels_last or contiguous; float32 or bfloat16.
            output: Memory for R, in the same memory format; float32, or bfloat16, which it must be where ``push`` is.
        """
        self._call('push_pull', images, push, _channels_last(push), *_halves(push, output), push, output)

    def respond_pooled(
        self, images: slice, push: Tensor, scale: Tensor, shift: Tensor, pool: Sequence[int], output: Tensor
    ) -> None:
        """Compute R times scale plus shift, its max-pool and ReLU.

        Args:
            images: As for :meth:`respond`.
            push: As for :meth:`respond`, in channels_last.
            scale: Of each channel (O,), float32.
            shift: Of each channel (O,), float32.
            pool: Side of the pooled window, stride and padding.
            output: Memory for the result (N, O, H'', W''), in channels_last.
        """
        sizes = _int64s([*pool, *output.shape[2:]])
        self._call('push_pull_pooled', images, push, *_halves(push, output), push, scale, shift, sizes, output)

    def differentiate(
        self, images: slice, push: Tensor, gradient: Tensor, of_push: Tensor, of_alpha: Tensor, of_c: Tensor
    ) -> None:
        """Compute the gradient of ``push``, and add to those of alpha and c.

        Args:
            images: As for :meth:`respond`.
            push: As for :meth:`respond`.
            gradient: Of R, in the same memory format; float32, or bfloat16, which it must be where ``push`` is.
            of_push: Memory for the gradient, of the data type and in the memory format of ``push``.
            of_alpha: The gradient of -alpha is added to it (O,), float64.
            of_c: The gradient of -c over alpha is added to it (O,), float64.
        """
        tensors = push, gradient, of_push, of_alpha, of_c
        self._call('push_pull_backward', images, push, _channels_last(push), *_halves(push, gradient), *tensors)

    def _call(self, function: str, images: slice, push: Tensor, *arguments: Tensor | int | ctypes.Array) -> None:
        tensors = [*(numbers[images] for numbers in self.by_image), *self.others]
        numbers = _Numbers(*push.shape, *(tensor.data_ptr() for tensor in tensors))
        _run(getattr(self.library, function), numbers, *arguments)


def _halves(push: Tensor, result: Tensor) -> tuple[int, int]:
    return int(push.dtype == torch.bfloat16), int(result.dtype == torch.bfloat16)
