"""The order of blocks: every block once, the longest of a section first, and few reads past the L2 cache in a plain
simulation of it."""

from collections import OrderedDict

import pytest
import torch

from sinkbed.kernels import available

if "triton" not in available("cpu"):
    pytest.skip("the order's code runs on a CPU in Triton's interpreter only", allow_module_level=True)

import triton
import triton.language as tl

from sinkbed.kernels.triton.order import place, section


@triton.jit
def record(out, heads, blocks, SECTION, N: tl.constexpr):
    programs = tl.arange(0, N)
    head, block = place(programs, heads, blocks, SECTION)
    inside = programs < heads * blocks
    tl.store(out + programs * 2, head, mask=inside)
    tl.store(out + programs * 2 + 1, block, mask=inside)


def order(heads, blocks, of_section):
    """(head, block) of every program, as the kernels' own code has it."""
    out = torch.full((heads * blocks, 2), -1, dtype=torch.int32)
    record[(1,)](out, heads, blocks, of_section, N=triton.next_power_of_2(heads * blocks))
    return [tuple(x) for x in out.tolist()]


@pytest.mark.parametrize(("heads", "blocks", "of_section"), [(1, 1, 1), (7, 5, 3), (6, 4, 6), (12, 1, 5), (9, 16, 1)])
def test_every_block_of_every_head_runs_once_and_a_section_begins_with_its_first_blocks(heads, blocks, of_section):
    programs = order(heads, blocks, of_section)
    assert sorted(programs) == [(h, b) for h in range(heads) for b in range(blocks)]
    assert programs == sorted(programs, key=lambda x: (x[0] // of_section, x[1], x[0]))


def test_a_section_is_as_many_heads_as_the_cache_holds():
    assert section(100, 8 * 2**20) == 4
    assert section(3, 8 * 2**20) == 3 and section(100, 2**30) == 1


def read_from_memory(programs, tiles, of_tile, slots, cache=40e6):
    """Bytes that a least-recently-used cache lacks when `slots` blocks at a time each read a tile a turn.

    tiles: of a program (head, block), the (head, tile) that it reads, in order; of_tile: bytes of one.
    """
    waiting, running, missed = iter(programs), [], 0
    kept: OrderedDict = OrderedDict()
    while True:
        while len(running) < slots and (program := next(waiting, None)):
            running.append(iter(tiles(*program)))
        if not running:
            return missed
        for work in list(running):
            if (tile := next(work, None)) is None:
                running.remove(work)
                continue
            missed += 0 if tile in kept else of_tile
            kept[tile] = None
            kept.move_to_end(tile)
            if len(kept) * of_tile > cache:
                kept.popitem(last=False)


SHAPES = {"small": (64, 6, 6, 1024, 64), "120m": (16, 12, 1, 2048, 64), "many heads": (8, 16, 16, 2048, 128)}
PASSES = {"forward": (128, 4, 2), "dq": (128, 6, 4), "dkv": (64, 8, 4)}
"""Rows of a block, operations of a pair and head dim, tensors of q's size that are read or written once."""


def demand(shape, name, whole=False):
    """Bytes of keys and values (of queries and gradients) a second, at 350 TFLOP/s of a causal mask; bf16."""
    B, H, Hkv, T, D = SHAPES[shape]
    block, operations, once = PASSES[name]
    G, blocks, head_bytes = H // Hkv, T // block, 2 * 2 * T * D
    if name == "dkv":
        heads, of_section = B * Hkv, section(B * Hkv, G * head_bytes)
        tiles = lambda h, b: [(h * G + g, t) for g in range(G) for t in range(b * block // 64, T // 64)]  # noqa: E731
    else:
        heads, of_section = B * H, G * section(B * Hkv, head_bytes)
        tiles = lambda h, b: [(h // G, t) for t in range((blocks - b) * block // 64)]  # noqa: E731
    programs = order(heads, blocks, heads if whole else of_section)
    streamed = read_from_memory(programs, tiles, head_bytes / (T // 64), slots=264)
    seconds = operations * B * H * T * T * D / 2 / 350e12
    return (streamed + once * B * H * T * D * 2) / seconds


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", PASSES)
def test_demand_on_memory_is_less_than_half_of_what_an_h100_has(shape, name):
    assert demand(shape, name) < 1.5e12, "of 3.35e12"


def test_without_sections_it_is_more():
    assert demand("small", "dq", whole=True) > 1.5 * demand("small", "dq")
