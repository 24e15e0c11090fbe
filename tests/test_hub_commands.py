"""`timm-pushpull hub`: export a checkpoint into a folder, check the folder, push it, load it from the Hub."""

import argparse
import copy
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from conftest import SMALL
from hub_server import TOKEN
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file
from test_hub import FOLDER, NAME
from timm.data import resolve_data_config

from timm_pushpull import PushPullConv2d, open_dataset
from timm_pushpull.class_lists import find_class_map
from timm_pushpull.cli import main
from timm_pushpull.errors import InputError
from timm_pushpull.hub.card import Evaluation, _description, _results
from timm_pushpull.hub.export import _label_config, _labels, _license, _read_evaluation, _without_paths
from timm_pushpull.models.pretrained import HUB_MODELS
from timm_pushpull.recipes import read_recipe
from timm_pushpull.registry import CARD, CHECKSUM, CONFIG, RECIPE, hub_configs, read_checksum
from timm_pushpull.robustness.data import open_stored
from timm_pushpull.robustness.evaluate import evaluate_robustness
from timm_pushpull.robustness.metrics import TEST_CORRUPTIONS, display_name
from timm_pushpull.robustness.store import read_protocol, write_protocol
from timm_pushpull.weights import WEIGHTS, file_sha256

CLASSES = ['n01440764', 'n02102040']
TAG = 'pp_resnet18.pp5_r32_trial'
OPTIONS = {
    'model': 'pp_resnet18',
    'model_kwargs': {**SMALL, 'avg_pool_size': 5, 'augment': 'prime'},
    'num_classes': 2,
    'input_size': [3, 32, 32],
    'crop_pct': 1.0,
    'interpolation': 'bilinear',
    'mean': [0.5, 0.5, 0.5],
    'epochs': 3,
    'seed': 7,
    'data_dir': '/data',
    'output': '/runs',
}


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A run of train.py: a checkpoint with its options, and the options beside it."""
    folder = tmp_path_factory.mktemp('run')
    torch.manual_seed(0)
    model = timm.create_model('pp_resnet18', num_classes=2, avg_pool_size=5, **SMALL)
    averaged = copy.deepcopy(model)
    with torch.no_grad():
        averaged.fc.bias.add_(1)
    torch.save(
        {
            'epoch': 2,
            'arch': 'pp_resnet18',
            'state_dict': model.state_dict(),
            'state_dict_ema': averaged.state_dict(),
            'args': argparse.Namespace(**OPTIONS),
        },
        folder / 'last.pth.tar',
    )
    (folder / RECIPE).write_text(yaml.safe_dump(OPTIONS))
    return folder


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp('data')
    noise = np.random.default_rng(0)
    for name in CLASSES:
        (folder / 'val' / name).mkdir(parents=True)
        for place in range(2):
            image = Image.fromarray(noise.integers(0, 256, (40, 40, 3), dtype=np.uint8))
            image.save(folder / 'val' / name / f'{place}.png')
    return folder


def export(run, output, *options, tag=TAG):
    assert main(['hub', 'export', str(run / 'last.pth.tar'), '--name', tag, '--output', str(output), *options]) == 0
    return output / tag


@pytest.fixture(scope='module')
def exported(run, tmp_path_factory):
    return export(run, tmp_path_factory.mktemp('hub'))


def fails(capsys, *arguments):
    """Run the command, which must end with one line and status 2."""
    capsys.readouterr()
    assert main(['hub', *map(str, arguments)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith('timm-pushpull: ')
    return error


def test_export(run, exported, capsys):
    assert {path.name for path in exported.iterdir()} == {CARD, CHECKSUM, CONFIG, RECIPE, WEIGHTS}
    checkpoint = torch.load(run / 'last.pth.tar', weights_only=False)['state_dict']
    weights = load_file(exported / WEIGHTS)
    assert weights.keys() == checkpoint.keys()
    assert all(torch.equal(weights[key], checkpoint[key]) for key in weights)
    assert (exported / CHECKSUM).read_text() == f'{file_sha256(exported / WEIGHTS)}  {WEIGHTS}\n'
    model = timm.create_model(f'local-dir:{exported}', pretrained=True)
    assert (model.conv1.avg_pool_size, model.num_classes) == (5, 2)
    expected = dict(tag='pp5_r32_trial', input_size=[3, 32, 32], crop_pct=1.0, mean=[0.5, 0.5, 0.5], pool_size=[1, 1])
    found = {key: model.pretrained_cfg[key] for key in expected}
    assert {**found, 'input_size': list(found['input_size'])} == expected
    assert 'augment' not in (exported / CONFIG).read_text()
    assert (exported / WEIGHTS).stat().st_mode == (exported / CONFIG).stat().st_mode
    recipe = yaml.safe_load((exported / RECIPE).read_text())
    assert recipe == {key: value for key, value in OPTIONS.items() if key not in ('data_dir', 'output')}
    assert main(['hub', 'check', str(exported)]) == 0
    assert capsys.readouterr().out.strip().endswith(f'OK: 2 classes, SHA-256 {read_checksum(exported)}')


def test_the_code_of_a_card_runs(exported, tmp_path, monkeypatch, capsys):
    """Here for two classes, fewer than the example shows of others."""
    code = (exported / CARD).read_text().split('```python\n')[1].split('```')[0]
    Image.new('RGB', (48, 40)).save(tmp_path / 'image.jpg')
    monkeypatch.chdir(tmp_path)
    exec(code.replace(f'hf-hub:timm-pushpull/{TAG}', f'local-dir:{exported}'), {})
    assert sorted(json.loads(capsys.readouterr().out)) == [0, 1]


def test_averaged_weights(run, tmp_path, capsys):
    folder = export(run, tmp_path, '--use-ema', '--org', 'me')
    assert f"'hf-hub:me/{TAG}'" in (folder / CARD).read_text()
    checkpoint = torch.load(run / 'last.pth.tar', weights_only=False)
    assert torch.equal(load_file(folder / WEIGHTS)['fc.bias'], checkpoint['state_dict_ema']['fc.bias'])
    assert 'running average' in (folder / CARD).read_text()
    del checkpoint['state_dict_ema'], checkpoint['args']
    shutil.copy(run / RECIPE, tmp_path)
    torch.save(checkpoint, tmp_path / 'plain.pth.tar')
    assert 'no EMA weights' in fails(capsys, 'export', tmp_path / 'plain.pth.tar', '--name', TAG, '--use-ema')


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
def test_the_effect_of_rounding(dtype, run, data, tmp_path):
    folder = export(run, tmp_path, '--dtype', dtype, '--data-dir', str(data), '--workers', '0')
    checkpoint = torch.load(run / 'last.pth.tar', weights_only=False)['state_dict']
    weights = load_file(folder / WEIGHTS)
    for key, tensor in checkpoint.items():
        rounded = tensor.to(getattr(torch, dtype)) if tensor.is_floating_point() else tensor
        assert weights[key].dtype == rounded.dtype and torch.equal(weights[key], rounded)
    before, after = (
        float(number)
        for number in re.search(
            r'accuracy on 4 images from ([\d.]+) to ([\d.]+) %', (folder / CARD).read_text()
        ).groups()
    )
    transform = timm.data.create_transform((3, 32, 32), crop_pct=1.0, mean=(0.5,) * 3, interpolation='bilinear')
    images = [(transform(Image.open(path)), path.parent.name) for path in sorted((data / 'val').rglob('*.png'))]
    logits = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()(torch.stack([x for x, _ in images]))
    right = [CLASSES[place] == name for place, (_, name) in zip(logits.argmax(1).tolist(), images, strict=True)]
    assert after == 100 * sum(right) / len(right) and 0 <= before <= 100
    config = json.loads((folder / CONFIG).read_text())
    assert "['label_descriptions'][name] for name" in (folder / CARD).read_text()
    assert config['label_names'] == CLASSES and 'tench' in config['label_descriptions'][CLASSES[0]]


def test_a_weight_that_float16_does_not_hold(run, tmp_path, capsys):
    checkpoint = torch.load(run / 'last.pth.tar', weights_only=False)
    checkpoint['state_dict']['bn1.running_var'][3] = 1e5
    shutil.copy(run / RECIPE, tmp_path)
    torch.save(checkpoint, tmp_path / 'last.pth.tar')
    arguments = ('export', tmp_path / 'last.pth.tar', '--name', TAG, '--output', tmp_path)
    assert 'not finite in torch.float16: take bfloat16' in fails(capsys, *arguments, '--dtype', 'float16')
    assert not (tmp_path / TAG).exists()
    export(tmp_path, tmp_path, '--dtype', 'bfloat16')


def test_the_options_are_those_of_the_run(tmp_path):
    """Those of the run, not of the recipe with its name, without a folder of this machine."""
    name = 'pp_resnet18.pp5_in100'
    options = {**read_recipe(name), 'epochs': 3, 'mixup': 0.8, 'output': '/runs', 'data_dir': '/data'}
    model = timm.create_model('pp_resnet18', num_classes=100, avg_pool_size=5)
    torch.save({'arch': 'pp_resnet18', 'state_dict': model.state_dict()}, tmp_path / 'last.pth.tar')
    (tmp_path / RECIPE).write_text(yaml.safe_dump(options))
    (tmp_path / name).mkdir()
    (tmp_path / name / RECIPE).write_text('old: recipe')
    folder = export(tmp_path, tmp_path, tag=name)
    local = {'output', 'data_dir'}
    expected = {key: value for key, value in options.items() if key not in local}
    expected['class_map'] = 'imagenet_100_synsets.txt'
    assert yaml.safe_load((folder / RECIPE).read_text()) == expected
    assert '--config args.yaml --data-dir DATA\n' in (folder / CARD).read_text()
    labels = json.loads((folder / CONFIG).read_text())['label_names']
    with open(options['class_map']) as file:
        assert labels == file.read().split()
    assert main(['hub', 'check', str(folder)]) == 0


def test_the_preprocessing_is_that_of_the_tag_that_was_trained(tmp_path):
    model = timm.create_model('pp_resnet18', num_classes=2)
    torch.save({'state_dict': model.state_dict()}, tmp_path / 'last.pth.tar')
    (tmp_path / RECIPE).write_text(yaml.safe_dump({'model': 'pp_resnet18.tv_in1k', 'num_classes': 2}))
    cfg = json.loads((export(tmp_path, tmp_path) / CONFIG).read_text())['pretrained_cfg']
    found = [cfg.get(key) for key in ('input_size', 'crop_pct', 'interpolation', 'test_input_size')]
    assert found == [[3, 224, 224], 0.875, 'bilinear', None] and cfg['tag'] == TAG.partition('.')[2]


def test_a_training_from_a_tag_of_ours(tmp_path):
    """The export has the unit of the tag, and no names of the tag's classes, which are not those of the training."""
    source = 'pp_resnet18.pp3_negated_prime_contrastnorm_r64_imagenette'
    model = timm.create_model(source, avg_pool_size=5).eval()
    torch.save({'state_dict': model.state_dict()}, tmp_path / 'last.pth.tar')
    options = {'model': source, 'model_kwargs': {'avg_pool_size': 5, 'augment': 'prime'}, 'num_classes': 10}
    (tmp_path / RECIPE).write_text(yaml.safe_dump(options))
    folder = export(tmp_path, tmp_path)
    assert main(['hub', 'check', str(folder)]) == 0
    again, x = timm.create_model(f'local-dir:{folder}', pretrained=True).eval(), torch.randn(2, 3, 64, 64)
    assert torch.equal(again(x), model(x)) and 'n01440764' not in (folder / CONFIG).read_text()
    assert '`pull_kernel=negated`' in (folder / CARD).read_text() and not again.pretrained_cfg.get('label_names')


