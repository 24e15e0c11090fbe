import csv

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_dataset, create_transform
from timm.layers import BatchNormAct2d
from torch import nn

from timm_pushpull.cli import main
from timm_pushpull.robustness.adaptation import adapted_batch_norm, adapted_name
from timm_pushpull.robustness.evaluate import ORDER_SEED, evaluate_robustness
from timm_pushpull.robustness.page import protocol_sentence
from timm_pushpull.robustness.store import PROBABILITIES, UNREADABLE, read_csv, read_predictions, read_protocol

GEOMETRY = dict(
    input_size=(3, 32, 32), crop_pct=1.0, interpolation='bilinear', mean=(0.2, 0.5, 0.7), std=(0.1, 0.2, 0.6)
)


@pytest.fixture
def norm():
    norm = nn.BatchNorm2d(2, eps=0).eval()
    norm.running_mean.copy_(torch.tensor([1.0, -2.0]))
    norm.running_var.copy_(torch.tensor([4.0, 9.0]))
    return norm


class Transpose(nn.Module):
    def forward(self, x):
        return x.transpose(1, 2)


def test_statistics_worked_by_hand(norm):
    # Three images of two pixels: means 3 and 0.5.
    first, second = [[1.0, 2.0], [2.0, 3.0], [4.0, 6.0]], [[0.0, 1.0]] * 3
    images = torch.tensor([first, second]).transpose(0, 1).reshape(3, 2, 1, 2)
    variance = 16 / 5  # of 1, 2, 2, 3, 4, 6 around 3
    with adapted_batch_norm(norm, 5):
        blended = norm(images)
    means, variances = (5 * 1 + 3 * 3) / 8, (5 * 4 + 3 * variance) / 8
    torch.testing.assert_close(blended[:, 0], (images[:, 0] - means) / variances**0.5)
    means, variances = (5 * -2 + 3 * 0.5) / 8, (5 * 9 + 3 * 0.3) / 8
    torch.testing.assert_close(blended[:, 1], (images[:, 1] - means) / variances**0.5)
    with adapted_batch_norm(norm, 0):
        alone = norm(images)
    torch.testing.assert_close(alone.mean((0, 2, 3)), torch.zeros(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(alone.var((0, 2, 3)), torch.ones(2))


def test_images_are_counted_where_a_network_flattens_their_pixels(norm):
    images = torch.rand(3, 2, 4, 5)
    pixels = nn.Sequential(nn.Flatten(2), Transpose(), nn.Flatten(0, 1), nn.BatchNorm1d(2, eps=0)).eval()
    pixels[-1].load_state_dict(norm.state_dict())
    with adapted_batch_norm(norm, 5), adapted_batch_norm(pixels, 5):
        torch.testing.assert_close(pixels(images), norm(images).permute(0, 2, 3, 1).flatten(0, 2))


@pytest.mark.parametrize('error', [False, True])
def test_the_model_stays_as_it_is(norm, error):
    images = torch.rand(3, 2, 4, 4)
    before = norm(images), {key: value.clone() for key, value in norm.state_dict().items()}
    try:
        with adapted_batch_norm(norm, 5):
            norm(images[:, :1] if error else images)
    except RuntimeError:
        assert error
    assert torch.equal(norm(images), before[0])
    assert all(torch.equal(value, before[1][key]) for key, value in norm.state_dict().items())


@pytest.mark.parametrize('norm', [BatchNormAct2d(4), nn.BatchNorm1d(4), nn.BatchNorm2d(4).half()])
def test_kinds_of_batch_norm(norm):
    images = torch.rand(16, 4) if isinstance(norm, nn.BatchNorm1d) else torch.rand(16, 4, 3, 3)
    images = images.to(norm.weight.dtype)
    trained = norm.train()(images)
    norm.reset_running_stats()
    scale = (1 - 1 / (images.numel() // 4)) ** 0.5  # running statistics hold the variance over n - 1
    with adapted_batch_norm(norm.eval(), 0):
        torch.testing.assert_close(norm(images), scale * trained, atol=2e-3, rtol=2e-3)


@pytest.fixture
def data(tmp_path):
    """Seven images of each of three classes, of unequal brightness."""
    generator = np.random.default_rng(0)
    for label in range(3):
        (tmp_path / 'data' / str(label)).mkdir(parents=True)
        for index in range(7):
            pixels = generator.integers(0, 70 + 80 * label, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / 'data' / str(label) / f'{index}.png')
    return tmp_path / 'data'


def network(name='test_resnet'):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, pretrained_cfg_overlay=GEOMETRY).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.fill_(0.3)
    return model


def evaluate(data, folder, models=None, **options):
    images = create_dataset('', root=str(data))
    return evaluate_robustness(models or {'net@2': network()}, folder, images, corruptions=[], batch_size=8, **options)


def probabilities(data, indices, source_images):
    """Adapt to one batch, in plain steps."""
    images, transform = create_dataset('', root=str(data)), create_transform(**GEOMETRY)
    tensors, model = torch.stack([transform(images[index][0]) for index in indices]), network()
    with torch.no_grad(), adapted_batch_norm(model, source_images):
        return model(tensors).softmax(1).numpy()


def batches():
    return np.split(np.random.default_rng(ORDER_SEED).permutation(21), [8, 16])


def test_an_adapted_model_stands_beside_the_model(data, tmp_path):
    (plain,) = evaluate(data, tmp_path / 'plain')
    first, second = evaluate(data, tmp_path / 'both', adapt_batch_norm=4)
    assert first == plain and second['model'] == 'net+bn4@2'
    both, alone = read_predictions(tmp_path / 'both'), read_predictions(tmp_path / 'plain')
    for field in ('prediction', 'rank'):
        assert np.array_equal(both['net@2']['clean', 0][field], alone['net@2']['clean', 0][field])
    adapted = both['net+bn4@2']['clean', 0]
    for batch in batches():
        expected = probabilities(data, batch, 4)
        assert adapted['confidence'][batch] == pytest.approx(expected.max(1), rel=1e-4)
        assert np.array_equal(adapted['prediction'][batch], expected.argmax(1))
    assert abs(adapted['confidence'] - both['net@2']['clean', 0]['confidence']).max() > 0.01
    protocol = read_protocol(tmp_path / 'both')
    assert 'BatchNorm adapted to each batch of images, a protocol of its own: net+bn4@2.' in protocol_sentence(protocol)
    models, settings = protocol['models'], {'source_images': 4, 'batch_size': 8, 'order_seed': ORDER_SEED}
    assert models['net+bn4@2'].pop('adapt_batch_norm') == settings
    assert models['net+bn4@2'] == models['net@2']
    assert [row['model'] for row in read_csv(tmp_path / 'both' / 'results-clean.csv')] == ['net@2']


def test_unreadable_images_adapt_nothing(data, tmp_path):
    (data / '1' / '3.png').write_bytes(b'no image')  # the image 10
    evaluate(data, tmp_path / 'results', adapt_batch_norm=4, skip_unreadable=True)
    adapted = read_predictions(tmp_path / 'results')['net+bn4@2']['clean', 0]
    assert adapted['rank'][10] == UNREADABLE and np.isnan(adapted['confidence'][10])
    (batch,) = (batch for batch in batches() if 10 in batch)
    readable = batch[batch != 10]
    assert adapted['confidence'][readable] == pytest.approx(probabilities(data, readable, 4).max(1), rel=1e-4)


def test_another_batch_size_is_another_protocol(data, tmp_path):
    evaluate(data, tmp_path / 'results', adapt_batch_norm=4)
    images = create_dataset('', root=str(data))
    with pytest.raises(ValueError, match=r'models.net\+bn4@2.adapt_batch_norm.batch_size is 8 there and 7 here'):
        evaluate_robustness(
            {'net@2': network()}, tmp_path / 'results', images, corruptions=[], batch_size=7, adapt_batch_norm=4
        )
    evaluate(data, tmp_path / 'results', adapt_batch_norm=0)
    assert list(read_predictions(tmp_path / 'results')) == ['net@2', 'net+bn4@2', 'net+bn0@2']


def test_the_protocol_has_the_batch_that_there_is(data, tmp_path):
    evaluate(data, tmp_path / 'results', adapt_batch_norm=4, limit=6)
    model = read_protocol(tmp_path / 'results')['models']['net+bn4@2']
    assert model['adapt_batch_norm']['batch_size'] == 6


@pytest.mark.parametrize(
    'models, number, message',
    [
        ({'net': 'test_resnet'}, -1, 'adapt_batch_norm must be a whole number, 0 or more, got -1'),
        ({'net': 'test_resnet'}, 1.5, 'adapt_batch_norm must be a whole number, 0 or more, got 1.5'),
        ({'net': 'test_convnext'}, 4, 'adapt_batch_norm needs a BatchNorm, net has none'),
        ({'net': 'test_resnet', 'net+bn4': 'test_resnet'}, 4, r'models must not have the label net\+bn4'),
    ],
)
def test_what_cannot_adapt_is_refused(models, number, message, data, tmp_path):
    models = {label: network(name) for label, name in models.items()}
    with pytest.raises(ValueError, match=message):
        evaluate(data, tmp_path / 'results', models, adapt_batch_norm=number)
    assert not (tmp_path / 'results').exists()


def test_names():
    assert [adapted_name(name, 16) for name in ('net', 'net@1', '@1')] == ['net+bn16', 'net+bn16@1', '@1+bn16']


def test_on_the_command_line(data, tmp_path, capsys):
    pytest.importorskip('imagecorruptions')
    torch.save(network().state_dict(), tmp_path / 'net.pth')
    words = ['robustness', 'net=test_resnet', '--checkpoint', str(tmp_path / 'net.pth'), '--num-classes', '3']
    words += ['--data-dir', str(data), '--corruptions', 'contrast', '--severities', '3', '--adapt-batch-norm', '4']
    main([*words, '--workers', '0', '--output', str(tmp_path / 'results')])
    out = capsys.readouterr().out
    assert 'net+bn4' in out and '--baseline' not in out
    with open(tmp_path / 'results' / 'summary.csv') as file:
        assert [row['model'] for row in csv.DictReader(file)] == ['net', 'net+bn4']
    assert set(read_predictions(tmp_path / 'results')['net+bn4']['clean', 0].dtype.names) > set(PROBABILITIES)
    words[1:4] = ['a=test_resnet', 'b=test_resnet', '--checkpoint', *[str(tmp_path / 'net.pth')] * 2]
    words += ['--workers', '0', '--output', str(tmp_path / 'four')]
    main(words)
    assert 'To compare each model with one of them: --baseline MODEL.' in capsys.readouterr().out
    main([*words, '--baseline', 'a'])
    assert '--baseline MODEL' not in capsys.readouterr().out


def test_a_batch_without_a_readable_image(data, tmp_path):
    (data / '1' / '3.png').write_bytes(b'no image')
    images = create_dataset('', root=str(data))
    options = dict(corruptions=[], batch_size=1, adapt_batch_norm=0, skip_unreadable=True)
    evaluate_robustness({'net': network()}, tmp_path / 'results', images, **options)
    ranks = read_predictions(tmp_path / 'results')['net+bn0']['clean', 0]['rank']
    assert np.flatnonzero(ranks == UNREADABLE).tolist() == [10]


def test_a_batch_norm_without_running_statistics_is_left():
    norm, images = nn.BatchNorm2d(2, track_running_stats=False).eval(), torch.rand(3, 2, 4, 4)
    with adapted_batch_norm(norm, 5):
        assert torch.equal(norm(images), nn.BatchNorm2d(2).train()(images))


def test_one_value_for_each_channel():
    norm, images = nn.BatchNorm1d(4).eval(), torch.rand(1, 4)
    with adapted_batch_norm(norm, 0):
        adapted = norm(images)
    assert torch.equal(adapted, norm(images))
