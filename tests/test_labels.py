import json
import pkgutil

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo, create_transform
from timm.data.real_labels import RealLabelsImagenet

from timm_pushpull import evaluate_robustness, open_dataset
from timm_pushpull.class_lists import find_class_map
from timm_pushpull.cli import main
from timm_pushpull.robustness.corruptions import corrupt
from timm_pushpull.robustness.data import DatasetImages
from timm_pushpull.robustness.labels import find_model_classes, find_right_classes
from timm_pushpull.robustness.page import protocol_sentence
from timm_pushpull.robustness.store import read_images, read_predictions, read_protocol

GEOMETRY = dict(
    input_size=(3, 32, 32), crop_pct=0.8, interpolation='bilinear', mean=(0.2, 0.5, 0.7), std=(0.1, 0.3, 0.6)
)
SYNSETS = ImageNetInfo().label_names()
TEN = [SYNSETS[index] for index in (0, 217, 482, 491, 497, 566, 569, 571, 574, 701)]


def write_images(folder, labels=TEN, images=3, name='{}.png'):
    """Write noise, with another mean in each image."""
    generator = np.random.default_rng(0)
    for label in labels:
        (folder / label).mkdir(parents=True)
        for index in range(images):
            pixels = generator.normal(generator.uniform(50, 200, 3), 60, (40, 44, 3)).clip(0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / label / name.format(index))
    return folder


def network(num_classes=1000, seed=0, **cfg):
    torch.manual_seed(seed)
    model = timm.create_model('test_resnet', num_classes=num_classes, pretrained_cfg_overlay=dict(GEOMETRY, **cfg))
    torch.nn.init.normal_(model.fc.weight)  # predictions that differ between images
    return model.eval()


def logits_of(model, images, corruption='clean', severity=0):
    """Return the logits of each image, one by one."""
    resize, crop, *to_tensor = create_transform(**GEOMETRY, is_training=False).transforms
    rows = []
    for index in range(len(images)):
        image = crop(resize(images[index][0]))
        image = corrupt(image, corruption, severity, index) if severity else image
        for step in to_tensor:
            image = step(image)
        rows.append(model(image[None])[0])
    return torch.stack(rows).detach()


def check(found, logits, targets):
    """Compare predictions with the maximum over these logits, and its rank."""
    assert found['prediction'].tolist() == logits.argmax(1).tolist()
    ranks = (logits > logits.gather(1, torch.tensor(targets)[:, None])).sum(1).clamp(max=5)
    assert found['rank'].tolist() == ranks.tolist() and len(set(ranks.tolist())) > 3


def test_predictions_are_among_the_synsets_of_the_folders(tmp_path, caplog):
    pytest.importorskip('imagecorruptions')
    model, images = network(), open_dataset(write_images(tmp_path / 'data'))
    indices, targets = [SYNSETS.index(label) for label in TEN], [target for _, target in images.reader.samples]
    evaluate_robustness({'net': model}, tmp_path / 'out', images, corruptions=['contrast'], severities=[2])
    for key, found in read_predictions(tmp_path / 'out')['net'].items():
        check(found, logits_of(model, images, *key)[:, indices], targets)
    assert caplog.messages == [
        'net predicts among the 10 classes of the images, out of its 1,000. The class map imagenet_1000 (--class-map) '
        'gives the errors among all.'
    ]
    protocol = read_protocol(tmp_path / 'out')
    assert protocol['models']['net']['predicts_among'] == '10 of 1000 classes' and protocol['data']['classes'] == 10
    assert 'Predictions among the classes of the images alone: net 10 of 1000 classes.' in protocol_sentence(protocol)


