"""timm's own scripts, unmodified, with our networks: a few steps on a few small images."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from conftest import save_plain
from PIL import Image

from timm_pushpull import evaluate_robustness, load_model, open_dataset
from timm_pushpull.class_lists import find_class_map
from timm_pushpull.cli import main
from timm_pushpull.recipes import list_recipes

SCRIPTS = os.environ.get('TIMM_SCRIPTS')
pytestmark = pytest.mark.skipif(
    not SCRIPTS, reason="set TIMM_SCRIPTS to a checkout of timm's repository, whose scripts are not in its wheel"
)
MODEL = ['--model', 'pp_resnet18', '--num-classes', '2', '--device', 'cpu', '--workers', '1']


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """Bright and dark noise at 32x32: 32 images of each for training, 8 for validation."""
    folder = tmp_path_factory.mktemp('data')
    generator = torch.Generator().manual_seed(0)
    for split, count in (('train', 32), ('validation', 8)):
        for label, (low, high) in enumerate([(0, 160), (96, 256)]):
            (folder / split / str(label)).mkdir(parents=True)
            for index in range(count):
                pixels = torch.randint(low, high, (32, 32, 3), generator=generator, dtype=torch.uint8)
                path = folder / split / str(label) / f'{label}-{index}.png'  # inference.py wants unique names
                Image.fromarray(pixels.numpy()).save(path)
    return folder


def command(script, *arguments):
    # -P: the installed timm, not the checkout's
    return [sys.executable, '-P', str(Path(SCRIPTS) / script), *map(str, arguments)]


def train_command(data, output, *options):
    size = ('--input-size', '3', '32', '32', '--batch-size', '16')
    recipe = ('--opt', 'sgd', '--lr', '0.01', '--warmup-epochs', '0', '--epochs', '2')
    folders = ('--data-dir', data, '--output', output, '--experiment', 'run')
    return command('train.py', *MODEL, *size, *recipe, *folders, *options)


def run(arguments, **kwargs):
    result = subprocess.run(arguments, capture_output=True, text=True, timeout=1200, **kwargs)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def train(data, output, *options):
    run(train_command(data, output, *options))
    with open(output / 'run' / 'summary.csv') as file:
        return [float(row['train_loss']) for row in csv.DictReader(file)]


@pytest.mark.parametrize(
    'options',
    [
        (),
        ('--aa', 'original'),
        ('--aa', 'augmix-m3-w3', '--aug-splits', '3', '--jsd-loss'),
        ('--amp', '--amp-dtype', 'bfloat16'),
        ('--channels-last',),
        ('--torchcompile',),
        ('--model-ema',),
        ('--grad-checkpointing',),
        ('--model-kwargs', 'avg_pool_size=5', 'alpha=0.5', 'trainable_alpha=False'),
        ('--model-kwargs', 'push_pull=False'),
        ('--model-kwargs', 'augment=prime', '--amp', '--amp-dtype', 'bfloat16', '--model-ema'),
        ('--model-kwargs', 'augment=prime', 'push_pull=False', '--channels-last'),
        ('--model-kwargs', 'augment=prime', '--torchcompile', '--reprob', '0.25'),
        ('--model-kwargs', 'augment=prime', '--no-prefetcher'),
    ],
    ids=' '.join,
)
def test_train(options, data, tmp_path):
    losses = train(data, tmp_path, *options)
    assert len(losses) == 2
    # Two epochs on so few images do not lower the loss under these augmentations.
    augmented = {'--aa', 'augment=prime'} & set(options)
    assert all(map(math.isfinite, losses)) if augmented else losses[1] < losses[0]


def test_prime_refuses_another_mean_and_std(data, tmp_path):
    options = ('--model-kwargs', 'augment=prime', '--mean', '0.5', '0.5', '0.5', '--std', '0.5', '0.5', '0.5')
    result = subprocess.run(train_command(data, tmp_path, *options), capture_output=True, text=True, timeout=600)
    assert result.returncode and 'augment needs the mean and std that the loader used' in result.stderr


RUN_RECIPES = """
import importlib.util, sys
script, data, output, *recipes = sys.argv[1:]
for recipe in recipes:
    spec = importlib.util.spec_from_file_location('train', script)  # a new module: its parser keeps the defaults
    train = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(train)
    size = '32' if '_cifar' in recipe else '64'
    sys.argv = [script, '--config', recipe, '--data-dir', data, '--dataset', '', '--input-size', '3', size, size]
    sys.argv += '--batch-size 4 --grad-accum-steps 1 --epochs 1 --warmup-epochs 0 --train-batches-per-epoch 2'.split()
    sys.argv += ['--workers', '1', '--device', 'cpu', '--output', output]
    train.main()
