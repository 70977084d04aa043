"""How this process computes on a CPU."""

import sys

import torch

from sinkbed.data.prepare.prepare import available_cores
from sinkbed.plain_text import counted
from sinkbed.ranges import check_number


def use_cpu(threads: int | None) -> None:
    """Have torch compute with so many threads, where a number is given, and take subnormal numbers for zero.

    Those are nearer to zero than 1.2e-38. Weights of attention, and their gradients most of all, become so small once
    a model has sinks, and Intel's CPUs take over a hundred cycles for each: a training step of the demo took 1.7 times
    as long. Threads that torch started earlier are not changed, so this comes before any work. A word to the user where
    the threads are more than the cores. Raises ValueError for fewer than one.
    """
    torch.set_flush_denormal(True)
    if threads is None:
        return
    check_number("threads", threads, least=1)
    if threads > (cores := available_cores()):
        line = f"threads: {threads} share the {counted(cores, 'core')} of this process, which is slower than {cores}"
        print(line, file=sys.stderr)
    torch.set_num_threads(threads)
