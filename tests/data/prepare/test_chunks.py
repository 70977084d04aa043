"""A preparation that was stopped goes on with what it finished, to the bytes of one that was not."""

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from datasets import config as datasets_config

from sinkbed.data.prepare import recipe
from sinkbed.data.prepare.chunks import Chunks
from sinkbed.data.prepare.config import PrepareConfig, TokenizerConfig
from sinkbed.data.prepare.prepare import prepare
from sinkbed.data.prepare.staging import DiskFullError
from sinkbed.data.source.config import Source
from sinkbed.data.store.token_store import TokenStore
from sinkbed.data.tokenizer import Tokenizer
from tests.support import ROOT


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets_config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture
def config(tmp_path: Path) -> PrepareConfig:
    lines = [json.dumps({"text": f"document {i} of words {i * i}"}) for i in range(200)]
    (tmp_path / "corpus.jsonl").write_text("\n".join([*lines, lines[7], "{", json.dumps({"text": ""})]))
    return PrepareConfig(
        source=Source(kind="jsonl", files=str(tmp_path / "corpus.jsonl"), streaming=True, shuffle_buffer=50),
        tokenizer=TokenizerConfig(vocab_size=270, train_documents=50),
        validation_share=0.2,
        deduplicate=True,
        on_error="skip",
        shard_bytes=1200,
        out=str(tmp_path / "stores" / "corpus"),
    )


def contents(folder: str) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def elsewhere(config: PrepareConfig, name: str) -> PrepareConfig:
    return dataclasses.replace(config, out=str(Path(config.out).parent / name))


def partial_of(config: PrepareConfig) -> Path:
    return Path(config.out).parent / f".{Path(config.out).name}.partial"


class Stop(BaseException):
    """Stands for the end of the process."""


