import copy
import csv
import math
import os
import sys

import numpy as np
import pytest
import timm
import torch
from torch import nn

from timm_pushpull import PushPullConv2d, convert_to_push_pull, push_pull_conv2d
from timm_pushpull.ops.reference import pull_kernels
from timm_pushpull.viz import figures
from timm_pushpull.viz.figures import draw_figures
from timm_pushpull.viz.responses import edge_responses, snr_db
from timm_pushpull.viz.spectra import combined_spectrum, radial_mean

pytest.importorskip('matplotlib')

NAMES = [f'{name}.{ending}' for name in ('kernels', 'edge', 'spectra', 'alpha') for ending in ('png', 'csv')]


def unit(weight, alpha=1.0, **settings):
    """Layer of the given push kernels."""
    weight = torch.as_tensor(weight, dtype=torch.float32)
    layer = PushPullConv2d(weight.shape[1], weight.shape[0], tuple(weight.shape[2:]), alpha=alpha, **settings)
    layer.weight.data = weight
    return layer


def read(folder, name):
    with open(folder / f'{name}.csv', newline='') as file:
        return list(csv.DictReader(file))


def edge_rows(layer, folder, monkeypatch):
    """The table of edge.csv by noise and response, without the time that the images take."""
    monkeypatch.setattr(figures, '_to_png', lambda figure: b'')
    draw_figures(layer, folder)
    return {(float(row['noise_std']), row['response']): row for row in read(folder, 'edge')}


@pytest.fixture(scope='module')
def drawn(tmp_path_factory):
    """A trainable unit of 8 filters inside a model that must stay as it was, and what was drawn of it."""
    folder = tmp_path_factory.mktemp('drawn') / 'made' / 'for it'
    weight = torch.randn(8, 3, 3, 5, generator=torch.Generator().manual_seed(1)).bfloat16()
    layer = unit(weight, alpha=[-0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0], avg_pool_size=5, stride=2)
    model = nn.Sequential(nn.Identity(), layer, unit(torch.ones(1, 8, 1, 1))).train()
    before, random_state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    paths = draw_figures(model, folder)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(module.training for module in model.modules())
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    assert all(parameter.grad is None for parameter in model.parameters())
    return model, folder, paths


def test_the_files(drawn):
    _, folder, paths = drawn
    assert paths == [folder / name for name in NAMES]
    assert sorted(path.name for path in folder.iterdir()) == sorted(NAMES)
    for path in paths[::2]:
        content = path.read_bytes()
        assert content.startswith(b'\x89PNG') and b'Software' not in content
        assert int.from_bytes(content[16:20], 'big') == 1000  # 5 inches wide at 200 dpi


def test_kernels_are_those_of_the_widest_range_and_pull_inverts_them(drawn):
    model, folder, _ = drawn
    layer = model[1]
    rows = read(folder, 'kernels')
    filters = list(dict.fromkeys(int(row['filter']) for row in rows))
    ranges = [weight.max() - weight.min() for weight in layer.weight]
    assert filters == sorted(range(8), key=lambda number: -ranges[number])[:5]
    assert len(rows) == 5 * 2 * 3 * 3 * 5
    for number in filters:
        values = {
            kernel: {
                (int(row['channel']), int(row['row']), int(row['column'])): float(row['value'])
                for row in rows
                if int(row['filter']) == number and row['kernel'] == kernel
            }
            for kernel in ('push', 'pull')
        }
        middle = max(values['push'].values()) + min(values['push'].values())
        for place, value in values['push'].items():
            assert value == pytest.approx(layer.weight[number][place].item(), abs=1e-6)
            assert values['pull'][place] == pytest.approx(middle - value, abs=1e-5)


