import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from timm.data import ImageNetInfo, create_dataset

from timm_pushpull import evaluate_robustness, open_dataset
from timm_pushpull.class_lists import find_class_map
from timm_pushpull.robustness.classes import (
    check_labels,
    describe_targets,
    is_imagenet_1k,
    list_some,
    numbers_sorted_as_text,
)
from timm_pushpull.robustness.data import DatasetImages, open_stored
from timm_pushpull.robustness.store import read_csv, read_protocol

SIZE = dict(input_size=(3, 32, 32), crop_pct=1.0)
COLOURS = ['blue', 'green', 'red', 'yellow']


def write_images(folder, labels, images=1):
    for label in labels:
        (folder / label).mkdir(parents=True)
        for index in range(images):
            Image.new('RGB', (32, 32)).save(folder / label / f'{index}.png')
    return folder


def network(num_classes, **cfg):
    return timm.create_model('test_resnet', num_classes=num_classes, pretrained_cfg_overlay=dict(SIZE, **cfg))


def measure(folder, images, *models, **options):
    named = {f'net{place}': model for place, model in enumerate(models)}
    return evaluate_robustness(named, folder, images, corruptions=[], **options)


@pytest.fixture
def colours(tmp_path):
    return write_images(tmp_path / 'colours', COLOURS)


@pytest.mark.parametrize('labels', ['red green blue yellow', 'blue green yellow white'])
def test_classes_in_another_order_than_the_models_are_refused(labels, colours, tmp_path):
    first = 0 if labels.startswith('red') else 2
    message = (
        f"net1 has its classes in another order than the images: class {first} is '{labels.split()[first]}' in net1, "
        rf"'{COLOURS[first]}' in the images. Give a class map \(--class-map\)"
    )
    models = network(4), network(4, label_names=tuple(labels.split()))
    with pytest.raises(ValueError, match=message):
        measure(tmp_path / 'out', open_dataset(colours), *models)
    assert not (tmp_path / 'out').exists()


def test_a_class_map_gives_the_models_order(colours, tmp_path, caplog):
    labels = ['red', 'green', 'blue', 'yellow']
    (tmp_path / 'map.txt').write_text('\n'.join(labels))
    images = open_dataset(colours, class_map=str(tmp_path / 'map.txt'))
    measure(tmp_path / 'out', images, network(4, label_names=labels))
    assert [row['name'] for row in read_csv(tmp_path / 'out' / 'classes.csv')] == labels and not caplog.messages


def test_classes_with_other_names_than_the_models_are_told(colours, tmp_path, caplog):
    measure(tmp_path / 'out', open_dataset(colours), network(4, label_names=['blue', 'green', 'rouge', 'gelb']))
    expected = "net0 and the images name 2 of 4 classes differently: class 2 is 'rouge' in net0, 'red' in the images."
    assert caplog.messages == [expected]


def test_label_names_of_another_head_and_classes_without_names_say_nothing():
    assert check_labels('net', [], COLOURS) == check_labels('net', COLOURS[1:], COLOURS) == ''
    assert check_labels('net', COLOURS, ['', 'green', '', 'yellow']) == ''


@pytest.mark.parametrize('hidden', ['.ipynb_checkpoints', '.cache/shapes'])
def test_a_hidden_folder_is_no_class(hidden, colours):
    write_images(colours, [hidden])
    with pytest.raises(ValueError, match=f'{hidden} is hidden, but holds images, and timm makes a class of them: move'):
        DatasetImages(create_dataset('', root=str(colours)))


def test_images_outside_the_folders_of_classes_are_refused(colours):
    Image.new('RGB', (32, 32)).save(colours / 'image.png')
    with pytest.raises(ValueError, match='colours holds images outside the folders of classes, and timm makes a class'):
        DatasetImages(create_dataset('', root=str(colours)))


@pytest.mark.parametrize('left', [[], ['image.bmp', 'notes.txt']])
def test_a_folder_without_images_is_refused_where_it_would_shift_the_classes(left, colours):
    (colours / 'orange').mkdir()
    (colours / '.git' / 'objects').mkdir(parents=True)
    for name in left:
        (colours / 'orange' / name).touch()
    with pytest.raises(ValueError, match=r'colours/orange holds no image \(.jpeg, .jpg, .png\), and the classes after'):
        DatasetImages(create_dataset('', root=str(colours)))
    class_map = {name: index for index, name in enumerate(['red', 'green', 'blue', 'orange', 'yellow'])}
    images = DatasetImages(create_dataset('', root=str(colours), class_map=class_map))
    assert images.notes[-1] == 'Classes without images: 1 of 5 (orange).'
    if left:
        assert images.notes[0].startswith(f'Files left out in {colours}: 2 (.bmp, .txt), because images end in .jpeg, ')


