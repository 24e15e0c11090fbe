"""The training recipes as one table, with the files and commands for timm's ``train.py``.

A recipe's name is ``network.unit_additions_base``: ``pp_resnet18.pp3_prime_in1k`` trains ResNet18 with PP3 and PRIME on
ImageNet-1k. This module imports neither torch nor timm, so that the command line answers at once.
"""

import copy
import difflib
import fnmatch
import itertools
import math
import os
import shlex
from typing import Any

import yaml

from .class_lists import find_class_map
from .errors import InputError
from .fields import TRAINING_OPTIONS, check_fields, read_mapping

__all__ = ['list_recipes', 'read_args_yaml', 'read_recipe', 'recipe_commands', 'recipe_text']

NETWORKS = {
    'pp_resnet18': 'ResNet18',
    'pp_resnet50': 'ResNet50',
    'pp_resnet18_cifar': 'ResNet18 for 32x32',
    'pp_resnet50_cifar': 'ResNet50 for 32x32',
}
Options = dict[str, Any]
NEGATED = {'avg_pool_size': 3, 'pull_kernel': 'negated', 'alpha': 1.0}
UNITS: dict[str, tuple[str, Options]] = {  # description, model_kwargs
    'baseline': (', plain: the baseline', {'push_pull': False}),
    'pp3': (' + PP3', {'avg_pool_size': 3}),
    'pp5': (' + PP5', {'avg_pool_size': 5}),
    'pp3_negated': (' + PP3 with the negated push kernel as pull kernel', NEGATED),
}
AUGMENTATIONS: dict[str, tuple[str, Options, Options]] = {  # description, options, model_kwargs
    'aa': ('AutoAugment (ImageNet policy)', {'aa': 'original'}, {}),
    'augmix': ('AugMix (severity 3, width 3, random depth)', {'aa': 'augmix-m3-w3'}, {}),
    'prime': ('PRIME', {}, {'augment': 'prime'}),
}
EXTRAS: dict[str, tuple[str, Options, Options]] = {
    'contrastnorm': ('each image normalized by its own mean and deviation', {}, {'contrast_norm': True}),
    'blurpool': ('anti-aliased (BlurPool)', {}, {'aa_layer': 'blur'}),
}
ADDITIONS = AUGMENTATIONS | EXTRAS

PAPER_NOTES = """\
The recipe of PushPull-Net (arXiv 2408.04077), as closely as timm's options allow. Differences:
- learning rate: the paper's one-cycle schedule of {} epochs raises lr along a cosine. Here lr rises linearly for
  {} epochs (warmup_prefix adds these to `epochs`), then falls along a cosine for {}. Momentum stays 0.9.
- crop: the paper {}
- weight decay: timm exempts biases, BatchNorm and alpha.
"""
IMAGENET_CROP = """\
resizes the short side to 256 and crops 224 at random. rkrr does so for half of the images
  (scale is (224/256)^2); it resizes the short side of the others to 224."""
CIFAR_CROP = """\
pads by 4 pixels and crops 32 at random. timm crops without padding: here a random square of at
  least (28/32)^2 of the image, the least that the paper's crop keeps."""
