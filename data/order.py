"""Order of rows within an epoch: a permutation computed per index, a function of (seed, epoch).

A Feistel network shuffles the smallest power-of-four domain that holds all rows; an index that lands
outside the range walks the cycle until it lands inside, which keeps the map a bijection. Memory is O(1)
however many rows there are, and resuming needs only a counter. Traded away: locality (consecutive rows
come from anywhere in the store), which a memory-mapped store on a local disk bears well.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

_ROUNDS = 8  # few rounds show structure in tiny domains; eight cost little beside reading the tokens
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The splitmix64 finaliser: a bijection of 64-bit words in which each input bit moves each output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def hash_words(*words: ArrayLike) -> NDArray[np.uint64]:
    """Hash integer words, broadcast against each other, to 64 bits: a counter-based generator without state."""
    state = np.zeros(np.broadcast_shapes(*(np.shape(word) for word in words)), dtype=np.uint64)
    for word in words:
        # Array arithmetic wraps silently; that is what is meant here.
        state = mix((state ^ np.asarray(word).astype(np.uint64)) + np.full_like(state, _GOLDEN))
    return state


def permute(index: ArrayLike, size: int, *, seed: int, epoch: ArrayLike) -> NDArray[np.int64]:
    """Where the permutation of `range(size)` that belongs to (seed, epoch) sends each index.

    Args:
        index: [N] integers in 0 .. size - 1.
        size: rows in an epoch, at least 1.
        seed: any non-negative integer; epoch: one, or one per index [N].

    Returns [N] int64. Raises ValueError for an index outside the range.
    """
    flat = np.atleast_1d(np.asarray(index, dtype=np.int64))
    if size < 1 or (flat.size and (flat.min() < 0 or flat.max() >= size)):
        raise ValueError(f"index: expected 0 to {size - 1}, got {flat.min()} to {flat.max()}")
    half_bits = max(1, (int(size - 1).bit_length() + 1) // 2)
    epochs = np.broadcast_to(np.asarray(epoch, dtype=np.int64), flat.shape)
    value = _feistel(flat.astype(np.uint64), half_bits, seed, epochs)
    outside = value >= size
    while outside.any():  # the domain is at most four times the range: four steps on average, at worst
        value[outside] = _feistel(value[outside], half_bits, seed, epochs[outside])
        outside = value >= size
    return value.astype(np.int64).reshape(np.shape(index))


def _feistel(value: NDArray[np.uint64], half_bits: int, seed: int, epoch: NDArray[np.int64]) -> NDArray[np.uint64]:
    """A bijection of the integers of 2 * half_bits bits, keyed by (seed, epoch). value, epoch: [N]."""
    bits, low = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = value >> bits, value & low
    for step in range(_ROUNDS):
        left, right = right, left ^ (hash_words(seed, epoch, step, right) & low)
    return left << bits | right
