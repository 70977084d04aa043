"""The config of a source: where documents come from, and in which order."""

import os
from dataclasses import dataclass
from typing import Literal, get_args

from sinkbed.data.source.synthetic import Synthetic
from sinkbed.ranges import check_choice, check_number

Kind = Literal["demo", "jsonl", "parquet", "text", "hub", "synthetic", "mixture"]
Part = Literal["leads", "speeches"]
OnError = Literal["refuse", "skip"]
Stopping = Literal["first_exhausted", "all_exhausted", "all_exhausted_without_replacement"]

_LOCAL = ("jsonl", "parquet", "text")
_CUTS = ("file", "line", "blank_line")


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
    out like one. `synthetic`: a task of `synthetic`. `mixture`: documents drawn from several sources. JSONL
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
    """All kinds but demo, and each of a mixture's: read without a copy in the cache; the shuffle is then that of a
    buffer."""
    shuffle_seed: int | None = 0
    """Seed of the shuffle of documents, or of the draws of a mixture. None: the order of the source."""
    shuffle_buffer: int | None = None
    """streaming with a shuffle: documents held while shuffling. None: 10,000."""

    @property
    def patterns(self) -> tuple[str, ...]:
        """`files`, always as several."""
        return (self.files,) if isinstance(self.files, str) else tuple(self.files)

    def __post_init__(self) -> None:
        check_choice("source.kind", self.kind, get_args(Kind))
        if self.kind == "mixture" and not isinstance(self, Source):
            raise ValueError("source.sources: expected sources of the other kinds, got a mixture in a mixture")
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
                    f"source.{field}: expected none with kind {self.kind}, which ignores it, got "
                    f"{getattr(self, field)!r}; it belongs to kind {' or '.join(kinds)}"
                )
        if self.kind in _LOCAL and not self.files:
            raise ValueError(f"source.files: expected paths or globs with kind {self.kind}, got none")
        if self.kind == "text" and not isinstance(self.split, Separator) and self.split not in (None, *_CUTS):
            raise ValueError(
                f"source.split: expected {', '.join(_CUTS)} or {{separator: …}} with kind 'text', got {self.split!r}"
            )
        if self.kind == "hub" and isinstance(self.split, Separator):
            raise ValueError("source.split: expected the name of a split with kind 'hub', got a separator")
        if self.name:  # it may be a local folder
            object.__setattr__(self, "name", os.path.expanduser(self.name))
        if self.kind == "hub" and not self.name:
            raise ValueError("source.name: expected owner/name with kind hub, got none")
        if self.kind == "synthetic" and self.synthetic is None:
            raise ValueError("source.synthetic: expected a task and its parameters with kind synthetic, got none")
        unknown = [part for part in self.parts or () if part not in get_args(Part)]
        if unknown or self.parts == () or len(set(self.parts or ())) < len(self.parts or ()):
            raise ValueError(f"source.parts: expected leads, speeches or both, each once, got {list(self.parts or ())}")
        if self.shuffle_buffer is not None and not (self.streaming and self.shuffle_seed is not None):
            raise ValueError(
                "source.shuffle_buffer: expected none without streaming and a shuffle_seed, where no buffer is used, "
                f"got {self.shuffle_buffer}; remove it or set both"
            )
        if self.shuffle_buffer is not None:
            check_number("source.shuffle_buffer", self.shuffle_buffer, least=1)
        if self.shuffle_seed is not None:
            check_number("source.shuffle_seed", self.shuffle_seed, least=0, integer=True)


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
                "source.weights: expected two sources or more and as many weights, got "
                f"{len(self.sources)} and {len(self.weights)}"
            )
        for weight in self.weights:
            check_number("source.weights", weight, above=0)
        if self.shuffle_seed is None:
            raise ValueError("source.shuffle_seed: expected a number with kind mixture, whose draws need one, got none")


def describe(source: SingleSource) -> str:
    """A source in a few words, for messages."""
    if isinstance(source, Source) and source.kind == "mixture":
        return " and ".join(describe(part) for part in source.sources)
    task = source.synthetic.task if source.synthetic else None
    return source.name or ", ".join(source.patterns) or task or "the demo corpus"
