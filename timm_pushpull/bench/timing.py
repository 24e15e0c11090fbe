"""Time and memory of several implementations, measured in turns in one process and given as ratios."""

import contextlib
import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from ..errors import InputError
from ..files import write_table

__all__ = ['Comparison', 'check_device', 'compare', 'peak_bytes', 'ratio', 'seconds', 'write_comparisons']


class Comparison(NamedTuple):
    """Ours and the reference over timm's plain network: median and range, over the rounds, of the ratios in a round."""

    what: str
    use: str
    """``'inference'``, ``'training'`` (forward and backward) or ``'augment'`` (one call of PRIME)."""
    memory_format: str
    precision: str
    compiled: bool
    plain_seconds: float
    """Median time of the plain network, or of PRIME's floor."""
    time_ratio: float
    """Time of ours over that of the plain network."""
    time_ratio_low: float
    time_ratio_high: float
    reference_time_ratio: float
    """Time of the reference over that of the plain network."""
    reference_time_ratio_low: float
    reference_time_ratio_high: float
    memory_ratio: float
    """Peak memory of ours over that of the plain network."""
    reference_memory_ratio: float


def ratio(times: Sequence[float], reference_times: Sequence[float]) -> tuple[float, float, float]:
    """Compare the time of each round with the time of the reference in the same round.

    Args:
        times: Times in seconds, one for each round.
        reference_times: Times of the reference in seconds, one for each round.

    Returns:
        Median, lowest and highest of the ratios.
    """
    ratios = np.divide(times, reference_times)
    return float(np.median(ratios)), float(ratios.min()), float(ratios.max())


def compare(
    calls: Mapping[str, Callable[[], Any]],
    device: str | torch.device,
    rounds: int,
    what: str,
    use: str = 'training',
    memory_format: str = 'nchw',
    precision: str = 'float32',
    compiled: bool = False,
) -> Comparison:
    """Measure three calls in turns; each round starts with another call.

    Args:
        calls: Calls named ``'plain'``, ``'ours'`` and ``'reference'``.
        device: Device of the calls.
        rounds: Number of rounds.
        what: Network, or part of one.
        use: ``'inference'``, ``'training'`` or ``'augment'``.
        memory_format: ``'nchw'`` or ``'nhwc'``.
        precision: Name of the data type.
        compiled: True for calls compiled by ``torch.compile``.

    Returns:
        The comparison.
    """
    memory = {name: peak_bytes(call, device) for name, call in calls.items()}
    for call in calls.values():  # the first round on an idle GPU took twice as long as the others
        seconds(call, device)
    times: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    for _ in tqdm(range(rounds), desc=' '.join((what, use, memory_format)), leave=False):
        for name in order:
            times[name].append(seconds(calls[name], device))
        order = order[1:] + order[:1]  # so that no call always finds the caches of the same predecessor
    return Comparison(
        *(what, use, memory_format, precision, compiled, float(np.median(times['plain']))),
        *(value for name in ('ours', 'reference') for value in ratio(times[name], times['plain'])),
        *(memory[name] / memory['plain'] for name in ('ours', 'reference')),
    )


def write_comparisons(path: str | os.PathLike[str], comparisons: Sequence[Comparison]) -> None:
    """Write comparisons as CSV, one for each line."""
    rows = ([f'{value:.4f}' if isinstance(value, float) else value for value in row] for row in comparisons)
    write_table(path, Comparison._fields, rows)


def check_device(device: str | torch.device) -> None:
    """Raise ``ValueError`` unless PyTorch can use the device."""
    try:
        torch.zeros(0, device=device)
    except (AssertionError, RuntimeError) as error:
        raise InputError(f'device must be usable by PyTorch, {device} is not: {str(error).splitlines()[0]}') from None


def seconds(work: Callable[[], Any], device: str | torch.device) -> float:
    """Time one call, until the device has finished its work, in seconds."""
    start = time.perf_counter()
    work()
    if torch.device(device).type == 'cuda':
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def peak_bytes(work: Callable[[], Any], device: str | torch.device) -> int:
    """Measure the peak memory of one call, beyond the memory in use before it.

    Args:
        work: Call to measure.
        device: Device of the call. On a GPU PyTorch's allocator counts the peak; on a CPU it is the largest running sum
            of the allocations and releases that PyTorch's profiler records.

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
    """Discard standard error, below Python: the profiler's library writes there when it starts and stops."""
    kept = os.dup(2)
    with open(os.devnull, 'wb') as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
