import base64
import html.parser
import io
import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_results import FIVE, write_results

from timm_pushpull.cli import main
from timm_pushpull.drawing import to_png
from timm_pushpull.files import atomic_write
from timm_pushpull.robustness import page, plots, report, summary
from timm_pushpull.robustness.intervals import columns_of
from timm_pushpull.robustness.metrics import TEST_CORRUPTIONS
from timm_pushpull.robustness.plots import (
    _style,
    plot_error_by_corruption,
    plot_error_by_severity,
    plot_mce_against_clean_error,
    plot_overview,
    plot_pairs,
)
from timm_pushpull.robustness.report import write_report
from timm_pushpull.robustness.runs import RUN_MEASURES, difference_of_means, parse_pairs, shift_means_over_runs
from timm_pushpull.robustness.store import (
    PREDICTION,
    predictions_path,
    read_predictions,
    read_protocol,
    write_images,
    write_predictions,
)
from timm_pushpull.robustness.summary import write_summary

to_hex = pytest.importorskip('matplotlib.colors').to_hex
pytest.importorskip('scipy')
pytestmark = pytest.mark.usefixtures('undrawn')
PASSES = [(name, severity) for name in TEST_CORRUPTIONS for severity in FIVE]
PLOTS = {
    'reliability.png',
    'error_by_corruption.png',
    'error_by_severity.png',
    'mce_against_clean_error.png',
    'examples.png',
    'overview.png',
}


def write_finished(folder, errors=None, baseline='plain <1>', **protocol):
    """Write a results folder of ten images of two classes, with examples."""
    errors = errors or {'plain <1>': (2, 5), 'pp': (3, 4)}
    passes = {
        name: {('clean', 0): clean} | dict.fromkeys(PASSES, corrupted) for name, (clean, corrupted) in errors.items()
    }
    write_results(folder, passes, images=10, classes=2, **protocol)
    write_images(folder, [f'{place}.png' for place in range(10)], [0, 1] * 5, ['n01440764', 'n02102040'])
    for corruption in ('clean-0', 'fog-3'):
        content = io.BytesIO()
        Image.fromarray(np.full((8, 8, 3), 99, np.uint8)).save(content, 'png')
        atomic_write(folder / 'examples' / f'{corruption}-4.png', content.getvalue())
    write_summary(folder, baseline)
    return folder


@pytest.fixture
def drawn(undrawn, monkeypatch):
    """Reports with the pixels of their plots."""
    monkeypatch.setattr(report, 'to_png', to_png)


class Page(html.parser.HTMLParser):
    """Table rows, texts, image sources and headings of a page."""

    def __init__(self, path):
        super().__init__()
        self.rows, self.sources, self.texts = [], [], []
        self.headings = re.findall('<h2>(.*?)</h2>', path.read_text())
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        if tag == 'tr':
            self.rows.append([])
        if tag in ('td', 'th'):
            self.rows[-1].append('')
        if tag == 'img':
            self.sources.append(dict(attributes)['src'])

    def handle_data(self, data):
        self.texts.append(data)
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += f' {data}'

    def handle_endtag(self, tag):
        if tag == 'table':
            self.rows.append([])

    def row(self, start):
        return [' '.join(row).strip() for row in self.rows if row and row[0].strip() == start]


def test_the_page_holds_the_figures_and_needs_no_other_file(drawn, tmp_path):
    path = write_report([write_finished(tmp_path / 'results')], tmp_path / 'page')
    page = Page(path)
    assert {p.name for p in (tmp_path / 'page').iterdir()} == {'report.html', *PLOTS}
    assert all(source.startswith('data:image/png;base64,') for source in page.sources) and len(page.sources) == 7
    figures = {base64.b64decode(source.partition(',')[2]) for source in page.sources}
    assert {(tmp_path / 'page' / name).read_bytes() for name in PLOTS - {'examples.png'}} <= figures
    assert 'http' not in re.sub(r'base64,[^"]*', '', path.read_text())
    plain, pp = page.row('plain <1>')[0], page.row('pp')[0]
    # E 20, plain mCE 50; E 30, mCE 40, so R_net 100 * ((50 - 40) + (20 - 30)) / (2 * 20) = 0
    assert re.findall(r'(?<!to )\b\d+\.\d\b(?! to)', plain)[:2] == ['20.0', '50.0']
    assert re.findall(r'(?<!to )\b\d+\.\d\b(?! to)', pp)[:2] == ['30.0', '40.0']
    assert any('50.0' in row and '40.0' in row for row in page.row('fog'))
    assert any('Baseline: plain <1>' in text for text in page.texts)
    # E 30 minus 20, mCE 40 minus 50: one of ten images, drawn up to three times.
    sentence = (
        'pp against plain <1>, by these 10 images: the clean error is not significantly different (10.0 points, 95% '
        'interval 0.0 to 30.0); plain mCE is not significantly different (-10.0 points, 95% interval -30.0 to 0.0).'
    )
    assert [text for text in page.texts if 'against plain' in text] == [sentence]
    assert page.row('points') == ['points  pp minus plain <1>']
    assert page.headings == [
        'Measures',
        'Differences of checkpoints',
        'Calibration',
        'Where the errors are',
        'Images and predictions',
        'Protocol',
    ]