def test_a_negated_pull_kernel_by_hand(tmp_path, monkeypatch):
    layer = unit([[[[2.0, 0.0, -1.0]]]], alpha=1.0, pull_kernel='negated', avg_pool_size=0)
    rows = edge_rows(layer, tmp_path, monkeypatch)
    pull = [float(row['value']) for row in read(tmp_path, 'kernels') if row['kernel'] == 'pull']
    assert pull == [-2, 0, 1]
    # From one pixel before the bar to one after it P is -1, -1, 1, 1, 1, 2, 2; 59 columns are not of the bar.
    for response, edge, background in (('push', 1, 2 / 59), ('pull', 1 / 5, 1 / 59)):
        row = rows[0, response]
        assert float(row['edge_amplitude']) == pytest.approx(edge)
        assert float(row['background_amplitude']) == pytest.approx(background, rel=1e-5)
    at_0 = [float(row['magnitude']) for row in read(tmp_path, 'spectra') if float(row['frequency']) == 0]
    assert at_0[:2] == [1, 1]  # of W and of -W; that of max + min - W is 2


def test_alpha_of_each_channel(drawn):
    _, folder, _ = drawn
    assert [float(row['alpha']) for row in read(folder, 'alpha')] == [-0.5, 0, 0.5, 1, 1.5, 2, 2.5, 3]


def test_spectra_of_every_combination(drawn):
    model, folder, _ = drawn
    layer = model[1]
    rows = read(folder, 'spectra')
    combinations = list(dict.fromkeys((row['combination'], row['alpha'], row['window']) for row in rows))
    pairs = [('push-pull', alpha, window) for alpha in ('0.5', '1', '2', '4') for window in ('0', '3', '5')]
    assert combinations == [('push', '', ''), ('pull', '', ''), *pairs]
    # At the frequency 0 a kernel's gain is the size of its sum.
    sums = {'push': layer.weight.sum((1, 2, 3)), 'pull': pull_kernels(layer.weight).sum((1, 2, 3))}
    at_0 = {
        (row['combination'], row['alpha'], row['window']): float(row['magnitude'])
        for row in rows
        if float(row['frequency']) == 0
    }
    for name in sums:
        assert at_0[name, '', ''] == pytest.approx(sums[name].abs().mean().item(), rel=1e-5)
    assert at_0['push-pull', '2', '5'] == pytest.approx((sums['push'] - 2 * sums['pull']).abs().mean().item(), rel=1e-5)
    assert [float(row['frequency']) for row in rows[:17]] == [place / 32 for place in range(17)]


def test_the_same_weights_give_the_same_bytes_in_half_precision_too(drawn, tmp_path, monkeypatch):
    model, folder, _ = drawn
    half = copy.deepcopy(model).bfloat16()
    draw_figures(half, tmp_path)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    for name in NAMES:
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name
    monkeypatch.setattr(figures, '_to_png', lambda figure: b'')
    draw_figures(half, tmp_path, seed=1)
    assert (tmp_path / 'edge.csv').read_bytes() != (folder / 'edge.csv').read_bytes()


def test_a_converted_model_of_fixed_inhibition(tmp_path):
    model = timm.create_model('convnext_atto', in_chans=1)
    convert_to_push_pull(model, avg_pool_size=0, alpha=2.0, trainable_alpha=False)
    assert [path.stat().st_size > 0 for path in draw_figures(model, tmp_path)] == [True] * 8
    assert [float(row['alpha']) for row in read(tmp_path, 'alpha')] == [2.0] * model.stem[0].out_channels


def test_standardized_kernels_are_drawn_as_they_are_used(tmp_path, monkeypatch):
    model = timm.create_model('pp_any', base='nf_resnet26')
    layer = model.stem.conv
    edge_rows(model, tmp_path, monkeypatch)
    for row in read(tmp_path, 'kernels'):
        if row['kernel'] == 'push':
            kernel = layer.kernels()[int(row['filter']), int(row['channel'])]
            assert float(row['value']) == pytest.approx(kernel[int(row['row']), int(row['column'])].item(), abs=1e-5)
    assert not torch.allclose(layer.kernels(), layer.weight)


