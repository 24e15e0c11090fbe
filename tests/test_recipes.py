import argparse
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import REPOSITORY
from timm.scheduler import create_scheduler_v2, scheduler_kwargs

from timm_pushpull import class_lists
from timm_pushpull.cli import main
from timm_pushpull.hub.export import _without_paths
from timm_pushpull.recipes import list_recipes, read_recipe, recipe_commands, recipe_text
from timm_pushpull.registry import RECIPE, model_folders

# From the paper's table: epochs, batch, lr at the start, at the top and at the end.
PAPER = {
    'in1k': (20, 128, 0.05, 1.0, 5e-5),
    'in100': (20, 64, 5e-3, 0.2, 5e-6),
    'in200': (20, 64, 5e-3, 0.2, 5e-6),
    'c10': (30, 64, 5e-3, 0.2, 5e-6),
}
CLASSES = {'in1k': 1000, 'in100': 100, 'in200': 200, 'c10': 10, 'imagenette': 10, 'own': None}
RECIPES = list(list_recipes())
SMALL = {name for name in RECIPES if name.endswith('imagenette')}
STARTS = {name for name in RECIPES if '_ft_' in name}
FAITHFUL = [name for name in RECIPES if name not in SMALL | STARTS]


def test_recipes_do_not_change():
    """Results are known by the name of a recipe: one with other values gets another name. Those of STARTS have none."""
    assert sorted(RECIPES) == RECIPES
    assert STARTS == {
        f'pp_resnet{n}.{unit}_{addition}ft_{data}'
        for n in (18, 50)
        for data, pp in (('in1k', 'pp3'), ('own', 'pp3_negated'))
        for unit in ('baseline', pp)
        for addition in ('', 'prime_')
    }
    for name in STARTS:
        text = recipe_text(name)
        assert 'UNTESTED' in text and ('push-pull' not in text or 'baseline' not in name)
    recipes = {name: _without_paths(yaml.safe_load(recipe_text(name))) for name in RECIPES if name not in STARTS}
    digest = hashlib.sha256(json.dumps(recipes, sort_keys=True).encode()).hexdigest()
    assert digest == 'da59c3832c8fbc3abc661d6c1a33b111b870be703ff45299bd93541b0beebbd3'


@pytest.mark.parametrize('folder', model_folders(REPOSITORY / 'hub_configs'), ids=lambda folder: folder.name)
def test_a_model_folder_has_the_recipe_of_its_name(folder):
    assert (folder / RECIPE).read_text() == recipe_text(folder.name)


@pytest.mark.parametrize('name', RECIPES)
def test_a_recipe_is_what_its_name_says(name):
    architecture, tag = name.split('.')
    unit, *augmentation, data = re.sub('_(ft|r64|blurpool|negated|contrastnorm)', '', tag).split('_')
    recipe = read_recipe(name)
    assert (recipe['model'], recipe['experiment']) == (architecture, name)
    assert recipe.get('num_classes') == CLASSES[data]
    model_kwargs = {
        **({'push_pull': False} if unit == 'baseline' else {'avg_pool_size': int(unit[-1])}),
        **({'pull_kernel': 'negated', 'alpha': 1.0} if 'negated' in tag else {}),
        **({'augment': 'prime'} if augmentation == ['prime'] else {}),
        **({'contrast_norm': True} if 'contrastnorm' in tag else {}),
        **({'aa_layer': 'blur'} if 'blurpool' in tag else {}),
    }
    assert recipe['model_kwargs'] == model_kwargs
    assert recipe.get('aa') == {'aa': 'original', 'augmix': 'augmix-m3-w3'}.get(*augmentation or ['none'])
    size = 64 if name in SMALL else 32 if architecture.endswith('_cifar') else 224
    assert recipe.get('input_size') == (None if name in STARTS else [3, size, size])
    assert recipe.get('pretrained', False) == (name in STARTS)
    assert ('class_map' in recipe) == (data in ('in100', 'in200'))


@pytest.mark.parametrize('name', RECIPES)
def test_the_file_of_a_recipe(name):
    purpose, *comments = (line[2:] for line in recipe_text(name).splitlines() if line.startswith('# '))
    assert purpose == list_recipes()[name] and comments
    recipe = read_recipe(name)
    assert yaml.safe_load(recipe_text(name)) == recipe
    shared = yaml.safe_dump(_without_paths(recipe))
    assert str(REPOSITORY) not in shared and str(Path(class_lists.__file__).parent) not in shared
    if 'class_map' in recipe:
        path = Path(recipe['class_map'])
        assert path.is_absolute() and len(path.read_text().split()) == recipe['num_classes']
        assert yaml.safe_load(shared) == {**recipe, 'class_map': path.name}
    recipe['scale'].clear()
    recipe['model_kwargs'].clear()
    assert yaml.safe_load(recipe_text(name)) == read_recipe(name) != recipe  # the table is as before