@pytest.mark.skipif(not hasattr(timm.models, 'get_model_args'), reason='timm 1.0.31 and later keep the arguments')
def test_a_training_from_a_folder(exported, tmp_path):
    source = f'local-dir:{exported}'
    model = timm.create_model(source, num_classes=3).eval()
    torch.save({'state_dict': model.state_dict()}, tmp_path / 'last.pth.tar')
    options = {'model': source, 'pretrained': True, 'num_classes': 3}
    (tmp_path / RECIPE).write_text(yaml.safe_dump(options))
    folder = export(tmp_path, tmp_path)
    assert main(['hub', 'check', str(folder)]) == 0
    again, x = timm.create_model(f'local-dir:{folder}', pretrained=True).eval(), torch.randn(2, 3, 32, 32)
    assert torch.equal(again(x), model(x)) and again.conv1.avg_pool_size == 5
    assert yaml.safe_load((folder / RECIPE).read_text()) == {**options, 'model': f'local-dir:{exported.name}'}


@pytest.mark.parametrize(
    'name, start, license',
    [
        ('pp_convnextv2_nano', {'pretrained': True}, 'cc-by-nc-4.0'),
        ('pp_convnext_tiny.dinov3_lvd1689m', {'pretrained': True}, 'dinov3-license'),  # which the Hub does not know
        ('pp_resnet18', {'initial_checkpoint': '/runs/last.pth.tar'}, 'unknown'),
    ],
)
def test_the_license_is_that_of_the_initial_weights(name, start, license, tmp_path):
    model = timm.create_model(name, num_classes=2)
    torch.save({'state_dict': model.state_dict()}, tmp_path / 'last.pth.tar')
    (tmp_path / RECIPE).write_text(yaml.safe_dump({'model': name, 'num_classes': 2, **start}))
    folder = export(tmp_path, tmp_path, tag=f'{name.partition(".")[0]}.mine')
    assert json.loads((folder / CONFIG).read_text())['pretrained_cfg']['license'] == license
    card = (folder / CARD).read_text()
    in_metadata = f'license: {license}\n' if 'dinov3' not in license else f'license: other\nlicense_name: {license}\n'
    assert f'\n{in_metadata}' in card and f'## Licence\n{license}. ' in card
    assert _license({'pretrained': True}, None) == 'unknown'  # timm names none for some weights
    assert _license({'pretrained': True, 'pretrained_path': '/runs/net.safetensors'}, 'cc-by-nc-4.0') == 'unknown'
    assert _license({}, 'cc-by-nc-4.0') == 'apache-2.0'


