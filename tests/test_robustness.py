import csv
import json
import shutil

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_dataset, create_loader, create_transform

from timm_pushpull import robustness
from timm_pushpull.cli import main
from timm_pushpull.corruptions import corrupt
from timm_pushpull.measures import TEST_CORRUPTIONS, net_error_reduction
from timm_pushpull.robustness import evaluate_robustness, read_answers, stratified_indices, summarize

pytest.importorskip('imagecorruptions')
GEOMETRY = dict(input_size=(3, 32, 32), crop_pct=0.8, interpolation='bilinear', mean=(0.5,) * 3, std=(0.25,) * 3)
FEW = dict(corruptions=['gaussian_noise', 'contrast'], severities=[1, 5])


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """Seven pictures of each of three classes, of stripes across, along and slanting."""
    folder = tmp_path_factory.mktemp('data')
    generator = np.random.default_rng(0)
    rows, columns = np.mgrid[:44, :40]
    for label, phase in enumerate([rows, columns, rows + columns]):
        (folder / 'validation' / str(label)).mkdir(parents=True)
        for index in range(7):
            pixels = 128 + 60 * np.sin(phase / generator.uniform(1, 3)) + generator.normal(0, 30, (44, 40))
            pixels = np.stack([pixels] * 3, -1).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / 'validation' / str(label) / f'{index}.png')
    return folder


def dataset(data):
    return create_dataset('', root=str(data), split='validation')


def network(seed=0, **cfg):
    torch.manual_seed(seed)
    return timm.create_model('test_resnet', num_classes=3, pretrained_cfg_overlay=dict(GEOMETRY, **cfg)).eval()


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def test_errors_are_those_of_a_plain_loop(data, tmp_path):
    model, pictures = network(), dataset(data)
    evaluate_robustness({'net': model}, pictures, tmp_path, **FEW, seed=3)
    transform = create_transform(**GEOMETRY, is_training=False).transforms
    expected = {}
    for corruption, severity in [('clean', 0), ('gaussian_noise', 1), ('contrast', 5)]:
        errors = 0
        for index in range(len(pictures)):
            image, target = pictures[index]
            image = transform[1](transform[0](image))
            image = corrupt(image, corruption, severity, index, seed=3) if severity else image
            tensor = transform[3](transform[2](image))
            errors += int(model(tensor[None]).argmax() != target)
        expected[corruption, severity] = errors
    with open(tmp_path / 'errors.csv') as file:
        rows = {(row['corruption'], int(row['severity'])): row for row in csv.DictReader(file)}
    assert len(rows) == 5
    assert {cell: int(rows[cell]['errors']) for cell in expected} == expected
    assert {row['images'] for row in rows.values()} == {'21'}


def test_clean_accuracy_is_timms(data, tmp_path):
    model = network()
    (row,) = evaluate_robustness({'net': model}, dataset(data), tmp_path, corruptions=[])
    config = dict(GEOMETRY, device=torch.device('cpu'), num_workers=0, use_prefetcher=False)
    loader = create_loader(dataset(data), batch_size=4, persistent_workers=False, **config)
    right = sum((model(images).argmax(1) == targets).sum().item() for images, targets in loader)
    assert row['top1'] == pytest.approx(100 * right / 21, abs=1e-3)
    assert (row['img_size'], row['crop_pct'], row['interpolation']) == (32, 0.8, 'bilinear')


def test_batches_workers_and_company_change_nothing(data, tmp_path):
    models = {'a': network(0), 'b': network(1)}
    evaluate_robustness(models, dataset(data), tmp_path / 'both', **FEW, batch_size=5, workers=2)
    for name, model in models.items():
        evaluate_robustness({name: model}, dataset(data), tmp_path / name, **FEW)
        together, alone = read_answers(tmp_path / 'both')[name], read_answers(tmp_path / name)[name]
        assert together.keys() == alone.keys()
        assert all(np.array_equal(together[cell], alone[cell]) for cell in alone)


