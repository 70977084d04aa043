"""Ahead-of-time compiling: the counters on assembly written by hand, the check on a doctored table, and a few real
variants against the stored one. Compiling needs a process without Triton's interpreter: the command starts its own."""

import csv
import itertools
import re

import pytest

from kernels.compile import CHIPS, instructions_of, loops_of, tile_loops
from train.cli import main
from train.kernels import BASELINE, read_table, violations

MATRIX = re.compile(r"\bHMMA\b")
SASS = """
MOV R1, R2
.L_x_1:
.L_x_2:
LDS R3
HMMA.16816 R4
ISETP R5
HMMA.16816 R6
@P0 BRA `(.L_x_2)
.L_x_3:
HMMA.16816 R4
HMMA.16816 R6
@P0 BRA `(.L_x_3)
@P1 BRA `(.L_x_1)
.L_x_4:
HMMA.16816 R7
@P0 BRA `(.L_x_4)
@P2 BRA `(.L_x_9)
EXIT
.L_x_9:
BRA `(.L_x_9)
""".strip().splitlines()


def test_loops_are_what_backward_branches_close_innermost_only():
    code = instructions_of(SASS)
    assert [code[slice(*a)][0] for a in loops_of(SASS)] == ["LDS R3", "HMMA.16816 R4", "HMMA.16816 R7", "BRA `(.L_x_9)"]
    full, masked = tile_loops(SASS, MATRIX)
    assert code[slice(*full)] == ["HMMA.16816 R4", "HMMA.16816 R6", "@P0 BRA `(.L_x_3)"]
    assert len(code[slice(*masked)]) == 5 and "ISETP R5" in code[slice(*masked)]
    assert tile_loops(["MOV R1, R2"], MATRIX) == (None, None)


def test_the_baseline_holds_every_variant_and_keeps_the_promises():
    table = read_table(BASELINE)
    kernels = ("forward", "forward+statistics", "forward+full", "delta", "dq", "dkv", "received")
    assert set(table) == set(itertools.product(CHIPS, kernels, ("bf16", "fp16", "fp32"), ("32", "64", "96", "128")))
    for (arch, kernel, dtype, head_dim), line in table.items():
        assert int(line["shared"]) <= CHIPS[arch].shared_block
        assert int(line["matrix"]) > 0 or kernel == "delta"
        sixteen_bit = dtype != "fp32" and head_dim != "96"
        if sixteen_bit and (kernel in ("forward", "forward+statistics", "dq") or (kernel == "dkv" and arch == "sm_90")):
            assert int(line["spilled"]) == 0, (arch, kernel, dtype, head_dim)


def executed(line, length):
    """Instructions of a warp over the blocks of 128 queries of one document, with tiles of 64 keys."""
    outside = int(line["total"]) - int(line["full_loop"]) - int(line["masked_loop"])
    blocks = length // 128
    full = sum(2 * block for block in range(blocks))
    return blocks * outside + full * int(line["full_loop"]) + 2 * blocks * int(line["masked_loop"])


@pytest.mark.parametrize(("arch", "limit"), [("sm_80", 351), ("sm_90", 305)])
def test_statistics_cost_next_to_nothing(arch, limit):
    table = read_table(BASELINE)
    plain, some = (table[arch, kernel, "bf16", "64"] for kernel in ("forward", "forward+statistics"))
    assert plain["tiles"] == some["tiles"] and some["tiles"].startswith("128x64 ")
    assert int(some["full_loop"]) <= limit
    assert int(some["full_loop"]) <= 1.03 * int(plain["full_loop"])
    assert executed(some, 512) <= 1.07 * executed(plain, 512)


def test_a_worse_table_is_refused_with_every_reason():
    key = ("sm_90", "forward", "bf16", "64")
    stored = read_table(BASELINE)
    good = {**stored[key], **{n: int(stored[key][n]) for n in ("shared", "matrix", "spilled", "full_loop")}}
    assert violations([good], stored) == []
    worse = {
        "spilled": good["spilled"] + 4,
        "shared": 300_000,
        "matrix": 0,
        "full_loop": good["full_loop"] * 1.03,
    }
    for name, value in worse.items():
        [message] = violations([{**good, name: value}], stored)
        assert message.startswith("sm_90 forward bf16 64: expected ") and "found" in message
    assert "expected it to compile" in violations([{**good, "error": "OutOfResources: x"}], stored)[0]
    assert "--write" in violations([good], {})[0]


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
def test_the_kernels_compile_to_no_worse_than_the_baseline(arch, tmp_path, capsys):
    path = tmp_path / "table.csv"
    variants = ["--arch", arch, "--head_dim", "64", "--kernel", "forward+statistics", "dq", "dkv"]
    assert main(["kernels", *variants, "--check", "--csv", str(path)]) == 0, capsys.readouterr().out
    with path.open() as file:
        lines = list(csv.DictReader(file))
    assert [line["kernel"] for line in lines] == ["forward+statistics", "dq", "dkv"]
    assert all(int(line["full_loop"]) > 50 and int(line["masked_loop"]) > int(line["full_loop"]) for line in lines)


def test_wrong_requests_are_one_message(tmp_path, capsys):
    assert main(["kernels", "--check", str(tmp_path / "nowhere.csv")]) == 1
    assert "expected a table of `sinkbed kernels --write`, found no file" in capsys.readouterr().err
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    assert main(["kernels", "--check", str(tmp_path / "other.csv")]) == 1
    assert "found other columns" in capsys.readouterr().err
    assert main(["kernels", "--write", "--tiles", "64", "64", "4", "2"]) == 1
    assert "leave one of them out" in capsys.readouterr().err
