"""Measures of robustness, from top-1 errors by corruption and severity.

Papers: `Benchmarking Neural Network Robustness to Common Corruptions and Perturbations` -
https://arxiv.org/abs/1903.12261, and `PushPull-Net` - https://arxiv.org/abs/2408.04077. The two print different means
under the name mCE; here they have different names.
"""

from collections.abc import Mapping

__all__ = [
    'ALEXNET_CORRUPTION_ERRORS',
    'HELD_OUT_CORRUPTIONS',
    'TEST_CORRUPTIONS',
    'corruption_error',
    'net_error_reduction',
    'normalized_mce',
    'plain_mce',
    'relative_mce',
]

# Top-1 corruption errors of AlexNet on ImageNet-C, by which Hendrycks and Dietterich divide.
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


def corruption_error(errors: Mapping[int, float]) -> float:
    """CE of one corruption: the mean of its errors over the severities.

    Args:
        errors: Top-1 error, in [0, 1], by severity.

    Returns:
        Mean error, in [0, 1].

    Raises:
        ValueError: If there is no severity.
    """
    if not errors:
        raise ValueError('errors must hold at least one severity, got none.')
    return sum(errors.values()) / len(errors)


def plain_mce(corruption_errors: Mapping[str, float]) -> float:
    """PushPull-Net's mCE: the plain mean of CE over the 15 test corruptions.

    Args:
        corruption_errors: CE, in [0, 1], by corruption; others than the 15 are left aside.

    Returns:
        Mean error, in [0, 1].

    Raises:
        ValueError: If one of the 15 is missing.
    """
    return sum(_test_errors(corruption_errors).values()) / len(TEST_CORRUPTIONS)


def normalized_mce(
    corruption_errors: Mapping[str, float],
    baseline: Mapping[str, float] = ALEXNET_CORRUPTION_ERRORS,
) -> float:
    """Hendrycks and Dietterich's mCE: the mean of CE over that of the baseline.

    With AlexNet as baseline it means something on ImageNet-C and its 1,000 classes only.

    Args:
        corruption_errors: CE, in [0, 1], by corruption; others than the 15 are left aside.
        baseline: The same of the baseline, AlexNet by default.

    Returns:
        Mean ratio: 1 for the baseline itself, less for a more robust model.

    Raises:
        ValueError: If one of the 15 is missing in either.
    """
    of_baseline = _test_errors(baseline)
    ratios = [error / of_baseline[name] for name, error in _test_errors(corruption_errors).items()]
    return sum(ratios) / len(ratios)


def relative_mce(
    clean_error: float,
    corruption_errors: Mapping[str, float],
    baseline_clean_error: float,
    baseline: Mapping[str, float],
) -> float:
    """Hendrycks and Dietterich's relative mCE: as their mCE, each error less the model's own clean error.

    Args:
        clean_error: E, the top-1 error on clean images, in [0, 1].
        corruption_errors: CE, in [0, 1], by corruption; others than the 15 are left aside.
        baseline_clean_error: E of the baseline.
        baseline: CE of the baseline.

    Returns:
        Mean ratio of what the corruptions add to the error: 1 for the baseline itself.

    Raises:
        ValueError: If one of the 15 is missing in either.
    """
    return normalized_mce(
        {name: error - clean_error for name, error in _test_errors(corruption_errors).items()},
        {name: error - baseline_clean_error for name, error in _test_errors(baseline).items()},
    )


def net_error_reduction(clean_error: float, mce: float, baseline_clean_error: float, baseline_mce: float) -> float:
    """R_net, the net reduction in error against a baseline: what is won on corrupted images less what clean ones cost.

    ``100 * ((mCE_b - mCE) + (E_b - E)) / (2 * E_b)``, inferred from the published table, which it reproduces.

    Args:
        clean_error: E, in [0, 1].
        mce: Plain mCE, in [0, 1].
        baseline_clean_error: E of the baseline.
        baseline_mce: Plain mCE of the baseline.

    Returns:
        Percentage, 0 for the baseline itself.
    """
    return 100 * ((baseline_mce - mce) + (baseline_clean_error - clean_error)) / (2 * baseline_clean_error)


def _test_errors(corruption_errors: Mapping[str, float]) -> dict[str, float]:
    missing = [name for name in TEST_CORRUPTIONS if name not in corruption_errors]
    if missing:
        raise ValueError(f'mCE needs all {len(TEST_CORRUPTIONS)} test corruptions, missing: {", ".join(missing)}.')
    return {name: corruption_errors[name] for name in TEST_CORRUPTIONS}
