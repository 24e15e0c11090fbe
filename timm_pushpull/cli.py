"""The command ``timm-pushpull``: parses, calls, prints."""

import argparse
import contextlib
import functools
import itertools
import os
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

__all__ = ['main']

BASELINE = 'model that relative mCE and R_net compare with, or what comes before the @ of its training runs'


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments after the program's name; those of the process where None.

    Returns:
        Exit status: 0, 2 after one line that says what is wrong, or 130 after an interruption.
    """
    from . import __version__

    parser = _Parser(prog='timm-pushpull', description='Push-pull networks for timm.')
    parser.add_argument('--version', action='version', version=__version__)
    commands = parser.add_subparsers(required=True, metavar='COMMAND')

    demo = commands.add_parser('demo', help='train a push-pull network and its baseline on digits, and compare them')
    demo.add_argument('--output', default='pushpull-demo', metavar='FOLDER', help='what is there is not done again')
    demo.set_defaults(run=_demo)

    convert = commands.add_parser('convert', help='turn a checkpoint of the published code into a model folder of timm')
    convert.add_argument('checkpoint', metavar='CHECKPOINT', help='Lightning checkpoint (.ckpt)')
    convert.add_argument('folder', metavar='FOLDER', help='new folder, for create_model("local-dir:FOLDER")')
    convert.set_defaults(run=_convert)

    robustness = commands.add_parser('robustness', help='errors of timm models on clean and on corrupted pictures')
    robustness.add_argument(
        'models', nargs='+', metavar='MODEL', help='any name that timm.create_model takes, or LABEL=NAME'
    )
    data = robustness.add_argument_group('pictures')
    data.add_argument('--data-dir', metavar='DIR', help='clean pictures; corruptions are generated from them')
    data.add_argument('--stored', metavar='FOLDER', help='corruptions as ImageNet-C or CIFAR-10-C are published')
    data.add_argument('--dataset', metavar='NAME', help='type of the clean dataset, as in validate.py')
    data.add_argument('--split', default='validation', metavar='NAME', help='of the clean dataset (%(default)s)')
    data.add_argument('--class-map', default='', metavar='FILE', help='as in validate.py; imagenet_100, imagenet_200')
    data.add_argument('--corruptions', nargs='+', metavar='NAME', help='instead of the 15 of the test')
    data.add_argument('--severities', nargs='+', type=int, default=[1, 2, 3, 4, 5], metavar='N', help='(1 to 5)')
    data.add_argument('--limit', type=int, metavar='N', help='pictures, as many of each class as can be (all)')
    data.add_argument('--seed', type=int, default=0, metavar='N', help='draw of the corruptions (%(default)s)')
    data.add_argument('--skip-unreadable', action='store_true', help='count pictures that cannot be read, and go on')
    model = robustness.add_argument_group('models', "options of timm's validate.py, the same for all models")
    model.add_argument(
        '--checkpoint', nargs='+', metavar='FILE', help="one for each model; by default timm's pretrained weights"
    )
    model.add_argument('--use-ema', action='store_true', help='EMA weights of the checkpoints')
    model.add_argument(
        '--model-kwargs',
        nargs='*',
        default={},
        action=_ParseKwargs,
        metavar='NAME=VALUE',
        help='of all models; to join models with others, run again with the same --output',
    )
    model.add_argument('--num-classes', type=int, metavar='N')
    model.add_argument('--input-size', nargs=3, type=int, metavar='N', help='e.g. 3 224 224')
    model.add_argument('--use-train-size', action='store_true', help='not the test size; always so with --stored')
    model.add_argument('--crop-pct', type=float, metavar='N')
    model.add_argument('--interpolation', choices=['bilinear', 'bicubic', 'lanczos', 'nearest'])
    model.add_argument('--mean', nargs=3, type=float, metavar='N')
    model.add_argument('--std', nargs=3, type=float, metavar='N')
    run = robustness.add_argument_group('run')
    run.add_argument('--output', required=True, metavar='FOLDER', help='results folder; a run there goes on')
    run.add_argument('--baseline', metavar='MODEL', help=BASELINE)
    run.add_argument('--device', help='cuda where there is one, else cpu')
    run.add_argument('--amp', action='store_true', help='mixed precision')
    run.add_argument('--amp-dtype', default='float16', choices=['float16', 'bfloat16'])
    run.add_argument('--batch-size', type=int, default=64, metavar='N', help='pictures at a time (%(default)s)')
    run.add_argument(
        '--workers', type=int, default=2, metavar='N', help='processes that decode and corrupt (%(default)s)'
    )
    robustness.set_defaults(run=_robustness)

    report = commands.add_parser('report', help='a page with tables and pictures from results of robustness')
    report.add_argument('results', nargs='+', metavar='RESULTS', help='results folder; or one summary.csv')
    report.add_argument(
        '--output', metavar='FOLDER', help='where the page goes; by default FOLDER/report, or summary_report'
    )
    report.add_argument('--baseline', metavar='MODEL', help=BASELINE)
    report.set_defaults(run=_report)

    figures = commands.add_parser('figures', help='what the push-pull unit of a model sees: kernels, noise, spectra')
    figures.add_argument('model', metavar='MODEL', help='any name that timm.create_model takes')
    figures.add_argument('--output', required=True, metavar='FOLDER', help='where the PNG and CSV files go')
    figures.add_argument('--seed', type=int, default=0, metavar='N', help='number of the draw of the noise')
    figures.add_argument('--checkpoint', metavar='FILE', help="by default timm's pretrained weights")
    figures.add_argument('--use-ema', action='store_true', help='EMA weights of the checkpoint')
    figures.add_argument('--model-kwargs', nargs='*', default={}, action=_ParseKwargs, metavar='NAME=VALUE')
    figures.add_argument('--num-classes', type=int, metavar='N')
    figures.set_defaults(run=_figures)

    recipes = commands.add_parser('recipes', help='list the training recipes, or print the commands of one')
    recipes.add_argument('name', nargs='?', metavar='NAME', help='architecture.tag')
    recipes.add_argument('--processes', type=int, default=4, metavar='N', help='of the torchrun command')
    recipes.set_defaults(run=_recipes)

    hub = commands.add_parser('hub', help='models on the Hugging Face Hub')
    actions = hub.add_subparsers(required=True, metavar='WHAT')
    export = actions.add_parser('export', help="make a model's folder of a checkpoint of train.py")
    export.add_argument('checkpoint', metavar='CHECKPOINT', help='with the args.yaml of its run beside it')
    export.add_argument('--tag', required=True, metavar='NAME', help='architecture.tag, such as pp_resnet18.pp3_in1k')
    export.add_argument('--org', metavar='NAME', help='organisation or user that will publish it, for the model card')
    export.add_argument('--output', default='hub_configs', metavar='FOLDER', help='holds the folder NAME (%(default)s)')
    export.add_argument('--results', metavar='FOLDER', help='of timm-pushpull robustness, for the model card')
    export.add_argument('--use-ema', action='store_true', help='EMA weights of the checkpoint')
    export.add_argument('--dtype', default='float32', choices=('float32', 'float16', 'bfloat16'), help='of the weights')
    export.add_argument('--data-dir', metavar='DIR', help='clean pictures: names of classes, and what rounding changes')
    export.add_argument('--dataset', metavar='NAME', help='type of the dataset, as in validate.py')
    export.add_argument('--split', default='validation', metavar='NAME', help='of the dataset (%(default)s)')
    export.add_argument('--class-map', default='', metavar='FILE', help='as in validate.py')
    export.add_argument('--workers', type=int, default=2, metavar='N', help='processes that decode (%(default)s)')
    export.set_defaults(run=_hub_export)
    check = actions.add_parser('check', help="build, load, run and compare a model's folder")
    check.add_argument('folders', nargs='*', metavar='FOLDER', help='(all of this package)')
    check.set_defaults(run=_hub_check)
    push = actions.add_parser('push', help="upload a model's folder to the Hub")
    push.add_argument('folder', metavar='FOLDER')
    push.add_argument('--org', required=True, metavar='NAME', help='organisation or user')
    push.add_argument('--private', action='store_true', help='make a new repository private')
    push.add_argument('--revision', metavar='TAG', help='tag the uploaded state')
    push.add_argument('--yes', action='store_true', help='do not ask')
    push.set_defaults(run=_hub_push)

    bench = commands.add_parser('bench', help='speed, as ratios measured in one run')
    benches = bench.add_subparsers(metavar='WHAT', help='one of them; by default networks in every way, and PRIME')
    of_networks = benches.add_parser('networks', help="push-pull networks beside timm's plain ones")
    of_networks.add_argument('--amp', action='store_true', help='bfloat16 by autocast')
    of_networks.add_argument('--torchcompile', action='store_true', help='compiled')
    of_networks.set_defaults(run=_bench_networks)
    of_prime = benches.add_parser('prime', help='PRIME beside its plain formulation')
    of_prime.add_argument('--preset', default='imagenet', metavar='NAME', help='imagenet or cifar')
    of_prime.set_defaults(run=_bench_prime)
    of_robustness = benches.add_parser('robustness', help='the evaluation beside validate.py')
    of_robustness.add_argument('--model', default='resnet18', metavar='MODEL', help='of timm (%(default)s)')
    of_robustness.add_argument('--images', type=int, default=256, metavar='N', help='at least 80 (%(default)s)')
    of_robustness.add_argument(
        '--workers', type=int, default=2, metavar='N', help='processes that decode (%(default)s)'
    )
    of_robustness.set_defaults(run=_bench_robustness)
    bench.set_defaults(
        run=_bench, **dict.fromkeys(('networks', 'img_size', 'output', 'batch_size', 'rounds', 'device'))
    )
    for one in (bench, of_networks, of_prime, of_robustness):
        # Without a default, which would take the place of what was given before WHAT.
        option = functools.partial(one.add_argument, default=argparse.SUPPRESS)
        if one in (bench, of_networks):
            option('--networks', nargs='+', metavar='NAME', help='(resnet18 resnet50)')
        if one is not of_robustness:
            option('--img-size', type=int, metavar='N', help='(224)')
            option('--output', metavar='FILE', help='CSV of all figures')
        option('--batch-size', type=int, metavar='N', help='images at a time (16, of robustness 64)')
        option('--rounds', type=int, metavar='N', help='(6)')
        option('--device', help='(cpu)')

    args = parser.parse_args(argv)
    try:
        args.run(args)
    except KeyboardInterrupt:
        print('timm-pushpull: interrupted; what is finished is kept, and the same command goes on.', file=sys.stderr)
        return 130
    except (ValueError, OSError, ModuleNotFoundError) as error:
        kind = type(error)
        # What failed in a worker process comes with the worker's traceback before it, which ends as tracebacks do.
        *_, message = [kind.__name__, *str(error).strip().splitlines()]
        message = message.removeprefix(f'{kind.__module__}.').removeprefix(f'{kind.__name__}: ')
        print(f'timm-pushpull: {message}', file=sys.stderr)
        return 2
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f'{self.prog}: {message}; see {self.prog} --help\n')


class _ParseKwargs(argparse.Action):
    """timm's own, imported only where it is used: timm takes seconds to import."""

    def __call__(self, *args: Any) -> None:
        from timm.utils import ParseKwargs

        values: Sequence[str] = args[2]
        if wrong := [value for value in values if value and '=' not in value]:
            raise argparse.ArgumentError(self, f'must be NAME=VALUE, got {wrong[0]!r}')
        ParseKwargs(self.option_strings, self.dest)(*args)


