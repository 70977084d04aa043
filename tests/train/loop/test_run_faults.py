"""What happens to a run when its settings, its files, its folder or its machine are not what they should be."""

import copy
import dataclasses
import errno
import json
import os
import pwd
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml

from sinkbed.data.files import write_atomic, write_json
from sinkbed.data.prepare.config import PrepareConfig, TokenizerConfig
from sinkbed.data.prepare.prepare import prepare
from sinkbed.data.source.config import Source
from sinkbed.data.store.manifest import Manifest
from sinkbed.train.cli.main import main
from sinkbed.train.config.overrides import overridden
from sinkbed.train.loop.identity import _CONFIG_KEYS, _MAY_CHANGE, check_identity, check_manifest, identify, other_sums
from sinkbed.train.loop.module import SinkbedModule
from sinkbed.train.run import directory, provenance
from sinkbed.train.run.checkpoint import load_checkpoint
from sinkbed.train.run.sharded import load_sharded
from sinkbed.train.run.wandb import shortened
from sinkbed.train.run.wandb_files import mend_wandb_files, read_wandb_file, wandb_records
from tests.support.processes import Job
from tests.support.runs import Killed, kill_at, points, refused, seal, weights


@pytest.fixture
def cut(fit, monkeypatch):
    """A run killed at step 7, its newest checkpoint that of step 4."""

    def call(*extra):
        revive = kill_at(monkeypatch, 7)
        with pytest.raises(Killed):
            fit(*extra)
        revive()
        return fit.config.parent / "run"

    return call


# Numbers that are not finite.


def test_weights_that_a_step_made_infinite_are_never_saved(fit, capsys):
    status, folder = fit("--model.optimizer.lr", "1e38")
    message = refused(capsys, status)
    assert "step 1 (192 tokens): expected finite weights and moments, got embedding.weight" in message
    assert "no step is saved" in message and directory.newest_checkpoint(folder) is None


@pytest.mark.parametrize("what", ["weight", "moment"])
def test_what_is_named_good_is_finite(fit, capsys, monkeypatch, what):
    """Of a step whose loss and gradient were finite."""
    original = SinkbedModule.check_weights

    def spoiled(self):
        if self.trainer.global_step == 4:
            state = self.trainer.optimizers[0].state
            tensor = self.decoder.head.weight if what == "weight" else next(iter(state.values()))["exp_avg_sq"]
            with torch.no_grad():
                tensor[3, 5] = float("nan" if what == "weight" else "inf")
        original(self)

    monkeypatch.setattr(SinkbedModule, "check_weights", spoiled)
    status, folder = fit()
    message = refused(capsys, status)
    assert "step 4" in message and "the checkpoints before it are good" in message
    assert ("head.weight" if what == "weight" else "exp_avg_sq of parameter 0") in message
    assert directory.newest_checkpoint(folder).name == "step-0000003.ckpt"
    assert all(torch.isfinite(w).all() for w in weights(folder, 3).values())


def test_no_file_of_a_run_holds_a_number_that_json_has_not(tmp_path):
    with pytest.raises(ValueError, match=r"x\.json: not written, expected finite numbers"):
        write_json(tmp_path / "x.json", {"modes": [{"loss": float("nan")}]})
    assert not list(tmp_path.iterdir())
    from sinkbed.train.run.metrics import MetricsFile, record

    file = MetricsFile(tmp_path)
    trainer = type("Trainer", (), {"loggers": [file]})
    heatmap = {"sink/heatmap/bos": [[0.5, float("nan")]]}
    record(trainer, {"a": float("inf")}, step=1, tokens=2, heatmaps=heatmap)
    [point] = directory.read_metrics(tmp_path / directory.METRICS)
    assert point == {"step": 1, "train/tokens": 2, "a": None, "sink/heatmap/bos": [[0.5, None]]}


# What others log, and how a run ends.

MONITOR = {"trainer": {"callbacks": [{"class_path": "lightning.pytorch.callbacks.LearningRateMonitor"}]}}


