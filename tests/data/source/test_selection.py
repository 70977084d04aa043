"""Selection is a function of the documents: each passes once, in order, into one split and one chunk."""

import random
import unicodedata
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sinkbed.data.source import selection as module
from sinkbed.data.source.selection import Document, Seen, Selection, batches
from tests.support.stores import split_of

TEXTS = st.lists(st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=12), max_size=40)


@settings(max_examples=150, deadline=None)
@given(
    texts=TEXTS,
    validation_share=st.sampled_from([0.0, 0.3, 0.9]),
    min_bytes=st.sampled_from([None, 2, 5]),
    max_bytes=st.sampled_from([None, 5, 9]),
    deduplicate=st.booleans(),
    shard_bytes=st.integers(1, 40),
)
def test_no_document_is_lost_doubled_or_in_both_splits(
    texts: list[str],
    validation_share: float,
    min_bytes: int | None,
    max_bytes: int | None,
    deduplicate: bool,
    shard_bytes: int,
) -> None:
    chosen = Selection(
        texts,
        validation_share=validation_share,
        min_bytes=min_bytes,
        max_bytes=max_bytes,
        deduplicate=deduplicate,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BATCH_DOCUMENTS", 3)
        cut = list(batches(chosen, shard_bytes))
    documents = [document for batch in cut for document in batch.documents]
    expected = [t for t in texts if (min_bytes or 0) <= len(t.encode()) <= (max_bytes or 999)]
    if deduplicate:
        expected = list(dict.fromkeys(expected))
    assert [document.text for document in documents] == expected
    assert all(document.split == split_of(document.text, validation_share) for document in documents)
    assert chosen.left_out.total() == len(texts) - len(documents)
    # Chunks are numbered without gaps, end once, and exceed their size only by a document alone.
    assert [batch.chunk for batch in cut if batch.last] == list(range(cut[-1].chunk + 1 if cut else 0))
    for number in range(cut[-1].chunk + 1 if cut else 0):
        sizes = [document.size for batch in cut if batch.chunk == number for document in batch.documents]
        assert sum(sizes) <= shard_bytes or len(sizes) == 1


def test_what_is_left_out_is_counted_by_reason_and_the_first_of_equals_stays() -> None:
    chosen = Selection(["aa", "b", "cccc", "aa", "dd"], validation_share=0, min_bytes=2, max_bytes=3, deduplicate=True)
    assert [document.text for document in chosen] == ["aa", "dd"]
    assert chosen.left_out == {"too_short": 1, "too_long": 1, "duplicate": 1}


def test_what_is_stored_decides_the_split_and_the_duplicates() -> None:
    """Regression: two forms of one accent were two documents, and could stand in both splits."""
    composed = [f"caf\u00e9 number {i}" for i in range(200)]
    apart = [unicodedata.normalize("NFD", text) for text in composed]
    normalize = partial(unicodedata.normalize, "NFC")
    selected = Selection([*composed, *apart], validation_share=0.5, deduplicate=True, normalize=normalize)
    found = list(selected)
    assert [document.text for document in found] == composed and selected.left_out == {"duplicate": 200}
    assert all(document.split == split_of(document.text, 0.5) for document in found)
    both = list(Selection([*composed, *apart], validation_share=0.5, normalize=normalize))
    assert [d.split for d in both[:200]] == [d.split for d in both[200:]]
    nothing = Selection(["\u200b", "a"], validation_share=0, normalize=lambda text: text.replace("\u200b", ""))
    assert [d.text for d in nothing] == ["a"] and nothing.left_out == {"empty": 1}


def test_hashes_are_told_apart_across_merges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_RECENT", 5)
    seen, plain = Seen(), set()
    generator = random.Random(0)
    for _ in range(2000):
        value = generator.choice((generator.randrange(400), 2**64 - 1 - generator.randrange(200)))
        assert seen.add(value) == (value not in plain)
        plain.add(value)
    assert seen._sorted.size > 300, "the test must reach the sorted part"
    assert len(seen._recent) <= seen._sorted.size // 16 + 6


def test_a_unit_is_the_same_however_it_is_cut_into_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [Document("x" * size, "train", size, size) for size in (3, 3, 3, 9, 1, 1, 7)]
    chunks = []
    for count in (1, 2, 100):
        monkeypatch.setattr(module, "_BATCH_DOCUMENTS", count)
        found: dict[int, list[int]] = {}
        for batch in batches(documents, 8):
            found.setdefault(batch.chunk, []).extend(document.size for document in batch.documents)
        chunks.append(found)
    assert chunks[0] == chunks[1] == chunks[2] == {0: [3, 3], 1: [3], 2: [9], 3: [1, 1], 4: [7]}
