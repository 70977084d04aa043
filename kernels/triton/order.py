"""In which order the blocks of a launch run: heads in sections whose keys and values fit the L2 cache, and in a section
the longest block of every head first, then the next longest.

Blocks start in the order of their number, and as many run at once as the chip has room for. Were all heads to take
turns, each block would stream the keys of another head past the cache. FlashAttention-3 orders its blocks so too
(flash-attention/hopper/tile_scheduler.hpp, `DynamicPersistentTileScheduler`).
"""

import triton
import triton.language as tl

_CACHE = 32 * 2**20
"""Bytes of L2 that a section may fill, of the 40 to 50 MB of an A100 or H100: FlashAttention-3's."""


def section(heads: int, head_bytes: int) -> int:
    """How many heads a section has, of `heads` whose blocks stream the same `head_bytes` bytes each; 1 at least."""
    return max(1, min(heads, _CACHE // head_bytes))


@triton.jit
def place(program, heads, blocks, SECTION):
    """The head and the block, counted from the first that starts, of a program of a grid of heads · blocks.

    A bijection: the last section has what is left of the heads.
    """
    first = program // (SECTION * blocks) * SECTION
    within = program - first * blocks
    here = tl.minimum(SECTION, heads - first)
    return first + within % here, within // here
