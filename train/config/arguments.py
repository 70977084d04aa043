"""Parsers whose complaint is one message: the key at fault, what was expected, and the key that was probably meant."""

import argparse
import re
import sys
from argparse import ArgumentError
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, set_parsing_settings

from sinkbed.plain_text import did_you_mean
from sinkbed.train.config.keys import is_known, located, unknown, wrong_keys
from sinkbed.train.config.yaml_files import read_mapping

_UNKNOWN = (
    r"does not accept option '([\w.]+)'",
    r"unrecognized arguments: (\S+)",
    r"Key '([\w.]+)' is not expected",
    r"Option '([\w.]+)' is not accepted",
)
_NO_TYPE = r'Parser key "([\w.]+)":.*Subtypes: \[(.*?)\]\n.*Given value: (.*)'
_WRONG_TYPE = r'Parser key "([\w.]+)":\s+(?:Expected an? (.+?)\. Got value: (.*)|(.+))'

_NO_CLASS = r"Parser key \"([\w.]+)\":.*given class_path '(.*?)':\n\s*((?:No )?module [^\n]*|cannot import[^\n]*)"

# A group of keys that may be null: jsonargparse lists why it is neither the group nor null.
_NEITHER = r"Union subtypes\n.*Errors:\n  - (.*?)\n  - Expected a <class 'NoneType'>"

_IN_GROUP = (
    r'Parser key "([\w.]+)":\s+Does not validate against any of the Union subtypes\n.*?'
    r"Problem with given class_path 'sinkbed\.[\w.]+':\n\s*(.*?)\n\s*- Expected a <class 'NoneType'>"
)

_NO_KEYS = ("--config", "--print_config", "--help", "--trust_config")


def check_keys(program: str, argv: Sequence[str], keys: Collection[str]) -> None:
    """Refuse a --config that is no YAML of plain values, and a key that is not among `keys`, in it or as an option.

    Before anything heavy is imported. An unknown key or a missing file ends the program with status 2; raises
    ValueError for a file that cannot be read.
    """
    for index, argument in enumerate(argv):
        option, _, value = argument.partition("=")
        if not option.startswith("--"):
            continue
        if option not in _NO_KEYS and not is_known(option[2:].rstrip("+"), keys):
            refuse(program, unknown(option, keys))
        if option == "--config":
            path = Path(value or " ".join(argv[index + 1 : index + 2]))
            if not path.is_file():
                refuse(program, f"--config {path}: expected a YAML file, got none there")
            read_mapping(path)
            for complaint in wrong_keys(path, keys):
                refuse(program, complaint)


def refuse(program: str, message: str) -> NoReturn:
    """Print what is wrong and how to learn more; exit with status 2."""
    print(f"{program}: {message}", file=sys.stderr)
    more = ", --print_config with the same arguments their values" if program.endswith((" fit", " prepare")) else ""
    print(f"{program} --help lists every {'key' if more else 'option'}{more}", file=sys.stderr)
    sys.exit(2)


_LOOKING = {
    "lr_monitor": "LearningRateMonitor", "device_stats_monitor": "DeviceStatsMonitor", "timer": "Timer",
    "model_summary": "ModelSummary", "rich_model_summary": "RichModelSummary",
}  # fmt: skip
"""Lightning's callbacks that write nothing of their own, by their modules."""


def refuse_classes() -> None:
    """From now on a config names no class but these callbacks, and groups of settings of ours.

    Any other runs code of a stranger's choice, and only importing it may.
    """
    lightning = "lightning.pytorch.callbacks"
    looking = [f"{path}.{name}" for at, name in _LOOKING.items() for path in (lightning, f"{lightning}.{at}")]
    set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=["sinkbed.data", "sinkbed.model", *looking])


class ShortErrors:
    """Mixin for parsers: no usage of a hundred lines before the error, no key by its beginning."""

    argv: Sequence[str] = ()
    """What is parsed; a file among it is named where a key in it is at fault."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def parse_args(self, args: Any = None, namespace: Any = None, **more: Any) -> Any:
        """As every parser does it."""
        self.argv = self.argv if args is None else list(args)
        return super().parse_args(args, namespace, **more)  # type: ignore[misc]

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the message and how to learn more; exit with status 2."""
        parser: Any = getattr(ex, "subcommand_parser", None) or self
        if not parser.exit_on_error:  # a group of keys is tried against one type of several
            raise ArgumentError(None, message) from ex
        program = parser.prog.replace(" [options]", "")
        keys = known_keys(parser)
        for argument in self.argv if "arguments are required" in message else ():  # one of them may be misspelt
            if argument.startswith("--") and not is_known(argument[2:].partition("=")[0], keys):
                refuse(program, unknown(argument, keys))
        refuse(program, located(rewritten(message, keys), self.argv))


