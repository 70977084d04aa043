"""Rows equal those of the plain-Python oracle, for every axis of a strategy."""

import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sinkbed.data.order import permute
from sinkbed.data.pack.assemble import random_tokens
from sinkbed.data.pack.audit import audit
from sinkbed.data.pack.batches import Rows
from sinkbed.data.pack.methods import best_fit as best_fit_module
from sinkbed.data.pack.strategy import Strategy
from sinkbed.data.store.token_store import TokenStore
from tests.support.oracle import BOS, EOS, OracleRow, fields_of, laid_out, marked, planned_row, rows_of, stream_of

MakeStore = Callable[..., TokenStore]

# The boundaries that can go wrong: empty documents at both ends and in a run, documents of one token,
# one that fills rows exactly, one that spans several rows; enough of them that some start at a row.
LENGTHS = (0, 3, 0, 0, 1, 8, 1, 1, 23, 5, 16, 0, 2, 7, 4, *((5 * i * i) % 13 for i in range(40)), 0)


def documents_of(lengths: tuple[int, ...] | list[int]) -> list[list[int]]:
    """Documents of tokens that tell (almost) every place in the store from its neighbours."""
    numbers = itertools.count()
    return [[2 + (7 * next(numbers)) % 256 for _ in range(length)] for length in lengths]


def rows_in_stream_order(rows: Rows) -> dict[int, dict[str, list[Any]]]:
    """Epoch 0 of `rows` by place in the stream."""
    batch = rows.__getitems__(list(range(len(rows))))
    slots = permute(np.arange(len(rows)), len(rows), seed=rows.seed, epoch=0)
    return {
        int(slot): {name: getattr(batch, name)[i].tolist() for name in batch._fields} for i, slot in enumerate(slots)
    }


def first_id(strategy: Strategy) -> int | None:
    first = strategy.first_token
    return None if first == "none" else BOS if first == "bos" else int(first)


STRATEGIES = [
    Strategy(first_token=first, document_start=start, document_end=end, mask=mask, positions=positions)
    for first in ("none", "bos", 77)
    for start in ("none", "bos")
    for end in ("none", "eos")
    for mask in ("causal", "intra_document")
    for positions in ("row", "document")
] + [
    Strategy(prefix_lm=3),
    Strategy(prefix_lm=2, first_token="bos", mask="intra_document"),
    Strategy(shared_prefix=1, mask="intra_document", first_token="bos"),
    Strategy(window=2, document_start="eos", document_end="bos"),
]


@pytest.fixture(scope="module")
def store_of_all_lengths(make_store: MakeStore) -> TokenStore:
    """Shards of 10 tokens, so that rows and documents meet shard boundaries too."""
    store = make_store(documents_of(LENGTHS), shard_tokens=10)
    assert len(store.info.shards) > 3
    return store


@pytest.mark.parametrize("length", [6, 8, 9])
@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda strategy: "-".join(map(str, _short(strategy))))
def test_every_field_of_every_row_equals_the_oracle(
    store_of_all_lengths: TokenStore, strategy: Strategy, length: int
) -> None:
    documents, store = documents_of(LENGTHS), store_of_all_lengths
    expected = rows_of(documents, strategy, length, first_id(strategy))
    assert_boundaries_occur(expected)
    found = rows_in_stream_order(Rows(store, strategy, length, seed=5))
    assert len(found) == len(expected)
    for place, row in enumerate(expected):
        assert found[place] == fields_of(row), f"row {place}"


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=30),
    strategy=st.builds(
        Strategy,
        first_token=st.sampled_from(["none", "bos", 9]),
        document_start=st.sampled_from(["none", "bos", "eos"]),
        document_end=st.sampled_from(["none", "bos", "eos"]),
        mask=st.sampled_from(["causal", "intra_document"]),
        positions=st.sampled_from(["row", "document"]),
        prefix_lm=st.sampled_from([0, 2, 3]),
    ),
    length=st.integers(4, 20),
)
def test_any_layout_of_documents_equals_the_oracle(
    make_store: MakeStore, lengths: list[int], strategy: Strategy, length: int
) -> None:
    documents = documents_of(lengths)
    expected = rows_of(documents, strategy, length, first_id(strategy))
    store = make_store(documents, shard_tokens=30)
    if not expected:
        with pytest.raises(ValueError, match="not one complete row"):
            Rows(store, strategy, length)
        return
    found = rows_in_stream_order(Rows(store, strategy, length))
    assert [found[place] for place in range(len(found))] == [fields_of(row) for row in expected]


