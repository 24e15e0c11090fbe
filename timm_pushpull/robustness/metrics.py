"""Corruptions, and metrics of robustness computed from top-1 errors by corruption and severity.

`Benchmarking Neural Network Robustness to Common Corruptions and Perturbations` (https://arxiv.org/abs/1903.12261) and
`PushPull-Net` (https://arxiv.org/abs/2408.04077) report different means under the name mCE. Here each measure has its
own name, see ``MEASURES``.
"""

from collections.abc import Mapping
from typing import Any

from ..errors import InputError

__all__ = [
    'ALEXNET_CORRUPTION_ERRORS',
    'CLEAN',
    'COMPARISONS',
    'HELD_OUT_CORRUPTIONS',
    'KINDS',
    'MEASURES',
    'SEVERITIES',
    'TEST_CORRUPTIONS',
    'corruption_error',
    'display_name',
    'kind_errors',
    'net_error_reduction',
    'normalized_mce',
    'plain_mce',
    'relative_mce',
]

# Top-1 corruption errors of AlexNet on ImageNet-C: the divisors in Hendrycks and Dietterich's mCE.
ALEXNET_CORRUPTION_ERRORS = {
    'gaussian_noise': 0.886428,
    'shot_noise': 0.894468,
    'impulse_noise': 0.922640,
    'defocus_blur': 0.819880,
    'glass_blur': 0.826268,
    'motion_blur': 0.785948,
    'zoom_blur': 0.798360,
    'snow': 0.866816,
    'frost': 0.826572,
    'fog': 0.819324,
    'brightness': 0.564592,
    'contrast': 0.853204,
    'elastic_transform': 0.646056,
    'pixelate': 0.717840,
    'jpeg_compression': 0.606500,
}
TEST_CORRUPTIONS = tuple(ALEXNET_CORRUPTION_ERRORS)
HELD_OUT_CORRUPTIONS = ('speckle_noise', 'gaussian_blur', 'spatter', 'saturate')
KINDS = {
    'noise': TEST_CORRUPTIONS[:3],
    'blur': TEST_CORRUPTIONS[3:7],
    'weather': TEST_CORRUPTIONS[7:11],
    'digital': TEST_CORRUPTIONS[11:],
    'held out': HELD_OUT_CORRUPTIONS,
}
CLEAN = 'clean'  # in the place of a corruption, with severity 0
SEVERITIES = (1, 2, 3, 4, 5)
MEASURES = {
    'E': 'top-1 error on clean images, %',
    'plain_mCE': 'plain mean of the top-1 errors over 15 corruptions, %: the mCE of the push-pull paper',
    'alexnet_normalized_mCE': "mean of each corruption's error over AlexNet's, %: the mCE of most other papers",
    'relative_mCE': 'mean of (CE - E) / (CE_b - E_b) over 15 corruptions, %; CE is the error of one corruption, b the '
    'baseline',
    'R_net': 'net reduction in error, %: 100 ((mCE_b - mCE) + (E_b - E)) / (2 E_b); mCE is the plain mCE, b the '
    'baseline. The push-pull paper prints no formula; this formula reproduces its table',
    # ImageNet-C-bar has no published divisors: its authors report this mean (imagenet_c_bar/test_c_bar.py of
    # https://github.com/facebookresearch/augmentation-corruption).
    'other_mCE': 'plain mean of the top-1 errors over the corruptions that ImageNet-C lacks, %',
}
COMPARISONS = ('relative_mCE', 'R_net')  # the measures that need a baseline


def corruption_error(errors: Mapping[int, float]) -> float:
    """Compute CE of one corruption: its mean error over the severities.

    Args:
        errors: Top-1 error, in [0, 1], by severity.

    Returns:
        Mean error, in [0, 1].

    Raises:
        ValueError: If ``errors`` is empty.
    """
    if not errors:
        raise InputError('errors must hold at least one severity, got none.')
    return sum(errors.values()) / len(errors)


