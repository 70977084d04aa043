"""Each command killed at the k-th change that it makes to the file system: run again, it ends as if never killed.

The long form is `pytest tests/train/cli/test_harness.py --kills 200`.
"""

import json
import os
import signal
import sys
from pathlib import Path

import pytest
import yaml

from sinkbed.train.cli.main import main
from sinkbed.train.run import directory
from tests.support.processes import FORKSERVER
from tests.support.runs import content, equal, points, training_state, write_run_config

pytestmark = pytest.mark.slow

CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link", "os.symlink", "os.chmod")


def _run(arguments, log, folder, number, counted):
    """Run a command in this process; before change `number` to a folder, or to what has its name with more before or
    after it, it is killed, else it counts them."""
    from sinkbed.train.cli.main import main

    changes, (above, name) = 0, os.path.split(folder)
    prefixes = (f"{above}/{name}", f"{above}/.{name}")

    def hook(event, details):
        nonlocal changes
        opened = event == "open" and isinstance(details[2], int) and details[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if not (opened or event in CHANGES) or not any(prefix in str(details[0]) for prefix in prefixes):
            return
        changes += 1
        if changes == number:
            os.kill(os.getpid(), signal.SIGKILL)

    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.addaudithook(hook)
    status = main(arguments)
    counted.send(changes)
    os._exit(status)


def run(arguments, log, folder, number=0):
    """Exit status of a command in a process of its own, and how many changes it made."""
    receiver, sender = FORKSERVER.Pipe(duplex=False)
    process = FORKSERVER.Process(target=_run, args=([*map(str, arguments)], str(log), str(folder), number, sender))
    process.start()
    sender.close()
    process.join(timeout=120)
    assert process.exitcode is not None, "hangs"
    try:
        changes = receiver.recv()
    except EOFError:  # killed
        changes = None
    receiver.close()
    return process.exitcode, changes


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_store):
    """A finished run, and a study with two finished arms."""
    folder = tmp_path_factory.mktemp("harness")
    config = write_run_config(folder / "run.yaml", tiny_store)
    options = ["--wandb.mode", "disabled", "--trainer.max_steps", "4"]
    assert main(["fit", "--config", str(config), "--run_dir", str(folder / "run"), *options]) == 0
    keys = yaml.safe_load(config.read_text())
    study = {"title": "T", "base": [keys], "arms": {"a": [], "b": [{"data": {"strategy": {"first_token": "none"}}}]}}
    (folder / "study.yaml").write_text(yaml.safe_dump(study))
    return folder


def same(command: str, one: Path, other: Path) -> None:
    """Whether two folders hold the result of one command; times and folders may differ."""
    if command in ("prepare", "export"):
        assert content(one) == content(other)
    elif command == "probe":
        assert content(one).keys() == content(other).keys()
        ours, theirs = (json.loads((folder / "probe.json").read_text()) for folder in (one, other))
        assert {**ours, "settings": 0, "checksum": 0} == {**theirs, "settings": 0, "checksum": 0}
    elif command == "report":
        assert content(one).keys() == content(other).keys()
        assert (one / "report/table.csv").read_bytes() == (other / "report/table.csv").read_bytes()
    else:
        runs = [Path(), *(path.relative_to(one) for path in one.glob("runs/*"))][1 if command == "study" else 0 :]
        assert len(runs) == (2 if command == "study" else 1)
        for run in runs:
            assert points(one / run) == points(other / run)
            assert equal(training_state(one / run, 10), training_state(other / run, 10))


def commands(made, tiny_store):
    """command -> (arguments for a folder, what it made there)."""
    fit = ["--config", made / "run.yaml", "--ckpt_path", "auto"]
    documents = tiny_store.parent / "docs.jsonl"
    prepare = ["--source.kind", "jsonl", "--source.files", documents, "--tokenizer.vocab_size", "300", "--quiet",
               "--shard_bytes", "4000", "--workers", "1"]  # fmt: skip
    probe = ["--measure", "sinks", "rank", "--sink_tokens", "16", "--documents", "4", "--mixing_documents", "2"]
    return {
        "fit": lambda out: ["fit", *fit, "--run_dir", out],
        "prepare": lambda out: ["prepare", *prepare, "--out", out],
        "export": lambda out: ["export", made / "run", "--out", out],
        "probe": lambda out: ["probe", made / "run", *probe, "--out", out],
        "study": lambda out: ["study", made / "study.yaml", "--out", out, "--quiet", "--workers", "2"],
        "report": lambda out: ["report", made / "run", "--out", out],
    }


@pytest.mark.parametrize("command", ["fit", "prepare", "export", "probe", "study", "report"])
def test_killed_at_any_change_of_a_file_and_run_again_it_ends_the_same(command, made, tiny_store, tmp_path, request):
    arguments = commands(made, tiny_store)[command]
    log = tmp_path / "log"
    status, changes = run(arguments(tmp_path / "whole"), log, tmp_path / "whole")
    assert status == 0 and changes > 3, log.read_text()
    whole = (tmp_path / "whole").absolute()
    kills = request.config.getoption("--kills") // (8 if command == "study" else 4)
    for kill in range(kills):
        out = tmp_path / f"cut{kill}"
        number = 1 + (changes - 1) * (2 * kill + 1) // (2 * kills)
        killed = tmp_path / "killed"  # where children that were being forked may say that their parent is gone
        status, _ = run(arguments(out), killed, out, number)
        assert status in (-signal.SIGKILL, 0), killed.read_text()
        status, _ = run(arguments(out), log, out)
        text = log.read_text()
        assert "Traceback" not in text, text
        if status:  # the killed one had made it whole, which its message says
            assert command in ("export", "probe") and f"--out {out}" in text, text
        same(command, whole, out)
        hidden = [path for path in out.rglob(".*") if path.name != directory.LOCK]
        assert not hidden and not [path for path in tmp_path.glob(".*")], f"litter after change {number}"
