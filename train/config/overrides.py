"""Which settings of a command line override which: later files and options win, and their order is easily mistaken."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from sinkbed.train.config.keys import fit_keys
from sinkbed.train.config.yaml_files import read_mapping


def overridden(argv: Sequence[str]) -> str:
    """One line on the settings that a later --config or option changes; empty where none does."""
    known: dict[str, tuple[Any, str]] = {}
    lines: dict[str, str] = {}
    for key, value, source in _settings(argv):
        if key in known and known[key][0] not in (value, None):
            before, earlier = known[key]
            lines[key] = f"{key} {_short(value)} ({source}) over {_short(before)} ({earlier})"
        known[key] = (value, source)
    return f"settings that override others: {'; '.join(lines.values())}" if lines else ""


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _settings(argv: Sequence[str]) -> Iterator[tuple[str, Any, str]]:
    """(dotted key, value, file or `option`) in the order in which they count."""
    index = 0
    while index < len(argv):
        name, separator, value = argv[index].partition("=")
        index += 1
        if not name.startswith("--"):
            continue
        if not separator:
            if index == len(argv) or argv[index].startswith("--"):  # a switch
                continue
            value, index = argv[index], index + 1
        key = name.removeprefix("--")
        if key == "config":
            if Path(value).is_file():
                yield from ((k, _number(v), value) for k, v in _keys(read_mapping(Path(value))))
            continue
        try:
            plain = yaml.safe_load(value)
        except yaml.YAMLError:
            plain = value
        yield from ((k, _number(v), "option") for k, v in _keys(plain, key))


def _keys(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value); the value of a key, such as `{name: {option: …}}`, is replaced whole."""
    if not isinstance(value, dict) or not value or key in fit_keys():
        yield key, value
        return
    for name, inside in value.items():
        yield from _keys(inside, f"{key}.{name}" if key else str(name))


def _number(value: Any) -> Any:
    """PyYAML takes 1e-3 for a text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value
