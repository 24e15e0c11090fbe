import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from timm_pushpull.robustness.corruptions import corrupt
from timm_pushpull.robustness.metrics import HELD_OUT_CORRUPTIONS, SEVERITIES, TEST_CORRUPTIONS

imagecorruptions = pytest.importorskip('imagecorruptions')
# The other corruptions draw random numbers.
DETERMINISTIC = {
    'defocus_blur',
    'zoom_blur',
    'brightness',
    'contrast',
    'pixelate',
    'jpeg_compression',
    'gaussian_blur',
    'saturate',
}


def gradients(height=40, width=48):
    rows, columns = np.mgrid[:height, :width]
    pixels = np.stack([rows * 5, columns * 5, 128 + 100 * np.sin(rows / 3) * np.cos(columns / 4)], -1)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize('corruption', [*TEST_CORRUPTIONS, *HELD_OUT_CORRUPTIONS])
def test_index_and_seed_decide_the_draw(corruption):
    image = gradients()
    first = np.asarray(corrupt(image, corruption, 3, index=7))
    assert first.shape == (40, 48, 3) and not np.array_equal(first, np.asarray(image))
    np.random.seed(1)
    corrupt(image, 'snow', 2, index=0)
    assert np.array_equal(corrupt(image, corruption, 3, index=7), first)
    differs = not np.array_equal(corrupt(image, corruption, 3, index=8), first)
    assert differs == (corruption not in DETERMINISTIC)
    differs = not np.array_equal(corrupt(image, corruption, 3, index=7, seed=1), first)
    assert differs == (corruption not in DETERMINISTIC)


@pytest.mark.parametrize('corruption', sorted(DETERMINISTIC))
@pytest.mark.parametrize('severity', SEVERITIES)
def test_corruptions_are_those_of_the_package(corruption, severity):
    expected = imagecorruptions.corrupt(np.asarray(gradients()), severity, corruption)
    assert np.array_equal(corrupt(gradients(), corruption, severity, index=0), expected)


def test_another_process_draws_the_same(tmp_path):
    names = ['gaussian_noise', 'impulse_noise', 'glass_blur', 'frost', 'elastic_transform']
    gradients().save(tmp_path / 'image.png')
    program = f"""
from PIL import Image
from timm_pushpull.robustness.corruptions import corrupt
for name in {names[::-1]}:
    corrupt(Image.open({str(tmp_path / 'image.png')!r}), name, 5, index=3).save(f'{tmp_path}/{{name}}.png')
"""
    subprocess.run([sys.executable, '-c', program], check=True)
    for name in names:
        assert np.array_equal(Image.open(tmp_path / f'{name}.png'), corrupt(gradients(), name, 5, index=3)), name


@pytest.mark.parametrize('corruption', sorted({*TEST_CORRUPTIONS, *HELD_OUT_CORRUPTIONS} - {'glass_blur'}))
def test_images_of_32_pixels(corruption):
    assert corrupt(gradients(32, 32), corruption, 5, index=0).size == (32, 32)


def test_the_state_of_numpys_generator_is_kept():
    np.random.seed(5)
    expected = np.random.random(3)
    np.random.seed(5)
    corrupt(gradients(), 'gaussian_noise', 1, index=0)
    assert np.array_equal(np.random.random(3), expected)


def test_noise_grows_with_severity():
    clean = np.asarray(gradients(), dtype=float)
    distances = [
        np.abs(corrupt(gradients(), 'gaussian_noise', severity, index=0) - clean).mean() for severity in SEVERITIES
    ]
    assert distances == sorted(distances) and distances[4] > 2 * distances[0]


@pytest.mark.parametrize(
    'corruption, severity, size, message',
    [
        ('gausian_noise', 1, 40, "got 'gausian_noise'; the nearest is 'gaussian_noise'"),
        ('xyz', 1, 40, "got 'xyz'; the nearest is '"),
        ('fog', 6, 40, 'severity must be an integer from 1 to 5, got 6'),
        ('fog', 1, 31, 'image must be at least 32 pixels on each side, got 48x31'),
    ],
)
def test_bad_arguments_are_refused(corruption, severity, size, message):
    with pytest.raises(ValueError, match=message):
        corrupt(gradients(size), corruption, severity, index=0)


def test_without_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, 'imagecorruptions', None)
    with pytest.raises(ModuleNotFoundError, match='pip install imagecorruptions-imaug') as error:
        corrupt(gradients(), 'fog', 1, index=0)
    assert error.value.name == 'imagecorruptions'
