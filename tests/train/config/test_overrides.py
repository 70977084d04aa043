"""What a config may say, and which setting overrides which."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from sinkbed.train.config.overrides import overridden
from tests.support.processes import Job
from tests.support.runs import refused


def test_one_line_says_what_overrode_what(tmp_path):
    (tmp_path / "a.yaml").write_text("trainer: {max_steps: 10}\nmodel: {optimizer: {lr: 1e-2}}\n")
    (tmp_path / "b.yaml").write_text("trainer: {max_steps: 20}\ndata: {seed: 1}\n")
    a, b = str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml")
    line = overridden(["--trainer.max_steps", "5", "--config", a, f"--config={b}", "--data.seed", "2"])
    assert line == (
        f"settings that override others: trainer.max_steps 20 ({b}) over 10 ({a}); data.seed 2 (option) over 1 ({b})"
    )
    (tmp_path / "c.yaml").write_text("model: {decoder: {position: {rope: {share: 0.5}}}}\n")
    line = overridden(["--config", str(tmp_path / "c.yaml"), "--model.decoder.position", "{rope: {theta: 5000}}"])
    assert "model.decoder.position {'rope': {'theta': 5000}} (option) over {'rope': {'share': 0.5}}" in line
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


@pytest.mark.slow
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


@pytest.mark.parametrize(
    "text",
    ["trainer: {callbacks: [{class_path: evil.X}]}", "model: {decoder: {position: {rope: {class_path: evil.X}}}}"],
)
def test_no_parser_of_a_process_imports_a_class_that_is_named(fit, tmp_path, text):
    """The first parser of a command reads plain values, and none before it has said what may be imported."""
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass X: pass\n")
    (tmp_path / "overlay.yaml").write_text(text)
    command = [sys.executable, "-m", "sinkbed", "fit", "--config", str(fit.config), "--config", "overlay.yaml"]
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, capture_output=True)
    assert done.returncode and b"overlay.yaml" in done.stderr and not (tmp_path / "ran").exists()
