"""Whatever is wrong with a file of ours, the result is the same as before, or an error that names the file."""

import argparse
import copy
import io
import json
import shutil

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from test_results import FIVE, write_results

from timm_pushpull import load_model
from timm_pushpull.errors import InputError
from timm_pushpull.files import atomic_write
from timm_pushpull.hub.check import check_folder
from timm_pushpull.hub.export import export_checkpoint
from timm_pushpull.registry import CARD, CHECKSUM, CONFIG, RECIPE
from timm_pushpull.robustness.examples import read_examples
from timm_pushpull.robustness.metrics import TEST_CORRUPTIONS
from timm_pushpull.robustness.page import protocol_sentence, protocol_table
from timm_pushpull.robustness.store import (
    PREDICTION,
    predictions_path,
    read_classes,
    read_images,
    read_predictions,
    read_protocol,
    write_images,
)
from timm_pushpull.robustness.summary import read_baseline, read_summary, summarize, write_summary

NAME = 'test_resnet.trial'
OPTIONS = dict(
    model='test_resnet',
    model_kwargs={'drop_rate': 0.1},
    num_classes=2,
    in_chans=3,
    gp='max',
    bn_eps=None,
    img_size=None,
    input_size=[3, 40, 48],
    crop_pct=0.7,
    interpolation='bilinear',
    mean=[0.1, 0.2, 0.3],
    std=[0.4, 0.5, 0.6],
    seed=7,
    class_map='',
    no_aug=False,
    aa='rand-m3',
    color_jitter=0.3,
    color_jitter_prob=0.1,
    gaussian_blur_prob=0.2,
    grayscale_prob=0.3,
    reprob=0.4,
)


# The files, and what is read from them.


def write_folder(folder):
    """Write results of ten images of two classes."""
    passes = {(name, severity): 4 + severity for name in TEST_CORRUPTIONS for severity in FIVE}
    write_results(folder, {'a': {('clean', 0): 3, **passes}, 'b.1': {('clean', 0): 5}}, images=10, classes=2)
    write_images(folder, [f'{place}.png' for place in range(10)], [0, 1] * 5, ['n01440764', 'n02102040'])
    content = io.BytesIO()
    Image.new('RGB', (8, 8)).save(content, 'png')
    atomic_write(folder / 'examples' / 'fog-3-9.png', content.getvalue())
    write_summary(folder, 'a')


def read_folder(folder):
    protocol, predictions = read_protocol(folder), read_predictions(folder)
    protocol_sentence(protocol), protocol_table(protocol)
    rows = summarize(protocol, predictions, read_baseline(folder))
    return rows, read_images(folder), read_classes(folder), read_examples(folder, predictions)


def read_table(folder):
    return read_summary(folder / 'summary.csv')


def write_run(folder):
    """Write a run of train.py: a checkpoint with its options, and the options beside it."""
    folder.mkdir()
    model = timm.create_model('test_resnet', num_classes=2)
    options = argparse.Namespace(**OPTIONS)
    torch.save({'state_dict': model.state_dict(), 'args': options}, folder / 'last.pth.tar')
    torch.save(model.state_dict(), folder / 'plain.pth')
    save_file(model.state_dict(), folder / 'plain.safetensors')
    (folder / RECIPE).write_text(yaml.safe_dump(OPTIONS))


def export(folder):
    exported = export_checkpoint(folder / 'last.pth.tar', NAME, folder / 'hub')
    return json.loads((exported / CONFIG).read_text())


def export_anew(folder):
    shutil.rmtree(folder / 'hub', ignore_errors=True)
    return export(folder)


def write_hub_folder(folder):
    write_run(folder)
    export(folder)


def check(folder):
    words, model = check_folder(folder / 'hub' / NAME), timm.create_model(f'local-dir:{folder / "hub" / NAME}')
    return words, json.dumps(timm.data.resolve_data_config({}, model=model))


