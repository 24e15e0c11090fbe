"""Arguments that several commands share."""

import argparse
import math
from collections.abc import Sequence
from typing import Any, NoReturn

__all__ = [
    'BASELINE_HELP',
    'Parser',
    'add_dataset_arguments',
    'add_model_arguments',
    'dataset_options',
    'model_options',
    'positive',
]

NOT_IN_MODEL_KWARGS = {
    'checkpoint',
    'checkpoint_path',
    'model_name',
    'name',
    'num_classes',
    'pretrained',
    'use_ema',
}
BASELINE_HELP = 'model that the others are compared with, or the name before the @ of training runs'


class Parser(argparse.ArgumentParser):
    """Refuses wrong arguments in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f'{self.prog}: {message}; see {self.prog} --help\n')


def positive(text: str) -> float:
    """Read a positive number; timm would ignore a 0."""
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f'must be a positive number, got {text}')
    return number


def add_model_arguments(group: Any, checkpoint_help: str, **checkpoint: Any) -> None:
    """Add the options that :func:`timm_pushpull.load_model` takes."""
    group.add_argument('--checkpoint', metavar='FILE', help=checkpoint_help, **checkpoint)
    group.add_argument('--use-ema', action='store_true', help='load the EMA weights of a checkpoint')
    group.add_argument(
        '--model-kwargs', nargs='*', default={}, action=_ParseKwargs, metavar='NAME=VALUE', help='model arguments'
    )
    group.add_argument('--num-classes', type=int, metavar='N', help='number of classes')


def model_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options of :func:`add_model_arguments` but the checkpoint, for ``load_model``."""
    return dict(use_ema=args.use_ema, num_classes=args.num_classes, **args.model_kwargs)


def add_dataset_arguments(group: Any, data_dir_help: str) -> None:
    """Add the options that :func:`timm_pushpull.open_dataset` takes."""
    group.add_argument('--data-dir', metavar='DIR', help=data_dir_help)
    group.add_argument(
        '--dataset', metavar='NAME', help='type of the dataset, as in validate.py (default: image folder)'
    )
    group.add_argument(
        '--split', default='validation', metavar='NAME', help='split of the dataset (default: %(default)s)'
    )
    group.add_argument(
        '--class-map',
        default='',
        metavar='FILE',
        help='text file with one class name a line, or imagenet_100, imagenet_200 or imagenet_1000',
    )


def dataset_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options of :func:`add_dataset_arguments`, for ``open_dataset``."""
    return dict(data_dir=args.data_dir, name=args.dataset or '', split=args.split, class_map=args.class_map)


class _ParseKwargs(argparse.Action):
    """timm's own action, imported where it is used: timm takes seconds to import."""

    def __call__(self, *args: Any) -> None:
        from timm.utils import ParseKwargs

        values: Sequence[str] = args[2]
        if wrong := [value for value in values if value and '=' not in value]:
            raise argparse.ArgumentError(self, f'must be NAME=VALUE, got {wrong[0]!r}')
        if given := NOT_IN_MODEL_KWARGS & {value.partition('=')[0] for value in values}:
            raise argparse.ArgumentError(self, f'must not hold {min(given)}: the command has its own way to give it')
        ParseKwargs(self.option_strings, self.dest)(*args)
