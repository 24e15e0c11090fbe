import csv
import json

import numpy as np
import pytest

from timm_pushpull.robustness.intervals import _interval
from timm_pushpull.robustness.metrics import TEST_CORRUPTIONS, net_error_reduction
from timm_pushpull.robustness.store import (
    PREDICTION,
    UNREADABLE,
    differences,
    lock,
    predictions_path,
    read_csv,
    read_protocol,
    write_csv,
    write_predictions,
)
from timm_pushpull.robustness.summary import (
    _error_rates,
    baseline_row,
    not_compared,
    read_summary,
    view_differences,
    write_errors,
    write_summary,
)

FIVE = (1, 2, 3, 4, 5)


def write_results(folder, errors, images=100, classes=1000, seed=0):
    """Write a results folder in which the predictions for the first images are wrong."""
    model = dict(input_size=[3, 32, 32], crop_pct=1.0, interpolation='bilinear', param_count=1.0)
    data = dict(images=images, classes=classes, imagenet_1k=classes == 1000)
    folder.mkdir(exist_ok=True)
    corruptions = dict(generated_by='a package', seed=seed)
    protocol = dict(corruptions=corruptions, data=data, models=dict.fromkeys(errors, model))
    (folder / 'protocol.json').write_text(json.dumps(protocol))
    for name, passes in errors.items():
        for (corruption, severity), wrong in passes.items():
            predictions = np.zeros(images, PREDICTION)
            predictions['rank'][:wrong] = 5
            write_predictions(predictions_path(folder, name, corruption, severity), predictions)


def test_summary_by_hand(tmp_path):
    corrupted = [(name, severity) for name in TEST_CORRUPTIONS for severity in FIVE]
    errors = {
        'a': {('clean', 0): 20}
        | {('saturate', s): 90 for s in FIVE}
        | {(name, s): 20 + 10 * s for name, s in corrupted},
        'b': {('clean', 0): 30} | {(name, s): 10 * s for name, s in corrupted},
    }
    write_results(tmp_path, errors)
    a, b = write_summary(tmp_path, baseline='a')
    assert (a['top1'], a['top1_err'], a['top5']) == (80, 20, 80)
    assert (a['E'], a['CE_fog'], a['CE_saturate'], a['plain_mCE']) == (20, 50, 90, 50)
    assert (b['E'], b['CE_fog'], b['plain_mCE']) == (30, 30, 30)
    assert (a['relative_mCE'], a['R_net']) == (100, 0)
    assert b['relative_mCE'] == 0 and b['R_net'] == pytest.approx(net_error_reduction(0.3, 0.3, 0.2, 0.5))
    assert a['alexnet_normalized_mCE'] != a['plain_mCE'] and a['severities'] == '1 2 3 4 5'
    # 95% interval of a binomial proportion, 0.2 of 100: 1.96 * sqrt(0.2 * 0.8 / 100) = 0.078 to each side
    assert a['E_low'] == pytest.approx(20 - 7.8, abs=1.5) and a['E_high'] == pytest.approx(20 + 7.8, abs=1.5)
    assert a['R_net_low'] == a['R_net_high'] == 0


def test_means_of_incomplete_results_are_empty(tmp_path):
    def empty(folder, errors, **kwargs):
        write_results(folder, {'a': errors, 'b': {(name, 1): 5 for name in TEST_CORRUPTIONS}}, images=10, **kwargs)
        row = write_summary(folder, baseline='b')[0]
        return {name for name in ('E', 'plain_mCE', 'alexnet_normalized_mCE', 'R_net') if row[name] == ''}

    def passes(severities=FIVE, but=()):
        return {(name, severity): 5 for name in TEST_CORRUPTIONS for severity in severities if name not in but}

    clean = {('clean', 0): 2}
    assert empty(tmp_path / 'one', {**clean, ('fog', 1): 5}) == {'plain_mCE', 'alexnet_normalized_mCE', 'R_net'}
    assert empty(tmp_path / 'fourteen', clean | passes(but='fog')) == {'plain_mCE', 'alexnet_normalized_mCE', 'R_net'}
    assert empty(tmp_path / 'ten classes', clean | passes(), classes=10) == {'alexnet_normalized_mCE', 'R_net'}
    assert empty(tmp_path / 'two severities', clean | passes((1, 5))) == {'alexnet_normalized_mCE', 'R_net'}
    mixed = clean | passes() | {('fog', 5): 5}
    del mixed['fog', 2]
    assert empty(tmp_path / 'mixed severities', mixed) == {'plain_mCE', 'alexnet_normalized_mCE', 'R_net'}
    assert empty(tmp_path / 'not clean', passes()) == {'E', 'R_net'}