@pytest.fixture
def stopping(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Every flush and rename counts; the one numbered `at` does not happen, nor does what follows it."""
    state = {"count": 0, "at": -1}

    def counted(real: Any) -> Any:
        def call(*arguments: Any) -> Any:
            state["count"] += 1
            if state["count"] == state["at"]:
                raise Stop
            return real(*arguments)

        return call

    monkeypatch.setattr(os, "fsync", counted(lambda _: None))
    for name in ("replace", "rename"):
        monkeypatch.setattr(os, name, counted(getattr(os, name)))
    return state


def test_a_run_stopped_at_any_write_goes_on_to_the_same_bytes(config: PrepareConfig, stopping: dict[str, int]) -> None:
    whole = elsewhere(config, "whole")
    manifest = prepare(whole, progress=False, workers=1)
    assert len(manifest.splits["train"].shards) > 3 and manifest.left_out == {
        "duplicate": 1,
        "empty": 1,
        "malformed": 1,
    }
    writes = stopping["count"]
    assert writes > 40
    for at in range(1, writes + 1, 2):
        stopped = elsewhere(config, f"stopped{at}")
        stopping.update(count=0, at=at)
        try:
            prepare(stopped, progress=False, workers=1)
        except Stop:
            # Only the last flush comes after the store has its name.
            assert at == writes or not (Path(stopped.out) / "manifest.json").exists()
        stopping.update(count=0, at=-1)
        assert prepare(stopped, progress=False, workers=1) == manifest
        assert contents(stopped.out) == contents(whole.out), at
        assert not partial_of(stopped).exists()


def test_every_second_write_being_the_last_still_comes_to_an_end(
    config: PrepareConfig, stopping: dict[str, int]
) -> None:
    whole = elsewhere(config, "whole")
    prepare(whole, progress=False, workers=1)
    stops = 0
    while True:
        stopping.update(count=0, at=9)  # a chunk takes at most eight
        try:
            prepare(config, progress=False, workers=1)
            break
        except Stop:
            stops += 1
            assert stops < 60
    assert stops > 4 and contents(config.out) == contents(whole.out)


@pytest.mark.slow
def test_a_run_killed_again_and_again_goes_on_to_the_same_bytes_by_any_number_of_processes(
    config: PrepareConfig,
) -> None:
    """Real processes and SIGKILL: before the first shard, while shards are written, before the last renaming."""
    script = """
import json, os, signal, sys
from sinkbed.data.prepare.config import PrepareConfig, TokenizerConfig
from sinkbed.data.prepare.prepare import prepare
from sinkbed.data.source.config import Source
from sinkbed.data.source import selection
selection._BATCH_DOCUMENTS = 8
fields, left, workers = json.loads(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
fields["source"]["files"] = tuple([fields["source"]["files"]])
fields |= {"source": Source(**fields["source"]), "tokenizer": TokenizerConfig(**fields["tokenizer"])}
real = os.fsync
def fsync(descriptor):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    real(descriptor)
os.fsync = fsync
prepare(PrepareConfig(**fields), progress=False, workers=workers)
"""
    fields = json.dumps(dataclasses.asdict(config))
    finished = []
    for left, workers in ((2, 1), (4, 2), (10, 2), (7, 1), (0, 2)):
        command = [sys.executable, "-c", script, fields, str(left), str(workers)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
        assert done.returncode == (-signal.SIGKILL if left else 0), done.stderr
        finished.append(len(list((partial_of(config) / "chunks").glob("*.json"))) if left else -1)
        assert (not left) == Path(config.out).exists()
    assert finished[0] == finished[1] == 0 < finished[2] < finished[3]
    whole = elsewhere(config, "whole")
    prepare(whole, progress=False, workers=1)
    assert contents(config.out) == contents(whole.out)


def stop_after(config: PrepareConfig, chunks: int, force: bool = False) -> None:
    """Leave a partial store with so many finished chunks."""
    real = Chunks.finish

    def finish(self: Any, number: int, gathered: Any) -> None:
        if number == chunks:
            raise Stop
        real(self, number, gathered)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Chunks, "finish", finish)
        with pytest.raises(Stop):
            prepare(config, progress=False, workers=1, force=force)


def test_finished_units_are_not_encoded_again_nor_the_tokenizer_trained(
    config: PrepareConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after(config, 3)
    shards = {path: path.stat().st_mtime_ns for path in partial_of(config).rglob("*.arrow")}
    assert len(shards) >= 3
    monkeypatch.setattr(Tokenizer, "train", lambda *_, **__: pytest.fail("trained again"))
    real, encoded = Tokenizer.encode_batch, []
    monkeypatch.setattr(Tokenizer, "encode_batch", lambda self, texts: encoded.extend(texts) or real(self, texts))
    manifest = prepare(config, progress=False, workers=1)
    for path, written in shards.items():
        assert (Path(config.out) / path.relative_to(partial_of(config))).stat().st_mtime_ns == written
    made = [shard for split in manifest.splits.values() for shard in split.shards]
    finished = {str(path.relative_to(partial_of(config))) for path in shards}
    assert len(encoded) == sum(shard.documents for shard in made if shard.file not in finished)


def test_a_finished_shard_that_was_damaged_since_is_made_again(config: PrepareConfig) -> None:
    whole = elsewhere(config, "whole")
    prepare(whole, progress=False, workers=1)
    stop_after(config, 3)
    shard = partial_of(config) / "train" / "00001.arrow"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    prepare(config, progress=False, workers=1)
    assert contents(config.out) == contents(whole.out)


def test_an_unfinished_store_of_another_config_is_refused_with_what_differs(config: PrepareConfig) -> None:
    stop_after(config, 2)
    other = dataclasses.replace(config, min_bytes=5)
    with pytest.raises(ValueError, match=r"unfinished token store of another config \(min_bytes: expected 5, got None"):
        prepare(other, progress=False, workers=1)
    assert len(list((partial_of(config) / "chunks").glob("*.json"))) == 2, "a refusal loses nothing"
    assert prepare(other, progress=False, workers=1, force=True).recipe["min_bytes"] == 5


def test_a_forced_replacement_that_was_stopped_is_gone_on_with(config: PrepareConfig) -> None:
    prepare(dataclasses.replace(config, min_bytes=3), progress=False, workers=1)
    stop_after(config, 3, force=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tokenizer, "train", lambda *_, **__: pytest.fail("started over"))
        prepare(config, progress=False, workers=1, force=True)
    assert TokenStore.open(config.out).manifest.recipe["min_bytes"] is None


def test_a_source_that_changed_in_between_is_noticed(config: PrepareConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "source_identity", lambda _: {"name": "a hub data set without a revision"})
    stop_after(config, 3)
    path = Path(config.source.patterns[0])
    lines = path.read_text().splitlines()
    for changed, message in (
        ([lines[0].replace("0", "9"), *lines[1:]], "no longer gives the documents of chunk"),
        (lines[:20], "gives fewer documents|no longer gives the documents"),
    ):
        path.write_text("\n".join(changed))
        with pytest.raises(ValueError, match=message):
            prepare(config, progress=False, workers=1)
        assert len(list((partial_of(config) / "chunks").glob("*.json"))) == 3
    path.write_text("\n".join(lines))
    prepare(config, progress=False, workers=1)


def test_a_full_disk_keeps_the_finished_shards_and_says_how_to_go_on(
    config: PrepareConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = elsewhere(config, "whole")
    prepare(whole, progress=False, workers=1)
    calls = 0

    def full(_: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(
            DiskFullError, match=r"finished are kept in .*\.partial; free space.*the same command again"
        ):
            prepare(config, progress=False, workers=1)
    assert list((partial_of(config) / "chunks").glob("*.json")) and not list(partial_of(config).rglob(".*.partial"))
    prepare(config, progress=False, workers=1)
    assert contents(config.out) == contents(whole.out)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"shards": {"train": {}}, "digest": ""}'])
def test_a_unit_whose_record_is_damaged_is_made_again(config: PrepareConfig, content: str) -> None:
    expected = contents_of_a_whole_run(config)
    stop_after(config, 3)
    (partial_of(config) / "chunks" / "00001.json").write_text(content)
    prepare(config, progress=False, workers=1)
    assert contents(config.out) == expected


def test_a_damaged_recipe_is_named_with_the_remedy(config: PrepareConfig) -> None:
    stop_after(config, 2)
    (partial_of(config) / "recipe.json").write_text("{")
    with pytest.raises(ValueError, match=r"recipe\.json: expected .*damaged file.*remove .* to start over"):
        prepare(config, progress=False, workers=1)


@pytest.mark.parametrize("moment", ["between the renames", "before the sweep"])
def test_a_forced_replacement_stopped_while_publishing_goes_on(
    config: PrepareConfig, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = contents_of_a_whole_run(config)
    prepare(dataclasses.replace(config, validation_share=0.5), progress=False, workers=1)

    class Stop(BaseException):
        pass

    def stop(*_: Any) -> None:
        raise Stop

    with monkeypatch.context() as patch:
        if moment == "before the sweep":
            patch.setattr("sinkbed.data.prepare.staging.sweep", stop)
        else:
            rename, calls = os.rename, []

            def second(*arguments: Any) -> None:
                calls.append(arguments)
                if len(calls) == 2:
                    raise Stop
                rename(*arguments)

            patch.setattr(os, "rename", second)
        with pytest.raises(Stop):
            prepare(config, force=True, progress=False, workers=1)
    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "train", lambda *_, **__: pytest.fail("started over"))
        prepare(config, force=moment == "between the renames", progress=False, workers=1)
    assert contents(config.out) == expected
    assert [path.name for path in Path(config.out).parent.iterdir() if path.name.startswith(".corpus")] == []


def contents_of_a_whole_run(config: PrepareConfig) -> dict[str, bytes]:
    whole = elsewhere(config, "whole")
    prepare(whole, progress=False, workers=1)
    return contents(whole.out)
