"""Every run says what made it, and the report says it of all."""

import shutil
import subprocess
import sys

import torch

from train import provenance, rundir

MADE = {"sinkbed": "1.2", "commit": "abc", "changed": False, "torch": "2.13.0", "device": "CPU", "threads": 1}


def test_a_run_records_it_and_a_resumed_one_each_machine_once(fit, monkeypatch):
    _, folder = fit("--trainer.max_steps", "10", run_dir="run")
    here = provenance.provenance(torch.device("cpu"))
    assert rundir.read_json(folder / rundir.RUN)["made_by"] == [here]
    assert here["torch"] == torch.__version__ and here["threads"] == torch.get_num_threads()
    assert torch.backends.cpu.get_cpu_capability() in here["device"]
    (folder / rundir.MEASUREMENT).unlink()  # killed before its end
    for name in ("another", "another"):
        monkeypatch.setattr(provenance, "_cpu", lambda name=name: name)
        assert fit("--ckpt_path", "last", run_dir="run")[0] == 0
        (folder / rundir.MEASUREMENT).unlink()
    assert rundir.read_json(folder / rundir.RUN)["made_by"] == [here, {**here, "device": "another"}]


def test_the_sentence_names_what_differs_once():
    other = {**MADE, "commit": None, "device": "GPU", "threads": 2}
    assert provenance.describe([]) == ""
    assert provenance.describe([MADE, MADE]) == (
        "Made by sinkbed 1.2 at commit abc, torch 2.13.0, on CPU, 1 thread a run."
    )
    assert provenance.describe([MADE], silent=3).endswith("1 thread a run (3 runs of an earlier version do not say).")
    assert provenance.describe([MADE, {**other, "changed": True}]) == (
        "Made by sinkbed 1.2 at commit abc and 1.2 (changed), torch 2.13.0, on CPU and GPU, 1 and 2 threads a run."
    )


def test_commit_and_changes_are_those_of_the_checkout_the_code_is_in(tmp_path):
    def commit_of(root):
        show = "from train import provenance as p; print(p._COMMIT, p._CHANGED)"
        return subprocess.run(
            [sys.executable, "-c", show], cwd=root, check=True, capture_output=True, text=True
        ).stdout.split()

    def git(*arguments):
        who = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        run = subprocess.run(["git", "-C", root, *who, *arguments], check=True, capture_output=True, text=True)
        return run.stdout.strip()

    root = tmp_path / "checkout"
    (root / "train").mkdir(parents=True)
    for name in ("__init__.py", "provenance.py"):
        shutil.copy(provenance.ROOT / "train" / name, root / "train" / name)
    git("init", "--quiet", "..")
    assert commit_of(root) == ["None", "False"], "a repository further up is not ours"
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--message", "first")
    assert commit_of(root) == [git("rev-parse", "--short=12", "HEAD"), "False"]
    (root / "train" / "__init__.py").write_text("# changed\n")
    assert commit_of(root)[1] == "True"
