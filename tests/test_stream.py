import io
import json
import shutil
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_dataset
from torch.utils.data import IterableDataset

from timm_pushpull import open_dataset
from timm_pushpull.robustness.evaluate import evaluate_robustness
from timm_pushpull.robustness.store import read_images, read_predictions, read_protocol
from timm_pushpull.robustness.stream import StreamedImages, keep_stream

TARGETS = [2, 0, 0, 1, 2, 0]


def picture(place):
    generator = np.random.default_rng(place)
    return Image.fromarray(generator.integers(0, 60 + 30 * place, (36, 40, 3), dtype=np.uint8))


class Stream(IterableDataset):
    """Six images of three classes, as timm's streams give them."""

    def __init__(self, targets=TARGETS, pictures=picture, count=6, **reader):
        names = {'red': 0, 'green': 1, 'blue': 2}
        self.reader = SimpleNamespace(**{'class_to_idx': names, 'root': 'r', 'name': 'n'} | reader)
        self.targets, self.pictures, self.count = targets, pictures, count

    def __iter__(self):
        return ((self.pictures(place), target) for place, target in enumerate(self.targets))

    def __len__(self):
        return self.count


class Unread(Stream):
    def __iter__(self):
        raise AssertionError('the stream is read again')


def evaluate(folder, dataset, name='net', seed=0, **options):
    torch.manual_seed(seed)
    model = timm.create_model('test_resnet', num_classes=3).eval()
    config = dict(input_size=(3, 32, 32), crop_pct=1.0, crop_mode='center', interpolation='bilinear')
    config |= dict(mean=(0.2, 0.5, 0.7), std=(0.1, 0.2, 0.6))
    few = dict(corruptions=['contrast'], severities=[2]) | options
    return evaluate_robustness({name: model}, folder, dataset, data_configs={name: config}, batch_size=4, **few)


def test_a_stream_is_measured_as_a_folder_is(tmp_path):
    order = np.argsort(TARGETS, kind='stable')  # of a folder
    for place, (index, target) in enumerate((index, TARGETS[index]) for index in order):
        (tmp_path / 'data' / str(target)).mkdir(parents=True, exist_ok=True)
        picture(index).save(tmp_path / 'data' / str(target) / f'{place}.png')
    pytest.importorskip('imagecorruptions')
    sorted_stream = Stream([TARGETS[index] for index in order], lambda place: picture(order[place]))
    evaluate(tmp_path / 'stream', sorted_stream)
    evaluate(tmp_path / 'folder', create_dataset('', root=str(tmp_path / 'data')))
    streamed, kept = (read_predictions(tmp_path / name)['net'] for name in ('stream', 'folder'))
    assert streamed.keys() == kept.keys() == {('clean', 0), ('contrast', 2)}
    assert all(np.array_equal(streamed[key], kept[key]) for key in kept)
    assert read_images(tmp_path / 'stream') == [(str(place), TARGETS[index]) for place, index in enumerate(order)]


def test_the_limit_takes_the_first_images(tmp_path):
    evaluate(tmp_path, Stream(), limit=4, corruptions=[])
    assert read_images(tmp_path) == [('0', 2), ('1', 0), ('2', 0), ('3', 1)]
    with pytest.raises(ValueError, match='limit must be at least 1, got 0'):
        evaluate(tmp_path / 'none', Stream(), limit=0, corruptions=[])


def test_later_runs_do_not_read_the_stream(tmp_path):
    evaluate(tmp_path, Stream(), corruptions=[])
    evaluate(tmp_path, Unread(), 'other', seed=1, corruptions=[])
    assert list(read_predictions(tmp_path)) == ['net', 'other']
    with pytest.raises(ValueError, match='has the images of another stream'):
        evaluate(tmp_path, Stream(root='elsewhere'), corruptions=[])


