"""How fast a tile is, estimated from what keeps the units of a multiprocessor busy: against published speeds of other
kernels, and as the README says it."""

import csv
import itertools
import multiprocessing
import re
from concurrent.futures import ProcessPoolExecutor

import pytest

from sinkbed.kernels.triton.aot import CHIPS, PRODUCTS, estimated_share
from sinkbed.train.cli.kernels import TABLES, compile_only, read_table
from tests.support.peer_loops import forward_loop

PEAKS = {"sm_80": 312, "sm_90": 989}
"""TFLOP/s of an A100 and an H100 in 16 bits (NVIDIA's data sheets)."""
PUBLISHED = list(csv.DictReader((TABLES / "published.csv").read_text().splitlines()))


def test_published_speeds_of_other_kernels_are_estimated_as_the_readme_says():
    readme = (TABLES.parent / "README.md").read_text()
    errors = []
    for peer in PUBLISHED:
        arch = {"A100": "sm_80", "H100": "sm_90"}[peer["gpu"]]
        busy = [int(peer[unit]) for unit in ("issue", "special", "shared", "matrix")]
        products = {"forward": 2, "forward and backward": 7}[peer["passes"]]
        operations = 2 * products * int(peer["pairs"]) * int(peer["head_dim"])
        speed = estimated_share(CHIPS[arch], operations, *busy) * PEAKS[arch]
        errors.append(100 * (speed / int(peer["tflops"]) - 1))
        name = f"{peer['kernel']}, {peer['gpu']}, {peer['passes']}, D {peer['head_dim']}"
        cycles = "/".join(peer[unit] for unit in ("issue", "special", "shared", "matrix"))
        row = f"| {name} | {cycles} | {peer['tflops']} ({peer['source']}) | {speed:.0f} | {errors[-1]:+.0f} % |"
        assert row in readme, row
    said = f"from {-min(errors):.0f} % below to {max(errors):.0f} % above"
    assert said in readme.replace("\n", " ") and said in estimated_share.__doc__


def test_loops_of_other_triton_kernels_are_as_busy_as_the_table_says(tmp_path):
    """Which other versions of Triton make a little else of."""
    loops = {
        ("Triton's tutorial", "A100", "64"): ("sm_80", 64, 128, 64, 4, False),
        ("Triton's tutorial", "H100", "64"): ("sm_90", 64, 128, 64, 4, False),
        ("Triton's tutorial", "H100", "128"): ("sm_90", 128, 128, 64, 4, False),
        ("FlexAttention", "H100", "128"): ("sm_90", 128, 128, 64, 8, True),
    }
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, initializer=compile_only, initargs=(str(tmp_path),)) as pool:
        counted = dict(zip(loops, pool.map(forward_loop, *zip(*loops.values(), strict=True)), strict=True))
    for peer in PUBLISHED:
        if peer["kernel"] == "FlashAttention-2":
            continue
        busy = counted[peer["kernel"], peer["gpu"], peer["head_dim"]]
        assert busy == pytest.approx([int(peer[u]) for u in ("issue", "special", "shared", "matrix")], rel=0.05), peer


def test_the_readme_says_what_binds_a_tile():
    """Cycles of issue, special functions, shared memory and products, and the estimate; of the whole backward pass as
    others count it, five products a pair, of which dQ computes three and dK/dV four."""
    readme = (TABLES.parent / "README.md").read_text()
    stored = read_table(max(TABLES.glob("baseline-*.csv")))
    names = {"forward": "forward", "forward+statistics": "forward, statistics", "dq": "dQ", "dkv": "dK/dV",
             "dkv+groups": "dK/dV, groups", "received": "column sums"}  # fmt: skip
    speeds = {}
    for (kernel, name), head_dim in itertools.product(names.items(), (64, 128)):
        cells = []
        for arch in ("sm_80", "sm_90"):
            line = stored[arch, kernel, "document", "bf16", str(head_dim)]
            warps = int(re.search(r"w(\d+)", line["tiles"])[1])
            issue = int(line["full_loop"]) * warps // 4
            *others, matrix = (int(line[f"{unit}_cycles"]) for unit in ("special", "shared", "matrix"))
            queries, keys = map(int, re.findall(r"\d+", line["tiles"])[:2])
            operations = 2 * PRODUCTS[kernel.partition("+")[0]] * queries * keys * head_dim
            share = estimated_share(CHIPS[arch], operations, issue, *others, matrix)
            speed = speeds[arch, kernel, head_dim] = share * PEAKS[arch]
            cells.append(f"{'/'.join(map(str, (issue, *others, matrix)))}: {100 * share:.0f} %, {speed:.0f}")
        row = f"| {name}, {head_dim} | {cells[0]} | {cells[1]} |"
        assert row in readme, row
    both = []
    for arch, head_dim in itertools.product(PEAKS, (64, 128)):
        forward, dq, dkv = (speeds[arch, kernel, head_dim] for kernel in ("forward", "dq", "dkv"))
        backward = 5 / (3 / dq + 4 / dkv)
        assert re.search(rf"\| backward, {head_dim} \|.* {backward:.0f} \|", readme)
        both.append(f"{14 / (4 / forward + 10 / backward):.0f}")  # 4·D operations a pair, and 10·D
    said = "{} and {} on an A100 where FlashAttention-2 has 176 and 203, {} and {} on an H100 where it has 296 and 338"
    assert said.format(*both) in readme.replace("\n", " ")
