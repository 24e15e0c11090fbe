import csv
import json
import shutil

import numpy as np
import pytest
import torch
from test_labels import SYNSETS, TEN, check, logits_of, network, write_images
from test_results import write_results

from timm_pushpull import evaluate_robustness, open_dataset
from timm_pushpull.cli import main
from timm_pushpull.robustness.report import write_report
from timm_pushpull.robustness.shifts import shift_rows
from timm_pushpull.robustness.store import (
    PREDICTION,
    UNREADABLE,
    find_shifted,
    predictions_path,
    read_predictions,
    read_protocol,
    shifted_folder,
    write_predictions,
)
from timm_pushpull.robustness.store import (
    write_images as write_image_table,
)


def write_shift(folder, name, ranks, classes):
    """Write a natural shift of the model a with these ranks, or of models with the ranks of each."""
    of_models = ranks if isinstance(ranks, dict) else {'a': ranks}
    ranks = next(iter(of_models.values()))
    path = folder if name is None else shifted_folder(folder, name)
    path.parent.mkdir(exist_ok=True)
    write_results(path, {model: {} for model in of_models}, images=len(ranks), classes=len(classes))
    if name is not None:
        protocol = json.loads((path / 'protocol.json').read_text())
        protocol['corruptions'] = {'shift': name}
        (path / 'protocol.json').write_text(json.dumps(protocol))
    write_image_table(path, map(str, range(len(ranks))), [0] * len(ranks), classes)
    for model, ranks in of_models.items():
        predictions = np.zeros(len(ranks), PREDICTION)
        predictions['rank'] = ranks
        write_predictions(predictions_path(path, model, 'clean', 0), predictions)
    return path


def test_rows_by_hand(tmp_path):
    write_shift(tmp_path, None, [0] * 90 + [3] * 8 + [5] * 2, ['x', 'y'])
    write_shift(tmp_path, 'same', [0] * 120 + [2] * 40 + [4] * 10 + [5] * 30 + [UNREADABLE] * 7, ['x', 'y'])
    write_shift(tmp_path, 'other', [0, 5, 5, 5], ['x', 'z'])
    write_shift(tmp_path, 'numbers', [0, 1, 1, 5, 5], ['0', '1'])
    numbers, other, same = shift_rows(tmp_path)
    assert [row['shift'] for row in (numbers, other, same)] == ['numbers', 'other', 'same']
    assert (same['model'], same['images'], same['classes']) == ('a', 200, 2)
    assert (same['top1_err'], same['top5_err'], same['error_increase']) == (40, 15, 30)
    # 1.96 standard deviations: of 0.4 among 200, 6.8 points; of 0.15, 4.9; of the increase with 0.1 among 100, 9.0.
    for measure, half in (('top1_err', 6.8), ('top5_err', 4.9), ('error_increase', 9.0)):
        assert same[f'{measure}_high'] - same[measure] == pytest.approx(half, abs=1)
        assert same[measure] - same[f'{measure}_low'] == pytest.approx(half, abs=1)
    assert (other['top1_err'], other['top5_err'], other['error_increase'], other['error_increase_low']) == (
        75,
        75,
        '',
        '',
    )
    assert (numbers['top1_err'], numbers['top5_err'], numbers['error_increase']) == (80, 40, 70)


def test_a_drop_is_of_independent_images(tmp_path):
    """As many shifted images as clean ones, with the same ranks: other resamples, so an interval around 0."""
    ranks = [0] * 80 + [1] * 20
    write_shift(tmp_path, None, ranks, ['x', 'y'])
    write_shift(tmp_path, 's', ranks, ['x', 'y'])
    (row,) = shift_rows(tmp_path)
    assert row['error_increase'] == 0 and row['error_increase_low'] < -5 and row['error_increase_high'] > 5


