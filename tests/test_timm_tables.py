import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_labels import network, write_images
from test_results import FIVE, write_results

from timm_pushpull.cli import main
from timm_pushpull.robustness.metrics import TEST_CORRUPTIONS
from timm_pushpull.robustness.shifts import shift_rows
from timm_pushpull.robustness.store import (
    PREDICTION,
    UNREADABLE,
    predictions_path,
    read_csv,
    shifted_folder,
    write_predictions,
)
from timm_pushpull.robustness.store import write_images as write_image_table
from timm_pushpull.robustness.timm_tables import write_timm_tables

COLUMNS = 'model img_size top1 top1_err top5 top5_err param_count crop_pct interpolation'.split()
DIFFERENCES = ['top1_diff', 'top5_diff', 'rank_diff']
MODELS = {
    'a': dict(input_size=[3, 40, 32], crop_pct=0.9, param_count=1014.452),
    'b': dict(input_size=[3, 40, 48], crop_pct=1.0, param_count=5.0),
    'c': dict(input_size=[3, 40, 64], crop_pct=0.875, param_count=25.557),
    'd': dict(input_size=[3, 40, 80], crop_pct=0.95, param_count=1.5),
}
TIMM = Path(os.environ.get('TIMM_SCRIPTS', '/no checkout')) / 'results' / 'generate_csv_results.py'


def write_folder(folder, ranks, classes=('x', 'y'), shift=None, **data):
    """Write a results folder: for each model the ranks of each pass."""
    path = folder if shift is None else shifted_folder(folder, shift)
    path.parent.mkdir(exist_ok=True)
    images = len(next(iter(next(iter(ranks.values())).values())))
    write_results(path, {name: {} for name in ranks}, images=images, classes=len(classes))
    protocol = json.loads((path / 'protocol.json').read_text())
    protocol['data'] |= data
    protocol['models'] = {name: dict(MODELS[name], interpolation='bicubic') for name in ranks}
    if shift is not None:
        protocol['corruptions'] = {'shift': shift}
    (path / 'protocol.json').write_text(json.dumps(protocol))
    write_image_table(path, map(str, range(images)), [0] * images, classes)
    for name, passes in ranks.items():
        for key, of_images in passes.items():
            predictions = np.zeros(images, PREDICTION)
            predictions['rank'] = of_images
            write_predictions(predictions_path(path, name, *key), predictions)
    return path


def first(right, in_top5, wrong, unreadable=0):
    return [0] * right + [3] * in_top5 + [5] * wrong + [UNREADABLE] * unreadable


def corrupted(start):
    """Return passes: of 60 images start - 4 s are right at severity s, under JPEG 15 fewer; 7 more are in the top 5."""
    return {
        (name, s): first(right := start - 4 * s - 15 * (name == 'jpeg_compression'), 7, 53 - right)
        for name in TEST_CORRUPTIONS
        for s in FIVE
    }


def clean(*numbers):
    return {('clean', 0): first(*numbers)}


def four_models(folder, **data):
    held_out = {('saturate', 1): first(0, 0, 60)}
    models = {
        'a': clean(54, 3, 3) | corrupted(40) | held_out,
        'b': clean(48, 9, 3) | corrupted(50),
        'c': clean(40, 8, 2, 10) | corrupted(45),
        'd': clean(57, 1, 2) | {key: ranks for key, ranks in corrupted(52).items() if key != ('fog', 3)},
    }
    return write_folder(folder, models, **data)


def read(path):
    with open(path, newline='') as file:
        return list(csv.reader(file))


