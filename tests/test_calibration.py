import json

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from test_labels import logits_of, network, write_images
from test_results import write_results

from timm_pushpull import evaluate_robustness, open_dataset
from timm_pushpull.cli.printing import print_summary
from timm_pushpull.errors import InputError
from timm_pushpull.robustness.calibration import (
    CALIBRATION,
    brier_scores,
    expected_calibration_error,
    negative_log_likelihoods,
    reliability_bins,
)
from timm_pushpull.robustness.metrics import TEST_CORRUPTIONS
from timm_pushpull.robustness.store import (
    PREDICTION,
    UNREADABLE,
    predictions_path,
    read_predictions,
    write_predictions,
)
from timm_pushpull.robustness.summary import measures_of, read_summary, write_summary

PROBABILITIES = np.array([[0.7, 0.2, 0.1], [0.25, 0.25, 0.5], [0.1, 0.6, 0.3]])


def test_scores_by_hand():
    targets = np.array([0, 1, 2])
    nll = negative_log_likelihoods(np.log(PROBABILITIES), targets)
    assert nll == pytest.approx([0.356675, 1.386294, 1.203973], abs=1e-6)  # -ln 0.7, -ln 0.25, -ln 0.3
    # 0.3^2 + 0.2^2 + 0.1^2; 0.25^2 + 0.75^2 + 0.5^2; 0.1^2 + 0.6^2 + 0.7^2
    assert brier_scores(PROBABILITIES, targets) == pytest.approx([0.14, 0.875, 0.86])


def test_bins_by_hand():
    # 2/15 is the end of the second bin, and not in the third.
    confidences, correct = np.array([0.05, 2 / 15, 0.14, 0.62, 0.66, 1.0, 0.0]), np.array([1, 0, 1, 0, 1, 1, 0])
    bins = reliability_bins(confidences, correct)
    assert bins[:, 0].tolist() == [2, 1, 1, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 1]
    assert bins[[0, 1, 2, 9, 14], 1:] == pytest.approx(
        np.array([[0.025, 0.5], [2 / 15, 0], [0.14, 1], [0.64, 0.5], [1, 1]])
    )
    # (2 * 0.475 + 2 / 15 + 0.86 + 2 * 0.14 + 0) / 7
    assert expected_calibration_error(confidences, correct) == pytest.approx(2.2233333 / 7)
    assert expected_calibration_error(np.array([0.9, 0.9, 0.9, 0.9]), np.array([1, 1, 1, 0])) == pytest.approx(0.15)
    assert np.isnan(expected_calibration_error(np.array([]), np.array([])))


def test_probabilities_are_kept_beside_the_predictions(tmp_path):
    model, images = network(12), open_dataset(write_images(tmp_path / 'data', 'abcd'))
    (tmp_path / 'labels.txt').write_text('7\n2\n11\n0\n')
    evaluate_robustness({'a': model}, tmp_path / 'out', images, corruptions=[], valid_labels=tmp_path / 'labels.txt')
    found = read_predictions(tmp_path / 'out')['a']['clean', 0]
    probabilities = logits_of(model, images)[:, [7, 2, 11, 0]].softmax(1)
    targets = torch.tensor([target for _, target in images.reader.samples])
    assert found['confidence'] == pytest.approx(probabilities.max(1).values.numpy(), rel=1e-3)
    nll = torch.nn.functional.nll_loss(probabilities.log(), targets, reduction='none')
    assert found['nll'] == pytest.approx(nll.numpy(), rel=1e-3)
    brier = (probabilities - torch.nn.functional.one_hot(targets, 4)).square().sum(1)
    assert found['brier'] == pytest.approx(brier.numpy(), rel=1e-3, abs=1e-6)


def predictions(rank, confidence, nll, brier):
    array = np.zeros(len(rank), PREDICTION)
    for field, values in dict(rank=rank, confidence=confidence, nll=nll, brier=brier).items():
        array[field] = values
    return array


CLEAN = predictions([0, 1, 0, UNREADABLE], [0.9, 0.9, 0.3, np.nan], [0.1, 2, 1.2, np.nan], [0.02, 1.7, 0.8, np.nan])
FOG = predictions([1, 1, 0, 0], [0.5, 0.5, 0.5, 0.8], [1, 2, 0.7, 0.2], [0.9, 1.1, 0.5, 0.1])
OTHERS = predictions([0, 0, 0, 0], [0.7] * 4, [0.4] * 4, [0.18] * 4)


def write_calibrated(folder, **changes):
    write_results(folder, {'a': {}}, images=4, classes=3)
    passes = {('clean', 0): CLEAN}
    passes |= {(name, severity): FOG if name == 'fog' else OTHERS for name in TEST_CORRUPTIONS for severity in (2, 4)}
    for key, array in passes.items():
        write_predictions(predictions_path(folder, 'a', *key), array)
    return folder