def test_the_card_tells_the_unit():
    model = PushPullConv2d(3, 4, 3)
    assert 'push kernel, and a pull kernel derived from it, of inverted' in _description(model, {'avg_pool_size': 5})
    assert "its negative as pull kernel (not the paper's)" in _description(model, {'pull_kernel': 'negated'})
    assert _description(torch.nn.Conv2d(3, 4, 3), {}).startswith('A plain network, without a push-pull unit')


@pytest.mark.parametrize('network, has_unit', [('test_resnet', False), ('pp_mobilenetv3_small_100', True)])
def test_any_network_is_exported(network, has_unit, tmp_path):
    name = f'{network}.mine'
    model = timm.create_model(network, num_classes=2, in_chans=1)
    torch.save({'state_dict': model.state_dict()}, tmp_path / 'last.pth.tar')
    options = {'model': network, 'num_classes': 2, 'input_size': [1, 32, 32], 'mean': [0.5], 'std': [0.2]}
    (tmp_path / RECIPE).write_text(yaml.safe_dump(options))
    folder = export(tmp_path, tmp_path, tag=name)
    assert ('paper_ids' in json.loads((folder / CONFIG).read_text())['pretrained_cfg']) == has_unit
    card = (folder / CARD).read_text()
    assert ('whose first convolution is a push-pull unit' in card) == has_unit and 'A ResNet' not in card
    assert f"'hf-hub:timm-pushpull/{name}'" in card
    loaded = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    assert loaded(torch.randn(1, 1, 32, 32)).shape == (1, 2)


