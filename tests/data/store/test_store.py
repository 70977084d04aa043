"""A token store gives back what was written, is mapped rather than read, and names what is damaged."""

import dataclasses
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sinkbed.data.files import load_json, sealed, write_json
from sinkbed.data.store import token_store as store_module
from sinkbed.data.store.manifest import Manifest
from sinkbed.data.store.token_store import TokenStore
from sinkbed.data.tokenizer import Tokenizer
from tests.support.stores import StoreWriter

MakeStore = Callable[..., TokenStore]
DOCUMENTS = [[2, 3, 4], [], [5], [6, 7, 8, 9, 10], [], [11, 12], [257]]


@settings(max_examples=40, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(2, 257), max_size=9), min_size=1, max_size=20),
    shard_tokens=st.integers(1, 12),
    data=st.data(),
)
def test_any_documents_come_back_across_any_shards(
    make_store: MakeStore, documents: list[list[int]], shard_tokens: int, data: st.DataObject
) -> None:
    store = make_store(documents, shard_tokens=shard_tokens)
    flat = [token for document in documents for token in document]
    assert (store.documents, store.tokens) == (len(documents), len(flat))
    assert [store.slice(i).tolist() for i in range(len(documents))] == documents
    assert store.offsets[:].tolist() == np.cumsum([0, *map(len, documents)]).tolist()
    start = data.draw(st.integers(0, len(flat)))
    stop = data.draw(st.integers(start, len(flat)))
    ranges = data.draw(st.lists(st.tuples(st.integers(0, len(flat)), st.integers(0, len(flat))), max_size=5))
    ranges = [(min(pair), max(pair)) for pair in [(start, stop), *ranges]]
    starts, stops = np.array(ranges).T
    expected = [token for start, stop in ranges for token in flat[start:stop]]
    assert store.gather(starts, stops - starts).tolist() == expected


def test_shards_are_cut_before_they_exceed_their_limit(make_store: MakeStore) -> None:
    store = make_store(DOCUMENTS, shard_tokens=4)
    # The document of five tokens exceeds the limit by itself and has its own shard.
    assert [shard.tokens for shard in store.info.shards] == [4, 5, 3]
    assert [shard.documents for shard in store.info.shards] == [3, 1, 3]


def test_a_slice_is_a_read_only_view_of_the_mapped_file(make_store: MakeStore) -> None:
    store = make_store(DOCUMENTS)
    part = store.slice(3, 1, 4)
    assert part.tolist() == [7, 8, 9]
    assert np.shares_memory(part, store.slice(3)) and not part.flags.writeable
    before = pa.total_allocated_bytes()
    held = [store.slice(i) for i in range(store.documents)]
    assert pa.total_allocated_bytes() == before and len(held) == 7


def test_ranges_outside_the_split_are_refused(make_store: MakeStore) -> None:
    store = make_store(DOCUMENTS)
    for document in (-1, 7):
        with pytest.raises(IndexError, match="documents 0 to 6"):
            store.slice(document)
    for start, stop in ((-1, 2), (3, 2), (0, 13)):
        with pytest.raises(IndexError, match="the split has 12"):
            store.gather(np.array([start]), np.array([stop - start]))


def test_mappings_are_let_go_when_there_are_many_shards(make_store: MakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "_MAPPED_SHARDS", 2)
    store = make_store([[2 + i] for i in range(9)], shard_tokens=1)
    assert len(store.info.shards) == 9
    assert store.gather(np.array([0]), np.array([9])).tolist() == list(range(2, 11))
    assert len(store._mapped) == 2
    assert store.slice(0).tolist() == [2]


def test_shards_are_read_by_datasets_and_pyarrow_as_they_are(make_store: MakeStore, tmp_path: Path) -> None:
    import datasets

    store = make_store(DOCUMENTS, shard_tokens=4)
    files = [str(store.path / shard.file) for shard in store.info.shards]
    loaded: Any = datasets.load_dataset("arrow", data_files=files, split="train", cache_dir=str(tmp_path))
    assert [record["tokens"] for record in loaded] == DOCUMENTS
    assert loaded["bytes"][:] == [3, 0, 1, 5, 0, 2, 1]
    schema = pa.ipc.open_file(files[0]).schema
    assert schema == pa.schema([("tokens", pa.large_list(pa.uint16())), ("bytes", pa.int64())])


def test_shards_are_read_by_polars_as_they_are(make_store: MakeStore) -> None:
    polars = pytest.importorskip("polars", reason="polars is not installed: pip install -e .[dev]")
    store = make_store(DOCUMENTS)
    frame = polars.read_ipc(store.path / store.info.shards[0].file)
    assert frame["tokens"].to_list() == DOCUMENTS and frame["bytes"].to_list() == [3, 0, 1, 5, 0, 2, 1]


