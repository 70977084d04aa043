"""Sources: which documents there are and in which order, and what becomes of records that are none.

Nothing here tokenizes. Local files and the hub are read through `datasets` (`data.loading`), JSONL and text
record by record (`data.records`), so that a malformed line is named, or left out and counted, by itself.
"""

from __future__ import annotations

import glob
import os
import shlex
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from sinkbed.data.files import sha256_file, sha256_json
from sinkbed.data.source.demo import demo_versions
from sinkbed.data.source.synthetic import GENERATOR_VERSION, Synthetic

Kind = Literal["demo", "jsonl", "parquet", "text", "hub", "synthetic", "mixture"]
Part = Literal["leads", "speeches"]
OnError = Literal["refuse", "skip"]
Stopping = Literal["first_exhausted", "all_exhausted", "all_exhausted_without_replacement"]

_LOCAL = ("jsonl", "parquet", "text")
_CUTS = ("file", "line", "blank_line")
_READ_BATCH = 32  # documents in memory at a time; larger ones are not read faster


@dataclass(frozen=True, kw_only=True)
class Separator:
    """A text that stands between documents. Raises ValueError where it is empty."""

    separator: str
    """Such as `<|endoftext|>`; in YAML a line end is written `"\\n"`. It is part of no document."""

    def __post_init__(self) -> None:
        if not self.separator or self.separator in _CUTS:
            raise ValueError(
                f"source.split.separator: expected a text that stands between documents, got {self.separator!r}"
            )


@dataclass(frozen=True, kw_only=True)
class SingleSource:
    """Where documents come from and in which order: a source by itself or a part of a mixture.

    Raises ValueError for settings that are missing, or that the chosen kind would ignore.
    """

    kind: Kind
    """`demo`: the packaged corpus. `jsonl`, `parquet`: local files, one document a record. `text`: local
    files, cut into documents as `split` says. `hub`: a data set of the Hugging Face hub, or a local folder laid
    out like one. `synthetic`: a task of `data.synthetic`. `mixture`: documents drawn from several sources. JSONL
    and text may be compressed (.gz .bz2 .xz .zst)."""
    parts: tuple[Part, ...] | None = None
    """demo: `leads` (10,033 encyclopedia leads), `speeches` (249 addresses). None: both."""
    files: tuple[str, ...] | str = ()
    """jsonl, parquet, text: a path or glob, or several, read in sorted order; `**` descends into folders. A folder is
    all files below it, where they are of one kind."""
    name: str | None = None
    """hub: `owner/name`."""
    config: str | None = None
    """hub: configuration (subset) of the data set, such as `sample-10BT`."""
    split: Separator | str | None = None
    """text: what is a document: a whole `file` (None), each `line`, what stands between blank lines (`blank_line`), or
    between occurrences of a text, `{separator: …}`. hub: split to read. None: `train`."""
    revision: str | None = None
    """hub: commit, tag or branch. Pin a commit to make the token store reproducible."""
    synthetic: Synthetic | None = None
    """synthetic: the task and its parameters."""
    column: str | None = None
    """jsonl, parquet, hub: the column that holds the text. None: `text`."""
    streaming: bool = False
    """All kinds but demo: read without a copy in the cache; the shuffle is then that of a buffer."""
    shuffle_seed: int | None = 0
    """Seed of the shuffle of documents, or of the draws of a mixture. None: the order of the source."""
    shuffle_buffer: int | None = None
    """streaming with a shuffle: documents held while shuffling. None: 10,000."""

    @property
    def patterns(self) -> tuple[str, ...]:
        """`files`, always as several."""
        return (self.files,) if isinstance(self.files, str) else tuple(self.files)

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"source.kind: got {self.kind!r}, expected one of {', '.join(get_args(Kind))}")
        if self.kind == "mixture" and not isinstance(self, Source):
            raise ValueError("source.sources: got a mixture in a mixture, expected sources of the other kinds")
        meant_for: dict[str, tuple[str, ...]] = {
            "parts": ("demo",),
            "files": _LOCAL,
            **dict.fromkeys(("name", "config", "revision"), ("hub",)),
            "split": ("text", "hub"),
            "synthetic": ("synthetic",),
            "column": ("jsonl", "parquet", "hub"),
            "streaming": (*_LOCAL, "hub", "synthetic"),
            **dict.fromkeys(("sources", "weights", "stopping_strategy"), ("mixture",)),
        }
        for field, kinds in meant_for.items():
            if getattr(self, field, None) and self.kind not in kinds:
                raise ValueError(
                    f"source.{field}: got {getattr(self, field)!r} with kind {self.kind!r}, which ignores it; "
                    f"it belongs to kind {' or '.join(kinds)}"
                )
        if self.kind in _LOCAL and not self.files:
            raise ValueError(f"source.files: got none with kind {self.kind!r}; expected paths or globs")
        if self.kind == "text" and not isinstance(self.split, Separator) and self.split not in (None, *_CUTS):
            raise ValueError(
                f"source.split: expected {', '.join(_CUTS)} or {{separator: …}} with kind 'text', got {self.split!r}"
            )
        if self.kind == "hub" and isinstance(self.split, Separator):
            raise ValueError("source.split: expected the name of a split with kind 'hub', got a separator")
        if self.name:  # it may be a local folder
            object.__setattr__(self, "name", os.path.expanduser(self.name))
        if self.kind == "hub" and not self.name:
            raise ValueError("source.name: got none with kind 'hub'; expected owner/name")
        if self.kind == "synthetic" and self.synthetic is None:
            raise ValueError("source.synthetic: got none with kind 'synthetic'; expected a task and its parameters")
        unknown = [part for part in self.parts or () if part not in get_args(Part)]
        if unknown or self.parts == () or len(set(self.parts or ())) < len(self.parts or ()):
            raise ValueError(f"source.parts: got {list(self.parts or ())}, expected some of leads, speeches, each once")
        if self.shuffle_buffer is not None and not (self.streaming and self.shuffle_seed is not None):
            raise ValueError(
                "source.shuffle_buffer: got without streaming and a shuffle_seed, where no buffer is used; "
                "remove it or set both"
            )
        if self.shuffle_buffer is not None and self.shuffle_buffer < 1:
            raise ValueError(f"source.shuffle_buffer: got {self.shuffle_buffer}, expected at least 1")


