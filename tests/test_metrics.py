import pytest

from timm_pushpull.robustness.metrics import (
    ALEXNET_CORRUPTION_ERRORS,
    HELD_OUT_CORRUPTIONS,
    KINDS,
    TEST_CORRUPTIONS,
    corruption_error,
    net_error_reduction,
    normalized_mce,
    plain_mce,
    relative_mce,
)

# E, mCE and R_net of ResNet50 and its variants on ImageNet-C: arXiv 2408.04077.
PAPER = [
    (0.269, 0.667, 0.00),
    (0.282, 0.645, 1.67),
    (0.276, 0.645, 2.79),
    (0.269, 0.630, 6.86),
    (0.283, 0.604, 9.05),
    (0.269, 0.612, 10.14),
    (0.287, 0.590, 10.97),
    (0.298, 0.522, 21.57),
    (0.306, 0.4995, 24.31),
]


def test_corruptions():
    assert len(TEST_CORRUPTIONS) == 15 and len(HELD_OUT_CORRUPTIONS) == 4
    assert not set(TEST_CORRUPTIONS) & set(HELD_OUT_CORRUPTIONS)
    assert [name for names in KINDS.values() for name in names] == [*TEST_CORRUPTIONS, *HELD_OUT_CORRUPTIONS]
    assert KINDS['weather'] == ('snow', 'frost', 'fog', 'brightness')


def test_hand_worked_table():
    assert corruption_error({1: 0.1, 3: 0.2, 5: 0.6}) == pytest.approx(0.3)
    errors = {name: 0.2 for name in TEST_CORRUPTIONS} | {'fog': 0.5, 'saturate': 1.0}
    assert plain_mce(errors) == pytest.approx((14 * 0.2 + 0.5) / 15)
    baseline = {name: 0.4 for name in TEST_CORRUPTIONS} | {'fog': 0.8, 'saturate': 0.0}
    assert normalized_mce(errors, baseline) == pytest.approx((14 * 0.5 + 0.625) / 15)
    # Errors minus 0.1, errors of the baseline minus 0.2: 0.1 / 0.2, and 0.4 / 0.6 for fog.
    assert relative_mce(0.1, errors, 0.2, baseline) == pytest.approx((14 * 0.5 + 2 / 3) / 15)
    assert net_error_reduction(0.1, 0.3, 0.2, 0.5) == pytest.approx(100 * (0.2 + 0.1) / 0.4)


def test_the_normalized_mce_of_alexnet_is_1():
    assert normalized_mce(ALEXNET_CORRUPTION_ERRORS) == pytest.approx(1)
    assert relative_mce(0.4, ALEXNET_CORRUPTION_ERRORS, 0.4, ALEXNET_CORRUPTION_ERRORS) == pytest.approx(1)
    assert plain_mce(ALEXNET_CORRUPTION_ERRORS) == pytest.approx(0.788993, abs=1e-6)


@pytest.mark.parametrize('clean_error, mce, printed', PAPER)
def test_net_error_reduction_of_the_paper(clean_error, mce, printed):
    baseline_clean_error, baseline_mce, _ = PAPER[0]
    reduction = net_error_reduction(clean_error, mce, baseline_clean_error, baseline_mce)
    # The paper prints each of the four numbers to three digits.
    rounding = 100 * 4 * 0.0005 / (2 * baseline_clean_error)
    assert reduction == pytest.approx(printed, abs=rounding / 2)


def test_incomplete_tables_are_refused():
    errors = dict.fromkeys(TEST_CORRUPTIONS, 0.5)
    del errors['snow']
    for measure in (plain_mce, normalized_mce):
        with pytest.raises(ValueError, match='missing: snow'):
            measure(errors)
    with pytest.raises(ValueError, match='at least one severity'):
        corruption_error({})


ALEXNET = {
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


def test_the_errors_of_alexnet():
    """The values in the code of arXiv 1903.12261."""
    assert ALEXNET_CORRUPTION_ERRORS == ALEXNET
    # Ratios of 0.5 for all but three: 0.25 for snow, 0.75 for fog, 1 for brightness.
    errors = {name: error / 2 for name, error in ALEXNET.items()}
    errors |= {'snow': 0.216704, 'fog': 0.614493, 'brightness': 0.564592}
    assert normalized_mce(errors) == pytest.approx((12 * 0.5 + 0.25 + 0.75 + 1) / 15)
