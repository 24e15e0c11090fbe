import numpy as np
import pytest
from test_results import FIVE, write_results

from timm_pushpull.robustness.intervals import columns_of
from timm_pushpull.robustness.metrics import KINDS, TEST_CORRUPTIONS
from timm_pushpull.robustness.paired import (
    checkpoint_pairs,
    comparison_sentence,
    paired_differences,
    read_comparisons,
    significance,
)
from timm_pushpull.robustness.store import (
    PREDICTION,
    UNREADABLE,
    predictions_path,
    read_predictions,
    read_protocol,
    write_predictions,
)
from timm_pushpull.robustness.summary import write_summary


def passes(clean, by_kind):
    """Numbers of wrong predictions: on clean images, and for each corruption of a kind."""
    wrong = {(name, severity): by_kind[kind] for kind in by_kind for name in KINDS[kind] for severity in FIVE}
    return {('clean', 0): clean} | wrong


def differences(folder, *pairs):
    return paired_differences(read_protocol(folder), read_predictions(folder), pairs)


def test_differences_by_hand(tmp_path):
    # Of 100 images the first are wrong: a difference is one of the images between the two numbers.
    a = passes(20, dict(noise=40, blur=50, weather=30, digital=60))
    b = passes(30, dict(noise=36, blur=45, weather=37, digital=72))
    a |= {('fog', severity): 50 + severity for severity in FIVE}  # 53; digital of b minus 12 times 4
    b |= {('fog', severity): 50 - severity for severity in FIVE}  # 47
    write_results(tmp_path, {'a': a, 'b': b})
    row, back = differences(tmp_path, ('a', 'b'), ('b', 'a'))
    assert (row['from'], row['to'], row['images']) == ('a', 'b', 100)
    # Weather: 7 for three corruptions and -6 for fog. All 15: (3 * -4 + 4 * -5 + 3 * 7 - 6 + 4 * 12) / 15.
    expected = dict(E=10, noise=-4, blur=-5, weather=3.75, digital=12, CE_fog=-6, CE_snow=7, CE_pixelate=12)
    assert {measure: row[measure] for measure in expected} == expected
    assert row['plain_mCE'] == pytest.approx(31 / 15, abs=1e-3)
    assert back['E'] == -10 and back['CE_fog'] == 6 and back['plain_mCE'] == -row['plain_mCE']
    # The number of 100 draws that hit one of 10 images is binomial: 5 to 16 with 95%, 4 images 1 to 8. An interval of
    # unpaired errors of 20 and 30 would be 10 - 12 to 10 + 12.
    for numbers, low, high in ((row, 'E_low', 'E_high'), (back, 'E_high', 'E_low')):
        assert abs(numbers[low]) == pytest.approx(5, abs=1) and abs(numbers[high]) == pytest.approx(16, abs=1)
    assert (row['noise_low'], row['noise_high']) == pytest.approx((-8, -1), abs=1)
    assert not {'relative_mCE', 'R_net'} & row.keys()
    assert row['held out'] == row['held out_low'] == row['held out_high'] == ''


def test_the_mean_over_alexnet_has_a_difference(tmp_path):
    errors = [dict.fromkeys(((name, s) for name in TEST_CORRUPTIONS for s in FIVE), wrong) for wrong in (30, 50)]
    write_results(tmp_path, dict(zip('ab', errors, strict=True)))
    rows = write_summary(tmp_path)
    (row,) = differences(tmp_path, ('a', 'b'))
    # 64.673 for errors of 0.5, so 0.4 of it for a difference of 0.2.
    assert row['alexnet_normalized_mCE'] == pytest.approx(0.4 * 64.673, abs=1e-3)
    assert row['alexnet_normalized_mCE'] == pytest.approx(
        rows[1]['alexnet_normalized_mCE'] - rows[0]['alexnet_normalized_mCE'], abs=2e-3
    )


def test_an_image_that_one_model_could_not_read_counts_for_neither(tmp_path):
    write_results(tmp_path, {'a': {('clean', 0): 20}, 'b': {('clean', 0): 30}})
    predictions = np.zeros(100, PREDICTION)
    predictions['rank'][:20] = 1
    predictions['rank'][20:25] = UNREADABLE
    write_predictions(predictions_path(tmp_path, 'a', 'clean', 0), predictions)
    row, back = differences(tmp_path, ('a', 'b'), ('b', 'a'))
    assert row['E'] == -back['E'] == pytest.approx(100 * (25 - 20) / 95, abs=1e-3)
    assert row['images'] == back['images'] == 95
    assert 0 < row['E_low'] < row['E'] < row['E_high']
    predictions['rank'] = UNREADABLE
    write_predictions(predictions_path(tmp_path, 'a', 'clean', 0), predictions)
    assert differences(tmp_path, ('a', 'b')) == []


