import importlib.util
import json
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import torchvision
from PIL import Image
from timm.data import create_dataset
from torch.utils.data import Dataset, IterableDataset

from timm_pushpull.class_lists import find_class_map
from timm_pushpull.errors import InputError
from timm_pushpull.robustness.data import DatasetImages, UnreadableImageError, open_stored

WNIDS = ['n01440764', 'n02102040', 'n02979186']


def write_images(folder, shade, suffix='.png'):
    """Write two images of each class, each of one shade."""
    for wnid in WNIDS:
        for index in range(2):
            path = folder / wnid / f'{wnid}_{index}{suffix}'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new('L', (40, 36), shade(wnid, index)).save(path)
    return folder


def shade(wnid, index):
    return 20 * WNIDS.index(wnid) + index


def shades(images, *corruption):
    return [images.image(*corruption, index).getpixel((0, 0)) for index in range(len(images.targets))]


SHADES = [(value,) * 3 for value in (0, 1, 20, 21, 40, 41)]


def test_image_folders(tmp_path):
    images = DatasetImages(create_dataset('', root=str(write_images(tmp_path / 'val', shade))))
    assert (images.targets, images.classes) == ([0, 0, 1, 1, 2, 2], WNIDS)
    assert images.names[3] == 'n02102040/n02102040_1.png' and shades(images) == SHADES


def test_a_class_map_can_join_classes_and_skip_indices(tmp_path):
    class_map = {'n01440764': 4, 'n02979186': 4, 'n01': 2}
    root = str(write_images(tmp_path, shade))
    images = DatasetImages(create_dataset('', root=root, class_map=class_map))
    assert images.targets == [4, 4, 4, 4] and images.classes == ['', '', 'n01', '', 'n01440764']


def test_tar(tmp_path):
    with tarfile.open(tmp_path / 'val.tar', 'w') as tar:
        tar.add(write_images(tmp_path / 'val', shade), '.')
    images = DatasetImages(create_dataset('', root=str(tmp_path / 'val.tar')))
    assert (images.targets, images.classes) == ([0, 0, 1, 1, 2, 2], WNIDS) and shades(images) == SHADES


def test_torchvision(tmp_path):
    dataset = torchvision.datasets.ImageFolder(write_images(tmp_path, shade))
    images = DatasetImages(dataset)
    assert (images.targets, images.classes) == ([0, 0, 1, 1, 2, 2], WNIDS) and shades(images) == SHADES
    (tmp_path / 'n02102040' / 'n02102040_0.png').write_text('not an image')
    with pytest.raises(UnreadableImageError, match='2 cannot be read: cannot identify image file'):
        images.image(2)


def test_hugging_face_datasets(tmp_path):
    pytest.importorskip('datasets')
    root = write_images(tmp_path / 'data' / 'test', shade).parent
    options = dict(name=f'hfds/{root}', root=str(tmp_path / 'cache'), split='test')
    images = DatasetImages(create_dataset(**options))
    assert (images.targets, images.classes) == ([0, 0, 1, 1, 2, 2], WNIDS) and shades(images) == SHADES
    for class_map in ({2: 0, 0: 1, 1: 2}, {'n02979186': 0, 'n01440764': 1, 'n02102040': 2}):
        dataset = create_dataset(**options, class_map=class_map)
        try:
            dataset.reader[0]
        except KeyError:  # timm before 1.0.31 maps numbers alone
            continue
        images = DatasetImages(dataset)
        assert (images.targets, images.classes) == ([1, 1, 2, 2, 0, 0], [*map(str, class_map)])


class InMemory(Dataset):
    """Images and their classes without files, names of classes or a reader."""

    def __init__(self, *targets, **attributes):
        self.samples = [(Image.new('L', (40, 36), target), target) for target in targets]
        vars(self).update(attributes)

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]


