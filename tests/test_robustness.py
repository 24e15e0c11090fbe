import csv
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image, ImageFilter
from timm.data import create_dataset, create_loader, create_transform

from timm_pushpull.cli import main
from timm_pushpull.cli.printing import print_summary
from timm_pushpull.robustness import evaluate, page, views
from timm_pushpull.robustness.corruptions import corrupt
from timm_pushpull.robustness.data import open_stored, stratified_indices
from timm_pushpull.robustness.evaluate import evaluate_robustness
from timm_pushpull.robustness.report import write_report
from timm_pushpull.robustness.store import PROBABILITIES, UNREADABLE, read_images, read_predictions, read_protocol

pytest.importorskip('imagecorruptions')
MEAN, STD = (0.2, 0.5, 0.7), (0.1, 0.25, 0.6)  # unequal, so that another order of the channels shows
GEOMETRY = dict(input_size=(3, 32, 32), crop_pct=0.8, interpolation='bilinear', mean=MEAN, std=STD)
FEW = dict(corruptions=['gaussian_noise', 'contrast'], severities=[1, 5])


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """Seven images of each of three classes: horizontal, vertical and diagonal stripes."""
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
    model, images = network(), dataset(data)
    evaluate_robustness({'net': model}, tmp_path, images, **FEW, seed=3)
    transform = create_transform(**GEOMETRY, is_training=False).transforms
    expected = {}
    for corruption, severity in [('clean', 0), ('gaussian_noise', 1), ('contrast', 5)]:
        errors = 0
        for index in range(len(images)):
            image, target = images[index]
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
    (row,) = evaluate_robustness({'net': model}, tmp_path, dataset(data), corruptions=[])
    config = dict(GEOMETRY, device=torch.device('cpu'), num_workers=0, use_prefetcher=False)
    loader = create_loader(dataset(data), batch_size=4, persistent_workers=False, **config)
    right = sum((model(images).argmax(1) == targets).sum().item() for images, targets in loader)
    assert row['top1'] == pytest.approx(100 * right / 21, abs=1e-3)
    assert (row['img_size'], row['crop_pct'], row['interpolation']) == (32, 0.8, 'bilinear')


def test_batches_workers_and_company_change_nothing(data, tmp_path):
    models = {'a': network(0), 'b': network(1)}
    evaluate_robustness(models, tmp_path / 'both', dataset(data), **FEW, batch_size=5, workers=2)
    for name, model in models.items():
        evaluate_robustness({name: model}, tmp_path / name, dataset(data), **FEW)
        together, alone = read_predictions(tmp_path / 'both')[name], read_predictions(tmp_path / name)[name]
        assert together.keys() == alone.keys()
        for cell, array in alone.items():
            assert all(np.array_equal(together[cell][field], array[field]) for field in ('prediction', 'rank'))
            assert all(together[cell][field] == pytest.approx(array[field], rel=1e-3) for field in PROBABILITIES)


def test_an_interrupted_run_continues(data, tmp_path, monkeypatch):
    models = {'a': network(0), 'b': network(1)}
    evaluate_robustness(models, tmp_path / 'whole', dataset(data), **FEW, baseline='a')
    corrupted = []

    def count(image, corruption, severity, index, seed):
        if len(corrupted) == 50:  # in the third of four corrupted passes
            corrupted.append(None)
            raise KeyboardInterrupt
        corrupted.append((corruption, severity, index))
        return corrupt(image, corruption, severity, index, seed)

    monkeypatch.setattr(views, 'corrupt', count)
    with pytest.raises(KeyboardInterrupt):
        evaluate_robustness(models, tmp_path / 'parts', dataset(data), **FEW, baseline='a')
    finished = set(corrupted[:42])
    corrupted[:] = [None] * 51
    evaluate_robustness(models, tmp_path / 'parts', dataset(data), **FEW, baseline='a')
    again = set(corrupted[51:-6])  # without the last ones, three examples of each corruption
    assert len(again) == 42 and not again & finished
    assert contents(tmp_path / 'parts') == contents(tmp_path / 'whole')


def test_models_may_join_and_other_protocols_are_refused(data, tmp_path):
    evaluate_robustness({'a': network(0)}, tmp_path, dataset(data), **FEW)
    rows = evaluate_robustness({'b': network(1)}, tmp_path, dataset(data), **FEW)
    assert [row['model'] for row in rows] == ['a', 'b']
    before = contents(tmp_path)
    for kwargs, model, message in [
        (dict(seed=1), network(0), 'corruptions.seed is 0 there and 1 here'),
        (dict(limit=6), network(0), 'data.images is 21 there and 6 here'),
        (dict(), network(5), 'models.a.weights_sha256 is'),
        (dict(), network(0, crop_pct=1.0), 'models.a.crop_pct is 0.8 there and 1.0 here. Give the model another label'),
    ]:
        with pytest.raises(ValueError, match=message):
            evaluate_robustness({'a': model}, tmp_path, dataset(data), **FEW, **kwargs)
    assert contents(tmp_path) == before


