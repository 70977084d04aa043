"""The run directory: names of its files, atomic writes, and the durable record of every point.

config.yaml      the whole configuration          manifest.json  the token store's manifest
audit.json       what packing did                 metrics.jsonl  every point, in order
measurement.json the final measurement            checkpoints/   wandb/   run.json (W&B id)
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CONFIG, MANIFEST, AUDIT = "config.yaml", "manifest.json", "audit.json"
METRICS, MEASUREMENT, RUN, CHECKPOINTS = "metrics.jsonl", "measurement.json", "run.json", "checkpoints"


def write_atomic(path: Path, content: str | bytes | memoryview) -> None:
    """Replace `path` by `content` so that a reader, or a crash, sees the old or the new whole, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, indented."""
    write_atomic(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON; raises ValueError that names a damaged file."""
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: expected JSON, found damage at {error}; restore or remove it") from None


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
                yield json.loads(line)
            except json.JSONDecodeError:
                raise ValueError(f"{path}, line {number}: expected one JSON object, found {line[:60]!r}") from None


def cut_metrics(path: Path, step: int) -> int:
    """Drop the points after `step` (they will be made again on resume); returns how many were dropped."""
    points = list(read_metrics(path))
    kept = [p for p in points if p["step"] <= step]
    if path.exists():
        write_atomic(path, "".join(json.dumps(p) + "\n" for p in kept))
    return len(points) - len(kept)
