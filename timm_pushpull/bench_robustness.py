"""Benchmark of the evaluation: ratios of times measured in one run, alternately, in one process."""

import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn as nn
from PIL import Image
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.models import create_model
from timm.utils import accuracy
from tqdm import tqdm

from .pictures import open_stored
from .robustness import evaluate_robustness

__all__ = ['Ratio', 'bench_robustness']

CLASSES = 10
SMALL = 'test_resnet'
SLOW_CORRUPTIONS = ('glass_blur', 'zoom_blur', 'frost', 'elastic_transform')


class Ratio(NamedTuple):
    """Times of two ways to do the same, in seconds, and their ratio: the median and the range of the rounds."""

    name: str
    seconds: float
    reference_seconds: float
    median: float
    low: float
    high: float

    def in_words(self) -> str:
        return (
            f'{self.name}: {self.median:.2f} (from {self.low:.2f} to {self.high:.2f}; '
            f'medians {self.seconds:.2f} s over {self.reference_seconds:.2f} s)'
        )


def bench_robustness(
    model: str = 'resnet18',
    images: int = 256,
    rounds: int = 5,
    batch_size: int = 64,
    workers: int = 2,
    device: str = 'cpu',
) -> list[Ratio]:
    """Compare the evaluation with timm's ``validate.py``, and one run of two models with two runs.

    - Stored pictures: the time of a whole call, from opening the folder to the summary, over that of what
      ``validate.py`` does after it has built its model, on the same JPEG files.
    - Generated corruptions, of the kinds that cost most: the time of one run of two small models over that of two.

    Args:
        model: Name of a timm model; its weights are not loaded.
        images: Pictures of the first comparison, at least 80; the second takes an eighth of them.
        rounds: Alternations.
        batch_size: Pictures at a time.
        workers: Loader processes.
        device: Where the models run.

    Returns:
        The two ratios.

    Raises:
        ModuleNotFoundError: If imagecorruptions-imaug is not installed.
    """
    network = create_model(model, num_classes=CLASSES).to(device).eval()
    # Small ones, so that the corruptions take most of the time.
    small = {name: create_model(SMALL, num_classes=CLASSES).to(device).eval() for name in ('one', 'other')}
    config = resolve_data_config({}, model=network)
    run: dict[str, Any] = dict(batch_size=batch_size, workers=workers, device=device)
    with tempfile.TemporaryDirectory() as name, tqdm(total=5 * rounds, desc='bench') as progress:
        root = Path(name)
        stored = root / 'stored'
        for folder, count in ((stored / 'fog' / '1', images), (root / 'clean', max(1, images // 8))):
            _write_pictures(folder, count, config['input_size'][-1])

        def evaluate_stored() -> None:
            pictures = open_stored(stored, ['fog'], [1])
            with tempfile.TemporaryDirectory() as results:
                evaluate_robustness(
                    {'one': network}, results, stored=pictures, corruptions=['fog'], severities=[1], **run
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
                times.setdefault(key, []).append(_seconds(work))
                progress.update()
    apart = [one + other for one, other in zip(times['one'], times['other'], strict=True)]
    return [
        _ratio(f'stored pictures, {model}: timm-pushpull over validate.py', times['stored'], times['validate']),
        _ratio(f'generated corruptions, 2 x {SMALL}: one run over two runs', times['both'], apart),
    ]


def _write_pictures(folder: Path, count: int, size: int) -> None:
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


def _seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _ratio(name: str, seconds: list[float], reference: list[float]) -> Ratio:
    ratios = np.divide(seconds, reference)
    return Ratio(
        name,
        float(np.median(seconds)),
        float(np.median(reference)),
        float(np.median(ratios)),
        float(ratios.min()),
        float(ratios.max()),
    )
