"""Plans: whole documents in rows, laid out as by the plain form of each packing, and kept beside the store."""

import itertools
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sinkbed.data.pack import plan as plan_module
from sinkbed.data.pack.methods import best_fit as best_fit_module
from sinkbed.data.pack.methods.best_fit import best_fit
from sinkbed.data.pack.plan import Plan, PlanSettings, items_of, windows
from sinkbed.data.pack.strategy import Strategy
from sinkbed.data.store.offsets import Offsets
from tests.support.oracle import laid_out
from tests.support.stores import offsets_of

PACKINGS: list[dict[str, Any]] = [
    {"packing": packing, "overflow": long, "fill": fill}
    for packing, fills in (("best_fit", ("pad", "crop", "repeat")), ("pad", ("pad",)), ("grouped", ("pad",)))
    for fill in fills
    for long in ("split", "truncate")
]


def rows_of(plan: Plan) -> list[list[tuple[int, int]]]:
    held, documents, begins = plan.read(np.arange(plan.rows))
    pairs = list(zip(documents.tolist(), begins.tolist(), strict=True))
    edges = np.concatenate([[0], np.cumsum(held)]).tolist()
    return [pairs[a:b] for a, b in itertools.pairwise(edges)]


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 14), min_size=1, max_size=40),
    packing=st.sampled_from(PACKINGS),
    start=st.sampled_from(["none", "bos"]),
    end=st.sampled_from(["none", "eos"]),
    room=st.integers(1, 12),
    waiting=st.integers(1, 5),
)
def test_a_plan_is_that_of_the_packing_done_one_document_after_the_other(
    lengths: list[int], packing: dict[str, Any], start: Any, end: Any, room: int, waiting: int
) -> None:
    strategy = Strategy(**packing, document_start=start, document_end=end)
    extras = (start != "none") + (end != "none")
    plan_settings = PlanSettings(strategy=strategy, room=room, extras=extras)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(best_fit_module, "_WAITING", waiting)
        laid = plan_settings.packing.lay_out(
            items := items_of(offsets_of(lengths), 0, len(lengths), plan_settings), plan_settings.room
        )
        expected = laid_out([[2] * size for size in lengths], strategy, room, waiting)
    edges = np.concatenate([[0], np.cumsum(laid.per_row)]).tolist()
    repeated = np.broadcast_to(laid.repeated, laid.piece.shape)
    found = [
        [
            (int(items.document[i]), int(items.begin[i]), bool(again))
            for i, again in zip(laid.piece[a:b], repeated[a:b], strict=True)
        ]
        for a, b in itertools.pairwise(edges)
    ]
    assert found == [[(piece.document, piece.begin, piece.repeated) for piece in row] for row in expected]


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 64), min_size=1, max_size=300), room=st.integers(64, 90))
def test_best_fit_overfills_no_row_and_leaves_no_row_that_another_could_hold(lengths: list[int], room: int) -> None:
    filled = np.bincount(best_fit(np.array(lengths), room), lengths)
    assert filled.min() > 0 and filled.max() <= room
    # Two rows that fit into one would have been one: the later one was opened because nothing else had room.
    smallest = np.sort(filled)[:2]
    assert len(filled) == 1 or smallest.sum() > room


def test_best_fit_decreasing_wastes_little_on_documents_of_many_lengths() -> None:
    lengths = np.minimum(np.random.default_rng(0).lognormal(5.5, 1.2, 20_000).astype(np.int64) + 1, 2048)
    filled = np.bincount(best_fit(lengths, 2048), lengths)
    assert 1 - lengths.sum() / (2048 * len(filled)) < 0.001


@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=30))
def test_windows_hold_every_document_once_and_are_bounded(lengths: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_module, "_WINDOW_TOKENS", 12)
        patch.setattr(plan_module, "_WINDOW_DOCUMENTS", 7)
        found = list(windows(offsets_of(lengths)))
    assert [stop for _, stop in found[:-1]] == [start for start, _ in found[1:]]
    assert (found[0][0], found[-1][1]) == (0, len(lengths))
    for start, stop in found:
        assert 1 <= stop - start <= 7
        assert sum(lengths[start:stop]) <= 12 or stop == start + 1


@pytest.fixture
def plan_settings() -> PlanSettings:
    return PlanSettings(strategy=Strategy(packing="best_fit"), room=8, extras=1)


@pytest.fixture
def offsets() -> Offsets:
    return offsets_of([3, 20, 0, 5, 1, 7, 7, 2] * 5)


def test_a_plan_of_several_windows_is_that_of_each_by_itself(
    plan_settings: PlanSettings, offsets: Offsets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_module, "_WINDOW_TOKENS", 30)
    monkeypatch.setattr(plan_module, "_MAPPED_WINDOWS", 2)
    plan = Plan.load(plan_settings, offsets, tmp_path, "digest")
    parts = list(windows(offsets))
    assert len(parts) > 3
    expected = []
    for start, stop in parts:
        items = items_of(offsets, start, stop, plan_settings)
        laid = plan_settings.packing.lay_out(items, plan_settings.room)
        edges = np.concatenate([[0], np.cumsum(laid.per_row)])
        for a, b in itertools.pairwise(edges):
            expected.append([(int(items.document[i]), int(items.begin[i])) for i in laid.piece[a:b]])
    assert rows_of(plan) == expected
    backwards = np.arange(plan.rows)[::-1]
    assert plan.read(backwards)[0].tolist() == [len(row) for row in expected[::-1]]
    every = Counter(pair for row in expected for pair in row)
    whole = items_of(offsets, 0, offsets.documents, plan_settings)
    assert every == Counter(zip(whole.document.tolist(), whole.begin.tolist(), strict=True))


