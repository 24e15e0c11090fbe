import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from test_original import STEMS, save_original

from timm_pushpull import demo
from timm_pushpull.cli import main
from timm_pushpull.demo import run_demo


@pytest.mark.slow
def test_demo_ends_with_a_report_and_does_nothing_twice(tmp_path, monkeypatch, capsys):
    for extra in ('sklearn', 'imagecorruptions', 'matplotlib'):
        pytest.importorskip(extra)
    result = run_demo(tmp_path, epochs=2, test_digits=20)
    assert [row['model'] for row in result.rows] == ['plain resnet18', 'pp_resnet18']
    for row in result.rows:
        assert row['E'] < 60 and row['plain_mCE'] != '' and row['baseline'] == 'plain resnet18'  # chance is 90
    assert result.report.is_file()
    monkeypatch.setattr(demo, '_train', None)
    assert run_demo(tmp_path, test_digits=20) == result
    monkeypatch.setattr(demo, 'run_demo', lambda folder: result)
    assert main(['demo', '--output', str(tmp_path)]) == 0
    comparison_sentence = ' '.join(capsys.readouterr().out.split()).partition('report.html ')[2]
    assert comparison_sentence.startswith('pp_resnet18 against plain resnet18, by these 20 images: the clean error is ')
    assert '; plain mCE is ' in comparison_sentence
    assert comparison_sentence.endswith('). This compares single checkpoints: other training runs may differ.')


def test_demo_runs_in_one_thread(tmp_path, monkeypatch):
    for extra in ('sklearn', 'imagecorruptions', 'matplotlib'):
        pytest.importorskip(extra)
    threads = []

    def stop(*_):
        threads.append(torch.get_num_threads())
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, '_write_digits', stop)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(KeyboardInterrupt):
            run_demo(tmp_path)
        assert threads == [1] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_demo_without_its_extra(monkeypatch, capsys):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None if name == 'sklearn' else find_spec(name))
    assert main(['demo']) == 2
    error = capsys.readouterr().err
    assert error.startswith('timm-pushpull: The demo needs sklearn: pip install scikit-learn ')
    assert error.count('\n') == 1


def test_import_original(tmp_path, capsys):
    make_stem, hyper_parameters, _ = STEMS['pp5 fixed']
    theirs = save_original(make_stem(), tmp_path / 'last.ckpt', trap=torch.nn.Dropout(), **hyper_parameters)
    assert main(['import-original', str(tmp_path / 'last.ckpt'), str(tmp_path / 'new' / 'model')]) == 0
    assert 'pp_resnet18 (in_chans=3, num_classes=10, push_pull=True, avg_pool_size=5' in capsys.readouterr().out
    files = {path.name: path for path in (tmp_path / 'new' / 'model').iterdir()}
    assert files.keys() == {'config.json', 'model.safetensors'} and len({p.stat().st_mode for p in files.values()}) == 1
    ours = timm.create_model(f'local-dir:{tmp_path}/new/model', pretrained=True).eval()
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
    assert ours.pretrained_cfg['crop_pct'] == 1.0


@pytest.mark.parametrize(
    'name, folder, message',
    [
        ('missing.ckpt', 'new', 'No such file'),
        ('text.ckpt', 'new', 'text.ckpt is not a checkpoint of PyTorch'),
        ('model.ckpt', '.', 'exists: name a new folder'),
        ('model.ckpt', 'new', 'holds a pp_vgg, which is not one of'),
    ],
)
def test_import_original_refuses_in_one_line(name, folder, message, tmp_path, capsys):
    save_original(torch.nn.Conv2d(3, 64, 7, 2, 3), tmp_path / 'model.ckpt', model='vgg')
    (tmp_path / 'text.ckpt').write_text('not a checkpoint')
    assert main(['import-original', str(tmp_path / name), str(tmp_path / folder)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count('\n') == 1
    assert not (tmp_path / 'new').exists()


def test_command_is_installed():
    command = Path(sys.executable).with_name('timm-pushpull')
    result = subprocess.run([command, '--help'], capture_output=True, text=True, check=True)
    assert 'demo' in result.stdout
    result = subprocess.run([command, 'recipes', 'missing'], capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.startswith('timm-pushpull: ') and result.stderr.count('\n') == 1


@pytest.mark.parametrize(
    'arguments, message',
    [
        ('no-such-command', "timm-pushpull: argument COMMAND: invalid choice: 'no-such-command'"),
        ('figures pp_resnet18 --output x --model-kwargs window', 'argument --model-kwargs: must be NAME=VALUE, got'),
        (
            'figures pp_resnet18 --output x --model-kwargs alpha=1 num_classes=3',
            'argument --model-kwargs: must not hold num_classes: the command has its own way to give it',
        ),
        ('robustness pp_resnet18', 'timm-pushpull robustness: the following arguments are required: --output; see'),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit, match='2'):
        main(arguments.split())
    error = capsys.readouterr().err
    assert message in error and error.count('\n') == 1
