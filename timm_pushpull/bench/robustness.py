"""Benchmark of the evaluation: ratios of times, measured in turns in one process."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from PIL import Image
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.models import create_model
from timm.utils import accuracy
from tqdm import tqdm

from ..errors import InputError
from ..robustness.data import open_stored
from ..robustness.evaluate import evaluate_robustness
from .timing import Ratio, check_device, seconds

__all__ = ['bench_robustness']

CLASSES = 10
SMALL = 'test_resnet'
SLOW_CORRUPTIONS = ('glass_blur', 'zoom_blur', 'frost', 'elastic_transform')


def bench_robustness(
    model: str = 'resnet18',
    images: int = 256,
    rounds: int = 5,
    batch_size: int = 64,
    workers: int = 2,
    device: str = 'cpu',
) -> list[Ratio]:
    """Compare the evaluation with timm's ``validate.py``, and one run of two models with two runs.

    - Stored corruptions: the time from opening the folder to the summary, over the time of ``validate.py`` after it
      has built its model, on the same JPEG files.
    - Generated corruptions, the slowest four: the time of one run of two small models over that of two runs.

    Args:
        model: Name of a timm model; its weights are random.
        images: Images of the first comparison, at least 80; the second has an eighth of them.
        rounds: Number of rounds.
        batch_size: Images in a batch.
        workers: Processes that load images.
        device: Device of the models.

    Returns:
        The two ratios.

    Raises:
        ModuleNotFoundError: If imagecorruptions-imaug is not installed.
        ValueError: If there are too few images for one of each class in both comparisons, or no such device.
    """
    if images < 8 * CLASSES:
        raise InputError(f'images must be at least {8 * CLASSES}, got {images}.')
    check_device(device)
    network = create_model(model, num_classes=CLASSES).to(device).eval()
    # Small models, so that the corruptions take most of the time.
    small = {name: create_model(SMALL, num_classes=CLASSES).to(device).eval() for name in ('one', 'other')}
    config = resolve_data_config({}, model=network)
    run: dict[str, Any] = dict(batch_size=batch_size, workers=workers, device=device)
    with tempfile.TemporaryDirectory() as name, tqdm(total=5 * rounds, desc='bench') as progress:
        root = Path(name)
        stored = root / 'stored'
        for folder, count in ((stored / 'fog' / '1', images), (root / 'clean', images // 8)):
            _write_images(folder, count, config['input_size'][-1])

        def evaluate_stored() -> None:
            images = open_stored(stored, ['fog'], [1])
            with tempfile.TemporaryDirectory() as results:
                evaluate_robustness(
                    {'one': network}, results, stored=images, corruptions=['fog'], severities=[1], **run
                )

        def validate() -> None:
            dataset = create_dataset('', root=str(stored / 'fog' / '1'), search_split=False)
            _validate(network, dataset, config, **run)

        def evaluate_generated(*names: str) -> None:
            dataset = create_dataset('', root=str(root / 'clean'), search_split=False)
            some = {name: small[name] for name in names}
            with tempfile.TemporaryDirectory() as results:
                evaluate_robustness(some, results, dataset, corruptions=SLOW_CORRUPTIONS, severities=[3], **run)

        evaluate_generated('one')  # the first run imports and compiles
        times: dict[str, list[float]] = {}
        for _ in range(rounds):
            for key, work in {
                'stored': evaluate_stored,
                'validate': validate,
                'both': lambda: evaluate_generated('one', 'other'),
                'one': lambda: evaluate_generated('one'),
                'other': lambda: evaluate_generated('other'),
            }.items():
                times.setdefault(key, []).append(seconds(work, device))
                progress.update()
    apart = [one + other for one, other in zip(times['one'], times['other'], strict=True)]
    return [
        Ratio.of(f'stored corruptions, {model}: timm-pushpull over validate.py', times['stored'], times['validate']),
        Ratio.of(f'generated corruptions, 2 x {SMALL}: one run over two runs', times['both'], apart),
    ]


def _write_images(folder: Path, count: int, size: int) -> None:
    """JPEG files with structure at all scales, which decode at the speed of photographs."""
    generator = np.random.default_rng(0)
    for index in range(count):
        pixels = np.zeros((size, size, 3))
        for scale in (4, 16, 64, size):
            coarse = Image.fromarray(generator.integers(256, size=(scale, scale, 3), dtype=np.uint8))
            pixels += np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), float) / 4
        path = folder / str(index % CLASSES) / f'{index}.jpg'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(path, quality=85)


@torch.inference_mode()
def _validate(
    model: nn.Module, dataset: Any, config: Mapping[str, Any], batch_size: int, workers: int, device: str
) -> None:
    """The loop of ``validate.py``."""
    loader = create_loader(
        dataset,
        input_size=config['input_size'],
        batch_size=batch_size,
        interpolation=config['interpolation'],
        mean=config['mean'],
        std=config['std'],
        num_workers=workers,
        crop_pct=1.0,
        crop_mode=config['crop_mode'],
        device=torch.device(device),
    )
    for images, targets in loader:
        output = model(images)
        nn.functional.cross_entropy(output, targets).item()
        [value.item() for value in accuracy(output, targets, topk=(1, 5))]