def _demo(args: argparse.Namespace) -> None:
    from .demo import NOTE, run_demo

    result = run_demo(args.output)
    _print_summary(result.rows)
    print(textwrap.fill(NOTE, 100))
    print(f'Tables and pictures: {result.report.resolve().as_uri()}')


def _convert(args: argparse.Namespace) -> None:
    from .published import convert_published_checkpoint

    checkpoint = convert_published_checkpoint(args.checkpoint, args.folder)
    settings = ', '.join(f'{name}={value}' for name, value in checkpoint.model_args.items())
    print(f'{args.folder}: {checkpoint.architecture} ({settings})')
    if checkpoint.left_out:
        print(f'Settings left out, of classes that are not plain data: {", ".join(checkpoint.left_out)}')


def _robustness(args: argparse.Namespace) -> None:
    import torch
    import torch.distributed as dist
    from timm.data import resolve_data_config
    from timm.utils import init_distributed_device

    from .measures import TEST_CORRUPTIONS
    from .pictures import find_class_map, open_stored
    from .results import not_compared, other_views
    from .robustness import evaluate_robustness

    if not args.data_dir and not args.dataset and not args.stored:
        raise ValueError('robustness needs --data-dir, to generate corruptions, or --stored.')
    corruptions = args.corruptions or TEST_CORRUPTIONS
    dataset = stored = None
    if args.data_dir or args.dataset:
        dataset = _create_dataset(args)
    if args.stored:
        stored = open_stored(args.stored, corruptions, args.severities, find_class_map(args.class_map, args.stored))
    models = _create_models(args)  # last: it may download weights
    args.device = args.device or ('cuda' if torch.cuda.is_available() else 'cpu')
    with _refused_by_timm(f'--device {args.device}'):
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
        _print_summary(rows)
        if views := other_views(rows):
            print(views)
            print('To compare them alike: --input-size, --crop-pct, --interpolation.')
        if alone := not_compared(rows):
            print(alone)
        print(f'95% intervals, and how it was measured: summary.csv and protocol.json in {args.output}.')
        print(f'As a page: timm-pushpull report {args.output}')


