import argparse
import json
from typing import NamedTuple

import pytest
import timm
import torch
import yaml
from conftest import SMALL
from PIL import Image
from safetensors.torch import save_file
from timm.data import resolve_data_config

from timm_pushpull import load_model, open_dataset
from timm_pushpull.models.pretrained import HUB_MODELS
from timm_pushpull.robustness.classes import label_names
from timm_pushpull.robustness.inputs import load_models
from timm_pushpull.robustness.labels import find_model_classes

THREE = dict(num_classes=3, **SMALL)


def write_images(folder):
    """Write one image of each of two classes."""
    for label in ('0', '1'):
        (folder / label).mkdir(parents=True)
        Image.new('RGB', (32, 32)).save(folder / label / 'image.png')


@pytest.fixture
def checkpoint(tmp_path):
    """Weights of a plain network, which have no alpha."""
    torch.manual_seed(0)
    torch.save(timm.create_model('pp_resnet18', push_pull=False, **THREE).state_dict(), tmp_path / 'plain.pth')
    return tmp_path / 'plain.pth'


@pytest.mark.parametrize('kind', [str, lambda path: path])
def test_a_split_is_found_by_its_name_or_a_synonym(tmp_path, kind):
    write_images(tmp_path / 'train')
    write_images(tmp_path / 'val')
    for split, folder in (('validation', 'val'), ('train', 'train')):
        assert open_dataset(kind(tmp_path), split=split).reader.root == str(tmp_path / folder)
    with pytest.raises(ValueError, match=f'split must be a folder in data_dir, there is no test in {tmp_path}'):
        open_dataset(kind(tmp_path), split='test')


@pytest.mark.parametrize('training', ['train', 'training'])
def test_training_images_do_not_replace_a_missing_split(tmp_path, training):
    write_images(tmp_path / training)
    with pytest.raises(ValueError, match='split must be a folder in data_dir, there is no validation in'):
        open_dataset(tmp_path)
    assert len(open_dataset(tmp_path / training)) == 2  # without splits, the folder is the dataset


def test_a_missing_dataset_is_refused(tmp_path):
    for data_dir in (tmp_path / 'missing', None):
        with pytest.raises(ValueError, match=f'data_dir must be a folder of images, {data_dir} is not one'):
            open_dataset(data_dir)
    with pytest.raises(
        ValueError, match='class_map must be a file of class names or one of imagenet_100, imagenet_200, imagenet_1000'
    ):
        open_dataset(tmp_path, class_map='missing')
    with pytest.raises(ValueError, match=f'images in {tmp_path}: Found 0 images'):
        open_dataset(tmp_path)
    with pytest.raises(ValueError, match=f'torch/nonsense in {tmp_path}: Unknown torchvision dataset nonsense'):
        open_dataset(tmp_path, 'torch/nonsense')


def test_a_class_map_that_timm_would_ignore_is_refused(tmp_path):
    write_images(tmp_path / 'data')
    (tmp_path / 'map.txt').write_text('1\n0\n')
    options = dict(data_dir=tmp_path / 'data', class_map=str(tmp_path / 'map.txt'))
    assert open_dataset(**options).reader.class_to_idx == {'1': 0, '0': 1}
    with pytest.raises(ValueError, match='class_map must be left out for torch/image_folder, timm ignores it there'):
        open_dataset(name='torch/image_folder', **options)


def test_a_random_alpha_is_refused(checkpoint):
    with pytest.raises(ValueError, match='plain.pth holds no alpha, and pp_resnet18 would keep a random one: give'):
        load_model('pp_resnet18', checkpoint, **THREE)
    weights = torch.load(checkpoint)
    for settings in (dict(alpha=0.5), dict(alpha=0.5, trainable_alpha=False), dict(push_pull=False)):
        model = load_model('pp_resnet18', checkpoint, **THREE, **settings)
        assert torch.equal(model.conv1.weight, weights['conv1.weight'])
        if 'alpha' in settings:
            assert torch.as_tensor(model.conv1.alpha).unique().item() == 0.5


