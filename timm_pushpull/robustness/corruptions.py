"""The 15 test corruptions and the 4 held-out ones, generated so that every draw can be made again.

The pictures come from imagecorruptions-imaug, which packages the code of ImageNet-C (https://arxiv.org/abs/1903.12261).
It draws from NumPy's global generator, and two of its corruptions from generators of their own.
"""

import contextlib
import difflib
import inspect
import zlib
from collections.abc import Iterator
from types import ModuleType

import numpy as np
from PIL import Image

from .metrics import HELD_OUT_CORRUPTIONS, TEST_CORRUPTIONS

__all__ = ['SEVERITIES', 'check_corruption', 'corrupt', 'import_imagecorruptions']

SEVERITIES = (1, 2, 3, 4, 5)


def check_corruption(corruption: str, severity: int) -> None:
    """Refuse a corruption or a severity that does not exist.

    Args:
        corruption: Name of a test corruption or of a held-out one.
        severity: From 1 to 5.

    Raises:
        ValueError: If it does not exist; the nearest name is given.
    """
    names = (*TEST_CORRUPTIONS, *HELD_OUT_CORRUPTIONS)
    if corruption not in names:
        near = difflib.get_close_matches(corruption, names, n=1, cutoff=0)[0]
        raise ValueError(f'corruption must be one of {", ".join(names)}, got {corruption!r}; the nearest is {near!r}.')
    if severity not in SEVERITIES:
        raise ValueError(f'severity must be an integer from 1 to 5, got {severity}.')


def corrupt(image: Image.Image, corruption: str, severity: int, index: int, seed: int = 0) -> Image.Image:
    """Corrupt a picture as ImageNet-C does, with a draw that its place in the dataset decides.

    The same arguments give the same picture, in any process and after any other draw.

    Args:
        image: Picture, converted to RGB; at least 32 pixels on each side.
        corruption: Name of a test corruption or of a held-out one.
        severity: Strength, from 1 to 5.
        index: Place of the picture in its dataset, from 0.
        seed: Number of the whole draw.

    Returns:
        RGB picture of the same size.

    Raises:
        ModuleNotFoundError: If imagecorruptions-imaug is not installed.
        ValueError: If the corruption or the severity does not exist, or if the picture is too small.
    """
    check_corruption(corruption, severity)
    if min(image.size) < 32:
        raise ValueError(f'image must be at least 32 pixels on each side, got {image.width}x{image.height}.')
    transform = getattr(import_imagecorruptions(), corruption)
    entropy = [seed, zlib.crc32(corruption.encode()), severity, index]
    global_seed, own_seed = (int(word) for word in np.random.SeedSequence(entropy).generate_state(2))
    own = {'seed': own_seed} if 'seed' in inspect.signature(transform).parameters else {}
    with _numpy_seeded(global_seed):
        pixels = transform(image.convert('RGB'), severity, **own)
    return Image.fromarray(np.uint8(pixels))


def import_imagecorruptions() -> ModuleType:
    """Import the package that makes the corruptions.

    Returns:
        The package.

    Raises:
        ModuleNotFoundError: If it is not installed; how to install it is said.
    """
    try:
        import imagecorruptions
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"Generated corruptions need {error.name}: pip install 'timm-pushpull[corruptions]'", name=error.name
        ) from error
    return imagecorruptions


@contextlib.contextmanager
def _numpy_seeded(seed: int) -> Iterator[None]:
    state = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(state)