def test_a_difference_whose_interval_excludes_0_is_bold(tmp_path):
    errors = {'plain': (1, 9), 'pp': (7, 8), 'equal': (1, 9)}
    path = write_report([write_finished(tmp_path / 'results', errors, baseline='plain')], tmp_path / 'page')
    assert re.findall(r'<tr><td>E</td>(.*?)</tr>', path.read_text()) == [
        '<td><b>60.0<small>30.0 to 90.0</small></b></td><td>0.0<small>0.0 to 0.0</small></td>'
    ]
    assert path.read_text().count('<b>') == 1 + 2  # and the titles of two examples


def test_a_page_without_a_baseline_compares_only_two_models(tmp_path):
    two = write_finished(tmp_path / 'two', {'a': (1, 9), 'b': (7, 8)}, baseline=None)
    three = write_finished(tmp_path / 'three', {'a': (1, 9), 'b': (7, 8), 'c': (1, 9)}, baseline=None)
    assert Page(write_report([two], tmp_path / 'page')).row('points') == ['points  b minus a']
    assert not Page(write_report([three], tmp_path / 'page')).row('points')
    assert Page(write_report([three], tmp_path / 'page', 'b')).row('points') == ['points  a minus b  c minus b']


def test_the_protocol_is_in_words(tmp_path):
    protocol = {
        'corruptions': {'generated_by': 'a package', 'seed': 3},
        'data': {'images': 5, 'clean': True, 'names_sha256': 'ab' * 32},
        'versions': {'numpy': None},
        'models': {'a': {'input_size': [3, 40, 32], 'model_args': {'avg_pool_size': '5'}}, 'b': {'crop_pct': 0.9}},
    }
    atomic_write(tmp_path / 'page.html', page.protocol_table(protocol).encode())
    rows = [[cell.strip() for cell in row] for row in Page(tmp_path / 'page.html').rows if row]
    assert rows == [
        ['corruptions generated by', 'a package'],
        ['seed of the corruptions', '3'],
        ['images', '5'],
        ['clean images among them', 'yes'],
        ['hash of the image names', 'abababababab'],
        ['version of numpy', '–'],
        ['', 'a', 'b'],
        ['channels, height, width', '3, 40, 32', '–'],
        ['argument avg_pool_size', '5', '–'],
        ['fraction of the image in the crop', '–', '0.9'],
    ]


def test_the_page_has_the_predictions_for_the_examples(tmp_path):
    folder = write_finished(tmp_path / 'results')
    predictions = read_predictions(folder)['pp']['fog', 3]
    predictions['prediction'][4] = predictions['rank'][4] = 1
    write_predictions(predictions_path(folder, 'pp', 'fog', 3), predictions)
    texts = Page(write_report([folder], tmp_path / 'page')).texts
    assert [texts.count(name) for name in ('plain <1>: ', 'pp: ')] == [2, 2]
    # Image 4 is of class 0, a tench. The fixture has it wrong in the fog for the other model, by its rank.
    assert texts.count('✓\u00a0tench') == 2 and texts.count('✗\u00a0English springer') == 1


def test_models_of_one_protocol_share_a_table_and_others_do_not(tmp_path):
    one = write_finished(tmp_path / 'one')
    same = write_finished(tmp_path / 'same', {'third': (1, 2)}, baseline=None)
    fields = dict(reversed(read_protocol(same).items()))
    atomic_write(same / 'protocol.json', json.dumps(fields).encode())  # the order of the fields does not count
    path = write_report([one, same], tmp_path / 'together')
    assert Page(path).row('CE, %') == ['CE, %  plain <1>  pp  third']
    other = write_finished(tmp_path / 'other', {'third': (1, 2)}, baseline=None, seed=1)
    page = Page(write_report([one, same, other], tmp_path / 'apart'))
    assert {'Part 1: one, same', 'Part 2: other'} <= {*page.texts}
    assert page.row('CE, %') == ['CE, %  plain <1>  pp  third', 'CE, %  third']
    assert {f'{part}-{name}' for part in (1, 2) for name in PLOTS} <= {p.name for p in path.parent.parent.rglob('*')}


def test_the_page_has_means_over_training_runs(tmp_path):
    errors = {'plain': (2, 5), 'pp@1': (3, 4), 'pp@2': (5, 8), 'pp@3': (1, 3)}
    path = write_report([write_finished(tmp_path / 'results', errors, baseline='plain')], tmp_path / 'page')
    page = Page(path)
    assert {p.name for p in path.parent.iterdir()} == {'report.html', *PLOTS}
    assert any('Plain mCE against the clean error, mean of the training runs' in text for text in page.texts)
    # Of ten images 3, 5 and 1 are wrong when clean, 4, 8 and 3 when corrupted.
    assert page.row('pp')[0].startswith('pp  3  30.0 10.0 to 50.0  50.0 30.0 to 80.0')
    assert page.row('plain')[0].startswith('plain  1  20.0 20.0 to 20.0  50.0 50.0 to 50.0')
    # CE of each run is folded, the means are not.
    assert page.row('CE, %') == ['CE, %  plain  pp', 'CE, %  plain  pp@1  pp@2  pp@3']
    assert [row.split('  ')[1:3] for row in page.row('fog')] == [
        ['50.0 50.0 to 50.0', '50.0 30.0 to 80.0'],
        ['50.0 20.0 to 80.0', '40.0 10.0 to 70.0'],
    ]
    text = path.read_text()
    order = ['Over training runs', '<details><summary>The 4 single training runs', '>pp@1<', '</details>']
    places = [text.index(words) for words in order]
    assert places == sorted(places) and text.count('pp@1') == text[places[1] :].count('pp@1')


