"""Arms that fail, are killed, wait for a folder, or were made under other settings."""

import os
import re
import signal

import pytest

from sinkbed.train.cli import study as study_command
from sinkbed.train.cli.main import main
from sinkbed.train.run import directory
from sinkbed.train.study import local as runner
from sinkbed.train.study.arms import RECORD, begin, plan
from sinkbed.train.study.file import load_study
from tests.support.studies import locked, table


def test_an_arm_that_fails_is_reported_and_does_not_stop_the_rest(study, capsys):
    study.write_text(study.read_text().replace("absent: [none.yaml]", "absent: [broken.yaml]"))
    (study.parent / "broken.yaml").write_text("model: {optimizer: {lr: 1.0e+38}}\n")
    assert main(["study", str(study), "--quiet"]) == 1
    error = capsys.readouterr().err
    assert "absent-seed0 failed" in error and "expected finite" in error and "fit.log" in error
    assert {r["arm"] for r in table(study)} == {"fixed"}
    assert "expected finite" in (study.parent / "out" / "report" / "index.html").read_text()
    assert main(["study", str(study), "--dry_run"]) == 0
    assert re.search(r"failed +\S+absent-seed0  \(exit status 1: .*expected finite", capsys.readouterr().out)
    assert main(["report", str(study)]) == 0
    assert "not in the report: absent-seed0 (failed: exit status 1" in capsys.readouterr().out
    (study.parent / "broken.yaml").write_text("model: {optimizer: {lr: 1.0e-3}}\n")
    assert main(["study", str(study), "--quiet"]) == 1, "another configuration now"
    assert "model.optimizer.lr was 1e+38, is 0.001" in capsys.readouterr().err


@pytest.mark.parametrize("kept", ["digests", "none"])
def test_an_arm_whose_files_are_damaged_does_not_hide_the_others(finished, capsys, kept):
    """Also one of an earlier version, which kept no digests and may hold NaN."""
    folder = finished.parent / "out" / "runs" / "absent-seed0"
    path = folder / directory.MEASUREMENT
    path.write_text(re.sub(r'"loss": [\d.]+', '"loss": NaN', path.read_text()))
    if kept == "none":
        directory.note(folder, finished=True)
    assert main(["report", str(finished)]) == 0
    said = capsys.readouterr().out
    assert "not in the report: absent-seed0 (damaged: " in said and str(path) in said
    assert {row["arm"] for row in table(finished)} == {"fixed"}
    assert "Traceback" not in said and ("NaN, which is no number" in said) == (kept == "none")


@pytest.mark.slow
def test_an_arm_made_under_another_configuration_is_refused_unless_forced(finished, capsys):
    (finished.parent / "none.yaml").write_text("data: {strategy: {first_token: random}}\n")
    assert main(["study", str(finished), "--quiet"]) == 1
    assert "absent-seed0" in (error := capsys.readouterr().err) and "--force" in error
    assert main(["study", str(finished), "--quiet", "--force"]) == 0
    config = (finished.parent / "out" / "runs" / "absent-seed0" / directory.CONFIG).read_text()
    assert "first_token: random" in config


def test_a_comment_in_an_overlay_makes_no_other_arm(finished):
    overlay = finished.parent / "none.yaml"
    overlay.write_text("# a word\n" + overlay.read_text())
    assert [r.status() for r in plan(load_study(finished))] == ["finished", "finished"]


def test_an_arm_whose_folder_is_in_use_fails_alone_and_is_left_as_it_is(finished, monkeypatch, capsys):
    (finished.parent / "none.yaml").write_text("data: {strategy: {first_token: random}}\n")
    monkeypatch.setattr(runner, "begin", lambda run, group: begin(run, group, 0.1))
    monkeypatch.setattr(study_command, "SECONDS_FOR_THE_DEAD", 0.1)
    folder = finished.parent / "out" / "runs" / "absent-seed0"
    before = (folder / RECORD).read_text()
    with locked(folder):
        assert main(["study", str(finished), "--quiet", "--force"]) == 1
        assert "arm absent-seed0 failed" in (error := capsys.readouterr().err) and "process that still does" in error
        assert main(["study", str(finished), "--arm", "absent", "--force"]) == 1
        assert "process that still does" in capsys.readouterr().err
        assert (folder / RECORD).read_text() == before and (folder / directory.MEASUREMENT).exists()
    assert {r["arm"] for r in table(finished)} == {"fixed"}, "the report is there all the same"


