"""One bit flipped in every file that is written: what reads it gives the same result, or one message that names it.

More places of every file: `pytest tests/train/cli/test_flipped_files.py --kills 200`.
"""

import contextlib
import csv
import fnmatch
import io
import json
import random
import re
import shutil
from types import SimpleNamespace

import pytest
import yaml

from sinkbed.data.prepare.chunks import Chunks
from sinkbed.train.cli.main import main
from sinkbed.train.run.checkpoint import load_checkpoint
from sinkbed.train.run.wandb_files import read_wandb_file
from tests.support.runs import Killed, content, equal, killed_at, points, training_state, write_run_config

pytestmark = pytest.mark.slow

# What reads a file, by its place; the first pattern that fits counts. Empty: nothing of ours does.
READERS = {
    "*/wandb/*/run-*.wandb": "resume",
    "*/wandb/*": "",  # logs, and what `wandb sync` takes
    "store/manifest.json": "check prepare resume validate probe export",
    "store/tokenizer.json": "check prepare resume validate probe export",
    "store/train/*.arrow": "check prepare resume",
    "store/validation/*.arrow": "check prepare resume validate probe",
    "store/packing/*.arrow": "resume",
    ".begun.partial/*": "begun",
    "stopped/config.yaml": "resume validate_stopped",
    "stopped/run.json": "resume validate_stopped",
    "stopped/manifest.json": "resume",
    "stopped/audit.json": "resume",
    "stopped/metrics.jsonl": "resume",
    "stopped/checkpoints/*": "resume validate_stopped",
    "finished/*.json": "report validate probe export resume_finished",
    "finished/config.yaml": "report validate probe export resume_finished",
    "finished/metrics.jsonl": "report validate probe export resume_finished",
    "finished/checkpoints/*": "validate probe export resume_finished",
    "study/runs/*/fit.log": "",
    "study/runs/*/checkpoints/*": "",  # of a finished run, as above
    "study/runs/a-*": "",  # as those of the other arm
    "study/runs/b-*": "study report_study",
    "study/summary.json": "study",
    "study/report/*": "",
    "probe/probe.json": "probe_again",
    "probe/*": "",
    "export/*": "probe_export",
}


