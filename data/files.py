"""Files that are written whole or not at all, and how to tell that one, or a JSON value, is what it was."""

import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

_CHECKSUM = "checksum"
"""Key of a sealed JSON object that holds the sha256 of all its other keys."""


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write, which takes the place of `path` at the end: a reader, or a crash, sees the old or the new whole.

    On an error the old one stays, and nothing else.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with temporary.open("xb") as file:  # readable to whom the user's umask says
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None and error.filename in (None, str(temporary)):
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


def write_atomic(path: Path, content: str | bytes | memoryview) -> None:
    """Replace `path` by `content`, whole or not at all."""
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, value: Any, *, seal: bool = True) -> None:
    """Write JSON atomically, indented; a record of ours, an object, with a checksum that `load_json` compares (`seal`).

    Raises ValueError for nan and infinite numbers, which JSON does not have.
    """
    try:
        text = json.dumps(sealed(value) if seal else value, indent=2, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise ValueError(f"{path}: not written, expected finite numbers, got one that is not ({error})") from None
    write_atomic(path, (text + "\n").encode(errors="backslashreplace"))  # half a character, as JSON escapes it


def load_json(path: Path) -> Any:
    """Read JSON, and compare its checksum. Raises ValueError, or RecursionError, for what is damaged."""
    return unsealed(json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse_number))


def refuse_number(name: str) -> None:
    """What `json` is to make of `NaN` and `Infinity`."""
    raise ValueError(f"{name}, which is no number that JSON has")


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk too: a rename before this may be undone by a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_temporaries(folder: Path) -> None:
    """Remove what a kill in the middle of `replacing` left in a folder that no other process writes to."""
    for path in folder.glob(".*.partial"):
        if path.is_file():  # a folder is of `sinkbed export`, or of nobody we know
            path.unlink()


def sealed(fields: dict[str, Any]) -> dict[str, Any]:
    """A JSON object with the checksum of itself beside its keys."""
    return {**fields, _CHECKSUM: sha256_json(json.loads(json.dumps(fields)))}


class NoRecord(ValueError):
    """JSON that is no record of ours, or one of an earlier version."""


def unsealed(value: Any) -> Any:
    """A record that was read, its checksum compared and taken out.

    Raises ValueError for one that it does not fit, `NoRecord` for what has none.
    """
    if not isinstance(value, dict) or _CHECKSUM not in value:
        raise NoRecord(f"a record without its {_CHECKSUM}, such as versions before 0.3 wrote")
    fields = {name: each for name, each in value.items() if name != _CHECKSUM}
    if (actual := sha256_json(fields)) != value[_CHECKSUM]:
        raise ValueError(f"content of sha256 {actual} whose {_CHECKSUM} says {value[_CHECKSUM]}")
    return fields


def differences(actual: Any, expected: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, actual, expected) of every leaf in which two nested dicts differ; None stands for an absent one."""
    if isinstance(actual, dict) and isinstance(expected, dict):
        for name in dict.fromkeys((*actual, *expected)):
            yield from differences(actual.get(name), expected.get(name), f"{key}.{name}" if key else str(name))
    elif actual != expected:
        yield key, actual, expected


def differing(actual: Any, expected: Any) -> str:
    """The leaves in which two nested dicts differ, as a message shows them; the first four."""
    leaves = list(differences(actual, expected))
    listed = "; ".join(f"{key}: expected {b!r}, got {a!r}" for key, a, b in leaves[:4])
    return listed + (f"; and {len(leaves) - 4} more" if len(leaves) > 4 else "")


def sha256_json(value: Any) -> str:
    """sha256 of the canonical JSON, in UTF-8: blind to white space and to the order of keys."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode(errors="backslashreplace")).hexdigest()  # half a character, as JSON has it


def sha256_file(path: Path) -> str:
    """sha256 of a file's bytes, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_files(folder: Path, files: Mapping[str, str | bytes]) -> None:
    """Write files by name, each whole or not at all, to a folder that no other process writes to."""
    remove_temporaries(folder)
    for name, content in files.items():
        write_atomic(folder / name, content)
