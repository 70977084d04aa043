"""YAML files of plain values, read so that nothing in them is lost or taken for something else.

Refused: a key that stands twice, of which one would be lost; `010`, which YAML reads as 8, and `1:30`, which it reads
as 90; a file that a few aliases blow up. A key is the text that stands there: `on` is a name and no truth value.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from sinkbed.train.run.directory import check_config

_MOST_NODES = 1_000_000
"""Values of a file, aliases written out. The largest study has some thousands."""
_OTHER_BASE = re.compile(r"[-+]?(0[0-9_]+|[0-9_]+(:[0-9_]+)+(\.[0-9_]*)?)")


class _NotPlain(yaml.MarkedYAMLError):
    """YAML, but not of the kind that is read here."""

    def __init__(self, problem: str, node: yaml.Node) -> None:
        super().__init__(problem=problem, problem_mark=node.start_mark)


class _PlainLoader(yaml.SafeLoader):
    """What stands there, or an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        first: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _NotPlain("expected a name as the key, got a list or keys", key)
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.value in first:
                raise _NotPlain(
                    f"expected each key once, got {key.value!r} here and in line {first[key.value]}; remove one", key
                )
            first[key.value] = key.start_mark.line + 1
            key.tag = "tag:yaml.org,2002:str"
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        return _decimal(node, super().construct_yaml_int(node))

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        return _decimal(node, super().construct_yaml_float(node))


def _decimal(node: yaml.ScalarNode, number: Any) -> Any:
    """The number; raises where YAML reads digits in another base."""
    if _OTHER_BASE.fullmatch(node.value):
        raise _NotPlain(
            f"expected a decimal number, got {node.value}, which YAML reads as {number}; write {number}, or put it in "
            "quotes",
            node,
        )
    return number


_PlainLoader.add_constructor("tag:yaml.org,2002:int", _PlainLoader.construct_yaml_int)
_PlainLoader.add_constructor("tag:yaml.org,2002:float", _PlainLoader.construct_yaml_float)


def _compose(path: Path) -> tuple[_PlainLoader, yaml.Node | None]:
    content = path.read_bytes()
    check_config(path, content)
    loader = _PlainLoader(content)
    node = loader.get_single_node()
    if node is not None:
        _count(node, {})
    return loader, node


def _count(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Values under a node, aliases written out."""
    if id(node) not in sizes:
        sizes[id(node)] = _MOST_NODES + 1  # what holds itself has no end
        inside = node.value if isinstance(node, yaml.CollectionNode) else ()
        parts = [part for item in inside for part in (item if isinstance(item, tuple) else (item,))]
        sizes[id(node)] = 1 + sum(_count(part, sizes) for part in parts)
        if sizes[id(node)] > _MOST_NODES:
            raise _NotPlain(f"expected at most {_MOST_NODES:,} values, got more once aliases are written out", node)
    return sizes[id(node)]


def read_yaml(path: Path) -> Any:
    """What a YAML file holds. Raises ValueError that names the file and the line at fault."""
    try:
        loader, node = _compose(path)
        return None if node is None else loader.construct_document(node)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        expected = "" if isinstance(error, _NotPlain) else "expected YAML of plain values, got: "
        raise ValueError(f"{where}: {expected}{problem}") from None


def read_mapping(path: Path) -> dict[str, Any]:
    """The keys of a YAML file. Raises ValueError for a file that holds something else."""
    content = read_yaml(path)
    if not isinstance(content, dict):
        text = "an empty file" if content is None else repr(str(content)[:60])
        raise ValueError(f"{path}: expected YAML with keys, such as the files in configs/; got {text}")
    return content


def leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of all below `key` that is no mapping."""
    if isinstance(value, dict):
        for name, each in value.items():
            yield from leaves(each, f"{key}.{name}" if key else str(name))
    elif key:
        yield key, value


def key_lines(path: Path) -> dict[str, int]:
    """The keys of a file that `read_yaml` reads, dotted (`model.decoder.n_layers`), with their lines."""

    def walk(node: yaml.Node | None, prefix: str) -> Iterator[tuple[str, int]]:
        if isinstance(node, yaml.MappingNode):
            loader.flatten_mapping(node)
            for key, value in node.value:
                yield prefix + key.value, key.start_mark.line + 1
                yield from walk(value, f"{prefix}{key.value}.")

    loader, root = _compose(path)
    return dict(walk(root, ""))
