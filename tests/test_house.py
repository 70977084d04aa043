"""The rooms of the house: which there are, and that imports go down only."""

import ast
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
KERNELS, DATA = {"kernels"}, {"data", "data.source", "data.store", "data.prepare", "data.pack"}
BELOW_RUN = {*KERNELS, "model", "model.hf", *DATA, "train"}
MAY_IMPORT = {
    "data": set(),
    "data.source": {"data"},
    "data.store": {"data"},
    "data.prepare": {"data", "data.source", "data.store"},
    "data.pack": {"data", "data.store"},
    "kernels": {"kernels.triton"},
    "kernels.triton": {"kernels"},  # an implementation beside the others, in a folder of its own
    "model": KERNELS,
    "model.hf": {"model", *KERNELS},
    "train": set(),
    "train.run": BELOW_RUN,
    "train.config": {*BELOW_RUN, "train.run"},
    "train.measure": {*BELOW_RUN, "train.run", "train.config"},
    "train.loop.callbacks": {*BELOW_RUN, "train.run", "train.config", "train.measure", "train.loop"},
    "train.loop": {*BELOW_RUN, "train.run", "train.config", "train.measure", "train.loop.callbacks"},
    "train.study": {*BELOW_RUN, "train.run", "train.config", "train.measure", "train.loop", "kernels.triton"},
    "train.report": {*BELOW_RUN, "train.run", "train.config", "train.measure", "train.study"},
    "train.bench": {*BELOW_RUN, "train.run", "train.config", "train.measure", "train.loop"},
}
EVERYTHING = {*MAY_IMPORT}
MAY_IMPORT["train.cli"] = EVERYTHING
MAY_IMPORT["train.sinkbed"] = {"train.cli"}


def modules() -> dict[str, Path]:
    """Every module of the project by its name below `sinkbed`, its front doors (`__init__`) left out."""
    folders = [ROOT / name for name in ("data", "kernels", "model", "train")]
    paths = [path for folder in folders for path in folder.rglob("*.py") if path.name != "__init__.py"]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in paths}


def imported(path: Path, names) -> set[str]:
    """The modules, or front doors, of the project that a file imports anywhere in it."""
    result = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in found:
            if name.split(".")[0] == "sinkbed":
                name = name.removeprefix("sinkbed.")
                result.add(name if name in names else name.rpartition(".")[0])
    return result


MODULES = modules()
IMPORTS = {name: imported(path, MODULES) for name, path in MODULES.items()}


def room(module: str) -> str:
    return module.rpartition(".")[0] if module in MODULES else module


def test_every_room_is_known_and_holds_modules_that_import_each_other():
    assert {room(name) for name in MODULES} == {*MAY_IMPORT}
    assert sum(map(len, IMPORTS.values())) > 300


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_imports_go_down_only(name):
    arrows = {(module, other) for module in MODULES if room(module) == name for other in IMPORTS[module]}
    assert not [(a, b) for a, b in arrows if room(b) not in {name, *MAY_IMPORT[name]}]


def test_no_two_modules_import_each_other_over_any_number_of_others():
    TopologicalSorter({a: {b for b in others if b in MODULES} for a, others in IMPORTS.items()}).prepare()


def test_every_room_is_packaged():
    packages = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    rooms = {f"sinkbed.{path}" for path in MAY_IMPORT if path != "train.sinkbed"}
    assert packages == {"sinkbed", *rooms, "sinkbed.train", "sinkbed.data"}