def test_the_card_holds_the_evaluation(run, exported, data, tmp_path, capsys):
    pytest.importorskip('imagecorruptions')
    measure = ['robustness', '--data-dir', str(data), '--severities', '3', '--workers', '0', '--num-classes', '2']
    ours = [f'ours=local-dir:{exported}', '--output', str(tmp_path / 'results'), '--baseline', 'ours']
    assert main([*measure, *ours]) == 0
    folder = export(run, tmp_path, '--results', str(tmp_path / 'results'))
    card = ModelCard.load(folder / CARD)
    assert all(f'| {display_name(corruption)} |' in card.text for corruption in TEST_CORRUPTIONS)
    assert ', 4 validation images' in str(card)
    assert (
        '--data-dir DATA --output results --limit 4 --severities 3\n' in card.text
        and '4 images of 2 classes' in card.text
    )
    summary = (tmp_path / 'results' / 'summary.csv').read_text().splitlines()
    row = dict(zip(summary[0].split(','), summary[1].split(','), strict=True))
    results = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert results == {
        'Top-1 accuracy': float(row['top1']),
        'Top-5 accuracy': float(row['top5']),
        'Plain mCE': float(row['plain_mCE']),
    }
    shown = re.search(r'\*\*plain mCE\*\* \| ([\d.]+) \(([\d.]+) to ([\d.]+)\)', card.text).groups()
    assert [float(number) for number in shown] == [
        round(float(row[name]), 1) for name in ('plain_mCE', 'plain_mCE_low', 'plain_mCE_high')
    ]
    assert main(['hub', 'check', str(folder)]) == 0

    # Results of other weights are refused; the card says so for results of the weights before rounding.
    arguments = ('export', run / 'last.pth.tar', '--name', TAG, '--output', tmp_path / 'other')
    assert 'no results of these weights' in fails(capsys, *arguments, '--use-ema', '--results', tmp_path / 'results')
    folder = export(run, tmp_path / 'half', '--dtype', 'float16', '--results', str(tmp_path / 'results'))
    card = ModelCard.load(folder / CARD)
    assert 'The weights were measured before rounding' in card.text and card.data.eval_results is None


VIEW = '--input-size 3 48 40 --interpolation bicubic --mean 0.4 0.5 0.6 --std 0.3 0.2 0.1 --crop-pct 0.75'


@pytest.mark.parametrize(
    'images, options, facts',
    [
        (
            '--data-dir DATA',
            f'--limit 2 --seed 3 --corruptions fog spatter --severities 2 4 {VIEW} --amp --amp-dtype bfloat16',
            'seed 3, .*Means over severities 2 4.*Not the defaults of the model: `input_size=3 48 40`, '
            '`interpolation=bicubic`, `mean=0.4 0.5 0.6`, `std=0.3 0.2 0.1`, `crop_pct=0.75`, `precision=bfloat16`',
        ),
        (
            '--stored STORED',
            '--limit 4 --corruptions sparkles --severities 1 --skip-unreadable --amp --amp-dtype float16',
            'stored .*: `precision=float16`.*could not be read: 1. ',
        ),
        ('--stored STORED --data-dir DATA', '--limit 4 --corruptions fog sparkles --severities 1', 'Top-1 accuracy'),
    ],
)
def test_the_command_of_the_card_gives_its_numbers(images, options, facts, run, exported, data, tmp_path):
    pytest.importorskip('imagecorruptions')
    for corruption in ('fog', 'sparkles'):
        shutil.copytree(data / 'val', tmp_path / 'stored' / corruption / '1')
    if '--skip-unreadable' in options:
        (tmp_path / 'stored' / 'sparkles' / '1' / CLASSES[1] / '0.png').write_text('not an image')
    paths = {'DATA': str(data), 'STORED': str(tmp_path / 'stored'), 'FOLDER': str(tmp_path / 'stored')}
    model = f'local-dir:{exported}'
    arguments = ['robustness', model, *images.split(), '--output', str(tmp_path / 'first'), *options.split()]
    assert main([paths.get(word, word) for word in arguments]) == 0
    card = ModelCard.load(export(run, tmp_path, '--results', str(tmp_path / 'first')) / CARD)
    assert re.search(facts, card.text)
    assert ('Not the defaults' in card.text) == ('--amp' in options)
    named = [result.dataset_name for result in card.data.eval_results or []]
    assert all(('precision=bfloat16' in name) == ('bfloat16' in options) for name in named)
    words = re.search('timm-pushpull (robustness .*)\n', card.text)[1].split()
    paths |= {'results': str(tmp_path / 'second'), f'hf-hub:timm-pushpull/{TAG}': model}
    assert main([paths.get(word, word) for word in words]) == 0
    assert read_protocol(tmp_path / 'second') == read_protocol(tmp_path / 'first')
    assert (tmp_path / 'second' / 'summary.csv').read_text() == (tmp_path / 'first' / 'summary.csv').read_text()