def test_unreadable_images_do_not_count(tmp_path):
    write_results(tmp_path, {'a': {('clean', 0): 20}})
    predictions = np.zeros(100, PREDICTION)
    predictions['rank'][:30] = 1
    predictions['rank'][90:] = UNREADABLE
    write_predictions(predictions_path(tmp_path, 'a', 'fog', 3), predictions)
    write_errors(tmp_path)
    (row,) = write_summary(tmp_path)
    assert row['CE_fog'] == pytest.approx(100 * 30 / 90, abs=1e-3) and row['unreadable'] == 10
    assert row['CE_fog_low'] < row['CE_fog'] < row['CE_fog_high']
    with open(tmp_path / 'errors.csv') as file:
        clean, fog = csv.DictReader(file)
    assert (clean['images'], clean['errors'], clean['unreadable']) == ('100', '20', '0')
    assert (fog['images'], fog['errors'], fog['unreadable']) == ('90', '30', '10')


def test_a_summary_keeps_its_baseline(tmp_path):
    write_results(tmp_path, {'a': {('clean', 0): 20}, 'b': {('clean', 0): 30}})
    write_summary(tmp_path, 'b')
    assert [row['baseline'] for row in write_summary(tmp_path)] == ['b', 'b']
    assert [row['baseline'] for row in write_summary(tmp_path, 'a')] == ['a', 'a']
    with pytest.raises(ValueError, match='baseline must be one of the models a, b, got'):
        write_summary(tmp_path, 'c')


def test_a_training_run_is_compared_with_the_baseline_run_of_the_same_name(tmp_path):
    def passes(clean, corrupted):
        return {('clean', 0): clean} | {(name, severity): corrupted for name in TEST_CORRUPTIONS for severity in FIVE}

    errors = {'a@1': (20, 50), 'a@2': (25, 40), 'b@2': (30, 30), 'b@1': (10, 60), 'b@3': (5, 5), 'c': (20, 50)}
    write_results(tmp_path, {name: passes(*numbers) for name, numbers in errors.items()})
    rows = {row['model']: row for row in write_summary(tmp_path, baseline='a')}
    assert {row['baseline'] for row in rows.values()} == {'a'}
    assert rows['a@1']['R_net'] == rows['a@2']['R_net'] == 0
    assert rows['b@1']['R_net'] == pytest.approx(net_error_reduction(0.1, 0.6, 0.2, 0.5))
    assert rows['b@2']['R_net'] == pytest.approx(net_error_reduction(0.3, 0.3, 0.25, 0.4))
    assert rows['b@2']['relative_mCE'] == 0 and rows['b@1']['relative_mCE'] == pytest.approx(100 * 0.5 / 0.3, abs=1e-3)
    assert rows['b@3']['R_net'] == rows['c']['R_net'] == ''
    assert not_compared(list(rows.values())) == 'Without relative_mCE and R_net: b@3 (no a@3), c (no a).'
    assert [row['R_net'] for row in write_summary(tmp_path)] == [row['R_net'] for row in rows.values()]
    with pytest.raises(ValueError, match='one of the models a@1, a@2, b@2, b@1, b@3, c, a, b, got'):
        write_summary(tmp_path, 'd')