def test_an_interrupted_run_goes_on(data, tmp_path, monkeypatch):
    models = {'a': network(0), 'b': network(1)}
    evaluate_robustness(models, dataset(data), tmp_path / 'whole', **FEW, baseline='a')
    corrupted = []

    def count(image, corruption, severity, index, seed):
        if len(corrupted) == 50:  # in the third of four corrupted passes
            corrupted.append(None)
            raise KeyboardInterrupt
        corrupted.append((corruption, severity, index))
        return corrupt(image, corruption, severity, index, seed)

    monkeypatch.setattr(robustness, 'corrupt', count)
    with pytest.raises(KeyboardInterrupt):
        evaluate_robustness(models, dataset(data), tmp_path / 'parts', **FEW, baseline='a')
    finished = set(corrupted[:42])
    corrupted[:] = [None] * 51
    evaluate_robustness(models, dataset(data), tmp_path / 'parts', **FEW, baseline='a')
    again = set(corrupted[51:])
    assert len(again) == 42 and not again & finished
    assert contents(tmp_path / 'parts') == contents(tmp_path / 'whole')


def test_models_may_join_and_other_protocols_are_refused(data, tmp_path):
    evaluate_robustness({'a': network(0)}, dataset(data), tmp_path, **FEW)
    rows = evaluate_robustness({'b': network(1)}, dataset(data), tmp_path, **FEW)
    assert [row['model'] for row in rows] == ['a', 'b']
    before = contents(tmp_path)
    for kwargs, model, message in [
        (dict(seed=1), network(0), 'corruptions.seed is 0 there and 1 here'),
        (dict(limit=6), network(0), 'data.images is 21 there and 6 here'),
        (dict(), network(5), 'models.a.weights_sha256 is'),
        (dict(), network(0, crop_pct=1.0), 'models.a.crop_pct is 0.8 there and 1.0 here'),
    ]:
        with pytest.raises(ValueError, match=message):
            evaluate_robustness({'a': model}, dataset(data), tmp_path, **FEW, **kwargs)
    assert contents(tmp_path) == before


def test_bad_arguments_are_refused(data, tmp_path):
    with pytest.raises(ValueError, match='baseline must be one of the models a, got'):
        evaluate_robustness({'a': network()}, dataset(data), tmp_path, baseline='b')
    with pytest.raises(ValueError, match='b takes pictures of crop_pct=1.0, a of 0.8'):
        evaluate_robustness({'a': network(), 'b': network(crop_pct=1.0)}, dataset(data), tmp_path)
    with pytest.raises(ValueError, match='a has 1000 classes, the data 3'):
        evaluate_robustness({'a': timm.create_model('test_resnet')}, dataset(data), tmp_path)
    with pytest.raises(ValueError, match='the nearest is'):
        evaluate_robustness({'a': network()}, dataset(data), tmp_path, corruptions=['fogg'])


@pytest.mark.parametrize('workers', [0, 2])
def test_an_unreadable_picture_is_named(data, tmp_path, workers, capsys):
    shutil.copytree(data, tmp_path / 'data')
    broken = tmp_path / 'data' / 'validation' / '1' / '3.png'
    broken.write_bytes(broken.read_bytes()[:200])
    with pytest.raises(ValueError, match='3.png cannot be read'):
        evaluate_robustness(
            {'a': network()}, dataset(tmp_path / 'data'), tmp_path / 'out', corruptions=[], workers=workers
        )


def test_stratified_indices():
    targets = [0, 0, 0, 1, 1, 2]
    assert stratified_indices(targets) == [0, 1, 2, 3, 4, 5]
    assert stratified_indices(targets, 3) == [0, 3, 5]
    assert stratified_indices(targets, 5) == [0, 1, 3, 4, 5]
    assert stratified_indices(targets, 9) == [0, 1, 2, 3, 4, 5]
    with pytest.raises(ValueError, match='limit must be at least 1, got 0'):
        stratified_indices(targets, 0)


