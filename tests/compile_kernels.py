"""Compile the GPU kernels without a GPU, in a process of its own, and print what each needs of the processor.

The kernels are those that the operators launch, on small batches: Triton compiles in the place of a launch.
"""

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget

from timm_pushpull.ops import triton as push_pull_triton

KERNELS = '_sum_windows', '_combine', '_backward_pull', '_backward_push'
# Data types of input, weights and response.
DTYPES = [
    (torch.float32, torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16, torch.float16),
    (torch.float32, torch.float32, torch.bfloat16),  # autocast
    (torch.float32, torch.float32, torch.float16),
]


def main(architecture: int, assembler: str) -> None:
    target = GPUTarget('cuda', architecture, 32)
    triton.runtime.driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: target, get_current_device=lambda: 0, get_current_stream=lambda device: 0
        )
    )
    case, seen = {}, set()
    for name in KERNELS:
        kernel = getattr(push_pull_triton, name)

        def compile_only(*args, grid, warmup, kernel=kernel, launch=kernel.run, **kwargs):
            compiled = launch(*args, grid=grid, warmup=True, **kwargs)
            if compiled.hash not in seen:
                seen.add(compiled.hash)
                resources = dict(shared=compiled.metadata.shared, **assemble(compiled.asm['ptx'], assembler))
                print(json.dumps(dict(kernel=kernel.__name__, **case, **resources)), flush=True)
            return compiled

        kernel.run = compile_only
    # As on a GPU: autocast convolves in half precision.
    push_pull_triton.conv_dtype = lambda weight, dtype: (
        dtype if dtype.itemsize < weight.dtype.itemsize else torch.promote_types(weight.dtype, torch.float32)
    )
    formats = {'nchw': torch.contiguous_format, 'nhwc': torch.channels_last}
    # The map of 75 pixels is not a multiple of 16 long, so Triton assumes less about its addresses.
    for (window, size), dtypes, memory_format in itertools.product(
        [(0, 224), (3, 224), (5, 224), (3, 75)], DTYPES, formats
    ):
        names = (str(dtype).removeprefix('torch.') for dtype in dtypes)
        case.update(zip(('input', 'weight', 'response'), names, strict=True))
        case.update(window=window, memory_format=memory_format, size=size)
        launch_all(window, *dtypes, formats[memory_format], size)


def launch_all(window, input_dtype, weight_dtype, dtype, memory_format, size) -> None:
    x = torch.zeros(1, 3, size, size, dtype=input_dtype).to(memory_format=memory_format)
    weight = torch.zeros(64, 3, 7, 7, dtype=weight_dtype)
    c, alpha = torch.zeros(64, dtype=torch.double), torch.zeros(64)
    geometry = [2, 2, 3, 3, 1, 1, 1, max(window, 1)]
    response = push_pull_triton.push_pull(x, weight, c, alpha, geometry, dtype)
    push_pull_triton.push_pull_backward(response, x, weight, c, alpha, geometry, True)


def assemble(code: str, assembler: str) -> dict[str, int]:
    """Return the registers of a thread, and the bytes that the assembler moves from registers to memory and back."""
    target = re.search(r'\.target (\w+)', code)[1]
    with tempfile.NamedTemporaryFile('w', suffix='.ptx') as file:
        file.write(code)
        file.flush()
        command = [assembler, '-v', f'--gpu-name={target}', file.name, '-o', os.devnull]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    spills = re.search(r'(\d+) bytes spill stores, (\d+) bytes spill loads', said)
    return dict(registers=int(re.search(r'Used (\d+) registers', said)[1]), spilled=sum(map(int, spills.groups())))


if __name__ == '__main__':
    main(int(sys.argv[1]), sys.argv[2])
