import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope='session')
def shared() -> Path:
    """Folder of reference data that is kept outside the repository."""
    folder = Path(os.environ.get('TIMM_PUSHPULL_SHARED', REPOSITORY.parent / 'shared'))
    if not folder.is_dir():
        pytest.skip('set TIMM_PUSHPULL_SHARED to the folder of shared reference data')
    return folder