@pytest.mark.parametrize('empty', ['3', '20'])
def test_an_empty_folder_is_found_among_numbers_and_links(empty, tmp_path):
    folder = write_images(tmp_path / 'data', ['1', '2', '10'])
    (write_images(tmp_path / 'elsewhere', ['11']) / '11').rename(tmp_path / 'linked')
    (folder / '11').symlink_to(tmp_path / 'linked')
    (folder / empty).mkdir()
    with pytest.raises(ValueError, match=f'data/{empty} holds no image'):
        DatasetImages(create_dataset('', root=str(folder)))


def test_many_names_are_shortened():
    assert list_some('abcd') == 'a, b, c, d' and list_some('abcde') == 'a, b, c, 2 more'
    assert describe_targets(['a', ''], [0, 1, 1]) == '3 images of 2 classes, 1 to 2 of each.'


def test_a_class_map_that_leaves_out_images_is_told(tmp_path):
    folder = write_images(tmp_path / 'data', [f'class{index}' for index in range(5, 12)])
    Image.new('RGB', (32, 32)).save(folder / 'image.png')
    images = DatasetImages(create_dataset('', root=str(folder), class_map={'class5': 0, 'class99': 1}))
    assert images.notes == [
        'Folders of images that the class map leaves out: 6 (class6, class7, class8, 3 more).',
        'Classes without images: 1 of 2 (class99).',
    ]


def test_the_notes_are_told_before_the_run_and_with_a_wrong_number_of_classes(tmp_path, caplog):
    for severity in ('1', '2'):
        write_images(tmp_path / 'fog' / severity, COLOURS[:3])
    for name in ('thumb.db', '.DS_Store'):
        (tmp_path / 'fog' / '1' / 'red' / name).touch()
    stored = open_stored(tmp_path, ['fog'], [1, 2])
    note = f'Files left out in {tmp_path}/fog/1: 1 (.db), because images end in .jpeg, .jpg, .png.'
    models, passes = {'net': network(3)}, dict(corruptions=['fog'], severities=[1, 2])
    evaluate_robustness(models, tmp_path / 'out', stored=stored, **passes)
    assert caplog.messages == [note]
    words = r'net has 4 classes, but the images have 3 \(blue, green, red\). Give images of .* on these. Files left'
    with pytest.raises(ValueError, match=words):
        evaluate_robustness({'net': network(4)}, tmp_path / 'other', stored=stored, **passes)


def test_numbers_in_the_order_of_text_are_told(tmp_path):
    root = str(write_images(tmp_path / 'data', ['1', '2', '10']))
    by_text, by_number = (DatasetImages(create_dataset(name, root=root)) for name in ('torch/image_folder', ''))
    assert (by_text.classes, by_number.classes) == (['1', '10', '2'], ['1', '2', '10'])
    assert by_text.notes[0].startswith('The class names are numbers in the order of text (1, 10, 2).')
    assert by_number.notes == []
    by_map = DatasetImages(create_dataset('', root=root, class_map={'10': 0, '1': 1, '2': 2}))
    assert by_map.notes == []  # neither order
    assert numbers_sorted_as_text(['1', '10', '2', 'x']) == ''  # not only numbers


def test_a_class_may_lie_deeper_and_a_class_map_may_leave_an_empty_folder_out(tmp_path):
    folder = write_images(tmp_path / 'data', ['warm/red', 'cold/blue'])
    assert DatasetImages(create_dataset('', root=str(folder))).classes == ['blue', 'red']
    (folder / 'orange').mkdir()
    images = DatasetImages(create_dataset('', root=str(folder), class_map={'red': 0, 'blue': 1}))
    assert (images.classes, images.notes) == (['red', 'blue'], [])


