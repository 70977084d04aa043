"""Prepare: documents -> tokenizer -> token store, in one call that is safe to repeat.

The split is by a hash of each document's text, never by its position: reordering or extending the corpus
moves no document from training to validation, and duplicates fall on the same side. The tokenizer is
trained on documents of the training split only.

A store records what it was made from, down to the sha256 of local files. Called again with the same
config, `prepare` returns at once; with another, it refuses rather than mix two corpora. Traded away:
a run that was interrupted starts over, since only a complete store has a name.

This module imports neither datasets nor tokenizers until `prepare` is called.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.manifest import FORMAT, Manifest, differences, sha256_file, sha256_json
from data.sources import Documents, Source, identity

if TYPE_CHECKING:
    from data.tokenizer import Tokenizer

_VOCAB_SIZE = 32_768
_TRAIN_BYTES = 4_000_000
_BATCH_DOCUMENTS = 256
_BATCH_BYTES = 2_000_000  # encoded at a time; bounds memory when documents are books


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """A tokenizer to train, or one to load. Raises ValueError for settings that contradict each other."""

    path: str | None = None
    """A `tokenizer.json` to load. None: train a byte-level BPE."""
    vocab_size: int | None = None
    """Training: tokens in the vocabulary at most, with 256 bytes, `<bos>` and `<eos>`. None: 32,768."""
    train_bytes: int | None = None
    """Training: stop reading documents after this many UTF-8 bytes. None: 4,000,000."""
    train_documents: int | None = None
    """Training: stop reading after this many documents. None: no limit."""
    bos: str | None = None
    """Loading: the token that serves as BOS. None: `<bos>`."""
    eos: str | None = None
    """Loading: the token that serves as EOS. None: `<eos>`."""

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
    shard_tokens: int = 2**26
    """Tokens per shard at most; one shard is held in memory while preparing."""
    out: str
    """Folder of the token store."""

    def __post_init__(self) -> None:
        if not 0 <= self.validation_share < 1:
            raise ValueError(f"validation_share: found {self.validation_share}, expected 0 or more and less than 1")
        if self.shard_tokens < 1:
            raise ValueError(f"shard_tokens: found {self.shard_tokens}, expected at least 1")


def prepare(config: PrepareConfig, *, force: bool = False, progress: bool = True) -> Manifest:
    """Make the token store that `config` describes, unless it is there already.

    Args:
        force: make it again, and replace whatever token store stands at `config.out`.
        progress: draw progress bars on stderr.

    Raises FileNotFoundError for missing sources, FileExistsError where `out` is taken by something that is
    no token store, ValueError for an unfit source or tokenizer and where `out` holds a store made from
    another config, `data.writer.DiskFullError` when there is no space left.
    """
    out = Path(config.out)
    recipe = _recipe(config)
    if not force and (out / "manifest.json").exists():
        return _up_to_date(out, recipe)

    from data.writer import StoreWriter

    documents = Documents(config.source)
    tokenizer = _tokenizer(config, documents, progress)
    with StoreWriter(out, tokenizer, shard_tokens=config.shard_tokens, replace=force) as writer:
        written = {"train": 0, "validation": 0}
        bar = _bar(documents, "encoding", progress, documents.count())
        for batch in _batches(bar):
            for text, ids in zip(batch, tokenizer.encode_batch(batch), strict=True):
                split = split_of(text, config.validation_share)
                writer.add(split, ids, len(text.encode()))
                written[split] += 1
        _check_splits(written, config.validation_share)
        return writer.finish(recipe=recipe, skipped_documents=documents.skipped)


def split_of(text: str, validation_share: float) -> str:
    """`train` or `validation`: a function of the text alone (blake2b, 64 bits)."""
    drawn = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
    return "validation" if drawn < validation_share * 2**64 else "train"


def _recipe(config: PrepareConfig) -> dict[str, Any]:
    """What decides the bytes of the store, as JSON types: the config without `out`, and what it points to."""
    source = json.loads(json.dumps(dataclasses.asdict(config.source)))
    del source["files"]  # the identity holds names and contents, so that a moved corpus stays the same
    chosen = config.tokenizer
    if chosen.path:
        if not Path(chosen.path).is_file():
            raise FileNotFoundError(f"tokenizer.path: no file at {chosen.path}; give the path of a tokenizer.json")
        tokenizer: dict[str, Any] = {"sha256": sha256_file(Path(chosen.path)), "bos": chosen.bos, "eos": chosen.eos}
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
        "shard_tokens": config.shard_tokens,
    }


def _up_to_date(out: Path, recipe: dict[str, Any]) -> Manifest:
    """The manifest at `out` if its store is whole and was made from `recipe`; else ValueError."""
    from data.store import TokenStore

    manifest = Manifest.read(out)
    if manifest.fingerprint != sha256_json(recipe):
        differing = list(differences(manifest.recipe, recipe))
        listed = "; ".join(f"{key}: found {found!r}, expected {expected!r}" for key, found, expected in differing[:4])
        more = f"; and {len(differing) - 4} more" if len(differing) > 4 else ""
        raise ValueError(
            f"{out} holds a token store made from another config ({listed}{more}); choose another --out, or "
            "--force to replace it"
        )
    for split in manifest.splits:
        TokenStore.open(out, split)
    return manifest


def _tokenizer(config: PrepareConfig, documents: Documents, progress: bool) -> Tokenizer:
    from data.tokenizer import BOS, EOS, Tokenizer

    chosen = config.tokenizer
    if chosen.path:
        return Tokenizer.load(chosen.path, bos=chosen.bos or BOS, eos=chosen.eos or EOS)
    total = min(filter(None, (documents.count(), chosen.train_documents)), default=None)
    bar = _bar(_training_texts(documents, config), "training the tokenizer", progress, total)
    return Tokenizer.train(bar, vocab_size=chosen.vocab_size or _VOCAB_SIZE)


def _training_texts(documents: Documents, config: PrepareConfig) -> Iterator[str]:
    """The first documents of the training split, up to the limits of the tokenizer's config."""
    budget = config.tokenizer.train_bytes or _TRAIN_BYTES
    count = 0
    for text in documents:
        if split_of(text, config.validation_share) != "train":
            continue
        yield text
        budget -= len(text.encode())
        count += 1
        if budget <= 0 or count == config.tokenizer.train_documents:
            return


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if len(batch) == _BATCH_DOCUMENTS or size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _check_splits(written: dict[str, int], validation_share: float) -> None:
    if not written["train"] or (validation_share and not written["validation"]):
        raise ValueError(
            f"validation_share: found {validation_share}, which splits the corpus into {written['train']} training and "
            f"{written['validation']} validation documents; expected both to hold some: change it, or set it to 0"
        )


def _bar(texts: Iterable[str], label: str, progress: bool, total: int | None) -> Iterable[str]:
    from tqdm import tqdm

    # disable=None would hide the bar where stderr is no terminal; batch logs should show it, slowly.
    return tqdm(texts, label, total=total, unit=" documents", mininterval=1.0, disable=not progress)
