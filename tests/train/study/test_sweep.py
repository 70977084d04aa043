"""W&B beside a study: the sweep file, the arm that its agent runs, the study's summary."""

import contextlib
import itertools
import json
import os
import subprocess
import sys

import pytest
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args, load_sweep_config

from sinkbed.train.cli.main import main
from sinkbed.train.run import directory
from sinkbed.train.study.arms import environment, plan
from sinkbed.train.study.file import load_study
from sinkbed.train.study.sweep import sweep_of
from tests.support.runs import write_run_config


def write_study(tmp_path, store):
    """Two arms under two seeds."""
    write_run_config(tmp_path / "run.yaml", store)
    path = tmp_path / "study.yaml"
    path.write_text(
        f"title: A study\nout: {tmp_path / 'out'}\nbase: [run.yaml]\nseeds: [3, 4]\n"
        "grid: {lr: {1e-2: {}, 5e-3: {model: {optimizer: {lr: 5.0e-3}}}}}\nsizes: {demo: {}}\n"
    )
    return path


def agent_commands(path):
    """The command lines that `wandb agent` makes of a grid, by wandb's own functions."""
    sweep = load_sweep_config(str(path))
    assert sweep["method"] == "grid"
    axes = {name: found["values"] for name, found in sweep["parameters"].items()}
    for values in itertools.product(*axes.values()):
        given = {name: {"value": value} for name, value in zip(axes, values, strict=True)}
        parts = create_sweep_command_args({"args": given})
        command = create_sweep_command(list(sweep["command"]))
        yield [word for part in command for word in (parts["args"] if part == "${args}" else [part])]


@pytest.mark.slow
def test_the_agents_of_a_sweep_run_the_arms_of_the_study(tiny_store, tmp_path, capsys):
    study = write_study(tmp_path, tiny_store)
    assert main(["study", str(study), "--sweep", str(tmp_path / "sweep.yaml")]) == 0
    assert "4 runs" in capsys.readouterr().out
    commands = list(agent_commands(tmp_path / "sweep.yaml"))
    assert all(c[:3] == ["${env}", "sinkbed", "study"] for c in commands), "env is wandb's own word for /usr/bin/env"
    runs = plan(load_study(study))
    assert len(commands) == len(runs) == 4
    assert not any(r.folder.exists() for r in runs), "writing the sweep runs nothing"

    # As the agent starts the first, in a process of its own: it has made the W&B run.
    variables = {**os.environ, **environment(), "WANDB_SWEEP_ID": "sweep1", "WANDB_RUN_ID": "agentrun"}
    subprocess.run([sys.executable, "-m", "sinkbed", *commands[0][2:]], check=True, env=variables)
    done = [r for r in runs if r.status() == "finished"]
    assert [(r.arm, r.seed) for r in done] == [("lr-1e-2", 3)]
    assert directory.read_json(done[0].folder / directory.RUN)["wandb_id"] == "agentrun"
    assert list(done[0].folder.glob("wandb/offline-run-*-agentrun")), "one W&B run, the agent's"
    capsys.readouterr()
    assert main(commands[0][2:]) == 0
    assert "finished already" in capsys.readouterr().out

    # The study takes over what agents ran, and runs the rest.
    before = (done[0].folder / directory.METRICS).stat().st_mtime_ns
    assert main(["study", str(study), "--quiet"]) == 0
    assert all(r.status() == "finished" for r in runs)
    assert (done[0].folder / directory.METRICS).stat().st_mtime_ns == before
    groups = {yaml.safe_load((r.folder / directory.CONFIG).read_text())["wandb"]["group"] for r in runs}
    assert groups == {"out"}, "one W&B group, the study's"
    summary_of_the_study(tmp_path / "out")


def summary_of_the_study(out):
    """Its W&B run has the report's table and the runs, under an id that stays."""
    wandb_id = directory.read_json(out / "summary.json")["wandb_id"]
    [folder] = out.glob(f"wandb/offline-run-*-{wandb_id}")
    found = {file.name.split("_")[0]: json.loads(file.read_text()) for file in folder.rglob("*.table.json")}
    assert set(found) == {"table", "runs"}
    for name, rows in (("table", 2), ("runs", 4 * 3)):
        table = found[name]
        assert {row[table["columns"].index("arm")] for row in table["data"]} == {"lr-1e-2", "lr-5e-3"}
        assert len(table["data"]) == rows, "an arm a row; of the runs, an arm, seed and mode"
    assert any("±" in str(cell) for row in found["table"]["data"] for cell in row)


def test_the_metric_of_a_sweep_is_one_that_its_runs_measure(tiny_store, tmp_path):
    study = write_study(tmp_path, tiny_store)
    assert sweep_of(load_study(study))["metric"]["name"] == "final/val/loss/bos"
    study.write_text(study.read_text().replace("[run.yaml]", "[run.yaml, {measure: {modes: [as_trained, text]}}]"))
    assert sweep_of(load_study(study))["metric"]["name"] == "final/val/loss/as_trained"


def test_an_arm_that_the_study_does_not_have_is_named(tiny_store, tmp_path, capsys):
    study = write_study(tmp_path, tiny_store)
    assert main(["study", str(study), "--arm", "lr-1", "--seed", "3"]) == 1
    assert "--arms: expected some of lr-1e-2, lr-5e-3; got lr-1" in capsys.readouterr().err


def test_an_arm_that_fails_under_an_agent_is_recorded(tiny_store, tmp_path, capsys):
    study = write_study(tmp_path, tiny_store)
    text = study.read_text()
    for wrong, told in (
        ("window: 0", "window"),
        ("windw: 8", "arm lr-5e-3: data.strategy.windw: expected a known key"),
    ):
        study.write_text(text.replace("{model: {optimizer: {lr: 5.0e-3}}}", f"{{data: {{strategy: {{{wrong}}}}}}}"))
        with contextlib.suppress(SystemExit):
            assert main(["study", str(study), "--arm", "lr-5e-3", "--force"]) == 1
        [run] = [r for r in plan(load_study(study)) if r.arm == "lr-5e-3" and r.seed == 3]
        assert run.status() == "failed" and told in run.reason()