START_NOTES = """\
OURS, and UNTESTED: no network was trained by it yet. It starts from timm's ImageNet weights. Fine-tuning on few images
can cost robustness to noise that the weights had: measure before and after. Size, crop, mean and std of the images for
validation are those of the weights.
"""
SCHEDULE_NOTES = """\
Schedule, batch and crop are those by which the authors of PRIME fine-tune ResNet50 (arXiv 2112.13547). Differences:
lr rises linearly for 10 epochs (warmup_prefix adds these to `epochs`) instead of along a cosine, momentum stays 0.9,
and timm exempts biases, BatchNorm and alpha from weight decay.
"""
BATCH_NOTE = 'batch_size is for one process; `timm-pushpull recipes NAME --processes N` prints the options for N.\n'
IMAGENET_NOTES = PAPER_NOTES.format(20, 6, 14, IMAGENET_CROP) + BATCH_NOTE
BASES = {  # description, notes
    'in1k': ('ImageNet-1k', IMAGENET_NOTES),
    'in100': ('ImageNet-100', IMAGENET_NOTES),
    'in200': ('ImageNet-200', IMAGENET_NOTES),
    'c10': ('CIFAR-10', PAPER_NOTES.format(30, 9, 21, CIFAR_CROP) + BATCH_NOTE),
    'ft_in1k': ("ImageNet-1k, from timm's weights; ours, untested", START_NOTES + SCHEDULE_NOTES + BATCH_NOTE),
    'ft_own': ("your own folder of images, from timm's weights; ours, untested", START_NOTES),
    'r64_imagenette': (
        'Imagenette at 64x64',
        'Ours, for a small data set of small images: it trains the network from scratch on 9,469 images.',
    ),
}
# Options of train.py for each base, and above them those that several bases share.
OPTIONS = yaml.safe_load("""
all: &all {interpolation: bilinear, momentum: 0.9, sched: cosine, sched_on_updates: true,
  train_interpolation: bilinear, hflip: 0.5, color_jitter: null, seed: 42}
paper: &paper {<<: *all, crop_pct: 1.0, opt: momentum, weight_decay: 1.0e-5, warmup_prefix: true, ratio: [1.0, 1.0],
  smoothing: 0.0}
paper_imagenet: &paper_imagenet {<<: *paper, input_size: [3, 224, 224], epochs: 14, warmup_epochs: 6,
  train_crop_mode: rkrr, scale: [0.765625, 0.765625]}
paper_small: &paper_small {batch_size: 64, warmup_lr: 5.0e-3, lr: 0.2, min_lr: 5.0e-6}

in1k: {<<: *paper_imagenet, num_classes: 1000, batch_size: 128, warmup_lr: 0.05, lr: 1.0, min_lr: 5.0e-5}
in100: {<<: [*paper_imagenet, *paper_small], num_classes: 100, class_map: imagenet_100}
in200: {<<: [*paper_imagenet, *paper_small], num_classes: 200, class_map: imagenet_200}
c10: {<<: [*paper, *paper_small], num_classes: 10, dataset: torch/cifar10, dataset_download: true,
  input_size: [3, 32, 32], epochs: 21, warmup_epochs: 9, train_crop_mode: rrc, scale: [0.765625, 1.0]}
ft_own: &ft {pretrained: true, batch_size: 64, opt: sgd, momentum: 0.9, weight_decay: 5.0e-5, sched: cosine,
  sched_on_updates: true, epochs: 20, warmup_epochs: 1, warmup_lr: 0.0, lr: 0.01, min_lr: 0.0, train_crop_mode: rrc,
  scale: [0.25, 1.0], ratio: [0.75, 1.3333], hflip: 0.5, color_jitter: null, smoothing: 0.1, seed: 42}
ft_in1k: {<<: *ft, num_classes: 1000, batch_size: 128, grad_accum_steps: 4, weight_decay: 1.0e-4, epochs: 90,
  warmup_epochs: 10, warmup_prefix: true, warmup_lr: 8.0e-4, lr: 0.02, min_lr: 8.0e-8, scale: [0.08, 1.0],
  smoothing: 0.0, amp: true, amp_dtype: bfloat16, channels_last: true}
r64_imagenette: {<<: *all, num_classes: 10, input_size: [3, 64, 64], crop_pct: 0.875, batch_size: 64, opt: momentum,
  weight_decay: 5.0e-4, epochs: 30, warmup_epochs: 2, warmup_lr: 0.005, lr: 0.05, min_lr: 0.0, scale: [0.35, 1.0],
  smoothing: 0.1}
""")

# Networks, units, additions and bases; each row stands for all their combinations.
TABLE = [
    ('pp_resnet18 pp_resnet50', 'baseline pp3 pp5', ['', 'aa', 'augmix', 'prime'], 'in1k'),
    ('pp_resnet18 pp_resnet50', 'baseline pp3 pp5', [''], 'in100 in200'),
    ('pp_resnet18_cifar pp_resnet50_cifar', 'baseline pp3 pp5', ['', 'augmix', 'prime'], 'c10'),
    ('pp_resnet18 pp_resnet50', 'baseline pp3', ['', 'prime'], 'ft_in1k'),
    ('pp_resnet18 pp_resnet50', 'baseline pp3_negated', ['', 'prime'], 'ft_own'),
    ('pp_resnet18', 'baseline pp3 pp5 pp3_negated', ['', 'augmix', 'prime'], 'r64_imagenette'),
    ('pp_resnet18', 'baseline pp3 pp3_negated', ['contrastnorm'], 'r64_imagenette'),
    ('pp_resnet18', 'baseline pp3', ['blurpool'], 'r64_imagenette'),
    ('pp_resnet18', 'baseline', ['augmix contrastnorm'], 'r64_imagenette'),
    ('pp_resnet18', 'baseline pp3_negated', ['prime contrastnorm'], 'r64_imagenette'),
    ('pp_resnet50', 'baseline pp3', [''], 'r64_imagenette'),
]
RECIPES = {
    f'{network}.{"_".join([unit, *additions.split(), base])}': (network, unit, additions.split(), base)
    for networks, units, variants, bases in TABLE
    for network, unit, additions, base in itertools.product(networks.split(), units.split(), variants, bases.split())
}