def test_a_class_map_of_all_classes_gives_the_errors_among_all(tmp_path, caplog):
    model, folder = network(), write_images(tmp_path / 'data')
    model.fc.bias.data[[SYNSETS.index(label) for label in TEN]] += 20  # right ones among all 1,000
    images = open_dataset(folder, class_map='imagenet_1000')
    targets = [SYNSETS.index(label) for label in TEN for _ in range(3)]
    evaluate_robustness({'net': model}, tmp_path / 'out', images, corruptions=[])
    found = read_predictions(tmp_path / 'out')['net']['clean', 0]
    check(found, logits_of(model, images), targets)
    assert [target for _, target in read_images(tmp_path / 'out')] == targets
    assert 'predicts_among' not in read_protocol(tmp_path / 'out')['models']['net']
    assert not any('predicts among' in message for message in caplog.messages)
    with pytest.raises(ValueError, match='data.classes is 1000 there and 10 here'):
        evaluate_robustness({'net': model}, tmp_path / 'out', open_dataset(folder), corruptions=[])


def test_the_list_of_all_classes_is_timms():
    with open(find_class_map('imagenet_1000')) as file:
        assert file.read().split() == SYNSETS


@pytest.mark.parametrize('names', [{}, {'label_names': ImageNetInfo().label_descriptions()}], ids=['none', 'words'])
def test_all_synsets_in_another_order_are_refused(names, tmp_path):
    model, folder = network(**names), write_images(tmp_path / 'data')
    (tmp_path / 'map.txt').write_text('\n'.join(SYNSETS[::-1]))
    reverse = open_dataset(folder, class_map=str(tmp_path / 'map.txt'))
    with pytest.raises(ValueError, match='net has its classes in another order than the images: class 0 is .n01440764'):
        evaluate_robustness({'net': model}, tmp_path / 'out', reverse, corruptions=[])
    (tmp_path / 'map.txt').write_text('\n'.join(SYNSETS))
    evaluate_robustness(
        {'net': model}, tmp_path / 'out', open_dataset(folder, class_map=str(tmp_path / 'map.txt')), corruptions=[]
    )


def test_models_of_these_classes_join_restricted_ones(tmp_path):
    models = {'all': network(), 'ten': network(10), 'named': network(12, label_names=[*TEN[::-1], 'a', 'b'])}
    images = open_dataset(write_images(tmp_path / 'data'))
    targets = [target for _, target in images.reader.samples]
    evaluate_robustness(models, tmp_path / 'out', images, corruptions=[])
    found = read_predictions(tmp_path / 'out')
    check(found['ten']['clean', 0], logits_of(models['ten'], images), targets)
    check(found['named']['clean', 0], logits_of(models['named'], images)[:, [*range(9, -1, -1)]], targets)
    among = {name: model.get('predicts_among') for name, model in read_protocol(tmp_path / 'out')['models'].items()}
    assert among == {'all': '10 of 1000 classes', 'ten': None, 'named': '10 of 12 classes'}


def test_valid_labels_are_those_of_validate(tmp_path):
    model, images = network(12), open_dataset(write_images(tmp_path / 'data', 'dcab'))
    (tmp_path / 'labels.txt').write_text('7\n2\n11\n0\n')
    options = dict(corruptions=[], valid_labels=tmp_path / 'labels.txt')
    evaluate_robustness({'net': model}, tmp_path / 'out', images, **options)
    targets = [target for _, target in images.reader.samples]
    found = read_predictions(tmp_path / 'out')['net']['clean', 0]
    assert found['prediction'].tolist() == logits_of(model, images)[:, [7, 2, 11, 0]].argmax(1).tolist()
    assert np.mean(found['rank'] == 0) == np.mean(found['prediction'] == targets)
    (tmp_path / 'labels.txt').write_text('7\n2\n0\n11\n')
    with pytest.raises(ValueError, match='models.net.valid_labels_sha256 is'):
        evaluate_robustness({'net': model}, tmp_path / 'out', images, **options)


def test_class_names_of_another_head_do_not_count(tmp_path):
    images = DatasetImages(open_dataset(write_images(tmp_path / 'images', 'ab', images=1)))
    found = find_model_classes('net', network(5, label_names=['c', 'd', 'b']), images, [4, 1])
    assert found == ([4, 1], 'net predicts among the 2 classes of the images, out of its 5.')


