import pytest
import timm
import torch
from torch import nn
from torch.fx.experimental.optimization import fuse
from torch.nn.utils.fusion import fuse_conv_bn_eval

from timm_pushpull import PushPullConv2d, convert_to_push_pull, push_pull_conv2d


@pytest.mark.parametrize(
    'name',
    [
        'resnet18',
        'convnext_atto',
        'efficientnet_b0',
        'regnetx_002',
        'mobilenetv3_small_050',
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
        ('naflexvit_base_patch16_gap', 'cannot be converted: embeds.proj is a Linear, not an nn.Conv2d'),
        ('pp_resnet18', 'pp_resnet18 cannot be converted: conv1 is a PushPullConv2d'),
    ],
)
def test_models_without_one_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        convert_to_push_pull(timm.create_model(name, device='meta' if 'vit' in name else 'cpu'))


# TensorFlow's padding, standardized weights, standardized weights with a gain, and both with the padding.
VARIANTS = ['tf_efficientnet_lite0', 'resnetv2_50x1_bit', 'eca_nfnet_l0', 'vit_tiny_r_s16_p8_224', 'dm_nfnet_f0']


def padded(x, conv):
    """Pad as TensorFlow does for ceil(size / stride) outputs: more at the end than at the beginning."""
    pads = []
    for length, kernel, stride in zip(x.shape[:1:-1], conv.kernel_size[::-1], conv.stride[::-1], strict=True):
        total = max((-(-length // stride) - 1) * stride + kernel - length, 0)
        pads += [total // 2, total - total // 2]
    return nn.functional.pad(x, pads)


def standardized(conv):
    weight = conv.weight.flatten(1)
    weight = (weight - weight.mean(1, keepdim=True)) / (weight.var(1, correction=0, keepdim=True) + conv.eps).sqrt()
    if hasattr(conv, 'gain'):
        weight = weight * conv.gain.flatten(1) * conv.scale
    return weight.view_as(conv.weight)


@pytest.mark.parametrize('name', VARIANTS)
def test_variants_keep_their_padding_and_their_weight_transform(name):
    model = timm.create_model(name, num_classes=3).eval().double()
    path, x = model.pretrained_cfg['first_conv'], torch.randn(2, 3, 61, 64, dtype=torch.float64)
    conv = model.get_submodule(path)
    for parameter in conv.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    names = {name for name, _ in model.named_parameters()}
    unit = convert_to_push_pull(model, alpha=0.7).get_submodule(path)
    assert {name for name, _ in model.named_parameters()} - names == {f'{path}.alpha'}
    assert unit(x).shape == conv(x).shape
    same, std = type(conv).__name__.endswith('Same'), 'Std' in type(conv).__name__
    found = []
    for respond in (
        unit,
        lambda x: push_pull_conv2d(
            padded(x, conv) if same else x,
            standardized(conv) if std else conv.weight,
            unit.alpha,
            conv.bias,
            conv.stride,
            conv.padding,
            implementation='reference',
        ),
    ):
        response = respond(x)
        found.append([response, *torch.autograd.grad(response.square().sum(), list(unit.parameters()))])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize('name', ['tf_efficientnet_lite0', 'eca_nfnet_l0'])
def test_variants_are_scripted_traced_and_compiled(name):
    model = convert_to_push_pull(timm.create_model(name, num_classes=3, scriptable=True)).eval()
    unit, x = model.get_submodule(model.pretrained_cfg['first_conv']), torch.randn(1, 3, 61, 64)
    for other in (torch.jit.script(unit), torch.fx.symbolic_trace(unit), torch.compile(unit, backend='eager')):
        torch.testing.assert_close(other(x), unit(x))


@pytest.mark.parametrize(
    'name, feature_cls',
    [
        *((name, cls) for name in ('convnext_atto', 'regnety_002') for cls in ('list', 'dict', 'hook', 'getter', 'fx')),
        *(('tf_efficientnet_lite0', cls) for cls in ('hook', 'getter', 'fx')),
    ],
)
def test_feature_extractors_are_converted(name, feature_cls):
    model, x = timm.create_model(name, features_only=True, feature_cls=feature_cls).eval(), torch.randn(1, 3, 64, 64)
    expected = model(x)
    convert_to_push_pull(model, avg_pool_size=0, alpha=1.0, pull_kernel='negated')  # relu(P) - relu(-P) is P
    assert sum(isinstance(module, PushPullConv2d) for module in model.modules()) == 1
    found = model(x)
    if isinstance(expected, dict):
        found, expected = list(found.values()), list(expected.values())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


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
    with pytest.raises(ValueError, match='the forward of conv1 was patched'):
        convert_to_push_pull(model)
    model = timm.create_model('resnet18')
    torch.nn.utils.parametrize.register_parametrization(model.conv1, 'weight', nn.Identity())
    with pytest.raises(ValueError, match='conv1 is a ParametrizedConv2d'):
        convert_to_push_pull(model)


@pytest.fixture
def normalized_unit():
    """A unit and a BatchNorm with scales of both signs, which no weight of the unit could hold."""
    model = nn.Sequential(PushPullConv2d(3, 8, 3, bias=False, alpha=0.5), nn.BatchNorm2d(8)).eval()
    with torch.no_grad():
        model[1].weight.copy_(torch.linspace(-2, 2, 8))
        model[1].running_mean.copy_(torch.linspace(0, 1, 8))
    return model


def test_a_batch_norm_cannot_be_folded_into_the_unit(normalized_unit):
    with pytest.raises(ValueError, match='A push-pull unit without a bias gets none later'):
        fuse_conv_bn_eval(*normalized_unit)
    with pytest.raises((AssertionError, NotImplementedError)):
        torch.ao.quantization.fuse_modules(normalized_unit, [['0', '1']])
    assert normalized_unit[0].bias is None


def test_a_tool_that_folds_where_it_can_leaves_the_unit(normalized_unit):
    images = torch.rand(2, 3, 9, 9)
    torch.testing.assert_close(fuse(normalized_unit)(images), normalized_unit(images))
