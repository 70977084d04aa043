"""`sinkbed fit`, as far as it needs neither Lightning nor torch: is the command line one that can be read at all?"""

from __future__ import annotations

from collections.abc import Sequence

from data.manifest import Manifest
from model.ranges import check_number
from train.arguments import ShortParser, check_keys
from train.keys import fit_keys
from train.progress import loading


def run(command: str, argv: Sequence[str]) -> int:
    """Refuse unknown keys, values of another type and files that are not there at once, then train."""
    check_keys(f"sinkbed {command}", argv, fit_keys())
    if not any(argument.startswith(("-h", "--help", "--print_config")) for argument in argv):
        check_values(command, argv)
    with loading("torch and Lightning"):
        from train.fit import run as fit

    return fit(command, argv)


def check_values(command: str, argv: Sequence[str]) -> None:
    """Refuse a value that is not of its key's type, as far as the type is one of plain values, and a token store that
    is not there."""
    keys = fit_keys()
    parser = ShortParser(prog=f"sinkbed {command}")
    parser.add_argument("--config", action="config")
    for key, (kind, required) in keys.items():
        parser.add_argument(f"--{key}", type=kind, required=required)
    plain, keep = [], True
    for argument in argv:
        if argument.startswith("--"):  # the value of another one, such as trainer.callbacks.init_args.…, goes with it
            keep = argument.partition("=")[0][2:] in (*keys, "config")
        if keep:
            plain.append(argument)
    settings = parser.parse_args(plain)
    if type(settings.seed_everything) is int:
        check_number("seed_everything", settings.seed_everything, least=0, below=2**32)
    Manifest.read(settings.data.store)
