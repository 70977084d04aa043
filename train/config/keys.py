"""The keys of a config: which there are, which one was meant.

Those of a run are read from the source of the classes that take them: importing Lightning and torch takes seconds, and
a key that is misspelt is answered before.
"""

from __future__ import annotations

import ast
import difflib
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from sinkbed.train.config.yaml_files import key_lines

_CLASSES = {
    "DecoderConfig": "sinkbed.model.config",
    "MeasureConfig": "sinkbed.train.measure.config",
    "OptimizerConfig": "sinkbed.train.loop.optim",
    "SinkbedModule": "sinkbed.train.loop.module",
    "Strategy": "sinkbed.data.pack.strategy",
    "TokenData": "sinkbed.train.loop.datamodule",
    "WandbConfig": "sinkbed.train.run.wandb",
}
_LIGHTNING = ("seed_everything", "ckpt_path")


@cache
def fit_keys() -> list[str]:
    """Every key of `sinkbed fit`, dotted, as a config writes them."""
    path = _source("lightning").parent / "pytorch" / "trainer" / "trainer.py"
    return [
        *_LIGHTNING,
        *(f"trainer.{name}" for name, _ in _parameters(path, "Trainer")),
        *_keys("model", "SinkbedModule"),
        *_keys("data", "TokenData"),
        *_added(),
    ]


def _added() -> Iterator[str]:
    """What `SinkbedCLI.add_arguments_to_parser` adds."""
    for node in ast.walk(ast.parse(_source("sinkbed.train.loop.trainer").read_text(encoding="utf-8"))):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        if node.func.attr == "add_argument" and isinstance(node.args[0], ast.Constant):
            yield str(node.args[0].value).lstrip("-")
        if node.func.attr == "add_class_arguments":
            yield from _keys(ast.literal_eval(node.args[1]), ast.unparse(node.args[0]))


def _source(module: str) -> Path:
    """The file of a module, which is not run."""
    spec = find_spec(module)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin)


def _keys(prefix: str, cls: str) -> Iterator[str]:
    for name, annotation in _parameters(_source(_CLASSES[cls]), cls):
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


def is_known(key: str, keys: Sequence[str]) -> bool:
    """Whether it is one of the keys, a group of them, or lies inside the value of one."""
    return any(key == other or other.startswith(f"{key}.") or key.startswith(f"{other}.") for other in keys)


def unknown_keys(path: Path, keys: Sequence[str]) -> Iterator[str]:
    """What is wrong with each key of a YAML file that is not among `keys`, with its line."""
    for key, line in key_lines(path).items():
        if not is_known(key, keys):
            yield f"{path}, line {line}: {unknown(key, keys)}"


def unknown(option: str, keys: Sequence[str]) -> str:
    """That there is no such key, with the one that was probably meant."""
    key = option.lstrip("-").split("=")[0]
    near = difflib.get_close_matches(key, keys, n=1, cutoff=0.6) or _same_leaf(key, keys)
    if not near:  # the group is misspelt
        group, _, leaf = key.partition(".")
        groups = difflib.get_close_matches(group, {k.partition(".")[0] for k in keys}, n=1)
        near = [f"{name}.{leaf}" if leaf else name for name in groups]
    meant = f"; did you mean {near[0]}?" if near else ""
    return f"{option}: expected a known key, found none of that name{meant}"


def _same_leaf(key: str, keys: Sequence[str]) -> list[str]:
    """Keys that end in the same, or nearly the same, last part."""
    leaves = {k.rsplit(".", 1)[-1]: k for k in keys}
    return [leaves[near] for near in difflib.get_close_matches(key.rsplit(".", 1)[-1], leaves, n=1, cutoff=0.75)]
