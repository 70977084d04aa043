"""What benchmarks share: contenders timed side by side, turns in processes of their own, memory."""

import functools
import multiprocessing
import re
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from sinkbed.memory import keep_freed_memory

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Timing:
    """One contender's steps, in seconds."""

    name: str
    seconds: list[float]

    @property
    def median(self) -> float:
        """Median of the steps."""
        return statistics.median(self.seconds)


def interleave(
    contenders: dict[str, Callable[[], Any]],
    repeats: int,
    warmup: int,
    clock: Callable[[Callable[[], Any]], float] | None = None,
) -> list[Timing]:
    """Time the contenders in turn; `clock` gives the seconds of a call, None: as this process waits for it.

    Memory is kept between steps, as in training: waiting for pages made some of them a quarter longer, or not.
    """
    keep_freed_memory()
    steps = {name: functools.partial(clock or waited, step) for name, step in contenders.items()}
    return [Timing(name, seconds[warmup:]) for name, seconds in take_turns(steps, warmup + repeats).items()]


def take_turns(contenders: Mapping[str, Callable[[], _Result]], repeats: int) -> dict[str, list[_Result]]:
    """What each returns, in turn, so that whatever else the machine does falls on all of them alike."""
    results: dict[str, list[_Result]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, turn in contenders.items():
            results[name].append(turn())
    return results


def waited(step: Callable[[], Any]) -> float:
    """Seconds until a call returns."""
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def by_events(step: Callable[[], Any]) -> float:
    """Seconds that a call keeps the GPU busy, which spins first, so that the host is ahead of it."""
    import torch

    torch.cuda._sleep(1_000_000)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def in_new_process(function: Callable[..., _Result], *arguments: Any) -> _Result:
    """What `function` returns in a process of its own, which finds no other turn's caches or memory."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def memory_of_process(field: str) -> int:
    """Bytes that /proc/self/status gives under a name such as `RssAnon`; 0 where the system has no such file."""
    status = Path("/proc/self/status")
    line = re.search(rf"{field}:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return 1_024 * int(line[1]) if line else 0


def peak_bytes() -> int:
    """Peak of this process or of its largest child, whichever is more; 0 where the system does not tell."""
    # ru_maxrss of a new process begins at the size of the one that started it; VmHWM does not.
    own = memory_of_process("VmHWM")
    return max(own, 1_024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) if own else 0


def memory_of_tree(pid: int | str) -> int:
    """Bytes of a process and of all that it has started, pages that several share counted in parts."""
    try:
        below = " ".join(path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")).split()
        own = re.search(r"Pss:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text())
    except OSError:  # it has just ended
        return 0
    return (1_024 * int(own[1]) if own else 0) + sum(map(memory_of_tree, below))


def matmul_flops(dtype: str = "float32") -> float:
    """FLOP/s of large matrix products with the current threads: the ceiling of training."""
    import torch

    a, b = torch.randn(2, 2048, 2048, dtype=getattr(torch, dtype))
    [timing] = interleave({"matmul": lambda: a @ b}, repeats=7, warmup=2)
    return 2 * 2048**3 / timing.median
