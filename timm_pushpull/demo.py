"""Trains a push-pull ResNet and its plain baseline on small handwritten digits, clean and noisy at the test."""

import importlib.util
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
from timm.data import create_dataset, create_loader
from timm.models import create_model
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch.utils.data import DataLoader

__all__ = ['DemoResult', 'run_demo']

SEED = 0
TEST_SHARE = 5  # every fifth digit
NOISE_STDS = (0.0, 0.2, 0.4)
MEAN_AND_STD = (0.5, 0.5, 0.5)  # of each channel: black is -1, white is 1


class DemoResult(NamedTuple):
    """Top-1 accuracy, in percent, of one network."""

    network: str
    accuracy: dict[float, float]
    """By the standard deviation of the Gaussian noise, on pixel values in [0, 1]."""


def run_demo(epochs: int = 10) -> list[DemoResult]:
    """Train ``pp_resnet18`` with and without push-pull on scikit-learn's digits, at equal recipe and seed.

    Args:
        epochs: Passes over the 1,437 training digits.

    Returns:
        The baseline's result and that of the push-pull network, on the 360 digits left for the test.

    Raises:
        ModuleNotFoundError: If scikit-learn or tqdm is not installed.
    """
    for extra in ('sklearn', 'tqdm'):
        if importlib.util.find_spec(extra) is None:
            raise ModuleNotFoundError(f"The demo needs {extra}: pip install 'timm-pushpull[demo]'", name=extra)
    with tempfile.TemporaryDirectory() as folder:
        _write_digits(Path(folder))
        return [
            _train_and_test(folder, network, push_pull, epochs)
            for network, push_pull in (('plain resnet18', False), ('pp_resnet18', True))
        ]


def _write_digits(folder: Path) -> None:
    """Write the digits as pictures by split and class, the layout that timm's datasets read."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    for index, (pixels, digit) in enumerate(zip(digits.images, digits.target, strict=True)):
        split = 'train' if index % TEST_SHARE else 'test'
        path = folder / split / str(digit) / f'{index}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * (255 / 16)).astype('uint8')).resize((32, 32), Image.Resampling.BILINEAR).save(path)


def _loader(folder: str, split: str) -> DataLoader:
    dataset = create_dataset('', root=folder, split=split, is_training=split == 'train')
    return create_loader(
        dataset,
        input_size=(3, 32, 32),
        batch_size=64,
        is_training=split == 'train',
        scale=(0.7, 1.0),
        hflip=0.0,
        color_jitter=0.2,
        interpolation='bilinear',
        mean=MEAN_AND_STD,
        std=MEAN_AND_STD,
        crop_pct=1.0,
        num_workers=0,
        use_prefetcher=False,
        persistent_workers=False,
    )


def _train_and_test(folder: str, network: str, push_pull: bool, epochs: int) -> DemoResult:
    from tqdm import tqdm

    torch.manual_seed(SEED)
    model = create_model('pp_resnet18', num_classes=10, push_pull=push_pull)
    train_loader = _loader(folder, 'train')
    optimizer = create_optimizer_v2(model, opt='sgd', lr=0.1, momentum=0.9, weight_decay=1e-4)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched='cosine',
        num_epochs=epochs,
        warmup_epochs=1,
        warmup_lr=1e-3,
        step_on_epochs=False,
        updates_per_epoch=len(train_loader),
    )
    with tqdm(total=epochs * len(train_loader), desc=f'training {network}', unit='batch') as progress:
        model.train()
        for _ in range(epochs):
            for images, targets in train_loader:
                scheduler.step_update(progress.n)
                loss = nn.functional.cross_entropy(model(images), targets)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                progress.update()
                progress.set_postfix(loss=f'{loss.item():.3f}', refresh=False)
    return DemoResult(network, {std: _accuracy(model, _loader(folder, 'test'), std) for std in NOISE_STDS})


@torch.inference_mode()
def _accuracy(model: nn.Module, loader: DataLoader, noise_std: float) -> float:
    """Percentage of right answers; the noise is the same for each network."""
    model.eval()
    generator = torch.Generator().manual_seed(SEED)
    right = total = 0
    for images, targets in loader:
        noise = torch.randn(images.shape, generator=generator) * noise_std / MEAN_AND_STD[0]
        noisy = (images + noise).clamp(-1, 1)
        right += int((model(noisy).argmax(1) == targets).sum())
        total += len(targets)
    return 100 * right / total
