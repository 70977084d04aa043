"""A token store is written whole or not at all, whatever interrupts the writing."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sinkbed.data.prepare import staging
from sinkbed.data.prepare.staging import DiskFullError
from sinkbed.data.store.token_store import TokenStore
from sinkbed.data.tokenizer import Tokenizer
from tests.support import ROOT
from tests.support.stores import StoreWriter


def fill(writer: StoreWriter, documents: int = 6) -> None:
    for i in range(documents):
        writer.add("train", [2 + i] * 3, 3)
        writer.add("validation", [9], 1)


def test_nothing_is_visible_until_the_end(tmp_path: Path, tokenizer: Tokenizer) -> None:
    out = tmp_path / "store"
    with StoreWriter(out, tokenizer, shard_tokens=4) as writer:
        fill(writer)
        assert not out.exists()
        writer.finish(recipe={})
        assert TokenStore.open(out).documents == 6
    assert sorted(path.name for path in out.iterdir()) == ["manifest.json", "tokenizer.json", "train", "validation"]
    assert list(tmp_path.iterdir()) == [out]


def test_an_exception_in_the_middle_leaves_nothing(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(KeyboardInterrupt), StoreWriter(tmp_path / "store", tokenizer, shard_tokens=4) as writer:
        fill(writer)
        assert list(tmp_path.rglob("*.arrow")), "the interruption must come after a shard is written"
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_killed_writer_leaves_no_store_and_the_next_one_clears_up(tmp_path: Path, tokenizer: Tokenizer) -> None:
    script = """
import os, signal, sys
from sinkbed.data.tokenizer import Tokenizer
from tests.support.stores import StoreWriter
with StoreWriter(sys.argv[1], Tokenizer.train([], vocab_size=258), shard_tokens=4) as writer:
    for i in range(6):
        writer.add("stale", [2 + i] * 3, 3)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    out = tmp_path / "store"
    killed = subprocess.run([sys.executable, "-c", script, str(out)], cwd=ROOT, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert list(tmp_path.rglob("stale/*.arrow")), "the kill must come after a shard is written"
    assert not out.exists()
    with StoreWriter(out, tokenizer) as writer:
        fill(writer)
        writer.finish(recipe={})
    assert list(tmp_path.iterdir()) == [out]
    assert not (out / "stale").exists()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_at_any_moment_gives_one_message_and_leaves_nothing(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """fsync is where a file system with delayed allocation reports that it is full."""
    real, calls, fails_at = os.fsync, 0, 0

    def fsync(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == fails_at:
            raise OSError(code, os.strerror(code))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    failures = 0
    while True:
        calls, fails_at = 0, fails_at + 1
        out = tmp_path / "store"
        try:
            with StoreWriter(out, tokenizer, shard_tokens=4) as writer:
                fill(writer)
                writer.finish(recipe={})
        except DiskFullError as error:
            failures += 1
            assert error.errno == code
            assert str(error).count("the disk is full") == 1 and "free space" in str(error)
            assert list(tmp_path.iterdir()) == []
        except OSError:
            # The last flush comes after the rename: the store is complete, and stays.
            assert TokenStore.open(out).documents == 6
            break
    # Each of 8 shards, tokenizer and manifest with its folder, and the folder of the store once more.
    assert failures == 21


def test_a_store_is_replaced_only_when_told_and_never_by_a_failure(tmp_path: Path, tokenizer: Tokenizer) -> None:
    out = tmp_path / "store"
    with StoreWriter(out, tokenizer) as writer:
        fill(writer, documents=1)
        writer.finish(recipe={})
    with (
        pytest.raises(FileExistsError, match=r"expected nothing, got a token store.*--force"),
        StoreWriter(out, tokenizer),
    ):
        pass
    with pytest.raises(RuntimeError), StoreWriter(out, tokenizer, replace=True) as writer:
        fill(writer)
        raise RuntimeError
    assert TokenStore.open(out).documents == 1
    with StoreWriter(out, tokenizer, replace=True) as writer:
        fill(writer)
        writer.finish(recipe={})
    assert TokenStore.open(out).documents == 6
    assert list(tmp_path.iterdir()) == [out]


def test_a_folder_that_is_no_store_is_never_replaced(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="got something else"), StoreWriter(tmp_path, tokenizer, replace=True):
        pass
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_two_writers_of_one_store_do_not_mix(tmp_path: Path, tokenizer: Tokenizer) -> None:
    out = tmp_path / "store"
    with StoreWriter(out, tokenizer) as first:
        fill(first)
        with pytest.raises(BlockingIOError, match="another process"), StoreWriter(out, tokenizer):
            pass
        first.finish(recipe={})
    assert TokenStore.open(out).documents == 6


def test_a_file_system_without_locks_is_written_to(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(staging.fcntl, "flock", no_locks)
    with StoreWriter(tmp_path / "store", tokenizer) as writer:
        fill(writer)
        writer.finish(recipe={})
    assert TokenStore.open(tmp_path / "store").documents == 6


def test_the_same_documents_give_the_same_bytes(tmp_path: Path, tokenizer: Tokenizer) -> None:
    manifests = []
    for name in ("one", "two"):
        with StoreWriter(tmp_path / name, tokenizer, shard_tokens=7) as writer:
            fill(writer)
            manifests.append(writer.finish(recipe={"a": 1}))
    assert manifests[0] == manifests[1]


def test_a_store_goes_where_a_link_leads(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "disk" / "big").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "big")
    for replace in (False, True):
        with StoreWriter(tmp_path / "link", tokenizer, replace=replace) as writer:
            fill(writer)
            writer.finish(recipe={})
        assert TokenStore.open(tmp_path / "disk" / "big").documents == 6
        assert (tmp_path / "link").is_symlink() and [path.name for path in (tmp_path / "disk").iterdir()] == ["big"]