def learning_rates(recipe, updates):
    """Return lr at each step, as train.py sets it with `updates` steps in an epoch."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=recipe['lr'])
    options = scheduler_kwargs(argparse.Namespace(**{'cooldown_epochs': 0, **recipe}))
    scheduler, epochs = create_scheduler_v2(optimizer, **options, updates_per_epoch=updates)
    scheduler.step_update(0)
    rates = []
    for step in range(epochs * updates):
        rates.append(optimizer.param_groups[0]['lr'])
        scheduler.step_update(step + 1)
    return rates


@pytest.mark.parametrize('name', FAITHFUL)
def test_faithful_recipes_follow_the_papers_table(name):
    epochs, batch_size, start, top, end = PAPER[name.rpartition('_')[2].rpartition('.')[2]]
    recipe = read_recipe(name)
    rates = learning_rates(recipe, updates=10)
    assert len(rates) == 10 * epochs and recipe['batch_size'] == batch_size
    assert rates[0] == pytest.approx(start) and max(rates) == pytest.approx(top)
    assert end <= rates[-1] < top / 1000
    assert (recipe['opt'], recipe['momentum'], recipe['weight_decay']) == ('momentum', 0.9, 1e-5)
    assert recipe['smoothing'] == 0 and recipe['color_jitter'] is None and recipe['train_interpolation'] == 'bilinear'


def gaps_to_one_cycle(recipe, start, top, end, rising):
    """Return the distance of each step's lr from a one-cycle schedule, as a part of the top rate."""
    rates = learning_rates(recipe, updates=100)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    one_cycle = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, top, len(rates), pct_start=rising, div_factor=top / start, final_div_factor=start / end
    )
    gaps = []
    for rate in rates:
        gaps.append(abs(rate - one_cycle.get_last_lr()[0]) / top)
        optimizer.step()
        one_cycle.step()
    return gaps


