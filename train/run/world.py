"""The processes that train one run together, and which of them this one is.

A process learns of the others from variables that its launcher sets. The same variables are left in the environment
of a shell in a job, of a container, and of whatever a trained process starts; they count only where their number of
processes is the one that the trainer asks for.
"""

import ctypes
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, MutableMapping
from pathlib import Path
from typing import Any

_RANK_OF = {"WORLD_SIZE": "RANK", "SLURM_NTASKS": "SLURM_PROCID", "JSM_NAMESPACE_SIZE": "JSM_NAMESPACE_RANK",
            "OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_RANK", "PMI_SIZE": "PMI_RANK"}  # fmt: skip
"""The variable with a launcher's number of processes, and that with a process's own."""
_OF_A_NODE = ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What a user sets on each machine, where Lightning starts the processes of each."""
_MORE = ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_WORLD_SIZE",
         "SLURM_LOCALID", "SLURM_NODEID", "SLURM_NTASKS_PER_NODE", "SLURM_NNODES", "SINKBED_LAUNCHER")  # fmt: skip
_NAMES = {*_RANK_OF, *_RANK_OF.values(), *_OF_A_NODE, *_MORE}
_PREFIXES = ("TORCHELASTIC_", "JSM_NAMESPACE_", "OMPI_COMM_", "PMI_", "PMIX_")


def is_set_by_a_launcher(name: str) -> bool:
    """Whether a variable tells a process of its place among others."""
    return name in _NAMES or name.startswith(_PREFIXES)


def leave(environment: MutableMapping[str, str], keep: tuple[str, ...] = ()) -> None:
    """Take what a launcher sets out of an environment: its process belongs to no other."""
    for name in filter(is_set_by_a_launcher, list(environment)):
        if name not in keep:
            del environment[name]


def devices_of(trainer: Any) -> int:
    """Processes on each machine, as a trainer's settings `accelerator` and `devices` ask for."""
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch.accelerators import AcceleratorRegistry

    alternatives = {"auto": ("tpu", "cuda", "mps", "cpu"), "gpu": ("cuda", "mps")}
    kinds = alternatives.get(str(trainer.accelerator), (str(trainer.accelerator),))
    known = [AcceleratorRegistry[kind]["accelerator"] for kind in kinds if kind in AcceleratorRegistry]
    accelerator = next((a for a in known if a.is_available()), None)
    if known and accelerator is None:
        raise ValueError(
            f"trainer.accelerator: expected one that this machine has, got {trainer.accelerator}, for which torch "
            "sees no device; set auto or cpu, or install a torch that was built for the device"
        )
    if accelerator is None:  # refused by the trainer itself, or an object of the user's own
        return trainer.devices if isinstance(trainer.devices, int) else 1
    if trainer.devices == "auto":
        return int(accelerator.auto_device_count())
    try:
        devices = accelerator.parse_devices(trainer.devices)
    except (TypeError, ValueError, MisconfigurationException) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"trainer.devices: expected auto or a number, got {trainer.devices!r} ({reason})") from None
    return devices if isinstance(devices, int) else len(devices)