def test_training_runs_are_compared_with_the_runs_of_the_baseline(tmp_path, monkeypatch):
    monkeypatch.setattr(summary, 'FEWEST_ERRORS', 1)
    errors = {'plain@1': (2, 5), 'plain@2': (4, 6), 'pp@1': (3, 4), 'pp@2': (2, 7)}
    folder = write_finished(tmp_path / 'results', errors, baseline='plain')
    page = Page(write_report([folder], tmp_path / 'page'))
    # R_net: 100 * ((50 - 40) + (20 - 30)) / (2 * 20) and 100 * ((60 - 70) + (40 - 20)) / (2 * 40)
    head, head_of_differences, *_ = page.row('model')
    pp, differences, _ = page.row('pp')
    assert head.split() == 'model runs E plain mCE noise blur weather digital relative mCE R net'.split()
    assert pp.startswith('pp  2  25.0 20.0 to 30.0  55.0 40.0 to 70.0  55.0 40.0 to 70.0')
    assert pp.endswith('  6.2 0.0 to 12.5')
    assert any('R net compare each run with the run of plain' in text for text in page.texts)
    # E 30 and 20 minus 20 and 40: -5, variances 50 and 200 of 2 runs each, so 250^2 / (50^2 + 200^2) = 1.47 degrees of
    # freedom; the 97.5% quantile of their t is 6.19, by scipy.special.stdtrit, times sqrt(25 + 100).
    assert head_of_differences.split() == 'model runs baseline runs E plain mCE noise blur weather digital'.split()
    assert differences.startswith('pp  2  2  -5.0 -74.2 to 64.2')
    # Plain mCE and kinds 40, 70 minus 50, 60: 0, variances 450 and 50, so 1.22 degrees: 8.39 times sqrt(225 + 25).
    assert differences.endswith('  0.0 -132.7 to 132.7' * 5)
    assert len(page.row('plain')) == 2  # not among the differences
    assert not any('Without' in text or 'against plain' in text for text in page.texts)
    of_one = Page(write_report([folder], tmp_path / 'of one', 'plain@1'))
    assert ['R net' in row for row in of_one.row('model')] == [False, False, True]  # of the single runs


def test_any_number_of_runs_is_compared_with_the_runs_of_the_baseline(tmp_path):
    errors = {'plain@1': (2, 5), 'plain@2': (4, 6), 'pp@2': (2, 7), 'pp@3': (7, 7), 'pp@x': (9, 7), 'alone': (9, 9)}
    folder = write_finished(tmp_path / 'results', errors, baseline='plain')
    page = Page(write_report([folder], tmp_path / 'page'))
    # E 20, 70, 90 minus 20, 40; plain mCE 70 in each run, minus 50, 60: the t of one degree of freedom, 12.7, times 5.
    assert page.row('pp')[1].startswith('pp  3  2  30.0 ')
    assert page.row('pp')[1].endswith('  15.0 -48.5 to 78.5' * 5)
    assert len(page.row('alone')) == 3  # itself, and over its one run, with the calibration


def test_a_difference_of_equal_runs_has_no_interval(tmp_path):
    errors = {'plain@1': (2, 5), 'plain@2': (2, 5), 'pp@1': (3, 7), 'pp@2': (3, 7)}
    page = Page(write_report([write_finished(tmp_path / 'results', errors, baseline='plain')], tmp_path / 'page'))
    assert page.row('pp')[1].split() == ['pp', '2', '2', '10.0', *['20.0'] * 5]


def test_equal_clean_errors_have_a_plot(tmp_path):
    # By rounding, the mean of three errors of 0.2 is above 0.2: the error bars must not get a negative length.
    errors = {f'pp@{run}': (1, 5) for run in (1, 2, 3)}
    folder = write_finished(tmp_path / 'results', errors, baseline=None)
    path = folder / 'summary.csv'
    lines = [line.split(',') for line in path.read_text().splitlines()]
    for line in lines[1:]:
        for name in ('E', 'E_low', 'E_high'):
            line[lines[0].index(name)] = '0.2'
    path.write_text('\n'.join(map(','.join, lines)))
    assert np.mean([0.2] * 3) > 0.2
    write_report([path], tmp_path / 'page')
    assert (tmp_path / 'page' / 'mce_against_clean_error.png').exists()


def test_a_single_run_of_the_baseline_has_no_line_of_zero_gain(tmp_path):
    errors = {'plain@1': (2, 5), 'plain@2': (4, 6), 'pp@1': (3, 4), 'pp@2': (2, 7)}
    folder = write_finished(tmp_path / 'results', errors, baseline='plain')
    for baseline, is_drawn in (('plain', True), ('plain@1', False)):
        page = Page(write_report([folder], tmp_path / baseline, baseline))
        assert any('(R_net = 0); below the line' in text for text in page.texts) == is_drawn


