"""The command line as a whole, and the walls between the packages."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from train.cli import COMMANDS, main

ROOT = Path(__file__).parent.parent.parent


def test_help_imports_nothing_heavy():
    code = "import sys; from train.cli import main\ntry: main(['--help'])\nfinally: print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "prepare" in done.stdout and "study" in done.stdout
    for heavy in ("torch", "lightning", "numpy", "wandb", "datasets"):
        assert f"'{heavy}'" not in done.stdout


def test_an_unknown_command_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["trian"])
    assert stop.value.code == 2
    assert "trian" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "usage: sinkbed" in shown and len(shown) > 200


ALLOWED = {"data": {"data"}, "kernels": {"kernels"}, "model": {"model", "kernels"}}


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_go_one_way(package):
    ours = {"data", "kernels", "model", "train"}
    seen = set()
    for path in (ROOT / package).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            seen |= {n.split(".")[0] for n in names} & ours
    assert seen, "the package imports at least its own modules"
    assert seen <= ALLOWED[package]


def test_prepare_runs_from_its_config(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("one document " * 20)
    (tmp_path / "b.txt").write_text("another document " * 20)
    config = tmp_path / "data.yaml"
    config.write_text(
        f"source: {{kind: text, files: ['{tmp_path}/*.txt']}}\n"
        f"tokenizer: {{vocab_size: 260}}\nvalidation_share: 0.0\nout: {tmp_path}/store\n"
    )
    assert main(["prepare", "--config", str(config), "--quiet"]) == 0
    assert (tmp_path / "store" / "manifest.json").exists()
    assert main(["prepare", "--config", str(config), "--quiet"]) == 0
    assert main(["prepare", "--config", str(config), "--quiet", "--tokenizer.vocab_size", "261"]) == 1
    assert "--force" in capsys.readouterr().err


RUNS = sorted(ROOT.glob("configs/run/*.yaml"))
OVERLAYS = sorted(p for folder in ("strategy", "model", "optimizer") for p in ROOT.glob(f"configs/{folder}/*.yaml"))


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_overlay_fits_every_run_config(overlay, capsys):
    assert RUNS and len(OVERLAYS) > 10
    for run in RUNS:
        with pytest.raises(SystemExit) as stop:
            main(["fit", "--config", str(run), "--config", str(overlay), "--print_config"])
        assert stop.value.code == 0, capsys.readouterr().err
        assert "run_dir" in capsys.readouterr().out
