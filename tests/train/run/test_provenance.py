"""Every run says what made it, and the report says it of all."""

import shutil
import subprocess
import sys

import torch

from sinkbed.train.run import directory, provenance

MADE = {"sinkbed": "1.2", "commit": "abc", "changed": False, "torch": "2.13.0", "device": "CPU", "threads": 1}


def test_a_run_records_it_and_a_resumed_one_each_machine_once(fit, monkeypatch):
    _, folder = fit("--trainer.max_steps", "10", run_dir="run")
    here = provenance.provenance(torch.device("cpu"))
    assert directory.read_json(folder / directory.RUN)["made_by"] == [here]
    assert here["torch"] == torch.__version__ and here["threads"] == torch.get_num_threads()
    assert torch.backends.cpu.get_cpu_capability() in here["device"]
    assert here["processes"] == 1
    monkeypatch.setattr(provenance, "_cpu", lambda: "another")
    there = {**here, "device": "another"}
    for _ in range(2):
        (folder / directory.MEASUREMENT).unlink()  # killed before its end
        assert fit("--ckpt_path", "last", run_dir="run")[0] == 0
        assert directory.read_json(folder / directory.RUN)["made_by"] == [here, there]
    monkeypatch.setattr(provenance, "_cpu", lambda: "a third")
    # Back before the other machine's part, which is made again: it made nothing that is left.
    early = min((folder / directory.CHECKPOINTS).glob("step-*.ckpt"))
    assert fit("--ckpt_path", str(early), run_dir="run")[0] == 0
    assert directory.read_json(folder / directory.RUN)["made_by"] == [here, {**here, "device": "a third"}]


def test_a_run_that_starts_again_before_its_first_checkpoint_is_made_by_the_second_start(fit, monkeypatch):
    _, folder = fit("--trainer.max_steps", "10", run_dir="run")
    shutil.rmtree(folder / directory.CHECKPOINTS)
    (folder / directory.MEASUREMENT).unlink()
    monkeypatch.setattr(provenance, "_cpu", lambda: "another")
    assert fit("--trainer.max_steps", "10", run_dir="run")[0] == 0
    assert [made["device"] for made in directory.read_json(folder / directory.RUN)["made_by"]] == ["another"]


def test_the_sentence_names_each_maker_once():
    other = {**MADE, "commit": None, "changed": True, "device": "GPU", "threads": 2, "processes": 8}
    assert provenance.describe([]) == ""
    first = "Made by sinkbed 1.2 at commit abc, torch 2.13.0, on CPU, 1 thread"
    assert provenance.describe([MADE, MADE]) == f"{first}."
    assert provenance.describe([MADE], silent=1).startswith(f"{first} (1 run says nothing of it")
    assert provenance.describe([MADE], silent=3).startswith(f"{first} (3 runs say nothing of it")
    second = "sinkbed 1.2 (changed), torch 2.13.0, on GPU, 8 processes of 2 threads"
    assert provenance.describe([MADE, other, MADE]) == f"{first}; and by {second}."


def test_commit_and_changes_are_those_of_the_checkout_the_code_is_in(tmp_path):
    def commit_of(root):
        show = "import runpy; p = runpy.run_path('train/run/provenance.py'); print(p['_COMMIT'], p['_CHANGED'])"
        return subprocess.run(
            [sys.executable, "-c", show], cwd=root, check=True, capture_output=True, text=True
        ).stdout.split()

    def git(*arguments):
        who = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        run = subprocess.run(["git", "-C", root, *who, *arguments], check=True, capture_output=True, text=True)
        return run.stdout.strip()

    root = tmp_path / "checkout"
    (root / "train/run").mkdir(parents=True)
    shutil.copy(provenance.__file__, root / "train/run/provenance.py")
    git("init", "--quiet", "..")
    assert commit_of(root) == ["None", "False"], "a repository further up is not ours"
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--message", "first")
    assert commit_of(root) == [git("rev-parse", "--short=12", "HEAD"), "False"]
    (root / "README.md").write_text("decides nothing\n")
    assert commit_of(root)[1] == "False"
    (root / "train" / "new.py").write_text("")
    assert commit_of(root)[1] == "True"