def test_pairs_have_their_differences_and_a_plot(tmp_path, monkeypatch):
    findings = []  # on plain mCE, for the colours of the arrows
    monkeypatch.setattr(plots, 'plot_pairs', lambda means, words: findings.extend(words) or plot_pairs(means, words))
    errors = {'plain@1': (2, 5), 'plain@2': (4, 6), 'pp@2': (2, 7), 'pp@3': (7, 7), 'pp@x': (9, 7), 'alone': (9, 4)}
    folder = write_finished(tmp_path / 'results', errors, baseline=None)
    pairs = ['plain:pp', 'pp:plain', 'alone:plain@2', 'plain:pp']
    page = Page(write_report([folder], tmp_path / 'page', pairs=pairs))
    assert [row.split() for row in page.row('pair')] == [
        'pair runs (from, to) E plain mCE noise blur weather digital'.split()
    ]
    assert page.row('points') == ['points  plain@2 minus alone'] and not page.row('alone → plain@2')
    # E 20, 70, 90 minus 20, 40: 30, variances 1300 of 3 runs and 200 of 2, so 2.74 degrees of freedom: 3.36 times
    # sqrt(1300 / 3 + 100). Plain mCE and kinds 70 in each run, minus 50 and 60: 12.7 times 5.
    assert page.row('plain → pp') == ['plain → pp  2, 3  30.0 -47.6 to 107.6' + '  15.0 -48.5 to 78.5' * 5]
    assert page.row('pp → plain') == ['pp → plain  3, 2  -30.0 -107.6 to 47.6' + '  -15.0 -78.5 to 48.5' * 5]
    # Of ten images 5 more are right: 2 to 8 of ten draws with 95%. 2 more are wrong in each corrupted pass: 0 to 5.
    assert page.row('E') == ['E  -50.0 -80.0 to -20.0']
    assert page.row('plain mCE') == ['plain mCE  20.0 0.0 to 50.0'] and page.row('CE fog') == [
        'CE fog  20.0 0.0 to 50.0'
    ]
    assert page.headings == [
        'Over training runs',
        'Differences of checkpoints',
        'Differences of pairs',
        'Calibration',
        'Where the errors are',
        'Protocol',
    ]
    assert sum(text.startswith('plain@2 against alone, by these 10 images: ') for text in page.texts) == 1
    assert (tmp_path / 'page' / 'pairs.png').is_file() and len(page.sources) == 8
    assert findings == ['not significantly different'] * 3  # not so the clean error of the last
    summary = Page(write_report([folder / 'summary.csv'], tmp_path / 'summary', pairs=pairs))
    assert summary.row('plain → pp') == page.row('plain → pp') and not summary.row('points')  # needs predictions
    assert summary.row('alone → plain@2')[0].split() == ['alone', '→', 'plain@2', '1,', '1', '-50.0', *['20.0'] * 5]
    assert (tmp_path / 'summary' / 'pairs.png').is_file()


def test_an_arrow_leads_from_each_pair_to_the_other_name():
    plain, pp, other = (
        dict(model=m, E=e, plain_mCE=mce) for m, e, mce in (('a', 10, 60), ('b', 30, 50), ('c', 70, 80))
    )
    lacking = dict(model='lacking', E=20, plain_mCE='')
    axes = plot_pairs([(plain, pp), (plain, other), (plain, lacking), (pp, plain)]).axes[0]
    arrows = [text for text in axes.texts if text.arrow_patch]
    ends = [(arrow.xyann, arrow.xy) for arrow in arrows]
    assert ends == [((10, 60), (30, 50)), ((10, 60), (70, 80)), ((30, 50), (10, 60))]
    gain, loss, loss_too = (arrow.arrow_patch.get_edgecolor() for arrow in arrows)
    assert loss == loss_too != gain
    colors = {line.get_label(): line.get_color() for line in axes.lines}
    assert colors['plain mCE falls'] == to_hex(gain) and colors['plain mCE does not fall'] == to_hex(loss)
    labels = {text.get_text(): text.xy for text in axes.texts if not text.arrow_patch}
    assert labels == {'a': (10, 60), 'b': (30, 50), 'c': (70, 80)}
    assert axes.get_xlabel().startswith('E:') and axes.get_ylabel().startswith('plain mCE')
    assert plot_pairs([(plain, lacking)]) is None


def test_error_bars_belong_to_their_axes():
    ends = dict(E=10, E_low=8, E_high=14, plain_mCE=60, plain_mCE_low=57, plain_mCE_high=69)
    axes = plot_mce_against_clean_error([dict(model='a', baseline='', **ends)]).axes[0]
    point, _, (across, up) = axes.containers[0].lines
    assert (list(point.get_xdata()), list(point.get_ydata())) == ([10], [60])
    assert across.get_segments()[0].tolist() == [[8, 60], [14, 60]]
    assert up.get_segments()[0].tolist() == [[10, 57], [10, 69]]
    fog, snow = dict(CE_fog=30, CE_fog_low=25, CE_fog_high=37), dict(CE_snow=50, CE_snow_low=41, CE_snow_high=52)
    axes = plot_error_by_corruption([dict(model='a', baseline='', **snow, **fog)]).axes[0]
    names = [label.get_text() for label in axes.get_yticklabels()]
    points, _, (across,) = axes.containers[0].lines
    assert names == ['snow', 'fog'] and list(points.get_xdata()) == [50, 30]
    assert [segment[:, 0].tolist() for segment in across.get_segments()] == [[41, 52], [25, 37]]


@pytest.mark.parametrize('low, high', [('', ''), (57, '')])
def test_an_error_without_an_interval_is_a_point(low, high):
    row = row_of('a', E=(10, 8, 14), plain_mCE=(60, low, high))
    axes = plot_mce_against_clean_error([row]).axes[0]
    point, _, (across, up) = axes.containers[0].lines
    assert (list(point.get_xdata()), list(point.get_ydata())) == ([10], [60])
    assert across.get_segments()[0].tolist() == [[8, 60], [14, 60]]
    assert all(len(segment) < 2 for segment in up.get_segments())