@pytest.mark.parametrize("first", ["none", "bos", "random"])
@pytest.mark.parametrize("length", [5, 8])
def test_an_epoch_reads_every_stream_token_once_and_counts_it_once(
    make_store: MakeStore, first: Any, length: int
) -> None:
    """Each token of the complete rows is input once, and a counted target once: none twice, none lost."""
    documents = documents_of(LENGTHS)
    strategy = Strategy(first_token=first, document_start="bos")
    rows = Rows(make_store(documents), strategy, length)
    found = rows_in_stream_order(rows)
    stream = [token for token, _ in stream_of(documents, strategy)]
    skip = int(first != "none")
    read = [token for place in sorted(found) for token in found[place]["tokens"][skip:]]
    assert read == stream[: len(read)]
    assert 0 < len(stream) - len(read) <= length
    counted = [
        token
        for place in sorted(found)
        for token, counts in zip(found[place]["targets"], found[place]["loss_mask"], strict=True)
        if counts
    ]
    # Without a first token nothing predicts the very first token of the stream, and the last row
    # reaches one further.
    begin = 1 - skip
    assert counted == stream[begin : begin + len(read)]


def test_the_rows_drawn_in_the_readme_are_those_made(make_store: MakeStore) -> None:
    a, b, c, d, e, f, g = range(10, 17)
    store = make_store([[a, b, c], [d, e, f, g], [20] * 3])

    def row(**axes: Any) -> dict[str, list[Any]]:
        return rows_in_stream_order(Rows(store, Strategy(**axes), 8))[0]

    assert row()["tokens"] == [a, b, c, EOS, d, e, f, g]
    assert row(document_start="bos", document_end="none")["tokens"] == [BOS, a, b, c, BOS, d, e, f]
    assert row(first_token=["none", "bos"])["tokens"] == [a, BOS, b, c, EOS, d, e, f]
    assert row(first_token=["none", "bos"])["doc_start"] == [0, 0, 0, 0, 0, 5, 5, 5]
    found = rows_in_stream_order(Rows(store, Strategy(packing="best_fit"), 8))
    assert found[0]["tokens"] == [d, e, f, g, EOS, EOS, EOS, EOS] and found[0]["doc_start"] == [0] * 5 + [5] * 3
    assert found[1]["tokens"] == [a, b, c, EOS, 20, 20, 20, EOS]
    assert row(packing="pad")["doc_end"] == [4] * 4 + [8] * 4
    drawn = row(first_token="bos")
    assert drawn["tokens"] == [BOS, a, b, c, EOS, d, e, f]
    assert drawn["targets"] == [a, b, c, EOS, d, e, f, g]
    assert drawn["doc_start"] == [0, 0, 0, 0, 0, 5, 5, 5]
    assert drawn["doc_end"] == [5, 5, 5, 5, 5, 8, 8, 8]
    assert row(first_token="bos", positions="document")["positions"] == [0, 1, 2, 3, 4, 0, 1, 2]
    for axes, counted in (
        ({}, "xxxxxxx-"),
        ({"mask": "intra_document"}, "xxxx-xx-"),
        ({"prefix_lm": 4}, "---xxxx-"),
    ):
        found = row(first_token="bos", **axes)["loss_mask"]
        assert "".join("x" if counts else "-" for counts in found) == counted


def test_the_first_token_of_a_document_starts_it(make_store: MakeStore) -> None:
    """Regression guard for the left-sided search, which gives a document's first token to the one before."""
    documents = documents_of([3, 4, 5])
    found = rows_in_stream_order(Rows(make_store(documents), Strategy(document_end="none"), 11))[0]
    assert found["doc_start"] == [0, 0, 0, 3, 3, 3, 3, 7, 7, 7, 7]
    assert found["doc_end"] == [3, 3, 3, 7, 7, 7, 7, 11, 11, 11, 11]


def test_markers_belong_to_their_own_document(make_store: MakeStore) -> None:
    documents = [[10, 11], [], [12, 13, 14]]
    strategy = Strategy(document_start="bos", document_end="eos", positions="document", mask="intra_document")
    found = rows_in_stream_order(Rows(make_store(documents), strategy, 10))[0]
    assert found["tokens"] == [BOS, 10, 11, EOS, BOS, EOS, BOS, 12, 13, 14]
    assert found["doc_start"] == [0, 0, 0, 0, 4, 4, 6, 6, 6, 6]
    assert found["positions"] == [0, 1, 2, 3, 0, 1, 0, 1, 2, 3]
    assert found["targets"] == [10, 11, EOS, BOS, EOS, BOS, 12, 13, 14, EOS]
    # The last token of a document does not answer for the next one.
    assert found["loss_mask"] == [True, True, True, False, True, False, True, True, True, True]


