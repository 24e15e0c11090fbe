"""``timm-pushpull figures``."""

import argparse
from typing import Any

from .arguments import add_model_arguments, model_options


def add_to(commands: Any) -> None:
    parser = commands.add_parser(
        'figures',
        help='draw the push-pull unit of a model: kernels, response to noise, spectra, alpha',
        description="Draw the figures of the paper for a model's own push-pull unit, each as PNG with its numbers as "
        'CSV: push and pull kernels, responses to an edge in noise, Fourier spectra, distribution of alpha.',
    )
    parser.add_argument('model', metavar='MODEL', help='any model name that timm.create_model takes')
    parser.add_argument('--output', required=True, metavar='FOLDER', help='folder of the PNG and CSV files')
    parser.add_argument('--seed', type=int, default=0, metavar='N', help='seed of the noise (default: %(default)s)')
    add_model_arguments(parser, "checkpoint of the model (default: timm's pretrained weights)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from ..robustness.inputs import load_model
    from ..viz.figures import draw_figures

    model = load_model(args.model, args.checkpoint, **model_options(args))
    name = f'{args.model}, {args.checkpoint}' if args.checkpoint else args.model
    for path in draw_figures(model, args.output, args.seed, name):
        print(path)
