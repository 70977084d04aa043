"""Manifest of a token store: what it holds, from what it was made, and how to tell that it is intact.

Plain dataclasses over one JSON file, without time stamps: preparing the same config twice gives the same
manifest, so a run can be tied to its data by comparing one value.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Self

from sinkbed.data.files import NoRecord, sha256_json, unsealed, write_json

FORMAT = 2
MANIFEST_NAME = "manifest.json"
TOKENIZER_NAME = "tokenizer.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardInfo:
    """One Arrow file of a split."""

    file: str
    """Path inside the token store, such as `train/00000.arrow`."""
    size: int
    """Bytes on disk."""
    sha256: str
    """Of the whole file."""
    documents: int
    tokens: int
    bytes: int
    """UTF-8 bytes of the documents' text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitInfo:
    """One split: its shards in order, and their sums."""

    documents: int
    tokens: int
    bytes: int
    """UTF-8 bytes of the documents' text."""
    shards: tuple[ShardInfo, ...]

    @classmethod
    def of(cls, shards: Sequence[ShardInfo]) -> Self:
        """The split of these shards."""
        sums = {name: sum(getattr(shard, name) for shard in shards) for name in ("documents", "tokens", "bytes")}
        return cls(**sums, shards=tuple(shards))

    @property
    def digest(self) -> str:
        """sha256 over the shards' sha256: equal for two splits exactly when their files are equal."""
        return hashlib.sha256("".join(shard.sha256 for shard in self.shards).encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """All that is known of a token store without opening its shards."""

    format: int = FORMAT
    recipe: dict[str, Any]
    """What the store was made from: source, identity of its files or packages, tokenizer, split, shards."""
    fingerprint: str
    """sha256 of the canonical JSON of `recipe`."""
    tokenizer_sha256: str
    vocab_size: int
    bos_id: int
    eos_id: int
    special_ids: tuple[int, ...]
    """Every control token of the tokenizer, in ascending order; none of them stands in a stored document."""
    control_tokens: tuple[dict[str, Any], ...]
    """What tokenizer.json leaves out, so that nobody who loads it makes control tokens from text: its list of them."""
    dtype: str
    """`uint16` or `uint32`."""
    left_out: dict[str, int]
    """Records that gave no document, by reason (`empty`, `duplicate`, `too_short`, `malformed`, ...)."""
    splits: dict[str, SplitInfo]

    def token_id(self, what: str | int) -> int | None:
        """The id that a strategy means by `bos`, `eos`, `none` (None) or an id."""
        return {"bos": self.bos_id, "eos": self.eos_id, "none": None}[what] if isinstance(what, str) else what

    @property
    def digest(self) -> str:
        """sha256 of all that decides training: vocabulary, control tokens, tokenizer and the shards of every split.

        Equal for two stores exactly when a run sees the same in both, whatever they were made from.
        """
        fields = self.to_dict()
        names = ("tokenizer_sha256", "vocab_size", "bos_id", "eos_id", "special_ids", "dtype", "splits")
        return sha256_json({name: fields[name] for name in names})

    def write(self, folder: Path) -> None:
        """Write `manifest.json` into `folder`, whole or not at all, with a checksum of itself."""
        write_json(folder / MANIFEST_NAME, self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read the manifest of the token store at `folder`.

        Raises FileNotFoundError where there is no token store, ValueError for a manifest that is damaged, or is of
        another format version.
        """
        folder = folder.expanduser()
        path = folder / MANIFEST_NAME
        if not path.is_file():
            raise FileNotFoundError(
                f"no token store at {folder}: {MANIFEST_NAME} is missing; make one with `sinkbed prepare`"
            )
        try:
            return cls._checked(json.loads(path.read_text(encoding="utf-8")))
        except (LookupError, TypeError, AttributeError, ValueError, RecursionError) as error:
            fault = error if type(error) in (ValueError, NoRecord) else f"{type(error).__name__}: {error}"
            raise ValueError(
                f"{path}: expected an intact manifest of format {FORMAT}, got {fault}; copy it again or prepare the "
                "token store again with --force"
            ) from error

    @classmethod
    def _checked(cls, fields: dict[str, Any]) -> "Manifest":
        """The manifest of these fields. Raises ValueError, or what their types lead to, for one that is damaged."""
        if fields["format"] != FORMAT:
            raise ValueError(f"format {fields['format']}")
        fields = unsealed(fields)
        fields["special_ids"] = tuple(fields["special_ids"])
        fields["control_tokens"] = tuple(fields["control_tokens"])
        splits = {}
        for name, split in fields["splits"].items():
            shards = tuple(ShardInfo(**shard) for shard in split["shards"])
            splits[name] = SplitInfo(**{**split, "shards": shards})
            for shard in shards:
                inside = PurePosixPath(shard.file)
                if inside.is_absolute() or ".." in inside.parts:
                    raise ValueError(f"a shard outside the token store, {shard.file!r}")
        return cls(**{**fields, "splits": splits})


def token_type(vocab_size: int) -> str:
    """Name of the type of a token: 16 bits as long as the vocabulary fits."""
    return "uint16" if vocab_size <= 2**16 else "uint32"
