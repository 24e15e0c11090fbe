"""Corruptions that ImageNet-C lacks, such as those of ImageNet-C-bar."""

import numpy as np
import pytest
import torch
from test_labels import network, write_images
from test_results import FIVE, write_results

from timm_pushpull import evaluate_robustness, open_stored
from timm_pushpull.cli import main
from timm_pushpull.errors import InputError
from timm_pushpull.robustness.data import stored_corruptions
from timm_pushpull.robustness.metrics import TEST_CORRUPTIONS
from timm_pushpull.robustness.plots import measured_corruptions, plot_error_by_corruption, plot_error_by_severity
from timm_pushpull.robustness.store import read_predictions, read_protocol, write_protocol
from timm_pushpull.robustness.store import write_images as write_image_table
from timm_pushpull.robustness.summary import read_summary, write_summary


def write_stored(folder, *corruptions, severities=(1, 3)):
    for corruption in corruptions:
        for severity in severities:
            write_images(folder / corruption / str(severity), '0123')
    return folder


def write_summed(folder, passes):
    write_results(folder, {'a': passes, 'b': {('clean', 0): 4}}, images=10, classes=2)
    write_protocol(folder, {**read_protocol(folder), 'corruptions': {'stored_as': 'corruption/severity/class/file'}})
    write_image_table(folder, map(str, range(10)), [0] * 10, ['x', 'y'])
    return write_summary(folder)


def test_the_corruptions_of_a_folder(tmp_path):
    """Classes may be named as severities are, and kinds of corruptions may have folders."""
    write_stored(tmp_path / 'c', 'plasma', 'cocentric-sine', 'saturate', 'fog', 'weather/snow', 'bar/blue_noise')
    assert stored_corruptions(tmp_path / 'c') == ['fog', 'snow', 'saturate', 'blue_noise', 'cocentric-sine', 'plasma']
    (tmp_path / 'npy').mkdir()
    for name in ('labels', 'plasma', 'fog'):
        np.save(tmp_path / 'npy' / f'{name}.npy', np.zeros(5))
    assert stored_corruptions(tmp_path / 'npy') == ['fog', 'plasma']
    for folder in (tmp_path / 'missing', tmp_path / 'c' / 'plasma' / '1' / '0'):
        with pytest.raises(InputError, match='stored must be a folder of corruptions'):
            stored_corruptions(folder)


def test_other_corruptions_have_a_mean_of_their_own(tmp_path):
    passes = {(name, severity): 6 for name in TEST_CORRUPTIONS for severity in FIVE}
    passes |= {(name, severity): errors for name, errors in (('plasma', 2), ('a-b', 9)) for severity in FIVE}
    passes |= {('saturate', severity): 1 for severity in FIVE}
    a, b = write_summed(tmp_path / 'both', passes)
    assert (a['CE_plasma'], a['CE_a-b'], a['plain_mCE'], a['other_mCE'], b['other_mCE']) == (20, 90, 60, 55, '')
    assert a['other_mCE_low'] < 55 < a['other_mCE_high']
    assert [row['model'] for row in read_summary(tmp_path / 'both' / 'summary.csv')] == ['a', 'b']
    del passes['plasma', 3]
    a, _ = write_summed(tmp_path / 'part', passes)
    assert (a['plain_mCE'], a['CE_a-b'], a['other_mCE']) == (60, 90, '')
    alone = {key: errors for key, errors in passes.items() if key[0] == 'a-b'}
    a, _ = write_summed(tmp_path / 'alone', alone)
    assert (a['plain_mCE'], a['other_mCE']) == ('', 90)


def test_the_page_has_other_corruptions(tmp_path, undrawn):
    pytest.importorskip('matplotlib')
    from test_report import Page

    from timm_pushpull.robustness.report import write_report

    passes = {(name, severity): 6 for name in ('fog', 'snow') for severity in FIVE}
    passes |= {(name, severity): errors for name, errors in (('plasma', 2), ('a-b', 9)) for severity in FIVE}
    rows = write_summed(tmp_path, passes)
    page = Page(write_report([tmp_path], tmp_path / 'page'))
    assert page.row('plasma')[0].startswith('plasma  20.0') and page.row('a-b')[0].startswith('a-b  90.0')
    assert 'other mCE' in page.row('model')[0] and page.row('a')[0].split('  ')[2].startswith('55.0')
    assert measured_corruptions(rows) == ['snow', 'fog', 'a-b', 'plasma']
    lines = [line.get_ydata()[0] for line in plot_error_by_corruption(rows).axes[0].lines if len(line.get_xdata()) == 2]
    assert 1.5 in lines  # between the kinds
    panels = {axes.get_title(): axes for axes in plot_error_by_severity(read_predictions(tmp_path)).axes}
    assert panels['other'].lines[0].get_xydata()[-1].tolist() == [5, 55]


def test_command(tmp_path, capsys):
    folder = write_stored(tmp_path / 'c', 'plasma', 'bar/a-b')
    torch.save(network(4).state_dict(), tmp_path / 'net.pth')
    arguments = ['robustness', 'net=test_resnet', '--num-classes', '4', '--checkpoint', tmp_path / 'net.pth']
    arguments += ['--stored', folder, '--output', tmp_path / 'out', '--input-size', '3', '32', '32', '--workers', '0']
    arguments = [str(word) for word in (*arguments, '--severities', '1', '3')]
    assert main(arguments) == 2
    assert 'name corruptions and severities that it has, or all corruptions.' in capsys.readouterr().err
    assert main([*arguments, '--corruptions', 'all']) == 0
    keys = [('a-b', 1), ('a-b', 3), ('plasma', 1), ('plasma', 3)]
    assert sorted(read_predictions(tmp_path / 'out')['net']) == keys
    assert 'other_mCE' in capsys.readouterr().out
    with pytest.raises(InputError, match='stored must be opened with plasma at severity 4'):
        stored = open_stored(folder, ['plasma'], [1])
        evaluate_robustness({'a': network(4)}, tmp_path / 'b', stored=stored, corruptions=['plasma'], severities=[4])
    with pytest.raises(InputError, match='corruptions must not be named clean'):
        open_stored(write_stored(tmp_path / 'd', 'clean'), ['clean'], [1])


def test_all_generated_corruptions_are_the_15_and_4_more(tmp_path):
    pytest.importorskip('imagecorruptions')
    write_images(tmp_path / 'data', 'ab', images=1)
    torch.save(network(2).state_dict(), tmp_path / 'net.pth')
    arguments = ['robustness', 'net=test_resnet', '--num-classes', '2', '--checkpoint', tmp_path / 'net.pth']
    arguments += ['--data-dir', tmp_path / 'data', '--output', tmp_path / 'out', '--input-size', '3', '32', '32']
    arguments += ['--workers', '0', '--severities', '1', '--corruptions', 'all']
    assert main([str(word) for word in arguments]) == 0
    assert len(read_predictions(tmp_path / 'out')['net']) == 1 + 15 + 4
