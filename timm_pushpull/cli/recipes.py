"""``timm-pushpull recipes``."""

import argparse
from typing import Any


def add_to(commands: Any) -> None:
    parser = commands.add_parser('recipes', help='list the training recipes, or print the commands of one')
    parser.add_argument('name', nargs='?', metavar='NAME', help='architecture.tag')
    parser.add_argument('--processes', type=int, default=4, metavar='N', help='of the torchrun command (%(default)s)')
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from ..hub.recipes import list_recipes, recipe_command

    if args.name:
        print(f'{recipe_command(args.name)}\n\n{recipe_command(args.name, args.processes)}')
    else:
        recipes = list_recipes()
        width = max(map(len, recipes))
        for name, purpose in recipes.items():
            print(f'{name:<{width}} {purpose}')