def test_later_runs_get_the_images_and_classes_that_they_ask_for(tmp_path):
    evaluate(tmp_path, Stream(), corruptions=[], limit=4)
    evaluate(tmp_path, Unread(), 'other', corruptions=[], limit=4)
    for limit in (5, None):
        with pytest.raises(ValueError, match='has the first 4 images alone: name another results folder'):
            evaluate(tmp_path, Stream(), corruptions=[], limit=limit)
    with pytest.raises(ValueError, match='has the images of another stream'):
        evaluate(tmp_path, Stream(class_to_idx={'red': 1, 'green': 0, 'blue': 2}), corruptions=[], limit=4)


def test_reading_that_was_interrupted_starts_again(tmp_path):
    def interrupted(place):
        if place == 3:
            raise KeyboardInterrupt
        return picture(5 - place)

    with pytest.raises(KeyboardInterrupt):
        evaluate(tmp_path, Stream(pictures=interrupted), corruptions=[])
    evaluate(tmp_path, Stream(), corruptions=[])
    images = StreamedImages(tmp_path / 'stream')
    assert all(np.array_equal(images[place][0], picture(place)) for place in range(6))


def test_a_stream_that_cannot_be_repeated_is_refused(tmp_path):
    evaluate(tmp_path, Stream(), corruptions=[])
    shutil.rmtree(tmp_path / 'stream')
    with pytest.raises(ValueError, match='data.stream_sha256 is .* there and .* here'):
        evaluate(tmp_path, Stream(pictures=lambda place: picture(place + (place == 5))), corruptions=[])


def test_shifted_images_may_be_a_stream(tmp_path):
    evaluate(tmp_path, Stream(), corruptions=[], shifted={'later': Stream([1, 1])})
    assert read_images(tmp_path / 'shifted' / 'later') == [('0', 1), ('1', 1)]
    assert read_protocol(tmp_path)['data']['classes'] == 3


def test_images_that_timm_left_out_are_told(tmp_path, caplog):
    keep_stream(Stream(count=1006), tmp_path / 'some')
    assert 'The stream gave 6 of 1,006 images' in caplog.text
    caplog.clear()
    keep_stream(Stream(count=1006), tmp_path / 'few', limit=6)
    keep_stream(Stream(count=0), tmp_path / 'unknown')
    assert not caplog.records


@pytest.mark.parametrize(
    'stream, message',
    [
        (Stream([]), 'dataset gives no images: SimpleNamespace r n'),
        (Stream(dist_num_replicas=2), 'must be opened before torch.distributed is initialized'),
    ],
)
def test_streams_without_all_images_are_refused(stream, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        keep_stream(stream, tmp_path)


@pytest.mark.parametrize(
    'field, value',
    [
        ('targets', [0, 'a']),
        ('targets', {}),
        ('classes', []),
        ('classes', {'a': 'b'}),
        ('sha256', ''),
        ('source', None),
        ('limit', 0),
    ],
)
def test_a_damaged_description_is_named(field, value, tmp_path):
    keep_stream(Stream(), tmp_path)
    path = tmp_path / 'stream.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(ValueError, match=rf'stream.json: {field}(\.\S+)? must be '):
        StreamedImages(tmp_path)


def test_webdataset(tmp_path):
    pytest.importorskip('webdataset')
    with tarfile.open(tmp_path / 'val-0.tar', 'w') as tar:
        for place, target in enumerate(TARGETS):
            image = Image.fromarray(np.full((36, 40), 300 * place, np.uint16)) if place == 4 else picture(place)
            buffer = io.BytesIO()
            image.save(buffer, 'png')
            for name, content in ((f'{place}.png', buffer.getvalue()), (f'{place}.cls', str(target).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    keep_stream(open_dataset(tmp_path, 'wds/', split='val-0.tar'), tmp_path / 'stream')
    images = StreamedImages(tmp_path / 'stream')
    assert images.targets == TARGETS
    assert np.array_equal(images[3][0], picture(3))
    assert np.asarray(images[4][0]).max() == round(1200 / 257)  # an image of 16 bits