def test_the_alpha_of_a_checkpoint_is_loaded(tmp_path):
    model = timm.create_model('pp_resnet18', **THREE)
    torch.save(model.state_dict(), tmp_path / 'pp.pth')
    assert torch.equal(load_model('pp_resnet18', tmp_path / 'pp.pth', **THREE).conv1.alpha, model.conv1.alpha)


def test_the_ema_weights_are_loaded_on_demand(tmp_path, checkpoint):
    plain = torch.load(checkpoint)
    averaged = {**plain, 'fc.bias': plain['fc.bias'] + 1}
    torch.save({'state_dict': plain, 'state_dict_ema': averaged}, tmp_path / 'both.pth')
    for use_ema, weights in ((False, plain), (True, averaged)):
        model = load_model('pp_resnet18', tmp_path / 'both.pth', use_ema, push_pull=False, **THREE)
        assert torch.equal(model.fc.bias, weights['fc.bias'])


@pytest.mark.parametrize(
    'name, options, message',
    [
        ('pp_resnet18', dict(checkpoint='missing.pth'), 'checkpoint must be a file, missing.pth is not one'),
        ('no_network', {}, 'no_network: Unknown model'),
        ('pp_resnet18_cifar', {}, 'pp_resnet18_cifar: there are no pretrained weights, give a checkpoint'),
        ('test_resnet', dict(alpha=2), "test_resnet: .*unexpected keyword argument 'alpha'"),
        (
            'pp_resnet18',
            dict(checkpoint='', num_classes=4, **SMALL),
            'pp_resnet18 with .*plain.pth: .*size mismatch .*Give the num_classes and',
        ),
    ],
)
def test_a_model_that_cannot_be_loaded_is_refused(name, options, message, checkpoint):
    if options.get('checkpoint') == '':
        options = {**options, 'checkpoint': checkpoint}
    with pytest.raises(ValueError, match=message):
        load_model(name, **options)


def test_the_class_names_of_a_tag_are_not_those_of_a_checkpoint(tmp_path):
    name = next(name for name, model in HUB_MODELS.items() if model.pretrained_cfg.get('label_names'))
    model = timm.create_model(name)
    assert label_names(model)[0] == 'n01440764'
    torch.save(model.state_dict(), tmp_path / 'other.pth')
    assert label_names(load_model(name, tmp_path / 'other.pth')) == []


def test_the_class_names_of_a_training_are_those_of_its_class_map(tmp_path):
    save_training(tmp_path / 'last.pth.tar', class_map=str(tmp_path / 'map.txt'))
    assert label_names(load_model('pp_resnet18', tmp_path / 'last.pth.tar')) == []  # the map is on another machine
    (tmp_path / 'map.txt').write_text('red fox\ncat\nant\n')
    model = load_model('pp_resnet18', tmp_path / 'last.pth.tar')
    assert label_names(model) == ['red fox', 'cat', 'ant']
    assert find_model_classes('net', model, ImagesOf(['cat', 'red fox'])).valid_labels == [1, 0]
    with pytest.raises(ValueError, match="class 0 is 'red fox' in net, 'ant' in the images. Give a class map"):
        find_model_classes('net', model, ImagesOf(['ant', 'cat', 'red fox']))


class ImagesOf(NamedTuple):
    """Images of these classes."""

    classes: list[str]
    notes: tuple[str, ...] = ()


def test_labels_of_models(tmp_path, checkpoint, monkeypatch):
    options = dict(push_pull=False, **THREE)
    names = ['pp_resnet18', 'first=pp_resnet18', 'pp@2=pp_resnet18']
    assert list(load_models(names, [checkpoint] * 3, **options)) == ['pp_resnet18', 'first', 'pp@2']
    for twice in (['pp_resnet18'] * 2, ['a=pp_resnet18', 'a=pp_resnet34']):
        with pytest.raises(ValueError, match='is given twice: give its models different labels, LABEL=pp_resnet'):
            load_models(twice, [checkpoint] * 2, **options)
    with pytest.raises(ValueError, match='checkpoint must name one file for each of the 2 models, got 1'):
        load_models(['pp_resnet18', 'a=pp_resnet18'], [checkpoint], **options)
    with pytest.raises(ValueError, match='model must have a label before the =, got =pp_resnet18'):
        load_models(['=pp_resnet18'], [checkpoint], **options)
    # A path may hold an equals sign.
    torch.manual_seed(0)
    timm.models.save_for_hf(
        timm.create_model('pp_resnet18', **THREE), str(tmp_path / 'tag=1'), model_args=THREE, safe_serialization=True
    )
    name = f'local-dir:{tmp_path}/tag=1'
    assert list(load_models([name, f'label={name}'])) == [name, 'label']