"""


@pytest.fixture
def published(hub, tmp_path, monkeypatch):
    """A local Hub with plain networks of timm, and an empty cache for programs."""
    for name in ('resnet18.a1_in1k', 'resnet50.a1_in1k', 'mobilenetv3_small_100.lamb_in1k'):
        save_plain(name, tmp_path / name)
        hub.host(f'timm/{name}', tmp_path / name)
    monkeypatch.setenv('HF_HOME', str(tmp_path / 'home'))
    return hub


@pytest.mark.parametrize(
    'model',
    [
        ['pp_resnet50'],
        ['pp_resnet50.a1_in1k'],
        ['pp_mobilenetv3_small_100'],
        ['pp_any', '--model-kwargs', 'base=mobilenetv3_small_100.lamb_in1k', 'augment=prime'],
    ],
    ids=' '.join,
)
def test_train_from_timms_weights(model, published, data, tmp_path):
    options = ('--epochs', '1', '--model', *model, '--pretrained')
    result = subprocess.run(train_command(data, tmp_path, *options), capture_output=True, text=True, timeout=600)
    assert result.returncode == 0 and result.stderr.count('in a network with a push-pull unit. Fine-tune') == 1, (
        result.stderr
    )
    assert len(published.downloads()) == 1
    # Our own commands read the model arguments from the checkpoint, base among them.
    trained = load_model(model[0], tmp_path / 'run' / 'last.pth.tar')
    assert trained.num_classes == 2


def test_every_recipe_runs(published, tmp_path):
    """In a working directory of its own, from files that the command line writes."""
    lists = [Path(find_class_map(f'imagenet_{size}')).read_text().split() for size in (100, 200)]
    generator = torch.Generator().manual_seed(0)
    for split in ('train', 'validation'):
        for synset in sorted(set(lists[0]) & set(lists[1]))[:2]:
            for index in range(8):
                path = tmp_path / 'data' / split / synset / f'{index}.png'
                path.parent.mkdir(parents=True, exist_ok=True)
                pixels = torch.randint(256, (80, 72, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(path)
    names = list(list_recipes())
    paths = [tmp_path / f'{name}.yaml' for name in names]
    for name, path in zip(names, paths, strict=True):
        assert main(['recipes', name, '--output', str(path)]) == 0
    arguments = [Path(SCRIPTS) / 'train.py', tmp_path / 'data', tmp_path / 'output', *paths]
    run([sys.executable, '-c', RUN_RECIPES, *map(str, arguments)], cwd=tmp_path)
    for name in names:
        with open(tmp_path / 'output' / name / 'summary.csv') as file:
            assert [math.isfinite(float(row['train_loss'])) for row in csv.DictReader(file)] == [True], name


WITHOUT_DEVICE_IDS = """
import runpy, sys, torch
parallel = torch.nn.parallel.DistributedDataParallel
start = parallel.__init__
# timm passes the device, which DDP refuses for a CPU, with networks of timm's own too.
parallel.__init__ = lambda self, module, device_ids=None, **options: start(self, module, **options)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')
"""


@pytest.mark.slow
@pytest.mark.parametrize('recipe', ['pp_resnet18.pp3_prime_in1k', 'pp_resnet50_cifar.pp5_augmix_c10'])
def test_torchrun_of_a_recipe(recipe, data, tmp_path):
    """The printed command on two processes, on a CPU; of it only data, size and duration are changed."""
    config, program = tmp_path / f'{recipe}.yaml', tmp_path / 'train.py'
    assert main(['recipes', recipe, '--output', str(config)]) == 0
    program.write_text(WITHOUT_DEVICE_IDS)
    launch = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2', program]
    options = f'--data-dir {data} --output {tmp_path} --experiment run --config {config} --device cpu --workers 1'
    small = '--input-size 3 32 32 --batch-size 4 --epochs 1 --warmup-epochs 0 --train-batches-per-epoch 2'
    classes = ['--num-classes', '2', '--dataset', '', '--class-map', '']
    run([*launch, Path(SCRIPTS) / 'train.py', *options.split(), *small.split(), *classes])
    with open(tmp_path / 'run' / 'summary.csv') as file:
        assert [math.isfinite(float(row['train_loss'])) for row in csv.DictReader(file)] == [True]


def test_killed_and_resumed(data, tmp_path):
    process = subprocess.Popen(train_command(data, tmp_path, '--epochs', '50'), stderr=subprocess.DEVNULL)
    checkpoint = tmp_path / 'run' / 'last.pth.tar'
    for _ in range(1200):
        if checkpoint.exists():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = torch.load(checkpoint, weights_only=False)['epoch'] + 1  # it holds an argparse.Namespace
    resumed = tmp_path / 'resumed'
    losses = train(data, resumed, '--epochs', done + 1, '--resume', checkpoint)
    assert len(losses) == 1


@pytest.fixture(scope='module')
def checkpoint(data, tmp_path_factory):
    output = tmp_path_factory.mktemp('output')
    train(data, output)
    return output / 'run' / 'last.pth.tar'


def test_initial_checkpoint(data, checkpoint, tmp_path):
    first = train(data, tmp_path / 'a', '--epochs', '1')
    second = train(data, tmp_path / 'b', '--epochs', '1', '--initial-checkpoint', checkpoint)
    assert second[0] < first[0]


def test_validate(data, checkpoint):
    folders = ('--data-dir', data, '--split', 'validation', '--checkpoint', checkpoint)
    output = run(command('validate.py', *MODEL, '--input-size', '3', '32', '32', '--batch-size', '8', *folders))
    result = json.loads(output[output.index('{') :])
    assert result['model'] == 'pp_resnet18' and 0 <= result['top1'] <= 100


@pytest.mark.parametrize('script, option', [('validate.py', '--checkpoint'), ('train.py', '--resume')])
def test_other_settings_than_those_of_the_training_are_an_error(script, option, data, checkpoint, tmp_path):
    size = ('--input-size', '3', '32', '32', '--batch-size', '8', '--model-kwargs', 'avg_pool_size=5')
    folders = ('--data-dir', data, option, checkpoint) + ('--output', tmp_path) * (script == 'train.py')
    result = subprocess.run(command(script, *MODEL, *size, *folders), capture_output=True, text=True, timeout=600)
    assert result.returncode
    assert 'trained with avg_pool_size=3, the model has avg_pool_size=5' in result.stderr


def test_robustness_knows_the_settings_of_the_training(data, tmp_path):
    pytest.importorskip('imagecorruptions')
    train(data, tmp_path, '--epochs', '1', '--model-kwargs', 'avg_pool_size=5', 'pull_kernel=negated', 'alpha=2.0')
    run_folder = tmp_path / 'run'
    (row,) = evaluate_robustness(
        {'a': load_model('pp_resnet18', run_folder / 'last.pth.tar')},
        tmp_path / 'results',
        open_dataset(data),
        corruptions=[],
    )
    with open(run_folder / 'summary.csv') as file:
        (trained,) = csv.DictReader(file)
    assert row['img_size'] == 32 and row['top1'] == pytest.approx(float(trained['eval_top1']), abs=1e-3)


def test_inference(data, checkpoint, tmp_path):
    pytest.importorskip('pandas')
    folders = ('--data-dir', data / 'validation', '--checkpoint', checkpoint, '--results-dir', tmp_path)
    formats = ('--results-file', 'result', '--results-format', 'csv', '--topk', '1')
    run(command('inference.py', *MODEL, '--input-size', '3', '32', '32', '--batch-size', '8', *folders, *formats))
    (result,) = tmp_path.rglob('*.csv')
    assert len(result.read_text().splitlines()) == 1 + 16  # header and images


def test_benchmark(tmp_path):
    small = ('--input-size', '3', '32', '32', '--batch-size', '4', '--num-bench-iter', '10', '--num-warm-iter', '1')
    options = ('--model', 'pp_resnet18', '--device', 'cpu', '--bench', 'both')
    small = (*small, '--results-file', tmp_path / 'benchmark.csv')
    run(command('benchmark.py', *options, *small))
    with open(tmp_path / 'benchmark.csv') as file:
        (result,) = csv.DictReader(file)
    assert result['model'] == 'pp_resnet18'
    assert float(result['infer_samples_per_sec']) > 0 and float(result['train_samples_per_sec']) > 0


def test_onnx_export(checkpoint, tmp_path):
    onnxruntime = pytest.importorskip('onnxruntime')
    pytest.importorskip('onnxscript')
    options = ('--model', 'pp_resnet18', '--num-classes', '2', '--img-size', '64', '--checkpoint', checkpoint)
    run(command('onnx_export.py', tmp_path / 'model.onnx', *options))
    session = onnxruntime.InferenceSession(tmp_path / 'model.onnx')
    (given,) = session.get_inputs()
    x = torch.randn(1, 3, 64, 64)
    (output,) = session.run(None, {given.name: x.numpy()})
    model = timm.create_model('pp_resnet18', num_classes=2, checkpoint_path=checkpoint).eval()
    torch.testing.assert_close(torch.from_numpy(output), model(x), rtol=1e-4, atol=1e-4)