def _report(args: argparse.Namespace) -> None:
    from .report import write_report

    first = Path(args.results[0])
    output = args.output or (first.with_name(f'{first.stem}_report') if first.is_file() else first / 'report')
    print(write_report(args.results, output, args.baseline))


def _figures(args: argparse.Namespace) -> None:
    from .figures import draw_figures

    for path in draw_figures(_create_model(args.model, args.checkpoint, args), args.output, args.seed):
        print(path)


def _recipes(args: argparse.Namespace) -> None:
    from .recipes import list_recipes, recipe_command

    if args.name:
        print(f'{recipe_command(args.name)}\n\n{recipe_command(args.name, args.processes)}')
    else:
        recipes = list_recipes()
        width = max(map(len, recipes))
        for name, purpose in recipes.items():
            print(f'{name:<{width}} {purpose}')


def _hub_export(args: argparse.Namespace) -> None:
    import torch

    from .hub import HUB_ORG
    from .hub_export import export_checkpoint

    folder = export_checkpoint(
        args.checkpoint,
        args.tag,
        args.output,
        results=args.results,
        use_ema=args.use_ema,
        dtype=getattr(torch, args.dtype),
        dataset=_create_dataset(args) if args.data_dir or args.dataset else None,
        org=args.org or HUB_ORG,
        workers=args.workers,
        progress=True,
    )
    print(folder)


