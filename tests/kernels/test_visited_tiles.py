"""The tiles that the kernels visit, from the kernels' own range code, against the fewest that the mask allows.

`pytest tests/kernels/test_visited_tiles.py -s` prints the comparison with FlexAttention's block mask.
"""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import example, given, settings

from sinkbed.kernels import available, interval_mask
from tests.support.masks import MASKS, boundaries

if "triton" not in available("cpu"):
    pytest.skip("the range code runs on a CPU in Triton's interpreter only", allow_module_level=True)

import triton
import triton.language as tl

from sinkbed.kernels.triton.mask import key_block_tiles, query_block_tiles


@triton.jit
def record_query_block(
    first_key, end_key, out, T, shared_from, shared_to,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_FIRST: tl.constexpr, HAS_END: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    count, shared, left, full, right, end = query_block_tiles(
        first_key, end_key, block * BLOCK_M, T, shared_from, shared_to, BLOCK_M, BLOCK_N, HAS_FIRST, HAS_END
    )
    out += block * 6
    tl.store(out, shared)
    tl.store(out + 1, shared + count)
    tl.store(out + 2, left)
    tl.store(out + 3, full)
    tl.store(out + 4, right)
    tl.store(out + 5, end)


@triton.jit
def record_key_block(
    first_query, last_query, out, T, shared_from, shared_to,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_FIRST: tl.constexpr, HAS_END: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    left, full, right, end = key_block_tiles(
        first_query, last_query, block * BLOCK_N, T, shared_from, shared_to, BLOCK_M, BLOCK_N, HAS_FIRST, HAS_END
    )
    out += block * 6
    tl.store(out, 0)
    tl.store(out + 1, 0)
    tl.store(out + 2, left)
    tl.store(out + 3, full)
    tl.store(out + 4, right)
    tl.store(out + 5, end)


def visited(mask, block_m, block_n, by_key):
    """Tiles visited and tiles visited without a mask, both [query blocks, key blocks] bool, of the mask's first row."""
    T = mask.length
    blocks_m, blocks_n = triton.cdiv(T, block_m), triton.cdiv(T, block_n)
    found = torch.zeros(blocks_n if by_key else blocks_m, 6, dtype=torch.int32)
    tensors = (mask.first_query, mask.last_query) if by_key else (mask.first_key, mask.end_key)
    kernel = record_key_block if by_key else record_query_block
    kernel[(len(found),)](
        *tensors, found, T, *mask.shared, BLOCK_M=block_m, BLOCK_N=block_n, HAS_FIRST=mask.first_key is not None,
        HAS_END=mask.end_key is not None,
    )  # fmt: skip
    some, full = (torch.zeros(blocks_m, blocks_n, dtype=torch.bool) for _ in range(2))
    for block, (shared0, shared1, left, full0, full1, end) in enumerate(found.tolist()):
        line, line_full = (x[:, block] if by_key else x[block] for x in (some, full))
        assert not line[shared0:shared1].any()
        line[shared0:shared1] = True
        line[left:end] = True
        line_full[full0:full1] = True
    return some, full


def needed(mask, block_m, block_n, by_key):
    """Tiles with any visible pair, and tiles without a hidden one; the same shape as `visited`.

    What a block of queries (of keys, by_key) holds beyond T is not stored, so it may see anything.
    """
    T = mask.length
    shape = (triton.cdiv(T, block_m) * block_m, triton.cdiv(T, block_n) * block_n)
    seen, hidden = (torch.zeros(shape, dtype=torch.bool) for _ in range(2))
    seen[:T, :T] = mask.visible()[0, 0]
    hidden[:T, :T] = ~seen[:T, :T]
    if by_key:
        hidden[T:, :T] = True
    else:
        hidden[:T, T:] = True
    some, holes = (x.unflatten(0, (-1, block_m)).unflatten(2, (-1, block_n)).any(3).any(1) for x in (seen, hidden))
    return some, ~holes


def check(mask, block_m, block_n):
    for by_key in (False, True):
        some, every = needed(mask, block_m, block_n, by_key)
        tiles, full = visited(mask, block_m, block_n, by_key)
        if not by_key and mask.end_key is None:
            assert (tiles & ~full).any(1).all(), "the kernels take every block of queries to have a masked tile"
        assert torch.equal(tiles, some), "visited: the fewest tiles that hold every visible pair"
        assert not (full & ~every).any(), "without a mask: only where every pair is visible"


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("blocks", [(16, 16), (32, 16), (16, 32)])
def test_the_kernels_visit_the_fewest_tiles(name, blocks):
    start, end = boundaries([5, 1, 1, 40, 70, 3, 80])
    mask = interval_mask(1, start.shape[1], doc_start=start, doc_end=end, **MASKS[name](start, end))
    check(mask, *blocks)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=6),
    window=st.none() | st.integers(1, 90),
    document=st.booleans(),
    shared=st.integers(0, 40),
    prefix=st.integers(0, 40),
    hide=st.booleans(),
    blocks=st.sampled_from([(16, 16), (16, 32), (32, 16)]),
)
@example(lengths=[1, 15, 1], window=None, document=True, shared=1, prefix=0, hide=True, blocks=(16, 16))
def test_any_mask(lengths, window, document, shared, prefix, hide, blocks):
    T = sum(lengths)
    start, end = boundaries(lengths)
    mask = interval_mask(
        1, T, doc_start=start, doc_end=end, document=document, window=window,
        shared_prefix=min(shared, T), prefix_lm=min(prefix, T), hide_first_key=hide,
    )  # fmt: skip
    check(mask, *blocks)


@pytest.mark.parametrize("layout", ["causal", "even", "mixed"])
def test_no_more_than_flex_attentions_block_mask(layout):
    from torch.nn.attention.flex_attention import create_block_mask

    from sinkbed.train.bench.attention_peers import Case

    T = 2048
    case = Case(
        layout=layout, batch=1, heads=1, key_heads=1, length=T, dim=64, dtype=torch.float32,
        device=torch.device("cpu"),
    )  # fmt: skip
    mask, (start, _) = case.mask(), case.boundaries()
    pairs = int(mask.visible().sum())
    ours = int(visited(mask, 128, 64, by_key=False)[0].sum()) * 128 * 64
    areas = {}
    for block in ((128, 128), (128, 64)):
        flex = create_block_mask(
            lambda b, h, i, j: (j <= i) & (j >= start[b, i]), 1, None, T, T, "cpu", BLOCK_SIZE=block
        )
        areas[block] = int(flex.kv_num_blocks.sum() + flex.full_kv_num_blocks.sum()) * block[0] * block[1]
    print(
        f"\n{layout}: {len(case.documents())} documents, T {T}: computed / visible pairs: 128×64 tiles "
        f"{ours / pairs:.3f}, FlexAttention 128×64 {areas[128, 64] / pairs:.3f}, its default 128×128 "
        f"{areas[128, 128] / pairs:.3f}"
    )
    assert ours == areas[128, 64] <= areas[128, 128]