def test_shifts_are_measured_beside_the_clean_images(tmp_path, caplog):
    model = network()
    three = [TEN[4], TEN[1], SYNSETS[333]]
    clean = open_dataset(write_images(tmp_path / 'data', images=2))
    shifts = {'imagenet a/r': open_dataset(write_images(tmp_path / 'three', three, images=5))}
    shifts['same'] = open_dataset(write_images(tmp_path / 'ten', images=1))
    options = dict(corruptions=[], shifted=shifts, limit=12)
    evaluate_robustness({'net': model}, tmp_path / 'out', clean, **options)
    found = find_shifted(tmp_path / 'out')
    assert list(found) == ['imagenet a/r', 'same'] and found['same'] == tmp_path / 'out' / 'shifted' / 'same'
    predictions = read_predictions(found['imagenet a/r'])['net']
    indices = sorted(SYNSETS.index(label) for label in three)
    logits = logits_of(model, shifts['imagenet a/r'])[:, indices]
    logits = logits[[row for row in range(15) if row % 5 < 4]]  # four of each class
    assert list(predictions) == [('clean', 0)]
    assert predictions['clean', 0]['prediction'].tolist() == logits.argmax(1).tolist()
    check(read_predictions(tmp_path / 'out')['net']['clean', 0], *ten_of(model, clean))
    with open(tmp_path / 'out' / 'shifted.csv') as file:
        a_r, same = csv.DictReader(file)
    assert (a_r['model'], a_r['shift'], a_r['images'], a_r['classes'], a_r['error_increase']) == (
        'net',
        'imagenet a/r',
        '12',
        '3',
        '',
    )
    assert (same['images'], same['classes']) == ('10', '10') and same['error_increase'] != ''
    # What is there is kept, another model joins, and other images are refused before anything runs.
    path = predictions_path(found['same'], 'net', 'clean', 0)
    before = path.stat().st_mtime_ns
    evaluate_robustness({'net': model, 'b': network(seed=1)}, tmp_path / 'out', clean, **options)
    assert path.stat().st_mtime_ns == before and len(shift_rows(tmp_path / 'out')) == 4
    with pytest.raises(ValueError, match=r'shifted/same holds results of another protocol: data.images is 10 there'):
        shifts = {'new': shifts['same'], 'same': shifts['imagenet a/r']}
        evaluate_robustness({'c': network(seed=2)}, tmp_path / 'out', clean, corruptions=[], shifted=shifts, limit=12)
    assert 'c' not in read_protocol(tmp_path / 'out')['models'] and len(find_shifted(tmp_path / 'out')) == 2


def test_a_shift_that_a_model_does_not_fit_is_named(tmp_path):
    clean, other = (open_dataset(write_images(tmp_path / name, name, images=1)) for name in ('abc', 'abcde'))
    with pytest.raises(ValueError, match='shifted other: net has 3 classes, but the images have 5'):
        evaluate_robustness({'net': network(3)}, tmp_path / 'out', clean, corruptions=[], shifted={'other': other})


def ten_of(model, images):
    """Return the logits of the ten classes for the first 12 images that the limit takes, and their classes."""
    rows = [index for index in range(20) if index % 2 == 0 or index in (1, 11)]
    logits = logits_of(model, images)[rows][:, [SYNSETS.index(label) for label in TEN]]
    return logits, [images.reader.samples[row][1] for row in rows]


def test_results_without_shifts_have_none(tmp_path):
    write_shift(tmp_path, None, [0], ['x', 'y'])
    assert shift_rows(tmp_path) == [] and find_shifted(tmp_path) == {}


def test_a_folder_of_another_shift_is_refused(tmp_path):
    write_shift(tmp_path, None, [0], ['x', 'y'])
    path = write_shift(tmp_path, 'a', [0], ['x', 'y'])
    path.rename(path.with_name('b'))
    with pytest.raises(ValueError, match='shifted/b does not hold results of the shift by which it is named'):
        shift_rows(tmp_path)
    shutil.rmtree(path.with_name('b'))
    path.mkdir()
    with pytest.raises(ValueError, match='shifted/a holds no results'):
        shift_rows(tmp_path)


