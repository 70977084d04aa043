"""How this process computes on a CPU."""

import subprocess
import sys

import torch

from sinkbed.data.prepare.prepare import available_cores
from sinkbed.train.cli.main import main
from sinkbed.train.loop.cpu import use_cpu

SUBNORMAL = """
import torch
from sinkbed.train.loop.cpu import use_cpu
use_cpu(2)
product = torch.full((2**20,), 2e-38) * 0.1
print([int(half.view(torch.int32).count_nonzero()) for half in product.chunk(2)])
"""


def test_more_threads_than_cores_are_answered_with_a_word(fit, capsys):
    fit("--threads", "1000", "--trainer.precision", "16-mixed")
    assert "threads: 1000 share the" not in capsys.readouterr().err, "what is refused comes first"
    cores, before = available_cores(), torch.get_num_threads()
    try:
        use_cpu(1000)
        assert f"threads: 1000 share the {cores} core" in capsys.readouterr().err and torch.get_num_threads() == 1000
        use_cpu(cores)
        assert not capsys.readouterr().err
    finally:
        torch.set_num_threads(before)


def test_no_thread_computes_with_subnormal_numbers():
    assert subprocess.check_output([sys.executable, "-c", SUBNORMAL], text=True).split() == ["[0,", "0]"]


def test_training_and_measuring_take_subnormal_numbers_for_zero(fit):
    """As a process does in which nothing else has."""
    status, run_dir = fit()
    commands = (lambda: fit(run_dir="another")[0], lambda: main(["validate", str(run_dir)]))
    try:
        for command in (*commands, lambda: main(["probe", str(run_dir), "--sink_tokens", "16"])):
            torch.set_flush_denormal(False)
            assert torch.tensor(2e-38) * 0.1 != 0
            assert status == command() == 0
            assert torch.tensor(2e-38) * 0.1 == 0
    finally:
        torch.set_flush_denormal(True)
