"""The run directory: its folder, its permissions, and what its files may hold."""

import json
import os
from pathlib import Path

import pytest
import yaml

from sinkbed.data.files import write_atomic, write_json
from sinkbed.train.cli.main import main
from sinkbed.train.measure.model import _check_export
from sinkbed.train.run import directory
from tests.support.runs import refused


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


def test_checksums_of_somebody_else_are_not_taken_for_ours(tmp_path):
    (tmp_path / directory.CHECKSUMS).write_text('{"config.json": "md5:0"}\n')
    (tmp_path / "config.json").write_text("{}\n")
    _check_export(tmp_path, ".json")
    write_json(tmp_path / directory.CHECKSUMS, {"config.json": "0"})
    with pytest.raises(ValueError, match=r"config\.json"):
        _check_export(tmp_path, ".json")


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


def test_a_start_that_is_refused_leaves_no_folder_above_the_run_either(tmp_path):
    held = directory.lock(tmp_path / "runs" / "fit" / "a")
    directory.release(held)
    assert not list(tmp_path.iterdir())
    (tmp_path / "runs").mkdir()
    directory.release(directory.lock(tmp_path / "runs" / "fit" / "a"))
    assert [path.name for path in tmp_path.iterdir()] == ["runs"], "which the user had made"


def test_points_are_kept_before_those_of_the_checkpoint_take_their_place(tmp_path, monkeypatch):
    path = tmp_path / directory.METRICS
    path.write_text("other\n")
    original = directory.write_atomic

    def killed(target, content):
        if target == path:
            raise KeyboardInterrupt
        original(target, content)

    monkeypatch.setattr(directory, "write_atomic", killed)
    with pytest.raises(KeyboardInterrupt):
        directory.restore_metrics(path, "saved\n")
    assert (tmp_path / f"{directory.METRICS}.damaged").read_text() == path.read_text() == "other\n"


def test_a_folder_is_given_back_before_another_can_take_it(tmp_path, monkeypatch):
    """The file goes while it is held: afterwards one of that name may be another's."""
    held = directory.lock(tmp_path / "run")
    close, seen = directory.Lock.close, []
    monkeypatch.setattr(directory.Lock, "close", lambda self: seen.append((tmp_path / "run").exists()) or close(self))
    directory.release(held)
    assert seen == [False]


def test_a_lock_that_its_last_owner_has_just_removed_is_taken_anew(tmp_path, monkeypatch):
    original, calls = directory.fcntl.lockf, []

    def lockf(file, how):
        calls.append(how)
        if len(calls) == 1:
            (tmp_path / directory.LOCK).unlink()
        original(file, how)

    monkeypatch.setattr(directory.fcntl, "lockf", lockf)
    held = directory.lock(tmp_path)
    assert (
        len(calls) == 2 and (tmp_path / directory.LOCK).stat().st_ino == directory.os.fstat(held.file.fileno()).st_ino
    )
