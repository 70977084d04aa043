"""The run directory: names of its files, its lock, and the durable record of every point.

config.yaml      the whole configuration          manifest.json  the token store's manifest
audit.json       what packing did                 metrics.jsonl  every point, in order
measurement.json the final measurement            checkpoints/   wandb/   run.json (W&B id, parent, what made it, when)
.lock            held by the process that writes here
"""

import contextlib
import difflib
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import yaml

from sinkbed.data.files import NoRecord, load_json, refuse_number, sha256_file, write_atomic, write_json
from sinkbed.plain_text import counted

CONFIG, MANIFEST, AUDIT = "config.yaml", "manifest.json", "audit.json"
METRICS, MEASUREMENT, RUN, CHECKPOINTS = "metrics.jsonl", "measurement.json", "run.json", "checkpoints"

LAST, LOCK = "last.ckpt", ".lock"
FORMAT = 5
"""Of run directories and checkpoints; those of another one are refused."""
CHECKSUMS = "checksums.json"
"""In a folder of which every file counts: the sha256 of each."""


def did_you_mean(path: Path) -> str:
    """The end of a message on a path that is not there: what stands beside it under a similar name, if anything."""
    if path.exists():
        return ""
    there = next(folder for folder in path.parents if folder.is_dir())
    part = path.relative_to(there).parts[0]
    near = difflib.get_close_matches(part, [p.name for p in there.iterdir()], n=1)
    return f"; did you mean {there / near[0]}?" if near else ""


def step_checkpoints(folder: Path) -> list[Path]:
    """step-N.ckpt, by the steps; what a user has put beside them is not among them."""
    return sorted((p for p in folder.glob("step-*.ckpt") if p.stem[5:].isdecimal()), key=step_of)


def step_of(checkpoint: Path) -> int:
    """N of step-N.ckpt."""
    return int(checkpoint.stem.removeprefix("step-"))


def newest_checkpoint(run_dir: Path) -> Path | None:
    """What last.ckpt names, or the highest step where a crash took the link; None before the first checkpoint.

    Raises FileNotFoundError where it names a checkpoint that is gone: no older one is taken in its place.
    """
    folder = run_dir / CHECKPOINTS
    link, highest = folder / LAST, max(step_checkpoints(folder), key=step_of, default=None)
    if link.exists():
        return link.resolve()
    if link.is_symlink():
        other = "start the run anew" if highest is None else f"or go on from {highest}"
        raise FileNotFoundError(
            f"{link}: expected the checkpoint that it names, {os.readlink(link)}, got none; put it back, {other}"
        )
    return highest


def checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first. Raises FileNotFoundError where there is none."""
    saved = step_checkpoints(run_dir / CHECKPOINTS)
    if not saved:
        raise FileNotFoundError(f"{run_dir / CHECKPOINTS}: expected checkpoints, got none")
    return saved


def kept_steps(points: int, max_steps: int) -> set[int]:
    """Steps whose checkpoints stay: `points` of them from 1 to `max_steps`, each the same factor after the last."""
    return {round(max_steps ** (i / max(1, points - 1))) for i in range(points)}


@dataclass
class Lock:
    """A folder that is this process's own."""

    file: IO[str]
    made: list[Path]
    """The folders that were made for it, the inner before the outer."""

    def close(self) -> None:
        """Give the folder back."""
        self.file.close()


def lock(folder: Path) -> Lock:
    """Make `folder` this process's own until the file is closed or the process ends, however it ends.

    Raises ValueError where another process holds it. A lock of the POSIX kind, which the workers that a
    training run forks do not inherit.
    """
    if not folder.is_dir() and (folder.exists() or folder.is_symlink()):
        raise ValueError(f"{folder}: expected a folder, or none yet, got a file or a link to nothing; choose another")
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / LOCK).open("w")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.close()
        raise ValueError(
            f"{folder}: expected a folder that nobody writes to, got a process that still does; wait for it, stop "
            "it, or choose another folder"
        ) from None
    except OSError:  # a file system without locks
        pass
    here = folder / LOCK
    if not here.exists() or not os.path.samestat(os.fstat(file.fileno()), here.stat()):
        file.close()  # its last owner gave the folder back in between
        return lock(folder)
    return Lock(file, made)


def release(held: Lock) -> None:
    """Give a locked folder back; one that was made for the lock, and that nothing was written to, goes away."""
    path = Path(held.file.name)
    if path.parent.exists() and set(path.parent.iterdir()) <= {path}:
        path.unlink(missing_ok=True)  # while it is ours: the next file of that name is another's
        for folder in held.made:
            with contextlib.suppress(OSError):  # another run has come into it
                folder.rmdir()
    held.close()


class _Dumper(yaml.SafeDumper):
    """Quotes every text that could be read as a number."""


# jsonargparse reads more of them than PyYAML does: 1e-3, 4351e27.
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+.\d][-+.\d_:eE]*$"), list("-+.0123456789"))