@pytest.mark.parametrize('kind', ['clean', 'stored', 'shifted'])
def test_other_images_of_the_same_names_are_refused(kind, data, tmp_path):
    """As from a second, blurred copy of a folder: the folder with results would give those of the first copy."""

    def evaluate(copy, **models):
        options = dict(corruptions=['fog'], severities=[2])
        if kind == 'stored':
            options['stored'] = open_stored(copy, **options)
        else:
            options |= dict(dataset=dataset(copy), corruptions=[])
        if kind == 'shifted':
            options |= dict(dataset=dataset(data), shifted={'other': dataset(copy)})
        return evaluate_robustness(models, tmp_path / 'out', **options)

    for copy, radius in (('first', 0), ('second', 1)):
        for path in data.rglob('*.png'):
            folders = ('validation', 'fog/2') if kind == 'stored' else ('validation',)
            for folder in folders:
                file = tmp_path / copy / folder / path.relative_to(data / 'validation')
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.open(path).filter(ImageFilter.GaussianBlur(radius)).save(file)
    evaluate(tmp_path / 'first', a=network(0), b=network(1, crop_pct=1.0))
    before = contents(tmp_path / 'out')
    for name, model in (('a', network(0)), ('c', network(2, crop_pct=0.9))):
        with pytest.raises(
            ValueError, match='out.* holds results of other images with the same names, such as 0/3.png'
        ):
            evaluate(tmp_path / 'second', **{name: model})
    assert contents(tmp_path / 'out') == before
    evaluate(tmp_path / 'first', c=network(2, crop_pct=0.9), a=network(0))


def test_bad_arguments_are_refused(data, tmp_path):
    with pytest.raises(ValueError, match='baseline must be one of the models a, got'):
        evaluate_robustness({'a': network()}, tmp_path, dataset(data), baseline='b')
    with pytest.raises(ValueError, match='dataset must be given unless stored is'):
        evaluate_robustness({'a': network()}, tmp_path)
    with pytest.raises(ValueError, match='models must hold at least one model'):
        evaluate_robustness({}, tmp_path, dataset(data))
    with pytest.raises(ValueError, match='data_configs must have an entry for each model, b has none'):
        evaluate_robustness(dict.fromkeys('ab', network()), tmp_path, dataset(data), data_configs={'a': GEOMETRY})
    for config, message in (
        (dict(crop_pct=0), 'crop_pct=0'),
        (dict(std=(0.1, 0.0, 0.2)), r'std=\(0.1, 0.0, 0.2\)'),
    ):
        with pytest.raises(ValueError, match=f'crop_pct and std of a must be positive.*{message}'):
            data_configs = {'a': {**GEOMETRY, 'crop_mode': 'center', **config}}
            evaluate_robustness({'a': network()}, tmp_path, dataset(data), data_configs=data_configs)
    with pytest.raises(ValueError, match='a takes 1 channels'):
        evaluate_robustness({'a': network(input_size=(1, 32, 32))}, tmp_path, dataset(data))
    with pytest.raises(ValueError, match='a has 1000 classes, but the images have 3'):
        evaluate_robustness({'a': timm.create_model('test_resnet')}, tmp_path, dataset(data))
    with pytest.raises(ValueError, match='the nearest is'):
        evaluate_robustness({'a': network()}, tmp_path, dataset(data), corruptions=['fogg'])
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize('workers', [0, 2])
def test_an_unreadable_image_is_named(data, tmp_path, workers, capsys):
    shutil.copytree(data, tmp_path / 'data')
    broken = tmp_path / 'data' / 'validation' / '1' / '3.png'
    broken.write_bytes(broken.read_bytes()[:200])
    with pytest.raises(ValueError, match='3.png cannot be read'):
        evaluate_robustness(
            {'a': network()}, tmp_path / 'out', dataset(tmp_path / 'data'), corruptions=[], workers=workers
        )


def test_each_channel_has_its_mean_and_std(tmp_path):
    class Means(torch.nn.Module):
        num_classes = 3

        def forward(self, x):
            return x.mean((2, 3))

    for label, grey in (('a', 128), ('b', 13), ('c', 255)):
        (tmp_path / 'data' / label).mkdir(parents=True)
        Image.new('RGB', (32, 32), (grey,) * 3).save(tmp_path / 'data' / label / 'x.png')
    config = {'a': {**GEOMETRY, 'crop_mode': 'center'}}
    images = create_dataset('', root=str(tmp_path / 'data'))
    evaluate_robustness({'a': Means()}, tmp_path / 'out', images, corruptions=[], data_configs=config)
    # (v - 0.2) / 0.1, (v - 0.5) / 0.25, (v - 0.7) / 0.6 are 3.0, 0.0, -0.3 for 128; -1.5, -1.8, -1.1 for 13; 8, 2, 0.5.
    assert read_predictions(tmp_path / 'out')['a']['clean', 0]['prediction'].tolist() == [0, 2, 0]