def test_an_image_that_both_models_could_read_in_one_pass_counts(tmp_path):
    write_results(tmp_path, {name: {('clean', 0): 20, ('fog', 1): 30} for name in 'ab'})
    for name, severity, unreadable in (('clean', 0, 20), ('fog', 1, 7)):
        predictions = np.zeros(100, PREDICTION)
        predictions['rank'][:unreadable] = UNREADABLE
        write_predictions(predictions_path(tmp_path, 'b', name, severity), predictions)
    (row,) = differences(tmp_path, ('a', 'b'))
    assert row['images'] == 93


def test_a_missing_pass_leaves_out_what_needs_it(tmp_path):
    whole = passes(20, dict.fromkeys(('noise', 'blur', 'weather', 'digital'), 50))
    lacking = {key: wrong + 7 for key, wrong in whole.items() if key != ('fog', 3)}
    write_results(tmp_path, {'whole': whole, 'lacking': lacking, 'nothing in common': {('saturate', 1): 5}})
    (row,) = differences(tmp_path, ('whole', 'nothing in common'), ('whole', 'lacking'))
    assert row['E'] == row['CE_snow'] == row['noise'] == 7
    assert row['plain_mCE'] == row['weather'] == row.get('CE_fog', '') == significance(row, 'CE_fog') == ''
    assert 'clean error is higher' in comparison_sentence(row) and 'plain mCE' not in comparison_sentence(row)


def made(**measures):
    row = {'from': 'plain', 'to': 'pp', 'images': 1200}
    for measure, numbers in measures.items():
        row |= dict(zip(columns_of(measure), numbers, strict=True))
    return row


def test_the_sentence():
    assert comparison_sentence(made(E=(2.61, 0.42, 4.8), plain_mCE=(-1.99, -2.66, -1.27))) == (
        'pp against plain, by these 1,200 images: the clean error is higher (2.6 points, 95% interval 0.4 to 4.8); '
        'plain mCE is lower (-2.0 points, 95% interval -2.7 to -1.3).'
    )
    assert comparison_sentence(made(plain_mCE=(0.7, -0.02, 1.5))) == (
        'pp against plain, by these 1,200 images: plain mCE is not significantly different (0.7 points, 95% interval '
        '0.0 to 1.5).'
    )
    assert comparison_sentence(made(CE_fog=(1, 2, 3))) == comparison_sentence(made(E=(1, '', ''))) == ''


@pytest.mark.parametrize(
    'low, high, words',
    [
        (0.06, 3, 'higher'),
        (0.04, 3, 'not significantly different'),  # shown as 0.0
        (-0.2, 0.3, 'not significantly different'),
        (-3, -0.04, 'not significantly different'),
        (-3, -0.06, 'lower'),
        (0, 0, 'not significantly different'),
        ('', '', ''),
    ],
)
def test_a_difference_is_significant_if_its_interval_excludes_0(low, high, words):
    assert significance(made(E=(1, low, high)), 'E') == words


def test_which_checkpoints_are_compared():
    assert checkpoint_pairs(['a', 'b'], None) == [('a', 'b')]
    assert checkpoint_pairs(['a', 'b'], 'b') == [('b', 'a')]
    assert checkpoint_pairs(['a', 'b', 'c'], None) == checkpoint_pairs(['a'], None) == checkpoint_pairs([], None) == []
    assert checkpoint_pairs(['a', 'b', 'c'], 'b') == [('b', 'a'), ('b', 'c')]
    assert checkpoint_pairs(['a@1', 'b@1', 'c@2'], 'a') == [('a@1', 'b@1')]
    assert checkpoint_pairs(['a@1', 'a@2'], None) == []
    # Of several runs neither the model nor the baseline is a single checkpoint, unless it is named.
    assert checkpoint_pairs(['a@1', 'a@2', 'b@1', 'b@2', 'c@2'], 'a') == []
    assert checkpoint_pairs(['a@1', 'a@2', 'b@1', 'b@2', 'c@2'], 'a@1') == [('a@1', 'c@2')]


def test_a_folder_has_the_sentence_of_its_baseline(tmp_path):
    whole = {name: {('clean', 0): wrong} for name, wrong in (('a', 20), ('b', 45), ('c', 20))}
    write_results(tmp_path, whole)
    write_summary(tmp_path)
    assert read_comparisons(tmp_path) == []
    write_summary(tmp_path, 'b')
    first, second = read_comparisons(tmp_path)
    assert first.startswith('a against b, by these 100 images: the clean error is lower (-25.0 points, ')
    assert second.startswith('c against b, ')


def test_a_model_without_predictions_is_not_compared(tmp_path):
    write_results(tmp_path, {'a': {('clean', 0): 20}, 'b': {('clean', 0): 45}, 'not yet': {}})
    write_summary(tmp_path)
    (sentence,) = read_comparisons(tmp_path)
    assert sentence.startswith('b against a, ')