def test_results_that_a_card_would_hide_are_refused(data, tmp_path):
    net, images = timm.create_model('test_resnet', num_classes=2).eval(), open_dataset(data / 'val')
    evaluate_robustness({'net': net}, tmp_path / 'out', images, shifted={'renditions': images}, corruptions=())
    with pytest.raises(InputError, match='renditions holds results on a natural shift'):
        _read_evaluation(tmp_path / 'out' / 'shifted' / 'renditions', 'x', net, net)
    (tmp_path / 'labels.txt').write_text('1\n0\n')  # in the results class 0 is that of logit 1
    evaluate_robustness({'net': net}, tmp_path / 'two', images, corruptions=(), valid_labels=tmp_path / 'labels.txt')
    with pytest.raises(InputError, match='two must hold results on all classes of the model in its order'):
        _read_evaluation(tmp_path / 'two', 'x', net, net)
    protocol = read_protocol(tmp_path / 'out')
    protocol['data']['real_labels_sha256'] = 'ab' * 32
    write_protocol(tmp_path / 'out', protocol)
    with pytest.raises(InputError, match='out holds results by ImageNet-ReaL labels'):
        _read_evaluation(tmp_path / 'out', 'x', net, net)


def test_the_evaluation_of_a_checkpoint_has_its_baseline(data, tmp_path):
    nets = {name: timm.create_model('test_resnet', num_classes=2).eval() for name in ('ours', 'plain')}
    images = timm.data.create_dataset('', root=str(data / 'val'))
    evaluate_robustness(nets, tmp_path / 'out', images, corruptions=(), baseline='plain')
    evaluation = _read_evaluation(tmp_path / 'out', 'x', nets['ours'], nets['ours'])
    assert (evaluation.row['model'], evaluation.baseline['model']) == ('ours', 'plain')


def test_the_size_for_tests_is_the_default_of_clean_images(data, tmp_path):
    sizes = dict(input_size=(3, 32, 32), test_input_size=(3, 48, 48))
    net = timm.create_model('test_resnet', num_classes=2, pretrained_cfg_overlay=sizes).eval()
    shutil.copytree(data / 'val', tmp_path / 'stored' / 'fog' / '1')
    stored, passes = open_stored(tmp_path / 'stored', ['fog'], [1]), dict(corruptions=['fog'], severities=[1])
    evaluate_robustness({'net': net}, tmp_path / 'clean', open_dataset(data / 'val'), corruptions=())
    evaluate_robustness({'net': net}, tmp_path / 'corrupted', stored=stored, **passes)
    for folder, size in (('clean', 48), ('corrupted', 32)):
        evaluation = _read_evaluation(tmp_path / folder, 'x', net, net)
        assert (evaluation.row['img_size'], evaluation.unlike_default) == (size, {})


def test_the_evaluation_is_not_that_of_the_adapted_model(data, tmp_path):
    net, images = timm.create_model('test_resnet', num_classes=2).eval(), open_dataset(data / 'val')
    evaluate_robustness({'net': net}, tmp_path / 'out', images, corruptions=(), adapt_batch_norm=4)
    assert read_protocol(tmp_path / 'out')['models'].keys() == {'net', 'net+bn4'}
    assert _read_evaluation(tmp_path / 'out', 'x', net, net).row['model'] == 'net'


def test_two_evaluations_of_the_same_weights_are_refused(data, tmp_path):
    net, other = (timm.create_model('test_resnet', num_classes=2).eval() for _ in range(2))
    images, named = open_dataset(data / 'val'), {'small': net, 'other': other, 'large': net}
    data_configs = {name: resolve_data_config({'input_size': (3, 32, 32)}, model=net) for name in named}
    data_configs['large']['input_size'] = (3, 64, 64)
    evaluate_robustness(named, tmp_path / 'out', images, corruptions=(), data_configs=data_configs)
    with pytest.raises(InputError, match='out holds several results of these weights: small, large. Give'):
        _read_evaluation(tmp_path / 'out', 'x', net, net)
    assert _read_evaluation(tmp_path / 'out', 'x', other, other).row['model'] == 'other'