def weights_of(name):
    def load(folder):
        model = load_model('test_resnet', folder / name, num_classes=2)
        config = timm.data.resolve_data_config({}, model=model)
        return config, {key: tensor.tolist() for key, tensor in model.state_dict().items()}

    return load


FORMATS = {
    'protocol.json': (write_folder, read_folder),
    'images.csv': (write_folder, read_folder),
    'classes.csv': (write_folder, read_folder),
    'predictions/a/fog-3.npy': (write_folder, read_folder),
    'summary.csv': (write_folder, read_folder),
    'table: summary.csv': (write_folder, read_table),
    RECIPE: (write_run, export_anew),
    f'hub/{NAME}/{RECIPE}': (write_hub_folder, export),
    f'check: hub/{NAME}/{RECIPE}': (write_hub_folder, check),
    f'hub/{NAME}/{CONFIG}': (write_hub_folder, check),
    f'hub/{NAME}/{CARD}': (write_hub_folder, check),
    f'hub/{NAME}/{CHECKSUM}': (write_hub_folder, check),
    f'beside a checkpoint: {RECIPE}': (write_run, weights_of('plain.pth')),
    'last.pth.tar': (write_run, weights_of('last.pth.tar')),
    'plain.pth': (write_run, weights_of('plain.pth')),
    'plain.safetensors': (write_run, weights_of('plain.safetensors')),
}


@pytest.fixture(scope='module')
def written(tmp_path_factory):
    """Folders of files as they should be, by the function that writes them."""
    root = tmp_path_factory.mktemp('written')
    writers = {writer for writer, _ in FORMATS.values()}
    for writer in writers:
        torch.manual_seed(0)
        writer(root / writer.__name__)
    return {writer: root / writer.__name__ for writer in writers}


def check_format(format, spoiled, written, tmp_path):
    """Read each spoiled content of a file: the result must be as before, or an InputError that names the file."""
    writer, read = FORMATS[format]
    folder = shutil.copytree(written[writer], tmp_path / format.replace('/', '_'))
    path = folder / format.split(': ')[-1]
    whole, faults = read(folder), []
    for words, content in spoiled:
        path.write_bytes(content)
        try:
            if read(folder) != whole:
                faults.append(f'{words}: another result')
        except InputError as error:
            if str(path) not in str(error):
                faults.append(f'{words}: {error}')
        except Exception as error:
            faults.append(f'{words}: {type(error).__name__} {error}')
    assert not faults, '\n'.join(faults)


# What may be wrong with any file.