@pytest.mark.parametrize('attributes', [{}, {'targets': None}, {'targets': [[0, 1], [4, 1], [1, 0]]}])
def test_classes_that_only_the_items_tell(attributes):
    images = DatasetImages(InMemory(1, 4, 0, **attributes))
    assert (images.targets, images.classes, images.names) == ([1, 4, 0], [''] * 5, ['0', '1', '2'])
    assert shades(images) == [(1,) * 3, (4,) * 3, (0,) * 3]
    assert images.notes == ['Classes without images: 2 of 5 (class 2, class 3).']


def test_images_are_not_decoded_for_their_classes():
    class Slow(InMemory):
        def __getitem__(self, index):
            raise AssertionError

    assert DatasetImages(Slow(0, 0, 0, targets=np.array([2, 0, 1]))).targets == [2, 0, 1]


def test_streams_are_refused():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(())

    with pytest.raises(ValueError, match='Stream is a stream'):
        DatasetImages(Stream())


@pytest.mark.parametrize('kind', ['', 'digital'])
def test_stored_folders(tmp_path, kind):
    for severity in (1, 2):
        folder = tmp_path / kind / 'contrast' / str(severity)
        write_images(folder, lambda wnid, index, severity=severity: 100 * severity + index, '.JPEG')
    stored = open_stored(tmp_path, ['contrast'], [1, 2])
    assert (stored.targets, stored.classes) == ([0, 0, 1, 1, 2, 2], WNIDS)
    assert [value for value, *_ in shades(stored, 'contrast', 2)] == [200, 201] * 3
    (tmp_path / kind / 'contrast' / '2' / 'n02102040' / 'n02102040_0.JPEG').unlink()
    with pytest.raises(UnreadableImageError, match='contrast/2/n02102040/n02102040_0.JPEG cannot be read'):
        stored.image('contrast', 2, 2)
    with pytest.raises(ValueError, match=f'{tmp_path} lacks contrast/3, fog: name'):
        open_stored(tmp_path, ['contrast', 'fog'], [2, 3])


def test_stored_folders_of_a_class_list(tmp_path):
    write_images(tmp_path / 'fog' / '1', shade)
    (tmp_path / 'list.txt').write_text('n02979186\nn01440764\n')
    stored = open_stored(tmp_path, ['fog'], [1], class_map=str(tmp_path / 'list.txt'))
    assert (stored.targets, stored.classes) == ([1, 1, 0, 0], ['n02979186', 'n01440764'])
    assert shades(stored, 'fog', 1) == [SHADES[index] for index in (0, 1, 4, 5)]


@pytest.fixture
def arrays(tmp_path):
    """Write four images at five severities, in the layout of CIFAR-10-C."""
    np.save(tmp_path / 'labels.npy', np.tile(np.array([3, 1, 0, 2], np.uint8), 5))
    np.save(tmp_path / 'fog.npy', np.arange(20, dtype=np.uint8).repeat(32 * 32 * 3).reshape(20, 32, 32, 3))
    return tmp_path


def test_stored_arrays(arrays):
    stored = open_stored(arrays, ['fog'], [1, 3])
    assert stored.targets == [3, 1, 0, 2] and len(stored.classes) == 4
    assert shades(stored, 'fog', 3) == [(value,) * 3 for value in (8, 9, 10, 11)]


def test_wrong_stored_arrays_are_refused(arrays):
    with pytest.raises(ValueError, match='lacks contrast.npy'):
        open_stored(arrays, ['fog', 'contrast'], [1])
    with pytest.raises(ValueError, match='class_map selects folders'):
        open_stored(arrays, ['fog'], [1], 'list.txt')


@pytest.mark.parametrize(
    'array',
    [
        np.zeros((19, 32, 32, 3), np.uint8),
        np.zeros((20, 32, 32, 4), np.uint8),
        np.zeros((20, 32, 32), np.uint8),
        np.zeros((20, 32, 32, 3), np.float32),
    ],
)
def test_arrays_that_are_no_images_are_refused(array, arrays):
    np.save(arrays / 'fog.npy', array)
    with pytest.raises(ValueError, match='fog.npy must hold 20 RGB images of 8 bits'):
        open_stored(arrays, ['fog'], [1])