OPTIONS = dict(
    model='pp_resnet18',
    model_kwargs=dict(**SMALL, avg_pool_size=5, pull_kernel='negated', alpha=2.0, contrast_norm=True, augment='prime'),
    num_classes=3,
    in_chans=None,
    gp='max',
    img_size=None,
    input_size=(3, 48, 40),
    crop_pct=0.7,
    interpolation='bicubic',
    mean=(0.1, 0.2, 0.3),
    std=(0.4, 0.5, 0.6),
)
LEFT_OUT = dict(input_size=None, crop_pct=None, interpolation='', mean=None, std=None)


def save_training(path, **changes):
    """Write a checkpoint as train.py does, with its options inside."""
    options = {**OPTIONS, **changes}
    model = timm.create_model('pp_resnet18', avg_pool_size=5, pull_kernel='negated', contrast_norm=True, **THREE)
    torch.save({'state_dict': model.state_dict(), 'args': argparse.Namespace(**options)}, path)
    return model.eval()


def test_the_options_of_the_training_are_in_its_checkpoint(tmp_path):
    trained = save_training(tmp_path / 'last.pth.tar')
    model = load_model('pp_resnet18', tmp_path / 'last.pth.tar').eval()
    assert (model.conv1.avg_pool_size, model.conv1.pull_kernel, model.num_classes) == (5, 'negated', 3)
    assert model.global_pool.pool_type == 'max' and not model._forward_pre_hooks
    x = torch.randn(2, 3, 48, 40)
    assert torch.equal(model.forward_features(x), trained.forward_features(x))
    config = resolve_data_config({}, model=model, use_test_size=True)
    found = {key: config[key] for key in ('input_size', 'crop_pct', 'interpolation', 'mean', 'std')}
    assert found == {key: OPTIONS[key] for key in found}


def test_weights_without_options_take_those_beside_them(tmp_path):
    """Averaged weights, written into the folder of a run."""
    trained = save_training(tmp_path / 'last.pth.tar')
    save_file(trained.state_dict(), tmp_path / 'averaged.safetensors')
    (tmp_path / 'args.yaml').write_text(yaml.safe_dump({**OPTIONS, 'num_classes': 9}))
    with pytest.raises(ValueError, match='pp_resnet18 with .*averaged.safetensors: .*size mismatch for fc.bias'):
        load_model('pp_resnet18', tmp_path / 'averaged.safetensors')
    (tmp_path / 'args.yaml').write_text(yaml.safe_dump(OPTIONS))
    averaged, last = (load_model('pp_resnet18', tmp_path / file) for file in ('averaged.safetensors', 'last.pth.tar'))
    assert repr(averaged) == repr(last) and averaged.training_augmentation == last.training_augmentation
    assert resolve_data_config({}, model=averaged) == resolve_data_config({}, model=last)


def test_options_that_are_given_come_before_those_of_the_training(tmp_path):
    save_training(tmp_path / 'last.pth.tar')
    with pytest.raises(ValueError, match='trained with avg_pool_size=5, the model has avg_pool_size=0'):
        load_model('pp_resnet18', tmp_path / 'last.pth.tar', avg_pool_size=0)
    with pytest.raises(ValueError, match='size mismatch for fc.bias'):
        load_model('pp_resnet18', tmp_path / 'last.pth.tar', num_classes=4)