def test_a_plan_is_made_once_and_read_by_arrow(
    plan_settings: PlanSettings, offsets: Offsets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = rows_of(Plan.load(plan_settings, offsets, tmp_path / "packing", "digest"))
    [path] = (tmp_path / "packing").iterdir()
    monkeypatch.setattr(plan_module, "_make", lambda *_: pytest.fail("made it again"))
    assert rows_of(Plan.load(plan_settings, offsets, tmp_path / "packing", "digest")) == first
    import pyarrow as pa

    table = pa.ipc.open_file(path).read_all()
    assert table["documents"].to_pylist() == [[document for document, _ in row] for row in first]


def test_what_decides_a_plan_is_in_its_name(plan_settings: PlanSettings) -> None:
    others = [
        PlanSettings(strategy=Strategy(packing="grouped"), room=8, extras=1),
        PlanSettings(strategy=Strategy(packing="best_fit", overflow="truncate"), room=8, extras=1),
        PlanSettings(strategy=Strategy(packing="best_fit", fill="repeat"), room=8, extras=1),
        PlanSettings(strategy=Strategy(packing="best_fit"), room=9, extras=1),
        PlanSettings(strategy=Strategy(packing="best_fit"), room=8, extras=2),
    ]
    names = {one.key("digest") for one in (plan_settings, *others)} | {plan_settings.key("other")}
    assert len(names) == len(others) + 2
    same = PlanSettings(
        strategy=Strategy(packing="best_fit", mask="intra_document", first_token="random"), room=8, extras=1
    )
    assert same.key("digest") == plan_settings.key("digest"), "the mask and what a first token is move no document"


@pytest.mark.parametrize("trouble", ["folder", "full"])
def test_a_plan_that_cannot_be_kept_is_made_in_memory_with_a_warning_and_leaves_nothing(
    plan_settings: PlanSettings, offsets: Offsets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    expected = rows_of(Plan.load(plan_settings, offsets, tmp_path / "good", "digest"))
    folder = tmp_path / "packing"
    if trouble == "folder":
        folder.write_text("a file where the folder should be")
    else:

        def refuse(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", refuse)
    with pytest.warns(UserWarning, match=r"could not be kept .*Make that folder writable"):
        plan = Plan.load(plan_settings, offsets, folder, "digest")
    assert rows_of(plan) == expected
    plan.verify()
    assert folder.is_file() or list(folder.iterdir()) == []


def test_a_damaged_plan_is_made_again_or_named(plan_settings: PlanSettings, offsets: Offsets, tmp_path: Path) -> None:
    plan = Plan.load(plan_settings, offsets, tmp_path, "digest")
    plan.verify()
    expected = rows_of(plan)
    [path] = tmp_path.iterdir()
    content = path.read_bytes()
    broken = {
        "cut off": content[: len(content) // 2],
        "no Arrow": b"x" * len(content),
        "no footer": content[:-40] + bytes(40),
        "other columns": content.replace(b"begins", b"bogins"),
    }
    for what, damaged in broken.items():
        path.write_bytes(damaged)
        assert rows_of(Plan.load(plan_settings, offsets, tmp_path, "digest")) == expected, what
        assert path.read_bytes() == content
    # A flipped bit leaves a readable file: document 1 becomes document 0.
    place = content.index((1).to_bytes(8, "little") + (1).to_bytes(8, "little"))
    path.write_bytes(content[:place] + bytes([0]) + content[place + 1 :])
    with pytest.raises(ValueError, match=rf"{path.name} is damaged.*delete it, it is made again"):
        Plan.load(plan_settings, offsets, tmp_path, "digest").verify()


def test_a_flipped_byte_in_a_plan_is_made_again_named_or_told_by_verify(
    plan_settings: PlanSettings, offsets: Offsets, tmp_path: Path
) -> None:
    expected = rows_of(Plan.load(plan_settings, offsets, tmp_path, "digest"))
    [path] = tmp_path.iterdir()
    content = path.read_bytes()
    named = 0
    for place in range(0, len(content), 3):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x81]) + content[place + 1 :])
        try:
            plan = Plan.load(plan_settings, offsets, tmp_path, "digest")
            if rows_of(plan) != expected:
                plan.verify()
                pytest.fail(f"other rows with byte {place} flipped")
        except ValueError as error:
            named += 1
            assert f"{path} is damaged" in str(error) and "delete it" in str(error)
    assert named > 5


def test_items_of_a_document_that_fits_a_row_exactly_are_one() -> None:
    offsets = offsets_of([7, 8, 15, 16])
    plan_settings = PlanSettings(strategy=Strategy(packing="best_fit"), room=8, extras=1)
    items = items_of(offsets, 0, 4, plan_settings)
    assert list(zip(items.document.tolist(), items.begin.tolist(), items.length.tolist(), strict=True)) == [
        (0, 0, 8),
        (1, 0, 8),
        (1, 8, 1),
        (2, 0, 8),
        (2, 8, 8),
        (3, 0, 8),
        (3, 8, 8),
        (3, 16, 1),
    ]


def test_a_packing_whose_code_was_changed_is_laid_out_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan_settings = PlanSettings(strategy=Strategy(packing="best_fit"), room=8, extras=1)
    before = plan_settings.key("digest")
    assert plan_settings.key("digest") == before
    edited = tmp_path / "best_fit.py"
    edited.write_text(Path(best_fit_module.__file__).read_text() + "# changed\n")
    monkeypatch.setattr(plan_module.inspect, "getfile", lambda _: str(edited))
    assert plan_settings.key("digest") != before