def test_logits_that_are_not_finite_are_an_error_that_names_the_image(data, tmp_path):
    class Breaks(torch.nn.Module):
        """NaN for the images that show more than the others, from the 18th clean image and the contrast on."""

        num_classes = 3

        def __init__(self, value, corrupted):
            super().__init__()
            self.value, self.corrupted, self.seen = value, corrupted, 0

        def forward(self, x):
            logits = torch.zeros(len(x), 3)
            first = 22 if self.corrupted else 1  # after the image that tries the size
            for place in range(len(x)):
                if self.seen + place == first + 17:
                    logits[place, 1] = self.value
            self.seen += len(x)
            return logits

    config = {'a': {**GEOMETRY, 'crop_mode': 'center'}}
    for value, corrupted, message in (
        (float('nan'), False, r'a gives logits that are not finite for image 2/3.png \(clean\)'),
        (float('inf'), True, r'a gives logits that are not finite for image 2/3.png \(contrast 4\)'),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate_robustness(
                {'a': Breaks(value, corrupted)},
                tmp_path / str(value),
                dataset(data),
                corruptions=['contrast'],
                severities=[4],
                data_configs=config,
                batch_size=5,
            )


def test_models_keep_their_modes(data, tmp_path):
    model = network().train()
    model.bn1.eval()
    before = [module.training for module in model.modules()]
    evaluate_robustness({'a': model}, tmp_path, dataset(data), corruptions=[])
    assert [module.training for module in model.modules()] == before


JOIN = """
import sys, timm, torch
from timm.data import create_dataset
from timm_pushpull import evaluate_robustness
data, folder, *names = sys.argv[1:]
torch.set_num_threads(1)
cfg = dict(input_size=(3, 32, 32))
dataset = create_dataset('', root=data, split='validation')
models = {name: timm.create_model('test_resnet', num_classes=3, pretrained_cfg_overlay=cfg) for name in names}
print('ready', flush=True)
sys.stdin.readline()
for name, model in models.items():
    evaluate_robustness({name: model}, folder, dataset, corruptions=['contrast'], severities=[1], limit=3)
"""


def test_two_processes_that_join_a_folder_lose_nothing(data, tmp_path):
    names = [[f'{process}{place}' for place in range(6)] for process in 'ab']
    processes = [
        subprocess.Popen(
            [sys.executable, '-c', JOIN, data, tmp_path / 'out', *each], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for each in names
    ]
    for process in processes:
        process.stdout.readline()
    for process in processes:
        process.stdin.write(b'go\n')
        process.stdin.flush()
    assert [process.wait() for process in processes] == [0, 0]
    for process in processes:
        process.stdin.close()
        process.stdout.close()
    models = {name for each in names for name in each}
    assert read_protocol(tmp_path / 'out')['models'].keys() == models
    with open(tmp_path / 'out' / 'summary.csv') as file:
        assert {row['model'] for row in csv.DictReader(file)} == models


def test_names_of_files_may_be_any_bytes(data, tmp_path, undrawn):
    pytest.importorskip('matplotlib')
    folder = shutil.copytree(data, tmp_path / 'data') / 'validation' / '1'
    os.rename(folder / '3.png', os.fsencode(folder) + b'/2caf\xe9.png')
    evaluate_robustness({'a': network()}, tmp_path / 'out', dataset(tmp_path / 'data'), corruptions=[])
    names = [name for name, _ in read_images(tmp_path / 'out')]
    assert os.fsencode(names[10]) == b'1/2caf\xe9.png'
    assert '1/2caf?.png' in write_report([tmp_path / 'out'], tmp_path / 'page').read_text()


def test_stratified_indices():
    targets = [0, 0, 0, 1, 1, 2]
    assert stratified_indices(targets) == [0, 1, 2, 3, 4, 5]
    assert stratified_indices(targets, 1) == [0] and stratified_indices(targets, 3) == [0, 3, 5]
    assert stratified_indices(targets, 5) == [0, 1, 3, 4, 5]
    assert stratified_indices(targets, 9) == [0, 1, 2, 3, 4, 5]
    # The first 500 classes of ImageNet are its animals and some of its things.
    assert stratified_indices(range(1000), 500) == [*range(0, 1000, 2)]
    assert stratified_indices([3, 2, 1, 0, 4, 3, 4, 0, 1, 2], 7) == [0, 1, 2, 3, 4, 7, 9]
    with pytest.raises(ValueError, match='limit must be at least 1, got 0'):
        stratified_indices(targets, 0)


def command(data, folder, *options):
    folder.mkdir(exist_ok=True)
    torch.save(network().state_dict(), folder / 'net.pth')
    arguments = ['robustness', 'test_resnet', '--num-classes', '3', '--checkpoint', folder / 'net.pth']
    arguments += ['--data-dir', data, '--output', folder / 'out', '--input-size', '3', '32', '32']
    return [str(argument) for argument in (*arguments, *options)]


def test_every_field_of_the_protocol_is_in_words(data, tmp_path):
    evaluate_robustness({'net': network()}, tmp_path, dataset(data), **FEW)
    stored = open_stored(write_stored(dataset(data), tmp_path / 'stored'), **FEW)
    evaluate_robustness({'net': network()}, tmp_path / 'of stored', stored=stored, **FEW)
    for folder in (tmp_path, tmp_path / 'of stored'):
        fields = re.findall('<tr><td>(.*?)</td>', page.protocol_table(read_protocol(folder)))
        assert len(fields) > 20 and 'seed of the corruptions' in fields or 'crop of the stored images' in fields
        assert not [field for field in fields if '_' in field and not field.startswith('argument ')]


def test_the_terminal_shows_the_measures_of_each_model(capsys):
    rows = [
        dict(model=model, E=e, E_low=1, E_high=99, CE_fog=fog, plain_mCE='', severities='1 5', unreadable=unreadable)
        for model, e, fog, unreadable in (('first', 12.34, 56.0, 2), ('the second', 7.0, '', 3))
    ]
    print_summary(rows)
    text = capsys.readouterr().out
    lines = [line.split() for line in text.splitlines()]
    assert lines[1:4] == [['first', 'the', 'second'], ['E', '12.34', '7.00'], ['CE_fog', '56.00']]
    assert lines[-1][:3] == ['5', 'predictions', 'are']
    assert 'means over severities 1 5, without the errors of models that lack one of these; mCE needs' in text
    print_summary(rows[:1])
    assert 'means over severities 1 5; mCE needs' in capsys.readouterr().out


@pytest.mark.parametrize('columns, widths', [(33, [2, 1]), (34, [3]), (23, [2, 1]), (22, [1, 1, 1]), (5, [1, 1, 1])])
def test_the_terminal_shows_as_many_models_side_by_side_as_fit(columns, widths, capsys, monkeypatch):
    monkeypatch.setenv('COLUMNS', str(columns))
    rows = [dict(model=model, E=index, severities='1', unreadable=0) for index, model in enumerate('abc')]
    print_summary(rows)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [len(line) for line in lines if line and line[0] in 'abc'] == widths
    assert sum((line[1:] for line in lines if line[:1] == ['E']), []) == ['0.00', '1.00', '2.00']


def test_command(data, tmp_path, capsys):
    options = ['--workers', '0', '--corruptions', 'fog', '--severities', '2', '--limit', '6']
    arguments = command(data, tmp_path, *options)
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert 'test_resnet' in out and 'against' not in out
    assert (tmp_path / 'out' / 'errors.csv').read_text().count('\n') == 3
    assert main([*arguments, '--seed', '1']) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith('timm-pushpull: ') and 'corruptions.seed is 0 there and 1 here' in error


@pytest.mark.parametrize(
    'options, message',
    [
        (['--checkpoint', 'missing.pth'], 'checkpoint must be a file, missing.pth is not one'),
        (['--checkpoint', 'net.pth', 'net.pth'], 'checkpoint must name one file for each of the 1 models, got 2'),
        (['--num-classes', '4'], 'net.pth: Error(s) in loading state_dict for ResNet: size mismatch for fc.weight'),
        (['--num-classes', '4'], 'Give the num_classes and model arguments of the training'),
        (['--split', 'tset'], 'split must be a folder in data_dir, there is no tset in '),
        (['--model-kwargs', 'alpha=2'], "test_resnet: ResNet.__init__() got an unexpected keyword argument 'alpha'"),
        (['--data-dir', 'missing'], 'data_dir must be a folder of images, missing is not one'),
        (
            ['--class-map', 'missing'],
            'class_map must be a file of class names or one of imagenet_100, imagenet_200, imagenet_1000',
        ),
        (['--class-map', 'imagenet_100'], ', of the classes in imagenet_100: Found 0 images'),
        (['--stored', 'missing'], 'stored must be a folder of corruptions, missing is not one'),
        (['--stored', '.'], 'lacks fog: name corruptions'),
        (['--corruptions', 'fig'], "got 'fig'; the nearest is 'fog'"),
        (['--severities', '6'], 'severity must be an integer from 1 to 5, got 6'),
        (['--limit', '0'], 'limit must be at least 1, got 0'),
        (['--batch-size', '0'], 'batch_size must be at least 1, got 0'),
        (['--workers', '-1'], 'workers must be 0 or more, got -1'),
        (['--seed', '-2'], 'seed must be 0 or more, got -2'),
        (['--device', 'nonsense'], '--device nonsense: '),
        (['--baseline', 'other'], "baseline must be one of the models test_resnet, got 'other'"),
        (['--output', 'net.pth/out'], "Not a directory: 'net.pth/out"),
    ],
)
def test_command_refuses_in_one_line(options, message, data, tmp_path, capsys, monkeypatch):
    arguments = command(data, tmp_path, '--workers', '0', '--corruptions', 'fog', '--severities', '2')
    monkeypatch.chdir(tmp_path)
    assert main([*arguments, *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith('timm-pushpull: ') and message in error and error.count('\n') == 1
    assert not (tmp_path / 'out').exists()


def test_training_images_do_not_replace_a_missing_split(data, tmp_path, capsys):
    options = ['--workers', '0', '--corruptions', 'fog', '--severities', '2']
    shutil.copytree(data / 'validation', tmp_path / 'data' / 'train')
    assert main(command(tmp_path / 'data', tmp_path, *options)) == 2
    assert 'there is no validation in' in capsys.readouterr().err
    assert main(command(tmp_path / 'data', tmp_path, *options, '--split', 'train')) == 0
    assert main(command(tmp_path / 'data' / 'train', tmp_path, *options)) == 0  # without splits


@pytest.mark.parametrize('workers', ['0', '1'])
def test_command_names_an_unreadable_image(workers, data, tmp_path, capsys):
    folder = shutil.copytree(data, tmp_path / 'data')
    (folder / 'validation' / '2' / '0.png').write_text('not an image')
    assert main(command(folder, tmp_path, '--workers', workers)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith('timm-pushpull: 2/0.png cannot be read: cannot identify image file')


def test_command_refuses_a_random_alpha(data, tmp_path, capsys):
    plain = timm.create_model('pp_resnet18', num_classes=3, push_pull=False)
    torch.save(plain.state_dict(), tmp_path / 'plain.pth')
    arguments = ['robustness', 'pp_resnet18', '--checkpoint', tmp_path / 'plain.pth', '--num-classes', '3']
    arguments += ['--data-dir', data, '--output', tmp_path / 'out', '--input-size', '3', '32', '32', '--workers', '0']
    arguments = [str(argument) for argument in (*arguments, '--corruptions', 'fog', '--severities', '1')]
    assert main(arguments) == 2
    assert 'plain.pth holds no alpha, and pp_resnet18 would keep a random one' in capsys.readouterr().err
    assert main([*arguments, '--model-kwargs', 'alpha=0.5', 'trainable_alpha=False']) == 0


def test_command_says_if_models_see_different_crops(data, tmp_path, capsys):
    arguments = command(data, tmp_path, '--corruptions', 'fog', '--severities', '2', '--workers', '0')
    assert main(arguments) == 0
    assert 'in different ways' not in capsys.readouterr().out
    assert (
        main([*arguments, '--input-size', '3', '40', '40', '--crop-pct', '0.7', '--output', str(tmp_path / 'b')]) == 0
    )
    arguments[1] = 'other=test_resnet'
    assert main([*arguments, '--output', str(tmp_path / 'b')]) == 0
    assert 'in different ways: 32 pixels' in capsys.readouterr().out


def test_command_compares_two_checkpoints_of_one_network(data, tmp_path, capsys):
    arguments = command(data, tmp_path, '--corruptions', 'fog', '--severities', '2', '--workers', '0', '--amp')
    checkpoint = arguments[arguments.index('--checkpoint') + 1]
    arguments += ['--amp-dtype', 'bfloat16', '--checkpoint', checkpoint, checkpoint]
    arguments[1:2] = ['first=test_resnet', 'test_resnet']
    assert main(arguments) == 0
    predictions = read_predictions(tmp_path / 'out')
    assert list(predictions) == ['first', 'test_resnet']
    *_, sentence, more, caveat = capsys.readouterr().out.splitlines()
    assert f'{sentence} {more}' == (
        'test_resnet against first, by these 21 images: the clean error is not significantly different (0.0 points, '
        '95% interval 0.0 to 0.0).'
    )
    assert caveat.startswith('This compares single checkpoints')
    assert read_protocol(tmp_path / 'out')['models']['first']['precision'] == 'bfloat16'
    arguments[1] = 'test_resnet'
    assert main(arguments) == 2
    assert 'model test_resnet is given twice' in capsys.readouterr().err


def write_stored(source, folder, kinds=('', '')):
    """Write generated corruptions without loss, in the layout of ImageNet-C."""
    transform = create_transform(**GEOMETRY, is_training=False).transforms[:2]
    for corruption, kind in zip(FEW['corruptions'], kinds, strict=True):
        for severity in FEW['severities']:
            for index, (path, _) in enumerate(source.reader.samples):
                image = transform[1](transform[0](Image.open(path)))
                file = folder / kind / corruption / str(severity) / Path(path).parent.name / Path(path).name
                file.parent.mkdir(parents=True, exist_ok=True)
                corrupt(image, corruption, severity, index).save(file)
    return folder


@pytest.mark.parametrize('kinds', [('', ''), ('noise', 'digital')])
def test_stored_corruptions_give_the_errors_of_generated_ones(data, tmp_path, kinds):
    models, images = {'a': network()}, dataset(data)
    folder = write_stored(images, tmp_path / 'stored', kinds)
    evaluate_robustness(models, tmp_path / 'generated', images, **FEW)
    stored = open_stored(folder, **FEW)
    evaluate_robustness(models, tmp_path / 'read', images, stored, **FEW, workers=1)
    generated, read = (read_predictions(tmp_path / name)['a'] for name in ('generated', 'read'))
    assert len(generated) == 5 and generated.keys() == read.keys()
    assert all(np.array_equal(generated[key], read[key]) for key in generated)
    assert len({generated[key].tobytes() for key in generated}) > 1
    # Without clean images there is no clean error.
    (row,) = evaluate_robustness(models, tmp_path / 'alone', stored=stored, **FEW, limit=6)
    assert row['E'] == '' and row['CE_contrast'] != ''


def test_stored_images_must_be_those_of_the_dataset(data, tmp_path):
    folder = write_stored(dataset(data), tmp_path / 'stored')
    shutil.copytree(data, tmp_path / 'data')
    (tmp_path / 'data' / 'validation' / '2' / '4.png').rename(tmp_path / 'data' / 'validation' / '2' / '7.png')
    with pytest.raises(ValueError, match='image 18 is 2/5.png of class 2 in dataset, 2/4.png of class 2 in stored'):
        evaluate_robustness(
            {'a': network()}, tmp_path / 'out', dataset(tmp_path / 'data'), open_stored(folder, **FEW), **FEW
        )


def test_stored_arrays(tmp_path):
    generator = np.random.default_rng(0)
    images = generator.integers(256, size=(6, 32, 32, 3), dtype=np.uint8)
    shades = [images // (severity + 1) for severity in range(5)]
    np.save(tmp_path / 'labels.npy', np.tile(np.array([0, 1, 2, 2, 1, 0], np.uint8), 5))
    np.save(tmp_path / 'brightness.npy', np.concatenate(shades))
    model = network()
    passes = dict(corruptions=['brightness'], severities=[1, 4])
    evaluate_robustness({'a': model}, tmp_path / 'out', stored=open_stored(tmp_path, **passes), **passes)
    predictions = read_predictions(tmp_path / 'out')['a']
    for severity in (1, 4):
        x = torch.from_numpy(shades[severity - 1]).permute(0, 3, 1, 2) / 255
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (MEAN, STD))
        expected = model((x - mean) / std).argmax(1)
        assert predictions['brightness', severity]['prediction'].tolist() == expected.tolist()


def test_without_the_extra_nothing_is_written(data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'imagecorruptions', None)
    with pytest.raises(ModuleNotFoundError, match='pip install imagecorruptions-imaug'):
        evaluate_robustness({'a': network()}, tmp_path, dataset(data), **FEW)
    assert not any(tmp_path.iterdir())


def test_models_of_other_sizes_see_the_same_draw(data, tmp_path):
    large = dict(input_size=(3, 40, 40), crop_pct=1.0)
    models = {'a': network(), 'b': network(**large), 'c': network(1)}
    evaluate_robustness(models, tmp_path / 'together', dataset(data), **FEW)
    for name, model in models.items():
        evaluate_robustness({name: model}, tmp_path / name, dataset(data), **FEW)
        together, alone = read_predictions(tmp_path / 'together')[name], read_predictions(tmp_path / name)[name]
        assert all(np.array_equal(together[key], alone[key]) for key in alone)


def test_sizes_are_those_of_validate(data, tmp_path):
    model = network(test_input_size=(3, 40, 40))
    (row,) = evaluate_robustness({'a': model}, tmp_path / 'out', dataset(data), corruptions=[])
    assert row['img_size'] == 40
    stored = open_stored(write_stored(dataset(data), tmp_path / 'stored'), **FEW)
    (row,) = evaluate_robustness({'a': model}, tmp_path / 'read', stored=stored, **FEW)
    assert row['img_size'] == 32


def test_unreadable_images_are_counted_on_demand(data, tmp_path):
    folder = shutil.copytree(data, tmp_path / 'data')
    broken = folder / 'validation' / '1' / '3.png'
    broken.write_bytes(broken.read_bytes()[:200])
    (row,) = evaluate_robustness(
        {'a': network()}, tmp_path / 'out', dataset(folder), **FEW, skip_unreadable=True, workers=1
    )
    assert row['unreadable'] == 5
    whole = read_predictions(tmp_path / 'out')['a']
    broken.unlink()
    evaluate_robustness({'a': network()}, tmp_path / 'without', dataset(folder), corruptions=[])
    without = read_predictions(tmp_path / 'without')['a']['clean', 0]
    assert np.array_equal(np.delete(whole['clean', 0], 10), without) and whole['clean', 0]['rank'][10] == UNREADABLE


def test_predictions_are_the_classes_with_the_highest_logit(data, tmp_path):
    model, images = network(), dataset(data)
    evaluate_robustness({'a': model}, tmp_path, images, corruptions=[])
    transform = create_transform(**GEOMETRY, is_training=False)
    logits = torch.cat([model(transform(images[index][0])[None]) for index in range(len(images))])
    predictions = read_predictions(tmp_path)['a']['clean', 0]
    assert predictions['prediction'].tolist() == logits.argmax(1).tolist()
    ranks = logits.argsort(1, descending=True) == torch.tensor([images[i][1] for i in range(len(images))])[:, None]
    assert predictions['rank'].tolist() == ranks.int().argmax(1).tolist()


def run_command(arguments, setup='', **kwargs):
    program = f'{setup}import sys; from timm_pushpull.cli import main; sys.exit(main())'
    command = [sys.executable, '-c', program, *arguments]
    return subprocess.Popen(command, env={**os.environ, 'OMP_NUM_THREADS': '1'}, **kwargs)


def test_a_run_that_was_killed_ends_with_the_same_bytes(data, tmp_path):
    options = ['--corruptions', 'gaussian_noise', 'fog', 'contrast', '--workers', '1', '--batch-size', '4']
    assert main([*command(data, tmp_path / 'whole', *options)]) == 0
    arguments = command(data, tmp_path / 'parts', *options)
    generator, kills = np.random.default_rng(), 0
    for _ in range(3):
        process = run_command(arguments, start_new_session=True, stderr=subprocess.DEVNULL)
        predictions, start = tmp_path / 'parts' / 'out' / 'predictions', len(list((tmp_path / 'parts').rglob('*.npy')))
        while process.poll() is None and len(list(predictions.rglob('*.npy'))) == start:
            time.sleep(0.01)
        time.sleep(generator.uniform(0, 0.3))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
    finished = {path: path.stat().st_mtime_ns for path in predictions.rglob('*.npy')}
    assert kills and main(arguments) == 0
    assert all(path.stat().st_mtime_ns == when for path, when in finished.items())
    parts, whole = contents(tmp_path / 'parts' / 'out'), contents(tmp_path / 'whole' / 'out')
    assert {path for path in parts if not path.name.endswith('.unfinished')} == set(whole)
    assert all(parts[path] == whole[path] for path in whole)


def test_a_full_disk_gives_an_error_and_loses_nothing(data, tmp_path):
    arguments = command(data, tmp_path, '--corruptions', 'fog', '--severities', '1', '2', '--workers', '0')
    # The kernel refuses files of more than 2,400 bytes: predictions are smaller, examples larger.
    limit = 'import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2400, 2400)); '
    limited = run_command(arguments, setup=limit, stderr=subprocess.PIPE, text=True)
    error = limited.communicate()[1].splitlines()[-1]
    assert limited.returncode == 2 and error.startswith('timm-pushpull: ') and 'File too large' in error
    before = contents(tmp_path / 'out' / 'predictions')
    assert main(arguments) == 0
    assert before and before.items() <= contents(tmp_path / 'out' / 'predictions').items()


@pytest.mark.slow
def test_two_processes_give_what_one_gives(data, tmp_path):
    options = ['--corruptions', *FEW['corruptions'], '--severities', '5', '--batch-size', '4', '--workers', '1']
    assert main(command(data, tmp_path / 'one', *options, '--device', 'cpu')) == 0
    arguments = command(data, tmp_path / 'two', *options, '--device', 'cpu')
    launcher = 'from torch.distributed.run import main; main()'
    script = tmp_path / 'run.py'
    script.write_text('import sys; from timm_pushpull.cli import main; sys.exit(main())')
    subprocess.run(
        [sys.executable, '-c', launcher, '--standalone', '--nproc-per-node=2', str(script), *arguments],
        env={**os.environ, 'OMP_NUM_THREADS': '1'},
        check=True,
    )
    assert contents(tmp_path / 'two' / 'out') == contents(tmp_path / 'one' / 'out')


class Sees(torch.nn.Module):
    """Keeps the images that it gets, and gives class 0 to all."""

    num_classes = 2

    def __init__(self, **cfg):
        super().__init__()
        self.pretrained_cfg = dict(input_size=(3, 4, 4), crop_pct=1.0, interpolation='nearest', **cfg)
        self.seen = []

    def forward(self, x):
        self.seen.append(x.clone())
        return torch.eye(2)[[0] * len(x)]


def two_images(folder, pixels):
    """Write one image as the only one of each of two classes."""
    for label in 'ab':
        (folder / label).mkdir(parents=True)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / label / 'image.png')
    return create_dataset('', root=str(folder))


def test_each_model_sees_its_own_size_crop_and_interpolation(tmp_path):
    shades = np.arange(8)[None, :, None] * np.full((8, 8, 3), 10)
    images = two_images(tmp_path / 'data', shades)
    plain = dict(mean=(0.0,) * 3, std=(1 / 255,) * 3)
    settings = dict(whole={}, middle=dict(crop_pct=0.5), smooth=dict(interpolation='bilinear'), small=dict(size=2))
    models, configs = {}, {}
    for name, change in settings.items():
        size = change.pop('size', 4)
        models[name] = Sees()
        configs[name] = dict(input_size=(3, size, size), crop_pct=1.0, crop_mode='center', interpolation='nearest')
        configs[name] |= plain | change
    evaluate_robustness(models, tmp_path / 'out', images, corruptions=[], data_configs=configs)
    rows = {name: model.seen[1][0, 0, 0].round().tolist() for name, model in models.items()}
    assert rows['whole'] == [10, 30, 50, 70]  # every second column
    assert rows['middle'] == [20, 30, 40, 50]  # not resized, four columns in the middle
    # The filter is twice as wide: (3 * 0 + 3 * 10 + 20) / 7 at the edge, (10 + 3 * 20 + 3 * 30 + 40) / 8 inside.
    assert rows['smooth'] == [7, 25, 45, 63]
    assert rows['small'] == [20, 60]


def test_a_size_that_a_model_does_not_take_is_refused(data, tmp_path):
    vit = timm.create_model('vit_tiny_patch16_224', num_classes=3).train()
    message = 'a does not take images of 3x32x32: Input height .32. doesn.t match model .224.. Give .*img_size=32'
    configs = {'a': {**GEOMETRY, 'crop_mode': 'center'}}
    with pytest.raises(ValueError, match=message):
        evaluate_robustness({'a': vit}, tmp_path / 'out', dataset(data), corruptions=[], data_configs=configs)
    assert vit.training and not (tmp_path / 'out').exists()
    fits = timm.create_model('vit_tiny_patch16_224', img_size=32, num_classes=3)
    evaluate_robustness({'a': fits}, tmp_path / 'out', dataset(data), corruptions=[], data_configs=configs)


def test_command_refuses_a_size_that_a_model_does_not_take(data, tmp_path, capsys):
    arguments = command(data, tmp_path, '--workers', '0')
    arguments[1] = name = 'vit_tiny_patch16_224'
    torch.save(timm.create_model(name, num_classes=3).state_dict(), tmp_path / 'net.pth')
    assert main(arguments) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith(f'timm-pushpull: {name} does not take images of 3x32x32: ')


def test_a_killed_worker_is_told_in_one_line(data, tmp_path, capsys, monkeypatch):
    arguments = command(data, tmp_path, '--corruptions', 'fog', 'contrast', '--severities', '2', '--workers', '1')

    def kill(image, corruption, severity, index, seed):
        if corruption == 'contrast':
            os.kill(os.getpid(), signal.SIGKILL)
        return corrupt(image, corruption, severity, index, seed)

    with monkeypatch.context() as patch:
        patch.setattr(views, 'corrupt', kill)
        assert main([*arguments, '--batch-size', '21']) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith('timm-pushpull: A process that reads images was killed (')
    assert 'repeat the command with fewer workers (--workers)' in error
    finished = contents(tmp_path / 'out' / 'predictions')
    assert finished and main(arguments) == 0
    assert finished.items() < contents(tmp_path / 'out' / 'predictions').items()


@pytest.mark.parametrize('error', [ConnectionResetError(104, 'Connection reset by peer'), EOFError()])
def test_a_killed_worker_may_be_noticed_by_its_pipe(error, data, tmp_path, capsys, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr(views, 'corrupt', fail)
    assert main(command(data, tmp_path, '--corruptions', 'fog', '--severities', '2', '--workers', '0')) == 1
    assert 'A process that reads images was killed (' in capsys.readouterr().err.splitlines()[-1]


def test_the_limit_takes_images_of_each_class(data, tmp_path):
    evaluate_robustness({'a': network()}, tmp_path, dataset(data), corruptions=[], limit=4)
    assert read_images(tmp_path) == [('0/0.png', 0), ('0/1.png', 0), ('1/0.png', 1), ('2/0.png', 2)]


def test_command_measures_the_ema_weights_on_demand(data, tmp_path):
    arguments = command(data, tmp_path, '--corruptions', 'fog', '--severities', '2', '--workers', '0')
    weights = {key: torch.zeros_like(value) for key, value in network().state_dict().items()}
    always = {place: {**weights, 'fc.bias': torch.eye(3)[place]} for place in (0, 1)}
    torch.save({'state_dict': always[0], 'state_dict_ema': always[1]}, tmp_path / 'net.pth')
    for options, answer in (([], 0), (['--use-ema'], 1)):
        folder = tmp_path / f'out {answer}'
        assert main([*arguments, *options, '--output', str(folder)]) == 0
        assert set(read_predictions(folder)['test_resnet']['fog', 2]['prediction']) == {answer}


@pytest.mark.parametrize('options, formats', [([], {False}), (['--channels-last'], {True})])
def test_command_runs_models_in_the_format_on_demand(options, formats, data, tmp_path, monkeypatch):
    found, run_model = set(), evaluate._run_model

    def watch(run, name, pixels, readable):
        weight = run.models[name].layer1[0].conv2.weight
        found.add(weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous())
        return run_model(run, name, pixels, readable)

    monkeypatch.setattr(evaluate, '_run_model', watch)
    arguments = command(data, tmp_path, '--corruptions', 'fog', '--severities', '2', '--workers', '0', *options)
    assert main(arguments) == 0 and found == formats