def test_the_table_of_corruptions_by_hand(tmp_path):
    four_models(tmp_path)
    assert write_timm_tables(tmp_path) == [tmp_path / 'results-clean.csv', tmp_path / 'results-imagenet-c.csv']
    # 57, 54, 48 of 60 are right; c has 40 of 50, as many as b, and fewer in the top five.
    assert read(tmp_path / 'results-clean.csv') == [
        COLUMNS,
        ['d', '80', '95.000', '5.000', '96.667', '3.333', '1.50', '0.950', 'bicubic'],
        ['a', '32', '90.000', '10.000', '95.000', '5.000', '1,014.45', '0.900', 'bicubic'],
        ['c', '64', '80.000', '20.000', '96.000', '4.000', '25.56', '0.875', 'bicubic'],
        ['b', '48', '80.000', '20.000', '95.000', '5.000', '5.00', '1.000', 'bicubic'],
    ]
    # Right on the mean: start - 12 - 1 of 60, so 27, 37, 32; 7 more in the top five.
    assert read(tmp_path / 'results-imagenet-c.csv') == [
        COLUMNS + DIFFERENCES,
        [*'b 48 61.667 38.333 73.333 26.667 5.00 1.000 bicubic -18.333 -21.667 +3'.split()],
        [*'c 64 53.333 46.667 65.000 35.000 25.56 0.875 bicubic -26.667 -31.000 +1'.split()],
        [*'a 32 45.000 55.000 56.667 43.333 1,014.45 0.900 bicubic -45.000 -38.333 -1'.split()],
    ]


def test_shifts_are_compared_with_clean_images_of_their_classes(tmp_path):
    two = {'a': clean(54, 3, 3), 'b': clean(48, 9, 3)}
    write_folder(tmp_path, two)
    write_folder(tmp_path, {'a': clean(10, 5, 5), 'b': clean(11, 2, 7), 'd': clean(1, 9, 10)}, shift='sketch')
    write_folder(tmp_path, {'b': clean(2, 3, 5), 'a': clean(1, 7, 2)}, ('x', 'z'), shift='imagenet a')
    write_folder(tmp_path, {'b': clean(19, 1, 0), 'a': clean(15, 4, 1)}, ('x', 'z'), shift='imagenet a-clean')
    write_folder(tmp_path, {'a': clean(1, 7, 2)}, ('v', 'w'), shift='other')
    write_folder(tmp_path, {'a': clean(8, 2, 10)}, shift='v2')
    write_folder(tmp_path, {'a': clean(14, 1, 5)}, shift='v2-clean')  # comes before the clean images, 90
    names = ['clean', 'imagenet%20a', 'imagenet%20a-clean', 'other', 'sketch', 'v2', 'v2-clean']
    assert write_timm_tables(tmp_path) == [tmp_path / f'results-{name}.csv' for name in names]

    def columns(name, *wanted):
        return [[row[column] for column in wanted] for row in read_csv(tmp_path / f'results-{name}.csv')]

    shown = 'model', 'top1', 'top5', *DIFFERENCES
    # 90, 95 and 80, 95 on the clean images: b is second there and first here.
    assert columns('sketch', *shown) == [
        ['b', '55.000', '65.000', '-25.000', '-30.000', '+1'],
        ['a', '50.000', '75.000', '-40.000', '-20.000', '-1'],
        ['d', '5.000', '50.000', '', '', ''],
    ]
    assert columns('imagenet%20a', *shown) == [
        ['b', '20.000', '50.000', '-75.000', '-50.000', '0'],
        ['a', '10.000', '80.000', '-65.000', '-15.000', '0'],
    ]
    assert read(tmp_path / 'results-imagenet%20a-clean.csv')[0] == COLUMNS
    assert columns('imagenet%20a-clean', 'model', 'top1') == [['b', '95.000'], ['a', '75.000']]
    assert columns('other', *shown) == [['a', '10.000', '80.000', '', '', '']]
    assert columns('v2', *shown) == [['a', '40.000', '50.000', '-30.000', '-25.000', '0']]
    drops = {(row['shift'], row['model']): row['error_increase'] for row in shift_rows(tmp_path)}
    assert (drops['imagenet a', 'b'], drops['sketch', 'a'], drops['other', 'a'], drops['v2', 'a']) == (75, 40, '', 30)


