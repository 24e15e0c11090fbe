"""The demo: trains a push-pull ResNet and its plain baseline on small handwritten digits, and measures both."""

import importlib.util
import io
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from PIL import Image
from safetensors.torch import load_file, save
from timm.data import create_dataset, create_loader, resolve_model_data_config
from timm.models import create_model
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from tqdm import tqdm

from .errors import MissingExtraError
from .files import atomic_write
from .robustness.evaluate import evaluate_robustness
from .robustness.report import write_report

__all__ = ['DemoResult', 'run_demo']

SEED = 0
TEST_EVERY = 5  # every fifth digit is for testing
NETWORKS = {'plain resnet18': False, 'pp_resnet18': True}  # push_pull
BASELINE = 'plain resnet18'
NOTE = (
    "scikit-learn's handwritten digits at 32x32: 1,437 for training, 120 for testing. One seed on small digits shows "
    'that everything works, not which network is better.'
)
DIGITS = dict(
    input_size=(3, 32, 32),
    test_input_size=None,
    mean=(0.5,) * 3,
    std=(0.5,) * 3,
    crop_pct=1.0,
    test_crop_pct=None,
    interpolation='bilinear',
)


class DemoResult(NamedTuple):
    """Results of the demo."""

    rows: list[dict[str, Any]]
    """Measures of both networks, see :func:`timm_pushpull.robustness.summary.summarize`."""
    results: Path
    """Results folder."""
    report: Path
    """Page with tables and plots."""


def run_demo(folder: str | os.PathLike[str], epochs: int = 8, test_digits: int = 120) -> DemoResult:
    """Train ``pp_resnet18`` with and without push-pull on scikit-learn's digits, and test both under 15 corruptions.

    Both networks have the same recipe, seed and images. Steps that the folder already holds are not repeated.

    Args:
        folder: Folder of digits, weights, results and report, made if it does not exist.
        epochs: Passes over the 1,437 training digits.
        test_digits: Number of test digits, spread over the classes; at most 360.

    Returns:
        Measures of both networks, the results folder and the report.

    Raises:
        ModuleNotFoundError: If scikit-learn, imagecorruptions-imaug or matplotlib is not installed.
    """
    for extra in ('sklearn', 'imagecorruptions', 'matplotlib'):
        if importlib.util.find_spec(extra) is None:
            packages = 'scikit-learn imagecorruptions-imaug matplotlib scipy'
            raise MissingExtraError(f'The demo needs {extra}: pip install {packages}', name=extra)
    folder = Path(folder)
    threads = torch.get_num_threads()
    # The threads of an operation wait for the slowest of them: on a busy machine each operation would wait until all
    # its threads have had a core. A process with one thread waits for nobody.
    torch.set_num_threads(1)
    try:
        return _run_demo(folder, epochs, test_digits)
    finally:
        torch.set_num_threads(threads)


def _run_demo(folder: Path, epochs: int, test_digits: int) -> DemoResult:
    _write_digits(folder / 'digits')
    models = {}
    for name, push_pull in NETWORKS.items():
        torch.manual_seed(SEED)
        models[name] = create_model('pp_resnet18', num_classes=10, push_pull=push_pull, pretrained_cfg_overlay=DIGITS)
        weights = folder / f'{name.replace(" ", "_")}.safetensors'
        if weights.exists():
            models[name].load_state_dict(load_file(weights))
        else:
            _train(models[name], name, folder / 'digits', epochs)
            atomic_write(weights, save(models[name].state_dict()))
    results = folder / 'results'
    rows = evaluate_robustness(
        models,
        results,
        create_dataset('', root=str(folder / 'digits'), split='test'),
        limit=test_digits,
        baseline=BASELINE,
        workers=2,
        progress=True,
    )
    return DemoResult(rows, results, write_report([results], folder / 'report', note=NOTE))


def _write_digits(folder: Path) -> None:
    """Write the digits as image files, in a folder for each split and class."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    for index, (pixels, digit) in enumerate(zip(digits.images, digits.target, strict=True)):
        path = folder / ('train' if index % TEST_EVERY else 'test') / str(digit) / f'{index}.png'
        if not path.exists():
            content = io.BytesIO()
            image = Image.fromarray((pixels * (255 / 16)).astype('uint8'))
            image.resize((32, 32), Image.Resampling.BILINEAR).save(content, 'png')
            atomic_write(path, content.getvalue())


def _train(model: nn.Module, name: str, digits: Path, epochs: int) -> None:
    loader = create_loader(
        create_dataset('', root=str(digits), split='train', is_training=True),
        **resolve_model_data_config(model),
        batch_size=64,
        is_training=True,
        scale=(0.7, 1.0),
        hflip=0.0,
        color_jitter=0.2,
        num_workers=0,
        use_prefetcher=False,
        persistent_workers=False,
    )
    optimizer = create_optimizer_v2(model, opt='sgd', lr=0.1, momentum=0.9, weight_decay=1e-4)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched='cosine',
        num_epochs=epochs,
        warmup_epochs=1,
        warmup_lr=1e-3,
        step_on_epochs=False,
        updates_per_epoch=len(loader),
    )
    with tqdm(total=epochs * len(loader), desc=f'training {name}', unit='batch') as progress:
        model.train()
        for _ in range(epochs):
            for images, targets in loader:
                scheduler.step_update(progress.n)
                loss = nn.functional.cross_entropy(model(images), targets)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                progress.update()
                progress.set_postfix(loss=f'{loss.item():.3f}', refresh=False)