def test_names_of_classes_in_a_configuration():
    assert _label_config([]) == _label_config(['n01440764', '']) == {}
    assert _label_config(['a', 'b']) == {'label_names': ['a', 'b']}
    assert _labels('pp_resnet18.pp3_in1k', {}, 1000)[:2] == ['n01440764', 'n01443537']
    assert _labels('pp_resnet18.pp3_in1k', {}, 10) == _labels('pp_resnet18.mine', {}, 1000) == []


def test_a_recipe_has_no_option_of_one_machine():
    options = {'workers': 3, 'data_dir': 'data', 'teacher': '/a/x.pth', 'opt': 'sgd'}
    assert _without_paths(options) == {'teacher': 'x.pth', 'opt': 'sgd'}


def test_the_card_shows_the_baseline_beside_the_model():
    numbers = dict(E=(10, 8, 13), plain_mCE=(30, 27, 34), CE_fog=(50, 41, 52))
    row, baseline = (
        {'model': model, 'top1': 90.0 - shift, 'severities': '1 2 3 4 5', 'unreadable': 0}
        | {'img_size': 64 + shift, 'crop_pct': 1.0, 'interpolation': 'bilinear'}
        | {
            f'{name}{end}': n + shift
            for name, ns in numbers.items()
            for end, n in zip(('', '_low', '_high'), ns, strict=True)
        }
        for model, shift in (('ours', 0), ('plain', 7))
    )
    protocol = dict(data=dict(images=100, classes=10), corruptions=dict(generated_by='a package', seed=0))
    protocol['models'] = {'ours': {}, 'plain': {}, 'ours+bn4': {'adapt_batch_norm': {}}}
    text = '\n'.join(_results('name', 'name', Evaluation(protocol, row, baseline, True, {}), None, 3, 'float16'))
    assert '| name | baseline: plain |' in text
    assert '| **E** | 10.0 (8.0 to 13.0) | 17.0 (15.0 to 20.0) |' in text
    assert '| fog | 50.0 (41.0 to 52.0) | 57.0 (48.0 to 59.0) |' in text
    assert 'in different ways: 64 pixels, crop 1.0, bilinear; 71 pixels' in text and 'BatchNorm adapted' not in text


def test_export_refuses(run, tmp_path, capsys):
    checkpoint = run / 'last.pth.tar'
    shutil.copy(checkpoint, tmp_path)
    (run / 'text.pth.tar').write_text('hello')
    for arguments, words in [
        ((tmp_path / 'none.pth.tar', '--name', TAG), 'must be a file of train.py'),
        ((tmp_path / 'last.pth.tar', '--name', TAG), 'must be beside the args.yaml'),
        ((checkpoint, '--name', 'pp_resnet18.a b'), "such as pp_resnet18.pp3_in1k, got 'pp_resnet18.a b'"),
        ((run / 'text.pth.tar', '--name', TAG), 'cannot be read as a checkpoint'),
        ((checkpoint, '--name', 'pp_resnet18'), "such as pp_resnet18.pp3_in1k, got 'pp_resnet18'"),
        ((checkpoint, '--name', 'pp_resnet50.x'), 'is a checkpoint of pp_resnet18: begin the name with that'),
        ((checkpoint, '--name', TAG, '--data-dir', tmp_path / 'none'), 'data_dir must be a folder'),
        ((checkpoint, '--name', TAG, '--results', tmp_path), 'holds no results'),
    ]:
        assert words in fails(capsys, 'export', *arguments, '--output', tmp_path / 'out')
    assert not (tmp_path / 'out' / TAG).exists()
    (tmp_path / RECIPE).write_text(yaml.safe_dump({**OPTIONS, 'num_classes': 5}))
    assert 'does not fit the model' in fails(capsys, 'export', tmp_path / 'last.pth.tar', '--name', TAG)


def test_weights_of_a_tag_never_change(run, exported, capsys):
    before = {path: path.read_bytes() for path in exported.iterdir()}
    export(run, exported.parent)
    for options in (['--use-ema'], ['--dtype', 'bfloat16']):
        arguments = ('export', run / 'last.pth.tar', '--name', TAG, '--output', exported.parent, *options)
        assert 'other weights' in fails(capsys, *arguments)
    assert {path: path.read_bytes() for path in exported.iterdir()} == before


def test_other_weights_are_refused_before_images_are_measured(run, exported, data, tmp_path, capsys):
    shutil.copytree(data, tmp_path / 'data')
    for image in (tmp_path / 'data').glob('*/*/*.png'):
        image.write_text('not a image')
    options = ('--name', TAG, '--output', exported.parent, '--dtype', 'float16', '--data-dir', tmp_path / 'data')
    assert 'other weights' in fails(capsys, 'export', run / 'last.pth.tar', *options)


