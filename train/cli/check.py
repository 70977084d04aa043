"""`sinkbed check gpu`: everything that a GPU alone can tell of the kernels, in eight minutes.

Each step is a process of its own with a time limit and a log; the summary is written after each, so that a check that
is cut short has said what it saw. It needs torch, triton, numpy and pytest, and a checkout, which has the tests.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from sinkbed.data.files import write_json

_CHECKOUT = Path(__file__).resolve().parents[2]


class Step(NamedTuple):
    """A step: what is run, and for how long at most."""

    name: str
    seconds: int
    command: tuple[str, ...]
    environment: dict[str, str] | None = None
    """Variables of its own."""


def steps(device: str, workers: int) -> list[Step]:
    """The cheapest evidence first; the sweep, which may be cut anywhere, last."""
    python = (sys.executable, "-m")

    def own(name: str) -> tuple[str, ...]:
        return (*python, "sinkbed", "check", "gpu", "--device", device, "--step", name)

    tests = (*python, "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", str(_CHECKOUT / "tests"))
    parallel = ("-n", str(workers)) if find_spec("xdist") else ()
    sanitizer = ("compute-sanitizer", "--error-exitcode", "1", "--tool")
    return [
        Step("facts", 60, own("facts")),
        Step("tests", 160, (*tests, *parallel)),
        Step("reruns", 40, own("reruns")),
        Step("training", 60, own("training")),
        Step("peers", 100, own("peers")),
        *(
            Step(tool, 40, (*sanitizer, tool, *own("touch")), {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
            for tool in ("memcheck", "racecheck", "initcheck")
        ),
        Step("sweep", 150, own("sweep")),
    ]


def run(command: str, argv: Sequence[str]) -> int:
    """Parse and run all steps, or one in this process. Exit status 1 where a step failed."""
    parser = argparse.ArgumentParser(prog=f"sinkbed {command}", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("what", choices=("gpu",))
    parser.add_argument("--out", type=Path, default=Path("runs/gpu-check"), help="folder of the logs and summary.json")
    parser.add_argument("--seconds", type=int, default=480, help="for all steps; the last ones are cut")
    parser.add_argument("--workers", type=int, default=8, help="processes of the tests, where there is pytest-xdist")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda",
        help="cpu: a rehearsal at tiny sizes in Triton's interpreter; says nothing of a GPU",
    )  # fmt: skip
    parser.add_argument("--step", help=argparse.SUPPRESS)
    arguments = parser.parse_args(list(argv))
    if arguments.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    if arguments.step:
        from sinkbed.train.bench import gpu

        sizes = gpu.FULL if arguments.device == "cuda" else gpu.REHEARSAL
        getattr(gpu, arguments.step)(arguments.device, sizes)
        return 0

    import torch

    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("check gpu: expected a GPU that torch can use, got none; --device cpu rehearses the steps")
    return _all(steps(arguments.device, arguments.workers), arguments.out, arguments.seconds)


def _all(planned: Sequence[Step], out: Path, seconds: int) -> int:
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + seconds
    summary: dict[str, dict[str, str | float]] = {}
    for step in planned:
        began = time.monotonic()
        status = _run(step, out / f"{step.name}.log", min(step.seconds, end - began))
        lines = (out / f"{step.name}.log").read_text(errors="replace").splitlines() or [""]
        summary[step.name] = {"status": status, "seconds": round(time.monotonic() - began, 1), "last line": lines[-1]}
        print(f"{step.name:10} {status:10} {summary[step.name]['seconds']:6} s  {lines[-1][:120]}", flush=True)
        write_json(out / "summary.json", summary, seal=False)
    return int(any(result["status"] == "failed" for result in summary.values()))


def _run(step: Step, log: Path, seconds: float) -> str:
    """Run a step with its output in a log: `passed`, `failed`, `cut` (out of time), or `absent` (no such program)."""
    environment = os.environ | (step.environment or {})
    with log.open("w") as file:
        if seconds <= 0:
            return "cut"
        try:
            process = subprocess.Popen(
                step.command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
        except FileNotFoundError:
            return "absent"
        try:
            return "failed" if process.wait(seconds) else "passed"
        except subprocess.TimeoutExpired:
            return "cut"
        finally:  # what it has started too: the next step is to have the GPU to itself
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