def test_the_first_token_joins_the_document_at_the_start_of_its_row(make_store: MakeStore) -> None:
    documents = [[10, 11, 12, 13], [14, 15, 16, 17, 18]]
    strategy = Strategy(first_token="bos", document_end="none", positions="document")
    found = rows_in_stream_order(Rows(make_store(documents), strategy, 4))
    # Row 1 opens in the middle of document 0; its document 1 starts at row position 2.
    assert found[1]["tokens"] == [BOS, 13, 14, 15]
    assert found[1]["doc_start"] == [0, 0, 2, 2]
    assert found[1]["doc_end"] == [2, 2, 4, 4]
    assert found[1]["positions"] == [0, 1, 0, 1]
    assert found[1]["targets"] == [13, 14, 15, 16]
    assert found[1]["loss_mask"] == [True, True, True, False]
    # A document that starts right at the row shares its start with the first token.
    aligned = rows_in_stream_order(Rows(make_store([[10, 11, 12], [13, 14, 15, 16]]), strategy, 4))
    assert aligned[1]["tokens"] == [BOS, 13, 14, 15]
    assert aligned[1]["doc_start"] == [0, 0, 0, 0]


def test_random_first_tokens_are_uniform_over_text_ids_and_never_special() -> None:
    drawn = random_tokens(np.arange(200_000), seed=1, epoch=0, vocab_size=20, special_ids=(0, 7, 19))
    counts = np.bincount(drawn, minlength=20)
    assert counts[[0, 7, 19]].sum() == 0
    ordinary = np.delete(counts, [0, 7, 19])
    expected = 200_000 / 17
    # Chi-square with 16 degrees of freedom: mean 16, deviation 5.7.
    assert ((ordinary - expected) ** 2 / expected).sum() < 16 + 6 * 5.7


def test_a_random_first_token_depends_on_seed_epoch_and_row_only(make_store: MakeStore) -> None:
    store = make_store(documents_of([500]))
    strategy = Strategy(first_token="random")

    def drawn(seed: int, epoch: int) -> list[int]:
        rows = Rows(store, strategy, 5, seed=seed)
        numbers = range(epoch * len(rows), (epoch + 1) * len(rows))
        # One by one and in reverse: what else is read makes no difference.
        return [int(rows[number].tokens[0, 0]) for number in reversed(numbers)]

    base = drawn(0, 0)
    assert base == drawn(0, 0)
    assert len(set(base)) > 50
    for other in (drawn(1, 0), drawn(0, 1)):
        assert Counter(base) != Counter(other)


def assert_boundaries_occur(rows: list[OracleRow]) -> None:
    """Guard against a vacuous test: the layout must put boundaries in every place that can go wrong."""
    assert len(rows) > 5
    assert any(len(set(row.documents)) > 2 for row in rows), "no row holds three documents"
    assert any(len(set(row.documents)) == 1 for row in rows), "no row lies inside one document"
    openings = [row.documents[0] != before.documents[-1] for before, row in itertools.pairwise(rows)]
    assert any(openings) and not all(openings), "rows begin both at and inside documents"


def _short(strategy: Strategy) -> tuple[Any, ...]:
    return (
        strategy.first_token,
        strategy.document_start,
        strategy.document_end,
        strategy.mask,
        strategy.positions,
        strategy.prefix_lm,
    )


def whole(packing: dict[str, Any], **axes: Any) -> Strategy:
    """A strategy, without what has no effect where a row holds one document."""
    if packing.get("packing") == "pad":
        axes |= {"mask": "causal", "positions": "row"}
    return Strategy(**packing, **axes)


PLANNED: list[dict[str, Any]] = [
    {"packing": "best_fit"},
    {"packing": "best_fit", "overflow": "truncate"},
    {"packing": "best_fit", "fill": "crop"},
    {"packing": "best_fit", "fill": "crop", "overflow": "truncate"},
    {"packing": "best_fit", "fill": "repeat"},
    {"packing": "best_fit", "fill": "repeat", "overflow": "truncate"},
    {"packing": "pad"},
    {"packing": "pad", "overflow": "truncate"},
    {"packing": "grouped"},
    {"packing": "grouped", "overflow": "truncate"},
]
FIRST: list[Any] = ["none", "bos", 77, ["none", "bos"], ["bos", "none", 77], [77, "bos"]]


def leading_ids(strategy: Strategy) -> list[int | None]:
    return [None if what == "none" else BOS if what == "bos" else int(what) for what in strategy.first_tokens]