@pytest.mark.parametrize(
    'shape, settings',
    [
        ((4, 1, 3, 2), {'dilation': (1, 20), 'groups': 2}),
        ((2, 1, 16, 16), {'avg_pool_size': 5}),
        ((2, 3, 1, 1), {'avg_pool_size': 0}),
    ],
)
def test_units_of_any_geometry(shape, settings, tmp_path, monkeypatch):
    in_channels = shape[1] * settings.get('groups', 1)
    layer = PushPullConv2d(in_channels, shape[0], shape[2:], alpha=0.0, trainable_alpha=False, **settings)
    rows = edge_rows(layer, tmp_path, monkeypatch)
    assert len(rows) == 33
    for (noise_std, name), row in rows.items():
        if name == 'push-pull':  # without inhibition
            assert row | {'response': 'push'} == rows[noise_std, 'push']


def test_snr_of_a_box_by_hand(tmp_path, monkeypatch):
    # Across the bar the box of 4 x 3 answers 4 times 1 2 3 3 3 2 1, its pull kernel is the box too, and the average
    # over 5 of that is 4 times .2 .6 1.2 1.8 2.4 2.6 2.4 1.8 1.2 .6 .2. The bar takes up 5 of the 64 columns.
    layer = unit(torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1).expand(2, 1, 4, 3), alpha=[3.0, 0.5], avg_pool_size=5)
    rows = edge_rows(layer, tmp_path, monkeypatch)
    expected = {
        'push': (4 * (2 + 3 + 3 + 3 + 2) / 5, 4 * 2 * 1 / 59),
        'pull': (4 * (1.8 + 2.4 + 2.6 + 2.4 + 1.8) / 5, 4 * 2 * (1.2 + 0.6 + 0.2) / 59),
        'push-pull': (4 * (1.1 + 1.8 + 1.7 + 1.8 + 1.1) / 5, 4 * 2 * 0.4 / 59),
    }
    for name, (edge, background) in expected.items():
        row = rows[0, name]
        assert float(row['edge_amplitude']) == pytest.approx(edge, rel=1e-5)
        assert float(row['background_amplitude']) == pytest.approx(background, rel=1e-5)
        assert float(row['snr_db']) == pytest.approx(20 * math.log10(edge / background), abs=1e-4)


def test_snr_in_noise_by_hand(tmp_path, monkeypatch):
    # The kernel of one pixel responds with the image: over the background the mean of the rectified noise.
    rows = edge_rows(unit([[[[1.0]]]], alpha=0.0), tmp_path, monkeypatch)
    assert rows[0, 'push']['snr_db'] == 'inf'
    for noise_std in (0.1, 0.5, 1.0):
        background = float(rows[noise_std, 'push']['background_amplitude'])
        assert background == pytest.approx(noise_std / math.sqrt(2 * math.pi), rel=0.03)
        edge = float(rows[noise_std, 'push']['edge_amplitude'])
        density, below = math.exp(-0.5 / noise_std**2), math.erf(1 / noise_std / math.sqrt(2))
        assert edge == pytest.approx((1 + below) / 2 + noise_std * density / math.sqrt(2 * math.pi), rel=0.03)
    silent = edge_rows(unit([[[[-1.0]]]], alpha=0.0), tmp_path, monkeypatch)
    assert silent[0, 'push']['snr_db'] == '' and silent[0.5, 'push']['snr_db'] != ''


def drawn_figures(layer, folder, monkeypatch, **options):
    images = []
    monkeypatch.setattr(figures, '_to_png', lambda figure: images.append(figure) or b'')
    draw_figures(layer, folder, **options)
    return images


