"""`sinkbed fit`, as far as it needs neither Lightning nor torch: is the command line one that can be read at all?"""

from collections.abc import Sequence
from pathlib import Path

from sinkbed.data.store.manifest import Manifest
from sinkbed.progress import loading
from sinkbed.ranges import check_number
from sinkbed.train.config.arguments import ShortParser, check_keys, refuse_classes
from sinkbed.train.config.keys import fit_keys
from sinkbed.train.loop.parts import REGISTRIES


def run(command: str, argv: Sequence[str]) -> int:
    """Refuse unknown keys, values of another type and files that are not there at once, then train."""
    check_keys(f"sinkbed {command}", argv, fit_keys())
    if "--trust_config" not in argv:
        refuse_classes()
    if not any(argument.startswith(("-h", "--help", "--print_config")) for argument in argv):
        check_values(command, argv)
    with loading("torch and Lightning"):
        from sinkbed.train.loop.trainer import run as fit
    from sinkbed.train.loop.trainer_settings import ShortLightningParser

    ShortLightningParser.argv = argv  # Lightning has it parse sys.argv; of the arms of a study there is no such file
    return fit(command, argv)


def check_values(command: str, argv: Sequence[str]) -> None:
    """Refuse a value that is not of its key's type, as far as the type is one of plain values, and a checkpoint or a
    token store that is not there."""
    keys = fit_keys()
    plain: list[str] = []
    rest: list[str] = []  # groups of keys and parts of values, which the parser with all types knows
    to = plain
    for argument in argv:
        if argument == "--trust_config":
            continue
        if argument.startswith("--"):
            to = plain if argument.partition("=")[0][2:] in (*keys, "config") else rest
        to.append(argument)
    parser = ShortParser(prog=f"sinkbed {command}")
    parser.add_argument("--config", action="config")
    for key, (kind, required) in keys.items():
        parser.add_argument(f"--{key}", type=kind, required=required and not rest)
    settings = parser.parse_args(plain)
    if type(settings.seed_everything) is int:
        check_number("seed_everything", settings.seed_everything, least=0, below=2**32)
    for key, registry in REGISTRIES.items():
        choice = settings.get(key)
        for one in choice if isinstance(choice, list) else [] if choice is None else [choice]:
            registry.name_of(one)
    for key, kinds in (("ckpt_path", "last, auto or a checkpoint of this run"), ("fork", "a run or its checkpoint")):
        path = settings[key]
        if path not in (None, "last", "auto") and not Path(path).expanduser().exists():
            raise FileNotFoundError(f"--{key} {path}: expected {kinds}, got nothing there")
    if settings.data.store is not None:
        Manifest.read(settings.data.store)
