"""The command line: one program, one module a command, loaded only when it is called."""

import argparse
import ctypes
import errno
import importlib
import locale
import os
import sys
from collections.abc import Sequence

from sinkbed.plain_text import did_you_mean
from sinkbed.train.run.world import leave

# command -> (module with run(argv), one line of help)
COMMANDS = {
    "prepare": ("sinkbed.train.cli.prepare", "documents -> token store"),
    "fit": ("sinkbed.train.cli.fit", "train a run, or resume it with --ckpt_path last"),
    "validate": ("sinkbed.train.cli.validate", "measure a checkpoint of a run on its probe set"),
    "study": ("sinkbed.train.cli.study", "run the arms of a study, measure and compare them"),
    "report": ("sinkbed.train.cli.report", "table, figures and one HTML page of a study"),
    "runs": ("sinkbed.train.cli.runs", "the runs below a folder: how far each is, its loss and its sink"),
    "view": ("sinkbed.train.cli.view", "W&B's page of a project: sink curves, losses, maps, runs grouped by arm"),
    "generate": ("sinkbed.train.cli.generate", "a look at what a run writes"),
    "probe": (
        "sinkbed.train.cli.probe",
        "sinks of any causal language model: a run, a checkpoint, a Hugging Face model",
    ),
    "export": ("sinkbed.train.cli.export", "a checkpoint as a Hugging Face folder (Llama, Mistral, Qwen 3, …)"),
    "kernels": (
        "sinkbed.train.cli.kernels",
        "compile the Triton kernels ahead of time: registers, spills, instructions",
    ),
    "check": ("sinkbed.train.cli.check", "check gpu: all that a GPU alone can tell of the kernels, in eight minutes"),
    "bench": (
        "sinkbed.train.cli.bench",
        "ratios against named peers: training, fit, parts, attention, measure, data, prepare, checkpoint",
    ),
}

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def build_parser() -> argparse.ArgumentParser:
    """What `sinkbed --help` shows; each command parses its own arguments."""
    parser = argparse.ArgumentParser(
        prog="sinkbed",
        description="Pretraining testbed for attention sinks.",
        epilog="sinkbed COMMAND --help shows the arguments of a command.",
    )
    parser.add_argument("--version", action="store_true", help="show the version and exit")
    commands = parser.add_subparsers(metavar="COMMAND")
    for name, (_, text) in COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 1 for a failure that was explained, 2 for bad usage."""
    if argv is None:
        _use_utf8()
        _keep_freed_memory()
    argv = [_at_home(argument) for argument in (sys.argv[1:] if argv is None else argv)]
    if argv[:1] == ["--version"]:
        from importlib import metadata

        print(f"sinkbed {metadata.version('sinkbed')}, torch {metadata.version('torch')}")
        return 0
    if not argv or argv[0] not in (*COMMANDS, "-h", "--help"):
        meant = f"{argv[0]!r}{did_you_mean(argv[0], COMMANDS)}" if argv else "nothing"
        print(f"sinkbed: expected one of {', '.join(COMMANDS)}; got {meant}", file=sys.stderr)
        print("sinkbed --help says what each is for", file=sys.stderr)
        return 2
    command, *rest = argv
    if command not in COMMANDS:
        build_parser().print_help()
        return 0
    module, _ = COMMANDS[command]
    if command != "fit":  # the one command that several processes belong to
        leave(os.environ)
    try:
        status = int(importlib.import_module(module).run(command, rest) or 0)
        sys.stdout.flush()  # here, where a reader that is gone is no traceback
        return status
    except KeyboardInterrupt:
        print(f"sinkbed {command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # who reads what is printed has seen enough: `sinkbed study FILE --dry_run | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if os.environ.get("SINKBED_DEBUG") or not explained(error):
            raise
        from sinkbed.train.config.keys import located

        print(f"sinkbed {command}: {located(explain(error), rest)}", file=sys.stderr)
        return 1


def _at_home(argument: str) -> str:
    """An argument with the home folder in place of `~`, also where the shell leaves it: in quotes, after `=`."""
    option, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    return f"{option}{equals}{os.path.expanduser(value) if value.startswith('~/') else value}"


def _use_utf8() -> None:
    """Start this program anew in Python's UTF-8 mode where the locale has another encoding: texts, configs and tables
    are UTF-8, and processes that are started from here inherit the mode."""
    if not sys.flags.utf8_mode and locale.getencoding().lower().replace("-", "") != "utf8":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _keep_freed_memory() -> None:
    """Have glibc keep the memory of arrays of up to 32 MB for the next ones, unless the environment tells it otherwise.
    It would give it back to the system, and each training step would wait for its pages anew."""
    told = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" and not told else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def explained(error: Exception) -> bool:
    """Whether the error's message is meant for the user, so that a traceback would only hide it."""
    return (
        isinstance(error, ValueError | OSError)
        or type(error).__name__
        in ("TrainingDiverged", "ProcessLost", "StoppedEarly", "WorkerDiedError", "MisconfigurationException")
        or _out_of_memory(error)
    )


def _out_of_memory(error: Exception) -> bool:
    """Python's own kind, torch's on GPUs, and what torch says on CPUs, which has no kind of its own."""
    return isinstance(error, MemoryError) or any(
        words in str(error) for words in ("out of memory", "not enough memory", "can't allocate memory")
    )


def explain(error: Exception) -> str:
    """The one message."""
    if type(error).__name__ in ("DiskFullError", "BlockingIOError"):
        return str(error.strerror)  # type: ignore[attr-defined]  # ours, without the number
    if isinstance(error, OSError) and error.errno in _NO_SPACE:
        where = f" while writing {error.filename}" if error.filename else ""
        return (
            f"the disk is full{where}; nothing half-written was kept. Free some space, then run the same "
            "command again (fit: with --ckpt_path last)"
        )
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        return (
            f"{error.filename}: expected a file or folder that can be read and written, got: {error.strerror} "
            f"(errno {error.errno}); see to that, then run the same command again (fit: with --ckpt_path auto)"
        )
    if _out_of_memory(error):
        reason = f" ({str(error).splitlines()[0]})" if str(error) else ""
        return (
            f"there is not enough memory{reason}; what is saved is whole. Take a smaller model or batch: "
            "data.micro_batch_size and measure.batch_tokens in a run, --batch_tokens in a probe"
        )
    return str(error)
