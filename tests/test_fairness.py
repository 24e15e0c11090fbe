import argparse
import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from test_labels import network, write_images
from test_results import FIVE, write_results

from timm_pushpull import load_model
from timm_pushpull.checkpoint import augmentation_of
from timm_pushpull.cli import main
from timm_pushpull.registry import hub_configs
from timm_pushpull.robustness.fairness import training_operations, unfair_comparisons
from timm_pushpull.robustness.metrics import TEST_CORRUPTIONS
from timm_pushpull.robustness.store import read_protocol
from timm_pushpull.robustness.summary import write_summary

ALL_FOUR = ['Brightness', 'Color', 'Contrast', 'Sharpness', 'Posterize']


def operations(**options):
    return training_operations(augmentation_of({'model': 'x', **options}))


def test_operations_are_those_of_timms_transform():
    assert operations() == ['ColorJitter']  # the default of train.py
    assert operations(color_jitter=None) == operations(color_jitter=0.0) == operations(no_aug=True) == []
    assert operations(aa='augmix-m3-w3') == operations(aa='rand-m9-mstd0.5-inc1') == ALL_FOUR
    assert operations(aa='rand-m9') == ALL_FOUR
    assert operations(aa='v0') == ['Color', 'Posterize']
    assert operations(aa='original-mstd0.5') == ['Color', 'Contrast', 'Sharpness', 'Posterize']
    assert operations(aa='3a') == ['Desaturate', 'GaussianBlur', 'ColorJitter']
    assert operations(aa='3a', color_jitter=None) == ['Desaturate', 'GaussianBlur']
    simclr = dict(color_jitter=0.2, color_jitter_prob=0.8, grayscale_prob=0.2, gaussian_blur_prob=0.5)
    assert operations(**simclr) == ['GaussianBlur', 'ColorJitter', 'RandomGrayscale']
    assert operations(color_jitter=None, reprob=0.25) == ['RandomErasing']
    assert operations(color_jitter=None, model_kwargs={'augment': 'prime', 'alpha': 1}) == ['PRIME deformation']
    assert operations(aa='mine', model_kwargs={'augment': 'prime'}) == ['PRIME deformation', 'the unknown policy mine']
    assert training_operations({}) == [] and augmentation_of({}) == {}  # nothing is known


def write_models(folder, augmentations, passes, crops=(), **corruptions):
    write_results(folder, {name: dict.fromkeys(passes, 3) for name in augmentations}, images=10, classes=2)
    protocol = json.loads((folder / 'protocol.json').read_text())
    for name, augmentation in augmentations.items():
        protocol['models'][name] = {**protocol['models'][name], 'augmentation': augmentation}
    for name, crop in zip(augmentations, crops, strict=False):
        protocol['models'][name]['crop_pct'] = crop
    protocol['corruptions'] = corruptions or protocol['corruptions']
    protocol['data']['clean'] = any(severity == 0 for _, severity in passes)
    (folder / 'protocol.json').write_text(json.dumps(protocol))
    return unfair_comparisons(read_protocol(folder), write_summary(folder))


def test_only_corruptions_of_the_test_count(tmp_path):
    augmix, v0 = {'aa': 'augmix-m3', 'color_jitter': 0.4}, {'aa': 'v0'}
    augmentations = {'a@1': augmix, 'a@2': augmix, 'b': v0, 'c': {}, 'd': {'augment': 'prime'}, 'e': {'aa': 'my-own'}}
    fifteen = [(name, severity) for name in TEST_CORRUPTIONS for severity in FIVE]
    end = '. This favours them over models trained without these operations.'
    start = 'the training had operations that overlap corruptions of the test,'
    assert write_models(tmp_path / 'fifteen', augmentations, fifteen) == [
        f'a@1, a@2: {start} Brightness (brightness), Color (saturate), Contrast (contrast), Sharpness (defocus blur, '
        f'glass blur, gaussian blur) (aa augmix-m3){end}',
        f'b: {start} Color (saturate) (aa v0){end}',
        f'd: {start} PRIME deformation (elastic){end}',
        f'e: {start} the unknown policy my-own (aa my-own){end}',
    ]
    fog = [('fog', 2), ('contrast', 2)]
    assert [sentence[:4] for sentence in write_models(tmp_path / 'fog', augmentations, fog)] == ['a@1,', 'e: t']
    with pytest.raises(ValueError, match='models.a.augmentation must be a mapping, or nothing, got 7'):
        write_models(tmp_path / 'wrong', {'a': 7}, fog)
    others = [('checkerboard_cutout', 1), ('color_quant', 1)]
    found = write_models(tmp_path / 'others', {'a': v0, 'b': {'reprob': 0.2}}, others, stored_as='a/b')
    assert [sentence.split('test, ')[1].split('.')[0] for sentence in found] == [
        'Posterize (color quant) (aa v0)',
        'RandomErasing (checkerboard cutout)',
    ]


def test_stored_corruptions_are_cropped_as_imagenet_c(tmp_path):
    crops, passes = {'a': 0.95, 'b': 0.875, 'c': 0.95, 'd': 1.0}, [('clean', 0), ('fog', 1)]
    models = dict.fromkeys(crops, {})

    def write(folder, passes, **corruptions):
        return write_models(tmp_path / folder, models, passes, crops.values(), **corruptions)

    folders = 'corruption/severity/class/file'
    made = 'the stored corruptions were cropped to 0.875 when they were made, as ImageNet-C was. --crop-pct 0.875 crops'
    assert write('folders', passes, stored_as=folders) == [
        f'a, c: clean images are cropped to 0.95 of their short side, {made} the clean images the same way.',
        f'd: clean images are cropped to 1.0 of their short side, {made} the clean images the same way.',
    ]
    whole = 'the stored corruptions are whole. --crop-pct 1 crops the clean images the same way.'
    assert write('arrays', passes, stored_as='corruption.npy') == [
        f'a, c: clean images are cropped to 0.95 of their short side, {whole}',
        f'b: clean images are cropped to 0.875 of their short side, {whole}',
    ]
    assert write('generated', passes) == write('without clean', passes[1:], stored_as=folders) == []


