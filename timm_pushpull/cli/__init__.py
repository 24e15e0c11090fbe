"""The command ``timm-pushpull``: parses, calls, prints. One module for each command."""

import argparse
import sys
from collections.abc import Sequence

from ..errors import InputError, MissingExtraError, WorkerKilledError
from . import bench, demo, figures, hub, import_original, recipes, report, robustness
from .arguments import Parser

__all__ = ['build_parser', 'main']

COMMANDS = (demo, robustness, report, recipes, figures, import_original, hub, bench)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments after the program's name; None for those of the process.

    Returns:
        Exit status: 0; 2 after one line that says what is wrong with the input; 1 after one line about a killed worker;
        130 after an interruption.
    """
    args = build_parser().parse_args(argv)
    try:
        args.run(args)
    except KeyboardInterrupt:
        print('timm-pushpull: interrupted. What was written is kept: repeat the command to go on.', file=sys.stderr)
        return 130
    except (InputError, MissingExtraError, OSError, WorkerKilledError) as error:
        if args.debug:
            raise
        kind = type(error)
        # An error of a worker process holds the worker's traceback, whose last line is the message.
        *_, message = [kind.__name__, *str(error).strip().splitlines()]
        message = message.removeprefix(f'{kind.__module__}.').removeprefix(f'{kind.__name__}: ')
        print(f'timm-pushpull: {message}', file=sys.stderr)
        return 1 if kind is WorkerKilledError else 2
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the command line, whose result has the command's function as ``run``."""
    from .. import __version__

    parser = Parser(
        prog='timm-pushpull',
        description='Push-pull networks for timm: train them, measure their robustness, publish their weights.',
        epilog='timm-pushpull COMMAND --help explains a command.',
    )
    parser.add_argument('--version', action='version', version=__version__)
    parser.add_argument('--debug', action='store_true', help='show the traceback of an error')
    commands = parser.add_subparsers(required=True, metavar='COMMAND', title='commands')
    for command in COMMANDS:
        command.add_to(commands)
    return parser
