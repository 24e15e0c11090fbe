import os
import tempfile
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')  # one thread for each process of pytest-xdist

import pytest
import torch
from hub_server import Hub

REPOSITORY = Path(__file__).parent.parent
# Settings of a ResNet of a hundredth of its size, behind the same stem; lists, as YAML and JSON give them back.
SMALL = {'layers': [1, 1, 1, 1], 'channels': [8, 8, 8, 8]}

# huggingface_hub reads its address and its cache when it is imported: no test may reach the real Hub, and the random
# weights of a test may not come into the cache of the user.
HUB = Hub()
CACHE = tempfile.TemporaryDirectory()
os.environ |= {'HF_ENDPOINT': HUB.url, 'HF_HOME': CACHE.name}
os.environ |= {'HF_HUB_DISABLE_XET': '1', 'HF_HUB_DISABLE_TELEMETRY': '1'}

if not torch.cuda.is_available():  # Triton reads it where a kernel is defined
    os.environ['TRITON_INTERPRET'] = '1'


@pytest.fixture(autouse=True)
def seed() -> None:
    """Draw the same numbers in every run: a test that fails can be repeated."""
    torch.manual_seed(0)


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Hub:
    """A Hub on loopback without repositories, whose client has an empty cache and no token."""
    from huggingface_hub import constants

    HUB.reset()
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'cache'))
    monkeypatch.delenv('HF_TOKEN', raising=False)
    return HUB


@pytest.fixture(scope='session')
def shared() -> Path:
    """Folder of reference data that is kept outside the repository."""
    folder = Path(os.environ.get('TIMM_PUSHPULL_SHARED', REPOSITORY.parent / 'shared'))
    if not folder.is_dir():
        pytest.skip('set TIMM_PUSHPULL_SHARED to the folder of shared reference data')
    return folder


@pytest.fixture
def undrawn(monkeypatch) -> None:
    """Reports whose plots are made but not drawn: the pixels take most of the time of a page."""
    monkeypatch.setattr('timm_pushpull.robustness.report.to_png', lambda figure: b'')


def save_plain(name: str, folder: Path) -> None:
    """Save a plain network of timm as a repository on the Hub has it, with random weights and statistics."""
    import timm
    from timm.models import save_for_hf

    model = timm.create_model(name)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    save_for_hf(model, str(folder), safe_serialization=True)
