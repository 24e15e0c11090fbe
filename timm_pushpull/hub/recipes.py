"""The training recipes in ``hub_configs``: files for ``train.py --config``, and the commands that run them."""

import difflib
import math
import shlex
from pathlib import Path
from typing import Any

import yaml

from .registry import RECIPE, hub_configs
from ..robustness.data import find_class_map

__all__ = ['list_recipes', 'read_recipe', 'recipe_command', 'recipe_path']


def recipe_path(name: str) -> Path:
    """Find the file of a recipe.

    Args:
        name: Architecture and tag, such as ``pp_resnet50.pp3_prime_in1k``.

    Returns:
        Its ``args.yaml``.

    Raises:
        ValueError: If there is no such recipe; the nearest names are given.
    """
    path = hub_configs() / name / RECIPE
    if not path.is_file():
        recipes = list_recipes()
        of_network = [recipe for recipe in recipes if recipe.startswith(f'{name}.')]
        near = of_network or difflib.get_close_matches(name, recipes, n=3, cutoff=0)
        raise ValueError(f'recipe must be one of those listed, got {name!r}; the nearest are {", ".join(near)}.')
    return path


def list_recipes() -> dict[str, str]:
    """List the recipes.

    Returns:
        What each is for, by its name.
    """
    paths = sorted(hub_configs().glob(f'*/{RECIPE}'))
    return {path.parent.name: path.read_text().splitlines()[0].lstrip('# ') for path in paths}


def read_recipe(name: str) -> dict[str, Any]:
    """Read a recipe.

    Args:
        name: Architecture and tag.

    Returns:
        Values of ``train.py``'s options by their names.

    Raises:
        ValueError: If there is no such recipe.
    """
    return yaml.safe_load(recipe_path(name).read_text())


def recipe_command(name: str, processes: int = 1) -> str:
    """Tell the command that trains a recipe with timm's ``train.py``.

    The batch of a step is the same for any number of processes: they share first the steps whose gradients are
    accumulated, then the pictures.

    Args:
        name: Architecture and tag.
        processes: How many, one for each device.

    Returns:
        Command line, to be run in a checkout of timm's repository; DATA stands for the folder of the dataset.

    Raises:
        ValueError: If there is no such recipe, or if its batch cannot be shared equally.
    """
    if processes < 1:
        raise ValueError(f'processes must be at least 1, got {processes}.')
    recipe = read_recipe(name)
    words = ['python'] if processes == 1 else ['torchrun', f'--nproc-per-node={processes}']
    words += ['train.py', '--config', str(recipe_path(name)), '--data-dir', 'DATA']
    if 'class_map' in recipe:
        words += ['--class-map', find_class_map(Path(recipe['class_map']).name.removesuffix('_synsets.txt'))]
    if processes > 1:
        steps, batch_size = recipe.get('grad_accum_steps', 1), recipe['batch_size']
        shared_steps = math.gcd(steps, processes)
        if batch_size % (processes // shared_steps):
            raise ValueError(f'processes must share batches of {batch_size} equally, got {processes}.')
        words += ['--batch-size', str(batch_size * shared_steps // processes)]
        if steps > 1:
            words += ['--grad-accum-steps', str(steps // shared_steps)]
    return shlex.join(words)