def test_words_tell_what_has_no_line(tmp_path, monkeypatch):
    def words(layer):
        _, *panels, plot = drawn_figures(layer, tmp_path, monkeypatch)[1].axes
        return [panel.get_xlabel() for panel in panels], [text.get_text() for text in plot.get_legend().get_texts()]

    below, legend = words(unit([[[[0.0]]]], alpha=0.0))
    assert below == ['no response'] * 3 and legend == [f'{name}: no response' for name in figures.RESPONSES]
    below, legend = words(unit([[[[1.0]]]], alpha=0.0))
    assert all(text.endswith(' dB') for text in below) and legend == list(figures.RESPONSES)
    # A kernel of one pixel: W = 1 responds to the bar alone without noise, W = -1 to weak noise beside the bar.
    monkeypatch.setattr(figures, 'NOISE_STDS', (0.0, 0.1))
    monkeypatch.setattr(figures, 'SHOWN_NOISE_STD', 0.1)
    below, legend = words(unit([[[[-1.0]]]], alpha=0.0))
    assert below == ['noise only'] * 3 and legend[0] == 'push: no response, noise only'
    monkeypatch.setattr(figures, 'NOISE_STDS', (0.0,))
    monkeypatch.setattr(figures, 'SHOWN_NOISE_STD', 0.0)
    below, legend = words(unit([[[[1.0]]]], alpha=0.0))
    assert below[0] == below[2] == 'edge only' and below[1].endswith(' dB')  # the average reaches beyond the bar
    assert legend == ['push: edge only', 'pull', 'push-pull: edge only']


def test_every_figure_names_the_model(tmp_path, monkeypatch):
    layer = unit(torch.ones(2, 1, 3, 3))
    for options, name in (({}, 'PushPullConv2d'), ({'name': 'mine.pth'}, 'mine.pth'), ({'name': 'x' * 60}, 'x' * 56)):
        titles = [
            figure.get_suptitle().split('\n') for figure in drawn_figures(layer, tmp_path, monkeypatch, **options)
        ]
        assert [lines[0] for lines in titles] == [name] * 4 and all(lines[-1][:2] != 'xx' for lines in titles)


def test_the_filter_shown_tells_the_edge_from_even_light(tmp_path, monkeypatch):
    bar = torch.tensor([-1.25, -1.25, 1, 1, 1, 1, 1, -1.25, -1.25]).expand(9, 9)
    noisy = torch.ones(9, 9)
    noisy[1::2] = -1
    noisy[8] = 0
    weight = torch.stack([torch.ones(9, 9), bar.T, bar * 0.01, -bar, bar + 50 * noisy])[:, None]
    rows = edge_rows(unit(weight), tmp_path, monkeypatch)
    assert {row['filter'] for row in rows.values()} == {'2'}


def test_responses_are_those_of_the_unit():
    images, weight = torch.randn(2, 3, 12, 14), torch.randn(4, 3, 3, 5)
    alpha = torch.tensor([0.0, 0.5, 2.0, -1.0])
    responses = edge_responses(images, weight, alpha, (2, 1), 3)
    pull = nn.functional.conv2d(images, pull_kernels(weight), padding=(2, 2), dilation=(2, 1))
    pull = nn.functional.avg_pool2d(pull, 3, 1, 1, count_include_pad=False)
    torch.testing.assert_close(responses['pull'], pull.relu(), rtol=1e-4, atol=1e-5)
    expected = push_pull_conv2d(images, weight, alpha, padding=(2, 2), dilation=(2, 1)).relu()
    torch.testing.assert_close(responses['push-pull'], expected)
    assert all((response >= 0).all() for response in responses.values())
    assert edge_responses(images, torch.randn(1, 3, 2, 4), 1.0)['pull'].shape == (2, 1, 12, 14)


@pytest.mark.parametrize(
    'edge, background, expected', [(10, 1, 20), (1, 10, -20), (1, 0, math.inf), (0, 1, -math.inf), (0, 0, None)]
)
def test_snr(edge, background, expected):
    assert snr_db(edge, background) == (expected if expected is None else pytest.approx(expected))