def kind_errors(corruption_errors: Mapping[str, Any]) -> dict[str, Any]:
    """Compute the mean CE of each kind of corruption.

    Args:
        corruption_errors: CE by corruption: numbers, or arrays of one shape.

    Returns:
        Mean CE by kind, for the kinds of which no corruption is missing.
    """
    return {
        kind: sum(corruption_errors[name] for name in names) / len(names)
        for kind, names in KINDS.items()
        if corruption_errors.keys() >= set(names)
    }


def plain_mce(corruption_errors: Mapping[str, float]) -> float:
    """Compute PushPull-Net's mCE: the plain mean of CE over the 15 test corruptions.

    Args:
        corruption_errors: CE, in [0, 1], by corruption. Corruptions outside the 15 do not count.

    Returns:
        Mean error, in [0, 1].

    Raises:
        ValueError: If one of the 15 corruptions is missing.
    """
    return sum(_test_errors(corruption_errors).values()) / len(TEST_CORRUPTIONS)


def normalized_mce(
    corruption_errors: Mapping[str, float],
    baseline: Mapping[str, float] = ALEXNET_CORRUPTION_ERRORS,
) -> float:
    """Compute Hendrycks and Dietterich's mCE: the mean of ``CE / CE_baseline`` over the 15 test corruptions.

    AlexNet's errors are those on ImageNet-C with its 1,000 classes: use them for no other data.

    Args:
        corruption_errors: CE, in [0, 1], by corruption. Corruptions outside the 15 do not count.
        baseline: CE of the baseline by corruption; AlexNet's by default.

    Returns:
        Mean ratio: 1 for the baseline itself, less for a more robust model.

    Raises:
        ValueError: If one of the 15 corruptions is missing from either argument.
    """
    baseline_errors = _test_errors(baseline)
    ratios = [error / baseline_errors[name] for name, error in _test_errors(corruption_errors).items()]
    return sum(ratios) / len(ratios)


def relative_mce(
    clean_error: float,
    corruption_errors: Mapping[str, float],
    baseline_clean_error: float,
    baseline: Mapping[str, float],
) -> float:
    """Compute Hendrycks and Dietterich's relative mCE: the mean of ``(CE - E) / (CE_baseline - E_baseline)``.

    Args:
        clean_error: E, the top-1 error on clean images, in [0, 1].
        corruption_errors: CE, in [0, 1], by corruption. Corruptions outside the 15 do not count.
        baseline_clean_error: E of the baseline, in [0, 1].
        baseline: CE of the baseline by corruption.

    Returns:
        Mean ratio of what the corruptions add to the error: 1 for the baseline itself.

    Raises:
        ValueError: If one of the 15 corruptions is missing from either mapping.
    """
    return normalized_mce(
        {name: error - clean_error for name, error in _test_errors(corruption_errors).items()},
        {name: error - baseline_clean_error for name, error in _test_errors(baseline).items()},
    )


def net_error_reduction(clean_error: float, mce: float, baseline_clean_error: float, baseline_mce: float) -> float:
    """Compute R_net, the net reduction in error: the gain on corrupted images minus the loss on clean images.

    ``100 * ((mCE_b - mCE) + (E_b - E)) / (2 * E_b)`` for a baseline b. The paper prints no formula; this formula
    reproduces its table.

    Args:
        clean_error: E, in [0, 1].
        mce: Plain mCE, in [0, 1].
        baseline_clean_error: E of the baseline, in [0, 1].
        baseline_mce: Plain mCE of the baseline, in [0, 1].

    Returns:
        Percentage: 0 for the baseline itself, positive for a gain.
    """
    return 100 * ((baseline_mce - mce) + (baseline_clean_error - clean_error)) / (2 * baseline_clean_error)


def display_name(corruption: str) -> str:
    """Return the name of a corruption as figures and tables show it: without underscores, such as ``'JPEG'``."""
    return {'jpeg_compression': 'JPEG', 'elastic_transform': 'elastic'}.get(corruption, corruption.replace('_', ' '))


def _test_errors(corruption_errors: Mapping[str, float]) -> dict[str, float]:
    missing = [name for name in TEST_CORRUPTIONS if name not in corruption_errors]
    if missing:
        raise InputError(f'mCE needs all {len(TEST_CORRUPTIONS)} test corruptions, missing: {", ".join(missing)}.')
    return {name: corruption_errors[name] for name in TEST_CORRUPTIONS}
