"""Generates the 15 test corruptions and the 4 held-out ones, reproducibly for each image.

The corruptions come from imagecorruptions-imaug, which packages the code of ImageNet-C
(https://arxiv.org/abs/1903.12261). Most of them draw from NumPy's global generator, two from a generator of their own.
The severities are made for images of 224x224 pixels. On smaller images blur and fog are much stronger: errors there do
not compare with those on CIFAR-10-C or Tiny-ImageNet-C, which have severities of their own.
"""

import contextlib
import difflib
import inspect
import zlib
from collections.abc import Iterator
from types import ModuleType

import numpy as np
from PIL import Image

from ..errors import InputError, MissingExtraError
from .metrics import HELD_OUT_CORRUPTIONS, SEVERITIES, TEST_CORRUPTIONS

__all__ = ['check_corruption', 'corrupt', 'import_imagecorruptions']


def check_corruption(corruption: str, severity: int) -> None:
    """Refuse a corruption or a severity that does not exist.

    Args:
        corruption: Name of a test corruption or of a held-out corruption.
        severity: Severity, 1 to 5.

    Raises:
        ValueError: If it does not exist. The message names the nearest corruption.
    """
    names = (*TEST_CORRUPTIONS, *HELD_OUT_CORRUPTIONS)
    if corruption not in names:
        near = difflib.get_close_matches(corruption, names, cutoff=0)[0]
        raise InputError(f'corruption must be one of {", ".join(names)}, got {corruption!r}; the nearest is {near!r}.')
    if severity not in SEVERITIES:
        raise InputError(f'severity must be an integer from 1 to 5, got {severity}.')


def corrupt(image: Image.Image, corruption: str, severity: int, index: int, seed: int = 0) -> Image.Image:
    """Corrupt an image as ImageNet-C does. The same arguments give the same image, in any process and order.

    Args:
        image: Image, converted to RGB; at least 32 pixels on each side.
        corruption: Name of a test corruption or of a held-out corruption.
        severity: Severity, 1 to 5.
        index: Index of the image in its dataset, from 0: each image has random numbers of its own.
        seed: Seed of all random numbers.

    Returns:
        RGB image of the same size.

    Raises:
        ModuleNotFoundError: If imagecorruptions-imaug is not installed.
        ValueError: If the corruption or the severity does not exist, or if the image is too small.
    """
    check_corruption(corruption, severity)
    if min(image.size) < 32:
        raise InputError(f'image must be at least 32 pixels on each side, got {image.width}x{image.height}.')
    transform = getattr(import_imagecorruptions(), corruption)
    entropy = [seed, zlib.crc32(corruption.encode()), severity, index]
    numpy_seed, own_seed = (int(word) for word in np.random.SeedSequence(entropy).generate_state(2))
    options = {'seed': own_seed} if 'seed' in inspect.signature(transform).parameters else {}
    with _numpy_seeded(numpy_seed):
        pixels = transform(image.convert('RGB'), severity, **options)
    return Image.fromarray(np.uint8(pixels))


def import_imagecorruptions() -> ModuleType:
    """Import the package that generates the corruptions.

    Returns:
        The package.

    Raises:
        ModuleNotFoundError: If it is not installed. The message says how to install it.
    """
    try:
        import imagecorruptions
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f'Generated corruptions need {error.name}: pip install imagecorruptions-imaug', name=error.name
        ) from error
    return imagecorruptions


@contextlib.contextmanager
def _numpy_seeded(seed: int) -> Iterator[None]:
    """Seed NumPy's global generator, and restore it afterwards."""
    state = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(state)