def test_images_with_the_classes_of_the_training_in_another_order_are_refused(run, tmp_path, capsys):
    names = Path(find_class_map('imagenet_100')).read_text().split()
    options = {**OPTIONS, 'num_classes': 100, 'class_map': '/data/imagenet_100_synsets.txt', 'model_kwargs': {}}
    (tmp_path / RECIPE).write_text(yaml.safe_dump(options))
    torch.save(timm.create_model('pp_resnet18', num_classes=100).state_dict(), tmp_path / 'last.pth.tar')
    for name in names:
        (tmp_path / 'data' / name).mkdir(parents=True)
        Image.new('RGB', (32, 32)).save(tmp_path / 'data' / name / 'image.png')
    (tmp_path / 'map.txt').write_text('\n'.join([*names[:98], names[99], names[98]]))
    arguments = 'export', tmp_path / 'last.pth.tar', '--name', TAG, '--output', tmp_path / 'hub', '--data-dir'
    error = fails(capsys, *arguments, tmp_path / 'data', '--class-map', tmp_path / 'map.txt')
    assert (
        f"another order than the images: class 98 is '{names[98]}' in {tmp_path}/last.pth.tar, '{names[99]}'" in error
    )
    assert main(['hub', *map(str, arguments), str(tmp_path / 'data')]) == 0


def test_the_class_map_of_the_training_names_the_classes(data, tmp_path, capsys):
    (tmp_path / 'map.txt').write_text('\n'.join(reversed(CLASSES)))
    options = {**OPTIONS, 'class_map': str(tmp_path / 'map.txt'), 'model_kwargs': {}}
    (tmp_path / RECIPE).write_text(yaml.safe_dump(options))
    torch.save(timm.create_model('pp_resnet18', num_classes=2).state_dict(), tmp_path / 'last.pth.tar')
    folder = export(tmp_path, tmp_path / 'hub')
    assert json.loads((folder / CONFIG).read_text())['label_names'] == CLASSES[::-1]
    arguments = 'export', tmp_path / 'last.pth.tar', '--name', TAG, '--output', tmp_path / 'hub', '--data-dir', data
    assert 'in another order than the images' in fails(capsys, *arguments)
    shutil.copytree(data / 'val', tmp_path / 'renamed')
    for name, other in zip(CLASSES, ('ant', 'bee'), strict=True):
        (tmp_path / 'renamed' / name).rename(tmp_path / 'renamed' / other)
    folder = export(tmp_path, tmp_path / 'hub', '--data-dir', str(tmp_path / 'renamed'))
    assert json.loads((folder / CONFIG).read_text())['label_names'] == CLASSES[::-1]


def test_damaged_weights_are_replaced(run, tmp_path):
    folder = export(run, tmp_path)
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[:-1])
    assert (export(run, tmp_path) / WEIGHTS).read_bytes() == whole


def test_a_known_tag_is_of_its_own_network(run, tmp_path, capsys):
    arguments = ('export', run / 'last.pth.tar', '--output', tmp_path, '--name')
    error = fails(capsys, *arguments, 'pp_resnet18.pp3_r64_imagenette')
    assert 'avg_pool_size=5, channels=[8, 8, 8, 8], layers=[1, 1, 1, 1], num_classes=2' in error
    assert 'avg_pool_size=3, num_classes=10' in error


FAULTS = {
    'no folder': (shutil.rmtree, 'is not a folder'),
    'no checksum': (lambda folder: (folder / CHECKSUM).unlink(), 'lacks model.safetensors.sha256'),
    'not JSON': (lambda folder: (folder / CONFIG).write_text('{'), 'is not JSON'),
    'no model_args': (lambda folder: edit(folder / CONFIG, model_args=None), 'model_args must be a mapping'),
    'no model in the recipe': (lambda folder: replace(folder / RECIPE, 'model:', 'net:'), 'model must be a string'),
    'no card': (lambda folder: (folder / CARD).unlink(), 'lacks README.md'),
    'pickle': (lambda folder: (folder / 'pytorch_model.bin').touch(), 'may hold a pickle'),
    'damaged': (
        lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-1] + b'x'),
        'has the SHA-256',
    ),
    'other network': (
        lambda folder: edit(folder / CONFIG, architecture='pp_resnet34'),
        f'describes pp_resnet34.{TAG.split(".")[1]}: give',
    ),
    'other classes': (lambda folder: edit(folder / CONFIG, label_names=['a']), 'names 1 classes, the model has 2'),
    'no such setting': (lambda folder: edit(folder / CONFIG, model_args={'window': 3}), 'does not describe a model'),
    'shapes': (lambda folder: reshape(folder), 'size mismatch for fc.bias'),
    'not finite': (lambda folder: reshape(folder, torch.full((2,), float('nan'))), 'not finite'),
    'transformers': (lambda folder: replace(folder / CARD, '- push-pull', '- push-pull\n- transformers'), 'tags'),
    'card': (lambda folder: replace(folder / CARD, 'library_name: timm', 'library_name: x'), 'library_name: timm'),
    'yaml': (lambda folder: replace(folder / CARD, '---\n', '---\nmodel-index: 3\n', 1), 'model_index'),
}


