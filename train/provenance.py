"""What made a run: the version of the code, torch, and the machine that its numbers are bitwise the same on."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent


def _checkout() -> tuple[str | None, bool]:
    """Commit of the git checkout that this code is run from, and whether its files differ from it."""
    if not (ROOT / ".git").exists():  # installed; a repository further up is not ours
        return None, False
    git = ["git", "--no-optional-locks", "-C", str(ROOT)]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], check=True, capture_output=True, text=True)
        status = [*git, "status", "--porcelain", "--untracked-files=no"]
        changes = subprocess.run(status, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):  # no git here, or a folder it does not trust
        return None, False
    return commit.stdout.strip(), bool(changes.stdout.strip())


_COMMIT, _CHANGED = _checkout()  # of the code as it was imported: a study's arms are forked hours later


def provenance(device: torch.device) -> dict[str, Any]:
    """Version, commit of the checkout (None where it is none), whether files were changed, torch, hardware, threads."""
    return {
        "sinkbed": metadata.version("sinkbed"),
        "commit": _COMMIT,
        "changed": _CHANGED,
        "torch": str(torch.__version__),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu(),
        "threads": torch.get_num_threads(),
    }


def describe(found: Sequence[dict[str, Any]], silent: int = 0) -> str:
    """One sentence on what made runs; empty where none of them says. `silent`: how many do not."""
    if not found:
        return ""
    code = _list(_code(made) for made in found)
    torches, devices = (_list(made[key] for made in found) for key in ("torch", "device"))
    threads = _list(str(made["threads"]) for made in found)
    plural = "" if threads == "1" else "s"
    rest = f" ({silent} runs of an earlier version do not say)" if silent else ""
    return f"Made by sinkbed {code}, torch {torches}, on {devices}, {threads} thread{plural} a run{rest}."


def _code(made: dict[str, Any]) -> str:
    return made["sinkbed"] + (f" at commit {made['commit']}" if made["commit"] else "") + " (changed)" * made["changed"]


def _list(values: Iterable[str]) -> str:
    return " and ".join(dict.fromkeys(values))


def _cpu() -> str:
    """Model and the instruction set that torch computes with, which decides the order of sums."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = (line.partition(":") for line in info.read_text().splitlines())
        name = next((value.strip() for key, _, value in lines if key.strip() == "model name"), name)
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"
