"""Benchmark of the push-pull networks: time and memory beside timm's networks and the published formulation."""

import copy
import csv
import io
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn as nn
from timm.models import create_model
from torch import Tensor
from tqdm import tqdm

from .bench import peak_bytes, seconds
from .files import write_whole

__all__ = ['Comparison', 'bench_networks', 'write_comparisons']

FORMATS = {'nchw': torch.contiguous_format, 'nhwc': torch.channels_last}


class Comparison(NamedTuple):
    """One network in one use: medians over the rounds of ratios within a round, and their range."""

    what: str
    use: str
    """``'inference'``, or ``'training'``: forward and backward."""
    memory_format: str
    precision: str
    compiled: bool
    plain_seconds: float
    """Median time of timm's plain network."""
    time: float
    """Time over that of the plain network."""
    time_low: float
    time_high: float
    reference_time: float
    """Time with the published formulation of the unit, two convolutions, over that of the plain network."""
    reference_time_low: float
    reference_time_high: float
    memory: float
    """Peak memory over that of the plain network."""
    reference_memory: float


def bench_networks(
    networks: Sequence[str] = ('resnet18', 'resnet50'),
    batch_size: int = 16,
    img_size: int = 224,
    rounds: int = 5,
    device: str = 'cpu',
    amp: bool = False,
    torchcompile: bool = False,
) -> Iterator[Comparison]:
    """Compare push-pull networks with timm's, in both memory formats, inference and training.

    The stem is compared alone too: convolution, BatchNorm, ReLU and max-pool.

    Args:
        networks: Names of timm's plain networks, whose push-pull ones are called ``pp_...``.
        batch_size: Images at a time.
        img_size: Their side, in pixels.
        rounds: Alternations.
        device: Where the networks run.
        amp: In bfloat16 by autocast, instead of float32.
        torchcompile: Compiled, instead of eager.

    Yields:
        One comparison after the other.

    Raises:
        ValueError: If a number is not positive.
    """
    for argument, value in (('batch_size', batch_size), ('img_size', img_size), ('rounds', rounds)):
        if value < 1:
            raise ValueError(f'{argument} must be at least 1, got {value}.')
    images = torch.randn(batch_size, 3, img_size, img_size, device=device)
    for name in networks:
        models: dict[str, Any] = {
            'plain': create_model(name),
            'ours': create_model(f'pp_{name}'),
            'reference': create_model(f'pp_{name}', alpha=0.5),
        }
        models['reference'].conv1.implementation = 'reference'
        parts = {'stem': {way: _Stem(model) for way, model in models.items()}} if name == networks[0] else {}
        for what, modules in {**parts, name: models}.items():
            for memory_format in FORMATS:
                for use in ('inference', 'training'):
                    torch.compiler.reset()  # it compiles one piece of code for a limited number of networks only
                    calls = {
                        way: _call(module, images, FORMATS[memory_format], use == 'training', amp, torchcompile)
                        for way, module in modules.items()
                    }
                    label = f'{what} {memory_format} {use}'
                    found = _compare(calls, images.device, rounds, label)
                    yield Comparison(what, use, memory_format, 'bfloat16' if amp else 'float32', torchcompile, *found)


def write_comparisons(path: str | os.PathLike[str], comparisons: Sequence[Comparison]) -> None:
    """Write comparisons as CSV.

    Args:
        path: The file.
        comparisons: One a line.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator='\n')
    writer.writerow(Comparison._fields)
    writer.writerows([f'{value:.4f}' if isinstance(value, float) else value for value in row] for row in comparisons)
    write_whole(path, text.getvalue().encode())


class _Stem(nn.Module):
    """What comes before the first stage of a network, alone."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = copy.deepcopy(model)
        for stage in ('layer1', 'layer2', 'layer3', 'layer4', 'fc'):
            setattr(self.model, stage, nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        return self.model.forward_features(x)


def _call(
    module: nn.Module, images: Tensor, memory_format: torch.memory_format, training: bool, amp: bool, torchcompile: bool
) -> Callable[[], None]:
    layout: Any = dict(memory_format=memory_format)
    module = copy.deepcopy(module).to(images.device).to(**layout).train(training)
    images = images.to(memory_format=memory_format)
    network: Any = torch.compile(module, fullgraph=True) if torchcompile else module

    def infer() -> None:
        with torch.inference_mode(), torch.autocast(images.device.type, torch.bfloat16, enabled=amp):
            network(images)

    def train() -> None:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=amp):
            output = network(images)
        output.backward(torch.ones_like(output))
        module.zero_grad()

    return train if training else infer


def _compare(calls: dict[str, Callable[[], None]], device: torch.device, rounds: int, label: str) -> list[float]:
    memory = {way: peak_bytes(call, device) for way, call in calls.items()}  # the first calls: they warm up as well
    times: dict[str, list[float]] = {way: [] for way in calls}
    for _ in tqdm(range(rounds), desc=label, leave=False):
        for way, call in calls.items():
            times[way].append(seconds(call, device))
    found = [float(np.median(times['plain']))]
    for way in ('ours', 'reference'):
        ratios = np.divide(times[way], times['plain'])
        found += [float(np.median(ratios)), float(ratios.min()), float(ratios.max())]
    return [*found, memory['ours'] / memory['plain'], memory['reference'] / memory['plain']]