def test_the_plot_by_severity_has_errors():
    predictions = {}
    for severity, wrong in ((0, 1), (1, 3), (2, 6)):
        array = np.zeros(10, PREDICTION)
        array['rank'][:wrong] = 1
        predictions['fog' if severity else 'clean', severity] = array
    line = plot_error_by_severity({'a': predictions}).axes[0].lines[0]
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([0, 1, 2], [10, 30, 60])


def row_of(model, **measures):
    """Return a row with these measures (value, low, high)."""
    row = {'model': model, 'baseline': '', 'E': '', 'plain_mCE': ''}
    return row | {
        column: n for name, three in measures.items() for column, n in zip(columns_of(name), three, strict=True)
    }


def overview(rows, shifts=()):
    """Return the points of each set (height in 1/100, low, value, high), and the names with their heights."""
    (axes,) = plot_overview(rows, shifts).axes
    points = {}
    for container in axes.containers:
        line, _, (across,) = container.lines
        ends = [segment[:, 0].tolist() for segment in across.get_segments()]
        points[container.get_label()] = [
            (round(100 * y), low, x, high) for (x, y), (low, high) in zip(line.get_xydata().tolist(), ends, strict=True)
        ]
    names = sorted(axes.texts, key=lambda text: text.get_position()[1])
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # heights grow downwards
    return points, [(text.get_text(), round(100 * text.get_position()[1])) for text in names]


def test_the_overview_has_each_error_below_the_name_of_its_model():
    rows = [
        row_of('worst', E=(10, 8, 14), plain_mCE=(70, 66, 73)),
        row_of('best', E=(20, 17, 22), plain_mCE=(40, 39, 45)),
        row_of('clean only', E=(5, 4, 9)),
    ]
    shifts = [
        row_of('worst', top1_err=(81, 80, 85), top5_err=(30, 29, 31)) | {'shift': 'a'},
        row_of('best', top1_err=(52, 48, 53), top5_err=(20, 19, 21)) | {'shift': 'r'},
        row_of('best', top1_err=(62, 61, 64), top5_err=(20, 19, 21)) | {'shift': 'a'},
    ]
    points, names = overview(rows, shifts)
    (best, top), (worst, middle), (clean_only, low) = names
    assert (best, worst, clean_only) == ('best', 'worst', 'clean only') and 0 < top < middle < low
    assert points == {
        'clean (E)': [(middle + 8, 8, 10, 14), (top + 8, 17, 20, 22), (low + 8, 4, 5, 9)],
        'corrupted (plain mCE)': [(middle + 18, 66, 70, 73), (top + 18, 39, 40, 45)],
        'a': [(middle + 28, 80, 81, 85), (top + 28, 61, 62, 64)],
        'r': [(top + 38, 48, 52, 53)],
    }
    assert top + 38 < middle - 17 and middle + 38 < low - 17  # no point of one is beside the name of the next


def test_the_overview_has_what_there_is():
    other = [row_of('x', E=(1, 0, 2), other_mCE=(9, 8, 9)), row_of('y', E=(2, 1, 3), other_mCE=(5, 4, 6))]
    points, names = overview(other)
    assert list(points) == ['clean (E)', 'other corruptions (other mCE)'] and [name for name, _ in names] == ['y', 'x']
    points, names = overview([row_of('x', E=(3, 2, 4)), row_of('y', E=(2, 1, 3))])
    assert list(points) == ['clean (E)'] and [name for name, _ in names] == ['y', 'x']
    assert plot_overview([row_of('x')]) is None
    figure = plot_overview([row_of('network_' * 10 + str(number), E=(1, 0, 2)) for number in range(3)])
    figure.draw_without_rendering()
    (axes,) = figure.axes
    boxes = [text.get_window_extent() for text in axes.texts]
    assert max(box.x1 for box in boxes) < figure.bbox.x1
    ends = [axes.transData.transform((0, line.get_ydata()[0]))[1] for line in axes.lines if len(line.get_ydata()) == 2]
    assert len(ends) == 3 and all(box.y1 <= end for box, end in zip(boxes[1:], ends[:-1], strict=True))


def test_shifts_of_training_runs_have_a_mean_and_a_range():
    measures = [('a@1', 'r', 10), ('a@2', 'r', 40), ('a@1', 's', 7), ('b', 'r', 3)]
    rows = [row_of(name, top1_err=(n, 0, 99), top5_err=(n / 2, 0, 99)) for name, _, n in measures]
    rows = [
        row | {'shift': shift, 'error_increase': '', 'images': 9}
        for row, (_, shift, _) in zip(rows, measures, strict=True)
    ]
    found = shift_means_over_runs(rows)
    shown = (
        'model',
        'shift',
        'runs',
        'images',
        *columns_of('top1_err'),
        'top5_err',
        'error_increase',
        'error_increase_low',
    )
    assert [[row[column] for column in shown] for row in found] == [
        ['a', 'r', 2, 9, 25, 10, 40, 12.5, '', ''],
        ['a', 's', 1, 9, 7, 7, 7, 3.5, '', ''],
        ['b', 'r', 1, 9, 3, 3, 3, 1.5, '', ''],
    ]