def test_points_of_a_callback_are_points_as_any_other_also_after_a_resume(fit, cut, tmp_path):
    overlay = tmp_path / "monitor.yaml"
    overlay.write_text(yaml.safe_dump(MONITOR))
    _, whole = fit("--config", str(overlay), run_dir="whole")
    folder = cut("--config", str(overlay))
    assert fit("--config", str(overlay), "--ckpt_path", "last")[0] == 0
    rates = [p for p in points(whole) if "lr-AdamW/pg1" in p]
    assert [p["train/tokens"] for p in rates] == [4 * 48 * step for step in range(10)]
    assert points(folder) == points(whole)
    for run in (whole, folder):
        rows = [row for f in sorted(run.glob("wandb/offline-run-*/run-*.wandb")) for row in read_wandb_file(f)]
        assert [row["_step"] for row in rows] == list(range(len(points(run))))
        assert [row["train/tokens"] for row in rows] == [p["train/tokens"] for p in points(run)]


def test_a_run_that_a_callback_ends_is_saved_and_not_finished(fit, capsys, tmp_path):
    overlay = tmp_path / "timer.yaml"
    timer = {"class_path": "lightning.pytorch.callbacks.Timer", "init_args": {"duration": "00:00:00:01"}}
    overlay.write_text(yaml.safe_dump({"trainer": {"callbacks": [timer]}}))
    status, folder = fit("--config", str(overlay), "--trainer.max_steps", "100000", "--checkpoint_every", "100000")
    message = refused(capsys, status)
    step = points(folder)[-1]["step"]
    assert f"a callback ended the run before its step 100000: stopped at step {step}; step {step} is saved" in message
    assert not directory.is_finished(folder)


# Settings.


def test_config_yaml_reads_back_as_what_was_written(fit):
    names = ["1e-3", "4351e27", "on", "0x1F", "2024-01-01", "1_000", "010", "a: b", "yes"]
    _, folder = fit("--wandb.name", "4351e27", "--wandb.group", "1e-3", f"--wandb.tags={json.dumps(names)}")
    settings = yaml.safe_load((folder / directory.CONFIG).read_text())["wandb"]
    assert (settings["name"], settings["group"], settings["tags"]) == ("4351e27", "1e-3", names)
    assert main(["fit", "--config", str(folder / directory.CONFIG), "--ckpt_path", "last"]) == 0
    before = (folder / directory.CONFIG).read_text()
    (folder / directory.MEASUREMENT).unlink()
    assert main(["fit", "--config", str(folder / directory.CONFIG), "--ckpt_path", "last"]) == 0
    assert (folder / directory.CONFIG).read_text() == before


def test_one_line_says_what_overrode_what(tmp_path):
    (tmp_path / "a.yaml").write_text("trainer: {max_steps: 10}\nmodel: {optimizer: {lr: 1e-2}}\n")
    (tmp_path / "b.yaml").write_text("trainer: {max_steps: 20}\ndata: {seed: 1}\n")
    a, b = str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml")
    line = overridden(["--trainer.max_steps", "5", "--config", a, f"--config={b}", "--data.seed", "2"])
    assert line == (
        f"settings that override others: trainer.max_steps 20 ({b}) over 10 ({a}); data.seed 2 (option) over 1 ({b})"
    )
    assert overridden(["--config", a, "--model.optimizer.lr=0.01", "--data.strategy.mask", "intra_document"]) == ""


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("callbacks", [{"class_path": "evil.X"}]),
        ("callbacks", ["evil.X"]),
        ("callbacks", [{"class_path": "LambdaCallback", "init_args": {"on_fit_start": "os.abort"}}]),
        ("callbacks", [{"class_path": "ModelCheckpoint", "init_args": {"dirpath": "elsewhere"}}]),
        ("strategy", {"class_path": "evil.X"}),
        ("profiler", {"class_path": "evil.X"}),
    ],
)
def test_a_config_names_no_class_unless_it_is_trusted(fit, capsys, tmp_path, monkeypatch, key, value):
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass X: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text(yaml.safe_dump({"trainer": {key: value}}))
    with pytest.raises(SystemExit) as stop:
        fit("--config", str(overlay))
    message = refused(capsys, stop.value.code)
    assert f"trainer.{key}: expected plain values" in message and "add --trust_config" in message
    assert not (tmp_path / "ran").exists() and not (tmp_path / "run").exists() and not Path("elsewhere").exists()


def test_a_trusted_config_may(fit, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from lightning.pytorch import Callback\n"
        "class Mine(Callback):\n    def on_fit_start(self, *_):\n        print('it ran')\n"
    )
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("trainer: {callbacks: [{class_path: mine.Mine}]}\n")
    arguments = ["fit", "--config", str(fit.config), "--config", str(overlay), "--wandb.mode", "disabled"]
    job = Job([*arguments, "--trust_config"], str(tmp_path / "log"), [{"PYTHONPATH": str(tmp_path)}])
    assert job.finish() == [0] and "it ran" in job.output(), job.output()