def test_training_images_do_not_replace_a_missing_split(tmp_path):
    for training in ('train', 'training'):
        root = tmp_path / training
        write_images(root / 'deeper' / training, COLOURS)
        for name in ('', 'torch/image_folder'):
            with pytest.raises(ValueError, match=f'there is no other split in {root}: the images in .*/{training}/'):
                measure(tmp_path / 'out', create_dataset(name, root=str(root), split='validation'), network(4))
        measure(tmp_path / training / 'out', create_dataset('', root=str(root / 'deeper'), split='train'), network(4))
    vehicles = open_dataset(write_images(tmp_path / 'vehicles', ['car', 'train']))  # here train is a class
    assert DatasetImages(vehicles).classes == ['car', 'train']


def test_the_images_of_each_class_are_counted(colours, tmp_path, capsys):
    for index in range(1, 4):
        Image.new('RGB', (32, 32)).save(colours / 'red' / f'{index}.png')
    measure(tmp_path / 'out', open_dataset(colours), network(4), progress=True)
    assert capsys.readouterr().err.startswith('7 images of 4 classes (blue, green, red, yellow), 1 to 4 of each.\n')
    assert [row['images'] for row in read_csv(tmp_path / 'out' / 'classes.csv')] == ['1', '1', '4', '1']
    measure(tmp_path / 'some', open_dataset(colours), network(4), progress=True, limit=4)
    assert '4 images of 4 classes (blue, green, red, yellow), 1 of each.' in capsys.readouterr().err


@pytest.mark.parametrize(
    'content, message',
    [
        (b'\xef\xbb\xbfred\ngreen\n', 'map.txt begins with one: save it as plain UTF-8'),
        ('gr\N{LATIN SMALL LETTER U WITH DIAERESIS}n'.encode('latin1'), 'map.txt must be text in UTF-8'),
        (b'red\n\ngreen\n', 'line 2 of .*map.txt is empty'),
        (b'red\ngreen\n \n', 'line 3 of .*map.txt is empty'),
        (b'red\ngreen\nred \n', 'map.txt has red on the lines 1 and 3'),
    ],
)
def test_a_class_map_that_shows_other_names_than_timm_reads_is_refused(content, message, colours, tmp_path):
    (tmp_path / 'map.txt').write_bytes(content)
    for read in (lambda name: open_dataset(colours, class_map=name), find_class_map):
        with pytest.raises(ValueError, match=message):
            read(str(tmp_path / 'map.txt'))
    write_images(tmp_path / 'fog' / '1', COLOURS)
    with pytest.raises(ValueError, match=message):
        open_stored(tmp_path, ['fog'], [1], class_map='map.txt')


def test_imagenet_is_known_by_its_classes():
    imagenet = ImageNetInfo()
    synsets, words = imagenet.label_names(), imagenet.label_descriptions()
    assert is_imagenet_1k(synsets) and is_imagenet_1k(synsets[::-1]) and is_imagenet_1k(words)
    assert is_imagenet_1k([*words[:517], 'crane2', *words[518:]])
    assert not is_imagenet_1k(synsets[:999]) and not is_imagenet_1k([*synsets[:999], 'n99999999'])
    assert not is_imagenet_1k(words[::-1]) and not is_imagenet_1k([''] * 1000)
    assert not is_imagenet_1k([str(index) for index in range(1000)])
    assert not is_imagenet_1k([words[0], *words[:0:-1]])


def test_only_imagenet_is_divided_by_alexnets_errors(tmp_path):
    class Images(torch.utils.data.Dataset):
        """One image for each of 1,000 classes."""

        def __init__(self, names):
            self.class_to_idx = {name: index for index, name in enumerate(names)}
            self.targets = [*range(1000)]

        def __len__(self):
            return 1000

        def __getitem__(self, index):
            return Image.new('RGB', (32, 32)), index

    def is_imagenet(folder, images):
        measure(tmp_path / folder, images, network(1000), limit=3)
        return read_protocol(tmp_path / folder)['data']['imagenet_1k']

    imagenet = Images(ImageNetInfo().label_names())
    assert is_imagenet('all', imagenet)
    assert not is_imagenet('others', Images([f'class {index}' for index in range(1000)]))
    imagenet.targets[7] = 8
    assert not is_imagenet('999', imagenet)


def test_torchvisions_imagenet_is_read_by_synsets(tmp_path):
    names = ['n02012849', 'n03126707']
    dataset = torchvision.datasets.ImageFolder(write_images(tmp_path, names))
    dataset.wnid_to_idx, dataset.class_to_idx = dataset.class_to_idx, {'crane': 1}  # as torchvision.datasets.ImageNet
    assert DatasetImages(dataset).classes == names and np.bincount(DatasetImages(dataset).targets).tolist() == [1, 1]
