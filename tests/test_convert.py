import pytest
import timm
import torch
from torch import nn

from timm_pushpull import PushPullConv2d, convert_to_push_pull


@pytest.mark.parametrize(
    'name',
    [
        'resnet18',
        'convnext_atto',
        'efficientnet_b0',
        'regnetx_002',
        'mobilenetv3_small_050',
        'vgg11',
        'test_resnet',
        'densenet121',
    ],
)
def test_first_convolution_is_replaced_and_keeps_its_weights(name):
    model = timm.create_model(name, num_classes=3).eval()
    path = model.pretrained_cfg['first_conv']
    plain = model.get_submodule(path)
    others = {id(p) for p in model.parameters()}
    assert convert_to_push_pull(model, avg_pool_size=5, alpha=0.0, pull_kernel='negated') is model
    layer = model.get_submodule(path)
    assert isinstance(layer, PushPullConv2d) and (layer.avg_pool_size, layer.pull_kernel) == (5, 'negated')
    assert not layer.training
    assert {id(p) for p in model.parameters()} - others == {id(layer.alpha)}
    x = torch.randn(2, 3, 64, 64)
    # With alpha 0 what is left is the rectified convolution, its bias added after.
    expected = nn.functional.conv2d(x, plain.weight, None, plain.stride, plain.padding).relu()
    expected = expected if plain.bias is None else expected + plain.bias.view(-1, 1, 1)
    torch.testing.assert_close(layer(x), expected)
    assert model(x).shape == (2, 3)


@pytest.mark.parametrize(
    'name, message',
    [
        ('csatv2', 'csatv2 cannot be converted: timm names no first convolution'),
        ('tf_efficientnet_b0', 'tf_efficientnet_b0 cannot be converted: conv_stem is a Conv2dSame'),
        ('pp_resnet18', 'pp_resnet18 cannot be converted: conv1 is a PushPullConv2d'),
        ('resnetv2_50x1_bit', 'resnetv2_50x1_bit cannot be converted: stem.conv is a StdConv2d'),
    ],
)
def test_models_without_one_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        convert_to_push_pull(timm.create_model(name))


def test_each_of_several_first_convolutions_is_replaced():
    model = convert_to_push_pull(timm.create_model('crossvit_9_240'))
    paths = model.pretrained_cfg['first_conv']
    assert len(paths) == 2
    assert all(isinstance(model.get_submodule(path), PushPullConv2d) for path in paths)


def test_a_refused_model_is_unchanged():
    model = timm.create_model('resnet18')
    with pytest.raises(ValueError, match='avg_pool_size'):
        convert_to_push_pull(model, avg_pool_size=2)
    assert type(model.conv1) is nn.Conv2d
    with pytest.raises(ValueError, match='Linear cannot be converted'):
        convert_to_push_pull(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="model must be made by timm.create_model, got 'resnet18'"):
        convert_to_push_pull('resnet18')


def test_plain_weights_load_into_a_converted_model():
    plain = timm.create_model('resnet18')
    converted = convert_to_push_pull(timm.create_model('resnet18'))
    assert converted.load_state_dict(plain.state_dict()).missing_keys == []
    assert torch.equal(converted.conv1.weight, plain.conv1.weight)


def test_hooks_of_all_kinds_flags_and_modes_move_along():
    model = timm.create_model('resnet18', num_classes=3).eval()
    conv, seen = model.conv1, []
    conv.requires_grad_(False)
    handles = [
        conv.register_forward_pre_hook(lambda module, inputs, kwargs: seen.append('pre'), with_kwargs=True),
        conv.register_forward_hook(lambda module, inputs, kwargs, output: seen.append('post'), with_kwargs=True),
        conv.register_forward_hook(lambda module, inputs, output: seen.append('always'), always_call=True),
        conv.register_full_backward_hook(lambda module, inputs, outputs: seen.append('backward')),
        conv.register_full_backward_pre_hook(lambda module, outputs: seen.append('before backward')),
        conv.register_state_dict_pre_hook(lambda module, prefix, keep_vars: seen.append('saved')),
        conv.register_load_state_dict_post_hook(lambda module, keys: seen.append('loaded')),
    ]
    unit = convert_to_push_pull(model).conv1
    assert isinstance(unit, PushPullConv2d) and not unit.training
    assert not unit.weight.requires_grad and not unit.alpha.requires_grad
    x = torch.randn(1, 3, 32, 32, requires_grad=True)
    model(x).sum().backward()
    model.load_state_dict(model.state_dict())
    assert seen == ['pre', 'post', 'always', 'before backward', 'backward', 'saved', 'loaded']
    for handle in handles:
        handle.remove()
    model(x).sum().backward()
    assert len(seen) == 7


def test_what_cannot_move_is_refused():
    model = timm.create_model('resnet18')
    model.conv1.forward = lambda x: x
    with pytest.raises(ValueError, match='somebody replaced the forward of conv1'):
        convert_to_push_pull(model)
    model = timm.create_model('resnet18')
    torch.nn.utils.parametrize.register_parametrization(model.conv1, 'weight', nn.Identity())
    with pytest.raises(ValueError, match='conv1 is a ParametrizedConv2d'):
        convert_to_push_pull(model)
