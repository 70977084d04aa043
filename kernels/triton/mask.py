"""The mask on tiles: which tiles a block of queries or of keys visits, and what is seen inside one."""

import triton
import triton.language as tl


@triton.jit
def tile_ranges(low, low_full, high, high_full, shared_from, shared_to, BLOCK: tl.constexpr):
    """Tiles of size BLOCK that cover [low, high) and are whole inside [low_full, high_full), and, before them, those
    of the shared prefix [shared_from, shared_to).

    Returns: number and first of the shared tiles; the tile ranges [left, full), [full, right), [right, end).
    """
    left = low // BLOCK
    end = tl.cdiv(high, BLOCK)
    full = tl.minimum(tl.cdiv(low_full, BLOCK), end)
    right = tl.maximum(full, high_full // BLOCK)
    shared = tl.minimum(shared_from // BLOCK, left)
    shared_count = tl.minimum(tl.cdiv(shared_to, BLOCK), left) - shared
    return tl.maximum(shared_count, 0), shared, left, full, right, end


@triton.jit
def masked_tiles(shared_count, left, full, right, end, SOME: tl.constexpr):
    """Number of tiles that are visited with the mask.

    SOME: there is one, such as the diagonal's, without end_key always. Were it not said, ptxas would have the products
    of a causal pass on sm_90 wait for one another (`aot.serialized`).
    """
    count = shared_count + (full - left) + (end - right)
    return tl.maximum(count, 1) if SOME else count


@triton.jit
def masked_tile(t, shared_count, shared, left, full, right):
    """Tile visited in turn t of the masked loop: shared ones, then the left end, then the right end."""
    u = t - shared_count
    tile = tl.where(u < full - left, left + u, right + u - (full - left))
    return tl.where(t < shared_count, shared + t, tile)


@triton.jit
def query_block_tiles(
    p_first, p_end, row0, T, shared_from, shared_to,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_FIRST: tl.constexpr, HAS_END: tl.constexpr,
):  # fmt: skip
    """`tile_ranges` of the keys that queries row0 .. row0 + BLOCK_M − 1 see; p_first and p_end point at the row."""
    row1 = tl.minimum(row0 + BLOCK_M, T) - 1
    low, low_full = 0, 0
    if HAS_FIRST:
        low = tl.load(p_first + row0)
        low_full = tl.load(p_first + row1)
    high, high_full = row1 + 1, row0 + 1
    if HAS_END:
        high = tl.load(p_end + row1)
        high_full = tl.load(p_end + row0)
    return tile_ranges(low, low_full, high, high_full, shared_from, shared_to, BLOCK_N)


@triton.jit
def key_block_tiles(
    p_first_query, p_last_query, key0, T, shared_from, shared_to,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_FIRST: tl.constexpr, HAS_END: tl.constexpr,
):  # fmt: skip
    """Tiles of queries that see keys key0 .. key0 + BLOCK_N − 1: [left, full), [full, right), [right, end)."""
    key1 = tl.minimum(key0 + BLOCK_N, T) - 1
    low, low_full = key0, key1
    if HAS_END:
        low = tl.load(p_first_query + key0)
        low_full = tl.load(p_first_query + key1)
    high, high_full = T, T
    if HAS_FIRST:
        high_full = tl.load(p_last_query + key0)
        high = tl.load(p_last_query + key1)
    _none, _shared, left, full, right, end = tile_ranges(low, low_full, high, high_full, 0, 0, BLOCK_M)
    if HAS_FIRST:
        # Keys of the shared prefix are seen by every later query.
        holds_shared = (key0 < shared_to) & (key1 >= shared_from)
        end = tl.where(holds_shared, tl.cdiv(T, BLOCK_M), end)
    return left, full, right, end


@triton.jit
def visible(rows, keys, b_first, b_end, shared_from, shared_to, HAS_FIRST: tl.constexpr, HAS_END: tl.constexpr):
    """The mask's definition on a tile; rows, b_first, b_end broadcast against keys."""
    if HAS_END:
        seen = keys < b_end
    else:
        seen = keys <= rows
    if HAS_FIRST:
        shared = (keys >= shared_from) & (keys < shared_to) & (keys <= rows)
        seen = (seen & (keys >= b_first)) | shared
    return seen


@triton.jit
def load_queries(
    p_first_query, p_last_query, keys, T, shared_from, shared_to, HAS_FIRST: tl.constexpr, HAS_END: tl.constexpr
):
    """The mask's transpose: `keys` are seen by queries b_from .. b_to − 1; keys of the shared prefix by all later ones,
    keys beyond T by none."""
    b_from = keys
    b_to = tl.zeros_like(keys) + T
    if HAS_END:
        b_from = tl.load(p_first_query + keys, mask=keys < T, other=T)
    if HAS_FIRST:
        b_to = tl.load(p_last_query + keys, mask=keys < T, other=0)
        b_to = tl.where((keys >= shared_from) & (keys < shared_to), T, b_to)
    return b_from, b_to


@triton.jit
def load_interval(p_first, p_end, rows, T, HAS_FIRST: tl.constexpr, HAS_END: tl.constexpr):
    """first_key and end_key of `rows`, where there are any; queries beyond T see nothing."""
    b_first = rows
    b_end = rows
    if HAS_FIRST:
        b_first = tl.load(p_first + rows, mask=rows < T, other=T)
    if HAS_END:
        b_end = tl.load(p_end + rows, mask=rows < T, other=0)
    return b_first, b_end
