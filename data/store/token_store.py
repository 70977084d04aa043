"""Token store: the tokenised documents on disk, memory-mapped, with document boundaries and a manifest.

    stores/demo/
        manifest.json                what it was made from, counts, checksums
        tokenizer.json               readable by `tokenizers` and `transformers`
        train/00000.arrow ...        Arrow IPC files of one record batch each
        validation/00000.arrow ...

Each record is a document: `tokens`, large_list<uint16> (uint32 when the vocabulary exceeds 65,536), without
special tokens, and `bytes`, int64, the UTF-8 length of its text. The files are uncompressed, so a slice
of tokens is a view of the mapped file, and `datasets`, polars and pyarrow read them as they are.

Memory: a few integers per shard, whatever the number of documents and tokens: tokens and offsets live in the page
cache, from which the system takes them back when it wants to.
Traded away: a store is never changed in place; another tokenizer or split means another store.
"""

import json
import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sinkbed.data.files import sha256_file, sha256_json
from sinkbed.data.store.manifest import TOKENIZER_NAME, Manifest, ShardInfo, SplitInfo
from sinkbed.data.store.offsets import Offsets
from sinkbed.data.tokenizer import Tokenizer

_MAPPED_SHARDS = 4096  # a process may have some 65,000 mappings; they hold no file descriptors
_CHECKED_SHARDS = 256  # counted when opening; others when they are first read, so that opening stays quick


