"""Timing contenders side by side in one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Timing:
    """Median and quartiles of one contender's step, in seconds."""

    name: str
    seconds: list[float]

    @property
    def median(self) -> float:
        """Median of the steps."""
        return statistics.median(self.seconds)


def interleave(contenders: dict[str, Callable[[], Any]], repeats: int, warmup: int) -> list[Timing]:
    """Time the contenders in turn, so that whatever else the machine does falls on all of them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(warmup + repeats):
        for name, step in contenders.items():
            began = time.perf_counter()
            step()
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - began)
    return [Timing(name, steps) for name, steps in seconds.items()]


def matmul_flops() -> float:
    """FLOP/s of large float32 matrix products with the current threads: the ceiling of training."""
    import torch

    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    [timing] = interleave({"matmul": lambda: a @ b}, repeats=7, warmup=2)
    return 2 * 2048**3 / timing.median
