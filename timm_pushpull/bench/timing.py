"""Time and memory of ways to do the same, measured alternately in one process and told as ratios."""

import contextlib
import csv
import io
import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from ..files import atomic_write

__all__ = ['Comparison', 'Ratio', 'compare', 'peak_bytes', 'seconds', 'write_comparisons']


class Comparison(NamedTuple):
    """Three ways to do one thing: medians over the rounds of ratios within a round, and their range."""

    what: str
    use: str
    """``'inference'``, or ``'training'``: forward and backward, of PRIME the call."""
    memory_format: str
    precision: str
    compiled: bool
    plain_seconds: float
    """Median time of timm's plain network, or of PRIME's floor."""
    time: float
    """Time over that."""
    time_low: float
    time_high: float
    reference_time: float
    """Time of the published formulation over that."""
    reference_time_low: float
    reference_time_high: float
    memory: float
    """Peak memory over that of the plain network or the floor."""
    reference_memory: float


class Ratio(NamedTuple):
    """Times of two ways to do the same, in seconds, and their ratio: the median and the range of the rounds."""

    name: str
    seconds: float
    reference_seconds: float
    median: float
    low: float
    high: float

    @classmethod
    def of(cls, name: str, times: Sequence[float], reference_times: Sequence[float]) -> 'Ratio':
        """Compare the times of the rounds, each with that of the reference in the same round.

        Args:
            name: What is compared.
            times: In seconds, one a round.
            reference_times: The same of the reference.

        Returns:
            Medians and range.
        """
        ratios = np.divide(times, reference_times)
        return cls(
            name,
            seconds=float(np.median(times)),
            reference_seconds=float(np.median(reference_times)),
            median=float(np.median(ratios)),
            low=float(ratios.min()),
            high=float(ratios.max()),
        )

    def in_words(self) -> str:
        return (
            f'{self.name}: {self.median:.2f} (from {self.low:.2f} to {self.high:.2f}; '
            f'medians {self.seconds:.2f} s over {self.reference_seconds:.2f} s)'
        )


def compare(
    ways: Mapping[str, Callable[[], Any]],
    device: str | torch.device,
    rounds: int,
    what: str,
    use: str = 'training',
    memory_format: str = 'nchw',
    precision: str = 'float32',
    compiled: bool = False,
) -> Comparison:
    """Measure three ways alternately, each round beginning with another one.

    Args:
        ways: Calls, named ``'plain'``, ``'ours'`` and ``'reference'``.
        device: Where they run.
        rounds: Alternations.
        what: For this and all that follow, see :class:`Comparison`.
        use: What for.
        memory_format: Of the images.
        precision: That is computed in.
        compiled: By ``torch.compile``.

    Returns:
        The comparison.
    """
    memory = {way: peak_bytes(call, device) for way, call in ways.items()}  # the first calls: they warm up as well
    times: dict[str, list[float]] = {way: [] for way in ways}
    order = list(ways)
    for _ in tqdm(range(rounds), desc=' '.join((what, use, memory_format)), leave=False):
        for way in order:
            times[way].append(seconds(ways[way], device))
        order = order[1:] + order[:1]  # what a call leaves in the caches is not always the same one's
    ratios = (Ratio.of(way, times[way], times['plain']) for way in ('ours', 'reference'))
    return Comparison(
        *(what, use, memory_format, precision, compiled, float(np.median(times['plain']))),
        *(value for ratio in ratios for value in (ratio.median, ratio.low, ratio.high)),
        *(memory[way] / memory['plain'] for way in ('ours', 'reference')),
    )


def write_comparisons(path: str | os.PathLike[str], comparisons: Sequence[Comparison]) -> None:
    """Write comparisons as CSV.

    Args:
        path: The file.
        comparisons: One a line.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator='\n')
    writer.writerow(Comparison._fields)
    writer.writerows([f'{value:.4f}' if isinstance(value, float) else value for value in row] for row in comparisons)
    atomic_write(path, text.getvalue().encode())


def seconds(work: Callable[[], Any], device: str | torch.device) -> float:
    """Time one call, until the device has done what it was given.

    Args:
        work: What is timed.
        device: Where it runs.

    Returns:
        Seconds.
    """
    start = time.perf_counter()
    work()
    if torch.device(device).type == 'cuda':
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def peak_bytes(work: Callable[[], Any], device: str | torch.device) -> int:
    """Measure the most memory that one call holds at a time beside what is there before.

    Args:
        work: What is measured.
        device: Where it runs. On a GPU it is the peak that PyTorch's allocator counts; on the CPU the highest sum of
            what the allocator gave out and took back, from the events of PyTorch's profiler.

    Returns:
        Bytes.
    """
    device = torch.device(device)
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
    with _silent_libraries(), profiler as profile:
        work()
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events = profile.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == '[memory]')
    return max(itertools.accumulate(change for _, change in changes))


@contextlib.contextmanager
def _silent_libraries() -> Iterator[None]:
    """Send standard error nowhere, below Python: the profiler's library tells there when it starts and stops."""
    kept = os.dup(2)
    with open(os.devnull, 'wb') as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
