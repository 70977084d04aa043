"""The order of rows is a bijection of the epoch, computed per index, decided by (seed, epoch) alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sinkbed.data.order import hash_words, permute

ORDER_OF_TEN = [8, 0, 4, 7, 5, 2, 1, 6, 9, 3]
HASHES = [16613338946343043936, 13264548337748323810]


@settings(max_examples=150, deadline=None)
@given(size=st.integers(1, 3000), seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 10**6))
def test_every_row_of_an_epoch_appears_exactly_once(size: int, seed: int, epoch: int) -> None:
    order = permute(np.arange(size), size, seed=seed, epoch=epoch)
    np.testing.assert_array_equal(np.sort(order), np.arange(size))


@settings(max_examples=50, deadline=None)
@given(size=st.integers(1, 2**50), data=st.data())
def test_one_index_gives_what_it_gives_among_others(size: int, data: st.DataObject) -> None:
    index = np.array(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20)))
    together = permute(index, size, seed=3, epoch=np.arange(len(index)))
    assert together.min() >= 0 and together.max() < size
    alone = [int(permute(index[i : i + 1], size, seed=3, epoch=i)[0]) for i in range(len(index))]
    assert together.tolist() == alone


@pytest.mark.parametrize("change", [{"seed": 8, "epoch": 0}, {"seed": 7, "epoch": 1}])
def test_another_seed_or_epoch_gives_another_order(change: dict[str, int]) -> None:
    index = np.arange(1000)
    base = permute(index, 1000, seed=7, epoch=0)
    np.testing.assert_array_equal(base, permute(index, 1000, seed=7, epoch=0))
    # Two independent permutations agree in about one place.
    assert np.count_nonzero(base == permute(index, 1000, **change)) < 10


@pytest.mark.parametrize("size", [5, 16, 17, 100])
def test_each_row_may_land_anywhere_with_about_equal_chance(size: int) -> None:
    """Chi-square over 4,000 epochs of where three rows land; 6 sigma above its mean fails."""
    epochs = np.arange(4000)
    for row in (0, 1, size - 1):
        landed = permute(np.full(4000, row), size, seed=11, epoch=epochs)
        expected = 4000 / size
        statistic = ((np.bincount(landed, minlength=size) - expected) ** 2 / expected).sum()
        assert statistic < size - 1 + 6 * (2 * (size - 1)) ** 0.5


def test_the_order_is_fixed_for_all_time() -> None:
    """Resuming a run trained with an earlier version relies on these very numbers."""
    assert permute(np.arange(10), 10, seed=0, epoch=0).tolist() == ORDER_OF_TEN
    assert hash_words(1, 2, np.arange(2)).tolist() == HASHES


@pytest.mark.parametrize("index", [[-1], [10], [3, 11]])
def test_an_index_outside_the_epoch_is_refused(index: list[int]) -> None:
    with pytest.raises(ValueError, match="expected 0 to 9"):
        permute(np.array(index), 10, seed=0, epoch=0)
