"""A study of tiny arms through the real command line: what runs, what does not, what the report holds."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from sinkbed.train.cli import study as study_command
from sinkbed.train.cli.main import main
from sinkbed.train.run import directory
from sinkbed.train.run.wandb_files import link_for_leet, read_wandb_file
from sinkbed.train.study.arms import LOG, environment, plan
from sinkbed.train.study.file import load_study
from tests.support import ROOT
from tests.support.studies import locked, table


def test_a_study_runs_its_arms_and_reports_them(finished, _run_once):
    out = finished.parent / "out"
    rows = table(finished)
    assert [(r["arm"], r["seed"], r["mode"]) for r in rows] == [
        (arm, "0", mode) for arm in ("fixed", "absent") for mode in ("bos", "text", "first_key_masked")
    ]
    assert {"arm", "seed", "mode", "sink_rate_0.3", "sink_mass", "loss", "bits_per_byte"} <= set(rows[0])
    measured = directory.read_json(out / "runs" / "fixed-seed0" / directory.MEASUREMENT)["modes"]["bos"]
    assert float(rows[0]["loss"]) == pytest.approx(measured["loss"], abs=1e-6)
    mass = [x for row in measured["mass"] for x in row]
    assert float(rows[0]["sink_mass"]) == pytest.approx(sum(mass) / len(mass), abs=1e-6)

    for name in ("result", "curves", "heatmaps", "loss", "final_loss"):
        assert (out / "report" / f"{name}.pdf").read_bytes()[:5] == b"%PDF-"
        assert "</svg>" in (out / "report" / f"{name}.svg").read_text()
    printed = _run_once[1]
    assert "90.84 / 2.69" in printed
    assert re.search(r"an arm \d+\.\d s beside training and measuring", printed)
    markdown = (out / "report" / "table.md").read_text()
    assert "fixed at position 0" in markdown and "90.84 / 2.69" in markdown and "one seed (0)" in markdown


def test_a_study_of_some_arms_reports_the_others_that_are_finished(finished):
    assert main(["study", str(finished), "--arms", "fixed"]) == 0
    assert {row["arm"] for row in table(finished)} == {"fixed", "absent"}
    assert main(["report", str(finished), "--arms", "absent"]) == 0
    assert {row["arm"] for row in table(finished)} == {"absent"}


@pytest.mark.parametrize(
    "options",
    [
        ["--seed", "1"],
        ["--arm", "fixed", "--dry_run"],
        ["--arm", "fixed", "--seeds", "1"],
        ["--arm", "a", "--arms", "b"],
    ],
)
def test_what_an_agent_says_is_not_mixed_with_what_a_user_does(study, capsys, options):
    assert main(["study", str(study), *options]) == 1
    assert "expected --arm" in capsys.readouterr().err
    assert not (study.parent / "out").exists()


def test_a_report_is_not_written_among_other_files(finished, tmp_path, capsys):
    (tmp_path / "thesis" / "report").mkdir(parents=True)
    (tmp_path / "thesis" / "report" / "photo.png").write_text("mine")
    runs = str(finished.parent / "out" / "runs")
    assert main(["report", runs, "--out", str(tmp_path / "thesis")]) == 1
    assert "expected an earlier report or nothing, got other files" in capsys.readouterr().err
    assert (tmp_path / "thesis" / "report" / "photo.png").read_text() == "mine"


def test_a_finished_arm_is_not_run_again_and_an_interrupted_one_resumes(finished):
    out = finished.parent / "out" / "runs"
    before = (out / "fixed-seed0" / directory.METRICS).stat().st_mtime_ns
    whole = (out / "absent-seed0" / directory.METRICS).read_text()
    # As a kill after step 3 leaves it: points beyond the checkpoint, no measurement.
    (out / "absent-seed0" / directory.MEASUREMENT).unlink()
    checkpoints = out / "absent-seed0" / "checkpoints"
    (checkpoints / "step-0000010.ckpt").unlink()
    (checkpoints / "last.ckpt").unlink()
    (checkpoints / "last.ckpt").symlink_to("step-0000003.ckpt")
    study_runs = plan(load_study(finished))
    assert [r.status() for r in study_runs] == ["finished", "interrupted"]
    assert main(["study", str(finished), "--quiet"]) == 0
    assert (out / "fixed-seed0" / directory.METRICS).stat().st_mtime_ns == before

    def without_clock(text):
        return re.sub(r', "train/tokens_per_second": [\d.]+', "", text)

    assert without_clock((out / "absent-seed0" / directory.METRICS).read_text()) == without_clock(whole)


def test_a_misspelt_key_is_found_before_any_arm_is_started(study, capsys):
    (study.parent / "none.yaml").write_text("data: {strategy: {first_tokn: none}}\n")
    for option in ("--dry_run", "--quiet"):
        assert main(["study", str(study), option]) == 1
        error = capsys.readouterr().err
        assert "none.yaml, line 1: data.strategy.first_tokn: expected a known key" in error and "first_token?" in error
    assert not list((study.parent / "out").glob("runs/*"))


def test_a_choice_of_an_arm_takes_the_place_of_that_of_the_base(study):
    """Two names below one key would be no choice."""
    base = "{data: {strategy: {packing: {best_fit: {}}, document_end: eos}}}"
    study.write_text(study.read_text().replace("[run.yaml]", f"[run.yaml, {base}]"))
    (study.parent / "none.yaml").write_text("data: {strategy: {packing: {pad: {}}}}\n")
    fixed, absent = plan(load_study(study))
    assert fixed.setting("data.strategy.packing") == {"best_fit": {}}
    assert absent.setting("data.strategy.packing") == {"pad": {}}
    assert absent.setting("data.strategy.document_end") == "eos"


def test_what_a_killed_study_left_half_written_is_removed(finished):
    left = finished.parent / "out" / ".summary.json.0123.partial"
    left.write_text("half")
    assert main(["study", str(finished), "--quiet"]) == 0
    assert not left.exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            "data: {strategy: {window: 48}}",
            "window: expected at most 47 with context_length 48, got 48, which limits nothing",
        ),
        ("model: {optimizer: {warmup_steps: 11}}", "warm-up of 11 and cooldown of 0 steps do not fit"),
        (
            "model: {decoder: {attention_parts: qk_norm}}",
            "arm absent: model.decoder.attention_parts: expected a list, such as",
        ),
        ("model: {max_grad_norm: -1}", "model.max_grad_norm: expected more than 0, got -1"),
        (
            "model: {decoder: {position: {rope: {shar: 1}}}}",
            "options of rope (theta, share); got 'shar'",
        ),
        ("model: {optimizer: {name: {adamw: {shar: 1}}}}", "name: expected options of adamw (betas, eps); got 'shar'"),
        ("data: {micro_batch_size: 3}", "data.batch_size=4: expected a multiple of micro_batch_size=3"),
        ("trainer: {fast_dev_run: true}", "trainer.fast_dev_run: has no effect here"),
        ("model: {decoder: {n_layers: 1000000}}", "n_layers: expected an integer of at least 1 and at most 10000"),
        ("model: {decoder: {d_model: 100000000}}", "GB of memory of this machine"),
    ],
)
def test_what_fit_would_refuse_is_refused_before_any_arm_is_started(study, capsys, settings, message):
    (study.parent / "none.yaml").write_text(f"{settings}\n")
    assert main(["study", str(study), "--dry_run"]) == 1
    error = capsys.readouterr().err
    assert "arm absent: " in error and message in error and "none.yaml" in error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("workers: 2", "worker: 2"), "unknown key 'worker'"),
        (("base: [run.yaml]", "base: [nowhere.yaml]"), "names nowhere.yaml"),
        (("  fixed: [bos.yaml]", "  ../fixed: [bos.yaml]"), "names a folder"),
        (("title:", "# "), "expected the key 'title'"),
        (("workers: 2", "seeds: 0"), "seeds: expected a list of integers, got 0"),
        (("workers: 2", "seeds: [a]"), "seeds: expected a list of integers, got ['a']"),
        (("workers: 2", "workers: two"), "workers: expected an integer of at least 1, got 'two'"),
        (("workers: 2", "workers: 0"), "study.workers: expected an integer of at least 1"),
        (("workers: 2", "seeds: [1, 1]"), "expected distinct seeds"),
        (("workers: 2", "workers: [}"), "expected YAML"),
        (("  fixed: {bos: [90.84, 2.69]}", "  fixd: {bos: [90.84, 2.69]}"), "published.fixd"),
        (("  fixed: {bos: [90.84, 2.69]}", "  fixed: {bos: [90.84]}"), "published.fixed"),
        (("base: [run.yaml]", "base: run.yaml"), "base: a list of configs"),
        (("workers: 2", "most_seeds: 4"), "study.most_seeds: expected a half_width in one of the effects"),
        (("workers: 2", "most_seeds: 0"), "study.most_seeds: expected an integer of at least 1, got 0"),
        (("  absent: [none.yaml]", "  fixed: [none.yaml]"), "expected each key once, got 'fixed' here and in"),
        (
            (
                "workers: 2",
                "effects: [{name: E, metric: loss, arm: fixed, expected: up, against: absent, mode: nobos}]",
            ),
            "nobos",
        ),
        (
            (
                "workers: 2",
                "effects: [{name: E, metric: loss, arm: fixed, expected: up, against: absent, mode: as_trained}]",
            ),
            "loss of arm fixed: expected a mode that it is measured in (measure.modes: bos, text, first",
        ),
        (
            ("workers: 2", "effects: [{name: E, metric: jacobian, arm: fixed, expected: up, against: absent}]"),
            "jacobian of arm fixed: expected mixing to be measured while it trains (measure.mixing_points), got 0",
        ),
        (
            ("workers: 2", "effects: [{name: E, metric: loss_gp, arm: fixed, expected: up, against: absent}]"),
            "did you mean loss_gap?",
        ),
        *(
            (("workers: 2", f"effects: [{{name: E, arm: fixed, expected: up, against: absent, {keys}}}]"), message)
            for keys, message in (
                ("metric: loss_gap, mode: bos", "loss_gap of arm fixed: expected bos or as_trained in measure.modes"),
                ("metric: sink_rate_deep", "sink_rate_deep of arm fixed: expected three layers or more, got 2"),
                ("metric: sink_rate_placed, mode: bos", "arm absent: expected a token that data.strategy.first_token"),
                ("metric: sink_rate_placed, mode: text", "arm fixed: expected a mode that places a token"),
                ("metric: learned_mass", "expected a model.decoder.sink or registers, got neither"),
            )
        ),
        (
            (
                "base: [run.yaml]",
                "base: [run.yaml, {trainer: {strategy: fsdp2}, measure: {mixing_points: 2}}]\n"
                "effects: [{name: E, metric: jacobian, arm: fixed, expected: up, against: absent}]",
            ),
            "expected a trainer.strategy under which gradients of states can be taken, such as ddp, got fsdp2",
        ),
    ],
)
def test_a_wrong_study_file_is_one_message(study, capsys, change, message):
    study.write_text(study.read_text().replace(*change))
    assert main(["study", str(study)]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("content", ["data: [", "- a list", "data: 5"])
def test_an_overlay_that_is_no_config_is_named(study, capsys, content):
    (study.parent / "bos.yaml").write_text(content)
    assert main(["study", str(study)]) == 1
    assert str(study.parent / "bos.yaml") in capsys.readouterr().err


def test_a_study_that_runs_is_not_run_a_second_time(study, capsys):
    with locked(study.parent / "out"):
        assert main(["study", str(study), "--quiet"]) == 1
        assert "got a process that still does" in capsys.readouterr().err


def test_forcing_a_study_that_runs_clears_nothing(finished, capsys):
    (finished.parent / "none.yaml").write_text("data: {strategy: {first_token: random}}\n")
    out = finished.parent / "out"
    with locked(out):
        assert main(["study", str(finished), "--quiet", "--force"]) == 1
    assert "got a process that still does" in capsys.readouterr().err
    assert (out / "runs" / "absent-seed0" / directory.MEASUREMENT).exists()


def test_the_arms_can_be_looked_at_together_in_leet(finished):
    folder = finished.parent / "out" / "leet"
    links = {path.parent.name.split("-", 2)[2]: path for path in folder.glob("run-*/run-*.wandb")}
    assert links.keys() == {"fixed-seed0", "absent-seed0"} and all(p.name == f"run-{n}.wandb" for n, p in links.items())
    for name, path in links.items():
        assert path.resolve().is_relative_to(folder.parent / "runs" / name)
        assert list(read_wandb_file(path))


def test_the_link_of_another_arm_whose_name_ends_alike_stays(tmp_path):
    for name in ("a-b", "b"):
        segment = tmp_path / "runs" / name / "wandb" / "offline-run-20260101_000000-id" / "run-id.wandb"
        segment.parent.mkdir(parents=True)
        segment.touch()
    for name in ("a-b", "b", "b"):
        link_for_leet(tmp_path / "runs" / name, tmp_path / "leet")
    assert {path.name for path in (tmp_path / "leet").glob("*/*")} == {"run-a-b.wandb", "run-b.wandb"}


def test_a_missing_study_is_named(capsys):
    assert main(["study", "nowhere.yaml"]) == 1
    assert "nowhere.yaml" in capsys.readouterr().err
    assert main(["study", str(ROOT / "configs" / "study" / "pakcing.yaml")]) == 1
    assert f"did you mean {ROOT / 'configs' / 'study' / 'packing.yaml'}?" in capsys.readouterr().err


def test_the_shipped_studies_name_files_that_exist():

    shipped = list((ROOT / "configs" / "study").glob("*.yaml"))
    assert shipped
    for path in shipped:
        assert plan(load_study(path))


@pytest.mark.slow
def test_seeds_are_added_until_the_intervals_are_as_narrow_as_they_should_be(study, capsys):
    """One seed has no interval, two have a wide one: the second is enough, and a third is not run."""
    wide = "{name: E, metric: loss, arm: fixed, against: absent, expected: up, half_width: 1000}"
    study.write_text(study.read_text() + f"most_seeds: 3\neffects: [{wide}]\n")
    assert main(["study", str(study), "--dry_run"]) == 0
    assert "E: how many seeds ±1000 takes, two finished ones or more will tell" in capsys.readouterr().out
    assert main(["study", str(study), "--quiet"]) == 0
    assert "one seed more, 2 of at most 3, for the interval of 'E'" in capsys.readouterr().out
    assert {row["seed"] for row in table(study)} == {"0", "1"}
    assert main(["study", str(study), "--dry_run"]) == 0
    assert re.search(r"E: ±\d+\.\d+ with 2 seeds; ±1000 takes about 2\n", capsys.readouterr().out)


@pytest.mark.slow
def test_a_terminated_study_has_its_arms_save_and_goes_on_later(study):
    """Also in the background of a shell script, where SIGINT is ignored."""
    config = study.parent / "run.yaml"
    config.write_text(config.read_text().replace("max_steps: 10", "max_steps: 2000"))
    runs = plan(load_study(study))
    command = [sys.executable, "-m", "sinkbed", "study", str(study), "--quiet"]

    def ignore_interrupts():
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    with subprocess.Popen(
        command, preexec_fn=ignore_interrupts, env={**os.environ, **environment()}, stderr=subprocess.PIPE
    ) as process:
        end = time.monotonic() + 120
        while not all(r.resumable() for r in runs) and time.monotonic() < end and process.poll() is None:
            time.sleep(0.05)
        process.terminate()
        assert process.wait(60) == 130
    assert [r.status() for r in runs] == ["interrupted", "interrupted"], "neither failed nor finished"
    for run in runs:
        directory.lock(run.folder).close()  # raises where a process is left that writes
        saved = int(directory.newest_checkpoint(run.folder).stem.removeprefix("step-"))
        assert f"stopped at step {saved}" in (run.folder / LOG).read_text()


@pytest.mark.slow
def test_a_name_that_yaml_reads_as_something_else_is_a_name(study):
    study.write_text(
        study.read_text().replace("  absent: [none.yaml]", '  "on": []\n  "0.5": []\n  "1e-2": [none.yaml]')
    )
    assert main(["study", str(study), "--quiet"]) == 0
    assert {r["arm"] for r in table(study)} == {"fixed", "on", "0.5", "1e-2"}


@pytest.mark.slow
def test_preparing_is_waited_for_and_never_forced(study, monkeypatch, capsys):
    asked = []

    def prepare(command, argv):
        asked.append(argv)
        if len(asked) < 3:
            raise BlockingIOError(11, "another process is preparing it")
        return 0

    monkeypatch.setattr("sinkbed.train.cli.prepare.run", prepare)
    monkeypatch.setattr(study_command, "SECONDS_BETWEEN_LOOKS", 0.01)
    first, second = (study.parent / name for name in ("data.yaml", "more.yaml"))
    for config in (first, second):
        config.write_text(f"out: of-{config.stem}\n")
    study.write_text(study.read_text() + "prepare: [data.yaml, more.yaml]\n")
    assert main(["study", str(study), "--quiet", "--force"]) == 0
    assert asked == [["--config", str(config), "--quiet"] for config in (first, first, first, second)]
    assert capsys.readouterr().out.count("waiting: another process is preparing it") == 1


def test_an_interrupted_preparation_ends_the_study(study, monkeypatch):
    asked = []
    monkeypatch.setattr("sinkbed.train.cli.prepare.run", lambda command, argv: asked.append(argv) or 130)
    for name in ("data.yaml", "more.yaml"):
        (study.parent / name).write_text(f"out: of-{name}\n")
    study.write_text(study.read_text() + "prepare: [data.yaml, more.yaml]\n")
    assert main(["study", str(study), "--quiet"]) == 130
    assert len(asked) == 1 and not (study.parent / "out" / "runs").exists()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling needs a C++ compiler")
def test_compiled_arms_leave_nothing_behind(study):
    (study.parent / "none.yaml").write_text("model: {compile: true, decoder: {n_layers: 1}}\n")
    command = [sys.executable, "-m", "sinkbed", "study", str(study), "--quiet"]
    done = subprocess.run(command, env={**os.environ, **environment()}, capture_output=True, text=True, check=True)
    assert "leaked" not in done.stderr and len(list((study.parent / "out" / "runs").iterdir())) == 2
