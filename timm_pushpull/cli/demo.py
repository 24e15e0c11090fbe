"""``timm-pushpull demo``."""

import argparse
import textwrap
from typing import Any


def add_to(commands: Any) -> None:
    parser = commands.add_parser(
        'demo',
        help='train a push-pull network and its baseline on digits, and compare them',
        description="Train pp_resnet18 and its plain baseline on scikit-learn's handwritten digits, measure both under "
        '15 corruptions, and write a page with the results. It takes about two minutes.',
    )
    parser.add_argument(
        '--output',
        default='pushpull-demo',
        metavar='FOLDER',
        help='folder of the weights, the results and the page; finished steps are not repeated (default: %(default)s)',
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from ..demo import NOTE, run_demo
    from .printing import print_comparisons, print_summary

    result = run_demo(args.output)
    print_summary(result.rows)
    print(textwrap.fill(NOTE, 100))
    print(f'Tables and plots: {result.report.resolve().as_uri()}')
    print_comparisons(result.results)
