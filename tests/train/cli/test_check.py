"""`sinkbed check gpu` rehearsed on the CPU, and what it says of steps that fail or are cut."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sinkbed.train.cli import check
from sinkbed.train.cli.check import Step
from sinkbed.train.cli.main import main
from tests.support import ROOT


@pytest.mark.slow
def test_every_step_runs_on_a_cpu_at_tiny_sizes(tmp_path):
    command = [sys.executable, "-m", "sinkbed", "check", "gpu", "--device", "cpu", "--workers", "2"]
    command += ["--out", str(tmp_path)]
    assert subprocess.run(command, cwd=ROOT).returncode == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    own = ("facts", "reruns", "training", "peers", "sweep")
    assert [summary[step]["status"] for step in own] == ["passed"] * len(own)
    assert {summary[tool]["status"] for tool in ("memcheck", "racecheck", "initcheck")} <= {"absent", "passed"}
    assert "skipped" in summary["tests"]["last line"], "there is no GPU"
    assert json.loads((tmp_path / "sweep.log").read_text().splitlines()[0])["kernel"] == "forward"


def test_a_step_that_fails_or_takes_too_long_stops_no_other(tmp_path, monkeypatch, capsys):
    def python(code):
        return (sys.executable, "-c", code)

    planned = [
        Step("wrong", 30, python("print('before'); assert False, 'another value'")),
        Step("endless", 1, python("import time; print('seen', flush=True); time.sleep(60)")),
        Step("missing", 30, ("no-such-sanitizer",)),
        Step("right", 30, python("print('well')")),
    ]
    monkeypatch.setattr(check, "steps", lambda *_: planned)
    assert main(["check", "gpu", "--device", "cpu", "--out", str(tmp_path)]) == 1
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {n: (s["status"], s["last line"]) for n, s in summary.items()} == {
        "wrong": ("failed", "AssertionError: another value"),
        "endless": ("cut", "seen"),
        "missing": ("absent", ""),
        "right": ("passed", "well"),
    }
    assert main(["check", "gpu", "--device", "cpu", "--out", str(tmp_path), "--seconds", "0"]) == 0
    assert "cut" in capsys.readouterr().out


def test_a_step_that_is_cut_ends_with_all_that_it_started(tmp_path):
    started = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import os, time; print(os.getpid(), "
    step = Step("deep", 2, (sys.executable, "-c", started + "flush=True); time.sleep(60)'])"))
    assert check._run(step, tmp_path / "log", step.seconds) == "cut"
    process = Path("/proc", (tmp_path / "log").read_text().strip(), "stat")
    end = time.monotonic() + 20
    while process.exists() and process.read_text().split()[2] != "Z" and time.monotonic() < end:
        time.sleep(0.05)
    assert not process.exists() or process.read_text().split()[2] == "Z"


def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["check", "gpu"]) == 1
    assert "check gpu: expected a GPU that torch can use, got none" in capsys.readouterr().err