def edit(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def replace(path, old, new, count=-1):
    path.write_text(path.read_text().replace(old, new, count))


def reshape(folder, bias=None):
    weights = load_file(folder / WEIGHTS)
    save_file({**weights, 'fc.bias': torch.zeros(3) if bias is None else bias}, folder / WEIGHTS)
    (folder / CHECKSUM).write_text(f'{file_sha256(folder / WEIGHTS)}  {WEIGHTS}\n')


@pytest.mark.parametrize('fault', FAULTS)
def test_check_finds(fault, exported, tmp_path, capsys):
    folder = tmp_path / TAG
    shutil.copytree(exported, folder)
    spoil, words = FAULTS[fault]
    spoil(folder)
    assert words in fails(capsys, 'check', folder)


def test_check_of_all(capsys):
    assert main(['hub', 'check']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(':')[0] for line in lines] == [str(hub_configs() / name) for name in HUB_MODELS]
    for line, name in zip(lines, HUB_MODELS, strict=True):
        has_weights = (hub_configs() / name / WEIGHTS).exists()  # not in a wheel
        found = 'OK: 10 classes, SHA-256' if has_weights else 'OK, without the weights of SHA-256'
        assert line.endswith(f'{found} {HUB_MODELS[name].sha256}')


def test_check_of_a_folder_without_its_weights(exported, tmp_path, capsys):
    shutil.copytree(exported, tmp_path / TAG, ignore=shutil.ignore_patterns(WEIGHTS))
    assert main(['hub', 'check', str(tmp_path / TAG)]) == 0
    assert 'OK, without the weights of SHA-256' in capsys.readouterr().out


@pytest.fixture
def signed_in(hub, monkeypatch):
    monkeypatch.setenv('HF_TOKEN', TOKEN)
    return hub


def test_push_and_create_elsewhere(signed_in, tmp_path, capsys, monkeypatch):
    push = ['hub', 'push', str(FOLDER), '--org', 'timm-pushpull', '--yes']
    assert main([*push, '--revision', 'v1']) == 0
    shown = capsys.readouterr().out
    assert all(file in shown for file in (CARD, CHECKSUM, CONFIG, RECIPE, WEIGHTS)) and 'new, public' in shown
    repository = signed_in.repositories[f'timm-pushpull/{NAME}']
    assert repository.tags == {'v1': repository.branch} and not repository.private
    files = {path.name: path.read_bytes() for path in FOLDER.iterdir()}
    assert files.items() <= repository.commits[repository.branch].items()

    commits = len(repository.commits)
    assert main([*push, '--revision', 'v1']) == 0 and len(repository.commits) == commits  # nothing changed: no commit

    x = torch.randn(2, 3, 64, 64)
    local = timm.create_model(f'local-dir:{FOLDER}', pretrained=True).eval()(x)
    monkeypatch.setitem(HUB_MODELS, NAME, HUB_MODELS[NAME]._replace(weights=None))
    for name in (NAME, f'hf-hub:timm-pushpull/{NAME}@v1'):
        model = timm.create_model(name, pretrained=True, cache_dir=tmp_path / 'elsewhere').eval()
        assert torch.equal(model(x), local)


def test_push_asks(signed_in, exported, monkeypatch, capsys):
    for typed in (['n'], []):
        monkeypatch.setattr('sys.stdin', io.StringIO(''.join(typed)))
        assert main(['hub', 'push', str(exported), '--org', 'me']) == 0
        assert 'Nothing was uploaded' in capsys.readouterr().out and not signed_in.repositories
    monkeypatch.setattr('builtins.input', lambda question: 'y')
    assert main(['hub', 'push', str(exported), '--org', 'me', '--private']) == 0
    assert signed_in.repositories[f'me/{TAG}'].private and 'new, private' in capsys.readouterr().out


def test_push_refuses(signed_in, run, exported, tmp_path, capsys, monkeypatch):
    push = ('--org', 'me', '--yes')
    assert 'could not be pushed' in fails(capsys, 'push', exported, '--org', 'bad org!', '--yes')
    assert main(['hub', 'push', str(exported), *push, '--revision', 'v1']) == 0
    averaged = export(run, tmp_path, '--use-ema')
    assert 'holds other weights' in fails(capsys, 'push', averaged, *push)
    shutil.copytree(exported, tmp_path / 'other' / TAG)
    replace(tmp_path / 'other' / TAG / CARD, 'A network', 'This network')
    assert 'has the git tag v1 at another commit' in fails(
        capsys, 'push', tmp_path / 'other' / TAG, *push, '--revision', 'v1'
    )
    (tmp_path / 'other' / TAG / WEIGHTS).unlink()
    assert f'has no {WEIGHTS} to push' in fails(capsys, 'push', tmp_path / 'other' / TAG, *push)
    monkeypatch.delenv('HF_TOKEN')
    assert '401' in fails(capsys, 'push', exported, '--org', 'somebody', '--yes')