@pytest.mark.parametrize('format', FORMATS)
def test_a_damaged_file_is_named(format, written, tmp_path):
    whole = (written[FORMATS[format][0]] / format.split(': ')[-1]).read_bytes()
    spoiled = {
        'empty': b'',
        'half': whole[: len(whole) // 2],
        'not UTF-8': b'\xff\xfe\xff' + whole,
        'a list': b'[1, 2]\n',
        'blank': b'\n \n',
        'zeros': bytes(len(whole)),
    }
    check_format(format, spoiled.items(), written, tmp_path)


# What may be wrong with fields.


def other_type(value):
    if isinstance(value, (str, dict, list, tuple)):
        return 7
    return ['x']


def change(value, where, *new):
    """Replace a field, or delete it if there is no new value."""
    *parents, field = where
    root = copy.deepcopy(value)
    inner = root
    for parent in parents:
        inner = inner[parent]
    if new:
        inner[field] = new[0]
    else:
        del inner[field]
    return root


def fields(value, where=()):
    """List the places of all fields, inner ones too."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*where, key), inner
        yield from fields(inner, (*where, key))


def spoil_fields(content):
    """Drop, empty and retype each field."""
    for where, value in fields(content):
        words = '.'.join(map(str, where))
        yield f'{words} dropped', change(content, where)
        yield f'{words} None', change(content, where, None)
        yield f'{words} of another type', change(content, where, other_type(value))
        yield f'{words} a text', change(content, where, 'x')
        if type(value) in (int, float):
            yield f'{words} a flag', change(content, where, True)
        if isinstance(value, (str, dict, list)):
            yield f'{words} emptied', change(content, where, type(value)())


def spoil_options(options):
    """Retype each option beside or in a checkpoint: it may lack any, and those of another network do not count."""
    for words, value in spoil_fields(options):
        if words.endswith((' of another type', ' a text')) and words != 'model a text':
            yield words, value


def test_fields_of_the_protocol(written, tmp_path):
    content = json.loads((written[write_folder] / 'protocol.json').read_text())
    other_texts = 'corruptions.generated_by a text', 'models.a.interpolation a text', 'models.b.1.interpolation a text'
    spoiled = [
        (words, json.dumps(value).encode()) for words, value in spoil_fields(content) if words not in other_texts
    ]
    check_format('protocol.json', spoiled, written, tmp_path)


def test_fields_of_the_options(written, tmp_path):
    spoiled = [(words, yaml.safe_dump(value).encode()) for words, value in spoil_fields(OPTIONS)]
    for format in (RECIPE, f'check: hub/{NAME}/{RECIPE}'):
        check_format(format, spoiled, written, tmp_path)
    spoiled = [(words, yaml.safe_dump(value).encode()) for words, value in spoil_options(OPTIONS)]
    check_format(f'beside a checkpoint: {RECIPE}', spoiled, written, tmp_path)


def test_fields_of_a_configuration(written, tmp_path):
    content = json.loads((written[write_hub_folder] / 'hub' / NAME / CONFIG).read_text())
    spoiled = [(words, json.dumps(value).encode()) for words, value in spoil_fields(content)]
    check_format(f'hub/{NAME}/{CONFIG}', spoiled, written, tmp_path)


def test_fields_of_a_card(written, tmp_path):
    _, front, text = (written[write_hub_folder] / 'hub' / NAME / CARD).read_text().split('---\n', 2)
    spoiled = [
        (words, f'---\n{yaml.safe_dump(value)}---\n{text}'.encode())
        for words, value in spoil_fields(yaml.safe_load(front))
    ]
    spoiled += [(words, f'---\n{words}\n---\n{text}'.encode()) for words in ('', '[1, 2]', 'a: b: c', '7')]
    check_format(f'hub/{NAME}/{CARD}', spoiled, written, tmp_path)


@pytest.mark.parametrize('format', ['last.pth.tar', 'plain.pth'])
def test_fields_of_a_checkpoint(format, written, tmp_path):
    content = torch.load(written[write_run] / format, weights_only=False)
    options = vars(content.pop('args', argparse.Namespace()))
    where = ['state_dict'] if 'state_dict' in content else []
    weight = next(key for key in content.get('state_dict', content) if key.endswith('conv1.weight'))
    spoiled = [('x', value) for value in ({}, [], None, 7, 'x', {'a': {}})]
    spoiled += [(f'{place} dropped', change(content, place)) for place in (where, [*where, weight]) if place]
    for value in (None, 7, 'x', [], {}, {'a': 7}):
        spoiled += [(f'{place} {value}', change(content, place, value)) for place in (where, [*where, weight]) if place]
    spoiled += [(words, {**content, 'args': argparse.Namespace(**value)}) for words, value in spoil_options(options)]
    files = []
    for words, value in spoiled:
        file = io.BytesIO()
        torch.save(value, file)
        files.append((words, file.getvalue()))
    check_format(format, files, written, tmp_path)


# What may be wrong with tables and arrays.


NOT_READ = ('top1', 'top1_err', 'top5', 'top5_err')
FREE_TEXTS = ('image', 'name', 'model', 'interpolation', 'severities')
MAY_BE_EMPTY = (*NOT_READ, 'name', 'severities', 'baseline')


def table(rows):
    return '\n'.join(','.join(row) for row in rows).encode() + b'\n'


@pytest.mark.parametrize('format', ['images.csv', 'classes.csv', 'summary.csv', 'table: summary.csv'])
def test_cells_of_a_table(format, written, tmp_path):
    rows = [line.split(',') for line in (written[write_folder] / format.split(': ')[-1]).read_text().splitlines()]
    spoiled = [
        ('row of blanks', table([*rows, [''] * len(rows[0])])),
        ('empty row inside', table([rows[0], [' '], *rows[1:]])),
        ('no rows', table(rows[:1])),
        *([] if format == 'table: summary.csv' else [('row missing', table(rows[:-1]))]),
        ('row twice', table([*rows, rows[-1]])),
        ('cell missing', table([*rows[:-1], rows[-1][:-1]])),
        ('cell too many', table([*rows, [*rows[-1], '1']])),
    ]
    for column, name in enumerate(rows[0]):
        if format == 'summary.csv' and name not in ('model', 'baseline'):
            continue  # not read from a folder: made again from the predictions
        if name not in NOT_READ:
            spoiled.append((f'{name} dropped', table([row[:column] + row[column + 1 :] for row in rows])))
        for value in ('', 'x', 'nan'):
            cells = rows[1][:column] + [value] + rows[1][column + 1 :]
            if name not in (FREE_TEXTS if value else MAY_BE_EMPTY) and (
                value or not name.endswith(('_low', '_high', 'ECE'))
            ):
                spoiled.append((f'{name} {value!r}', table([rows[0], cells, *rows[2:]])))
    check_format(format, spoiled, written, tmp_path)


def test_the_row_of_a_wrong_cell_is_named(written, tmp_path):
    folder = shutil.copytree(written[write_folder], tmp_path / 'folder')
    path = folder / 'images.csv'
    rows = path.read_text().splitlines()
    path.write_text('\n'.join([*rows[:3], '2.png,2', *rows[4:]]))
    with pytest.raises(InputError, match='images.csv, row 3: must be an image and the index of its class'):
        read_images(folder)


def test_arrays_of_predictions(written, tmp_path):
    whole = np.load(written[write_folder] / 'predictions' / 'a' / 'fog-3.npy')
    rank, prediction = whole.copy(), whole.copy()
    rank['rank'][8], prediction['prediction'][9] = 6, 2
    spoiled = []
    arrays = dict(
        short=whole[:9],
        long=np.resize(whole, 11),
        deep=whole[None],
        floats=np.zeros(10),
        rank=rank,
        prediction=prediction,
        objects=np.array([None] * 10),
        none=whole[:0],
        scalar=whole[3],
        field=whole['rank'],
        other=whole[['prediction', 'rank']],
        wide=whole.astype([('prediction', '<u4'), *whole.dtype.descr[1:]]),
    )
    for words, array in arrays.items():
        file = io.BytesIO()
        np.save(file, array)
        spoiled.append((words, file.getvalue()))
    check_format('predictions/a/fog-3.npy', spoiled, written, tmp_path)


@pytest.mark.parametrize('name', ['notes.png', 'fog-3.png', 'fog-3-10.png', 'fog-0-1.png'])
def test_a_file_that_is_no_example_is_named(name, written, tmp_path):
    folder = shutil.copytree(written[write_folder], tmp_path / 'folder')
    path = shutil.copy(folder / 'examples' / 'fog-3-9.png', folder / 'examples' / name)
    with pytest.raises(InputError, match=str(path)):
        read_folder(folder)


@pytest.mark.parametrize('name', ['notes.npy', 'fog-x.npy', 'fog-9.npy', 'fig-3.npy', 'clean-1.npy'])
def test_a_file_that_is_no_pass_is_named(name, written, tmp_path):
    shutil.copytree(written[write_folder], tmp_path / 'folder')
    path = predictions_path(tmp_path / 'folder', 'a', 'clean', 0).with_name(name)
    np.save(path, np.zeros(10, PREDICTION))
    with pytest.raises(InputError, match=str(path)):
        read_predictions(tmp_path / 'folder')
