"""What made a run: the version of the code, torch, and the machine that its numbers are bitwise the same on."""

import os
import platform
import subprocess
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parents[2]
_CODE = ("data", "kernels", "model", "train", "pyproject.toml")
"""What of the checkout decides a result, beside the config, of which a run has its own."""


def _checkout() -> tuple[str | None, bool]:
    """Commit of the git checkout that this code is run from, and whether the code differs, new files included."""
    if not (ROOT / ".git").exists():  # installed; a repository further up is not ours
        return None, False
    try:
        commit = _git("rev-parse", "--short=12", "HEAD")
        return commit, bool(_git("status", "--porcelain", "--", *_CODE))
    except (OSError, subprocess.SubprocessError):  # no git here, a folder it does not trust, or a disk that hangs
        return None, False


def _git(*arguments: str) -> str:
    command = ["git", "--no-optional-locks", "-C", str(ROOT), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip()


_COMMIT, _CHANGED = _checkout()  # of the code as it was imported: a study's arms are forked hours later


def provenance(device: "torch.device", processes: int = 1) -> dict[str, Any]:
    """Version, commit of the checkout (None where it is none), whether it was changed, torch, hardware of the first
    process, CPU threads of each, processes."""
    import torch

    try:
        version = metadata.version("sinkbed")
    except metadata.PackageNotFoundError:  # a checkout that is run without being installed
        version = "of no version"
    variables = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
    return {
        "sinkbed": version,
        "commit": _COMMIT,
        "changed": _CHANGED,
        "torch": str(torch.__version__),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu(),
        "threads": torch.get_num_threads(),
        "processes": processes,
        **({"variables": variables} if variables else {}),
    }


_VARIABLES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS",
              "CUBLAS_WORKSPACE_CONFIG", "NVIDIA_TF32_OVERRIDE")  # fmt: skip
"""By which a user chooses how sums are made."""


def changes(before: dict[str, Any], after: dict[str, Any]) -> str:
    """What differs between two records of `provenance` that bits may depend on, as a sentence's beginning; or nothing.

    Processes are not among it: of those the resumed run says so itself.
    """
    names = ("commit", "changed", "torch", "device", "threads", "variables")
    differing = [name for name in names if before.get(name) != after.get(name)]
    if not differing:
        return ""
    listed = ", ".join(f"{name} {before.get(name)} -> {after.get(name)}" for name in differing)
    return f"{listed}; the bits {'may' if set(differing) <= {'commit', 'changed'} else 'will'} differ"


def describe(records: Iterable[dict[str, Any]], silent: int = 0) -> str:
    """One sentence on what made runs; empty where none of them says. `silent`: how many do not."""
    makers = "; and by ".join(dict.fromkeys(map(_maker, records)))
    if not makers:
        return ""
    rest = f" ({silent} run{'s say' if silent > 1 else ' says'} nothing of it, being of an earlier version)"
    return f"Made by {makers}{rest if silent else ''}."


def _maker(made: dict[str, Any]) -> str:
    code = f" at commit {made['commit']}" if made["commit"] else ""
    changed = " (changed)" if made["changed"] else ""
    threads = f"{made['threads']} thread{'' if made['threads'] == 1 else 's'}"
    several = f"{made['processes']} processes of " if made.get("processes", 1) > 1 else ""
    return f"sinkbed {made['sinkbed']}{code}{changed}, torch {made['torch']}, on {made['device']}, {several}{threads}"


def _cpu() -> str:
    """Model and the instruction set that torch computes with, which decides the order of sums."""
    import torch

    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = (line.partition(":") for line in info.read_text().splitlines())
        name = next((value.strip() for key, _, value in lines if key.strip() == "model name"), name)
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"