def test_an_arm_that_was_finished_while_its_folder_was_waited_for_is_kept(finished):
    run = plan(load_study(finished))[0]
    assert begin(run, "group") is None and run.status() == "finished"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(11, "no process can be made"), "[Errno 11] no process can be made"),
        pytest.param(EOFError(), "EOFError", marks=pytest.mark.slow),
    ],
)
def test_what_hinders_an_arm_outside_its_process_is_that_arms_failure(study, monkeypatch, capsys, error, told):
    class Refused(runner.FitProcess):
        def __init__(self, arguments, log, variables, *, fork):
            if "absent" in str(log):
                raise error
            super().__init__(arguments, log, variables, fork=fork)

    monkeypatch.setattr(runner, "FitProcess", Refused)
    assert main(["study", str(study), "--quiet"]) == 1
    assert f"arm absent-seed0 failed: {told}" in capsys.readouterr().err
    assert {r["arm"] for r in table(study)} == {"fixed"}


def test_an_arm_whose_process_is_killed_fails_alone(study, monkeypatch, capsys):
    class Killed(runner.FitProcess):
        def __init__(self, arguments, log, variables, *, fork):
            super().__init__(arguments, log, variables, fork=fork)
            if "absent" in str(log):
                os.kill(self._forked.pid, signal.SIGKILL)

    monkeypatch.setattr(runner, "FitProcess", Killed)
    assert main(["study", str(study), "--quiet"]) == 1
    assert "arm absent-seed0 failed: ended by SIGKILL, as where memory is short" in capsys.readouterr().err
    assert [r.status() for r in plan(load_study(study))] == ["finished", "failed"]


@pytest.mark.slow
def test_an_arm_of_several_devices_is_a_command_of_its_own(study, monkeypatch):
    """Lightning's launcher repeats the command line, which a forked process does not have."""
    (study.parent / "none.yaml").write_text(
        "data: {strategy: {first_token: none}}\ntrainer: {devices: 2, strategy: ddp}\n"
    )
    forked = {}

    class Noted(runner.FitProcess):
        def __init__(self, arguments, log, variables, *, fork):
            forked[log.parent.name] = fork
            super().__init__(arguments, log, variables, fork=fork)

    monkeypatch.setattr(runner, "FitProcess", Noted)
    assert main(["study", str(study), "--quiet"]) == 0
    assert forked == {"fixed-seed0": True, "absent-seed0": False}


def test_settings_that_decide_nothing_make_no_other_arm(finished):
    config = finished.parent / "run.yaml"
    text = config.read_text().replace("checkpoint_every: 4", "checkpoint_every: 7\nwandb: {project: mine}")
    config.write_text(text.replace("  batch_size: 4", "  batch_size: 4\n  workers: 1"))
    runs = plan(load_study(finished))
    assert runs[0].config["data"]["workers"] == 1 and runs[0].config["checkpoint_every"] == 7
    assert [r.status() for r in runs] == ["finished", "finished"]
    config.write_text(text.replace("  batch_size: 4", "  batch_size: 4\n  micro_batch_size: 2"))
    assert [r.status() for r in plan(load_study(finished))] == ["other", "other"], "it rounds otherwise"


def test_an_arm_has_as_many_threads_as_it_is_for_cores(study):
    config = study.parent / "run.yaml"
    config.write_text(re.sub("^threads:.*\n", "", config.read_text(), flags=re.M))
    assert {r.config["threads"] for r in plan(load_study(study))} == {1}
    study.write_text(study.read_text() + "cpus: 3\n")
    assert {r.config["threads"] for r in plan(load_study(study))} == {3}
    config.write_text(config.read_text() + "threads: 2\n")
    assert {r.config["threads"] for r in plan(load_study(study))} == {2}