def _hub_check(args: argparse.Namespace) -> None:
    from .hub import CONFIG, hub_configs
    from .hub_check import check_folder

    wrong = []
    for folder in args.folders or sorted(path.parent for path in hub_configs().glob(f'*/{CONFIG}')):
        try:
            print(f'{folder}: {check_folder(folder)}')
        except ValueError as error:
            wrong.append(str(error))
    if wrong:
        raise ValueError(' '.join(wrong))


def _hub_push(args: argparse.Namespace) -> None:
    from .hub_push import push_folder

    def confirm(what: str) -> bool:
        print(what)
        try:
            return args.yes or input('Upload? [y/N] ').strip().lower() in ('y', 'yes')
        except EOFError:  # nobody is there to answer
            return False

    commit = push_folder(args.folder, args.org, confirm, args.private, args.revision)
    print(commit or 'Nothing was uploaded.')


def _bench(args: argparse.Namespace) -> None:
    ways = itertools.product((False, True), repeat=2)
    networks = (row for amp, torchcompile in ways for row in _compare_networks(args, amp, torchcompile))
    _print_comparisons(args, itertools.chain(networks, _compare_prime(args, 'imagenet')))


def _bench_networks(args: argparse.Namespace) -> None:
    _print_comparisons(args, _compare_networks(args, args.amp, args.torchcompile))


def _bench_prime(args: argparse.Namespace) -> None:
    _print_comparisons(args, _compare_prime(args, args.preset))


def _bench_robustness(args: argparse.Namespace) -> None:
    from .bench_robustness import bench_robustness

    options = _given(args, 'batch_size', 'rounds', 'device')
    for ratio in bench_robustness(args.model, args.images, workers=args.workers, **options):
        print(ratio.in_words())


