"""Times of stem and networks over timm's plain networks and over the reference, most important first."""

import argparse
import itertools
from pathlib import Path

import torch

from timm_pushpull.bench.networks import bench_networks
from timm_pushpull.bench.prime import bench_prime
from timm_pushpull.bench.timing import seconds, write_comparisons

parser = argparse.ArgumentParser()
parser.add_argument('--output', type=Path)
parser.add_argument('--toy', action='store_true')
args = parser.parse_args()
DEVICE = 'cpu' if args.toy else 'cuda'
SIZE = dict(batch_size=2, img_size=32, rounds=1) if args.toy else dict(batch_size=256, img_size=224, rounds=9)
lines: list[str] = []
found: list = []
floor: dict[tuple[str, str], float] = {}  # seconds, by precision and use


def say(line):
    print(line)
    lines.append(line)
    (args.output / 'speed.txt').write_text('\n'.join(lines) + '\n')


def ceilings():
    """The two ceilings of the card: bandwidth of a copy, rate of a matrix product."""
    side, length = (256, 1 << 20) if args.toy else (8192, 1 << 32)
    source, target = (torch.empty(length, dtype=torch.uint8, device=DEVICE).random_() for _ in range(2))
    a, b = (torch.randn(side, side, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    rates = []
    for work, amount in ((lambda: target.copy_(source), 2 * length), (lambda: a @ b, 2 * side**3)):
        seconds(work, DEVICE)
        rates.append(amount / sorted(seconds(work, DEVICE) for _ in range(9))[4])
    say(f'copy {rates[0] / 1e12:.3f} TB/s, bfloat16 matrix product {rates[1] / 1e12:.1f} TFLOP/s')
    return rates[0]


def find_floor(bandwidth):
    """Find the least times of the stem's unit, which reads the images and writes the response.

    Backward it reads the gradient of the response, and the images again, in the data type of the response.
    """
    pixels = SIZE['batch_size'] * SIZE['img_size'] ** 2
    images, response = 3 * pixels, 64 * pixels // 4
    for precision, size in (('bfloat16', 2), ('float32', 4)):
        forward, backward = 4 * images + size * response, size * (images + response)
        floor[precision, 'inference'] = forward / bandwidth
        floor[precision, 'training'] = (forward + backward) / bandwidth


def bench(stem_only=False, **options):
    for row in bench_networks(**SIZE, device=DEVICE, **options):
        if stem_only and row.what != 'stem':
            return
        found.append(row)
        write_comparisons(args.output / 'speed.csv', found)
        way = 'compiled' if row.compiled else 'eager'
        counted = f'; unit at least {1e3 * floor[row.precision, row.use]:.2f} ms' if row.what == 'stem' else ''
        say(
            f'{row.what:9} {row.use:9} {row.precision:8} {row.memory_format} {way:8}: '
            f'{row.time_ratio:.3f} ({row.time_ratio_low:.3f} to {row.time_ratio_high:.3f}), '
            f'reference {row.reference_time_ratio:.3f}; plain {1e3 * row.plain_seconds:.2f} ms; '
            f'memory {row.memory_ratio:.2f}, {row.reference_memory_ratio:.2f}{counted}'
        )


def main():
    say(torch.cuda.get_device_name() if DEVICE == 'cuda' else 'CPU, toy sizes: these times say nothing')
    find_floor(ceilings())
    last = ['resnet18'] if args.toy else ['resnet50']
    bench(networks=last, amp=True, formats=['nhwc'])
    if args.toy:  # the rest differs by its options alone
        bench_prime(**SIZE)
        return
    bench(stem_only=True, networks=last, amp=True, torchcompile=True, formats=['nhwc'])
    prime = bench_prime(**SIZE, device=DEVICE)
    say(f'PRIME: {prime.time_ratio:.2f} of the floor, plain formulation {prime.reference_time_ratio:.2f}')
    bench(networks=['resnet18'], amp=True, formats=['nhwc'])
    bench(networks=last, formats=['nhwc'])
    for networks, amp in itertools.product((['resnet50'], ['resnet18']), (True, False)):
        bench(networks=networks, amp=amp, torchcompile=True, formats=['nhwc'])
    bench(networks=last, amp=True, formats=['nchw'])


main()
