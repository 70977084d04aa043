"""W&B's own files of a run's offline segments: what they hold, and mending one that a kill or damage has cut short.

wandb's Python package has no reader of them; what is here is as much of one as counting points takes.
"""

import json
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

_HEADER = b":W&B\xe1\xbe\x00"


def wandb_records(content: bytes) -> Iterator[tuple[bytes, int]]:
    """Records of a W&B run file, each with the offset at which it ends, up to where the file breaks off.

    The format is LevelDB's log: blocks of 32 KiB, in them pieces of records with checksum (4 bytes),
    length (2) and kind (1: whole, 2: first, 3: middle, 4: last); a record is a protocol buffer. Raises ValueError for
    a piece that is not what its checksum says.
    """
    at, record = len(_HEADER), b""
    if len(content) >= at and content[:at] != _HEADER:
        raise ValueError("the header is damaged")
    while at + 7 <= len(content):
        left = 32768 - at % 32768
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        if left < 7 or (kind == 0 and not any(content[at : at + 7])):  # a header never crosses a block
            at += left
            continue
        if at + 7 + length > len(content):
            return
        piece = content[at + 7 : at + 7 + length]
        if zlib.crc32(content[at + 6 : at + 7] + piece) != int.from_bytes(content[at : at + 4], "little"):
            raise ValueError(f"what stands at byte {at} is not what its checksum says")
        record += piece
        at += 7 + length
        if kind in (1, 4):
            yield record, at
            record = b""


def mend_wandb_files(files: Sequence[Path]) -> str | None:
    """Cut off the record that a kill left unfinished, and remove the folder of a file without any: at either,
    `wandb sync` stops and leaves the later segments of the run out.

    From the first damage on, points are to be sent again: the damaged file is cut before it, the segments after it are
    set aside in hidden folders. Returns what there is to tell the user of that.

    Args:
        files: of one run, oldest first.
    """
    for number, path in enumerate(files):
        content, ends, damage = path.read_bytes(), [0], None
        try:
            for _, end in wandb_records(content):
                ends.append(end)
        except ValueError as error:
            damage = error
            path.with_name(f"{path.name}.damaged").write_bytes(content)
        end = ends[-1]
        if end == 0 and damage is None:
            shutil.rmtree(path.parent)
        elif end == 0:
            _set_aside(path)
        elif end < len(content):
            os.truncate(path, end)
        if damage is not None:
            for later in files[number + 1 :]:
                _set_aside(later)
            return (
                f"{path}: damaged, {damage}; W&B is sent the points from there on that it lacks, the old file is "
                f"{path.name}.damaged"
            )
    return None


def _set_aside(path: Path) -> None:
    path.parent.rename(path.parent.with_name(f".{path.parent.name}"))


def read_wandb_file(path: Path) -> Iterator[dict[str, Any]]:
    """History rows of a W&B run file, `_step` among their keys, up to where it breaks off or is damaged."""
    from wandb.proto import wandb_internal_pb2

    try:
        for content, _ in wandb_records(path.read_bytes()):
            record: Any = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
            record.ParseFromString(content)
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                row = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items}
                yield {**row, "_step": record.history.step.num}
    except ValueError:
        return


def in_time(files: Iterable[Path]) -> list[Path]:
    """A run's files, oldest first."""
    return sorted(files, key=lambda file: file.parent.name.partition("run-")[2])


def earlier_steps(files: Iterable[Path]) -> list[int | None]:
    """Training step of each row in a run's files, by W&B's count; None for one that is no point of metrics.jsonl."""
    steps = {row["_step"]: row.get("trainer/global_step") for file in files for row in read_wandb_file(file)}
    return [steps[number] for number in sorted(steps)]


def link_for_leet(run_dir: Path, folder: Path) -> None:
    """Have `wandb leet FOLDER` list a run by its name: link its newest segment as leet expects segments to be named,
    run-TIME-ID/run-ID.wandb."""
    segments = {path.parent.name.split("-")[-2]: path for path in run_dir.glob("wandb/*run-*/run-*.wandb")}
    for earlier in folder.glob("run-*-*"):
        if earlier.name.split("-", 2)[2] == run_dir.name:  # not the end of another run's name
            shutil.rmtree(earlier)
    if segments:
        time, newest = max(segments.items())
        link = folder / f"run-{time}-{run_dir.name}" / f"run-{run_dir.name}.wandb"
        link.parent.mkdir(parents=True)
        link.symlink_to(os.path.relpath(newest, link.parent))