@pytest.mark.parametrize('name', ['pp_resnet50.pp3_in1k', 'pp_resnet50.pp3_in100', 'pp_resnet18_cifar.pp5_c10'])
def test_the_learning_rate_beside_one_cycle(name):
    _, _, start, top, end = PAPER[name.rpartition('_')[2]]
    gaps = gaps_to_one_cycle(read_recipe(name), start, top, end, rising=0.3)
    # A line and half a cosine between the same ends differ by up to a tenth of the height.
    assert max(gaps) < 0.11 and max(gaps[len(gaps) * 3 // 10 + 2 :]) < 0.005


@pytest.mark.parametrize('name', [name for name in sorted(STARTS) if name.endswith('in1k')])
def test_imagenet_fine_tuning_has_the_schedule_of_primes_authors(name):
    """config/imagenet_cfg.py of their code: 100 epochs, lr 0.01 for each 256 images of a batch of 512, no smoothing."""
    recipe = read_recipe(name)
    assert recipe['epochs'] + recipe['warmup_epochs'] == 100
    assert recipe['batch_size'] * recipe['grad_accum_steps'] == 512
    assert (recipe['opt'], recipe['momentum'], recipe['weight_decay'], recipe['smoothing']) == ('sgd', 0.9, 1e-4, 0.0)
    # OneCycleLR's defaults: the start is a 25th of the top, the end a 10,000th of the start.
    gaps = gaps_to_one_cycle(recipe, 0.02 / 25, 0.02, 0.02 / 25e4, rising=0.1)
    assert max(gaps) < 0.11 and max(gaps[len(gaps) // 10 + 2 :]) < 0.005


def options_of(command):
    return dict(zip(*[iter(shlex.split(command.partition('train.py ')[2]))] * 2, strict=True))


@pytest.mark.parametrize('name', ['pp_resnet50.pp3_in1k', 'pp_resnet18.pp3_in100', 'pp_resnet50.pp3_ft_in1k'])
def test_commands_for_several_processes_keep_the_batch(name):
    recipe = read_recipe(name)
    for processes in (1, 2, 4, 8, 16):
        write, one, several = recipe_commands(name, processes)
        assert write == f'timm-pushpull recipes {name} --output {name}.yaml'
        assert one == f'python train.py --config {name}.yaml --data-dir DATA'
        assert several.startswith(f'torchrun --nproc-per-node={processes} train.py ')
        options = options_of(several)
        assert options.items() >= options_of(one).items()
        steps, default = int(options.get('--grad-accum-steps', 1)), recipe.get('grad_accum_steps', 1)
        assert int(options['--batch-size']) * steps * processes == recipe['batch_size'] * default
    with pytest.raises(ValueError, match=f'processes must share batches of {recipe["batch_size"]} equally, got 7'):
        recipe_commands(name, 7)
    with pytest.raises(ValueError, match='processes must be at least 1, got 0'):
        recipe_commands(name, 0)


def test_command_line(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(['recipes']) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == RECIPES
    assert any(line.endswith('ResNet50 + PP3, PRIME, ImageNet-1k.') for line in listed)
    assert main(['recipes', 'pp_resnet18.pp5_*in*00']) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == ['pp_resnet18.pp5_in100', 'pp_resnet18.pp5_in200']
    assert main(['recipes', 'pp_resnet18.pp?_in[12]00']) == 0 and len(capsys.readouterr().out.splitlines()) == 4
    assert main(['recipes', 'pp_resnet18.pp5_in200', '--processes', '2']) == 0
    purpose, write, one, empty, two = capsys.readouterr().out.splitlines()
    assert purpose == f'# {list_recipes()["pp_resnet18.pp5_in200"]}'
    assert one.startswith('python ') and not empty and two.startswith('torchrun --nproc-per-node=2 ')
    assert write.startswith('timm-pushpull ') and main(shlex.split(write)[1:]) == 0
    file = options_of(one)['--config']
    assert capsys.readouterr().out == f'{file}\n' and os.listdir() == [file]
    assert Path(file).read_text() == recipe_text('pp_resnet18.pp5_in200')


@pytest.mark.parametrize(
    'arguments, words',
    [
        ('pp_resnet18_cifar', "as 'pp_resnet50.*' lists those of a network."),
        ('pp_resnet18.pp4_in200', 'pp_resnet18.pp5_in200'),
        ('pp_resnet18.pp4_in200 --output new.yaml', 'pp_resnet18.pp5_in200'),
        ('--output new.yaml', 'give its NAME'),
        ('pp_resnet19.*', "must match the name of a recipe, got 'pp_resnet19.*'"),
        ('pp_resnet18.* --output new.yaml', "must be one of the recipes, got 'pp_resnet18.*'"),
        ('pp_resnet18.pp3_in1k --processes 7', 'equally, got 7'),
    ],
)
def test_the_command_refuses_in_one_line(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(['recipes', *arguments.split()]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count('\n') == 1 and os.listdir() == []


def test_the_command_answers_at_once(tmp_path):
    """Not a timing, which would fail on a busy machine: the command imports neither torch nor timm."""
    program = """
        import sys
        from timm_pushpull.cli import main
        assert main(['recipes']) == main(['recipes', 'pp_resnet18.pp3_in100']) == 0
        assert main(['recipes', 'pp_resnet18.pp3_in100', '--output', 'new.yaml']) == 0
        assert not {'torch', 'timm', 'numpy'} & sys.modules.keys(), sys.modules.keys()
    """
    program = '\n'.join(line.strip() for line in program.splitlines())
    subprocess.run([sys.executable, '-c', program], cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize('name', FAITHFUL)
def test_the_notes_give_the_epochs_of_the_recipe(name):
    recipe, notes = read_recipe(name), ' '.join(recipe_text(name).replace('\n#', ' ').split())
    warmup, epochs = recipe['warmup_epochs'], recipe['epochs']
    assert f'one-cycle schedule of {warmup + epochs} epochs' in notes
    assert f'linearly for {warmup} epochs' in notes and f'along a cosine for {epochs}.' in notes


def test_processes_share_the_steps_first_then_the_images():
    def options(name, processes):
        found = options_of(recipe_commands(name, processes)[2])
        return found['--batch-size'], found.get('--grad-accum-steps')

    # 128 images in each of 4 steps.
    found = {processes: options('pp_resnet50.pp3_ft_in1k', processes) for processes in (2, 4, 16)}
    assert found == {2: ('128', '2'), 4: ('128', '1'), 16: ('32', '1')}
    assert options('pp_resnet50.pp3_in1k', 2) == ('64', None)
    with pytest.raises(ValueError, match='processes must share batches of 128 equally, got 12'):
        recipe_commands('pp_resnet50.pp3_ft_in1k', 12)