def test_a_summary_is_read_as_it_was_written(tmp_path):
    generator = np.random.default_rng(0)
    passes = [('clean', 0), *((name, severity) for name in TEST_CORRUPTIONS for severity in FIVE)]
    models = {name: {key: generator.integers(21, 99) for key in passes} for name in ('a@1', 'a@2', 'b@1')}
    write_results(tmp_path, {**models, 'b@3': {('clean', 0): 7}})
    rows = write_summary(tmp_path, 'a')
    found = read_summary(tmp_path / 'summary.csv')
    assert found == [{**dict.fromkeys(found[0], ''), **row} for row in rows]
    content = (tmp_path / 'summary.csv').read_bytes()
    (tmp_path / 'spreadsheet.csv').write_bytes(b'\xef\xbb\xbf' + content.replace(b'\n', b'\r\n'))  # as Excel saves it
    assert read_summary(tmp_path / 'spreadsheet.csv') == found


def test_an_interval_holds_95_percent(tmp_path):
    write_results(tmp_path, {'a': {('clean', 0): 200}}, images=1000)
    (row,) = write_summary(tmp_path)
    # 1.96 standard deviations of a share of 0.2 among 1,000: 2.48 points; 1.64 of them, for 90%, are 2.08.
    assert row['E_high'] - row['E'] == pytest.approx(2.48, abs=0.25)
    assert row['E'] - row['E_low'] == pytest.approx(2.48, abs=0.25)


@pytest.mark.parametrize('errors, is_given', [(19, False), (20, True)])
def test_a_ratio_needs_twenty_errors_of_the_baseline(tmp_path, errors, is_given):
    passes = {(name, severity): 60 for name in TEST_CORRUPTIONS for severity in FIVE}
    write_results(tmp_path, {'a': {('clean', 0): errors, **passes}, 'b': {('clean', 0): 30, **passes}})
    words = 'Without {}: a ratio needs the predictions of the baseline, with 20 errors or more.'
    rows = write_summary(tmp_path, 'a')
    b = rows[1]
    assert (b['R_net'] != '', b['R_net_low'] != '', b['relative_mCE'] != '') == (is_given, is_given, True)
    assert not_compared(rows) == ('' if is_given else words.format('R_net'))
    # The corruption that adds least adds 5 x 4 errors, or one less.
    passes |= {('fog', severity): 34 for severity in FIVE} | {('fog', 3): 34 - (errors < 20)}
    write_results(tmp_path, {'a': {('clean', 0): 30, **passes}, 'b': {('clean', 0): 30, **passes}})
    rows = write_summary(tmp_path, 'a')
    b = rows[1]
    assert (b['R_net'] != '', b['relative_mCE'] != '') == (True, is_given)
    assert not_compared(rows) == ('' if is_given else words.format('relative_mCE'))


@pytest.mark.parametrize('content', [b'', b'a,b\n1,2\n', b'\xff\xfe', b'model,E\nm,x\n'])
def test_a_file_that_is_not_a_summary_is_refused(tmp_path, content):
    (tmp_path / 'table.csv').write_bytes(content)
    with pytest.raises(ValueError, match=r'table.csv is not a summary.csv'):
        read_summary(tmp_path / 'table.csv')


@pytest.mark.parametrize('content', [b'model,E\nm,1,2\n', b'model,E\nm\n'])
def test_a_row_with_too_few_or_too_many_cells_is_refused(tmp_path, content):
    (tmp_path / 'table.csv').write_bytes(content)
    with pytest.raises(ValueError, match=r'table.csv, row 1: must have 2 cells'):
        read_summary(tmp_path / 'table.csv')


def summary_of_two(folder):
    passes = {('clean', 0): 5} | {(name, severity): 9 for name in TEST_CORRUPTIONS for severity in FIVE}
    write_results(folder, {'a': passes, 'b': passes})
    write_summary(folder)
    return folder / 'summary.csv'


