"""Tile sizes of the kernels, by architecture: chosen from counts of compiled instructions and spills
(`sinkbed kernels`), not from timings."""

from __future__ import annotations

from typing import NamedTuple


class Tiles(NamedTuple):
    """Configuration of one kernel."""

    block_m: int
    """Queries a tile."""
    block_n: int
    """Keys a tile."""
    warps: int
    stages: int


# (kernel, dtype bytes, BLOCK_D) -> tiles, for every architecture that has no entry of its own below.
_TILES = {
    ("forward", 2, 16): Tiles(128, 64, 8, 3),
    ("forward", 2, 32): Tiles(128, 64, 8, 3),
    ("forward", 2, 64): Tiles(128, 64, 8, 3),
    ("forward", 2, 128): Tiles(128, 64, 8, 2),
    ("dq", 2, 16): Tiles(128, 64, 8, 3),
    ("dq", 2, 32): Tiles(128, 64, 8, 3),
    ("dq", 2, 64): Tiles(64, 64, 4, 3),
    ("dq", 2, 128): Tiles(64, 32, 4, 2),
    ("dkv", 2, 16): Tiles(32, 64, 4, 2),
    ("dkv", 2, 32): Tiles(32, 64, 4, 2),
    ("dkv", 2, 64): Tiles(64, 64, 8, 2),
    ("dkv", 2, 128): Tiles(32, 64, 8, 2),
    ("received", 2, 16): Tiles(64, 128, 8, 3),
    ("received", 2, 32): Tiles(64, 128, 8, 3),
    ("received", 2, 64): Tiles(64, 128, 8, 3),
    ("received", 2, 128): Tiles(64, 128, 8, 3),
}
# (architecture, kernel, dtype bytes, BLOCK_D) -> tiles that take precedence.
_SPECIAL: dict[tuple[str, str, int, int], Tiles] = {}
_FULL_PRECISION = Tiles(32, 32, 4, 2)
_INTERPRETED = Tiles(32, 32, 4, 1)

override: dict[str, Tiles] = {}
"""Tiles by kernel name that take precedence; for tests and sweeps."""


def tiles(architecture: str | None, kernel: str, itemsize: int, block_d: int) -> Tiles:
    """Configuration of `kernel` ("forward", "dq", "dkv" or "received") at a dtype's bytes and a padded head dim.

    architecture: such as "sm_90" or "gfx942"; None in Triton's interpreter.
    """
    if kernel in override:
        return override[kernel]
    if architecture is None:
        return _INTERPRETED
    key = (kernel, itemsize, block_d)
    return _SPECIAL.get((architecture, *key)) or _TILES.get(key, _FULL_PRECISION)