# Folders.


def test_a_refused_run_leaves_a_folder_that_was_there(fit, capsys, tmp_path):
    (tmp_path / "run").mkdir()
    status, folder = fit("--measure.sink_tokens", "64")
    assert "measure.sink_tokens" in refused(capsys, status)
    assert folder.is_dir() and not list(folder.iterdir())
    (tmp_path / "link").symlink_to(folder)
    assert "measure.sink_tokens" in refused(capsys, fit("--measure.sink_tokens", "64", run_dir="link")[0])
    assert (tmp_path / "link").is_symlink() and folder.is_dir()
    (tmp_path / "file").write_text("")
    assert "file: expected a folder, or none yet" in refused(capsys, fit(run_dir="file")[0])


def test_a_tilde_is_the_home_folder(fit, tiny_store, tmp_path, monkeypatch, capsys):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "store").symlink_to(tiny_store)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    quiet = ("--data.store", "~/store", "--wandb.mode", "disabled")
    assert main(["fit", "--config", str(fit.config), "--run_dir", "~/run", *quiet]) == 0
    assert (tmp_path / "home" / "run" / directory.METRICS).exists() and not Path("~").exists()
    assert main(["fit", "--config", str(fit.config), "--run_dir", "~nobody-of-that-name/run"]) == 1
    assert "run_dir: expected a path, got ~nobody-of-that-name/run" in capsys.readouterr().err


def test_files_are_as_open_as_the_umask_says(tmp_path):
    for mask, mode in ((0o077, 0o600), (0o027, 0o640), (0o002, 0o664)):
        before = os.umask(mask)
        try:
            write_atomic(tmp_path / "x", "x")
        finally:
            os.umask(before)
        assert (tmp_path / "x").stat().st_mode & 0o777 == mode


def test_a_copied_run_is_another_to_wandb_and_goes_on_from_its_own_checkpoints(fit, cut, capsys):
    original = cut()
    copy = original.with_name("copy")
    shutil.copytree(original, copy, symlinks=True)
    before = {p: p.read_bytes() for p in original.rglob("*") if p.is_file() and "wandb" not in p.parts}
    capsys.readouterr()
    with pytest.warns(UserWarning, match=f"{copy} is a copy of the run {original}: it goes on from its own"):
        assert main(["fit", "--config", str(copy / directory.CONFIG), "--ckpt_path", "last"]) == 0
    assert f"names {original}, but was moved or copied: the run goes on in {copy}" in capsys.readouterr().out
    assert before == {p: p.read_bytes() for p in original.rglob("*") if p.is_file() and "wandb" not in p.parts}
    ours, theirs = (directory.read_json(folder / directory.RUN)["wandb_id"] for folder in (copy, original))
    assert ours != theirs
    [segment] = copy.glob(f"wandb/offline-run-*/run-{ours}.wandb")
    assert len(list(read_wandb_file(segment))) == len(points(copy)) > 10
    # Its older checkpoints still name the other run; the copy keeps its id.
    early = copy / "checkpoints" / "step-0000003.ckpt"
    assert main(["fit", "--config", str(copy / directory.CONFIG), "--ckpt_path", str(early)]) == 0
    assert directory.read_json(copy / directory.RUN)["wandb_id"] == ours
    # A run that is moved stays the same run.
    moved = original.rename(original.with_name("moved"))
    assert main(["fit", "--config", str(moved / directory.CONFIG), "--ckpt_path", "last"]) == 0
    assert directory.read_json(moved / directory.RUN)["wandb_id"] == theirs


def test_which_of_two_run_directories_is_the_copy_is_known_in_either_order(tmp_path):
    def started(name):
        known, _ = identify(tmp_path / name, {}, None, {}, anew=False, session={})
        return known["wandb_id"]

    (tmp_path / "a").mkdir()
    first = started("a")
    for name in ("b", "d", "e"):
        shutil.copytree(tmp_path / "a", tmp_path / name)
    (tmp_path / "a").rename(tmp_path / "c")
    assert started("b") != first, "copied, then the original was moved"
    (tmp_path / "d").rename(tmp_path / "a")
    assert started("c") == first, "moved, then a copy was put in its place"
    # A backup that is put back where it was, and a run.json of earlier versions, say nothing of it.
    shutil.rmtree(tmp_path / "c")
    (tmp_path / "e").rename(tmp_path / "c")
    record = directory.read_json(tmp_path / "c" / directory.RUN) | {"folder": str(tmp_path / "c")}
    write_json(tmp_path / "c" / directory.RUN, record)
    assert started("c") == first