def fields_that_count(row: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """A target that does not count may be anything."""
    targets = [t if counts else -1 for t, counts in zip(row["targets"], row["loss_mask"], strict=True)]
    return {**row, "targets": targets}


def assert_planned_rows_equal_the_oracle(rows: Rows, documents: list[list[int]]) -> list[OracleRow]:
    strategy, length = rows.strategy, rows.context_length
    laid = laid_out(documents, strategy, length - len(strategy.placed), best_fit_module._WAITING)
    expected = [planned_row(documents, strategy, length, row, leading_ids(strategy)) for row in laid]
    found = rows_in_stream_order(rows)
    assert len(found) == len(expected)
    for place, row in enumerate(expected):
        assert fields_that_count(found[place]) == fields_that_count(fields_of(row)), f"row {place}: {laid[place]}"
    return expected


@pytest.mark.parametrize("packing", PLANNED, ids=lambda axes: "-".join(axes.values()))
@pytest.mark.parametrize("first", FIRST, ids=str)
@pytest.mark.parametrize("mask", ["causal", "intra_document"])
def test_every_field_of_rows_of_whole_documents_equals_the_oracle(
    store_of_all_lengths: TokenStore,
    packing: dict[str, Any],
    first: Any,
    mask: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(best_fit_module, "_WAITING", 4)
    documents = documents_of(LENGTHS)
    start: Any = "bos" if first == "none" else "none"
    strategy = whole(packing, first_token=first, mask=mask, document_start=start, positions="document")
    rows = Rows(store_of_all_lengths, strategy, 9, seed=3)
    expected = assert_planned_rows_equal_the_oracle(rows, documents)
    # The boundaries in question occur: a long document, several documents in a row, one that fills it, padding.
    room = 9 - len(strategy.placed)
    laid = laid_out(documents, strategy, room, 4)
    sizes = [sum(piece.end - piece.begin for piece in row) for row in laid]
    assert any(len(marked(document, strategy)) > 2 * room for document in documents)
    assert any(len(marked(document, strategy)) == room for document in documents)
    assert (max(map(len, laid)) > 1) == (strategy.packing != "pad")
    assert max(sizes) == room and (min(sizes) < room or strategy.fill != "pad")
    assert any(piece.begin for row in laid for piece in row) == (strategy.overflow == "split")
    assert any(row.loss_mask[-1] for row in expected) == (strategy.overflow == "split")


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=20),
    packing=st.sampled_from(PLANNED),
    first=st.sampled_from(FIRST),
    start=st.sampled_from(["none", "bos", 5]),
    end=st.sampled_from(["none", "eos"]),
    mask=st.sampled_from(["causal", "intra_document"]),
    positions=st.sampled_from(["row", "document"]),
    prefix_lm=st.sampled_from([0, 3]),
    length=st.integers(4, 12),
)
def test_any_layout_of_whole_documents_equals_the_oracle(
    make_store: MakeStore, lengths: list[int], packing: dict[str, Any], length: int, **axes: Any
) -> None:
    axes["first_token"], axes["document_start"] = axes.pop("first"), axes.pop("start")
    axes["document_end"] = axes.pop("end")
    strategy = whole(packing, **axes)
    documents = documents_of(lengths)
    assume(any(marked(document, strategy) for document in documents))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(best_fit_module, "_WAITING", 3)
        assert_planned_rows_equal_the_oracle(Rows(make_store(documents, shard_tokens=30), strategy, length), documents)


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=20),
    packing=st.sampled_from([{}, *PLANNED]),
    first=st.sampled_from(FIRST),
    share=st.sampled_from([0.5, 1.0]),
    mask=st.sampled_from(["causal", "intra_document"]),
    length=st.integers(4, 12),
    seed=st.integers(0, 3),
)
def test_no_token_is_read_twice_or_lost_and_none_is_counted_twice(
    make_store: MakeStore,
    lengths: list[int],
    packing: dict[str, Any],
    first: Any,
    share: float,
    mask: Any,
    length: int,
    seed: int,
) -> None:
    """But for what a strategy says it repeats, crops or drops, and the audit says how much that is."""
    if share < 1 and first == "none":
        return
    strategy = whole(packing, first_token=first, first_token_share=share, mask=mask, document_end="none")
    # Each token tells its place in the corpus.
    size = sum(lengths)
    assume(0 < size <= 178)
    tokens = iter(range(80, 80 + size))
    documents = [[next(tokens) for _ in range(n)] for n in lengths]
    store = make_store(documents, shard_tokens=30)
    try:
        rows = Rows(store, strategy, length, seed)
    except ValueError as error:
        assert "not one complete row" in str(error) and not packing
        return
    found = rows_in_stream_order(rows).values()
    read = Counter(token for row in found for token in row["tokens"] if token >= 80)
    counted = Counter(
        token for row in found for token, counts in zip(row["targets"], row["loss_mask"], strict=True) if counts
    )
    audited = audit(rows)
    assert sum(read.values()) - len(read) == round(audited["share_of_tokens_repeated"] * sum(read.values()))
    assert size - len(read) == audited["tokens_cropped"]
    assert sum(counted.values()) == audited["targets_per_epoch"]
    repeats = strategy.fill == "repeat" or (share < 1 and not packing)
    assert repeats or max(read.values()) == 1
    if strategy.overflow == "split" and strategy.fill != "crop":
        assert size - len(read) <= (0 if packing else length)
    # What follows its predecessor in its document is counted once; the first token of a document at most once.
    heads = {document[0] for document in documents if document}
    assert not counted or (max(counted.values()) == 1) or strategy.fill == "repeat"
    if packing and strategy.overflow == "split" and strategy.fill == "pad":
        assert set(range(80, 80 + size)) - heads <= set(counted)


