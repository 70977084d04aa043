"""The config of `sinkbed prepare`: all that decides a token store."""

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, get_args

from sinkbed.data.source.config import OnError, Source
from sinkbed.data.source.documents import Documents
from sinkbed.data.source.selection import Selection
from sinkbed.ranges import check_choice, check_number

if TYPE_CHECKING:
    from sinkbed.data.tokenizer import Tokenizer

VOCAB_SIZE = 32_768
SMALLEST_VOCAB = 258  # 256 bytes, <bos> and <eos>
TRAIN_BYTES = 4_000_000
SHARD_BYTES = 2**28


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """A tokenizer to train, or one to load. Raises ValueError for settings that contradict each other."""

    path: str | None = None
    """A `tokenizer.json` to load, or a folder of `transformers` with one. None: train a byte-level BPE."""
    vocab_size: int | None = None
    """Training: tokens in the vocabulary at most, with 256 bytes, `<bos>` and `<eos>`. None: 32,768."""
    train_bytes: int | None = None
    """Training: stop reading documents after this many UTF-8 bytes; of one document no more are read. None:
    4,000,000."""
    train_documents: int | None = None
    """Training: stop reading after this many documents. None: no limit."""
    bos: str | None = None
    """Loading: the token that serves as BOS. None: what the folder's configuration names, else `<bos>`."""
    eos: str | None = None
    """Loading: the token that serves as EOS. None: what the folder's configuration names, else `<eos>`."""

    def __post_init__(self) -> None:
        if self.path is not None:
            object.__setattr__(self, "path", os.path.expanduser(self.path))
        unused = ("vocab_size", "train_bytes", "train_documents") if self.path else ("bos", "eos")
        for name in unused:
            if getattr(self, name) is not None:
                mode = "a tokenizer that is loaded" if self.path else "a tokenizer that is trained"
                raise ValueError(
                    f"tokenizer.{name}: expected none with {mode}, which ignores it, got {getattr(self, name)!r}; "
                    f"remove it or {'remove' if self.path else 'set'} tokenizer.path"
                )
        for name in ("vocab_size", "train_bytes", "train_documents"):
            if (value := getattr(self, name)) is not None:
                check_number(f"tokenizer.{name}", value, least=SMALLEST_VOCAB if name == "vocab_size" else 1)


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
        object.__setattr__(self, "out", os.path.expanduser(self.out))
        check_number("validation_share", self.validation_share, least=0, below=1)
        # No document is empty, so that a min_bytes of 1 would leave nothing out.
        for name, least in (("shard_bytes", 1), ("min_bytes", 2), ("max_bytes", self.min_bytes or 1)):
            if (value := getattr(self, name)) is not None:
                check_number(name, value, least=least)
        check_choice("on_error", self.on_error, get_args(OnError))
        if self.deduplicate and self.source.stopping_strategy == "all_exhausted":
            raise ValueError(
                "deduplicate: expected false with source.stopping_strategy all_exhausted, whose repeated documents it "
                "would leave out again, got true; choose all_exhausted_without_replacement"
            )

    def select(self, documents: Documents, tokenizer: "Tokenizer | None" = None) -> Selection:
        """The documents that go into the store; without a tokenizer, as one without a normaliser has them."""
        return Selection(
            documents,
            validation_share=self.validation_share,
            min_bytes=self.min_bytes,
            max_bytes=self.max_bytes,
            deduplicate=self.deduplicate,
            normalize=tokenizer.normalize if tokenizer is not None and tokenizer.may_change_text else None,
            skip_changed=self.on_error == "skip",
        )