def write_answers(folder, errors, images, classes):
    """A results folder of pictures of which the first ones are wrong."""
    model = dict(input_size=[3, 32, 32], crop_pct=1.0, interpolation='bilinear', param_count=1.0)
    protocol = dict(data=dict(images=images, classes=classes), models=dict.fromkeys(errors, model))
    (folder / 'protocol.json').write_text(json.dumps(protocol))
    for name, cells in errors.items():
        (folder / 'answers' / name).mkdir(parents=True)
        for (corruption, severity), wrong in cells.items():
            places = np.where(np.arange(images) < wrong, 5, 0).astype(np.uint8)
            np.save(folder / 'answers' / name / f'{corruption}-{severity}.npy', places)


def test_summary_by_hand(tmp_path):
    corrupted = [(name, severity) for name in TEST_CORRUPTIONS for severity in (1, 5)]
    errors = {
        'a': {('clean', 0): 20, ('saturate', 1): 90} | {cell: 40 + 20 * (cell[1] == 5) for cell in corrupted},
        'b': {('clean', 0): 30} | {cell: 20 + 20 * (cell[1] == 5) for cell in corrupted},
    }
    write_answers(tmp_path, errors, images=100, classes=1000)
    a, b = summarize(tmp_path, baseline='a')
    assert (a['top1'], a['top1_err'], a['top5']) == (80, 20, 80)
    assert (a['E'], a['CE_fog'], a['CE_saturate'], a['plain_mCE']) == (20, 50, 90, 50)
    assert (b['E'], b['CE_fog'], b['plain_mCE']) == (30, 30, 30)
    assert (a['relative_mCE'], a['R_net']) == (100, 0)
    assert b['relative_mCE'] == 0 and b['R_net'] == pytest.approx(net_error_reduction(0.3, 0.3, 0.2, 0.5))
    assert a['alexnet_normalized_mCE'] != a['plain_mCE']
    # 95% of a binomial share of 0.2 in 100: 1.96 * sqrt(0.2 * 0.8 / 100) = 0.078 to each side
    assert a['E_low'] == pytest.approx(20 - 7.8, abs=1.5) and a['E_high'] == pytest.approx(20 + 7.8, abs=1.5)
    assert a['R_net_low'] == a['R_net_high'] == 0


def test_means_that_would_mean_nothing_are_left_empty(tmp_path):
    write_answers(tmp_path, {'a': {('clean', 0): 2, ('fog', 1): 5}}, images=10, classes=1000)
    (row,) = summarize(tmp_path)
    assert row['CE_fog'] == 50
    assert {row[m] for m in ('plain_mCE', 'alexnet_normalized_mCE', 'relative_mCE', 'R_net')} == {''}
    (tmp_path / 'ten').mkdir()
    cells = {(name, severity): 5 for name in TEST_CORRUPTIONS for severity in (1, 2)} | {('clean', 0): 2}
    write_answers(tmp_path / 'ten', {'a': cells}, images=10, classes=10)
    (row,) = summarize(tmp_path / 'ten')
    assert row['plain_mCE'] == 50 and row['alexnet_normalized_mCE'] == ''


def command(data, folder, *options):
    torch.save(network().state_dict(), folder / 'net.pth')
    arguments = ['robustness', 'test_resnet', '--num-classes', '3', '--checkpoint', folder / 'net.pth']
    arguments += ['--data-dir', data, '--output', folder / 'out', '--input-size', '3', '32', '32']
    return [str(argument) for argument in (*arguments, *options)]


def test_command(data, tmp_path, capsys):
    options = ['--workers', '0', '--corruptions', 'fog', '--severities', '2', '--limit', '6']
    arguments = command(data, tmp_path, *options)
    assert main(arguments) == 0
    assert 'test_resnet' in capsys.readouterr().out
    assert (tmp_path / 'out' / 'errors.csv').read_text().count('\n') == 3
    assert main([*arguments, '--seed', '1']) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith('timm-pushpull: ') and 'corruptions.seed is 0 there and 1 here' in error