@dataclass(frozen=True, kw_only=True)
class Source(SingleSource):
    """A source, or a mixture of several. Raises ValueError as `SingleSource`."""

    sources: tuple[SingleSource, ...] = ()
    """mixture: the sources to draw from, each with its own order."""
    weights: tuple[float, ...] = ()
    """mixture: share of the draws that each source gets (they need not sum to 1); a draw is a document."""
    stopping_strategy: Stopping | None = None
    """mixture: `first_exhausted` ends with the source that runs out first, so that the shares hold;
    `all_exhausted_without_replacement` gives every document once; `all_exhausted` begins a source that ran
    out again until each has run out once: documents repeat. None: `first_exhausted`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind != "mixture":
            return
        if len(self.sources) < 2 or len(self.weights) != len(self.sources):
            raise ValueError(
                f"source.weights: got {len(self.weights)} with {len(self.sources)} sources, expected two sources or "
                "more and as many weights"
            )
        if min(self.weights) <= 0:
            raise ValueError(f"source.weights: got {min(self.weights)}, expected each above 0")
        if self.shuffle_seed is None:
            raise ValueError("source.shuffle_seed: got none with kind 'mixture', whose draws need one; give a number")


class Documents:
    """The documents of a source. Each pass gives the same ones in the same order.

    Args:
        on_error: what to do about a record that is no document (malformed, not UTF-8, without the column,
            not text) or a file that cannot be read to its end: refuse the source, or leave it out and count it.

    Raises FileNotFoundError for missing files or packages, and ValueError for a missing column, a record
    that is refused, or a corpus without a single document.
    """

    def __init__(self, source: Source, *, on_error: OnError = "refuse") -> None:
        self.source = source
        self.on_error = on_error
        self.left_out: Counter[str] = Counter()
        """Records that the last pass left out so far, by reason: `empty` ones hold nothing but white space."""
        self._dataset: Any = None

    def __iter__(self) -> Iterator[str]:
        left_out = self.left_out = Counter()
        found = 0
        for batch in self._record_batches():
            texts = batch["text"]
            problems = batch.get("problem")
            for index, text in enumerate(texts):
                if problems and problems[index]:
                    if self.on_error == "refuse":
                        raise ValueError(f"{batch['at'][index]}; to leave such records out: --on_error skip")
                    left_out[problems[index]] += 1
                elif text is not None and not isinstance(text, str):
                    raise ValueError(
                        f"{describe(self.source)}: got a value of type {type(text).__name__} in the column of the "
                        "text, expected text; name another column with source.column"
                    )
                elif not text or text.isspace():
                    left_out["empty"] += 1
                else:
                    found += 1
                    yield text
        if not found:
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(left_out.items())) or "no record"
            raise ValueError(f"the source holds no document: look at {describe(self.source)} (left out: {reasons})")

    def count(self) -> int | None:
        """Records in the source, empty ones included; None where only a full pass would tell."""
        dataset = self._open()
        return len(dataset) if hasattr(dataset, "__len__") else None

    def _open(self) -> Any:
        if self._dataset is None:
            from sinkbed.data.source.loading import load

            self._dataset = load(self.source)
        return self._dataset

    def _record_batches(self) -> Iterator[dict[str, list[Any]]]:
        from sinkbed.data.source.loading import unreadable_named

        files = self.source.kind == "text" and self.source.split in (None, "file")
        batches = self._open().iter(batch_size=1 if files else _READ_BATCH)
        # A stream meets a broken file only when it gets there.
        with unreadable_named(self.source):
            yield from batches


def identity(source: SingleSource) -> dict[str, Any]:
    """What tells one state of a source from another: a digest of its files, or package versions.

    A hub data set is identified by what the config says of it; only a pinned revision makes that exact. A
    synthetic task is what its parameters say under one version of the generator.
    Raises FileNotFoundError for missing files or packages.
    """
    if isinstance(source, Source) and source.kind == "mixture":
        return {"sources": [identity(part) for part in source.sources]}
    if source.kind == "demo":
        return {"packages": demo_versions(demo_parts(source))}
    if source.kind == "hub":
        return {"name": source.name, "revision": source.revision}
    if source.kind == "synthetic":
        return {"generator": GENERATOR_VERSION}
    paths = [Path(path) for path in local_files(source)]
    files = [{"name": path.name, "size": path.stat().st_size, "sha256": sha256_file(path)} for path in paths]
    return {"files": digest_of(files)}


def digest_of(files: list[dict[str, Any]]) -> dict[str, Any]:
    """Files in short, however many: count, bytes, and one sha256 over the names, sizes and sha256 of all."""
    size = sum(file["size"] for file in files)
    names = [{**file, "name": os.fsencode(file["name"]).decode("latin-1")} for file in files]  # names need be no UTF-8
    return {"count": len(files), "size": size, "sha256": sha256_json(names)}


def local_files(source: SingleSource) -> list[str]:
    """Files of a source, sorted, each once; `~` is the home folder, and a folder is all files below it.

    Raises FileNotFoundError for a glob without a file and for a folder of files of several kinds, ValueError for files
    of another kind than the source's.
    """
    known: dict[Path, str] = {}
    for pattern in map(os.path.expanduser, source.patterns):
        # A file whose name looks like a glob is itself.
        matches = [pattern] if Path(pattern).is_file() else glob.glob(pattern, recursive=True)
        files = [path for path in matches if Path(path).is_file()]
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


def _inside(folder: Path) -> list[str]:
    """All files below a folder, which have to be of one kind."""
    below = str(Path(glob.escape(str(folder))) / "**" / "*")
    files = [path for path in glob.glob(below, recursive=True) if Path(path).is_file()]
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
    return os.path.splitext(stem)[1] + end if end in (".gz", ".bz2", ".xz", ".zst") else end


def demo_parts(source: SingleSource) -> tuple[str, ...]:
    """Parts of the demo corpus that a source asks for."""
    return source.parts or get_args(Part)


def no_document(source: SingleSource) -> ValueError:
    """The error for a source without a single record."""
    return ValueError(f"the source holds no document: look at {describe(source)}")


def describe(source: SingleSource) -> str:
    """A source in a few words, for messages."""
    if isinstance(source, Source) and source.kind == "mixture":
        return " and ".join(describe(part) for part in source.sources)
    task = source.synthetic.task if source.synthetic else None
    return source.name or ", ".join(source.patterns) or task or "the demo corpus"
