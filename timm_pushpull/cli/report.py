"""``timm-pushpull report``."""

import argparse
from pathlib import Path
from typing import Any

from .arguments import BASELINE_HELP


def add_to(commands: Any) -> None:
    parser = commands.add_parser(
        'report',
        help='write a page with tables and plots of measured robustness',
        description='Write a page with the tables and plots of results folders of timm-pushpull robustness.',
    )
    parser.add_argument('results', nargs='+', metavar='RESULTS', help='results folders, or one summary.csv')
    parser.add_argument(
        '--output',
        metavar='FOLDER',
        help='folder of the page (default: RESULTS/report, or NAME_report beside NAME.csv)',
    )
    parser.add_argument('--baseline', metavar='MODEL', help=BASELINE_HELP)
    parser.add_argument(
        '--pairs',
        nargs='+',
        default=(),
        metavar='FROM:TO',
        help='models to compare, or their names before the @ of training runs: a table of differences, TO minus FROM, '
        'and a plot with arrows',
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from ..robustness.report import write_report

    first = Path(args.results[0])
    output = args.output or (first.with_name(f'{first.stem}_report') if first.is_file() else first / 'report')
    print(write_report(args.results, output, args.baseline, pairs=args.pairs))