def _given(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    return {name: value for name in names if (value := getattr(args, name)) is not None}


def _compare_networks(args: argparse.Namespace, amp: bool, torchcompile: bool) -> Iterator[Any]:
    from timm.models import is_model, list_models

    from .bench_networks import bench_networks

    for name in args.networks or ():
        if not is_model(f'pp_{name}'):
            known = ', '.join(known.removeprefix('pp_') for known in list_models('pp_*', exclude_filters='*_cifar'))
            raise ValueError(f'--networks must be of {known}, got {name}.')
    options = _given(args, 'networks', 'batch_size', 'img_size', 'rounds', 'device')
    yield from bench_networks(amp=amp, torchcompile=torchcompile, **options)


def _compare_prime(args: argparse.Namespace, preset: str) -> Iterator[Any]:
    from .bench_prime import bench_prime

    yield bench_prime(preset=preset, **_given(args, 'batch_size', 'img_size', 'rounds', 'device'))


def _print_comparisons(args: argparse.Namespace, comparisons: Iterator[Any]) -> None:
    import torch

    from .bench import write_comparisons

    with _refused_by_timm(f'--device {args.device}'):
        torch.zeros(0, device=args.device)
    found: list[Any] = []
    last = None
    for row in comparisons:
        if not found:
            print("median time (range) of ours and of the published formulation, and peak memory of both, over timm's")
            print('network (PRIME: over copying each image as often as PRIME changes it); nhwc is channels_last')
        found.append(row)
        title = f'{row.precision}, {"compiled" if row.compiled else "eager"}'
        if title != last:
            print(f'\n{title:<31} {"ours":>19} {"published":>19}  memory')
        last = title
        ours = f'{row.time:.2f} ({row.time_low:.2f} to {row.time_high:.2f})'
        theirs = f'{row.reference_time:.2f} ({row.reference_time_low:.2f} to {row.reference_time_high:.2f})'
        memory = f'{row.memory:.2f}, {row.reference_memory:.2f}'
        print(f'{row.what:<15} {row.use:<10} {row.memory_format} {ours:>19} {theirs:>19}  {memory}')
        if args.output:
            write_comparisons(args.output, found)


def _create_dataset(args: argparse.Namespace) -> Any:
    from timm.data import create_dataset

    from .pictures import find_class_map

    if not args.dataset and not os.path.exists(args.data_dir):
        raise ValueError(f'--data-dir must be a folder of pictures, {args.data_dir} is none.')
    class_map = find_class_map(args.class_map, args.data_dir or '')
    options: dict[str, Any] = dict(root=args.data_dir, split=args.split, class_map=class_map)
    with _refused_by_timm(f'{args.dataset or "pictures"} in {args.data_dir}'):
        dataset: Any = create_dataset(args.dataset or '', **options)
    # Where there is no folder of the split, timm takes all pictures, which is meant only of a folder without splits.
    whole = not args.dataset and dataset.reader.root == args.data_dir
    if whole and (args.split != 'validation' or os.path.isdir(os.path.join(args.data_dir, 'train'))):
        raise ValueError(f'--split must be a folder of --data-dir, there is no {args.split} in {args.data_dir}.')
    return dataset


def _create_models(args: argparse.Namespace) -> dict[str, Any]:
    checkpoints = args.checkpoint or [None] * len(args.models)
    if len(checkpoints) != len(args.models):
        raise ValueError(f'--checkpoint must name one file for each of the models, got {len(checkpoints)}.')
    models: dict[str, Any] = {}
    for name, checkpoint in zip(args.models, checkpoints, strict=True):
        label, equals, model_name = name.partition('=')
        if not equals or '/' in label or ':' in label:
            label = model_name = name
        if label in models:
            raise ValueError(f'model {label} is given twice: tell them apart as LABEL={model_name}.')
        models[label] = _create_model(model_name, checkpoint, args)
    return models


def _create_model(name: str, checkpoint: str | None, args: argparse.Namespace) -> Any:
    """As ``validate.py`` does, with errors that name the model."""
    from timm.models import create_model, load_checkpoint

    if checkpoint is not None and not os.path.isfile(checkpoint):
        raise ValueError(f'--checkpoint must be a file, {checkpoint} is none.')
    with _refused_by_timm(name):  # an unknown name, weights or settings that do not fit
        model = create_model(name, pretrained=checkpoint is None, num_classes=args.num_classes, **args.model_kwargs)
        if checkpoint is not None:
            drawn = _unset_drawn_alpha(model)
            load_checkpoint(model, checkpoint, args.use_ema)
            if any(alpha.isnan().any() for alpha in drawn):
                raise RuntimeError(
                    f'{checkpoint} holds no alpha, which would be drawn at random. Is it of a plain network? Then give '
                    '--model-kwargs push_pull=False, or an alpha.'
                )
    return model


def _unset_drawn_alpha(model: Any) -> list[Any]:
    """Make inhibition strengths that were drawn, not given, not a number, to see whether a checkpoint sets them."""
    from .pushpull_conv import PushPullConv2d

    layers = [layer for layer in model.modules() if isinstance(layer, PushPullConv2d)]
    drawn = [layer.alpha for layer in layers if layer.trainable_alpha and layer.initial_alpha is None]
    for alpha in drawn:
        alpha.data.fill_(float('nan'))
    return drawn


@contextlib.contextmanager
def _refused_by_timm(what: str) -> Iterator[None]:
    """Turn the errors by which timm refuses an argument into one that names it."""
    try:
        yield
    except (AssertionError, ImportError, RuntimeError, TypeError) as error:
        message = textwrap.shorten(str(error), 300)
        if 'No pretrained weights' in message:
            message = 'no pretrained weights are published, give --checkpoint.'
        elif 'size mismatch' in message:
            message += ' Give --num-classes and --model-kwargs of the training, or the name with the tag of its recipe.'
        raise ValueError(f'{what}: {message}') from None


def _print_summary(rows: Sequence[dict[str, Any]]) -> None:
    from .results import ENDS, MEANS

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
        print(f'Left out: {unreadable} answers to pictures that could not be read.')
