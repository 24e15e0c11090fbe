"""Unit, kernels, PRIME, DDP and evaluation on a GPU beside float64 and the CPU: the tests that have a GPU part."""

import argparse
import sys
from pathlib import Path

import pytest
import torch

parser = argparse.ArgumentParser()
parser.add_argument('--output', type=Path)
parser.add_argument('--toy', action='store_true')
args = parser.parse_args()

tests = ['tests/test_gpu.py'] if args.toy else ['tests/test_gpu.py', 'tests/test_triton.py']
assert args.toy or torch.cuda.is_available(), 'PyTorch finds no GPU: use --toy'
options = ['-q', '-n', '0' if args.toy else '8', '-p', 'no:cacheprovider', '-m', 'not slow', '--tb=short', '-rs']
report = args.output / 'correctness.xml'
status = pytest.main([*options, f'--junitxml={report}', *tests])
(args.output / 'correctness.txt').write_text(f'correctness: {status.name}, details in {report.name}\n')
sys.exit(status)