def test_a_summary_has_the_calibration(tmp_path):
    (row,) = write_summary(write_calibrated(tmp_path))
    # ECE: (|2 * 0.9 - 1| + |0.3 - 1|) / 3 when clean; (|3 * 0.5 - 1| + |0.8 - 1|) / 4 in fog; 0.3 elsewhere.
    assert row['ECE'] == pytest.approx(50) and row['mean_ECE'] == pytest.approx((14 * 30 + 17.5) / 15, abs=1e-3)
    assert row['NLL'] == pytest.approx(1.1) and row['Brier'] == pytest.approx(0.84)
    assert row['mean_NLL'] == pytest.approx((14 * 0.4 + 0.975) / 15, abs=1e-3)
    assert row['mean_Brier'] == pytest.approx((14 * 0.18 + 0.65) / 15, abs=1e-3)
    assert row['NLL_low'] < row['NLL'] < row['NLL_high'] and row['mean_NLL_low'] < row['mean_NLL_high'] < 1
    assert row['ECE_low'] == row['mean_ECE_high'] == ''
    assert read_summary(tmp_path / 'summary.csv') == [row]


def test_a_mean_needs_all_corruptions(tmp_path):
    predictions_path(write_calibrated(tmp_path), 'a', 'fog', 4).unlink()
    (row,) = write_summary(tmp_path)
    assert row['ECE'] == 50 and row['mean_ECE'] == row['mean_NLL'] == row['mean_Brier'] == ''


def test_the_terminal_shows_the_calibration(tmp_path, capsys):
    print_summary(write_summary(write_calibrated(tmp_path)))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ['NLL', '1.100'] in lines and ['ECE', '50.00'] in lines and ['mean_Brier', '0.211'] in lines
    assert lines[-2][:5] == ['in', '%,', 'NLL', 'in', 'nats,']


def test_a_table_without_calibration_is_read():
    rows = read_summary(REPOSITORY / 'hub_configs' / 'robustness_r64_imagenette.csv')
    assert not {*CALIBRATION} & {*measures_of(rows)}


def test_real_labels_have_a_confidence_alone(tmp_path):
    folder = write_images(tmp_path / 'data', ['n01440764', 'n02102040'], images=1)
    for number, path in enumerate(sorted(folder.rglob('*.png')), 1):
        path.rename(path.with_name(f'ILSVRC2012_val_{number:08d}.png'))
    (tmp_path / 'real.json').write_text(json.dumps([[0, 217], [217]]))
    options = dict(corruptions=[], real_labels=tmp_path / 'real.json')
    (row,) = evaluate_robustness({'a': network()}, tmp_path / 'out', open_dataset(folder), **options)
    assert row['ECE'] != '' and row['NLL'] == row['Brier'] == ''


@pytest.mark.parametrize('field, value', [('confidence', 1.01), ('confidence', -0.1), ('nll', -1), ('brier', 2.1)])
def test_values_that_cannot_be_are_refused(field, value, tmp_path):
    path = predictions_path(write_calibrated(tmp_path), 'a', 'fog', 4)
    array = np.load(path)
    array[field][1] = value
    write_predictions(path, array)
    with pytest.raises(InputError, match='fog-4.npy does not hold predictions'):
        read_predictions(tmp_path)


def test_the_reliability_diagram_has_the_bins(tmp_path):
    pytest.importorskip('matplotlib')
    from timm_pushpull.robustness.plots import plot_reliability

    few = predictions([0] * 19, [0.1] * 19, [0] * 19, [0] * 19)
    many = predictions([0] * 6 + [1] * 14, [0.5] * 20, [0] * 20, [0] * 20)
    fog = predictions([0] * 12 + [1] * 8, [0.8] * 20, [0] * 20, [0] * 20)
    found = {'a': {('clean', 0): np.concatenate([few, many]), ('fog', 1): fog, ('saturate', 1): many}}
    clean, corrupted = plot_reliability(found).axes
    assert [axes.get_title() for axes in (clean, corrupted)] == ['clean', 'corrupted']
    assert clean.lines[1].get_xydata() == pytest.approx(np.array([[0.5, 0.3]]))
    assert corrupted.lines[1].get_xydata() == pytest.approx(np.array([[0.8, 0.6]]))
    (corrupted,) = plot_reliability({'a': {('clean', 0): few, ('fog', 1): fog}, 'b': {('clean', 0): few}}).axes
    assert corrupted.get_title() == 'corrupted' and [line.get_label() for line in corrupted.lines[1:]] == ['a']
    assert plot_reliability({'a': {('clean', 0): few}}) is None
    many['rank'], many['confidence'] = UNREADABLE, np.nan
    assert plot_reliability({'a': {('clean', 0): many}}) is None


def test_the_page_has_the_calibration(tmp_path, undrawn):
    pytest.importorskip('matplotlib')
    from test_report import Page

    from timm_pushpull.robustness.report import write_report
    from timm_pushpull.robustness.store import write_images as write_image_table

    write_calibrated(tmp_path / 'results')
    write_image_table(tmp_path / 'results', 'pqrs', [0, 1, 2, 0], 'xyz')
    page = Page(write_report([tmp_path / 'results'], tmp_path / 'page'))
    head = 'model  ECE  NLL  Brier  mean ECE  mean NLL  mean Brier'
    assert head in page.row('model') and (tmp_path / 'page' / 'reliability.png').is_file()
    cells = page.row('a')[1].split('  ')[1:]
    assert [cell.split()[0] for cell in cells] == ['50.0', '1.100', '0.840', '29.2', '0.438', '0.211']