def test_real_labels_have_no_base(tmp_path):
    four_models(tmp_path, real_labels_sha256='00')
    write_folder(tmp_path, {'a': clean(10, 5, 5)}, shift='sketch')
    assert write_timm_tables(tmp_path) == [tmp_path / 'results-sketch.csv']
    assert read(tmp_path / 'results-sketch.csv')[1][-3:] == ['', '', '']
    assert [row['error_increase'] for row in shift_rows(tmp_path)] == [
        ''
    ]  # the labels of one are not those of the other


@pytest.mark.parametrize('name', ['clean', 'imagenet-c'])
def test_a_shift_cannot_have_the_name_of_another_table(tmp_path, name):
    with pytest.raises(ValueError, match=f'must not name a set {name}: that is the name of another table'):
        shifted_folder(tmp_path, name)


@pytest.mark.skipif(not TIMM.exists(), reason='set TIMM_SCRIPTS to a checkout of timm')
def test_timms_own_program_leaves_the_tables_as_they_are(tmp_path):
    pytest.importorskip('pandas')
    results = four_models(tmp_path / 'results')
    write_folder(results, {'a': clean(10, 5, 5), 'c': clean(11, 2, 7), 'd': clean(1, 9, 10)}, shift='sketch')
    write_timm_tables(results)
    tables = [('imagenet', 'clean'), ('imagenet-real', 'imagenet-c'), ('sketch', 'sketch')]
    tables += [('imagenetv2-matched-frequency', 'sketch'), ('imagenet-a-clean', 'clean'), ('imagenet-a', 'imagenet-c')]
    tables += [('imagenet-r-clean', 'clean'), ('imagenet-r', 'sketch')]
    for name, ours in tables:
        rows = read_csv(results / f'results-{ours}.csv')
        keep = [column for column in rows[0] if column not in DIFFERENCES]
        with open(tmp_path / f'results-{name}.csv', 'w', newline='') as file:  # timm computes the differences
            writer = csv.DictWriter(file, keep, extrasaction='ignore')
            writer.writeheader()
            writer.writerows({**row, 'param_count': row['param_count'].replace(',', '')} for row in rows)
    program = TIMM.read_text().replace('== model)[0])', '== model)[0].item())')  # for the numpy of today
    subprocess.run([sys.executable, '-c', program], cwd=tmp_path, check=True)
    for name, ours in tables:
        assert (tmp_path / f'results-{name}.csv').read_text() == (results / f'results-{ours}.csv').read_text(), name


def test_the_command_writes_them(tmp_path, capsys):
    pytest.importorskip('imagecorruptions')
    data = write_images(tmp_path / 'data', 'abcd', images=1)
    torch.save(network(4).state_dict(), tmp_path / 'net.pth')
    arguments = ['robustness', 'net=test_resnet', '--num-classes', '4', '--checkpoint', tmp_path / 'net.pth']
    arguments += ['--data-dir', data, '--output', tmp_path / 'out', '--input-size', '3', '32', '32', '--workers', '0']
    arguments += ['--shifted', f'same={data}']
    assert main([str(word) for word in arguments]) == 0
    (row,) = read_csv(tmp_path / 'out' / 'results-imagenet-c.csv')
    (summary,) = read_csv(tmp_path / 'out' / 'summary.csv')
    assert float(row['top1_err']) == pytest.approx(float(summary['plain_mCE']), abs=1e-3)
    assert (row['model'], row['img_size']) == ('net', '32') and row['top1_diff'] != '' != row['rank_diff']
    (same,) = read_csv(tmp_path / 'out' / 'results-same.csv')
    assert (same['top1_diff'], same['top5_diff'], same['rank_diff']) == ('+0.000', '+0.000', '0')
    assert 'In the columns of timm: results-*.csv.' in capsys.readouterr().out
