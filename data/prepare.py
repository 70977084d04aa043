"""Prepare: documents -> tokenizer -> token store, in one call that is safe to repeat.

One process reads the documents in their order, selects them and cuts them into units and batches
(`data.selection`); others encode the batches (`data.encoding`); each unit becomes a shard per split and a
record that it is done (`data.units`). Nothing in the store depends on the number of processes, nor on how
often the work was stopped: called again, it goes on after the last unit that was finished. The tokenizer is
trained on documents of the training split only, once.

A store records what it was made from, down to the sha256 of local files. Called again with the same
config, `prepare` returns at once; with another, it refuses rather than mix two corpora.

This module imports neither datasets nor tokenizers until `prepare` is called.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from data.manifest import FORMAT, MANIFEST_NAME, TOKENIZER_NAME, Manifest, differing, sha256_file, sha256_json
from data.selection import Batch, Selection, batches, split_of
from data.sources import Documents, OnError, Source, identity

if TYPE_CHECKING:
    from data.encoding import Encoded
    from data.tokenizer import Tokenizer
    from data.units import Units

__all__ = ["PrepareConfig", "TokenizerConfig", "prepare", "split_of"]

_VOCAB_SIZE = 32_768
_TRAIN_BYTES = 4_000_000
_SHARD_BYTES = 2**28


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """A tokenizer to train, or one to load. Raises ValueError for settings that contradict each other."""

    path: str | None = None
    """A `tokenizer.json` to load, or a folder of `transformers` with one. None: train a byte-level BPE."""
    vocab_size: int | None = None
    """Training: tokens in the vocabulary at most, with 256 bytes, `<bos>` and `<eos>`. None: 32,768."""
    train_bytes: int | None = None
    """Training: stop reading documents after this many UTF-8 bytes. None: 4,000,000."""
    train_documents: int | None = None
    """Training: stop reading after this many documents. None: no limit."""
    bos: str | None = None
    """Loading: the token that serves as BOS. None: what the folder's configuration names, else `<bos>`."""
    eos: str | None = None
    """Loading: the token that serves as EOS. None: what the folder's configuration names, else `<eos>`."""

    def __post_init__(self) -> None:
        unused = ("vocab_size", "train_bytes", "train_documents") if self.path else ("bos", "eos")
        for name in unused:
            if getattr(self, name) is not None:
                mode = "a tokenizer that is loaded" if self.path else "a tokenizer that is trained"
                raise ValueError(
                    f"tokenizer.{name}: found {getattr(self, name)!r}, which {mode} ignores; remove it or "
                    f"{'remove' if self.path else 'set'} tokenizer.path"
                )
        for name in ("vocab_size", "train_bytes", "train_documents"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"tokenizer.{name}: found {value}, expected at least 1")


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """All that decides a token store. Raises ValueError for values outside their range."""

    source: Source
    """Where documents come from."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """Trained on the training split, or loaded."""
    validation_share: float = 0.02
    """Share of documents held out, by a hash of their text. 0: no validation split."""
    on_error: OnError = "refuse"
    """A record that is no document (malformed, not UTF-8, without the column, not text): `refuse` the source
    with a message that names it, or `skip` it; the manifest counts what was left out. Empty documents are
    always left out."""
    min_bytes: int | None = None
    """Leave out documents of fewer UTF-8 bytes. None: no limit."""
    max_bytes: int | None = None
    """Leave out documents of more UTF-8 bytes. None: no limit."""
    deduplicate: bool = False
    """Keep only the first of documents with equal text."""
    shard_bytes: int | None = None
    """UTF-8 bytes of text per shard at most, over all splits; one shard is held in memory while preparing,
    and is what a killed run may lose. None: 268,435,456."""
    out: str
    """Folder of the token store."""

    def __post_init__(self) -> None:
        if not 0 <= self.validation_share < 1:
            raise ValueError(f"validation_share: found {self.validation_share}, expected 0 or more and less than 1")
        if self.shard_bytes is not None and self.shard_bytes < 1:
            raise ValueError(f"shard_bytes: found {self.shard_bytes}, expected at least 1")
        if self.min_bytes is not None and self.min_bytes < 2:
            raise ValueError(f"min_bytes: found {self.min_bytes}, which leaves nothing out; expected at least 2")
        if self.max_bytes is not None and self.max_bytes < (self.min_bytes or 1):
            raise ValueError(f"max_bytes: found {self.max_bytes}, expected at least {self.min_bytes or 1}")
        if self.on_error not in get_args(OnError):
            raise ValueError(f"on_error: found {self.on_error!r}, expected refuse or skip")
        if self.deduplicate and self.source.stopping_strategy == "all_exhausted":
            raise ValueError(
                "deduplicate: found with source.stopping_strategy all_exhausted, whose repeated documents it would "
                "leave out again; choose all_exhausted_without_replacement"
            )


def prepare(
    config: PrepareConfig, *, force: bool = False, progress: bool = True, workers: int | None = None
) -> Manifest:
    """Make the token store that `config` describes, unless it is there already; go on where a run was stopped.

    Args:
        force: make it again, replace whatever token store stands at `config.out`, and start over what was
            begun from another config.
        progress: draw progress bars on stderr.
        workers: processes that encode; the store does not depend on it. None: one per core.

    Raises FileNotFoundError for missing sources, FileExistsError where `out` is taken by something that is
    no token store, ValueError for an unfit source or tokenizer and where `out` holds a store made, or begun,
    from another config, `data.writer.DiskFullError` when there is no space left,
    `data.encoding.WorkerDiedError`.
    """
    workers = available_cores() if workers is None else workers
    if workers < 1:
        raise ValueError(f"workers: found {workers}, expected at least 1")
    out = Path(config.out)
    recipe = recipe_of(config)
    standing = (out / MANIFEST_NAME).exists()
    if not force and standing:
        return _up_to_date(out, recipe)

    from data.units import Units
    from data.writer import PartialStore

    with PartialStore(out, replace=force, keeps=True) as partial:
        # A forced run that was stopped is forced again to go on; it starts over where nothing needs the force.
        units = Units(partial, recipe, start_over=force and (not standing or _begun_otherwise(partial.folder, recipe)))
        manifest = units.published()
        if manifest is not None:
            return manifest
        try:
            return _fill(config, recipe, units, workers, progress)
        except (ValueError, FileNotFoundError):
            # The config has to change: nothing of this one is worth keeping.
            if not units.finished:
                partial.discard()
            raise


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _fill(config: PrepareConfig, recipe: dict[str, Any], units: Units, workers: int, progress: bool) -> Manifest:
    """Make the units that are missing, then the store."""
    from data.encoding import Encoder
    from data.units import FORGOTTEN, Gathered
    from data.writer import manifest_of

    documents = Documents(config.source, on_error=config.on_error)
    tokenizer = _kept_tokenizer(config, documents, units, progress)
    selected = selection(config, documents)
    gathered = Gathered()
    done = set(units.finished)
    cut = batches(selected, config.shard_bytes or _SHARD_BYTES)
    with _Bar("encoding", progress, documents.count()) as bar, Encoder(tokenizer, workers) as encoder:
        for batch, encoded in encoder.map(cut, done):
            gathered.add(batch, encoded)
            bar.advance(batch, encoded)
            if not batch.last:
                continue
            if batch.unit in done:
                units.compare(batch.unit, gathered)
            else:
                units.finish(batch.unit, gathered)
            gathered = Gathered()
        unread = [number for number in units.finished if number > batch.unit]
    if unread:
        raise ValueError(
            f"{units.partial.folder}: the source gives fewer documents than when unit {unread[0]} was made; pin its "
            "revision or put its files back, or remove that folder to start over"
        )
    shards = units.shards()
    written = {split: sum(shard.documents for shard in shards.get(split, ())) for split in ("train", "validation")}
    if not written["train"] or (config.validation_share and not written["validation"]):
        units.partial.discard()
        raise ValueError(
            f"validation_share: found {config.validation_share}, which splits the corpus into {written['train']} "
            f"training and {written['validation']} validation documents; expected both to hold some: change it, or "
            "set it to 0"
        )
    left_out = documents.left_out + selected.left_out
    return units.partial.publish(manifest_of(recipe, tokenizer, shards, left_out), FORGOTTEN)


def selection(config: PrepareConfig, documents: Documents) -> Selection:
    """The documents of a source that go into the store."""
    return Selection(
        documents,
        validation_share=config.validation_share,
        min_bytes=config.min_bytes,
        max_bytes=config.max_bytes,
        deduplicate=config.deduplicate,
    )


def recipe_of(config: PrepareConfig) -> dict[str, Any]:
    """What decides the bytes of the store, as JSON types: the config without `out`, and what it points to."""
    source = json.loads(json.dumps(dataclasses.asdict(config.source)))
    # The identity holds names and contents of files, so that a moved corpus stays the same.
    for part in (source, *source["sources"]):
        del part["files"]
    chosen = config.tokenizer
    if chosen.path:
        from data.tokenizer import BOS, EOS, tokenizer_file

        file, bos, eos = tokenizer_file(chosen.path)
        if not file.is_file():
            raise FileNotFoundError(
                f"tokenizer.path: no file at {chosen.path}; give the path of a tokenizer.json or of a folder with one"
            )
        tokenizer: dict[str, Any] = {
            "sha256": sha256_file(file),
            "bos": chosen.bos or bos or BOS,
            "eos": chosen.eos or eos or EOS,
        }
    else:
        tokenizer = {
            "vocab_size": chosen.vocab_size or _VOCAB_SIZE,
            "train_bytes": chosen.train_bytes or _TRAIN_BYTES,
            "train_documents": chosen.train_documents,
        }
    return {
        "format": FORMAT,
        "source": source,
        "identity": identity(config.source),
        "tokenizer": tokenizer,
        "validation_share": config.validation_share,
        "on_error": config.on_error,
        "min_bytes": config.min_bytes,
        "max_bytes": config.max_bytes,
        "deduplicate": config.deduplicate,
        "shard_bytes": config.shard_bytes or _SHARD_BYTES,
    }


def _begun_otherwise(folder: Path, recipe: dict[str, Any]) -> bool:
    from data.units import begun_recipe

    return begun_recipe(folder) not in (None, recipe)


def _up_to_date(out: Path, recipe: dict[str, Any]) -> Manifest:
    """The manifest at `out` if its store is whole and was made from `recipe`; else ValueError."""
    from data.store import TokenStore

    manifest = Manifest.read(out)
    if manifest.fingerprint != sha256_json(recipe):
        raise ValueError(
            f"{out} holds a token store made from another config ({differing(manifest.recipe, recipe)}); choose "
            "another --out, or --force to replace it"
        )
    for split in manifest.splits:
        TokenStore.open(out, split)
    return manifest


def _kept_tokenizer(config: PrepareConfig, documents: Documents, units: Units, progress: bool) -> Tokenizer:
    """The tokenizer that was written before, else a new one, written."""
    from data.tokenizer import Tokenizer

    chosen = config.tokenizer
    if units.has_tokenizer() and not chosen.path:
        return Tokenizer.load(units.partial.folder / TOKENIZER_NAME)
    tokenizer = make_tokenizer(config, documents, progress)
    units.partial.write_tokenizer(tokenizer)
    return tokenizer


def make_tokenizer(config: PrepareConfig, documents: Documents, progress: bool) -> Tokenizer:
    """Load the tokenizer of a config, or train it on the first documents of the training split."""
    from data.tokenizer import Tokenizer

    chosen = config.tokenizer
    if chosen.path:
        return Tokenizer.load(chosen.path, bos=chosen.bos, eos=chosen.eos)
    with _Bar("training the tokenizer", progress, None) as bar:
        texts = (bar.passed(text) for text in _training_texts(config, documents))
        return Tokenizer.train(texts, vocab_size=chosen.vocab_size or _VOCAB_SIZE)


def _training_texts(config: PrepareConfig, documents: Documents) -> Iterator[str]:
    """The first selected documents of the training split, up to the limits of the tokenizer's config."""
    budget = config.tokenizer.train_bytes or _TRAIN_BYTES
    count = 0
    for document in selection(config, documents):
        if document.split != "train":
            continue
        yield document.text
        budget -= document.size
        count += 1
        if budget <= 0 or count == config.tokenizer.train_documents:
            return


class _Bar:
    """Documents, MB/s and tokens/s of what is encoded now; what was finished before does not count as fast."""

    def __init__(self, label: str, progress: bool, total: int | None) -> None:
        from tqdm import tqdm

        # disable=None would hide the bar where stderr is no terminal; batch logs should show it, slowly.
        self._bar = tqdm(desc=label, total=total, unit=" documents", mininterval=1.0, disable=not progress)
        self._began = time.perf_counter()
        self._bytes = self._tokens = 0

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def passed(self, text: str) -> str:
        """Count a document."""
        self._bar.update()
        return text

    def advance(self, batch: Batch, encoded: Encoded | None) -> None:
        """Count a batch."""
        if encoded is not None:
            self._bytes += int(encoded.sizes.sum())
            self._tokens += len(encoded.tokens)
            seconds = time.perf_counter() - self._began
            self._bar.set_postfix_str(
                f"{self._bytes / seconds / 1e6:.1f} MB/s, {self._tokens / seconds / 1e6:.2f}M tokens/s", refresh=False
            )
        self._bar.update(len(batch.documents))