def test_the_command_and_the_page_say_it(tmp_path, undrawn, capsys):
    """The recipe is in the checkpoint or beside it, the stored corruptions are not cropped."""
    pytest.importorskip('matplotlib')
    data = write_images(tmp_path / 'data', 'abcd', images=2)
    for file in data.glob('*/*.png'):
        path = tmp_path / 'stored' / 'contrast' / '3' / file.relative_to(data)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.asarray(Image.open(file)) // 2).save(path)
    weights = network(4).state_dict()
    options = dict(model='test_resnet', num_classes=4, color_jitter=0.4)
    (tmp_path / 'beside').mkdir()
    torch.save({'state_dict': weights, 'args': argparse.Namespace(**options)}, tmp_path / 'in.pth.tar')
    save_file(weights, tmp_path / 'beside' / 'model.safetensors')
    (tmp_path / 'beside' / 'args.yaml').write_text(yaml.safe_dump({**options, 'aa': 'augmix-m4'}))
    torch.save(weights, tmp_path / 'none.pth')

    def command(*models):
        arguments = ['robustness', *(f'{label}=test_resnet' for label, _ in models), '--num-classes', 4, '--data-dir']
        arguments += [data, '--stored', tmp_path / 'stored', '--corruptions', 'all', '--severities', 3, '--workers', 0]
        arguments += ['--input-size', 3, 32, 32, '--crop-pct', 0.8, '--output', tmp_path / 'out', '--checkpoint']
        assert main([*map(str, arguments), *(str(tmp_path / file) for _, file in models)]) == 0
        return capsys.readouterr().out.splitlines()

    lines = command(('inside', 'in.pth.tar'), ('beside', 'beside/model.safetensors'), ('none', 'none.pth'))
    protocol = read_protocol(tmp_path / 'out')
    assert protocol['models']['inside']['augmentation'] == {'color_jitter': 0.4}
    assert protocol['models']['beside']['augmentation'] == {'aa': 'augmix-m4', 'color_jitter': 0.4}
    assert 'augmentation' not in protocol['models']['none']
    start = 'the training had operations that overlap corruptions of the test,'
    end = '. This favours them over models trained without these operations.'
    sentences = [
        f'inside: {start} ColorJitter (contrast){end}',
        f'beside: {start} Contrast (contrast) (aa augmix-m4){end}',
        'inside, beside, none: clean images are cropped to 0.8 of their short side, the stored corruptions were '
        'cropped to 0.875 when they were made, as ImageNet-C was. --crop-pct 0.875 crops the clean images the same '
        'way.',
    ]
    assert [line for line in lines if line in sentences] == sentences
    # The same weights, from a file without options, are the same model: what is known stays.
    assert [line for line in command(('inside', 'none.pth')) if line in sentences] == sentences
    assert main(['report', str(tmp_path / 'out')]) == 0
    text = (tmp_path / 'out' / 'report' / 'report.html').read_text()
    assert all(f'<p><b>{sentence}</b></p>' in text.split('<h2>Protocol</h2>')[1] for sentence in sentences)
    assert '<td>in training: aa</td><td>–</td><td>augmix-m4</td><td>–</td>' in text
    lines = command(('none', 'in.pth.tar'))  # and what becomes known joins it
    assert f'inside, none: {start} ColorJitter (contrast){end}' in lines


def test_options_of_another_network_do_not_count(tmp_path, capsys):
    data = write_images(tmp_path / 'data', 'abcd', images=1)
    torch.save(network(4).state_dict(), tmp_path / 'net.pth')
    arguments = ['robustness', 'test_resnet', '--num-classes', '4', '--checkpoint', str(tmp_path / 'net.pth')]
    arguments += ['--data-dir', str(data), '--corruptions', 'fog', '--severities', '1', '--workers', '0', '--output']
    pytest.importorskip('imagecorruptions')
    (tmp_path / 'args.yaml').write_text('model: resnet50\naa: v0\n')
    assert main([*arguments, str(tmp_path / 'other')]) == 0
    assert 'augmentation' not in read_protocol(tmp_path / 'other')['models']['test_resnet']
    (tmp_path / 'args.yaml').write_text('[1]')
    assert main([*arguments, str(tmp_path / 'wrong')]) == 2
    assert 'args.yaml must hold a mapping' in capsys.readouterr().err


def test_the_options_beside_the_weights_of_a_model_folder_count(tmp_path):
    name = 'pp_resnet18.pp3_negated_prime_contrastnorm_r64_imagenette'
    shutil.copytree(hub_configs() / name, tmp_path / name)
    for model in (name, f'local-dir:{tmp_path / name}'):
        assert load_model(model).training_augmentation == {'augment': 'prime'}
    assert load_model('pp_resnet18.pp3_r64_imagenette').training_augmentation == {}
    # A training that started from a folder names that folder, not its network.
    options = yaml.safe_load((tmp_path / name / 'args.yaml').read_text())
    (tmp_path / name / 'args.yaml').write_text(yaml.safe_dump({**options, 'model': 'local-dir:start'}))
    assert load_model(f'local-dir:{tmp_path / name}').training_augmentation == {'augment': 'prime'}
