"""The rooms of the house: which there are, and that imports go down only."""

import ast
import os
import shutil
import subprocess
import sys
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
DATA = ["data", "data.source", "data.store", "data.prepare", "data.pack", "data.pack.methods"]
PARTS = [
    f"model.{part}"
    for part in ("attention_parts", "blocks", "feed_forward", "initializers", "norms", "positions", "sinks")
]
BELOW = [
    *DATA,
    "kernels",
    "kernels.normalizers",
    "kernels.triton",
    "model",
    "model.hf",
    "model.hf.architectures",
    "model.hf.foreign",
    *PARTS,
]
BELOW_LOOP = [*BELOW, "train.run", "train.config", "train.measure", "train.measure.measures"]
LOOP = ["train.loop", "train.loop.callbacks", "train.loop.optimizers"]
MAY_IMPORT = {
    "": [],  # `sinkbed` itself, which every room may import
    "data": [],
    "data.source": ["data"],
    "data.store": ["data"],
    "data.prepare": ["data", "data.source", "data.store"],
    "data.pack": ["data", "data.pack.methods", "data.store"],
    "data.pack.methods": ["data.pack"],
    # Variants of a part stand in a folder of their own; who uses the part knows the folder's registry only.
    "kernels": ["kernels.normalizers", "kernels.triton"],
    "kernels.normalizers": ["kernels"],
    "kernels.triton": ["kernels", "kernels.normalizers"],
    "model": ["kernels", "kernels.normalizers", *PARTS],
    **{part: ["model"] for part in PARTS},
    "model.attention_parts": ["model", "model.norms"],
    "model.blocks": ["model", "model.norms"],
    "model.hf": ["kernels", "model", "model.hf.architectures", "model.hf.foreign", "model.positions"],
    "model.hf.architectures": ["model", "model.hf"],
    "model.hf.foreign": ["model.hf"],
    "train.run": BELOW,
    "train.config": [*BELOW, "train.run"],
    "train.measure": [*BELOW, "train.run", "train.config", "train.measure.measures"],
    "train.measure.measures": [*BELOW, "train.measure"],
    "train.loop": [*BELOW_LOOP, "train.loop.callbacks", "train.loop.optimizers"],
    "train.loop.optimizers": ["train.loop"],
    "train.loop.callbacks": [*BELOW_LOOP, "train.loop"],
    "train.study": [*BELOW_LOOP, "train.loop"],
    "train.report": [*BELOW_LOOP, "train.study"],
    "train.bench": [*BELOW_LOOP, "train.loop"],
    "train.cli": [
        *BELOW_LOOP,
        "train.loop",
        "train.loop.callbacks",
        "train.loop.optimizers",
        "train.study",
        "train.report",
        "train.bench",
    ],
}


def find_modules() -> dict[str, Path]:
    """Every module by its import name below `sinkbed`; front doors (`__init__`, `__main__`) left out."""
    folders = {Path(folder): package for package, folder in SETUPTOOLS["package-dir"].items()}
    modules = {}
    for folder in {path.parts[0] for path in folders}:
        for path in (ROOT / folder).rglob("*.py"):
            path = path.relative_to(ROOT)
            above = max((f for f in folders if path.is_relative_to(f)), key=lambda f: len(f.parts))
            name = ".".join((folders[above], *path.relative_to(above).with_suffix("").parts))
            if path.stem not in ("__init__", "__main__"):
                modules[name.removeprefix("sinkbed.")] = ROOT / path
    return modules


MODULES = find_modules()


def imported(path: Path) -> set[str]:
    """The modules, or front doors, of the project that a file imports anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    ours = {name.removeprefix("sinkbed.") for name in names if name.startswith("sinkbed.")}
    return {name if name in MODULES else name.rpartition(".")[0] for name in ours}


IMPORTS = {name: imported(path) for name, path in MODULES.items()}


def room(module: str) -> str:
    return module.rpartition(".")[0] if module in MODULES else module


def test_every_room_is_known_and_packaged():
    assert {room(name) for name in MODULES} == {*MAY_IMPORT}
    packages = {*SETUPTOOLS["packages"]} - {"sinkbed.train"}
    assert packages == {f"sinkbed.{name}".rstrip(".") for name in MAY_IMPORT}


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_imports_go_down_only(name):
    arrows = {(module, other) for module in MODULES if room(module) == name for other in IMPORTS[module]}
    assert arrows or name == "", "a room whose modules import nothing of ours was not looked at"
    assert not [(a, b) for a, b in arrows if room(b) not in {name, "", *MAY_IMPORT[name]}]


def test_no_module_imports_itself_over_any_number_of_others():
    TopologicalSorter({module: IMPORTS[module] & MODULES.keys() for module in MODULES}).prepare()


@pytest.mark.slow
@pytest.mark.parametrize("installed", ["editable", "from a wheel"])
def test_it_is_used_from_a_folder_with_packages_of_the_same_names(installed, tmp_path):
    environment = dict(os.environ)
    if installed == "from a wheel":
        checkout = tmp_path / "checkout"
        shutil.copytree(ROOT, checkout, ignore=shutil.ignore_patterns(".*", "build", "runs", "stores", "*.egg-info"))
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
        subprocess.run([*pip, "--target", str(tmp_path / "site"), str(checkout)], check=True, capture_output=True)
        assert (tmp_path / "site/sinkbed/kernels/triton/baseline-3.9.0.csv").is_file()
        assert (tmp_path / "site/sinkbed/train/report/page.css").is_file()
        environment["PYTHONPATH"] = str(tmp_path / "site")
    work = tmp_path / "work"
    (work / "data").mkdir(parents=True)
    for name in ("data/__init__.py", "train.py", "model.py", "kernels.py", "wandb.py"):
        (work / name).write_text("raise SystemExit('the wrong module')\n")
    code = "from sinkbed.data import TokenStore; import sinkbed; print(sinkbed.__file__)"
    for command, expected in (
        (["-m", "sinkbed", "fit", "--help"], "--data.strategy.packing"),
        (["-m", "sinkbed", "kernels", "--help"], "--arch"),
        (["-P", "-c", code], str(tmp_path if installed == "from a wheel" else ROOT)),
    ):
        done = subprocess.run([sys.executable, *command], cwd=work, env=environment, capture_output=True, text=True)
        assert expected in done.stdout, (command, done.stderr)
