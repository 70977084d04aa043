"""The local files that a source names."""

import glob
import os
import shlex
from collections import Counter
from pathlib import Path

from sinkbed.data.source.config import SingleSource

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")


def local_files(source: SingleSource) -> list[str]:
    """Files of a source, sorted, each once; `~` is the home folder, and a folder is all files below it.

    Raises FileNotFoundError for a glob without a file and for a folder of files of several kinds, ValueError for files
    of another kind than the source's.
    """
    known: dict[Path, str] = {}
    for pattern in map(os.path.expanduser, source.patterns):
        # A file whose name looks like a glob is itself.
        matches = [pattern] if Path(pattern).is_file() else glob.glob(pattern, recursive=True)
        files = _files(matches)
        if not files and Path(pattern).is_dir():
            files = _inside(Path(pattern))
        if not files:
            raise FileNotFoundError(f"source.files: no file matches {pattern!r} (from {Path.cwd()})")
        # One file under two spellings is one file.
        for path in files:
            known.setdefault(Path(path).resolve(), path)
    paths = sorted(known.values())
    if source.kind != "parquet":
        for path in paths:
            _refuse_other_kind(path, source.kind)
    return paths


def _refuse_other_kind(path: str, kind: str) -> None:
    with open(path, "rb") as opened:
        start = opened.read(5)
    start_from = "sinkbed prepare --config configs/data/local_{}.yaml --source.files " + shlex.quote(path)
    if start == b"%PDF-":
        raise ValueError(f"{path}: expected {kind}, got a PDF; extract its text first, or leave it out")
    if start.startswith(b"PAR1"):
        raise ValueError(f"{path}: expected {kind}, got Parquet; use `{start_from.format('parquet')}`")
    if kind == "text" and _end(path).startswith((".jsonl", ".ndjson")):
        raise ValueError(f"{path}: expected text, got JSONL by its name; use `{start_from.format('jsonl')}`")


def _files(matches: list[str]) -> list[str]:
    """Those that are files. Raises FileNotFoundError for a link to nothing, such as git-annex has of what it has not
    fetched."""
    for path in matches:
        if os.path.islink(path) and not os.path.exists(path):
            raise FileNotFoundError(
                f"source.files: {path}: expected a file, got a link to {os.readlink(path)}, which is gone"
            )
    return [path for path in matches if Path(path).is_file()]


def _inside(folder: Path) -> list[str]:
    """All files below a folder, which have to be of one kind."""
    below = str(Path(glob.escape(str(folder))) / "**" / "*")
    files = _files(glob.glob(below, recursive=True))
    ends = Counter(map(_end, files)).most_common()
    if len(ends) > 1:
        kinds = ", ".join(f"{count:,} {end or 'without an ending'}" for end, count in ends[:5])
        raise FileNotFoundError(
            f"source.files: expected files of one kind below the folder {folder}, got {kinds}; give a glob such as "
            f"{below + ends[0][0]!r}"
        )
    return files


def _end(path: str) -> str:
    """What a file's name tells of its kind: `.txt`, `.jsonl.gz`."""
    stem, end = os.path.splitext(path)
    return os.path.splitext(stem)[1] + end if end in COMPRESSED else end
