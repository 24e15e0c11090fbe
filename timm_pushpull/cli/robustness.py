"""``timm-pushpull robustness``."""

import argparse
import os
from collections.abc import Sequence
from typing import Any

from ..errors import InputError
from ..robustness.metrics import HELD_OUT_CORRUPTIONS, SEVERITIES, TEST_CORRUPTIONS
from .arguments import (
    BASELINE_HELP,
    add_dataset_arguments,
    add_model_arguments,
    dataset_options,
    model_options,
    positive,
)
from .printing import print_comparisons, print_summary


def add_to(commands: Any) -> None:
    parser = commands.add_parser(
        'robustness',
        help='measure the errors of timm models on clean and corrupted images',
        description='Measure the top-1 error of timm models on clean images and under the 15 corruptions of ImageNet-C '
        'at 5 severities, generated (--data-dir) or stored (--stored). The results folder keeps every prediction: the '
        'same command continues an interrupted run, and other models can join.',
        epilog='Labels that differ only after an @, such as pp@1=NAME pp@2=NAME, are training runs of one model: the '
        'report has their mean and range. torchrun --nproc-per-node=4 --no-python timm-pushpull robustness ... shares '
        'the work among processes, with the same results.',
    )
    parser.add_argument(
        'models', nargs='+', metavar='MODEL', help='any model name that timm.create_model takes, or LABEL=NAME'
    )
    data = parser.add_argument_group('images')
    add_dataset_arguments(data, 'clean images; corruptions are generated from them')
    data.add_argument(
        '--stored',
        metavar='FOLDER',
        help='corrupted images, in the layout of ImageNet-C or CIFAR-10-C; corruptions that ImageNet-C lacks, such as '
        'those of ImageNet-C-bar and 3DCC, have a mean of their own',
    )
    data.add_argument(
        '--shifted',
        nargs='+',
        default=(),
        metavar='NAME=FOLDER',
        help='naturally shifted images, such as imagenet-a=FOLDER: if --data-dir has other classes, also give clean '
        'images of the classes of the set as NAME-clean=FOLDER; the error increase is computed from these',
    )
    data.add_argument(
        '--corruptions',
        nargs='+',
        default=TEST_CORRUPTIONS,
        metavar='NAME',
        help='corruptions, or all: those of --stored, else the 15 of ImageNet-C and 4 more (default: the 15)',
    )
    data.add_argument(
        '--severities', nargs='+', type=int, default=SEVERITIES, metavar='N', help='severities (default: 1 2 3 4 5)'
    )
    data.add_argument(
        '--limit',
        type=int,
        metavar='N',
        help='number of images, spread over the classes, or the first of a stream (default: all)',
    )
    data.add_argument(
        '--seed', type=int, default=0, metavar='N', help='seed of generated corruptions (default: %(default)s)'
    )
    data.add_argument(
        '--valid-labels',
        metavar='FILE',
        help='as in validate.py: the index of the logit of each class, for models with more classes than the images; '
        'not needed where the models and the images name their classes alike, as by ImageNet synsets. For the errors '
        'among all 1,000 classes: --class-map imagenet_1000',
    )
    data.add_argument('--real-labels', metavar='FILE', help='as in validate.py: the labels of ImageNet-ReaL')
    data.add_argument(
        '--skip-unreadable', action='store_true', help='leave out and count unreadable images, instead of stopping'
    )
    model = parser.add_argument_group('models', "options of timm's validate.py, the same for all models")
    add_model_arguments(model, "one checkpoint for each model (default: timm's pretrained weights)", nargs='+')
    model.add_argument(
        '--input-size', nargs=3, type=int, metavar='N', help='channels, height and width, such as 3 224 224'
    )
    model.add_argument(
        '--use-train-size', action='store_true', help='train size instead of the test size (--stored always has it)'
    )
    model.add_argument('--crop-pct', type=positive, metavar='N', help='fraction of the image that the crop keeps')
    model.add_argument(
        '--interpolation', choices=['bilinear', 'bicubic', 'lanczos', 'nearest'], help='interpolation of the resize'
    )
    model.add_argument('--mean', nargs=3, type=float, metavar='N', help='mean of each channel')
    model.add_argument('--std', nargs=3, type=positive, metavar='N', help='standard deviation of each channel')
    run_group = parser.add_argument_group('run')
    run_group.add_argument('--output', required=True, metavar='FOLDER', help='results folder')
    run_group.add_argument('--baseline', metavar='MODEL', help=BASELINE_HELP)
    run_group.add_argument('--device', help='device of the models (default: cuda if there is one, else cpu)')
    run_group.add_argument('--channels-last', action='store_true', help='channels_last memory format, often faster')
    run_group.add_argument('--amp', action='store_true', help='mixed precision')
    run_group.add_argument(
        '--amp-dtype',
        default='float16',
        choices=['float16', 'bfloat16'],
        help='data type of --amp (default: %(default)s)',
    )
    run_group.add_argument(
        '--adapt-batch-norm',
        type=int,
        metavar='N',
        help='measure each model twice: unchanged, and as MODEL+bnN with its running BatchNorm statistics blended with '
        'those of each batch. N: weight of the running statistics, in images. The errors depend on N and on '
        '--batch-size',
    )
    run_group.add_argument(
        '--batch-size', type=int, default=64, metavar='N', help='images in a batch (default: %(default)s)'
    )
    run_group.add_argument(
        '--workers', type=int, default=2, metavar='N', help='processes that decode and corrupt (default: %(default)s)'
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    import torch
    import torch.distributed as dist
    from timm.data import resolve_data_config
    from timm.utils import init_distributed_device

    from ..robustness.data import open_stored, stored_corruptions
    from ..robustness.evaluate import evaluate_robustness
    from ..robustness.inputs import as_input_error, load_models, open_dataset

    if not args.data_dir and not args.dataset and not args.stored:
        raise InputError('give --data-dir (generates corruptions) or --stored.')
    dataset = stored = None
    if args.data_dir or args.dataset:
        dataset = open_dataset(**dataset_options(args))
    if list(args.corruptions) == ['all']:
        args.corruptions = stored_corruptions(args.stored) if args.stored else TEST_CORRUPTIONS + HELD_OUT_CORRUPTIONS
    if args.stored:
        stored = open_stored(args.stored, args.corruptions, args.severities, args.class_map)
    shifted = {}
    for words in args.shifted:
        name, equals, folder = words.partition('=')
        if not equals or not folder or name in shifted:
            raise InputError(f'--shifted must be NAME=FOLDER with another name for each set, got {words!r}.')
        try:
            shifted[name] = open_dataset(folder, class_map=args.class_map)
        except InputError as error:
            raise InputError(f'--shifted {words}: {error}') from None
    models = load_models(args.models, args.checkpoint, **model_options(args))  # last: it may download weights
    if args.channels_last:
        models = {label: model.to(memory_format=torch.channels_last) for label, model in models.items()}
    args.device = args.device or ('cuda' if torch.cuda.is_available() else 'cpu')
    with as_input_error(f'--device {args.device}'):
        device = init_distributed_device(args)
    data_configs = {
        name: resolve_data_config(vars(args), model=model, use_test_size=not args.use_train_size and stored is None)
        for name, model in models.items()
    }
    rows = evaluate_robustness(
        models,
        args.output,
        dataset=dataset,
        stored=stored,
        shifted=shifted,
        corruptions=args.corruptions,
        severities=args.severities,
        limit=args.limit,
        seed=args.seed,
        valid_labels=args.valid_labels,
        real_labels=args.real_labels,
        baseline=args.baseline,
        adapt_batch_norm=args.adapt_batch_norm,
        skip_unreadable=args.skip_unreadable,
        data_configs=data_configs,
        device=device,
        batch_size=args.batch_size,
        workers=args.workers,
        amp_dtype=getattr(torch, args.amp_dtype) if args.amp else None,
        progress=True,
    )
    if args.distributed:
        dist.destroy_process_group()
    if rows:
        print_summary(rows)
        print_shifts(args.output)
        print_notes(rows, args.output)
        print_comparisons(args.output)


def print_shifts(folder: str | os.PathLike[str]) -> None:
    """Print the errors on natural shifts, one line for each model and set."""
    from ..robustness.intervals import columns_of
    from ..robustness.paired import tenths
    from ..robustness.shifts import shift_rows

    for row in shift_rows(folder):
        words = [f'{row["model"]} on {row["shift"]}, {row["images"]:,} images of {row["classes"]:,} classes:']
        for measure, name in (
            ('top1_err', 'top-1 error'),
            ('top5_err', 'top-5 error'),
            ('error_increase', 'error increase'),
        ):
            if row[measure] != '':
                value, low, high = (tenths(row[column]) for column in columns_of(measure))
                words.append(f'{name} {value} ({low} to {high})')
        print('  '.join(words))


def print_notes(rows: Sequence[dict[str, Any]], output: str) -> None:
    """Print the limits of a comparison, and where the other results are."""
    from ..robustness.fairness import unfair_comparisons
    from ..robustness.store import read_protocol
    from ..robustness.summary import not_compared, view_differences

    if views := view_differences(rows):
        print(f'{views} To show them in one way, use --input-size, --crop-pct and --interpolation.')
    if alone := not_compared(rows):
        print(alone)
    if len(rows) > 2 and not rows[0]['baseline']:
        print('To compare each model with one of them: --baseline MODEL.')
    for sentence in unfair_comparisons(read_protocol(output), rows):
        print(sentence)
    print(f'95% intervals: summary.csv in {output}. Protocol: protocol.json. In the columns of timm: results-*.csv.')
    print(f'Page with tables and plots: timm-pushpull report {output}')
