"""Offsets read from shards equal those of one list, whatever the shards and the documents without a token."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sinkbed.data.store import offsets as offsets_module
from sinkbed.data.store.offsets import Offsets
from tests.support.stores import offsets_of


def sharded(shards: list[list[int]]) -> Offsets:
    parts = [np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64) for lengths in shards]
    return Offsets([len(lengths) for lengths in shards], [sum(lengths) for lengths in shards], parts.__getitem__)


SHARDS = st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=6), min_size=1, max_size=5)


@given(shards=SHARDS, extras=st.integers(0, 2), few=st.sampled_from([0, 24]))
def test_every_position_is_given_to_the_document_that_holds_it(shards: list[list[int]], extras: int, few: int) -> None:
    lengths = np.array([length for shard in shards for length in shard])
    expected = np.repeat(np.arange(len(lengths)), lengths + extras)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(offsets_module, "_FEW", few)  # one after the other, and all in step
        found = sharded(shards).find(np.arange(len(expected)), extras)
    assert found.tolist() == expected.tolist()


@given(shards=SHARDS, data=st.data())
def test_offsets_are_read_across_shards_in_any_order(shards: list[list[int]], data: st.DataObject) -> None:
    offsets = sharded(shards)
    expected = np.concatenate([[0], np.cumsum([length for shard in shards for length in shard])])
    assert len(offsets) == len(expected) and offsets[:].tolist() == expected.tolist()
    assert (offsets.documents, offsets.tokens) == (len(expected) - 1, expected[-1])
    asked = data.draw(st.lists(st.integers(0, offsets.documents), max_size=9))
    assert offsets[np.array(asked, dtype=np.int64)].tolist() == expected[asked].tolist()


def test_documents_without_a_token_at_a_shard_boundary_hold_no_position() -> None:
    """The case in which two shards begin at the same position occurs, and the later one has it."""
    offsets = sharded([[2, 0], [0, 0], [3]])
    assert offsets.find(np.array([0, 1, 2, 4])).tolist() == [0, 0, 4, 4]
    assert offsets_of([2, 0, 0, 0, 3]).find(np.array([0, 1, 2, 4])).tolist() == [0, 0, 4, 4]