def test_a_vocabulary_beyond_sixteen_bits_is_stored_in_thirty_two(tmp_path: Path) -> None:
    definition = json.loads(Tokenizer.train([], vocab_size=258).backend.to_str())
    definition["model"]["vocab"] |= {f"never made {i}": i for i in range(258, 2**16 + 1)}
    tokenizer = Tokenizer.from_str(json.dumps(definition), bos_id=0, eos_id=1)
    with StoreWriter(tmp_path / "wide", tokenizer) as writer:
        writer.add("train", [2, 2**16], 2)
        assert writer.finish(recipe={}).dtype == "uint32"
    assert TokenStore.open(tmp_path / "wide").slice(0).tolist() == [2, 2**16]


def test_a_pickled_store_is_reopened_and_knows_when_it_was_replaced(
    make_store: MakeStore, tokenizer: Tokenizer
) -> None:
    store = make_store(DOCUMENTS)
    pickled = pickle.dumps(store)
    assert len(pickled) < 500, "a worker is sent a path, not the offsets"
    assert pickle.loads(pickled).slice(3).tolist() == DOCUMENTS[3]
    with StoreWriter(store.path, tokenizer, replace=True) as writer:
        writer.add("train", [2, 3], 2)
        writer.finish(recipe={})
    with pytest.raises(ValueError, match="replaced while in use"):
        pickle.loads(pickled)


def test_the_tokenizer_comes_with_the_store(make_store: MakeStore, tokenizer: Tokenizer) -> None:
    found = make_store(DOCUMENTS).tokenizer()
    assert (found.bos_id, found.eos_id, found.sha256) == (tokenizer.bos_id, tokenizer.eos_id, tokenizer.sha256)


def test_a_truncated_shard_is_named_when_opening(make_store: MakeStore) -> None:
    path = make_store(DOCUMENTS, shard_tokens=4).path
    shard = path / "train" / "00001.arrow"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"00001\.arrow is damaged: expected .* bytes on disk, got.*--force"):
        TokenStore.open(path)


def test_a_flipped_bit_is_named_by_verify(make_store: MakeStore) -> None:
    store = make_store(DOCUMENTS, shard_tokens=4)
    store.verify()
    shard = store.path / "train" / "00002.arrow"
    content = bytearray(shard.read_bytes())
    # The record of tokens 11, 12, 257 as little-endian 16-bit words.
    place = content.index(b"\x0b\x00\x0c\x00\x01\x01")
    content[place] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=r"00002\.arrow is damaged: expected sha256 .*--force"):
        TokenStore.open(store.path).verify()


def test_a_flipped_byte_in_a_shard_is_never_a_crash(make_store: MakeStore) -> None:
    """Whatever opens gives as many tokens as it should; `verify` tells the tokens apart."""
    store = make_store(DOCUMENTS)
    path = store.path / store.info.shards[0].file
    content = path.read_bytes()
    refused = 0
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ (0x80 if place % 2 else 1)]) + content[place + 1 :])
        try:
            opened = TokenStore.open(store.path)
            assert sum(len(opened.slice(i)) for i in range(7)) == 12
        except ValueError as error:
            refused += 1
            assert f"shard {path} is damaged: expected" in str(error)
    assert refused > 50


def test_offsets_that_fall_are_named(make_store: MakeStore) -> None:
    store = make_store(DOCUMENTS)
    path = store.path / store.info.shards[0].file
    content = path.read_bytes()
    offsets = np.array([0, 3, 3, 4, 9, 9, 11, 12]).tobytes()
    assert content.count(offsets) == 1
    path.write_bytes(content.replace(offsets, np.array([0, 3, 3, 10, 9, 9, 11, 12]).tobytes()))
    with pytest.raises(ValueError, match=r"00000\.arrow is damaged: expected a readable Arrow file"):
        TokenStore.open(store.path)


def test_a_shard_cut_short_under_a_reader_is_named_and_one_replaced_is_read_on(make_store: MakeStore) -> None:
    """Regression: reading beyond the end of a mapped file kills the process."""
    store = make_store([[2 + i % 200 for i in range(50_000)]])
    shard = store.path / "train" / "00000.arrow"
    everything = np.array([0]), np.array([store.tokens])
    expected = store.gather(*everything).tolist()
    aside = shard.with_name("aside")
    shutil.copy(shard, aside)
    aside.replace(shard)
    assert store.gather(*everything).tolist() == expected, "a mapped file that was replaced stays as it was"
    shard.unlink()
    assert store.slice(0).tolist() == expected
    store = make_store([[2 + i % 200 for i in range(50_000)]])
    os.truncate(store.path / "train" / "00000.arrow", 4096)
    for read in (lambda: store.gather(*everything), lambda: store.slice(0), lambda: store.offsets[:]):
        with pytest.raises(ValueError, match=r"00000\.arrow is damaged: expected 10.* bytes on disk, got 4,096"):
            read()


def test_a_shard_that_is_no_arrow_file_is_named(make_store: MakeStore) -> None:
    path = make_store(DOCUMENTS).path
    shard = path / "train" / "00000.arrow"
    shard.write_bytes(b"x" * shard.stat().st_size)
    with pytest.raises(ValueError, match=r"00000\.arrow is damaged: expected a readable Arrow file"):
        TokenStore.open(path)


def shard(manifest: dict[str, Any]) -> dict[str, Any]:
    return manifest["splits"]["train"]["shards"][0]


