"""``timm-pushpull import-original``."""

import argparse
from typing import Any


def add_to(commands: Any) -> None:
    parser = commands.add_parser(
        'import-original',
        help="turn a checkpoint of the paper's code into a model folder of timm",
        description="Read a Lightning checkpoint of the paper's code, without running anything it holds, and write a "
        'folder for timm.create_model("local-dir:FOLDER", pretrained=True).',
    )
    parser.add_argument('checkpoint', metavar='CHECKPOINT', help='Lightning checkpoint (.ckpt)')
    parser.add_argument('folder', metavar='FOLDER', help='new folder for config.json and model.safetensors')
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from ..models.original import convert_original_checkpoint

    checkpoint = convert_original_checkpoint(args.checkpoint, args.folder)
    settings = ', '.join(f'{name}={value}' for name, value in checkpoint.model_args.items())
    print(f'{args.folder}: {checkpoint.architecture} ({settings})')
    if checkpoint.left_out:
        print(f'Not read, because their classes are not plain data: {", ".join(checkpoint.left_out)}')