@pytest.mark.parametrize(
    'content, message',
    [
        ('7\n2\n', 'valid_labels must have one line for each of the 4 classes, got 2'),
        ('7\n2\n12\n0\n', 'valid_labels must be indices of the 12 classes of net, got 12'),
        ('7\n2\n7\n0\n', "another index on each line, line 3 of .*labels.txt is '7'"),
        ('7\n\n2\n1\n0\n', "another index on each line, line 2 of .*labels.txt is ''"),
        ('7\n2\n-1\n0\n', "line 3 of .*labels.txt is '-1'"),
    ],
)
def test_wrong_valid_labels_are_refused(content, message, tmp_path):
    images = open_dataset(write_images(tmp_path / 'data', 'abcd', images=1))
    (tmp_path / 'labels.txt').write_text(content)
    with pytest.raises(ValueError, match=message):
        evaluate_robustness(
            {'net': network(12)}, tmp_path / 'out', images, corruptions=[], valid_labels=tmp_path / 'labels.txt'
        )
    assert not (tmp_path / 'out').exists()


def test_valid_labels_of_other_synsets_are_refused(tmp_path):
    images = open_dataset(write_images(tmp_path / 'data', images=1))
    indices = [SYNSETS.index(label) for label in TEN]
    (tmp_path / 'labels.txt').write_text('\n'.join(map(str, [indices[1], indices[0], *indices[2:]])))
    with pytest.raises(ValueError, match=f"class 0 is '{TEN[1]}' in net, '{TEN[0]}' in the images"):
        evaluate_robustness(
            {'net': network()}, tmp_path / 'out', images, corruptions=[], valid_labels=tmp_path / 'labels.txt'
        )


def test_real_labels_are_not_by_the_logits_of_a_model_with_more_classes():
    images = [f'ILSVRC2012_val_{number:08d}.JPEG' for number in (1, 2)]
    assert find_right_classes([[217], [0, 5]], images, TEN[:2], valid_labels=[217, 5]) == [[1], [0]]


@pytest.mark.parametrize('kind', ['restricted', 'all', 'numbers'])
def test_real_labels_are_those_of_validate(kind, tmp_path):
    """On images whose labels are none, one and several, one of them of another class."""
    labels = json.loads(pkgutil.get_data('timm.data', '_info/imagenet_real_labels.json'))
    generator = np.random.default_rng(0)
    names = iter(generator.permutation(50_000) + 1)
    folder = write_images(tmp_path / 'data', images=6)
    real, files = {}, {}
    for place, path in enumerate(sorted(folder.rglob('*.png'))):
        number = int(next(names))
        files[number] = path.rename(path.with_name(f'ILSVRC2012_val_{number:08d}.png'))
        own, other = SYNSETS.index(path.parent.name), SYNSETS.index(TEN[place % 10])
        real[number] = labels[number - 1] = [[own], [], [other, own], [other, 3], [3], [own, 3]][place % 6]
    (tmp_path / 'real.json').write_text(json.dumps(labels))
    if kind == 'numbers':  # folders without synsets need the valid labels
        (tmp_path / 'labels.txt').write_text('\n'.join(str(SYNSETS.index(label)) for label in TEN))
        for place, label in enumerate(TEN):
            (folder / label).rename(folder / f'c{place}')
    model = network()
    model.fc.bias.data[[3, *(SYNSETS.index(label) for label in TEN)]] += 20  # right ones among all 1,000
    images = open_dataset(folder, class_map='imagenet_1000' if kind == 'all' else '')
    valid = [*range(1000)] if kind == 'all' else [SYNSETS.index(label) for label in TEN]
    options = dict(corruptions=[], real_labels=tmp_path / 'real.json')
    if kind == 'numbers':
        with pytest.raises(ValueError, match=r'the classes c0, c1, c2, 7 more are none of its synsets: give valid'):
            evaluate_robustness({'net': network(10)}, tmp_path / 'out', images, **options)
        options['valid_labels'] = tmp_path / 'labels.txt'
    (row,) = evaluate_robustness({'net': model}, tmp_path / 'out', images, **options)
    logits = logits_of(model, images)
    only = torch.full_like(logits, -torch.inf)
    only[:, valid] = logits[:, valid]
    for number, right in real.items():
        labels[number - 1] = [label for label in right if label in valid]
    (tmp_path / 'of classes.json').write_text(json.dumps(labels))
    theirs = RealLabelsImagenet([''] * 50_000, tmp_path / 'of classes.json')
    theirs.filenames = [name.replace('.png', '.JPEG') for name in images.filenames(basename=True)]
    theirs.add_result(only)
    assert row['top1'] == pytest.approx(theirs.get_accuracy(1), abs=1e-3)
    assert row['top5'] == pytest.approx(theirs.get_accuracy(5), abs=1e-3) and row['top1'] < row['top5']
    left = [label for number, label in sorted(real.items()) if set(label) & set(valid)]
    assert len(read_images(tmp_path / 'out')) == len(left) == len(theirs.is_correct[1]) < 60
    with pytest.raises(ValueError, match='data.'):
        evaluate_robustness({'net': model}, tmp_path / 'out', images, **{**options, 'real_labels': None})