def test_a_share_of_rows_has_the_first_token_and_the_others_the_text_before(make_store: MakeStore) -> None:
    store = make_store(documents_of([40] * 50))
    strategy = Strategy(first_token="bos", first_token_share=0.3, document_end="none")
    rows, whole = Rows(store, strategy, 8), Rows(store, Strategy(first_token="bos", document_end="none"), 8)
    found, fixed = rows_in_stream_order(rows), rows_in_stream_order(whole)
    stream = [token for token, _ in stream_of(documents_of([40] * 50), strategy)]
    with_first = [place for place, row in found.items() if row["tokens"][0] == BOS]
    assert 0.2 < len(with_first) / len(found) < 0.4
    for place, row in found.items():
        if place in with_first:
            assert row == fixed[place]
        elif place:
            assert row["tokens"] == [stream[place * 7 - 1], *fixed[place]["tokens"][1:]]
            # The same targets, whatever stands first.
            assert (row["targets"], row["loss_mask"]) == (fixed[place]["targets"], fixed[place]["loss_mask"])
    again = rows.__getitems__(list(range(len(rows), 2 * len(rows)))).tokens[:, 0] == BOS
    assert again.sum() not in (0, len(rows)), "drawn anew in each epoch"
    slots = permute(np.arange(len(rows)), len(rows), seed=0, epoch=1)
    assert {int(slot) for slot, has in zip(slots, again.tolist(), strict=True) if has} != set(with_first)


def test_a_row_of_whole_documents_without_its_first_token_moves_up(make_store: MakeStore) -> None:
    store = make_store(documents_of([5] * 60))
    strategy = Strategy(packing="pad", first_token="bos", first_token_share=0.5)
    found = rows_in_stream_order(Rows(store, strategy, 8))
    starts = Counter(row["tokens"][0] == BOS for row in found.values())
    assert min(starts[True], starts[False]) > 15
    for place, row in found.items():
        text = documents_of([5] * 60)[place]
        lead = [BOS] if row["tokens"][0] == BOS else []
        assert row["tokens"] == [*lead, *text, EOS, *[EOS] * (2 - len(lead))]
        counted = [t for t, counts in zip(row["targets"], row["loss_mask"], strict=True) if counts]
        assert counted == [*text, EOS] if lead else [*text[1:], EOS]


def test_random_tokens_are_drawn_for_each_position_and_the_text_flows_around_them(make_store: MakeStore) -> None:
    documents = documents_of([400])
    rows = Rows(make_store(documents), Strategy(first_token=["random", "none", "random"], document_end="none"), 8)
    found = rows_in_stream_order(rows)
    assert [token for place in sorted(found) for token in [found[place]["tokens"][1], *found[place]["tokens"][3:]]] == (
        documents[0][: 6 * len(found)]
    )
    drawn = [(row["tokens"][0], row["tokens"][2]) for row in found.values()]
    assert len(set(drawn)) > len(found) / 2 and any(a != b for a, b in drawn)
    # No position predicts a placed token; what follows one is predicted by it.
    assert {tuple(row["loss_mask"]) for row in found.values()} == {(True, False, *[True] * 5, False)}
    assert all(row["targets"][2] == row["tokens"][3] for row in found.values())


def test_a_marker_may_be_any_token(make_store: MakeStore) -> None:
    strategy = Strategy(document_start=77, document_end=78)
    found = rows_in_stream_order(Rows(make_store([[10, 11], [12, 13, 14]]), strategy, 8))
    assert found[0]["tokens"] == [77, 10, 11, 78, 77, 12, 13, 14]
