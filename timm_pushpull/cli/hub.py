"""``timm-pushpull hub``."""

import argparse
from typing import Any

from ..errors import InputError
from ..registry import HUB_ORG
from .arguments import add_dataset_arguments, dataset_options


def add_to(commands: Any) -> None:
    hub = commands.add_parser(
        'hub',
        help='export, check and push models for the Hugging Face Hub',
        description='Turn a checkpoint into a model folder, check the folder, and push it to the Hugging Face Hub.',
    )
    actions = hub.add_subparsers(required=True, metavar='ACTION', title='actions')

    export = actions.add_parser(
        'export',
        help='turn a checkpoint of train.py into a model folder',
        description='Write config.json, args.yaml, model.safetensors, its SHA-256 and the model card README.md.',
    )
    export.add_argument('checkpoint', metavar='CHECKPOINT', help='checkpoint, beside the args.yaml of its run')
    export.add_argument('--name', required=True, help='ARCHITECTURE.TAG, such as pp_resnet18.pp3_in1k')
    export.add_argument(
        '--org',
        default=HUB_ORG,
        metavar='NAME',
        help='organisation or user on the Hub, for the model card (default: %(default)s)',
    )
    export.add_argument(
        '--output', default='hub_configs', metavar='FOLDER', help='parent of the folder (default: %(default)s)'
    )
    export.add_argument('--results', metavar='FOLDER', help='results of timm-pushpull robustness, for the model card')
    export.add_argument('--use-ema', action='store_true', help='export the EMA weights of the checkpoint')
    export.add_argument(
        '--dtype',
        default='float32',
        choices=('float32', 'float16', 'bfloat16'),
        help='data type of the weights (default: %(default)s)',
    )
    export.add_argument(
        '--workers', type=int, default=2, metavar='N', help='processes that decode images (default: %(default)s)'
    )
    add_dataset_arguments(export, 'clean images, for the names of the classes and the effect of rounding the weights')
    export.set_defaults(run=run_export)

    check = actions.add_parser(
        'check',
        help='check that model folders are complete and safe, and that their models run',
        description='Check that folders have all files, that the weights are those of the checksum and hold no pickle, '
        'and that create_model loads and runs the models. Exit status 2 if a folder has a fault.',
    )
    check.add_argument('folders', nargs='*', metavar='FOLDER', help='model folders (default: all of this package)')
    check.set_defaults(run=run_check)

    push = actions.add_parser(
        'push',
        help='upload a model folder to the Hub',
        description='Check a model folder, list what is uploaded to ORG/ARCHITECTURE.TAG, ask, and upload.',
    )
    push.add_argument('folder', metavar='FOLDER', help='model folder, named architecture.tag')
    push.add_argument('--org', required=True, metavar='NAME', help='organisation or user on the Hub')
    push.add_argument('--private', action='store_true', help='make a new repository private')
    push.add_argument('--revision', metavar='TAG', help='git tag for the uploaded commit')
    push.add_argument('--yes', action='store_true', help='upload without asking')
    push.set_defaults(run=run_push)


def run_export(args: argparse.Namespace) -> None:
    import torch

    from ..hub.export import export_checkpoint
    from ..robustness.inputs import open_dataset

    folder = export_checkpoint(
        args.checkpoint,
        args.name,
        args.output,
        results=args.results,
        use_ema=args.use_ema,
        dtype=getattr(torch, args.dtype),
        dataset=open_dataset(**dataset_options(args)) if args.data_dir or args.dataset else None,
        org=args.org,
        workers=args.workers,
        progress=True,
    )
    print(folder)


def run_check(args: argparse.Namespace) -> None:
    from ..hub.check import check_folder
    from ..registry import hub_configs, model_folders

    wrong = []
    for folder in args.folders or model_folders(hub_configs()):
        try:
            print(f'{folder}: {check_folder(folder)}')
        except InputError as error:
            wrong.append(str(error))
    if wrong:
        raise InputError(' '.join(wrong))


def run_push(args: argparse.Namespace) -> None:
    from ..hub.push import push_folder

    def confirm(question: str) -> bool:
        print(question)
        try:
            return args.yes or input('Upload? [y/N] ').strip().lower() in ('y', 'yes')
        except EOFError:  # no terminal to answer from
            return False

    commit = push_folder(args.folder, args.org, confirm, args.private, args.revision)
    print(commit or 'Nothing was uploaded.')
