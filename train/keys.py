"""The keys of a run's config, read from the source of the classes that take them.

Importing Lightning and torch takes seconds; a key that is misspelt is answered before.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent
_CLASSES = {
    "DecoderConfig": "model/config.py",
    "MeasureConfig": "train/measure.py",
    "OptimizerConfig": "train/optim.py",
    "SinkbedModule": "train/module.py",
    "Strategy": "data/strategy.py",
    "TokenData": "train/datamodule.py",
    "WandbConfig": "train/loggers.py",
}
_LIGHTNING = ("seed_everything", "ckpt_path")


@cache
def fit_keys() -> list[str]:
    """Every key of `sinkbed fit`, dotted, as a config writes them."""
    trainer = find_spec("lightning")
    assert trainer is not None and trainer.origin is not None
    path = Path(trainer.origin).parent / "pytorch" / "trainer" / "trainer.py"
    return [
        *_LIGHTNING,
        *(f"trainer.{name}" for name, _ in _parameters(path, "Trainer")),
        *_keys("model", "SinkbedModule"),
        *_keys("data", "TokenData"),
        *_added(),
    ]


def _added() -> Iterator[str]:
    """What `SinkbedCLI.add_arguments_to_parser` adds."""
    for node in ast.walk(ast.parse((_ROOT / "train/fit.py").read_text(encoding="utf-8"))):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        if node.func.attr == "add_argument" and isinstance(node.args[0], ast.Constant):
            yield str(node.args[0].value).lstrip("-")
        if node.func.attr == "add_class_arguments":
            yield from _keys(ast.literal_eval(node.args[1]), ast.unparse(node.args[0]))


def _keys(prefix: str, cls: str) -> Iterator[str]:
    for name, annotation in _parameters(_ROOT / _CLASSES[cls], cls):
        if annotation in _CLASSES:
            yield from _keys(f"{prefix}.{name}", annotation)
        else:
            yield f"{prefix}.{name}"


def _parameters(path: Path, cls: str) -> Iterator[tuple[str, str]]:
    """Name and annotation of what a class is made from: its constructor's parameters, or its fields."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    [body] = [node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == cls]
    for node in body:
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            for argument in (*node.args.args[1:], *node.args.kwonlyargs):
                yield argument.arg, ast.unparse(argument.annotation) if argument.annotation else ""
            return
    for node in body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id, ast.unparse(node.annotation)
