"""``timm-pushpull robustness``."""

import argparse
from collections.abc import Sequence
from typing import Any

from .arguments import add_dataset_arguments, add_model_arguments, dataset_options, model_options

BASELINE_HELP = 'model that relative mCE and R_net compare with, or its name before the @ of training runs'


def add_to(commands: Any) -> None:
    parser = commands.add_parser(
        'robustness',
        help='measure the errors of timm models on clean and corrupted images',
        description='Measure the top-1 error of timm models on clean images and under the 15 corruptions of ImageNet-C '
        'at 5 severities, generated (--data-dir) or stored (--stored). Every prediction is kept; an interrupted run '
        'continues, and other models may join the same results folder.',
    )
    parser.add_argument(
        'models', nargs='+', metavar='MODEL', help='any model name that timm.create_model takes, or LABEL=NAME'
    )
    data = parser.add_argument_group('images')
    add_dataset_arguments(data, 'clean images; corruptions are generated from them')
    data.add_argument('--stored', metavar='FOLDER', help='corrupted images, in the layout of ImageNet-C or CIFAR-10-C')
    data.add_argument('--corruptions', nargs='+', metavar='NAME', help='corruptions (the 15 of the test)')
    data.add_argument(
        '--severities', nargs='+', type=int, default=[1, 2, 3, 4, 5], metavar='N', help='severities (1 to 5)'
    )
    data.add_argument('--limit', type=int, metavar='N', help='number of images, spread over the classes (all)')
    data.add_argument('--seed', type=int, default=0, metavar='N', help='seed of generated corruptions (%(default)s)')
    data.add_argument('--skip-unreadable', action='store_true', help='count unreadable images instead of stopping')
    model = parser.add_argument_group('models', "options of timm's validate.py, the same for all models")
    add_model_arguments(model, "one checkpoint for each model (timm's pretrained weights)", nargs='+')
    model.add_argument('--input-size', nargs=3, type=int, metavar='N', help='e.g. 3 224 224')
    model.add_argument('--use-train-size', action='store_true', help='not the test size; always so with --stored')
    model.add_argument('--crop-pct', type=float, metavar='N')
    model.add_argument('--interpolation', choices=['bilinear', 'bicubic', 'lanczos', 'nearest'])
    model.add_argument('--mean', nargs=3, type=float, metavar='N')
    model.add_argument('--std', nargs=3, type=float, metavar='N')
    run_group = parser.add_argument_group('run')
    run_group.add_argument('--output', required=True, metavar='FOLDER', help='results folder; a run in it continues')
    run_group.add_argument('--baseline', metavar='MODEL', help=BASELINE_HELP)
    run_group.add_argument('--device', help='(cuda where there is one, else cpu)')
    run_group.add_argument('--amp', action='store_true', help='mixed precision')
    run_group.add_argument('--amp-dtype', default='float16', choices=['float16', 'bfloat16'], help='(%(default)s)')
    run_group.add_argument('--batch-size', type=int, default=64, metavar='N', help='images in a batch (%(default)s)')
    run_group.add_argument(
        '--workers', type=int, default=2, metavar='N', help='processes that decode and corrupt (%(default)s)'
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    import torch
    import torch.distributed as dist
    from timm.data import resolve_data_config
    from timm.utils import init_distributed_device

    from ..robustness.data import find_class_map, open_stored
    from ..robustness.evaluate import evaluate_robustness
    from ..robustness.inputs import load_models, open_dataset, refused_by_timm
    from ..robustness.metrics import TEST_CORRUPTIONS

    if not args.data_dir and not args.dataset and not args.stored:
        raise ValueError('robustness needs --data-dir, to generate corruptions, or --stored.')
    corruptions = args.corruptions or TEST_CORRUPTIONS
    dataset = stored = None
    if args.data_dir or args.dataset:
        dataset = open_dataset(**dataset_options(args))
    if args.stored:
        stored = open_stored(args.stored, corruptions, args.severities, find_class_map(args.class_map, args.stored))
    models = load_models(args.models, args.checkpoint, **model_options(args))  # last: it may download weights
    args.device = args.device or ('cuda' if torch.cuda.is_available() else 'cpu')
    with refused_by_timm(f'--device {args.device}'):
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
        corruptions=corruptions,
        severities=args.severities,
        limit=args.limit,
        seed=args.seed,
        baseline=args.baseline,
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
        print_notes(rows, args.output)


def print_summary(rows: Sequence[dict[str, Any]]) -> None:
    """Print the measures of a summary, one column for each model."""
    from ..robustness.store import ENDS, MEANS

    errors = dict.fromkeys(name for row in rows for name in row if name[:3] == 'CE_' and not name.endswith(ENDS))
    measures = [name for name in ('E', *errors, *MEANS) if any(row.get(name, '') != '' for row in rows)]
    label = max(map(len, measures), default=0)
    print('\n' + ' ' * label + ''.join(f'  {row["model"]:>9}' for row in rows))
    for name in measures:
        figures = (f'{value:.2f}' if (value := row.get(name, '')) != '' else '' for row in rows)
        values = (f'{figure:>{max(9, len(row["model"]))}}' for figure, row in zip(figures, rows, strict=True))
        print(f'{name:<{label}}  {"  ".join(values)}')
    print(f'in %; means over severities {rows[0]["severities"] or "of none"}', end='')
    print('.' if 'plain_mCE' in measures else '; mCE needs all 15 corruptions.')
    if unreadable := sum(row['unreadable'] for row in rows):
        print(f'Left out: {unreadable} predictions for images that could not be read.')


def print_notes(rows: Sequence[dict[str, Any]], output: str) -> None:
    """Print what a reader of the summary must know, and where the rest is."""
    from ..robustness.store import not_compared, other_views

    if views := other_views(rows):
        print(views)
        print('To compare them alike: --input-size, --crop-pct, --interpolation.')
    if alone := not_compared(rows):
        print(alone)
    print(f'95% intervals, and how it was measured: summary.csv and protocol.json in {output}.')
    print(f'As a page: timm-pushpull report {output}')
