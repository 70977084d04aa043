"""The keys of a config: which there are, which one was meant.

Those of a run are read from the source of the classes that take them: importing Lightning and torch takes seconds, and
a key that is misspelt is answered before.
"""

import ast
import builtins
import difflib
import re
import typing
from collections.abc import Collection, Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from sinkbed.train.config.yaml_files import key_lines, leaves, read_mapping

_CLASSES = {
    "DecoderConfig": "sinkbed.model.config",
    "MeasureConfig": "sinkbed.train.measure.config",
    "OptimizerConfig": "sinkbed.train.loop.optim",
    "SinkbedModule": "sinkbed.train.loop.module",
    "Strategy": "sinkbed.data.pack.strategy",
    "TokenData": "sinkbed.train.loop.datamodule",
    "WandbConfig": "sinkbed.train.run.wandb",
}


class Key(NamedTuple):
    """What a key takes."""

    kind: Any
    """Its type; `Any` where the source names one that only a heavy import has."""
    required: bool


@cache
def fit_keys() -> dict[str, Key]:
    """Every key of `sinkbed fit`, dotted, as a config writes them."""
    path = _source("lightning").parent / "pytorch" / "trainer" / "trainer.py"
    return {
        "seed_everything": Key(bool | int, False),
        "ckpt_path": Key(str | None, False),
        **{f"trainer.{name}": key for name, _, key in _parameters(path, "Trainer")},
        **_keys("model", "SinkbedModule"),
        **_keys("data", "TokenData"),
        **_added(),
    }


def _added() -> dict[str, Key]:
    """What `SinkbedCLI.add_arguments_to_parser` adds."""
    added: dict[str, Key] = {}
    for node in ast.walk(ast.parse(_source("sinkbed.train.loop.trainer").read_text(encoding="utf-8"))):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        if node.func.attr == "add_argument" and isinstance(node.args[0], ast.Constant):
            given = {str(keyword.arg): keyword.value for keyword in node.keywords}
            kind = _evaluated(ast.unparse(given["type"]), _NAMES)
            added[str(node.args[0].value).lstrip("-")] = Key(kind, "required" in given)
        if node.func.attr == "add_class_arguments":
            added |= _keys(ast.literal_eval(node.args[1]), ast.unparse(node.args[0]))
    return added


def _source(module: str) -> Path:
    """The file of a module, which is not run."""
    spec = find_spec(module)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin)


def _keys(prefix: str, cls: str) -> dict[str, Key]:
    keys: dict[str, Key] = {}
    for name, annotation, key in _parameters(_source(_CLASSES[cls]), cls):
        keys |= _keys(f"{prefix}.{name}", annotation) if annotation in _CLASSES else {f"{prefix}.{name}": key}
    return keys


def _parameters(path: Path, cls: str) -> Iterator[tuple[str, str, Key]]:
    """Name and annotation of what a class is made from: its constructor's parameters, or its fields."""
    tree, names = ast.parse(path.read_text(encoding="utf-8")), dict(_NAMES)
    for node in tree.body:  # MaskKind = Literal[...]
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Subscript | ast.BinOp):
            names[ast.unparse(node.targets[0])] = _evaluated(ast.unparse(node.value), names)
    [body] = [node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == cls]
    parameters: list[tuple[str, ast.expr | None, bool]] = []
    for node in body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            parameters.append((node.target.id, node.annotation, node.value is None))
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            plain, named = node.args.args[1:], node.args.kwonlyargs
            without = len(plain) - len(node.args.defaults)
            parameters = [(each.arg, each.annotation, at < without) for at, each in enumerate(plain)]
            parameters += [
                (each.arg, each.annotation, value is None)
                for each, value in zip(named, node.args.kw_defaults, strict=True)
            ]
            break
    for name, expression, required in parameters:
        annotation = ast.unparse(expression) if expression else "Any"
        yield name, annotation, Key(_evaluated(annotation, names), required)


_NAMES = {**vars(typing), **vars(builtins), "Path": Path}


def _evaluated(annotation: str, names: dict[str, Any]) -> Any:
    try:
        return eval(annotation, names)
    except (NameError, TypeError):
        return Any


def is_known(key: str, keys: Collection[str]) -> bool:
    """Whether it is one of the keys, a group of them, or lies inside the value of one."""
    return any(key == other or other.startswith(f"{key}.") or key.startswith(f"{other}.") for other in keys)


def wrong_keys(path: Path, keys: Collection[str]) -> Iterator[str]:
    """What is wrong with each key of a YAML file that is not among `keys`, or a group of them without keys of its
    own, with its line."""
    lines = key_lines(path)
    for key, line in lines.items():
        if not is_known(key, keys):
            yield f"{path}, line {line}: {unknown(key, keys)}"
    for key, value in leaves(read_mapping(path)):
        if key not in keys and any(other.startswith(f"{key}.") for other in keys):
            text = "none" if value is None else repr(str(value)[:60])
            yield f"{path}, line {lines[key]}: {key}: expected keys below it, got {text}; give some or remove it"


def unknown(option: str, keys: Collection[str]) -> str:
    """That there is no such key, with the one that was probably meant, or those of its group."""
    key = option.lstrip("-").split("=")[0]
    group, dot, leaf = key.partition(".")
    groups = {name[:at] for name in keys for at in range(len(name)) if name[at] == "."}
    every = sorted({key for key in {*keys, *groups} if not key.endswith(".help")})
    # The longest part of the key that is a group, with a dot, and what is below it; all where none is.
    parent = max((f"{name}." for name in groups if key.startswith(f"{name}.")), key=len, default="")
    below = [name.removeprefix(parent) for name in every if name.startswith(parent)]
    near = [name for name in every if name.endswith(f".{key}")] or [name for name in every if name == leaf]
    cutoff = 0.6 if parent or not dot else 0.85
    near = near or [parent + n for n in difflib.get_close_matches(key.removeprefix(parent), below, n=1, cutoff=cutoff)]
    near = near or _same_leaf(key, [name for name in every if name.startswith(f"{group}.")] or every)
    if not near:  # the group is misspelt
        near = [f"{name}{dot}{leaf}" for name in difflib.get_close_matches(group, groups, n=1)]
    meant = f"; did you mean {near[0]}?" if near and near[0] != key else ""
    if not meant and parent:
        meant = f"; {parent.rstrip('.')} has {', '.join(below)}"
    return f"{option}: expected a known key, got none of that name{meant}"


def _same_leaf(key: str, keys: Collection[str]) -> list[str]:
    """Keys that end in the same, or nearly the same, last part."""
    ends = {k.rsplit(".", 1)[-1]: k for k in keys}
    return [ends[near] for near in difflib.get_close_matches(key.rsplit(".", 1)[-1], ends, n=1, cutoff=0.75)]


def located(message: str, argv: Sequence[str]) -> str:
    """A message that begins with a key, with the file and line before it where the key was given in a --config."""
    begins = re.match(r"([\w.]+)[:=]", message)
    if begins is None or Path(begins[1]).is_file():  # a file that may not even be YAML
        return message
    place = ""
    for index, argument in enumerate(argv):
        option, _, value = argument.partition("=")
        path = Path(value or " ".join(argv[index + 1 : index + 2]))
        if option == f"--{begins[1]}":
            place = ""
        elif option == "--config" and path.is_file() and (line := key_lines(path).get(begins[1])):
            place = f"{path}, line {line}: "
    return f"{place}{message}"