def test_options_of_another_network_do_not_count(tmp_path, caplog):
    save_training(tmp_path / 'last.pth.tar')
    with pytest.raises(ValueError, match='Error.s. in loading state_dict'):
        load_model('resnet18', tmp_path / 'last.pth.tar', num_classes=3)
    (record,) = caplog.records
    assert 'last.pth.tar has the options of pp_resnet18: resnet18 takes neither' in record.message


def test_folders_are_one_network_by_their_whole_names(tmp_path, caplog):
    for folder in ('./one', './other'):
        (tmp_path / folder).mkdir()
        config = {'architecture': 'test_resnet', 'num_classes': 3, 'pretrained_cfg': {'crop_pct': 0.9}}
        (tmp_path / folder / 'config.json').write_text(json.dumps(config))
    one, other = (f'local-dir:{tmp_path}/./{folder}' for folder in ('one', 'other'))
    state_dict = timm.create_model('test_resnet', num_classes=3).state_dict()
    options = argparse.Namespace(model=one, crop_pct=0.7)
    torch.save({'state_dict': state_dict, 'args': options}, tmp_path / 'last.pth.tar')
    assert load_model(one, tmp_path / 'last.pth.tar').pretrained_cfg['crop_pct'] == 0.7 and not caplog.records
    assert load_model(other, tmp_path / 'last.pth.tar').pretrained_cfg['crop_pct'] == 0.9
    (record,) = caplog.records
    assert f'last.pth.tar has the options of {one}: {other} takes neither' in record.message


def test_the_tag_of_the_training_has_its_preprocessing(tmp_path):
    save_training(tmp_path / 'last.pth.tar', **LEFT_OUT, model='pp_resnet18.tv_in1k')
    config = resolve_data_config({}, model=load_model('pp_resnet18', tmp_path / 'last.pth.tar'))
    assert (config['input_size'], config['crop_pct'], config['interpolation']) == ((3, 224, 224), 0.875, 'bilinear')
    config = resolve_data_config({}, model=load_model('pp_resnet18.a1_in1k', tmp_path / 'last.pth.tar'))
    assert (config['crop_pct'], config['interpolation']) == (0.95, 'bicubic')


def test_the_epsilon_of_the_batch_norms_is_that_of_the_training(tmp_path):
    options = dict(model='tf_efficientnet_lite0', num_classes=3, bn_eps=0.5)
    state_dict = timm.create_model('tf_efficientnet_lite0', num_classes=3).state_dict()
    torch.save({'state_dict': state_dict, 'args': argparse.Namespace(**options)}, tmp_path / 'last.pth.tar')
    assert load_model('tf_efficientnet_lite0', tmp_path / 'last.pth.tar').bn1.eps == 0.5


def test_a_random_classifier_is_refused():
    with pytest.raises(ValueError, match='num_classes must be 10, the classes of the weights .*, got 5: the'):
        load_model('pp_resnet18.pp3_r64_imagenette', num_classes=5)
    assert load_model('pp_resnet18.pp3_r64_imagenette', num_classes=10).num_classes == 10


def test_a_size_that_the_training_left_out_stays_the_models(tmp_path):
    save_training(tmp_path / 'last.pth.tar', **LEFT_OUT)
    config = resolve_data_config({}, model=load_model('pp_resnet18', tmp_path / 'last.pth.tar'))
    assert (config['input_size'], config['crop_pct'], config['mean'][0]) == ((3, 224, 224), 0.95, 0.485)


@pytest.mark.parametrize('content', [[1, 2], None, 3])
def test_a_file_without_weights_is_refused(content, tmp_path):
    torch.save(content, tmp_path / 'list.pth')
    with pytest.raises(ValueError, match=f'list.pth must hold weights by name, it holds a {type(content).__name__}'):
        load_model('pp_resnet18', tmp_path / 'list.pth')


def test_ema_weights_that_are_not_there_are_refused(checkpoint, tmp_path):
    with pytest.raises(ValueError, match='plain.pth holds no EMA weights'):
        load_model('pp_resnet18', checkpoint, use_ema=True, push_pull=False, **THREE)