def classify(name):
    """Pattern and commands of a file."""
    pattern = next((pattern for pattern in READERS if fnmatch.fnmatch(name, pattern)), None)
    assert pattern is not None, f"{name}: a new kind of file; classify it in READERS"
    other = pattern == "*/wandb/*/run-*.wandb" and not name.startswith("stopped")  # read when a run goes on
    return pattern, () if other else READERS[pattern].split()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Every kind of file below one folder, and a copy of it all as it was."""
    root = tmp_path_factory.mktemp("flipped") / "made"
    root.mkdir()
    words = ["sink", "bos", "row", "token", "mask", "head", "layer", "mass", "first", "key"]
    with (root.parent / "docs.jsonl").open("w") as file:
        for i in range(120):
            text = " ".join(words[(i * 7 + j * j + j * i) % 10] for j in range(10 + (i * 13) % 60))
            file.write(json.dumps({"text": f"{i}: {text}."}) + "\n")
    assert call(root, "first")[0] == 0
    with pytest.MonkeyPatch.context() as patch:
        finish = Chunks.finish

        def finish_two(self, number, gathered):
            if number == 2:
                raise Killed
            finish(self, number, gathered)

        patch.setattr(Chunks, "finish", finish_two)
        with pytest.raises(Killed):
            call(root, "begun")
    config = write_run_config(root.parent / "run.yaml", root / "store")
    fit = ["fit", "--config", str(config), "--data.strategy.packing", "best_fit"]
    assert main([*fit, "--run_dir", str(root / "finished")]) == 0
    with killed_at(7):
        main([*fit, "--run_dir", str(root / "stopped")])
    keys = yaml.safe_load(config.read_text())
    del keys["run_dir"]
    study = {"title": "T", "base": [keys], "arms": {"a": [], "b": [{"data": {"strategy": {"first_token": "none"}}}]}}
    (root.parent / "study.yaml").write_text(yaml.safe_dump(study))
    for name in ("study", "probe_first", "export_first"):
        status, said = call(root, name)
        assert status == 0, said
    shutil.copytree(root, root.with_name("whole"), symlinks=True)
    return root


def arguments(root):
    """command -> its arguments."""
    out = root.parent / "out"
    documents = [
        "--source.kind",
        "jsonl",
        "--source.files",
        root.parent / "docs.jsonl",
        "--tokenizer.vocab_size",
        "300",
    ]
    prepare = ["prepare", *documents, "--validation_share", "0.1", "--quiet", "--workers", "1"]
    probe = ["--measure", "sinks", "--sink_tokens", "16", "--documents", "2", "--modes", "bos"]
    prompts = ["--prompts", root.parent / "docs.jsonl", "--length", "40"]
    return {
        "first": [*prepare, "--out", root / "store"],
        "begun": [*prepare, "--shard_bytes", "4000", "--out", root / "begun"],
        "check": ["prepare", "--check", root / "store"],
        "prepare": [*prepare, "--out", root / "store"],
        "resume": ["fit", "--config", root / "stopped/config.yaml", "--ckpt_path", "last"],
        "resume_finished": ["fit", "--config", root / "finished/config.yaml", "--ckpt_path", "last"],
        "validate": ["validate", root / "finished", "--json", out / "measured.json"],
        "validate_stopped": ["validate", root / "stopped", "--json", out / "measured.json"],
        "probe": ["probe", root / "finished", *probe, "--json", out / "measured.json"],
        "probe_first": ["probe", root / "finished", *probe, "--out", root / "probe"],
        "probe_again": ["probe", root / "finished", *probe, "--out", root / "probe", "--force"],
        "probe_export": ["probe", root / "export", *probe, *prompts, "--json", out / "measured.json"],
        "report": ["report", root / "finished", "--out", out],
        "report_study": ["report", root.parent / "study.yaml", "--out", root / "study"],
        "export": ["export", root / "finished", "--out", out / "export"],
        "export_first": ["export", root / "finished", "--out", root / "export"],
        "study": ["study", root.parent / "study.yaml", "--out", root / "study", "--quiet", "--workers", "2"],
    }


def result(root, command):
    """What a command made, without times and names that W&B draws."""
    out = root.parent / "out"
    if command in ("check", "prepare"):
        return {name: digest for name, digest in content(root / "store").items() if not name.startswith("packing")}
    if command == "begun":
        return content(root / "begun")
    if command in ("resume", "resume_finished"):
        run = root / ("stopped" if command == "resume" else "finished")
        rows = [r["_step"] for file in sorted(run.glob("wandb/offline-*/*.wandb")) for r in read_wandb_file(file)]
        modes = json.loads((run / "measurement.json").read_text())["modes"]
        return points(run), training_state(run, 10), modes, rows
    if command.startswith(("validate", "probe_export")) or command == "probe":
        return {k: v for k, v in json.loads((out / "measured.json").read_text()).items() if k != "settings"}
    if command == "probe_again":
        return content(root / "probe")
    if command == "export":
        return content(out / "export")
    return ((out if command == "report" else root / "study") / "report/table.csv").read_text()


def call(root, command):
    """Exit status and what was said."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            status = main([*map(str, arguments(root)[command])])
        except SystemExit as stop:
            status = stop.code
    return status, said.getvalue()


# What commands write to, other than the folder for results.
WRITTEN = {
    "begun": (".begun.partial", "begun"),
    "resume": ("stopped", "store"),
    "study": ("study",),
    "report_study": ("study",),
    "probe_again": ("probe",),
}


def restore(root, command):
    """Have everything as it was made, after a command."""
    shutil.rmtree(root.parent / "out", ignore_errors=True)
    (root.parent / "out").mkdir()
    for folder in WRITTEN.get(command, ()):
        shutil.rmtree(root / folder, ignore_errors=True)
        if (root.with_name("whole") / folder).exists():
            shutil.copytree(root.with_name("whole") / folder, root / folder, symlinks=True)


def flipped(name, before, number):
    """Contents with one bit flipped: in the first or the last byte, and in random ones."""
    draw = random.Random(name)
    last = len(before) - 1
    for place in (draw.choice((0, last)), *(draw.randint(0, last) for _ in range(number))):
        after = bytearray(before)
        after[place] ^= 1 << draw.randrange(8)
        yield place, bytes(after)


