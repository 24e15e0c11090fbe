"""Train pp_ networks beside their plain twins with timm's train.py, then measure the robustness of all that ended.

Reads the parts of pack_images.py in $PARTS and its folders, and timm's scripts in $TIMM_SCRIPTS.
"""

import argparse
import csv
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from pack_images import pack, unpack
from PIL import Image
from safetensors.torch import save_file

from timm_pushpull import load_model

START = time.monotonic()
parser = argparse.ArgumentParser()
parser.add_argument('--output', type=Path)
parser.add_argument('--toy', action='store_true')
args = parser.parse_args()
SCRIPT = Path(os.environ.get('TIMM_SCRIPTS', '.gpu/timm')) / 'train.py'
SECONDS = 420  # of .ci/gpu
FOR_ROBUSTNESS = 110  # seconds kept for the end
FILE_BYTES = 15 << 20  # a file that comes back has at most 16 MiB
FILES = 4  # of weights
# For the H100: half precision, channels_last.
RECIPE = (
    '--opt sgd --momentum 0.9 --weight-decay 5e-4 --sched cosine --sched-on-updates --smoothing 0.1 --scale 0.35 1 '
    '--color-jitter 0 --crop-pct 1 --warmup-lr 0.01 --min-lr 0 --amp --amp-dtype bfloat16 --channels-last '
).split()
SIZE = (
    '--input-size 3 32 32 --batch-size 8 --epochs 1 --warmup-epochs 0 --lr 0.01 --device cpu --workers 1'
    if args.toy
    else '--input-size 3 160 160 --batch-size 256 --epochs 16 --warmup-epochs 2 --lr 0.4 --device cuda --workers 14'
).split()
CLI = 'import sys; from timm_pushpull.cli import main; sys.exit(main())'  # not installed on the lent machine
lines: list[str] = []


def say(line):
    print(line, flush=True)
    lines.append(line)
    (args.output / 'training.txt').write_text('\n'.join(lines) + '\n')


def draw_images(folder):
    """Bright and dark noise, for the toy."""
    generator = torch.Generator().manual_seed(0)
    for split, count in (('train', 16), ('val', 4)):
        for label, low in (('dark', 0), ('light', 96)):
            (folder / split / label).mkdir(parents=True)
            for index in range(count):
                pixels = torch.randint(low, low + 160, (48, 40, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(folder / split / label / f'{index}.png')


def train(name, network, plain, seed, data, runs):
    kwargs = ['--model-kwargs', 'push_pull=False'] if plain else []
    command = [sys.executable, '-P', SCRIPT, '--device-modules', 'timm_pushpull', '--data-dir', data, '--output', runs]
    command += ['--experiment', name, '--model', network, '--num-classes', str(classes(data)), '--seed', str(seed)]
    command += [*RECIPE, *SIZE, *kwargs, '--log-interval', '50']
    with open(args.output / 'train.log', 'a') as log:
        subprocess.run(list(map(str, command)), check=True, stdout=log, stderr=log)
    with open(runs / name / 'summary.csv') as file:
        *_, last = csv.DictReader(file)
    return float(last['eval_top1'])


def classes(data):
    return len(list((data / 'train').iterdir()))


def keep_weights(checkpoint, network, name):
    """Save the weights in half precision, in files that are small enough to come back."""
    state = {
        key: value.half() if value.is_floating_point() else value
        for key, value in load_model(network, checkpoint).state_dict().items()
    }
    parts, size = [{}], 0
    for key, value in state.items():
        bytes_ = value.numel() * value.element_size()
        if size + bytes_ > FILE_BYTES:
            parts.append({})
            size = 0
        parts[-1][key] = value.contiguous()
        size += bytes_
    output = Path(os.environ['OUT'])
    if len(list(output.glob('*.safetensors'))) + len(parts) > FILES:
        return
    for number, part in enumerate(parts):
        save_file(part, output / f'{name}-{number}.safetensors')


def main(work):
    parts, data, runs = Path(os.environ.get('PARTS', '.')), work / 'data', work / 'runs'
    if args.toy:
        draw_images(work / 'drawn')
        parts = work / 'parts'
        pack(work / 'drawn', parts, side=36, part_mib=0.05)
    count = unpack(parts, data)
    say(f'{count} training images of {classes(data)} classes after {time.monotonic() - START:.0f} s')
    if args.toy and not SCRIPT.exists():
        return say("no training: set TIMM_SCRIPTS to a checkout of timm's repository")
    ended, took = [], {}
    networks = ('pp_resnet18',) if args.toy else ('pp_resnet18', 'pp_resnet50')
    for seed in (1,) if args.toy else (1, 2, 3):
        for network in networks:
            for plain in (False, True):
                name = f'{network.removeprefix("pp_") if plain else network}-{seed}'
                start = time.monotonic()
                # Only pairs say something: the first of a pair starts where both will end in time.
                left = SECONDS - FOR_ROBUSTNESS - (start - START)
                if (2 - plain) * took.get(network, 0) > left:
                    say(f'{name}: no time')
                    break
                top1 = train(name, network, plain, seed, data, runs)
                took[network] = time.monotonic() - start
                say(f'{name}: top-1 {top1:.2f} %, {took[network]:.0f} s')
                ended.append((name, network, runs / name / 'last.pth.tar'))
                keep_weights(ended[-1][2], network, name)
    command = [sys.executable, '-c', CLI, 'robustness', *(f'{name}={net}' for name, net, _ in ended)]
    command += [
        '--checkpoint',
        *(path for *_, path in ended),
        '--data-dir',
        data,
        '--output',
        args.output / 'robustness',
    ]
    if args.toy:
        command += ['--limit', '4', '--corruptions', 'gaussian_noise', 'fog', '--severities', '3']
    else:
        command += ['--device', 'cuda', '--workers', '14', '--batch-size', '256', '--amp', '--limit', '500']
    start = time.monotonic()
    subprocess.run(list(map(str, command)), check=True)
    say(f'robustness of {len(ended)} networks: {time.monotonic() - start:.0f} s, in {args.output / "robustness"}')


with tempfile.TemporaryDirectory() as folder:
    main(Path(folder))