class TokenStore:
    """One split of a token store, read-only. Build with `TokenStore.open`; picklable (workers reopen it)."""

    def __init__(self, path: Path, split: str, manifest: Manifest) -> None:
        self.path = path
        self.split = split
        self.manifest = manifest
        self.info: SplitInfo = manifest.splits[split]
        shards = self.info.shards
        self._first_token = np.cumsum([0, *(shard.tokens for shard in shards)], dtype=np.int64)
        self._mapped: OrderedDict[int, tuple[NDArray[np.int64], NDArray[Any], int]] = OrderedDict()
        self.offsets = Offsets(
            [shard.documents for shard in shards],
            [shard.tokens for shard in shards],
            lambda shard: self._shard(shard)[0],
        )
        """[documents + 1] tokens before each document, over all shards; the last is the number of tokens."""

    @classmethod
    def open(cls, path: Path | str, split: str = "train") -> Self:
        """Open a split and check sizes, counts and the tokenizer's hash; `verify` reads all bytes.

        Raises FileNotFoundError where there is no token store or a shard is missing, and ValueError for a
        split it does not have, a damaged shard or a tokenizer that is not the one it was made with.
        """
        path = Path(path).expanduser()
        manifest = Manifest.read(path)
        if split not in manifest.splits:
            raise ValueError(
                f"{path}: expected a split {split!r}, got {', '.join(manifest.splits)}; prepare the token store with a "
                "validation_share above 0 to have a validation split"
            )
        tokenizer = path / TOKENIZER_NAME
        if not tokenizer.is_file():
            raise FileNotFoundError(f"{tokenizer} is missing; prepare the token store again with --force")
        definition = read_definition(tokenizer, manifest.control_tokens)
        actual = sha256_json(definition)
        if actual != manifest.tokenizer_sha256:
            raise ValueError(
                f"{tokenizer}: expected sha256 {manifest.tokenizer_sha256[:12]}… (the tokenizer the documents were "
                f"encoded with), got {actual[:12]}…; put that file back or prepare the token store again with --force"
            )
        store = cls(path, split, manifest)
        for shard in store.info.shards:
            if not (path / shard.file).is_file():
                raise FileNotFoundError(f"{path / shard.file} is missing; prepare the token store again with --force")
            size = (path / shard.file).stat().st_size
            if size != shard.size:
                raise store._damaged(shard, f"expected {shard.size:,} bytes on disk, got {size:,}")
        for number in range(min(len(store.info.shards), _CHECKED_SHARDS)):
            store._shard(number)
        return store

    @property
    def documents(self) -> int:
        """Number of documents."""
        return self.info.documents

    @property
    def tokens(self) -> int:
        """Number of tokens, without any special token."""
        return self.info.tokens

    @property
    def digest(self) -> str:
        """sha256 that tells this split's contents from any other's."""
        return self.info.digest

    def tokenizer(self) -> Tokenizer:
        """The tokenizer the documents were encoded with."""
        definition = read_definition(self.path / TOKENIZER_NAME, self.manifest.control_tokens)
        return Tokenizer.from_str(json.dumps(definition), bos_id=self.manifest.bos_id, eos_id=self.manifest.eos_id)

    def slice(self, document: int, start: int = 0, stop: int | None = None) -> NDArray[np.unsignedinteger]:
        """Tokens `start` to `stop` of a document, clipped to its end: a read-only view of the mapped file.

        Raises IndexError for a document the split does not have.
        """
        if not 0 <= document < self.documents:
            raise IndexError(f"document {document}: the split has documents 0 to {self.documents - 1}")
        begin, end = self.offsets[np.array([document, document + 1])].tolist()
        # The last shard that begins at or before the document: those before it may hold no token.
        shard = max(0, int(np.searchsorted(self._first_token[:-1], begin, side="right")) - 1)
        base = int(self._first_token[shard])
        return self._shard(shard)[1][begin - base : end - base][start:stop]

    def gather(self, starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.unsignedinteger]:
        """Copy of ranges of tokens, joined; `starts` and `lengths` [P] count over all documents end to end.

        Raises IndexError for a range that leaves the split.
        """
        ends = starts + lengths
        if len(starts) and (starts.min() < 0 or lengths.min() < 0 or ends.max() > self.tokens):
            raise IndexError(f"tokens {starts.min()} to {ends.max()}: the split has {self.tokens}")
        result = np.empty(int(lengths.sum()), dtype=self.manifest.dtype)
        # Consecutive documents are consecutive in the store: ranges that touch are read as one.
        opens = np.flatnonzero(np.concatenate([[True], starts[1:] != ends[:-1]])[: len(starts)])
        closes = np.append(opens[1:], len(starts)) - 1
        filled = 0
        for start, stop in zip(starts[opens].tolist(), ends[closes[: len(opens)]].tolist(), strict=True):
            while start < stop:
                shard = int(self._first_token.searchsorted(start, side="right")) - 1
                base, end = int(self._first_token[shard]), min(stop, int(self._first_token[shard + 1]))
                result[filled : filled + end - start] = self._shard(shard)[1][start - base : end - base]
                filled += end - start
                start = end
        return result

    def verify(self) -> None:
        """Read every shard and compare its sha256. Raises ValueError that names the first damaged one."""
        for shard in self.info.shards:
            actual = sha256_file(self.path / shard.file)
            if actual != shard.sha256:
                raise self._damaged(shard, f"expected sha256 {shard.sha256[:12]}…, got {actual[:12]}…")

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (os.fspath(self.path.absolute()), self.split, self.digest)

    def _shard(self, number: int) -> tuple[NDArray[np.int64], NDArray[Any]]:
        """A shard's own offsets and all its tokens: views of the mapped file. The least recently used one is let go."""
        shard = self.info.shards[number]
        path = self.path / shard.file
        if number in self._mapped:
            offsets, values, inode = self._mapped[number]
            self._check_length(path, shard, inode)
            if len(self._mapped) == _MAPPED_SHARDS:
                self._mapped.move_to_end(number)
            return offsets, values
        column = self._tokens(shard)
        offsets, values = column.offsets.to_numpy(), column.values.to_numpy(zero_copy_only=True)
        if len(offsets) != shard.documents + 1 or int(offsets[-1]) != shard.tokens or offsets[0] != 0:
            raise self._damaged(
                shard,
                f"expected {shard.documents:,} documents and {shard.tokens:,} tokens, "
                f"got {len(offsets) - 1:,} and {int(offsets[-1]):,}",
            )
        if values.dtype != self.manifest.dtype:
            raise self._damaged(shard, f"expected tokens of type {self.manifest.dtype}, got {values.dtype}")
        if len(self._mapped) >= _MAPPED_SHARDS:
            self._mapped.popitem(last=False)
        self._mapped[number] = offsets, values, os.stat(path).st_ino
        return offsets, values

    def _check_length(self, path: Path, shard: ShardInfo, inode: int) -> None:
        """Refuse a mapped file that was cut short: to read beyond its end would kill the process."""
        try:
            now = os.stat(path)
        except FileNotFoundError:  # deleted or replaced: what is mapped stays
            return
        if now.st_ino == inode and now.st_size < shard.size:
            raise self._damaged(shard, f"expected {shard.size:,} bytes on disk, got {now.st_size:,}")

    def _tokens(self, shard: ShardInfo) -> Any:
        try:
            with pa.memory_map(os.fspath(self.path / shard.file)) as source:
                column = pa.ipc.open_file(source).get_batch(0).column("tokens")
            # Offsets that fall, or point beyond the values, would be read as other documents or beyond the file.
            column.validate(full=True)
            return column
        except (pa.ArrowException, LookupError, OSError, ValueError) as error:
            raise self._damaged(shard, f"expected a readable Arrow file, got {error}") from error

    def _damaged(self, shard: ShardInfo, what: str) -> ValueError:
        return ValueError(
            f"shard {self.path / shard.file} is damaged: {what}; copy it again or prepare the token store with --force"
        )


def _reopen(path: str, split: str, digest: str) -> TokenStore:
    store = TokenStore.open(path, split)
    if store.digest != digest:
        raise ValueError(
            f"{path}: the token store was replaced while in use (split {split}: expected {digest[:12]}…, got "
            f"{store.digest[:12]}…); start again with the present store"
        )
    return store


def read_definition(path: Path, control_tokens: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """The JSON of a tokenizer file, without building it; its `sha256_json` is `Tokenizer.sha256`.

    Args:
        control_tokens: those of a tokenizer that was saved without listing them.
    """
    try:
        definition = json.loads(path.read_text(encoding="utf-8"))
        for token in control_tokens:
            listed = {name: value for name, value in token.items() if name != "in_vocab"}
            definition["added_tokens"].append(listed)
            if not token["in_vocab"]:
                del definition["model"]["vocab"][token["content"]]
        definition["added_tokens"].sort(key=lambda token: token["id"])
        return definition
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"tokenizer: {path} is damaged ({error}); prepare the token store again with --force"
        ) from error