def test_a_start_that_is_refused_leaves_no_folder_above_the_run_either(tmp_path):
    held = directory.lock(tmp_path / "runs" / "fit" / "a")
    directory.release(held)
    assert not list(tmp_path.iterdir())
    (tmp_path / "runs").mkdir()
    directory.release(directory.lock(tmp_path / "runs" / "fit" / "a"))
    assert [path.name for path in tmp_path.iterdir()] == ["runs"], "which the user had made"


# W&B.


def test_a_user_without_a_name_or_a_home_has_a_wandb_run(fit, monkeypatch, recwarn):
    def nobody(uid):
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    for name in ("HOME", "USER", "LOGNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_DIR", "")
    status, folder = fit()
    assert status == 0 and list(folder.glob("wandb/offline-run-*/run-*.wandb"))
    assert not [w for w in recwarn if "W&B" in str(w.message)]


def test_what_is_too_long_for_wandb_is_shortened_and_what_it_refuses_is_refused_first(fit, capsys, recwarn):
    long = ("--wandb.tags", json.dumps(["t" * 200]), "--wandb.name", "n" * 300, "--wandb.group", "g" * 300)
    status, folder = fit(*long)
    assert status == 0 and list(folder.glob("wandb/offline-run-*/run-*.wandb"))
    assert not [w for w in recwarn if "W&B" in str(w.message)]
    assert len(shortened("t" * 200, 64)) == 64 and shortened("t" * 199, 64) != shortened("t" * 200, 64)
    for wrong in (("--wandb.project", "a/b"), ("--wandb.tags", '[""]')):
        try:
            status, other = fit(*wrong, run_dir="other")
        except SystemExit as stop:
            status, other = stop.code, folder.with_name("other")
        assert f"{wrong[0][2:]}: expected" in refused(capsys, status) and not other.exists()