def test_spectrum_of_hand_made_kernels():
    delta = torch.zeros(2, 1, 3, 3)
    delta[0, 0, 1, 1], delta[1, 0, 0, 2] = 1, -1
    zero = torch.zeros_like(delta)
    # Flat, wherever the one is, and the mean of magnitudes is not the magnitude of the mean.
    np.testing.assert_allclose(combined_spectrum(delta, zero, 0.0, 0), np.ones((32, 32)), atol=1e-12)
    # A grey grating is the same in both channels, which cancel out.
    opponent = torch.cat([delta, -delta], 1)
    np.testing.assert_allclose(combined_spectrum(opponent, opponent, 0.0, 0), 0, atol=1e-12)
    box = torch.full((1, 1, 3, 3), 1 / 9)
    places = {(16, 16): 1, (16, 24): 1 / 3, (8, 16): 1 / 3, (24, 24): 1 / 9, (16, 0): 1 / 3, (0, 0): 1 / 9}
    window = combined_spectrum(zero[:1], delta[:1], 1.0, 3)
    for place, value in places.items():
        assert combined_spectrum(box, box, 0.0, 0)[place] == pytest.approx(value, abs=1e-6)
        assert window[place] == pytest.approx(value, abs=1e-6)  # averaging a point makes it a box


@pytest.mark.parametrize('window, dilation', [(0, (1, 1)), (3, (1, 1)), (5, (1, 2))])
def test_spectrum_of_a_combination_is_that_of_the_combined_kernel(window, dilation):
    weight = torch.randn(4, 2, 3, 4, generator=torch.Generator().manual_seed(0))
    pull = pull_kernels(weight)
    # The response of the linear unit to a point in the middle of an otherwise empty grey image.
    point = torch.zeros(1, 2, 32, 32)
    point[:, :, 16, 16] = 1
    push_response, pull_response = (
        nn.functional.conv2d(nn.functional.pad(point, (0, dilation[1] * 3, 0, dilation[0] * 2)), k, dilation=dilation)
        for k in (weight, pull)
    )
    if window:
        pull_response = nn.functional.avg_pool2d(pull_response, window, 1, window // 2)
    expected = np.abs(np.fft.fft2((push_response - 1.5 * pull_response)[0].double().numpy())).mean(0)
    np.testing.assert_allclose(
        np.fft.ifftshift(combined_spectrum(weight, pull, 1.5, window, dilation)), expected, rtol=1e-4, atol=1e-5
    )


def test_spectrum_has_room_for_a_large_kernel():
    weight = torch.zeros(1, 1, 1, 3)
    weight[..., [0, -1]] = 1  # two points 40 apart
    spectrum = combined_spectrum(weight, weight, 0.0, 0, (1, 20))
    assert spectrum.shape == (41, 41)
    np.testing.assert_allclose(spectrum[0], 2 * np.abs(np.cos(np.pi * 40 * np.arange(-20, 21) / 41)), atol=1e-9)


def test_radial_mean():
    spectrum = np.zeros((32, 32))
    spectrum[16, 16], spectrum[16, 17], spectrum[18, 18] = 7, 8, 5
    mean = radial_mean(spectrum)
    assert len(mean) == 17
    assert mean[0] == 7 and mean[1] == 1  # the ring of radius 1 has 8 pixels
    assert mean[3] > 0 and mean[2] == 0 and (mean[4:] == 0).all()  # (2, 2) is nearer to 3 than to 2
    np.testing.assert_allclose(radial_mean(np.ones((33, 33))), np.ones(17))


def test_models_that_cannot_be_drawn(tmp_path):
    with pytest.raises(ValueError, match='test_resnet has no push-pull unit to draw: take one of .* or convert it'):
        draw_figures(timm.create_model('test_resnet'), tmp_path)
    layer = unit(torch.ones(2, 1, 1, 1))
    layer.alpha.data[1] = math.nan
    with pytest.raises(ValueError, match='Sequential cannot be drawn: 0.alpha has values that are not finite'):
        draw_figures(nn.Sequential(layer), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, 'no space left on device')

    monkeypatch.setattr(os, 'replace', fail)
    with pytest.raises(OSError, match='no space'):
        draw_figures(unit(torch.ones(2, 1, 3, 3)), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    with pytest.raises(ModuleNotFoundError, match='Figures need matplotlib: pip install matplotlib'):
        draw_figures(unit(torch.ones(2, 1, 3, 3)), tmp_path)
    assert list(tmp_path.iterdir()) == []
