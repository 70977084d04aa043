"""Chunks: what a preparation has finished, kept beside the shards so that a killed one can be gone on with.

A chunk is a run of documents cut by their sizes alone (`selection.batches`); it becomes one shard per
split. Its record is written after its shards, so a record means that they are whole:

    .NAME.partial/
        recipe.json          what is being made; another recipe is refused
        tokenizer.json       trained once; its checksum in chunks/tokenizer.sha256
        chunks/00000.json     shards of the chunk (sizes, sha256, counts), and a digest of its documents

Going on means reading the source again, which is cheap beside encoding it, and skipping the chunks that have
a record; the digest tells when the source no longer gives the documents it gave.
"""

import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sinkbed.data.files import differing, load_json, sha256_file, write_atomic, write_json
from sinkbed.data.prepare.encoding import Encoded
from sinkbed.data.prepare.staging import StagingFolder, shard_name
from sinkbed.data.source.selection import Batch
from sinkbed.data.store.manifest import MANIFEST_NAME, TOKENIZER_NAME, Manifest, ShardInfo
from sinkbed.data.tokenizer import Tokenizer

RECIPE_NAME = "recipe.json"
CHUNKS_NAME = "chunks"
_TOKENIZER_SUM = "tokenizer.sha256"
FORGOTTEN = (RECIPE_NAME, CHUNKS_NAME)
"""What is no part of a finished token store."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A finished chunk."""

    shards: dict[str, ShardInfo]
    """By split, for the splits it has documents of; `file` is numbered by chunk."""
    digest: str
    """sha256 over the hashes of its documents, in order."""


