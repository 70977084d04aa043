"""A token store in the making: a folder beside the final name, which is renamed when it is whole.

Everything is written into `.NAME.partial`, flushed to the disk and renamed, file by file and at last the
folder, so what stands under the final name is complete, whatever interrupts the writing.
"""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sinkbed.data.files import remove_temporaries, replacing, sha256_file, sha256_json, sync_folder, write_atomic
from sinkbed.data.store.manifest import MANIFEST_NAME, TOKENIZER_NAME, Manifest, ShardInfo, SplitInfo, token_type
from sinkbed.data.tokenizer import Tokenizer

LOCK_NAME = ".lock"


class DiskFullError(OSError):
    """No space or quota left; the message says what became of the token store and what to do."""


def partial_of(out: Path | str) -> Path:
    """`.NAME.partial` beside a token store, in which it grows; where `out` is a link, beside what it leads to."""
    out = Path(os.path.realpath(out))
    return out.parent / f".{out.name}.partial"


class StagingFolder:
    """The folder `.NAME.partial` beside `out`, in which a token store grows. A context manager: locked while open.

    What stands in it is whole: each file is written beside its place, flushed, then renamed.

    Args:
        replace: take the place of a token store already at `out`.

    Raises FileExistsError where `out` is taken, BlockingIOError where another process is writing it, and
    DiskFullError when there is no space left.
    """

    def __init__(self, out: Path | str, *, replace: bool = False) -> None:
        self.out = Path(os.path.realpath(out))
        self.folder = partial_of(out)
        self._replace = replace
        self._lock: Any = None

    def __enter__(self) -> Self:
        _refuse_taken(self.out, self._replace)
        with self.full_disk_named():
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.folder / LOCK_NAME, "w")  # held until __exit__
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise BlockingIOError(
                errno.EWOULDBLOCK, f"another process is preparing {self.out}; wait for it or choose another --out"
            ) from None
        except OSError:  # a file system without locks
            pass
        if not _is_at(self._lock, self.folder / LOCK_NAME):
            self._lock.close()
            raise BlockingIOError(
                errno.EWOULDBLOCK, f"another process has just finished {self.out}; run the same command again"
            )
        for folder in (self.folder, *self.folder.glob("*/")):
            remove_temporaries(folder)
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    def clear(self) -> None:
        """Forget what an earlier writer left."""
        for stale in self.folder.iterdir():
            if stale.name != LOCK_NAME:
                remove(stale)

    def discard(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def write_shard(
        self, name: str, tokens: NDArray[Any], counts: NDArray[np.int64], sizes: NDArray[np.int64]
    ) -> ShardInfo:
        """Write one shard, durably.

        Args:
            name: such as `train/00000.arrow`.
            tokens: [sum of counts] in the type of the token store.
            counts: [documents] tokens of each document.
            sizes: [documents] UTF-8 bytes of each document.
        """
        path = self.folder / name
        # One record batch: the `tokens` of a document are a slice of one values buffer.
        offsets = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        lists = pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(tokens))
        batch = pa.record_batch([lists, pa.array(sizes, pa.int64())], names=["tokens", "bytes"])
        with self.full_disk_named(), replacing(path) as file, pa.ipc.new_file(file, batch.schema) as writer:
            writer.write_batch(batch)
        return ShardInfo(
            file=name,
            size=path.stat().st_size,
            sha256=sha256_file(path),
            documents=len(counts),
            tokens=len(tokens),
            bytes=int(sizes.sum()),
        )

    def write_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Write `tokenizer.json`, durably; its control tokens go into the manifest."""
        with self.full_disk_named():
            write_atomic(self.folder / TOKENIZER_NAME, tokenizer.to_json(list_control=False))

    def publish(self, manifest: Manifest, forget: Sequence[str] = ()) -> Manifest:
        """Write the manifest, and give the token store its name.

        Args:
            forget: files and folders of ours that are no part of a token store. They go after the manifest
                is written: a folder with a manifest is whole, and publishing may be repeated.
        """
        with self.full_disk_named():
            manifest.write(self.folder)
            for name in forget:
                remove(self.folder / name)
            sync_folder(self.folder)
            self._rename()
        # The store stands. Its name is made durable before what it replaces goes.
        sync_folder(self.out.parent)
        sweep(self.out)
        return manifest

    def _rename(self) -> None:
        """Rename the partial folder to its final name; a store that stood there is put aside."""
        previous = _previous(self.out)
        remove(previous)
        if self.out.exists():
            _refuse_taken(self.out, self._replace)
            os.rename(self.out, previous)
        try:
            os.rename(self.folder, self.out)
        except OSError:
            if previous.exists():
                os.rename(previous, self.out)
            raise

    @contextmanager
    def full_disk_named(self) -> Iterator[None]:
        """Turn a full disk or quota, met anywhere inside, into one message that says what to do."""
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT) or isinstance(error, DiskFullError):
                raise
            raise DiskFullError(
                error.errno,
                f"the disk is full: the token store {self.out} was not made, the shards that were finished are kept in "
                f"{self.folder}; free space (about 2.2 bytes per token with a vocabulary of up to 65,536, else 4.2), "
                "then run the same command again to go on, or remove that folder to give up",
            ) from error


def _is_at(file: Any, path: Path) -> bool:
    """Whether an open file is still what stands at a path."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _refuse_taken(out: Path, replace: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    # Only a token store is ever replaced: --force with a mistyped folder must not delete it.
    if not (out / MANIFEST_NAME).is_file():
        raise FileExistsError(f"{out}: expected nothing or a token store, got something else; choose another --out")
    if not replace:
        raise FileExistsError(
            f"{out}: expected nothing, got a token store; choose another --out, or replace it with `sinkbed prepare "
            "--force`"
        )


def _previous(out: Path) -> Path:
    return out.parent / f".{out.name}.previous"


def sweep(out: Path) -> None:
    """Remove what publishing leaves beside a finished store, and what a kill kept it from removing."""
    out = Path(os.path.realpath(out))
    (out / LOCK_NAME).unlink(missing_ok=True)
    remove(_previous(out))


def remove(path: Path) -> None:
    """Remove a file or folder, which may be absent."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def shard_name(split: str, number: int) -> str:
    """Path of a shard inside its token store."""
    return f"{split}/{number:05d}.arrow"


def manifest_of(
    recipe: dict[str, Any], tokenizer: Tokenizer, shards: dict[str, list[ShardInfo]], left_out: dict[str, int]
) -> Manifest:
    """The manifest of a store of these shards per split."""
    return Manifest(
        recipe=recipe,
        fingerprint=sha256_json(recipe),
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        special_ids=tokenizer.special_ids,
        control_tokens=tokenizer.control_tokens,
        dtype=token_type(tokenizer.vocab_size),
        left_out=dict(sorted(left_out.items())),
        splits={split: SplitInfo.of(infos) for split, infos in shards.items()},
    )