def edited(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Edit the manifest of the store at `path`, its checksum too."""
    manifest = load_json(path / "manifest.json")
    edit(manifest)
    write_json(path / "manifest.json", manifest)


def test_a_shard_with_other_counts_is_named(make_store: MakeStore) -> None:
    path = make_store(DOCUMENTS).path

    def edit(manifest: dict[str, Any]) -> None:
        split = manifest["splits"]["train"]
        split["tokens"] += 1
        shard(manifest)["tokens"] += 1

    edited(path, edit)
    with pytest.raises(ValueError, match="expected 7 documents and 13 tokens, got 7 and 12"):
        TokenStore.open(path)


@pytest.mark.parametrize("file", ["/etc/passwd", "train/../../a"])
def test_a_shard_outside_the_store_is_refused(make_store: MakeStore, file: str) -> None:
    path = make_store(DOCUMENTS).path
    edited(path, lambda manifest: shard(manifest).update(file=file))
    with pytest.raises(ValueError, match=f"manifest\\.json: .*got a shard outside the token store, '{file}'.*--force"):
        TokenStore.open(path)


def test_a_manifest_without_a_checksum_is_refused(make_store: MakeStore) -> None:
    path = make_store(DOCUMENTS).path
    write_json(path / "manifest.json", load_json(path / "manifest.json"), seal=False)
    with pytest.raises(ValueError, match=r"got a record without its checksum, such as versions before 0\.3 .*--force"):
        TokenStore.open(path)


def test_one_flipped_bit_anywhere_in_the_manifest_is_noticed(make_store: MakeStore) -> None:
    store = make_store(DOCUMENTS)
    path = store.path / "manifest.json"
    content = path.read_bytes()
    for place in range(len(content)):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match=r"manifest\.json: expected an intact manifest of format 2, got"):
            Manifest.read(store.path)
    edited_numbers = content.replace(b'"bos_id": 0', b'"bos_id": 1').replace(b'"eos_id": 1', b'"eos_id": 0')
    path.write_bytes(edited_numbers)
    with pytest.raises(ValueError, match="whose checksum says"):
        TokenStore.open(store.path)


def test_the_digest_tells_apart_what_a_run_would_see_and_nothing_else(make_store: MakeStore) -> None:
    manifest = make_store(DOCUMENTS).manifest
    assert dataclasses.replace(manifest, recipe={}, fingerprint="", left_out={"empty": 3}).digest == manifest.digest
    swapped = dataclasses.replace(manifest, bos_id=manifest.eos_id, eos_id=manifest.bos_id)
    others = [swapped, make_store([*DOCUMENTS, [3]]).manifest, dataclasses.replace(manifest, tokenizer_sha256="")]
    assert len({other.digest for other in (manifest, *others)}) == 4


def test_a_missing_shard_split_tokenizer_or_store_is_named(make_store: MakeStore, tmp_path: Path) -> None:
    store = make_store(DOCUMENTS)
    with pytest.raises(ValueError, match="expected a split 'validation', got train"):
        TokenStore.open(store.path, "validation")
    with pytest.raises(FileNotFoundError, match=r"no token store at .*sinkbed prepare"):
        TokenStore.open(tmp_path)
    (store.path / "train" / "00000.arrow").unlink()
    with pytest.raises(FileNotFoundError, match=r"00000\.arrow is missing"):
        TokenStore.open(store.path)
    (store.path / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json is missing"):
        TokenStore.open(store.path)


def test_another_tokenizer_in_the_store_is_refused_but_its_layout_is_free(make_store: MakeStore) -> None:
    path = make_store(DOCUMENTS).path
    content = json.loads((path / "tokenizer.json").read_text())
    (path / "tokenizer.json").write_text(json.dumps(content, indent=7))
    TokenStore.open(path)
    Tokenizer.train(["abab abab"] * 3, vocab_size=260).save(path / "tokenizer.json")
    with pytest.raises(ValueError, match="the tokenizer the documents were encoded with"):
        TokenStore.open(path)
    (path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json is damaged"):
        TokenStore.open(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "format 2, got JSONDecodeError"),
        ("{}", "format 2, got KeyError: 'format'"),
        ("[" * 10**5, "format 2, got RecursionError"),
        ('{"format": 99}', "format 2, got format 99"),
        (json.dumps(sealed({"format": 2})), "format 2, got KeyError: 'special_ids'"),
    ],
)
def test_a_manifest_that_is_damaged_or_of_another_format_is_refused(
    make_store: MakeStore, content: str, message: str
) -> None:
    path = make_store(DOCUMENTS).path
    (path / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match=f"{message}.*--force"):
        TokenStore.open(path)


def test_the_manifest_survives_a_round_trip_and_a_move(make_store: MakeStore, tmp_path: Path) -> None:
    store = make_store(DOCUMENTS, shard_tokens=4)
    shutil.copytree(store.path, tmp_path / "moved")
    assert Manifest.read(tmp_path / "moved") == store.manifest
    assert TokenStore.open(tmp_path / "moved").digest == store.digest