def test_a_summary_without_a_column_is_refused(tmp_path):
    path = summary_of_two(tmp_path)
    for column in ('E_low', 'CE_fog_high', 'R_net'):
        rows = read_csv(path)
        columns = [name for name in rows[0] if name != column]
        lines = [columns, *([row[name] for name in columns] for row in rows)]
        (tmp_path / 'less.csv').write_text('\n'.join(map(','.join, lines)))
        with pytest.raises(ValueError, match=r'less.csv is not a summary.csv'):
            read_summary(tmp_path / 'less.csv')


def test_a_summary_that_names_a_model_twice_is_refused(tmp_path):
    path = summary_of_two(tmp_path)
    path.write_text(path.read_text() + path.read_text().splitlines()[-1] + '\n')
    with pytest.raises(ValueError, match='summary.csv names b twice'):
        read_summary(path)


@pytest.mark.parametrize('column, values', [('severities', ['1 2 3 4 5', '3']), ('baseline', ['b', ''])])
def test_rows_that_no_sentence_holds_for_are_refused(column, values, tmp_path):
    path = summary_of_two(tmp_path)
    rows = [{**row, column: value} for row, value in zip(read_csv(path), values, strict=True)]
    write_csv(path, rows)
    words = f"summary.csv must have one value of {column} in all rows, it has '{values[0]}', '{values[1]}'"
    with pytest.raises(ValueError, match=words):
        read_summary(path)


def test_a_table_keeps_its_cells(tmp_path):
    rows = [{'a': 'x\ry\r\nz', 'b': 'with, comma'}, {'a': '', 'b': '"'}]
    write_csv(tmp_path / 'table.csv', rows)
    assert read_csv(tmp_path / 'table.csv', 'a') == rows
    assert (tmp_path / 'table.csv').read_bytes().startswith(b'a,b\n')


def test_a_field_that_one_protocol_lacks_differs():
    here = {'models': {'a': {'mean': 1, 'std': 2}}, 'seed': 3}
    assert list(differences({'seed': 3}, here)) == [('models', None, here['models'])]
    assert list(differences(here, {'models': {'a': {'std': 4}}})) == [
        ('models.a.mean', 1, None),
        ('models.a.std', 2, 4),
        ('seed', 3, None),
    ]


def test_a_new_folder_can_be_locked_twice(tmp_path):
    for _ in range(2):
        with lock(tmp_path / 'new' / 'results'):
            assert (tmp_path / 'new' / 'results').is_dir()


def test_a_folder_without_results_is_refused(tmp_path):
    with pytest.raises(ValueError, match='holds no results'):
        read_protocol(tmp_path)


@pytest.mark.parametrize(
    'names',
    [
        ('lr 0.1', 'lr_0.1', 'lr%200.1'),
        ('pp@1', 'pp_1', 'pp-1', 'pp.1'),
        ('a/b', 'a:b', 'a_b', 'a', 'a//b'),
        ('\N{FOG}', '\N{SNOWFLAKE}', '_'),
        ('..', '.', '%2E', '...', '../out', '/etc'),
    ],
)
def test_every_model_has_a_folder_of_its_own_inside_the_results(tmp_path, names):
    errors = {name: {('clean', 0): 20 + place} for place, name in enumerate(names)}
    write_results(tmp_path / 'results', errors)
    rows = {row['model']: row['E'] for row in write_summary(tmp_path / 'results')}
    assert rows == {name: 20 + place for place, name in enumerate(names)}
    folders = {path.parent for path in tmp_path.rglob('*.npy')}
    assert {folder.parent for folder in folders} == {tmp_path / 'results' / 'predictions'} and len(folders) == len(
        names
    )


