"""Benchmark of the push-pull networks: time and memory, compared with timm's plain networks and the reference."""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn as nn
from timm.models import create_model, list_models
from torch import Tensor

from ..errors import InputError
from .timing import Comparison, check_device, compare

__all__ = ['bench_networks']

FORMATS = {'nchw': torch.contiguous_format, 'nhwc': torch.channels_last}


def bench_networks(
    networks: Sequence[str] = ('resnet18', 'resnet50'),
    batch_size: int = 16,
    img_size: int = 224,
    rounds: int = 6,
    device: str = 'cpu',
    amp: bool = False,
    torchcompile: bool = False,
    formats: Sequence[str] = ('nchw', 'nhwc'),
) -> Iterator[Comparison]:
    """Compare push-pull networks with timm's plain networks, in inference and training.

    The stem (convolution, BatchNorm, ReLU and max-pool) of the first network is compared alone too.

    Args:
        networks: Names of timm's plain networks; ``pp_`` and the name is the push-pull network.
        batch_size: Images in a batch.
        img_size: Side of the images, in pixels.
        rounds: Number of rounds.
        device: Device of the networks.
        amp: Autocast to bfloat16; False for float32.
        torchcompile: Compile the networks.
        formats: Memory formats, ``'nchw'`` and ``'nhwc'`` (channels_last).

    Yields:
        Comparisons, each as soon as it is measured.

    Raises:
        ValueError: If there is no such network or device, or if a number is not positive.
    """
    for argument, value in (('batch_size', batch_size), ('img_size', img_size), ('rounds', rounds)):
        if value < 1:
            raise InputError(f'{argument} must be at least 1, got {value}.')
    resnets = [name.removeprefix('pp_') for name in list_models(module='pushpull_resnet', exclude_filters='*_cifar')]
    for name in networks:
        if name not in resnets:
            raise InputError(f'networks must be among {", ".join(resnets)}, got {name}.')
    check_device(device)
    images = torch.randn(batch_size, 3, img_size, img_size, device=device)
    for name in networks:
        models: dict[str, Any] = {
            'plain': create_model(name),
            'ours': create_model(f'pp_{name}'),
            'reference': create_model(f'pp_{name}', alpha=0.5),
        }
        models['ours'].conv1.implementation = 'fast'
        models['reference'].conv1.implementation = 'reference'
        parts = {'stem': {version: _Stem(model) for version, model in models.items()}} if name == networks[0] else {}
        for what, modules in {**parts, name: models}.items():
            for memory_format in formats:
                for use in ('inference', 'training'):
                    torch.compiler.reset()  # it compiles the same code for a limited number of networks only
                    calls = {
                        version: _call(module, images, FORMATS[memory_format], use == 'training', amp, torchcompile)
                        for version, module in modules.items()
                    }
                    precision = 'bfloat16' if amp else 'float32'
                    yield compare(calls, device, rounds, what, use, memory_format, precision, torchcompile)


class _Stem(nn.Module):
    """The layers before the first stage of a network."""

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
