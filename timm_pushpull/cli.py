"""The command ``timm-pushpull``: parses, calls, prints."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

__all__ = ['main']


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments after the program's name; those of the process where None.

    Returns:
        Exit status: 0, or 2 after one line that says what is wrong.
    """
    from timm.utils import ParseKwargs

    parser = argparse.ArgumentParser(prog='timm-pushpull', description='Push-pull networks for timm.')
    commands = parser.add_subparsers(required=True, metavar='COMMAND')

    demo = commands.add_parser('demo', help='train a push-pull network and its plain baseline on handwritten digits')
    demo.set_defaults(run=_demo)

    convert = commands.add_parser('convert', help='turn a checkpoint of the published code into a model folder of timm')
    convert.add_argument('checkpoint', metavar='CHECKPOINT', help='Lightning checkpoint (.ckpt)')
    convert.add_argument('folder', metavar='FOLDER', help='new folder, for create_model("local-dir:FOLDER")')
    convert.set_defaults(run=_convert)

    robustness = commands.add_parser('robustness', help='errors of timm models on clean and on corrupted pictures')
    robustness.add_argument('models', nargs='+', metavar='MODEL', help='any name that timm.create_model takes')
    robustness.add_argument('--data-dir', required=True, metavar='DIR', help='pictures in folders by class')
    robustness.add_argument('--dataset', default='', help='type of dataset, as in train.py')
    robustness.add_argument('--split', default='validation', help='split of the dataset, as in validate.py')
    robustness.add_argument('--class-map', default='', metavar='FILE', help='class to index, as in validate.py')
    robustness.add_argument('--output', required=True, metavar='FOLDER', help='results folder; a run there goes on')
    robustness.add_argument('--checkpoint', nargs='+', metavar='FILE', help='one for each model')
    robustness.add_argument('--num-classes', type=int, help='classes of the models')
    robustness.add_argument('--input-size', nargs=3, type=int, metavar='N', help='as in validate.py, e.g. 3 224 224')
    robustness.add_argument('--model-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='NAME=VALUE')
    robustness.add_argument('--corruptions', nargs='+', metavar='NAME', help='instead of the 15 of the test')
    robustness.add_argument('--severities', nargs='+', type=int, default=[1, 2, 3, 4, 5], metavar='N')
    robustness.add_argument('--limit', type=int, metavar='N', help='pictures, as many of each class as can be')
    robustness.add_argument('--baseline', metavar='MODEL', help='model that relative mCE and R_net compare with')
    robustness.add_argument('--seed', type=int, default=0, help='number of the draw of the corruptions')
    robustness.add_argument('--device', help='cuda where there is one, else cpu')
    robustness.add_argument('--batch-size', type=int, default=64)
    robustness.add_argument('--workers', type=int, default=2)
    robustness.set_defaults(run=_robustness)

    args = parser.parse_args(argv)
    try:
        args.run(args)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        # What failed in a worker process comes with the worker's traceback before it.
        message = str(error).strip().splitlines()[-1].removeprefix(f'{type(error).__name__}: ')
        print(f'timm-pushpull: {message}', file=sys.stderr)
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


def _robustness(args: argparse.Namespace) -> None:
    import torch
    from timm.data import create_dataset
    from timm.models import create_model
    from tqdm import tqdm

    from .measures import TEST_CORRUPTIONS
    from .robustness import evaluate_robustness

    checkpoints = args.checkpoint or [None] * len(args.models)
    if len(checkpoints) != len(args.models):
        raise ValueError(f'--checkpoint must name one file for each model, got {len(checkpoints)}.')
    models = {}
    for name, checkpoint in zip(args.models, checkpoints, strict=True):
        model: Any = create_model(
            name,
            pretrained=checkpoint is None,
            checkpoint_path=checkpoint or '',
            num_classes=args.num_classes,
            **args.model_kwargs,
        )
        if args.input_size:
            model.pretrained_cfg['input_size'] = tuple(args.input_size)
        models[name] = model
    rows = evaluate_robustness(
        models,
        create_dataset(args.dataset, root=args.data_dir, split=args.split, class_map=args.class_map),
        args.output,
        corruptions=args.corruptions or TEST_CORRUPTIONS,
        severities=args.severities,
        limit=args.limit,
        seed=args.seed,
        baseline=args.baseline,
        device=args.device or ('cuda' if torch.cuda.is_available() else 'cpu'),
        batch_size=args.batch_size,
        workers=args.workers,
        progress=tqdm,
    )
    columns = ('E', 'plain_mCE', 'alexnet_normalized_mCE', 'relative_mCE', 'R_net')
    print(f'\n{"%":<32}' + ''.join(f'{column:>24}' for column in columns))
    for row in rows:
        values = ''.join(f'{row[column]:>24}' for column in columns)
        print(f'{row["model"]:<32}{values}')
    print(f'95% intervals, CE by corruption: {args.output}/summary.csv. How it was measured: protocol.json there.')
