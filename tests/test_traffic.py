"""Bytes counted from the code, against numbers worked out by hand."""

import logging

import pytest
import torch
from traffic import CountBytes, unit_traffic

from timm_pushpull import PushPullConv2d

# pp_resnet18 on 2 images of 32x32: maps in float32.
IMAGES, RESPONSE, SUMS, WEIGHT = 4 * 2 * 3 * 32 * 32, 4 * 2 * 64 * 16 * 16, 4 * 2 * 16 * 16, 4 * 64 * 3 * 7 * 7


def test_operators():
    x = torch.zeros(3, 5)
    for work, expected in (
        (lambda: x + 1, 2 * 60),
        (lambda: x.t()[1:].view(4, 3), 0),
        (lambda: torch.empty_like(x), 0),
        (lambda: x.sum(), 60 + 4),
        (lambda: x.mul_(2), 2 * 60),
        (lambda: x.copy_(torch.ones(5).expand(3, 5)), 20 + 20 + 60),  # ones are written, read, and copied
    ):
        with CountBytes() as count:
            work()
        assert count.total == expected


def for_two_images():
    """Bytes without those of weights alone: of 4 images minus those of 2."""
    few, many = (unit_traffic('pp_resnet18', images, 32, torch.float32) for images in (2, 4))
    return {
        row.implementation: (more.forward - row.forward, more.backward - row.backward)
        for row, more in zip(few, many, strict=True)
    }


def test_floor_plain_and_reference():
    found = for_two_images()
    assert found['floor'] == found['plain'] == (IMAGES + RESPONSE, IMAGES + RESPONSE)
    # Two convolutions write P and Q; average, two rectifications, alpha: read and write; the difference reads two.
    assert found['reference'][0] == 2 * IMAGES + (2 + 2 + 2 * 2 + 2 + 3) * RESPONSE
    floor, plain, *_ = unit_traffic('pp_resnet18', 2, 32, torch.float32)
    assert plain.forward - floor.forward == WEIGHT
    assert plain.backward_passes == pytest.approx(plain.backward / RESPONSE)


def test_kernels():
    pytest.importorskip('triton')
    forward, backward = for_two_images()['triton']
    # The convolution and S read the images; one kernel reads P and S and writes the response.
    assert forward == 2 * IMAGES + 3 * RESPONSE + 2 * SUMS
    # P and S again; the gradient of Q reads two maps and writes one, that of P reads three and writes one; then the
    # convolution. Each block of 32 pixels writes two sums for each channel, which are added up.
    block_sums = 2 * 4 * 2 * 64 * 16 * 16 // 32
    assert backward == 3 * IMAGES + (1 + 3 + 4 + 1) * RESPONSE + 3 * SUMS + 2 * block_sums


def test_autocast_halves_the_maps():
    half, single = (unit_traffic('pp_resnet18', 2, 32, dtype)[0] for dtype in (torch.bfloat16, torch.float32))
    assert half.forward == IMAGES + RESPONSE // 2 and half.backward == (IMAGES + RESPONSE) // 2 < single.backward


@pytest.mark.slow
def test_compiled_for_inference_one_convolution_moves_half_the_bytes_of_the_reference():
    """By the compiler's own count, in maps of the response."""
    from torch._inductor import compile_fx, metrics

    if not hasattr(compile_fx, 'inductor_metrics_log'):
        pytest.skip('this release of PyTorch counts no bytes')
    level = compile_fx.inductor_metrics_log.level
    compile_fx.inductor_metrics_log.setLevel(logging.INFO)  # counts only where it would log
    passes = {}
    try:
        for implementation in ('reference', 'one_convolution'):
            layer = PushPullConv2d(3, 64, 7, 2, 3, bias=False, implementation=implementation)
            images = torch.randn(8, 3, 64, 64).to(memory_format=torch.channels_last)
            torch.compiler.reset()
            metrics.reset()
            with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
                response = torch.compile(layer.to(memory_format=torch.channels_last), fullgraph=True)(images)
            passes[implementation] = metrics.num_bytes_accessed / (4 * response.numel())
    finally:
        compile_fx.inductor_metrics_log.setLevel(level)
    print(passes)
    assert 1 < passes['one_convolution'] < passes['reference'] / 2