def list_recipes(filter: str = '*') -> dict[str, str]:
    """List the recipes.

    Args:
        filter: Pattern of the names with wildcards, as in ``timm.list_models``.

    Returns:
        Purpose of each recipe, by its name, in the order of the names.

    Raises:
        ValueError: If no name matches.
    """
    names = fnmatch.filter(sorted(RECIPES), filter)
    if not names:
        raise InputError(f'filter must match the name of a recipe, got {filter!r}, as in pp_resnet50.*_in1k.')
    return {name: _purpose(name) for name in names}


def _purpose(name: str) -> str:
    network, unit, additions, base = RECIPES[name]
    words = [ADDITIONS[addition][0] for addition in additions]
    if AUGMENTATIONS.keys().isdisjoint(additions):
        words.append('no augmentation beyond crop and flip')
    return f'{NETWORKS[network]}{UNITS[unit][0]}, {", ".join(words)}, {BASES[base][0]}.'


def read_recipe(name: str) -> dict[str, Any]:
    """Read a recipe.

    Args:
        name: Name of the recipe, such as ``pp_resnet50.pp3_prime_in1k``.

    Returns:
        Options of ``train.py`` by name. ``class_map`` is an absolute path in this package.

    Raises:
        ValueError: If there is no such recipe; the message has the nearest names.
    """
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=3, cutoff=0)
        raise InputError(
            f'name must be one of the recipes, got {name!r}; the nearest are {", ".join(near)}. A pattern such '
            "as 'pp_resnet50.*' lists those of a network."
        )
    network, unit, additions, base = RECIPES[name]
    recipe = {'model': network, 'model_kwargs': {**UNITS[unit][1]}, 'experiment': name, **copy.deepcopy(OPTIONS[base])}
    for addition in additions:
        _, options, model_kwargs = ADDITIONS[addition]
        recipe.update(options)
        recipe['model_kwargs'].update(model_kwargs)
    if 'class_map' in recipe:
        recipe['class_map'] = find_class_map(recipe['class_map'])
    return recipe


def read_args_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the ``args.yaml`` of a training or of a model.

    Args:
        path: Options of ``train.py``, in YAML.

    Returns:
        Options by name.

    Raises:
        ValueError: If the file is not YAML, or if an option that this package reads is missing or wrong.
        OSError: If the file cannot be read.
    """
    options = read_mapping(path)
    check_fields(path, options, TRAINING_OPTIONS)
    return options


def recipe_text(name: str) -> str:
    """Write a recipe as a file for ``train.py --config``, with its purpose and notes as comments.

    Args:
        name: Name of the recipe.

    Returns:
        Text of the file, in YAML.

    Raises:
        ValueError: If there is no such recipe; the message has the nearest names.
    """
    recipe = read_recipe(name)
    comments = [_purpose(name), *BASES[RECIPES[name][3]][1].splitlines()]
    options = yaml.safe_dump(recipe, sort_keys=False, default_flow_style=None, width=120)
    return ''.join(f'# {line}\n' for line in comments) + options


def recipe_commands(name: str, processes: int = 4) -> list[str]:
    """Give the commands that train a recipe with timm's ``train.py``, in a checkout of timm's repository.

    A step has the same batch for any number of processes: they share the accumulation steps first, then the images.

    Args:
        name: Name of the recipe.
        processes: Number of processes of the last command, one for each device.

    Returns:
        The command that writes the recipe's file, the command that trains in one process, and the command that trains
        in several; DATA stands for the folder of the data set, CLASSES for the number of its classes.

    Raises:
        ValueError: If there is no such recipe, or if the processes cannot share its batch equally.
    """
    if processes < 1:
        raise InputError(f'processes must be at least 1, got {processes}.')
    recipe = read_recipe(name)
    train = ['train.py', '--config', f'{name}.yaml', '--data-dir', 'DATA']
    if 'num_classes' not in recipe:
        train += ['--num-classes', 'CLASSES']
    steps, batch_size = recipe.get('grad_accum_steps', 1), recipe['batch_size']
    shared_steps = math.gcd(steps, processes)
    if batch_size % (processes // shared_steps):
        raise InputError(f'processes must share batches of {batch_size} equally, got {processes}.')
    several = [*train, '--batch-size', str(batch_size * shared_steps // processes)]
    if steps > 1:
        several += ['--grad-accum-steps', str(steps // shared_steps)]
    commands = [
        ['timm-pushpull', 'recipes', name, '--output', f'{name}.yaml'],
        ['python', *train],
        ['torchrun', f'--nproc-per-node={processes}', *several],
    ]
    return [shlex.join(command) for command in commands]