class Chunks:
    """The finished chunks of a partial store.

    Raises ValueError where the folder holds chunks of another recipe.
    """

    def __init__(self, staging: StagingFolder, recipe: dict[str, Any], *, start_over: bool = False) -> None:
        self.staging = staging
        self.folder = staging.folder / CHUNKS_NAME
        begun = None if start_over else begun_recipe(staging.folder)
        if begun is not None and (changed := differing(begun, recipe)):
            raise ValueError(
                f"{staging.folder} holds an unfinished token store of another config ({changed}); "
                "finish it with that config, start over with `sinkbed prepare --force`, or choose another --out"
            )
        with staging.full_disk_named():
            if begun is None:
                staging.clear()
                write_json(staging.folder / RECIPE_NAME, recipe)
            self.folder.mkdir(exist_ok=True)
        self.finished: dict[int, Chunk] = {}
        for path in sorted(self.folder.glob("*.json")):
            chunk = read_chunk(path)
            # The disk may have lost what a crash of the machine overtook; such a chunk is made again.
            if chunk is not None and all(self._is_whole(shard) for shard in chunk.shards.values()):
                self.finished[int(path.stem)] = chunk

    def published(self) -> Manifest | None:
        """The manifest, where all is written and only the last renaming was missed."""
        if not (self.staging.folder / MANIFEST_NAME).is_file():
            return None
        return self.staging.publish(Manifest.read(self.staging.folder), FORGOTTEN)

    def write_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Write the tokenizer, then its checksum."""
        self.staging.write_tokenizer(tokenizer)
        with self.staging.full_disk_named():
            write_atomic(self.folder / _TOKENIZER_SUM, sha256_file(self.staging.folder / TOKENIZER_NAME))

    def kept_tokenizer(self) -> Tokenizer | None:
        """The tokenizer that was written, None before. Raises ValueError for one that is damaged."""
        path, record = self.staging.folder / TOKENIZER_NAME, self.folder / _TOKENIZER_SUM
        if not path.is_file():
            return None
        try:
            if record.is_file() and sha256_file(path) not in record.read_text(errors="replace"):
                raise ValueError(f"{path} is not what {record} has the sha256 of")
            return Tokenizer.load_trained(path)
        except ValueError as error:
            raise ValueError(
                f"{self.staging.folder}: the tokenizer of this unfinished token store is damaged ({error}); run the "
                "same command with --force to start over"
            ) from None

    def finish(self, number: int, gathered: "Gathered") -> None:
        """Write the shards of a chunk, then its record."""
        shards = {
            split: self.staging.write_shard(shard_name(split, number), *gathered.columns(split))
            for split in gathered.splits()
        }
        chunk = Chunk(shards=shards, digest=gathered.digest())
        with self.staging.full_disk_named():
            write_json(self.folder / f"{number:05d}.json", dataclasses.asdict(chunk))
        self.finished[number] = chunk

    def compare(self, number: int, gathered: "Gathered") -> None:
        """Check that a finished chunk was made of the documents that were gathered, else raise ValueError."""
        if gathered.digest() != self.finished[number].digest:
            raise ValueError(
                f"{self.staging.folder}: the source no longer gives the documents of chunk {number} that it gave when "
                "the chunk was made; pin its revision or put its files back, or remove that folder to start over"
            )

    def shards(self) -> dict[str, list[ShardInfo]]:
        """By split, in order. A split skips the number of a chunk that has no document of it."""
        gathered: dict[str, list[ShardInfo]] = {}
        for split in ("train", "validation"):
            infos = [chunk.shards[split] for _, chunk in sorted(self.finished.items()) if split in chunk.shards]
            if infos:
                gathered[split] = infos
        return gathered

    def _is_whole(self, shard: ShardInfo) -> bool:
        path = self.staging.folder / shard.file
        return path.is_file() and path.stat().st_size == shard.size and sha256_file(path) == shard.sha256


class Gathered:
    """The documents of the chunk at hand, as they come."""

    def __init__(self) -> None:
        self._batches: list[tuple[Encoded, dict[str, NDArray[np.bool_]]]] = []
        self._digest = hashlib.sha256()

    def add(self, batch: Batch, encoded: Encoded | None) -> None:
        """Add a batch; None for its tokens where only the digest is wanted."""
        hashes = np.fromiter((d.digest for d in batch.documents), dtype=np.uint64, count=len(batch.documents))
        self._digest.update(hashes.astype("<u8").tobytes())
        if encoded is not None:
            splits = np.array([d.split == "validation" for d in batch.documents])
            self._batches.append((encoded, {"train": ~splits, "validation": splits}))

    def splits(self) -> list[str]:
        """Splits that have documents."""
        return [s for s in ("train", "validation") if any(chosen[s].any() for _, chosen in self._batches)]

    def columns(self, split: str) -> tuple[NDArray[Any], NDArray[np.int64], NDArray[np.int64]]:
        """(tokens, counts, sizes) of a split, see `Encoded`."""
        tokens, counts, sizes = [], [], []
        for encoded, chosen in self._batches:
            of_split = chosen[split]
            every = of_split.all()
            tokens.append(encoded.tokens if every else encoded.tokens[np.repeat(of_split, encoded.counts)])
            counts.append(encoded.counts[of_split])
            sizes.append(encoded.sizes[of_split])
        # A long document is a chunk of one batch, of whose tokens there need be no copy.
        return tokens[0] if len(tokens) == 1 else np.concatenate(tokens), np.concatenate(counts), np.concatenate(sizes)

    def digest(self) -> str:
        """sha256 over the hashes of the documents, in order."""
        return self._digest.hexdigest()


def begun_recipe(folder: Path) -> dict[str, Any] | None:
    """The recipe of what a partial folder holds; None where nothing was begun."""
    for name in (RECIPE_NAME, MANIFEST_NAME):
        if (folder / name).is_file():
            try:
                fields = load_json(folder / name)
                return fields if name == RECIPE_NAME else fields["recipe"]  # type: ignore[no-any-return]
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
                raise ValueError(
                    f"{folder / name}: expected what this unfinished token store is made from, got a damaged file "
                    f"({error}); remove {folder} to start over"
                ) from None
    return None


def read_chunk(path: Path) -> Chunk | None:
    """The record of a chunk; None where it is damaged."""
    try:
        fields = load_json(path)
        shards = {split: ShardInfo(**shard) for split, shard in fields["shards"].items()}
        return Chunk(shards=shards, digest=fields["digest"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