def yaml_text(value: Any) -> str:
    """YAML that reads back as what it was made of, by PyYAML and by the command line."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


_SEAL = "# Written by sinkbed fit; sha256 of the lines below: "


def write_config(path: Path, text: str) -> bool:
    """Write a run's config.yaml under a line with its sha256; whether it is another text than stood there."""
    text = f"{_SEAL}{hashlib.sha256(text.encode()).hexdigest()}\n{text}"
    before = path.read_bytes() if path.exists() else None
    write_atomic(path, text)
    return before not in (None, text.encode())


def check_config(path: Path, content: bytes) -> None:
    """Raise ValueError for a config.yaml inside a run that is not what its first line says; a copy may be edited."""
    first, _, rest = content.partition(b"\n")
    if path.name != CONFIG or not first.startswith(_SEAL.encode()) or not (path.parent / RUN).exists():
        return
    if first.removeprefix(_SEAL.encode()) != hashlib.sha256(rest).hexdigest().encode():
        raise ValueError(
            f"{path}: expected the settings as the run wrote them, got others (the first line has their sha256); "
            "restore the file or start from a copy of it. Changes are given as options, or remove the first line where "
            "they are meant"
        )


def read_json(path: Path) -> Any:
    """Read a record; raises ValueError that names a damaged file, `NoRecord` for one that is not ours."""
    try:
        return load_json(path)
    except NoRecord as error:
        raise NoRecord(f"{path}: expected a record as this version writes them, got {error}") from None
    except (ValueError, RecursionError) as error:  # no JSON, no text, or not as it was written
        raise ValueError(f"{path}: expected JSON as it was written, got {error}; restore or remove it") from None


def note(folder: Path, **values: Any) -> None:
    """Add to run.json."""
    write_json(folder / RUN, read_json(folder / RUN) | values)


def mark_finished(folder: Path) -> None:
    """Note in run.json that nothing is left to do, measured and sent to W&B, and what the run's files hold then."""
    note(folder, finished={n: sha256_file(folder / n) for n in (CONFIG, MANIFEST, AUDIT, METRICS, MEASUREMENT)})


def check_finished(folder: Path) -> None:
    """Raise ValueError that names a file of a finished run which is not as the run left it."""
    if not (folder / RUN).is_file():
        return
    record = read_json(folder / RUN)
    check_format(folder, record.get("format"))
    if isinstance(record.get("finished"), dict):  # else damaged, or not finished
        remedy = "restore it from a copy, or resume the run from a checkpoint before its last with --ckpt_path"
        check_files(folder, record["finished"], f"the run left it at its end ({RUN} has its sha256)", remedy)


def check_format(path: Path, version: object) -> None:
    """Raise ValueError for a run or a checkpoint that another version of sinkbed wrote."""
    if version != FORMAT:
        written = f"format {version}" if isinstance(version, int) else "none"
        raise ValueError(
            f"{path}: expected format {FORMAT} of runs and checkpoints, got {written}, which another version of "
            "sinkbed wrote (before 0.3 settings had other names); use that version with it, or train it anew"
        )


def check_files(folder: Path, sums: dict[str, str], left: str, remedy: str) -> None:
    """Raise ValueError that names a file of a folder whose sha256 is another one; `left`: how the files were left."""
    for name, digest in sums.items():
        path = folder / name
        if not path.is_file() or sha256_file(path) != digest:
            content = "another content" if path.is_file() else "none"
            raise ValueError(f"{path}: expected the file as {left}, got {content}; {remedy}")


def is_finished(folder: Path) -> bool:
    """Whether a run came to its end, the last of W&B's points included."""
    path = folder / RUN
    return (folder / MEASUREMENT).exists() and path.exists() and "finished" in read_json(path)


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Points of a metrics.jsonl, oldest first; an unfinished last line (a crash while writing) is left out.

    Raises ValueError that names the line when an earlier one is damaged.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                point = json.loads(line, parse_constant=refuse_number)
            except ValueError:
                point = None
            if not isinstance(point, dict):
                raise ValueError(f"{path}, line {number}: expected one JSON object, got {line[:60]!r}")
            yield point


def restore_metrics(path: Path, saved: str) -> str | None:
    """Put metrics.jsonl back to what a checkpoint saved; later points will be made again.

    Points that differ from the saved ones were damaged: the file is kept beside as `.damaged`.
    Returns what there is to tell the user, None where there is nothing.
    """
    content = path.read_bytes() if path.exists() else b""
    damaged = path.with_name(f"{path.name}.damaged")
    if not content.startswith(saved.encode()) and not saved.encode().startswith(content):
        write_atomic(damaged, content)  # before it is replaced
    if content != saved.encode():
        write_atomic(path, saved)
    if content.startswith(saved.encode()):
        return None
    if saved.encode().startswith(content):  # lost with the machine's power, which no write of ours waits for
        lines = content.count(b"\n")
        return f"{path}: expected {counted(saved.count(chr(10)), 'point')}, got {lines}; restored from the checkpoint"
    pairs = zip(content.splitlines(), saved.encode().splitlines(), strict=False)
    line = next((number for number, (ours, theirs) in enumerate(pairs, 1) if ours != theirs), None)
    what = f"line {line} is not as the checkpoint saved it" if line else "points that the checkpoint saved are missing"
    return f"{path}: damaged, {what}; restored from the checkpoint, the old file is {damaged.name}"