@pytest.mark.parametrize(
    'content, message',
    [
        ('{', 'real_labels must be a JSON file, .*real.json is not one'),
        ('{"a": [1]}', 'real_labels must list the right classes, 0 to 999, of each image, .*real.json does not'),
        ('[[1], [1000]]', 'real.json does not'),
        ('[1, 2]', 'real.json does not'),
        ('[[1], [2]]', r'real_labels are of 2 images named ILSVRC2012_val_00000001 and so on, .*/0.png is none'),
    ],
)
def test_wrong_real_labels_are_refused(content, message, tmp_path):
    images = open_dataset(write_images(tmp_path / 'data', images=1))
    (tmp_path / 'real.json').write_text(content)
    with pytest.raises(ValueError, match=message):
        evaluate_robustness(
            {'net': network()}, tmp_path / 'out', images, corruptions=[], real_labels=tmp_path / 'real.json'
        )
    assert not (tmp_path / 'out').exists()


def test_alexnets_errors_are_not_by_real_labels(tmp_path):
    """The protocol tells them apart, see ``_measures`` in summary.py."""
    from test_results import FIVE, write_results

    from timm_pushpull.robustness.metrics import TEST_CORRUPTIONS
    from timm_pushpull.robustness.summary import write_summary

    passes = {(name, severity): 50 for name in TEST_CORRUPTIONS for severity in FIVE}
    write_results(tmp_path, {'net': passes})
    protocol = json.loads((tmp_path / 'protocol.json').read_text())
    protocol['data']['real_labels_sha256'] = 'ab' * 32
    (tmp_path / 'protocol.json').write_text(json.dumps(protocol))
    (row,) = write_summary(tmp_path)
    assert row['plain_mCE'] == 50 and row['alexnet_normalized_mCE'] == ''


def test_command(tmp_path, capsys):
    pytest.importorskip('imagecorruptions')
    write_images(tmp_path / 'data', 'abcd')
    torch.save(network(12).state_dict(), tmp_path / 'net.pth')
    (tmp_path / 'labels.txt').write_text('7\n2\n11\n0\n')
    arguments = ['robustness', 'test_resnet', '--num-classes', '12', '--checkpoint', tmp_path / 'net.pth']
    arguments += ['--data-dir', tmp_path / 'data', '--output', tmp_path / 'out', '--input-size', '3', '32', '32']
    arguments += ['--workers', '0', '--corruptions', 'fog', '--severities', '2']
    labels = ['--valid-labels', tmp_path / 'labels.txt']
    assert main([str(argument) for argument in (*arguments, *labels)]) == 0
    assert read_protocol(tmp_path / 'out')['models']['test_resnet']['predicts_among'] == '4 of 12 classes'
    capsys.readouterr()
    for options, message in [
        ([], 'test_resnet has 12 classes, but the images have 4 (a, b, c, d).'),
        (['--valid-labels', 'missing'], 'valid_labels must be a file, missing is not one.'),
        ([*labels, '--real-labels', 'missing'], 'real_labels must be a file, missing is not one.'),
    ]:
        assert main([str(argument) for argument in (*arguments, *options)]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count('\n') == 1
