"""``timm-pushpull bench``."""

import argparse
import functools
import itertools
from collections.abc import Iterator
from typing import Any


def add_to(commands: Any) -> None:
    bench = commands.add_parser(
        'bench',
        help='measure speed and memory, as ratios within one run',
        description="Compare time and memory of the push-pull networks with timm's plain networks and with the "
        'reference, and PRIME with its plain formulation.',
    )
    benches = bench.add_subparsers(metavar='[WHAT]', title='parts (default: networks in every mode, then prime)')
    networks = benches.add_parser('networks', help="push-pull networks compared with timm's plain networks")
    networks.add_argument('--amp', action='store_true', help='bfloat16 autocast')
    networks.add_argument('--torchcompile', action='store_true', help='compile the networks')
    networks.set_defaults(run=run_networks)
    prime = benches.add_parser('prime', help='PRIME compared with its plain formulation')
    prime.add_argument('--preset', default='imagenet', metavar='NAME', help='imagenet or cifar (default: %(default)s)')
    prime.set_defaults(run=run_prime)
    bench.set_defaults(run=run, output=None)
    for parser in (bench, networks, prime):
        # SUPPRESS, because a default would replace what was given before WHAT.
        option = functools.partial(parser.add_argument, default=argparse.SUPPRESS)
        if parser in (bench, networks):
            option('--networks', nargs='+', metavar='NAME', help='plain networks (default: resnet18 resnet50)')
        option('--img-size', type=int, metavar='N', help='side of the images, in pixels (default: 224)')
        option('--output', metavar='FILE', help='CSV file of all numbers')
        option('--batch-size', type=int, metavar='N', help='images in a batch (default: 16)')
        option('--rounds', type=int, metavar='N', help='repetitions (default: 6)')
        option('--device', help='device of the networks (default: cpu)')


def run(args: argparse.Namespace) -> None:
    modes = itertools.product((False, True), repeat=2)
    networks = (row for amp, torchcompile in modes for row in _compare_networks(args, amp, torchcompile))
    _print_comparisons(args, itertools.chain(networks, _compare_prime(args, 'imagenet')))


def run_networks(args: argparse.Namespace) -> None:
    _print_comparisons(args, _compare_networks(args, args.amp, args.torchcompile))


def run_prime(args: argparse.Namespace) -> None:
    _print_comparisons(args, _compare_prime(args, args.preset))


def _given(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    return {name: getattr(args, name) for name in names if name in args}


def _compare_networks(args: argparse.Namespace, amp: bool, torchcompile: bool) -> Iterator[Any]:
    from ..bench.networks import bench_networks

    options = _given(args, 'networks', 'batch_size', 'img_size', 'rounds', 'device')
    yield from bench_networks(amp=amp, torchcompile=torchcompile, **options)


def _compare_prime(args: argparse.Namespace, preset: str) -> Iterator[Any]:
    from ..bench.prime import bench_prime

    yield bench_prime(preset=preset, **_given(args, 'batch_size', 'img_size', 'rounds', 'device'))


def _print_comparisons(args: argparse.Namespace, comparisons: Iterator[Any]) -> None:
    from ..bench.timing import write_comparisons

    found: list[Any] = []
    last = None
    for row in comparisons:
        if not found:
            print(
                "Median time (range) of ours and of the reference, and peak memory of both, over timm's plain network."
            )
            print('PRIME: over one copy of each image for each step that PRIME draws. nhwc is channels_last.')
        found.append(row)
        title = f'{row.precision}, {"compiled" if row.compiled else "eager"}'
        if title != last:
            print(f'\n{title:<31} {"ours":>19} {"reference":>19}  memory')
        last = title
        ours = f'{row.time_ratio:.2f} ({row.time_ratio_low:.2f} to {row.time_ratio_high:.2f})'
        low, high = row.reference_time_ratio_low, row.reference_time_ratio_high
        reference = f'{row.reference_time_ratio:.2f} ({low:.2f} to {high:.2f})'
        memory = f'{row.memory_ratio:.2f}, {row.reference_memory_ratio:.2f}'
        print(f'{row.what:<15} {row.use:<10} {row.memory_format} {ours:>19} {reference:>19}  {memory}')
        if args.output:
            write_comparisons(args.output, found)
