import argparse
import re
import shlex

import pytest
import timm
import torch
from timm.scheduler import create_scheduler_v2, scheduler_kwargs

from timm_pushpull.cli import main
from timm_pushpull.hub.recipes import list_recipes, read_recipe, recipe_command, recipe_path

# Of the paper's table: epochs, batch, lr at the start, the top and the end.
PAPER = {
    'in1k': (20, 128, 0.05, 1.0, 5e-5),
    'in100': (20, 64, 5e-3, 0.2, 5e-6),
    'in200': (20, 64, 5e-3, 0.2, 5e-6),
    'c10': (30, 64, 5e-3, 0.2, 5e-6),
}
CLASSES = {'in1k': 1000, 'in100': 100, 'in200': 200, 'c10': 10, 'imagenette': 10}
SMALL = {
    f'pp_resnet18.{unit}_{addition}r64_imagenette'
    for addition, units in {
        '': ('baseline', 'pp3', 'pp5', 'pp3_negated'),
        'contrastnorm_': ('baseline', 'pp3', 'pp3_negated'),
        'blurpool_': ('baseline', 'pp3'),
        'augmix_': ('baseline', 'pp3', 'pp5', 'pp3_negated'),
        'augmix_contrastnorm_': ('baseline',),
        'prime_': ('baseline', 'pp3', 'pp5', 'pp3_negated'),
        'prime_contrastnorm_': ('baseline', 'pp3_negated'),
    }.items()
    for unit in units
} | {f'pp_resnet50.{unit}_r64_imagenette' for unit in ('baseline', 'pp3')}
RECIPES = list(list_recipes())
FAITHFUL = [name for name in RECIPES if '_e100_' not in name and name not in SMALL]


def test_every_family_is_there():
    units, augmentations = ('pp3', 'pp5', 'baseline'), ('', 'aa_', 'augmix_', 'prime_')
    expected = {
        f'{network}.{unit}_{augmentation}in1k'
        for network in ('pp_resnet18', 'pp_resnet50')
        for unit in units
        for augmentation in augmentations
    }
    expected |= {f'pp_resnet{n}.{unit}_{data}' for n in (18, 50) for unit in units for data in ('in100', 'in200')}
    expected |= {
        f'pp_resnet{n}_cifar.{unit}_{augmentation}c10'
        for n in (18, 50)
        for unit in units
        for augmentation in augmentations
        if augmentation != 'aa_'
    }
    assert set(FAITHFUL) == expected
    ours = {f'pp_resnet50.{unit}_{augmentation}e100_in1k' for unit in units for augmentation in augmentations}
    assert set(RECIPES) == expected | ours | SMALL
    for name in ours:
        assert 'UNTESTED' in recipe_path(name).read_text()


@pytest.mark.parametrize('name', RECIPES)
def test_a_recipe_is_what_its_name_says(name):
    architecture, tag = name.split('.')
    unit, *augmentation, data = re.sub('_(e100|r64|blurpool|negated|contrastnorm)', '', tag).split('_')
    recipe = read_recipe(name)
    assert (recipe['model'], recipe['experiment'], recipe['num_classes']) == (architecture, name, CLASSES[data])
    assert recipe['model_kwargs'].get('augment') == ('prime' if augmentation == ['prime'] else None)
    assert recipe.get('aa') == {'aa': 'original', 'augmix': 'augmix-m3-w3'}.get(*augmentation or ['none'])
    assert recipe['model_kwargs'].get('aa_layer') == ('blur' if 'blurpool' in tag else None)
    assert recipe['model_kwargs'].get('pull_kernel') == ('negated' if 'negated' in tag else None)
    assert recipe['model_kwargs'].get('contrast_norm') == (True if 'contrastnorm' in tag else None)
    if unit == 'baseline':
        assert recipe['model_kwargs']['push_pull'] is False
    else:
        assert recipe['model_kwargs']['avg_pool_size'] == int(unit[-1])
    size = (3, 64, 64) if name in SMALL else timm.get_pretrained_cfg(f'{architecture}.untrained').input_size
    assert tuple(recipe['input_size']) == size
    assert recipe.get('class_map', '').endswith(f'imagenet_{data[2:]}_synsets.txt') == (data in ('in100', 'in200'))


def learning_rates(recipe, updates):
    """The rate of each step, as train.py sets it with `updates` steps an epoch."""
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


@pytest.mark.parametrize('name', ['pp_resnet50.pp3_in1k', 'pp_resnet50.pp3_in100', 'pp_resnet18_cifar.pp5_c10'])
def test_the_learning_rate_beside_one_cycle(name):
    epochs, _, start, top, end = PAPER[name.rpartition('_')[2]]
    rates = learning_rates(read_recipe(name), updates=100)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    one_cycle = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, top, len(rates), pct_start=0.3, div_factor=top / start, final_div_factor=start / end
    )
    gaps = []
    for rate in rates:
        gaps.append(abs(rate - one_cycle.get_last_lr()[0]))
        optimizer.step()
        one_cycle.step()
    place = gaps.index(max(gaps))
    print(f'{name}: largest gap {max(gaps) / top:.3f} of the top rate, in epoch {place / 100:.1f} of {epochs}')
    # A line and half a cosine between the same ends are a tenth of the height apart.
    assert max(gaps) / top < 0.11 and max(gaps[len(gaps) * 3 // 10 + 2 :]) / top < 0.005


def options_of(command):
    return dict(zip(*[iter(shlex.split(command.partition('train.py ')[2]))] * 2, strict=True))


@pytest.mark.parametrize('name', ['pp_resnet50.pp3_in1k', 'pp_resnet18.pp3_in100', 'pp_resnet50.pp3_e100_in1k'])
def test_commands_for_several_processes_keep_the_batch(name):
    recipe = read_recipe(name)
    one = options_of(recipe_command(name))
    assert one['--config'] == str(recipe_path(name)) and recipe_command(name).startswith('python train.py ')
    assert ('--class-map' in one) == ('class_map' in recipe)
    for processes in (2, 4, 8, 16):
        command = recipe_command(name, processes)
        options = options_of(command)
        assert command.startswith(f'torchrun --nproc-per-node={processes} train.py ')
        steps, default = int(options.get('--grad-accum-steps', 1)), recipe.get('grad_accum_steps', 1)
        assert int(options['--batch-size']) * steps * processes == recipe['batch_size'] * default
    with pytest.raises(ValueError, match=f'processes must share batches of {recipe["batch_size"]} equally, got 7'):
        recipe_command(name, 7)


def test_command_line(capsys):
    assert main(['recipes']) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == RECIPES
    assert any(line.endswith('ResNet50 + PP3, PRIME, ImageNet-1k.') for line in listed)
    assert main(['recipes', 'pp_resnet18.pp5_in200', '--processes', '2']) == 0
    one, empty, two = capsys.readouterr().out.splitlines()
    assert one.startswith('python ') and not empty and two.startswith('torchrun --nproc-per-node=2 ')
    assert main(['recipes', 'pp_resnet18_cifar']) == 2
    assert 'pp_resnet18_cifar.baseline_augmix_c10, ' in capsys.readouterr().err
    assert main(['recipes', 'pp_resnet18.pp4_in200']) == 2
    error = capsys.readouterr().err
    assert 'pp_resnet18.pp5_in200' in error and error.count('\n') == 1