@pytest.fixture
def tables_only(monkeypatch):
    """Reports without their drawings, which are of the same numbers."""
    for module in ("study", "index"):
        monkeypatch.setattr(f"sinkbed.train.report.{module}.draw", lambda picture, *_: SimpleNamespace(files={}))
    monkeypatch.setattr("sinkbed.train.report.study.page", lambda *_: "")


FOLDERS = ("store", ".begun.partial", "stopped", "finished", "study", "probe", "export")


def files(root):
    """What was made, by name: files that hold something."""
    whole = root.with_name("whole")
    paths = [path for path in sorted(whole.rglob("*")) if path.is_file() and not path.is_symlink()]
    return {str(path.relative_to(whole)): path.read_bytes() for path in paths if path.stat().st_size}


def test_every_kind_of_file_is_made_and_classified(made):
    assert {classify(name)[0] for name in files(made)} == set(READERS)
    assert {name.partition("/")[0] for name in files(made)} == set(FOLDERS)


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_flipped_bit_changes_nothing_or_is_one_message_that_names_the_file(folder, made, tables_only, request):
    number = max(1, request.config.getoption("--kills") // 8)
    expected = {}
    for name, before in files(made).items():
        if not name.startswith(folder):
            continue
        kind = re.sub(r"[0-9a-f]{8,}|\d{8}_\d{6}", "", name)  # without what W&B draws anew in each test
        for command in classify(name)[1]:
            if command not in expected:
                restore(made, command)
                status, said = call(made, command)
                assert status == 0, said
                expected[command] = result(made, command)
            for place, after in flipped(kind, before, number):
                restore(made, command)
                (made / name).write_bytes(after)
                where = f"{command} after byte {place} of {name} was flipped"
                status, said = call(made, command)
                assert status in (0, 1, 2), where
                named = str(made / name) in said
                if f"not in the report: {name.split('/')[-2]} (damaged: " in said:
                    rows = csv.DictReader(io.StringIO(expected[command]))
                    left = [row for row in rows if f"/{row['arm']}-seed{row['seed']}/" not in name]
                    assert named and left == list(csv.DictReader(io.StringIO(result(made, command)))), where
                elif status:
                    messages = re.findall(rf"^sinkbed {arguments(made)[command][0]}: ", said, re.MULTILINE)
                    assert named and len(messages) == 1, f"{where}: {said}"
                else:
                    assert equal(result(made, command), expected[command]), where
            restore(made, command)
            (made / name).write_bytes(before)


def test_a_flipped_bit_in_a_sharded_checkpoint_changes_nothing_or_is_named(sharded, request):
    expected = load_checkpoint(sharded)
    for path in sorted(sharded.iterdir()):
        before = path.read_bytes()
        for place, after in flipped(path.name, before, 3 * request.config.getoption("--kills")):
            path.write_bytes(after)
            try:
                assert equal(load_checkpoint(sharded), expected), f"byte {place} of {path.name}"
            except ValueError as error:
                assert str(sharded) in str(error) and path.name in str(error), error
        path.write_bytes(before)


def test_a_link_to_a_checkpoint_that_is_gone_is_named_and_no_older_one_taken(made):
    restore(made, "resume")
    (made / "stopped/checkpoints/step-0000004.ckpt").unlink()
    for command in ("resume", "validate_stopped"):
        status, said = call(made, command)
        assert status == 1 and f"{made}/stopped/checkpoints/last.ckpt: expected the checkpoint that it names" in said
    older = said.split("go on from ")[1].split()[0]
    assert main(["fit", "--config", str(made / "stopped/config.yaml"), "--ckpt_path", older]) == 0
    assert points(made / "stopped") == points(made / "finished")
    restore(made, "resume")


def test_an_edited_config_of_a_run_is_read_where_the_edit_is_meant(made):
    restore(made, "resume")
    path = made / "stopped/config.yaml"
    path.write_text(path.read_text().replace("documents: 6", "documents: 5"))
    status, said = call(made, "validate_stopped")
    assert status == 1 and f"{path}: expected the settings as the run wrote them" in said
    path.write_text(path.read_text().partition("\n")[2])
    status, said = call(made, "validate_stopped")
    assert status == 0 and "5 documents" in said
    restore(made, "resume")