class Sortable(html.parser.HTMLParser):
    """Heads of the sortable tables of a page, and the data-value of each cell."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.tags, self.is_open = [], set(), False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.add(tag)
        if tag == 'table':
            self.is_open = attributes.get('class') == 'sortable'
            self.tables += [([], [])] * self.is_open and [([], [])]
        elif self.is_open and tag == 'tr':
            self.tables[-1][1].append([])
        elif self.is_open and tag == 'th':
            assert attributes == {'scope': 'col'}
            self.tables[-1][0].append('')
        elif self.is_open and tag == 'td':
            self.tables[-1][1][-1].append(attributes['data-value'])

    def handle_data(self, data):
        if self.is_open and self.tables[-1][0] and len(self.tables[-1][1]) == 1:
            self.tables[-1][0][-1] += data


def sorted_by(lines, column, sign=1):
    """Sort as the script of the page does."""
    numbers = {line[column]: float(line[column] or 'nan') for line in lines}
    return sorted(lines, key=lambda line: (line[column] == '', sign * numbers[line[column]]))


def test_tables_sort_by_the_values_of_their_cells(tmp_path):
    rows = [
        row_of(name, E=(e, 1, 2), plain_mCE=mce)
        for name, e, mce in (
            ('<b>', 9.96, (45.2, 1, 2)),
            ('a', 10.04, ('', '', '')),
            ('c', 100.0, (5.1, 1, 2)),
        )
    ]
    text = page.document([page.table(rows, ['model'], ['E', 'plain_mCE', 'R_net'])])
    (table,) = Sortable(text).tables
    heads, (head, *lines) = table
    assert (heads, head) == (['model', 'E', 'plain mCE'], [])
    assert lines == [['<b>', '9.96', '45.2'], ['a', '10.04', ''], ['c', '100.0', '5.1']]
    # As text 100.0 and 10.04 come before 9.96, and the page shows 10.0 for both smaller ones.
    assert [line[0] for line in sorted_by(lines, 1)] == ['<b>', 'a', 'c'] and text.count('>10.0<') == 2
    assert [line[0] for line in sorted_by(lines, 2)] == ['c', '<b>', 'a']
    assert [line[0] for line in sorted_by(lines, 2, -1)] == ['<b>', 'c', 'a']
    assert text.count('<script>') == 1 and 'src=' not in text.partition('<script>')[2]
    assert 'button' not in Sortable(text).tags  # without JavaScript the head is text


def test_the_tables_of_models_and_of_corruptions_sort(tmp_path):
    errors = {'plain@1': (2, 5), 'plain@2': (4, 6), 'pp@1': (3, 4), 'pp@2': (2, 7)}
    path = write_report([write_finished(tmp_path / 'results', errors, baseline='plain')], tmp_path / 'page')
    tables = Sortable(path.read_text()).tables
    # Means, differences, calibration, CE of the means; then the single runs and their CE.
    assert [[heads[0], len(lines) - 1] for heads, lines in tables] == [
        ['model', 2],
        ['model', 1],
        ['model', 2],
        ['CE, %', 15],
        ['model', 4],
        ['CE, %', 15],
    ]
    assert tables[0][1][1][:4] == ['plain', '2', '30.0', '55.0'] and tables[3][1][1] == [
        'gaussian noise',
        '55.0',
        '55.0',
    ]


def test_an_arrow_of_a_difference_that_is_not_significant_is_grey():
    plain, pp = (dict(model=m, E=e, plain_mCE=mce) for m, e, mce in (('a', 10, 60), ('b', 30, 50)))
    pairs = [(plain, pp), (plain, dict(pp, plain_mCE='')), (pp, plain), (plain, pp), (plain, pp), (pp, plain)]
    unclear = 'not significantly different'
    axes = plot_pairs(pairs, ['lower', unclear, 'higher', unclear, '', unclear]).axes[0]
    colors = {line.get_label(): line.get_color() for line in axes.lines}
    falls, does_not, open_end = (
        colors[f'plain mCE{words}'] for words in (' falls', ' does not fall', ': interval holds 0')
    )
    found = [to_hex(text.arrow_patch.get_edgecolor()) for text in axes.texts if text.arrow_patch]
    assert found == [falls, does_not, open_end, falls, open_end] and len({falls, does_not, open_end}) == 3


def test_names_in_the_plot_of_pairs_do_not_hide_each_other():
    points = [(25, 54), (27, 55), (25.2, 53.8), (25.5, 50), (26.5, 49.8), (26.6, 51), (33, 47)]
    rows = [dict(model=f'a network with a long name {n}', E=x, plain_mCE=y) for n, (x, y) in enumerate(points)]
    figure = plot_pairs([(rows[0], row) for row in rows[1:]])
    (axes,) = figure.axes
    boxes = [text.get_window_extent() for text in axes.texts if not text.arrow_patch]
    assert len(boxes) == 7 and not any(box.overlaps(other) for box, other in itertools.combinations(boxes, 2))
    frame = axes.get_window_extent()
    assert all(frame.contains(*corner) for box in boxes for corner in (box.min, box.max))
    assert not any(box.contains(*axes.transData.transform(point)) for box in boxes for point in points)


def test_names_with_colons_can_be_paired(drawn, tmp_path):
    folder = write_finished(tmp_path / 'results', {'hf-hub:o/a@1': (2, 5), 'local-dir:b': (3, 4)}, baseline=None)
    page = Page(write_report([folder], tmp_path / 'page', pairs=['hf-hub:o/a:local-dir:b']))
    assert page.row('points') == ['points  local-dir:b minus hf-hub:o/a@1'] and page.row('E')[0].startswith('E  10.0')


def test_names_of_a_pair_must_be_known_and_of_one_protocol(tmp_path):
    one = write_finished(tmp_path / 'one', {'a@1': (2, 5), 'b': (3, 4)}, baseline=None)
    other = write_finished(tmp_path / 'other', {'c': (1, 2), 'd': (4, 4)}, baseline=None, seed=1)
    for pair in ('a:x', 'a', 'a:c', ':', 'a@2:b'):
        with pytest.raises(ValueError, match=f"got '{pair}'. Models: a, b, a@1, c, d."):
            write_report([one, other], tmp_path / 'page', pairs=['c:d', pair])
    assert not (tmp_path / 'page').exists()
    page = Page(write_report([one, other], tmp_path / 'page', pairs=['c:d', 'a:b']))
    assert page.row('points') == ['points  b minus a@1', 'points  d minus c']
    assert {path.name for path in (tmp_path / 'page').glob('*pairs.png')} == {'1-pairs.png', '2-pairs.png'}


def test_a_summary_has_the_tables_and_the_plots_of_its_numbers(drawn, tmp_path):
    errors = {'plain@1': (2, 5), 'plain@2': (4, 6), 'pp@1': (3, 4), 'pp@2': (2, 7)}
    folder = write_finished(tmp_path / 'results', errors, baseline='plain')
    whole = Page(write_report([folder], tmp_path / 'whole'))
    page = Page(write_report([folder / 'summary.csv'], tmp_path / 'page'))
    of_summary = PLOTS - {'error_by_severity.png', 'examples.png', 'reliability.png'}
    assert {p.name for p in (tmp_path / 'page').iterdir()} == {'report.html', *of_summary}
    for name in of_summary:
        assert (tmp_path / 'page' / name).read_bytes() == (tmp_path / 'whole' / name).read_bytes()
    for start in ('model', 'plain@1', 'pp@2', 'pp', 'CE, %', 'fog'):
        assert page.row(start) == [row for row in whole.row(start) if row in page.row(start)] != []
    other = Page(write_report([folder / 'summary.csv'], tmp_path / 'other', 'pp@1'))
    assert any('Baseline: pp@1' in text for text in other.texts)
    assert not any('R net' in row for row in other.row('model'))  # a ratio needs the predictions
    with pytest.raises(ValueError, match=r'summary.csv is a file: name results folders, or one'):
        write_report([folder, folder / 'summary.csv'], tmp_path / 'both')


def test_names_in_a_legend_are_not_cut():
    numbers = dict(E=10, E_low=8, E_high=14, plain_mCE=60, plain_mCE_low=57, plain_mCE_high=69, baseline='')
    for name in ('WM' * 12, 'pp_resnet18.pp3_negated_prime_contrastnorm_r64_imagenette', 'n' * 70, 'short'):
        figure = plot_mce_against_clean_error([dict(numbers, model=f'{name}{number}') for number in range(12)])
        figure.draw_without_rendering()
        box = figure.legends[0].get_window_extent()
        assert 0 <= box.x0 < box.x1 <= figure.bbox.x1 and 0 <= box.y0 < box.y1 <= figure.bbox.y1, name
        assert figure.axes[0].bbox.height > 2.9 * figure.dpi  # the names do not take the room of the plot


def test_no_two_models_look_alike():
    styles = [_style(number) for number in range(20)]
    assert all(style not in styles[:number] for number, style in enumerate(styles))


def test_unfinished_results_have_a_page_too(tmp_path):
    write_results(tmp_path / 'some', {'a': {('clean', 0): 2, ('fog', 1): 5}, 'b': {}}, images=10, classes=2)
    write_images(tmp_path / 'some', ['0.png'] * 10, [0] * 10, ['', ''])
    page = Page(write_report([tmp_path / 'some'], tmp_path / 'page'))
    assert any('A mean over corruptions needs all 15 corruptions' in text for text in page.texts)
    assert not any('is on top' in text for text in page.texts)  # of one model
    assert page.row('fog') and not page.row('frost')


def test_a_model_without_corruptions_beside_one_with_them(tmp_path):
    passes = {'a': {('clean', 0): 2} | dict.fromkeys(PASSES, 5), 'b': {('clean', 0): 3}}
    write_results(tmp_path / 'some', passes, images=10, classes=2)
    write_images(tmp_path / 'some', ['0.png'] * 10, [0] * 10, ['', ''])
    page = Page(write_report([tmp_path / 'some'], tmp_path / 'page'))
    assert any('lowest error under corruptions is on top' in text for text in page.texts)
    assert page.row('fog')[0] == 'fog  50.0 20.0 to 80.0  –' and page.row('b')[0].startswith('b  30.0')


def test_folders_with_the_same_name_stay_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = ['a/results', 'b/results', 'results']
    for folder, errors in zip(map(Path, folders), ((1, 4), (2, 5), (3, 6)), strict=True):
        folder.parent.mkdir(exist_ok=True)
        write_finished(folder, {'pp': errors}, baseline=None)
        protocol = read_protocol(folder)
        protocol['models']['pp']['weights'] = str(folder)
        atomic_write(folder / 'protocol.json', json.dumps(protocol).encode())
    page = Page(write_report(folders, 'page'))
    names = ['pp', 'pp (results)', f'pp ({tmp_path / "results"})']
    assert [page.row(name)[0].split('  ')[1][:4] for name in names] == ['10.0', '20.0', '30.0']


def test_results_without_predictions_are_refused(tmp_path):
    write_results(tmp_path / 'some', {'a': {}}, images=10, classes=2)
    with pytest.raises(ValueError, match='some holds no results yet'):
        write_report([tmp_path / 'some'], tmp_path / 'page')


def test_command(tmp_path, capsys):
    folder = write_finished(tmp_path / 'results')
    assert main(['report', str(folder), '--baseline', 'pp']) == 0
    assert capsys.readouterr().out.strip() == str(folder / 'report' / 'report.html')
    assert 'Baseline: pp' in (folder / 'report' / 'report.html').read_text()
    assert read_protocol(folder)['models'].keys() == {'plain <1>', 'pp'}
    assert main(['report', str(folder / 'summary.csv')]) == 0
    assert capsys.readouterr().out.strip() == str(folder / 'summary_report' / 'report.html')
    assert main(['report', str(folder), '--pairs', 'pp:plain <1>', 'plain <1>:pp']) == 0
    page = Page(folder / 'report' / 'report.html')
    assert page.row('points') == ['points  pp minus plain <1>  plain <1> minus pp']
    assert page.row('plain mCE') == ['plain mCE  -10.0 -30.0 to 0.0  10.0 0.0 to 30.0']
    capsys.readouterr()
    for arguments, message in [
        (['report', str(tmp_path)], 'holds no results'),
        (['report', str(folder), '--baseline', 'x'], "got 'x'"),
        (['report', str(folder), '--pairs', 'pp:x'], "got 'pp:x'. Models: plain <1>, pp."),
        (['report', str(folder / 'protocol.json')], 'protocol.json is not a summary.csv'),
    ]:
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert message in error and error.count('\n') == 1


def test_the_line_of_zero_gain_falls_through_the_baseline():
    rows = [dict(E=x, E_low=x, E_high=x, plain_mCE=60, plain_mCE_low=60, plain_mCE_high=60) for x in (10, 30)]
    rows = [dict(row, model=model, baseline='b') for row, model in zip(rows, 'ab', strict=True)]
    (line,) = (line for line in plot_mce_against_clean_error(rows).axes[0].lines if line.get_label() == 'R_net = 0')
    assert line.get_xy1() == (30, 60) and line.get_slope() == -1


def predictions_with(wrong):
    """Return ten predictions, the first of them wrong."""
    predictions = np.zeros(10, PREDICTION)
    predictions['rank'][:wrong] = 2
    return predictions


def test_the_error_at_a_severity_is_the_mean_over_the_corruptions_of_a_kind():
    wrong = {('clean', 0): 1, ('fog', 1): 3, ('snow', 1): 4, ('fog', 2): 6, ('snow', 2): 9, ('shot_noise', 2): 2}
    noise, weather = plot_error_by_severity({'a': {key: predictions_with(n) for key, n in wrong.items()}}).axes
    assert (noise.get_title(), weather.get_title()) == ('noise', 'weather')
    assert noise.lines[0].get_xydata().tolist() == [[0, 10], [2, 20]]
    assert weather.lines[0].get_xydata().tolist() == [[0, 10], [1, 35], [2, 75]]


def test_training_runs_share_a_line():
    wrong = {'a@1': {('fog', 1): 3, ('fog', 2): 4}, 'a@2': {('fog', 2): 9}, 'b': {('fog', 2): 1}}
    predictions = {
        name: {key: predictions_with(number) for key, number in passes.items()} for name, passes in wrong.items()
    }
    a, b = plot_error_by_severity(predictions).axes[0].lines
    assert (a.get_label(), b.get_label()) == ('a', 'b')
    assert a.get_xydata().tolist() == [[2, 65]] and b.get_xydata().tolist() == [[2, 10]]
    (single,) = plot_error_by_severity({'a@1': predictions['a@1']}).axes[0].lines
    assert single.get_label() == 'a@1' and single.get_xydata().tolist() == [[1, 30], [2, 40]]


def test_the_mean_over_all_15_leaves_out_held_out_corruptions():
    wrong = dict.fromkeys(TEST_CORRUPTIONS, 2) | {'fog': 5, 'saturate': 10}
    figure = plot_error_by_severity({'a': {(name, 3): predictions_with(n) for name, n in wrong.items()}})
    panels = {axes.get_title(): axes.lines[0].get_xydata().tolist() for axes in figure.axes}
    # 14 errors of 20% and one of 50%.
    assert panels['all 15'] == [[3, pytest.approx(22)]] and panels['held out'] == [[3, 100]]


def test_the_interval_of_a_difference_needs_two_runs_of_each():
    def difference(*errors):
        runs = [[dict.fromkeys(RUN_MEASURES, '') | {'E': error} for error in each] for each in errors]
        return [difference_of_means(*runs)[column] for column in columns_of('E')]

    # Variances of 100 and 3 runs each, so 4 degrees of freedom: 2.776 times sqrt(100 / 3 + 100 / 3).
    assert difference([10, 20, 30], [40, 50, 60]) == pytest.approx([30, 30 - 22.67, 30 + 22.67], abs=0.01)
    assert difference([10], [40, 50]) == [35, '', ''] and difference([10, 20], [40]) == [25, '', '']


def test_a_colon_parts_the_names_of_a_pair():
    assert parse_pairs(['a:b', 'a-b', 'azb', 'a:b@1', 'b:'], ['a', 'b@1']) == {'a:b': ('a', 'b'), 'a:b@1': ('a', 'b@1')}