class ShortParser(ShortErrors, ArgumentParser):  # type: ignore[misc]
    """For commands with a config."""


class PlainParser(ShortErrors, argparse.ArgumentParser):  # type: ignore[misc]
    """For commands without."""


def positive(text: str) -> int:
    """A whole number of at least 1, as the type of an option."""
    if not re.fullmatch(r"\d+", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def describe_fields() -> None:
    """Have the help show the docstrings of dataclass fields; only then, as reading them takes a moment."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)


def known_keys(parser: Any) -> list[str]:
    """Keys of a parser and its subcommands, as a config writes them, without the groups of others."""
    keys = [action.dest for action in parser._actions if action.dest not in ("help", "==SUPPRESS==")]
    for action in parser._actions:
        for sub in (getattr(action, "_name_parser_map", None) or {}).values():
            keys += known_keys(sub)
    held = {key.rpartition(".")[0] for key in keys if not key.endswith(".help")}
    return [key for key in keys if key not in held]


def rewritten(message: str, keys: Collection[str]) -> str:
    """jsonargparse's message in our words, with the nearest key where one is unknown."""
    if match := re.search(_IN_GROUP, message, re.DOTALL):
        group, inside = match.groups()
        if lacking := re.search(r"arguments are required: (.*)", inside):
            return f"{group}: expected a value for {lacking[1]}; got none"
        return rewritten(re.sub(r"(Parser key \"|Key ')", rf"\g<1>{group}.", inside), keys)
    for pattern in _UNKNOWN:
        if match := re.search(pattern, message):
            option = match[1]
            if Path(option).exists():
                return (
                    f"{option}: got a file where an option was expected; give each config its own --config, and "
                    "quote a glob, so that the shell leaves it whole, or give a list: '[a.jsonl, b.jsonl]'"
                )
            if pattern.startswith("unrecognized") and not option.startswith("-"):
                return f"{option}: expected options alone from here on, got a word before which none stands"
            return unknown(option, keys)
    if match := re.search(r"Parser key \"([\w.]+)\":.*?Importing '([\w.]+)' is not allowed", message, re.DOTALL):
        return (
            f"{match[1]}: expected plain values, or a callback of Lightning's that only looks, got the class "
            f"{match[2]}; a class runs code: add --trust_config where you trust the file"
        )
    if match := re.search(_NEITHER, message, re.DOTALL):
        return " ".join(match[1].split())
    if match := re.search(_NO_CLASS, message, re.DOTALL):
        return f"{match[1]}: expected a class that can be imported, got {match[2]}: {match[3]}"
    if match := re.search(_NO_TYPE, message, re.DOTALL):
        key, kinds, value = match.groups()
        if nested := re.fullmatch(r"NestedArg\(key='(\w+)', val='?(.*?)'?\)", value.strip()):
            key, value = f"{key}.{nested[1]}", nested[2]
        return _expected(key, _readable(kinds).replace(", ", " or "), value)
    if match := re.search(_WRONG_TYPE, message, re.DOTALL):
        key, kind, value, other = match.groups()
        return f"{key}: {' '.join(other.split())}" if kind is None else _expected(key, _readable(kind), value)
    if match := re.search(r"argument (.*?): invalid choice: '?(.*?)'? \(choose from (.*)\)", message):
        return _expected(match[1], f"one of {match[3]}", match[2])
    if match := re.search(r"argument (.*?): invalid (\w+) value: '?(.*?)'?$", message):
        return _expected(match[1], match[2], match[3])
    if match := re.search(r"argument (.*?): expected ((?:at least )?\S+ arguments?)", message):
        count = "none" if match[2].endswith("one argument") else "fewer"
        return f"{match[1]}: expected {match[2].replace('argument', 'value')}, got {count}"
    if match := re.search(r"arguments are required: (.*)", message):
        missing = match[1].replace("fit.", "")
        start = ". Start from a --config, such as those in configs/" if "config" in keys else ""
        return f"expected a value for {missing}; got none{start}"
    return " ".join(message.split())


def _expected(key: str, kind: str, value: str) -> str:
    value = value.strip()
    if value.lower() in ("nan", "inf", "-inf"):
        kind = "a finite number"
    if kind == "list":
        kind = f"a list, such as '[{'' if value == 'None' else value}]'"
    choices = re.findall("'(.*?)'", kind)
    return f"{key}: expected {kind}, got {value!r}{did_you_mean(value, choices)}"


def _readable(kind: str) -> str:
    """The name of a type as a user would say it."""
    kind = re.sub(r"<class '(?:[\w.]+\.)?(\w+)'>", r"\1", kind).replace("NoneType", "null")
    return re.sub(r"typing\.Literal\[(.*?)\]", r"one of \1", kind)
