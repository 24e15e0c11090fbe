import csv
import itertools

import pytest

from timm_pushpull.bench.networks import bench_networks
from timm_pushpull.bench.timing import Comparison, compare, ratio
from timm_pushpull.cli import main
from timm_pushpull.layers import stem
from timm_pushpull.ops import chunked


def test_comparisons():
    rows = list(bench_networks(['resnet18'], batch_size=2, img_size=64, rounds=2))
    cases = [(what, form, use) for what in ('stem', 'resnet18') for form in ('nchw', 'nhwc') for use in USES]
    assert [(row.what, row.memory_format, row.use) for row in rows] == cases
    for row in rows:
        assert row.time_ratio_low <= row.time_ratio <= row.time_ratio_high and row.plain_seconds > 0
        assert row.reference_time_ratio_low <= row.reference_time_ratio <= row.reference_time_ratio_high


USES = ('inference', 'training')


def test_memory_of_the_stem(monkeypatch):
    for module in (chunked, stem):
        monkeypatch.setattr(module, 'CHUNK_BYTES', 1 << 20)  # an image
    for row in itertools.islice(bench_networks(['resnet18'], 8, 128, 1), 4):
        # The reference holds several maps more; the fast version works in chunks of the batch.
        limit = 1 if row.use == 'inference' else 1.5
        assert row.what == 'stem' and row.memory_ratio < limit < row.reference_memory_ratio


def test_every_way_is_measured_as_often(monkeypatch):
    calls, clock = [], iter(range(1000))
    monkeypatch.setattr('timm_pushpull.bench.timing.time.perf_counter', lambda: next(clock))
    ways = {way: lambda way=way: calls.append(way) for way in ('plain', 'ours', 'reference')}
    monkeypatch.setattr('timm_pushpull.bench.timing.peak_bytes', lambda work, device: 1)
    row = compare(ways, 'cpu', 3, 'nothing')
    warm_up, rounds = calls[:3], calls[3:]
    assert warm_up == ['plain', 'ours', 'reference']
    assert rounds == ['plain', 'ours', 'reference', 'ours', 'reference', 'plain', 'reference', 'plain', 'ours']
    assert row.time_ratio_low == row.time_ratio == row.time_ratio_high == 1
    assert row.reference_time_ratio == row.memory_ratio == 1


def test_a_ratio_is_over_the_reference():
    assert ratio([2, 6, 8], [1, 2, 1]) == (3, 2, 8)


def test_command(tmp_path, capsys):
    options = ['--batch-size', '2', '--img-size', '32', '--rounds', '1', '--output', str(tmp_path / 'bench.csv')]
    assert main(['bench', *options[:4], 'networks', '--networks', 'resnet18', *options[4:]]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2 + 2 + 8
    with open(tmp_path / 'bench.csv') as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8 and tuple(rows[0]) == Comparison._fields
    assert main(['bench', 'networks', '--networks', 'vgg11']) == 2
    assert 'networks must be among resnet18, resnet34, ' in capsys.readouterr().err
    assert main(['bench', 'networks', '--rounds', '0']) == 2
    assert main(['bench', 'networks', '--device', 'nope']) == 2


def test_command_for_everything(tmp_path, capsys, monkeypatch):
    asked = []

    def bench_networks(**options):
        asked.append(options)
        precision = 'bfloat16' if options['amp'] else 'float32'
        yield Comparison('stem', 'training', 'nchw', precision, options['torchcompile'], *[1.0] * 9)

    monkeypatch.setattr('timm_pushpull.bench.networks.bench_networks', bench_networks)
    size = dict(batch_size=2, img_size=32, rounds=1)
    options = [f'--{name.replace("_", "-")}={value}' for name, value in size.items()]
    assert main(['bench', *options, '--output', str(tmp_path / 'bench.csv')]) == 0
    assert asked == [dict(amp=amp, torchcompile=way, **size) for amp in (False, True) for way in (False, True)]
    lines = capsys.readouterr().out.splitlines()
    titles = [line[:31].rstrip() for line in lines if line.endswith('reference  memory')]
    kinds = 'float32, eager', 'float32, compiled', 'bfloat16, eager', 'bfloat16, compiled'
    assert titles == [*kinds, 'float32, eager'] and lines[-1].startswith('PRIME, imagenet')
    assert len((tmp_path / 'bench.csv').read_text().splitlines()) == 6


@pytest.mark.parametrize('amp, torchcompile', [(True, False)])
def test_precision(amp, torchcompile):
    row = next(iter(bench_networks(['resnet18'], 2, 32, 1, amp=amp, torchcompile=torchcompile)))
    assert (row.precision, row.compiled) == ('bfloat16', False)


def test_times_and_memory_are_those_of_ours_over_those_of_the_plain_network(monkeypatch):
    took = dict(plain=2.0, ours=3.0, reference=8.0)
    held = dict(plain=10, ours=40, reference=70)
    monkeypatch.setattr('timm_pushpull.bench.timing.seconds', lambda call, device: took[call])
    monkeypatch.setattr('timm_pushpull.bench.timing.peak_bytes', lambda call, device: held[call])
    row = compare({name: name for name in took}, 'cpu', 2, 'nothing')
    assert (row.plain_seconds, row.time_ratio, row.reference_time_ratio) == (2, 1.5, 4)
    assert (row.memory_ratio, row.reference_memory_ratio) == (4, 7)
