"""How fast a tile is, estimated from what keeps the units of a multiprocessor busy: against published speeds of other
kernels, and as the README says it."""

import csv
import itertools
import math
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path

import pytest

from sinkbed.kernels.triton.aot import CHIPS, estimated_share
from sinkbed.train.cli.kernels import TABLES, compile_only, estimate, read_table
from tests.support.peer_loops import backward_loops, forward_loop

PEAKS = {"sm_80": 312, "sm_90": 989}
"""TFLOP/s of an A100 and an H100 in 16 bits (NVIDIA's data sheets)."""
PUBLISHED = list(csv.DictReader(Path(__file__).with_name("published.csv").read_text().splitlines()))
UNITS = ("issue", "special", "shared", "matrix")
README = (TABLES.parent / "README.md").read_text()
PLAIN = README.replace("\n", " ")


def estimated_peer(peer):
    """TFLOP/s, as others count them: two products a pair forward, five backward."""
    arch = {"A100": "sm_80", "H100": "sm_90"}[peer["gpu"]]
    queries, keys = map(int, peer["tile"].split("x"))
    products = {"forward": 2, "backward": 5, "forward and backward": 7}[peer["passes"]]
    operations = 2 * products * queries * keys * int(peer["head_dim"])
    return estimated_share(CHIPS[arch], operations, *(int(peer[unit]) for unit in UNITS)) * PEAKS[arch]


def test_published_speeds_of_other_kernels_are_estimated_as_the_readme_says():
    errors = []
    for peer in PUBLISHED:
        speed = estimated_peer(peer)
        errors.append(100 * (speed / int(peer["tflops"]) - 1))
        name = f"{peer['kernel']}, {peer['gpu']}, {peer['passes']}, D {peer['head_dim']}"
        cells = (name, peer["tile"].replace("x", "×"), "/".join(peer[unit] for unit in UNITS))
        row = f"| {' | '.join(cells)} | {peer['tflops']} ({peer['source']}) | {speed:.0f} | {errors[-1]:+.0f} % |"
        assert row in README, row
    said = f"from {-min(errors):.0f} % below to {max(errors):.0f} % above"
    assert said in PLAIN and said in estimated_share.__doc__.replace("\n    ", " ")
    assert f"{sum(map(abs, errors)) / len(errors):.0f} % off on average" in PLAIN


def test_half_of_the_other_cycles_fits_the_published_speeds_best():
    def mean_square(part):
        total = 0.0
        for peer in PUBLISHED:
            *others, matrix = (int(peer[unit]) for unit in UNITS)
            ratio = (matrix + sum(others) / 2) / (matrix + part * sum(others))
            total += math.log(estimated_peer(peer) * ratio / int(peer["tflops"])) ** 2
        return total

    parts = [part / 20 for part in range(21)]
    assert min(parts, key=mean_square) == 0.5


def test_three_constants_fit_as_well_as_the_readme_says():
    """Shares of the peak of the products that are computed: the tutorial's backward pass computes seven for five."""
    shares = {}
    for peer in PUBLISHED:
        peak = {"A100": 312, "H100": 989}[peer["gpu"]]
        computed = 7 / 5 if peer["passes"] == "backward" else 1
        kind = (peer["gpu"], peer["gpu"] == "H100" and peer["kernel"] == "FlashAttention-2")
        shares.setdefault(kind, []).append(math.log(computed * int(peer["tflops"]) / peak))
    constants = {kind: sum(logs) / len(logs) for kind, logs in shares.items()}
    said = "{:.0f} % of the peak of the products computed on an A100, {:.0f} % with HMMA and {:.0f} % with HGMMA on an"
    kinds = (("A100", False), ("H100", True), ("H100", False))
    assert said.format(*(100 * math.exp(constants[kind]) for kind in kinds)) in PLAIN
    of_constants = sum((log - constants[kind]) ** 2 for kind, logs in shares.items() for log in logs)
    of_cycles = sum(math.log(estimated_peer(peer) / int(peer["tflops"])) ** 2 for peer in PUBLISHED)
    assert of_constants == pytest.approx(of_cycles, rel=0.1)


@pytest.mark.skipif(version("triton") != "3.9.0", reason="counted with Triton 3.9.0")
def test_loops_of_other_triton_kernels_are_as_busy_as_the_table_says(tmp_path):
    loops = {
        ("Triton's tutorial", "A100", "forward", "64"): (forward_loop, "sm_80", 64, 128, 64, 4, False),
        ("Triton's tutorial", "A100", "backward", "64"): (backward_loops, "sm_80", 64, 32, 128, 4),
        ("Triton's tutorial", "H100", "forward", "64"): (forward_loop, "sm_90", 64, 128, 64, 4, False),
        ("Triton's tutorial", "H100", "forward", "128"): (forward_loop, "sm_90", 128, 128, 64, 4, False),
        ("Triton's tutorial", "H100", "backward", "64"): (backward_loops, "sm_90", 64, 32, 128, 4),
        ("FlexAttention", "H100", "forward", "128"): (forward_loop, "sm_90", 128, 128, 64, 8, True),
    }
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, initializer=compile_only, initargs=(str(tmp_path),)) as pool:
        counting = {name: pool.submit(*loop) for name, loop in loops.items()}
    for peer in PUBLISHED:
        if peer["kernel"] != "FlashAttention-2":
            busy = counting[peer["kernel"], peer["gpu"], peer["passes"], peer["head_dim"]].result()
            assert busy == tuple(int(peer[unit]) for unit in UNITS), peer


def test_the_readme_says_how_fast_our_tiles_are_estimated():
    """Of the whole backward pass as others count it, five products, of which dQ computes three and dK/dV four."""
    stored = read_table(max(TABLES.glob("baseline-*.csv")))
    names = {"forward": "forward", "forward+statistics": "forward, statistics", "dq": "dQ", "dkv": "dK/dV",
             "dkv+groups": "dK/dV, groups", "received": "column sums"}  # fmt: skip
    speeds, both = {}, []
    for (kernel, name), head_dim in itertools.product(names.items(), (64, 128)):
        cells = []
        for arch, peak in PEAKS.items():
            cycles, share = estimate(stored[arch, kernel, "document", "bf16", str(head_dim)])
            speeds[arch, kernel, head_dim] = share * peak
            cells.append(f"{cycles}: {100 * share:.0f} %, {share * peak:.0f}")
        assert f"| {name}, {head_dim} | {cells[0]} | {cells[1]} |" in README, cells
    for head_dim in (64, 128):
        backward = {arch: 5 / (3 / speeds[arch, "dq", head_dim] + 4 / speeds[arch, "dkv", head_dim]) for arch in PEAKS}
        assert f"| backward, {head_dim} | {backward['sm_80']:.0f} | {backward['sm_90']:.0f} |" in README
        # 4·D operations a pair, and 10·D.
        both += [f"{14 / (4 / speeds[arch, 'forward', head_dim] + 10 / backward[arch]):.0f}" for arch in PEAKS]
    peers = [f"{estimated_peer(peer):.0f}" for peer in PUBLISHED if peer["passes"] == "forward and backward"]
    said = "{} and {} on an A100 where FlashAttention-2 comes to {} and {}, {} and {} on an H100 where to {} and {}"
    assert said.format(both[0], both[2], *peers[:2], both[1], both[3], *peers[2:]) in PLAIN