@pytest.mark.parametrize('labels', [np.arange(20), np.zeros(19, int), np.zeros((20, 1), int)])
def test_labels_that_differ_between_the_severities_are_refused(labels, arrays):
    np.save(arrays / 'labels.npy', labels)
    with pytest.raises(ValueError, match='labels.npy must hold the same classes five times'):
        open_stored(arrays, ['fog'], [1])


@pytest.mark.parametrize('name', ['labels', 'fog'])
@pytest.mark.parametrize('damage', ['empty', 'text', 'half', 'pickle'])
def test_a_damaged_array_is_named(damage, name, arrays):
    path = arrays / f'{name}.npy'
    if damage == 'pickle':
        np.save(path, np.load(path).astype(object))
    else:
        path.write_bytes({'empty': b'', 'text': b'not an array', 'half': path.read_bytes()[:-9]}[damage])
    with pytest.raises(InputError, match=f'{path} is damaged, or holds no array of numbers'):
        open_stored(arrays, ['fog'], [1])


def test_a_stored_folder_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(ValueError, match='stored must be a folder of corruptions'):
        open_stored(tmp_path / 'missing', ['fog'], [1])


@pytest.mark.parametrize('size', [100, 200])
def test_class_lists(size, shared):
    with open(find_class_map(f'imagenet_{size}')) as file:
        assert file.read().split() == json.loads((shared / f'reference/imagenet_{size}_wnids.json').read_text())


def test_find_class_map(tmp_path):
    (tmp_path / 'map.txt').write_text('a')
    assert find_class_map('') == ''
    assert find_class_map('map.txt', str(tmp_path)) == find_class_map(str(tmp_path / 'map.txt'))
    with pytest.raises(ValueError, match="one of imagenet_100, imagenet_200, imagenet_1000, got 'imagenet_300'"):
        find_class_map('imagenet_300')


def test_a_timm_without_its_class_list(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location('timm', tmp_path / '__init__.py')
    for found in (spec, None):
        monkeypatch.setattr('importlib.util.find_spec', lambda name, found=found: found)
        with pytest.raises(ValueError, match="one of imagenet_100, imagenet_200, got 'imagenet_1000'"):
            find_class_map('imagenet_1000')
        assert find_class_map('imagenet_100').endswith('imagenet_100_synsets.txt')


def test_class_lists_need_no_import_of_timm():
    code = 'import sys; from timm_pushpull.class_lists import find_class_map; print(find_class_map("imagenet_1000"))'
    run = [sys.executable, '-c', f'{code}; assert not {{"timm", "torch"}} & sys.modules.keys()']
    assert subprocess.run(run, check=True, capture_output=True, text=True).stdout.strip().endswith('synsets.txt')


@pytest.mark.parametrize('kind', ['timm', 'torchvision', 'stored'])
def test_16_bit_grey_images_keep_their_values(tmp_path, kind):
    folder = tmp_path / 'fog' / '1' / 'a'
    folder.mkdir(parents=True)
    values = np.array([[0, 300, 25_600, 65_535]] * 4, np.uint16)
    Image.fromarray(values).save(folder / 'grey.png')
    if kind == 'stored':
        image = open_stored(tmp_path, ['fog'], [1]).image('fog', 1, 0)
    elif kind == 'timm':
        image = DatasetImages(create_dataset('', root=str(folder.parent))).image(0)
    else:
        image = DatasetImages(torchvision.datasets.ImageFolder(folder.parent, loader=Image.open)).image(0)
    assert np.asarray(image)[0].tolist() == [[0] * 3, [1] * 3, [100] * 3, [255] * 3]


@pytest.mark.parametrize('mode', ['I', 'F'])
def test_images_without_a_range_of_values_are_refused(tmp_path, mode):
    (tmp_path / 'a').mkdir()
    Image.new(mode, (4, 4), 300).save(tmp_path / 'a' / 'x.tiff')
    images = DatasetImages(torchvision.datasets.DatasetFolder(tmp_path, Image.open, extensions=('.tiff',)))
    with pytest.raises(UnreadableImageError, match=f'0 cannot be read: mode {mode} has no fixed range'):
        images.image(0)
