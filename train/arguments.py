"""Parsers whose complaint is one message: the key at fault, what was expected, and the key that was probably meant."""

from __future__ import annotations

import difflib
import re
import sys
from argparse import ArgumentError
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ArgumentParser
from lightning.pytorch.cli import LightningArgumentParser

_UNKNOWN = (
    r"does not accept option '([\w.]+)'",
    r"unrecognized arguments: (\S+)",
    r"Key '([\w.]+)' is not expected",
    r"Option '([\w.]+)' is not accepted",
)
_NO_TYPE = r'Parser key "([\w.]+)":.*Subtypes: \[(.*?)\]\n.*Given value: (.*)'
_WRONG_TYPE = r'Parser key "([\w.]+)":\s+(?:Expected an? (.+?)\. Got value: (.*)|(.+))'

# A group of keys that may be null: jsonargparse lists why it is neither the group nor null.
_NEITHER = r"Union subtypes\n.*Errors:\n  - (.*?)\n  - Expected a <class 'NoneType'>"


def check_yaml(argv: Sequence[str]) -> None:
    """Refuse a --config that is no YAML of plain values; raises ValueError with file and line."""
    import yaml

    for index, argument in enumerate(argv):
        value = argv[index + 1] if argument == "--config" and index + 1 < len(argv) else argument.partition("=")[2]
        if argument.partition("=")[0] != "--config" or not Path(value).is_file():
            continue
        try:
            yaml.safe_load(Path(value).read_text())
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            mark = getattr(error, "problem_mark", None)
            where = f"{value}, line {mark.line + 1}" if mark else value
            problem = getattr(error, "problem", None) or error
            raise ValueError(f"{where}: expected YAML of plain values, found: {problem}") from None


class ShortErrors:
    """Mixin for parsers of jsonargparse: no usage of a hundred lines before the error."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the message and how to learn more; exit with status 2."""
        parser: Any = getattr(ex, "subcommand_parser", None) or self
        if not parser.exit_on_error:  # a group of keys is tried against one type of several
            raise ArgumentError(None, message) from ex
        program = parser.prog.replace(" [options]", "")
        print(f"{program}: {rewritten(message, known_keys(parser))}", file=sys.stderr)
        print(f"{program} --help lists every key, --print_config with the same arguments their values", file=sys.stderr)
        sys.exit(2)


class ShortParser(ShortErrors, ArgumentParser):
    """For commands of ours."""


class ShortLightningParser(ShortErrors, LightningArgumentParser):
    """For Lightning's command line."""


def known_keys(parser: Any) -> list[str]:
    """Keys of a parser and its subcommands, as a config writes them."""
    keys = [action.dest for action in parser._actions if action.dest not in ("help", "==SUPPRESS==")]
    for action in parser._actions:
        for sub in (getattr(action, "_name_parser_map", None) or {}).values():
            keys += known_keys(sub)
    return keys


def rewritten(message: str, keys: list[str]) -> str:
    """jsonargparse's message in our words, with the nearest key where one is unknown."""
    for pattern in _UNKNOWN:
        if found := re.search(pattern, message):
            option, key = found[1], found[1].lstrip("-").split("=")[0]
            if Path(option).exists():
                return (
                    f"{option}: found a file where an option was expected; quote a glob, so that the shell leaves it "
                    "whole, or give a list: '[a.jsonl, b.jsonl]'"
                )
            near = difflib.get_close_matches(key, keys, n=1, cutoff=0.6) or _same_leaf(key, keys)
            meant = f"; did you mean {near[0]}?" if near else ""
            return f"{option}: expected a known key, found none of that name{meant}"
    if found := re.search(_NEITHER, message, re.DOTALL):
        return " ".join(found[1].split())
    if found := re.search(_NO_TYPE, message, re.DOTALL):
        key, kinds, value = found.groups()
        if nested := re.fullmatch(r"NestedArg\(key='(\w+)', val='?(.*?)'?\)", value.strip()):
            key, value = f"{key}.{nested[1]}", nested[2]
        return f"{key}: expected {_readable(kinds).replace(', ', ' or ')}, found {value.strip()!r}"
    if found := re.search(_WRONG_TYPE, message, re.DOTALL):
        key, kind, value, other = found.groups()
        if kind is None:
            return f"{key}: {' '.join(other.split())}"
        return f"{key}: expected {_readable(kind)}, found {value.strip()!r}"
    if found := re.search(r"arguments are required: (.*)", message):
        missing = found[1].replace("fit.", "")
        return f"expected a value for {missing}; found none. Start from a --config, such as those in configs/"
    return " ".join(message.split())


def _readable(kind: str) -> str:
    """The name of a type as a user would say it."""
    kind = re.sub(r"<class '(?:[\w.]+\.)?(\w+)'>", r"\1", kind).replace("NoneType", "null")
    return re.sub(r"typing\.Literal\[(.*?)\]", r"one of \1", kind)


def _same_leaf(key: str, keys: list[str]) -> list[str]:
    """Keys that end in the same, or nearly the same, last part."""
    leaves = {k.rsplit(".", 1)[-1]: k for k in keys}
    return [leaves[near] for near in difflib.get_close_matches(key.rsplit(".", 1)[-1], leaves, n=1, cutoff=0.75)]