def test_the_page_has_the_shifts(tmp_path, undrawn):
    pytest.importorskip('matplotlib')
    from test_report import Page

    write_shift(tmp_path, None, [0] * 9 + [5], ['x', 'y'])
    write_shift(tmp_path, 'sketch <1>', [0] * 6 + [1] + [5] * 3, ['x', 'y'])
    page = Page(write_report([tmp_path, tmp_path], tmp_path / 'page'))
    head, row = page.row('model')[1], page.row('a')[1]
    assert head.split('  ') == ['model', 'shift', 'images', 'classes', 'top1 err', 'top5 err', 'error increase']
    assert row.split('  ')[1:4] == ['sketch <1>', '10', '2'] and len(page.row('a')) == 3
    assert [cell.split()[0] for cell in row.split('  ')[4:]] == ['40.0', '30.0', '30.0']
    alone = Page(write_report([shifted_folder(tmp_path, 'sketch <1>')], tmp_path / 'alone'))
    assert any('natural shift sketch <1>, without corruptions' in text for text in alone.texts)


def test_the_page_has_the_shifts_over_training_runs(tmp_path, undrawn, monkeypatch):
    pytest.importorskip('matplotlib')
    from test_report import Page

    from timm_pushpull.robustness import plots

    drawn, plot = [], plots.plot_overview
    monkeypatch.setattr(plots, 'plot_overview', lambda *rows: drawn.append(rows) or plot(*rows))
    write_shift(tmp_path, None, {'a@1': [0] * 9 + [5], 'a@2': [0] * 7 + [5] * 3}, ['x', 'y'])
    write_shift(tmp_path, 's', {'a@1': [0] * 6 + [5] * 4, 'a@2': [0] * 2 + [5] * 8}, ['x', 'y'])
    page = Page(write_report([tmp_path], tmp_path / 'page'))
    # 40 and 80 % are wrong, 10 and 30 of the clean images.
    assert page.row('a')[1].split('  ')[1:5] == ['2', 's', '10', '2']
    assert [cell.split() for cell in page.row('a')[1].split('  ')[5:]] == [
        ['60.0', '40.0', 'to', '80.0'],
        ['60.0', '40.0', 'to', '80.0'],
        ['40.0', '30.0', 'to', '50.0'],
    ]
    (means, shifts) = drawn[0]
    assert [(row['model'], row['E']) for row in means] == [('a', 20)]
    assert [(row['model'], row['shift'], row['top1_err']) for row in shifts] == [('a', 's', 60)]
    single = [row.split('  ')[1].split()[0] for row in (*page.row('a@1'), *page.row('a@2'))]
    assert single == ['10.0', 's', '30.0', 's']


def test_command(tmp_path, capsys):
    pytest.importorskip('imagecorruptions')
    data = write_images(tmp_path / 'data', 'abcd')
    other = write_images(tmp_path / 'other', 'abcd', images=1)
    torch.save(network(4).state_dict(), tmp_path / 'net.pth')
    arguments = ['robustness', 'net=test_resnet', '--num-classes', '4', '--checkpoint', tmp_path / 'net.pth']
    arguments += ['--data-dir', data, '--output', tmp_path / 'out', '--input-size', '3', '32', '32']
    arguments = [str(word) for word in (*arguments, '--workers', '0', '--corruptions', 'fog', '--severities', '2')]
    for shifted, message in [
        (['other'], "--shifted must be NAME=FOLDER with another name for each set, got 'other'"),
        ([f'a={data}', f'a={other}'], f"got 'a={other}'"),
        (['a=missing'], '--shifted a=missing: data_dir must be a folder of images, missing is not one'),
        ([f'={data}'], 'shifted must name each set of images, got an empty name'),
    ]:
        assert main([*arguments, '--shifted', *shifted]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count('\n') == 1 and not (tmp_path / 'out').exists()
    assert main([*arguments, '--shifted', f'one={other}', f'two={data}']) == 0
    one, two = shift_rows(tmp_path / 'out')
    assert (one['images'], two['images'], two['error_increase']) == (4, 12, 0)
    out, err = capsys.readouterr()
    assert any(line.startswith('net on one, 4 images of 4 classes:  top-1 error ') for line in out.splitlines())
    assert '\n12 images of 4 classes' in f'\n{err}' and '\none: 4 images of 4 classes' in err and 'two:' in err