def test_a_corruption_without_a_severity_has_no_error(tmp_path):
    fog = {('fog', severity): 10 * severity for severity in FIVE}
    write_results(tmp_path, {'whole': fog, 'killed': {('fog', 1): 1, ('fog', 2): 2, **{('snow', s): 7 for s in FIVE}}})
    whole, killed = write_summary(tmp_path)
    assert whole['CE_fog'] == 30 and killed['CE_snow'] == 7 and 'CE_fog' not in killed
    assert {whole['severities'], killed['severities']} == {'1 2 3 4 5'}


def test_an_interval_spans_the_middle_95_percent_of_a_thousand_resamples():
    assert _interval(np.arange(1001)).tolist() == [25, 975]
    # A ratio to no errors is not a number, and counts as the worst.
    assert _interval(np.array([*range(900), *[np.nan] * 101])).tolist() == [25, np.inf]
    rates = _error_rates({'a': {('clean', 0): np.zeros(4, PREDICTION)}})['a'].clean
    assert len(rates) == 1 + 1000


def test_accuracies_and_size_of_a_row(tmp_path):
    write_results(tmp_path, {'a': {}}, images=12)
    protocol = json.loads((tmp_path / 'protocol.json').read_text())
    protocol['models']['a']['input_size'] = [3, 40, 48]
    (tmp_path / 'protocol.json').write_text(json.dumps(protocol))
    predictions = np.zeros(12, PREDICTION)
    predictions['rank'][:8] = [5, 5, 5, 5, 4, 3, 2, 1]
    write_predictions(predictions_path(tmp_path, 'a', 'clean', 0), predictions)
    (row,) = write_summary(tmp_path)
    assert (row['top1'], row['top1_err'], row['top5'], row['top5_err']) == (33.333, 66.667, 66.667, 33.333)
    assert (row['E'], row['img_size']) == (66.667, 48)


def test_the_mean_over_alexnet_in_percent(tmp_path):
    def means(folder, severities):
        errors = {(name, severity): 50 for name in TEST_CORRUPTIONS for severity in severities}
        write_results(tmp_path / folder, {'a': errors})
        (row,) = write_summary(tmp_path / folder)
        return row['plain_mCE'], row['alexnet_normalized_mCE']

    # 100 / 15 * (0.5 / 0.886428 + ... + 0.5 / 0.6065) = 64.673
    assert means('all', FIVE) == (50, 64.673)
    assert means('few', (1, 2, 3)) == (50, '')


def test_the_row_of_the_baseline():
    rows = [dict(model=model, baseline='b') for model in 'acb']
    assert baseline_row(rows) is rows[2] and baseline_row(rows[:1]) is baseline_row([]) is None


def test_a_ratio_needs_all_corruptions_of_the_baseline(tmp_path):
    whole = {('clean', 0): 30} | {(name, 1): 60 for name in TEST_CORRUPTIONS}
    fourteen = {key: wrong for key, wrong in whole.items() if key[0] != 'fog'}
    write_results(tmp_path, {'a': fourteen, 'b': whole})
    b = write_summary(tmp_path, 'a')[1]
    assert (b['plain_mCE'], b['relative_mCE'], b['R_net']) == (60, '', '')


def test_models_that_see_the_images_in_different_ways():
    rows = [dict(img_size=size, crop_pct=0.9, interpolation='bicubic') for size in (32, 32, 48)]
    assert view_differences(rows[:2]) == view_differences([]) == ''
    assert '32 pixels, crop 0.9, bicubic; 48 pixels' in view_differences(rows)


def test_twenty_errors_are_enough_for_any_number_of_images(tmp_path):
    """Rounding must not make 20 errors 19.999: 20 of 50 when clean, and 20 more over five severities."""
    for images, clean in ((50, 20), (2552, 20)):
        passes = {('clean', 0): clean} | {(name, severity): clean + 4 for name in TEST_CORRUPTIONS for severity in FIVE}
        write_results(tmp_path / str(images), {'a': passes}, images=images)
        (row,) = write_summary(tmp_path / str(images), 'a')
        assert (row['relative_mCE'], row['R_net']) == (100, 0)
