"""The command ``timm-pushpull``: parses, calls, prints."""

import argparse
import sys
from collections.abc import Sequence

__all__ = ['main']


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments after the program's name; those of the process where None.

    Returns:
        Exit status: 0, or 2 after one line that says what is wrong.
    """
    parser = argparse.ArgumentParser(prog='timm-pushpull', description='Push-pull networks for timm.')
    commands = parser.add_subparsers(required=True, metavar='COMMAND')

    demo = commands.add_parser('demo', help='train a push-pull network and its plain baseline on handwritten digits')
    demo.set_defaults(run=_demo)

    convert = commands.add_parser('convert', help='turn a checkpoint of the published code into a model folder of timm')
    convert.add_argument('checkpoint', metavar='CHECKPOINT', help='Lightning checkpoint (.ckpt)')
    convert.add_argument('folder', metavar='FOLDER', help='new folder, for create_model("local-dir:FOLDER")')
    convert.set_defaults(run=_convert)

    args = parser.parse_args(argv)
    try:
        args.run(args)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f'timm-pushpull: {error}', file=sys.stderr)
        return 2
    return 0


def _demo(args: argparse.Namespace) -> None:
    from .demo import run_demo

    results = run_demo()
    noise_stds = list(results[0].accuracy)
    columns = ['clean' if std == 0 else f'noise {std}' for std in noise_stds]
    print(f'\n{"top-1 accuracy, %":<20}' + ''.join(f'{column:>12}' for column in columns))
    for result in results:
        print(f'{result.network:<20}' + ''.join(f'{result.accuracy[std]:>12.1f}' for std in noise_stds))
    print("\nscikit-learn's digits at 32x32: 1,437 to train, 360 to test; one seed; noise: Gaussian, its standard")
    print('deviation on pixel values in [0, 1]. One seed on small digits shows that all works, not which is better.')


def _convert(args: argparse.Namespace) -> None:
    from .published import convert_published_checkpoint

    checkpoint = convert_published_checkpoint(args.checkpoint, args.folder)
    settings = ', '.join(f'{name}={value}' for name, value in checkpoint.model_args.items())
    print(f'{args.folder}: {checkpoint.architecture} ({settings})')
    if checkpoint.left_out:
        print(f'Settings left out, of classes that are not plain data: {", ".join(checkpoint.left_out)}')
