"""``timm-pushpull recipes``."""

import argparse
from typing import Any

from ..errors import InputError


def add_to(commands: Any) -> None:
    parser = commands.add_parser(
        'recipes',
        help='list the training recipes, print the commands of one, or write its file',
        description="List the training recipes, all or those that match a pattern such as 'pp_resnet50.*_in1k'. With "
        "the NAME of one, print the commands that train it with timm's train.py. With NAME and --output, write the "
        'file for train.py --config.',
    )
    parser.add_argument(
        'name',
        nargs='?',
        metavar='NAME',
        help='recipe, such as pp_resnet50.pp3_prime_in1k, or a pattern',
    )
    parser.add_argument('--output', metavar='FILE', help='write the recipe to this file, for train.py --config')
    parser.add_argument(
        '--processes', type=int, default=4, metavar='N', help='processes of the torchrun command (default: %(default)s)'
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from ..files import atomic_write
    from ..recipes import list_recipes, recipe_commands, recipe_text

    if args.output and not args.name:
        raise InputError('--output writes one recipe: give its NAME too.')
    if args.output:
        atomic_write(args.output, recipe_text(args.name).encode())
        print(args.output)
    elif args.name and not set('*?[') & set(args.name):
        write, train, train_in_several = recipe_commands(args.name, args.processes)
        print(f'# {list_recipes(args.name)[args.name]}\n{write}\n{train}\n\n{train_in_several}')
    else:
        recipes = list_recipes(args.name or '*')
        width = max(map(len, recipes))
        for name, purpose in recipes.items():
            print(f'{name:<{width}} {purpose}')