def written(folder):
    """The one W&B file of a run, once W&B's process has written every point to it."""
    [segment] = folder.glob("wandb/offline-run-*/run-*.wandb")
    deadline = time.monotonic() + 30
    while len(list(read_wandb_file(segment))) < len(points(folder)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return segment


def test_a_flipped_bit_in_a_segment_is_named_and_the_points_are_sent_again(fit, cut):
    folder = cut()
    segment = written(folder)
    content = bytearray(segment.read_bytes())
    ends = [end for _, end in wandb_records(bytes(content))]
    content[(ends[len(ends) // 2] + ends[len(ends) // 2 + 1]) // 2] ^= 4
    segment.write_bytes(content)
    kept = len(list(read_wandb_file(segment)))
    assert 0 < kept < len(points(folder))
    with pytest.warns(UserWarning, match=f"{segment}: damaged, what stands at byte"):
        assert fit("--ckpt_path", "last")[0] == 0
    rows = [row for f in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")) for row in read_wandb_file(f)]
    assert [row["_step"] for row in rows] == list(range(len(points(folder))))
    assert segment.with_name(f"{segment.name}.damaged").read_bytes() == content


def test_every_bit_of_a_segment_is_looked_at(cut, tmp_path):
    content = written(cut()).read_bytes()
    ends = [end for _, end in wandb_records(content)]
    assert len(ends) > 10
    for at in range(0, len(content), max(1, len(content) // 300)):
        folder = tmp_path / f"offline-run-{at}"
        folder.mkdir()
        path = folder / "run-x.wandb"
        path.write_bytes(content[:at] + bytes([content[at] ^ 16]) + content[at + 1 :])
        message = mend_wandb_files([path])
        # In a length, the file seems to break off; then it is cut there as after a kill.
        left = [end for _, end in wandb_records(path.read_bytes())] if path.exists() else []
        assert left == [end for end in ends if end <= at][: len(left)] and len(left) < len(ends), at
        assert message is None or str(path) in message


def test_a_changed_wandb_id_does_not_make_a_second_run(fit, cut):
    path = cut() / directory.RUN
    known = directory.read_json(path)
    write_json(path, {**known, "wandb_id": "f" + known["wandb_id"][1:] + "0"})
    with pytest.warns(UserWarning, match=rf"expected the W&B id {known['wandb_id']}, got f\w+; taken from"):
        assert fit("--ckpt_path", "last")[0] == 0
    assert directory.read_json(path)["wandb_id"] == known["wandb_id"]


# Machines and processes.


def test_a_resumed_run_says_what_changed_since_its_checkpoint(fit, cut, capsys, monkeypatch):
    cut()
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    monkeypatch.setattr(provenance, "_cpu", lambda: "another")
    capsys.readouterr()
    assert fit("--ckpt_path", "last")[0] == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "since the checkpoint" in line)
    assert (
        line.startswith("since the checkpoint: ")
        and "-> another, variables None -> {'ATEN_CPU_CAPABILITY': 'default'}" in line
        and "bits will differ" in line
    )
    made = provenance.provenance(torch.device("cpu"))
    assert provenance.changes(made, made) == ""


def is_alive(process):
    """Whether it runs: one that has ended may wait for its parent to ask."""
    try:
        return " Z " not in Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False


def children(process):
    return [int(pid) for pid in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def test_a_dead_data_worker_ends_the_run_with_one_message(fit, tmp_path):
    arguments = ["fit", "--config", str(fit.config), "--data.workers", "3", "--trainer.max_steps", "100000"]
    job = Job([*arguments, "--wandb.mode", "disabled"], str(tmp_path / "log"))
    deadline = time.monotonic() + 60
    while not (directory.newest_checkpoint(tmp_path / "run") and len(children(job.first.pid)) == 3):
        assert time.monotonic() < deadline and job.alive(), job.output()
        time.sleep(0.01)
    workers = children(job.first.pid)
    os.kill(workers[1], signal.SIGKILL)
    assert job.finish(timeout=10) == [1]
    assert "a data worker of this run ended" in job.output() and "resume the run" in job.output()
    assert "Traceback" not in job.output() and job.output().count("sinkbed fit:") == 1
    deadline = time.monotonic() + 10
    while (left := [pid for pid in workers if is_alive(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left


@pytest.mark.parametrize("error", [ConnectionResetError(104, "Connection reset by peer"), EOFError()])
def test_a_data_worker_that_dies_while_its_batch_is_taken_is_told_of_as_such(fit, monkeypatch, capsys, error):
    """Tensors come through a socket of the worker."""

    def dead(self, *args):
        raise error

    monkeypatch.setattr(torch.utils.data.dataloader._MultiProcessingDataLoaderIter, "_next_data", dead)
    assert "a data worker of this run ended" in refused(capsys, fit("--data.workers", "1")[0])


def test_a_data_worker_that_dies_while_a_checkpoint_is_written_is_told_of_as_such(fit, monkeypatch, capsys):
    """torch raises it in the midst of whatever goes on; its writer of archives makes an error of its own of it."""
    original = torch.save

    def interrupted(checkpoint, file):
        if checkpoint["global_step"] < 4:
            return original(checkpoint, file)
        try:
            raise RuntimeError("DataLoader worker (pid 77) is killed by signal: Killed. ")
        except RuntimeError:
            raise SystemError("unexpected position in the archive")  # noqa: B904

    monkeypatch.setattr(torch, "save", interrupted)
    status, folder = fit()
    message = refused(capsys, status)
    assert "a data worker of this run ended (DataLoader worker (pid 77) is killed by signal: Killed)" in message
    assert "step-0000003.ckpt is saved" in message and not list((folder / "checkpoints").glob(".step-*"))


def test_an_error_in_a_data_worker_is_one_message(fit, monkeypatch, capsys):
    from sinkbed.data.pack.batches import Rows

    original = Rows.__getitems__

    def damaged(self, numbers):
        if self.store.split == "train" and torch.utils.data.get_worker_info() is not None and max(numbers) > 20:
            raise ValueError("train/00000.arrow: expected rows, got none;\nprepare it again")
        return original(self, numbers)

    monkeypatch.setattr(Rows, "__getitems__", damaged)
    began = time.monotonic()
    status, _ = fit("--data.workers", "2")
    message = refused(capsys, status)
    assert "sinkbed fit: train/00000.arrow: expected rows, got none;\nprepare it again" in message
    assert "Traceback" not in message and time.monotonic() - began < 30


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_shard_that_becomes_shorter_under_a_run_is_one_message(fit, tiny_store, tmp_path, workers):
    store = tmp_path / "store"
    shutil.copytree(tiny_store, store)
    arguments = ["fit", "--config", str(fit.config), "--data.store", str(store), "--trainer.max_steps", "100000"]
    job = Job([*arguments, "--data.workers", workers, "--wandb.mode", "disabled"], str(tmp_path / "log"))
    deadline = time.monotonic() + 60
    # Long after the store was compared with its checksums, which would find it first.
    while (newest := directory.newest_checkpoint(tmp_path / "run")) is None or int(newest.stem[5:]) < 200:
        assert time.monotonic() < deadline and job.alive(), job.output()
        time.sleep(0.01)
    for shard in store.glob("train/*.arrow"):
        os.truncate(shard, 0)
    assert job.finish(timeout=20) == [1]
    assert "train/00000.arrow is damaged: got 0 bytes on disk" in job.output()
    assert "Traceback" not in job.output() and job.output().count("sinkbed fit:") == 1


def test_a_failing_disk_is_one_message(fit, monkeypatch, capsys):
    def fails(handle):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(directory.os, "fsync", fails)
    status, _ = fit("--wandb.mode", "disabled")
    message = refused(capsys, status)
    assert "Input/output error" in message and directory.CONFIG in message and "Traceback" not in message


# Checkpoints and stores.


@pytest.mark.parametrize("content", [[1, 2], {"sinkbed": {}}, {"state_dict": [], "global_step": "x"}, "text"])
def test_a_file_that_is_no_checkpoint_is_refused_by_name(fit, capsys, tmp_path, content):
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(content, folder / "step-0000003.ckpt")
    message = refused(capsys, fit("--ckpt_path", "last")[0])
    assert "step-0000003.ckpt: expected a checkpoint" in message and "Traceback" not in message


def test_a_sharded_checkpoint_is_under_checksums_as_a_whole(sharded):
    assert load_checkpoint(sharded)["state_dict"]["w"].tolist() == list(range(8))
    sums = seal(sharded)
    for missing in sums:
        write_json(sharded / "checksums.json", {k: v for k, v in sums.items() if k != missing})
        with pytest.raises(ValueError, match=f"checksum of {missing}"):
            load_checkpoint(sharded)
    write_json(sharded / "checksums.json", {})
    with pytest.raises(ValueError, match="checksum of"):
        load_checkpoint(sharded)


@pytest.mark.parametrize("chunks", ["none", "a part", "the same twice"])
def test_an_index_that_lacks_a_part_of_a_tensor_is_refused(sharded, chunks):
    import pickle

    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

    with (sharded / ".metadata").open("rb") as file:
        metadata = pickle.load(file)
    entry = metadata.state_dict_metadata["model|w"]
    half = ChunkStorageMetadata(offsets=torch.Size([0]), sizes=torch.Size([4]))
    entry.chunks = {"none": [], "a part": [half], "the same twice": [half, dataclasses.replace(half)]}[chunks]
    with (sharded / ".metadata").open("wb") as file:
        pickle.dump(metadata, file)
    seal(sharded)
    with pytest.raises(ValueError, match=r"not all of model\|w"):
        load_sharded(sharded)


def test_another_bos_or_manifest_is_refused_with_both_values_and_the_own_copy_stays(
    fit, cut, tiny_store, tmp_path, capsys
):
    folder = cut()
    store, before = tmp_path / "store", (folder / directory.MANIFEST).read_bytes()
    source = Source(kind="jsonl", files=(str(tiny_store.parent / "docs.jsonl"),), column="text")
    names = {"bos": "<eos>", "eos": "<bos>"}
    swapped = TokenizerConfig(path=str(tiny_store / "tokenizer.json"), **names)
    prepare(PrepareConfig(source=source, tokenizer=swapped, validation_share=0.1, out=str(store)), progress=False)
    manifest = Manifest.read(tiny_store)
    assert Manifest.read(store).bos_id == manifest.eos_id
    message = refused(capsys, fit("--data.store", str(store), "--ckpt_path", "last")[0])
    assert f"bos_id in the token store's manifest: the checkpoint has {manifest.bos_id}, " in message
    assert "eos_id in the token store's manifest" in message
    assert (folder / directory.MANIFEST).read_bytes() == before
    # Of a checkpoint that says nothing of it the run's own copy of the manifest does.
    with pytest.raises(ValueError, match=f"bos_id: got {manifest.eos_id}, expected {manifest.bos_id}"):
        check_manifest(folder, Manifest.read(store))
    # The same documents made from elsewhere are the same store.
    moved = tmp_path / "moved"
    shutil.copytree(tiny_store, moved)
    dataclasses.replace(manifest, left_out={"duplicate": 1}).write(moved)
    assert fit("--data.store", str(moved), "--ckpt_path", "last")[0] == 0
    assert (folder / directory.MANIFEST).read_bytes() == before


NO_BIT = {"data.micro_batch_size", "data.workers", "data.store", "model.activation_checkpointing"}
"""Settings of model and data that no bit of a run depends on, but the order in which sums are rounded."""


def leaves(settings, prefix=()):
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, (*prefix, key))
        else:
            yield (*prefix, key)


def test_a_change_of_any_setting_of_model_and_data_is_refused_or_said(cut):
    folder = cut()
    settings = yaml.safe_load((folder / directory.CONFIG).read_text())
    checkpoint = load_checkpoint(directory.newest_checkpoint(folder))
    saved = checkpoint["sinkbed"]
    names = {key: _CONFIG_KEYS.get(key, key) for key in saved}
    keys = {".".join(leaf) for name in ("model", "data") for leaf in leaves(settings[name], (name,))}
    decides = {".".join((names[first], *rest)) for first, *rest in leaves(saved)}
    said = {key.removeprefix("arithmetic.") for key in decides if key.startswith("arithmetic.")}
    assert len(keys) > 40 and keys - decides - said == NO_BIT
    for first, *rest in leaves(saved):
        ours = copy.deepcopy(saved)
        place = ours
        for key in (first, *rest)[:-1]:
            place = place[key]
        place[[first, *rest][-1]] = "another"
        if first in _MAY_CHANGE:
            check_identity(checkpoint, ours)
            assert first == "store" or other_sums(saved, ours).endswith("-> another")
        else:
            with pytest.raises(ValueError, match="'another'"):
                check_identity(checkpoint, ours)


# For who meets it first.

CONSTANT = ("--model.optimizer.schedule", "constant")


def test_a_finished_run_at_a_constant_rate_is_trained_on_in_place(fit, capsys):
    _, longer = fit(*CONSTANT, "--trainer.max_steps", "16", run_dir="longer")
    _, folder = fit(*CONSTANT)
    capsys.readouterr()
    status, _ = fit(*CONSTANT, "--trainer.max_steps", "16", "--ckpt_path", "last")
    assert status == 0 and "was to end at step 10" in capsys.readouterr().out
    assert all(
        torch.equal(a, b) for a, b in zip(weights(folder, 16).values(), weights(longer, 16).values(), strict=True)
    )
    training = [[p for p in points(f) if "train/loss" in p] for f in (folder, longer)]
    assert training[0] == training[1] and training[0][-1]["step"] == 16
    assert directory.is_finished(folder)


def test_one_whose_steps_would_have_been_others_is_refused(fit, capsys):
    cooled = (*CONSTANT, "--model.optimizer.cooldown_steps", "4")
    _, folder = fit(*cooled)
    message = refused(capsys, fit(*cooled, "--trainer.max_steps", "16", "--ckpt_path", "last")[0])
    assert "trainer.max_steps: the checkpoint has 10" in message and "schedule is constant, before its" in message
    # From before its cooldown it may.
    early = str(folder / "checkpoints" / "step-0000003.ckpt")
    assert fit(*cooled, "--trainer.max_steps", "16", "--ckpt_path", early)[0] == 0


def test_a_run_says_what_it_is_before_its_first_step_and_where_to_look_at_its_end(fit, capsys):
    _, folder = fit()
    first, second, *_, last = capsys.readouterr().out.splitlines()
    assert (
        first.startswith("36.8k parameters, to step 10: 1.92k tokens, 0.1") and f"into {folder}, W&B offline" in first
    )
    assert "52% of the parameters are embeddings of 300 tokens" in second
    assert f"in {folder}: metrics.jsonl" in last and f"sinkbed probe {folder}" in last
    [session] = directory.read_json(folder / directory.RUN)["sessions"]
    assert session["command"].startswith("sinkbed fit --config ") and session["status"] == 0
    assert session["started"] <= session["ended"]
