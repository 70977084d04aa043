"""Files that are written whole or not at all, and how to tell that one, or a JSON value, is what it was."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_CHECKSUM = "checksum"
"""Key of a sealed JSON object that holds the sha256 of all its other keys."""


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, whole or not at all: beside its place, flushed to the disk, then renamed."""
    aside = path.with_name(path.name + ".part")
    with open(aside, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def canonical_json(value: Any) -> bytes:
    """One byte string per JSON value: sorted keys, no white space, UTF-8."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def sealed(fields: dict[str, Any]) -> dict[str, Any]:
    """A JSON object with the checksum of itself beside its keys."""
    return {**fields, _CHECKSUM: sha256_json(json.loads(json.dumps(fields)))}


def unsealed(value: Any) -> Any:
    """A value that was read, its checksum compared and taken out; what was written before there were any has none.

    Raises ValueError where it is not what the checksum says.
    """
    if not isinstance(value, dict) or _CHECKSUM not in value:
        return value
    fields = {name: each for name, each in value.items() if name != _CHECKSUM}
    if (actual := sha256_json(fields)) != value[_CHECKSUM]:
        raise ValueError(f"content of sha256 {actual} whose {_CHECKSUM} says {value[_CHECKSUM]}")
    return fields


def differences(found: Any, expected: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, found, expected) of every leaf in which two nested dicts differ; None stands for an absent one."""
    if isinstance(found, dict) and isinstance(expected, dict):
        for name in dict.fromkeys((*found, *expected)):
            yield from differences(found.get(name), expected.get(name), f"{key}.{name}" if key else str(name))
    elif found != expected:
        yield key, found, expected


def differing(found: Any, expected: Any) -> str:
    """The leaves in which two nested dicts differ, as a message shows them; the first four."""
    leaves = list(differences(found, expected))
    listed = "; ".join(f"{key}: got {a!r}, expected {b!r}" for key, a, b in leaves[:4])
    return listed + (f"; and {len(leaves) - 4} more" if len(leaves) > 4 else "")


def sha256_json(value: Any) -> str:
    """sha256 of the canonical JSON: blind to white space and to the order of keys."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def sha256_file(path: Path) -> str:
    """sha256 of a file's bytes, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
