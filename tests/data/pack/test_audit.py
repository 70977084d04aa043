"""The audit, computed from offsets alone, equals counting over all materialised rows."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sinkbed.data.pack import audit as audit_module
from sinkbed.data.pack.audit import audit
from sinkbed.data.pack.batches import Rows
from sinkbed.data.pack.strategy import Marker, Strategy
from sinkbed.data.store.token_store import TokenStore
from tests.support.oracle import BOS, laid_out, marked, planned_row, rows_of, stream_of

MakeStore = Callable[..., TokenStore]


def counted_by_hand(documents: list[list[int]], strategy: Strategy, length: int) -> dict[str, Any]:
    first = {"none": None, "bos": BOS, "random": 99}.get(strategy.first_token, strategy.first_token)  # type: ignore[arg-type]
    assert first is None or isinstance(first, int)
    rows = rows_of(documents, strategy, length, first)
    stream = stream_of(documents, strategy)
    owner = [document for _, document in stream]
    per_row = [len(set(row.documents)) for row in rows]
    # Every document's stream positions, by row; what follows the last row is a row of its own.
    stride = len(rows[0].stream_positions)
    row_of: dict[int, set[int]] = {}
    for position, document in enumerate(owner):
        row_of.setdefault(document, set()).add(min(position // stride, len(rows)))
    targets = [counts for row in rows for counts in row.loss_mask]
    opens = [
        row.stream_positions[0] == 0 or owner[row.stream_positions[0]] != owner[row.stream_positions[0] - 1]
        for row in rows
    ]
    return {
        "rows_per_epoch": len(rows),
        "tokens_per_epoch": len(rows) * length,
        "stream_tokens_per_epoch": len(rows) * stride,
        "targets_per_epoch": sum(targets),
        "documents": len(documents),
        "documents_per_row_mean": sum(per_row) / len(rows),
        "documents_per_row_max": max(per_row),
        "share_of_rows_that_begin_with_bos": sum(row.tokens[0] == BOS for row in rows) / len(rows),
        "share_of_rows_that_begin_a_document": sum(opens) / len(rows),
        "share_of_tokens_padding": 0.0,
        "share_of_tokens_repeated": 0.0,
        "share_of_tokens_cropped": 1 - len(rows) * stride / len(stream),
        "documents_cut": sum(len(held) > 1 for held in row_of.values()),
        "share_of_documents_cut": sum(len(held) > 1 for held in row_of.values()) / len(documents),
        "tokens_cropped": len(stream) - len(rows) * stride,
        "share_of_targets_not_counted": 1 - sum(targets) / len(targets),
    }


@settings(max_examples=120, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 12), min_size=4, max_size=40),
    strategy=st.builds(
        Strategy,
        first_token=st.sampled_from(["none", "bos", "random", BOS, 9]),
        document_start=st.sampled_from(["none", "bos", "eos"]),
        document_end=st.sampled_from(["none", "bos", "eos"]),
        mask=st.sampled_from(["causal", "intra_document"]),
        prefix_lm=st.sampled_from([0, 2, 4]),
    ),
    length=st.integers(5, 12),
    chunk=st.integers(1, 9),
)
def test_the_audit_equals_a_count_over_all_rows(
    make_store: MakeStore, lengths: list[int], strategy: Strategy, length: int, chunk: int
) -> None:
    documents = [[2 + i % 256] * size for i, size in enumerate(lengths)]
    if len(stream_of(documents, strategy)) <= length:
        return
    with pytest.MonkeyPatch.context() as patch:
        # Pieces of a few documents, so that rows begin in one and end in another.
        patch.setattr(audit_module, "_CHUNK_TOKENS", chunk)
        found = audit(Rows(make_store(documents), strategy, length))
    for name, value in counted_by_hand(documents, strategy, length).items():
        assert found[name] == pytest.approx(value), name


def planned_by_hand(documents: list[list[int]], strategy: Strategy, length: int) -> dict[str, Any]:
    first = [] if strategy.first_token == "none" else [BOS]
    laid = laid_out(documents, strategy, length - len(first), 1000)
    rows = [planned_row(documents, strategy, length, row, list(first)) for row in laid]
    sizes = [[piece.end - piece.begin for piece in row] for row in laid]
    filled, again = sum(map(sum, sizes)), sum(p.end - p.begin for row in laid for p in row if p.repeated)
    total = sum(len(marked(document, strategy)) for document in documents)
    targets = sum(sum(row.loss_mask) for row in rows)
    heads = [p for row in laid for p in row if not p.begin and not p.repeated]
    return {
        "rows_per_epoch": len(rows),
        "targets_per_epoch": targets,
        "stream_tokens_per_epoch": filled - again,
        "documents_per_row_mean": sum(map(len, laid)) / len(rows),
        "documents_per_row_max": max(map(len, laid)),
        "share_of_rows_that_begin_with_bos": sum(row.tokens[0] == BOS for row in rows) / len(rows),
        "share_of_rows_that_begin_a_document": sum(row[0].begin == 0 for row in laid) / len(rows),
        "share_of_tokens_padding": 1 - (filled + len(first) * len(rows)) / (len(rows) * length),
        "documents_cut": sum(p.end < len(marked(documents[p.document], strategy)) for p in heads),
        "tokens_cropped": total - filled + again,
        "share_of_tokens_repeated": again / filled,
        "share_of_targets_not_counted": 1 - targets / (len(rows) * length),
    }


@settings(max_examples=120, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 20), min_size=4, max_size=40),
    packing=st.sampled_from(
        [
            {"packing": "best_fit"},
            {"packing": "best_fit", "fill": "crop"},
            {"packing": "best_fit", "fill": "repeat", "overflow": "truncate"},
            {"packing": "pad", "overflow": "truncate"},
            {"packing": "grouped"},
        ]
    ),
    first=st.sampled_from(["none", "bos"]),
    start=st.sampled_from(["none", "bos"]),
    mask=st.sampled_from(["causal", "intra_document"]),
    prefix_lm=st.sampled_from([0, 3]),
    length=st.integers(5, 12),
    chunk=st.integers(1, 40),
)
def test_the_audit_of_whole_documents_equals_a_count_over_all_rows(
    make_store: MakeStore,
    lengths: list[int],
    packing: dict[str, Any],
    first: Any,
    start: Any,
    length: int,
    chunk: int,
    **axes: Any,
) -> None:
    if packing["packing"] == "pad":
        axes["mask"] = "causal"
    strategy = Strategy(**packing, first_token=first, document_start=start, **axes)
    documents = [[2 + i % 256] * size for i, size in enumerate(lengths)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(audit_module, "_CHUNK_TOKENS", chunk)
        found = audit(Rows(make_store(documents), strategy, length))
    for name, value in planned_by_hand(documents, strategy, length).items():
        assert found[name] == pytest.approx(value), name


def test_rows_without_their_first_token_are_audited_as_drawn(make_store: MakeStore) -> None:
    strategy = Strategy(first_token="bos", first_token_share=0.5, document_end="none")
    rows = Rows(make_store([[5, 6, 7, 8, 9]] * 60), strategy, 8)
    tokens = rows.__getitems__(list(range(len(rows)))).tokens
    found = audit(rows)
    with_first = int((tokens[:, 0] == BOS).sum())
    assert 0 < with_first < len(rows)
    assert found["share_of_rows_that_begin_with_bos"] == with_first / len(rows)
    # The first row of the stream has nothing before it: where it is drawn without BOS it ends in padding.
    padded = int((tokens[:, -1] == 1).sum())
    assert padded == round(found["share_of_tokens_padding"] * len(rows) * 8) <= 1
    repeated = len(rows) - with_first - padded
    assert found["share_of_tokens_repeated"] == pytest.approx(repeated / (len(rows) * 7 + repeated))


def test_the_extremes_of_each_share_occur(make_store: MakeStore) -> None:
    """Guard for the test above: documents that fill rows exactly, and one that never ends."""
    aligned = make_store([[2] * 7] * 9)
    found = audit(Rows(aligned, Strategy(document_start="bos", document_end="none"), 8))
    assert found["share_of_rows_that_begin_with_bos"] == found["share_of_rows_that_begin_a_document"] == 1
    assert (found["documents_cut"], found["documents_per_row_max"]) == (0, 1)
    assert found["tokens_cropped"] == 8, "the last row has no last target"
    single = audit(Rows(make_store([[2] * 80]), Strategy(), 8))
    assert single["share_of_rows_that_begin_a_document"] == 1 / single["rows_per_epoch"]
    assert single["share_of_documents_cut"] == 1


def test_a_row_that_begins_with_an_end_marker_begins_with_bos_where_that_is_the_marker(make_store: MakeStore) -> None:
    # Nine tokens a document, its end marker included: a marker opens rows 1, 10 and 19.
    store = make_store([[2] * 8] * 20)
    counts: dict[Marker, int] = {"bos": 3, "eos": 0}
    for end, opened in counts.items():
        rows = Rows(store, Strategy(document_end=end), 8)
        assert audit(rows)["share_of_rows_that_begin_with_bos"] == opened / len(rows)


def test_arms_of_one_store_share_the_document_order_and_other_stores_do_not(make_store: MakeStore) -> None:
    documents = [[2, 3, 4]] * 10
    store = make_store(documents)
    base = audit(Rows(store, Strategy(), 8))
    other_arm = audit(Rows(store, Strategy(first_token="bos", mask="intra_document", document_end="none"), 6))
    assert base["document_order"] == other_arm["document_order"]
    assert base["store_digest"] == other_arm["store_digest"]
    assert base["document_order"] == audit(Rows(make_store(documents, shard_tokens=5), Strategy(), 8))["document_order"]
    same_lengths = audit(Rows(make_store([[2, 3, 5]] * 10), Strategy(), 8))
    assert base["store_digest"] != same_lengths["store_digest"]
    other_order = audit(Rows(make_store([[2], *documents]), Strategy(), 8))
    assert base["document_order"] != other_order["document_order"]


def test_the_audit_is_json_and_reads_no_token(make_store: MakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Rows(make_store([[2, 3, 4]] * 10), Strategy(first_token="random"), 8)
    monkeypatch.setattr(TokenStore, "gather", lambda *_: pytest.fail("read tokens"))
    found = audit(rows)
    assert json.loads(json.dumps(found)) == found
    assert found["strategy"]["first_token"] == "random" and found["context_length"] == 8