def join(devices: int, nodes: int) -> int:
    """The rank of this process in its run, and Lightning's idea of it.

    A process that is alone leaves the variables of others out of its environment. Raises ValueError where a launcher
    has started another number of processes than the trainer asks for.
    """
    from lightning.pytorch.utilities import rank_zero_only

    shell = os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")  # in which SLURM starts no task
    launcher = next((name for name in _RANK_OF if name in os.environ and not (shell and name == "SLURM_NTASKS")), None)
    started = 1 if launcher is None else _number(launcher)
    if started > 1 and started != devices * nodes:
        raise ValueError(
            f"trainer.devices × trainer.num_nodes: expected {launcher}={started}, the processes that a launcher has "
            f"started, got {devices * nodes}; give --trainer.devices and --trainer.num_nodes of that launch, or, "
            f"where this process is alone and {launcher} is left in its environment, run it with env -u {launcher}"
        )
    if started == 1:
        leave(os.environ, keep=_OF_A_NODE if nodes > 1 else ())
        os.environ["SINKBED_LAUNCHER"] = str(os.getpid())  # of the processes that Lightning may start
        rank = _number("NODE_RANK") if "NODE_RANK" in os.environ else 0
    else:
        assert launcher is not None
        if launcher == "SLURM_NTASKS":
            os.environ.setdefault("SLURM_NTASKS_PER_NODE", str(devices))  # which Lightning insists on
        own = _RANK_OF[launcher]
        places = [own] if own in os.environ else [n for n in ("NODE_RANK", "LOCAL_RANK") if n in os.environ]
        if not places:
            raise ValueError(
                f"{launcher}={started}: expected {own} beside it in the environment, got none; start the processes "
                f"with torchrun, with srun or by --trainer.devices alone, or unset {launcher}"
            )
        rank = 0
        for place in places:  # a node's first process comes after those of the nodes before it
            rank = rank * devices + _number(place)
        if os.environ.get("SINKBED_LAUNCHER") == str(os.getppid()):
            end_with_parent(os.getppid())
    rank_zero_only.rank = rank  # type: ignore[attr-defined]
    return rank


def _number(name: str) -> int:
    value = os.environ[name]
    if not value.isdecimal():
        raise ValueError(f"the variable {name}: expected a whole number, got {value!r}; set it right or unset it")
    return int(value)


def requeue() -> None:
    """Have SLURM start this job again; its script resumes with --ckpt_path auto."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{task}" if array and task else os.environ["SLURM_JOB_ID"]
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True)
        print(f"SLURM job {job} is queued again")
    except (OSError, subprocess.CalledProcessError) as error:
        detail = getattr(error, "stderr", "") or error
        print(f"SLURM job {job}: scontrol requeue failed ({detail}); submit the job again", file=sys.stderr)


# Found here: between fork and exec there may be a loader's lock that nobody gives back.
_prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None


def end_with_parent(parent: int) -> None:
    """Have Linux kill this process when the thread that started it ends, as no one else would.

    Args:
        parent: its process id; one that is gone already ends this process at once.
    """
    if _prctl is not None:
        _prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)


class ProcessLost(RuntimeError):
    """Another process of the job, or one that reads its data, is gone, so that this one cannot go on."""


# What gloo, NCCL and the rendezvous say then; they have no exception of its own for it.
_LOST = ("gloo/transport", "ncclRemoteError", "remote process exited", "Connection closed by", "Connection reset by")


def lost_process(error: BaseException, newest: Callable[[], Path | None]) -> ProcessLost | None:
    """What to say where an error is the end of another process; None where it is something else.

    Args:
        newest: the run's newest checkpoint.
    """
    from torch.distributed import DistError

    behind: list[BaseException] = []
    link: BaseException | None = error
    while link is not None:
        behind.append(link)
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    # torch tells of a dead data worker wherever this process is, where that may have become another error; or the
    # worker's socket does, from which a batch was about to be taken.
    worker = next((each for each in behind if _is_of_a_worker(each)), None)
    other = isinstance(error, RuntimeError) and any(words in str(error) for words in _LOST)
    if not (worker or other or isinstance(error, DistError)):
        return None
    saved = newest()
    step = "No step is saved: start the run" if saved is None else f"{saved.name} is saved: resume the run"
    reason = (str(worker or error) or type(error).__name__).splitlines()[0].split("] ", 1)[-1].split(". ")[0]
    who = "a data worker of this run ended" if worker else "another process of this job ended or does not answer"
    what = "memory may be short: lower data.workers" if worker else "see what it says itself"
    return ProcessLost(f"{who} ({reason}); {what}. {step} with --ckpt_path auto")


def _is_of_a_worker(error: BaseException) -> bool:
    if isinstance(error, BrokenPipeError):  # of who reads what this process prints
        return False
    if str(error).startswith("DataLoader worker (pid"):
        return True
    frames = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
    return isinstance(error, ConnectionError | EOFError) and any("torch/utils/data" in file for file in frames)
