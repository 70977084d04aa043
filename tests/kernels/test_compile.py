"""Ahead-of-time compiling: the counters on assembly written by hand, the check on a doctored table, and a few real
variants against the stored one. Compiling needs a process without Triton's interpreter: the command starts its own."""

import csv
import itertools
import json

import pytest

from kernels.compile import CHIPS, instructions_of, loops_of, occupancy, roofline, spilled_bytes, tile_loops
from train.cli import main
from train.kernels import BASELINE, read_table, violations

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
HFMA2.MMA R7
HFMA2.MMA R7
HFMA2.MMA R7
STL.64 [R1], R2
@P0 BRA `(.L_x_4)
@P2 BRA `(.L_x_9)
EXIT
.L_x_9:
BRA `(.L_x_9)
""".strip().splitlines()


def test_loops_are_what_backward_branches_close_innermost_only():
    code = instructions_of(SASS)
    assert [code[slice(*a)][0] for a in loops_of(SASS)] == ["LDS R3", "HMMA.16816 R4", "HFMA2.MMA R7", "BRA `(.L_x_9)"]
    full, masked = tile_loops(SASS)
    assert code[slice(*full)] == ["HMMA.16816 R4", "HMMA.16816 R6", "@P0 BRA `(.L_x_3)"]
    assert len(code[slice(*masked)]) == 5 and "ISETP R5" in code[slice(*masked)]
    assert tile_loops(["MOV R1, R2"]) == (None, None)


def test_spilled_bytes_are_what_the_instructions_store_and_load():
    nvidia = ["STL [R1], R2", "@!P0 STL.64 [R1+0x4], R2", "LDL.LU.128 R4, [R1]", "STS.64 [R1], R2", "STL.U8 [R1], R2"]
    assert spilled_bytes(nvidia) == (13, 16)
    amd = ["scratch_store_dwordx2 off, v[0:1], s0", "scratch_load_dword v1, off, s0", "v_accvgpr_write_b32 a1, v2"]
    assert spilled_bytes(amd) == (8, 4)


@pytest.mark.parametrize(
    ("arch", "warps", "registers", "shared", "tensor_memory", "expected"),
    [
        ("sm_90", 8, 128, 1024, 0, 25),  # 2 blocks of 8 × 32 × 128 registers
        ("sm_90", 4, 32, 100_000, 0, 12),  # 2 blocks of shared memory
        ("sm_100", 8, 32, 1024, 0, 100),
        ("sm_100", 8, 32, 1024, 256, 25),  # 2 blocks of tensor memory
        ("gfx942", 4, 256, 65536, 0, 12),  # 1 block of shared memory, nothing reserved
        ("gfx942", 4, 512, 0, 0, 12),  # 1 wave a SIMD
    ],
)
def test_occupancy_is_the_scarcest_resource(arch, warps, registers, shared, tensor_memory, expected):
    assert occupancy(CHIPS[arch], warps, registers, shared, tensor_memory) == expected


def test_roofline_by_hand():
    # 4·128·64·64 / 4096 = 512 matrix cycles, 100 · 8 / 4 = 200 issue cycles, 128·64 / 16 = 512 of exponentials
    low, high = roofline(CHIPS["sm_90"], "forward+full", "128x64 w8 s3", 100, 64)
    assert (low, high) == (0.5, 1.0)
    low, high = roofline(CHIPS["sm_90"], "forward", "128x64 w8 s3", 512, 64)
    assert (low, high) == (512 / 1536, 0.5)
    assert roofline(CHIPS["gfx942"], "forward", "128x64 w4 s3", 100, 64) is None
    assert roofline(CHIPS["sm_90"], "delta", "64x w4 s3", 0, 64) is None


def test_the_baseline_holds_every_variant_and_keeps_the_promises():
    table = read_table(BASELINE)
    kernels = ("forward", "forward+statistics", "forward+full", "delta", "dq", "dkv", "received")
    sizes = list(itertools.product(("bf16", "fp16", "fp32"), ("32", "64", "96", "128")))
    masks = [(k, m) for k in kernels for m in ("document", "causal") if (k, m) != ("delta", "causal")]
    assert set(table) == {(a, *km, *size) for a in CHIPS for km in masks for size in sizes}
    for (arch, kernel, _, dtype, head_dim), line in table.items():
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


@pytest.mark.parametrize("mask", ["document", "causal"])
@pytest.mark.parametrize(("arch", "limit"), [("sm_80", 351), ("sm_90", 305)])
def test_statistics_cost_next_to_nothing(arch, limit, mask):
    table = read_table(BASELINE)
    plain, some = (table[arch, kernel, mask, "bf16", "64"] for kernel in ("forward", "forward+statistics"))
    assert plain["tiles"] == some["tiles"] and some["tiles"].startswith("128x64 ")
    assert int(some["full_loop"]) <= limit
    assert int(some["full_loop"]) <= 1.03 * int(plain["full_loop"])
    assert executed(some, 512) <= 1.07 * executed(plain, 512)


def test_a_worse_table_is_refused_with_every_reason():
    key = ("sm_90", "forward", "document", "bf16", "64")
    stored = read_table(BASELINE)
    good = {
        **stored[key],
        **{n: int(stored[key][n]) for n in ("shared", "matrix", "spilled", "full_loop", "masked_loop")},
    }
    assert violations([good], stored) == []
    worse = {
        "spilled": good["spilled"] + 4,
        "shared": 300_000,
        "matrix": 0,
        "full_loop": good["full_loop"] * 1.03,
        "masked_loop": good["full_loop"],
        "tiles": "64x64 w4 s2",
        "unit": "HMMA",
    }
    for name, value in worse.items():
        [message] = violations([{**good, name: value}], stored)
        assert message.startswith("sm_90 forward document bf16 64: expected ") and "found" in message
    assert "expected it to compile" in violations([{**good, "error": "OutOfResources: x"}], stored)[0]
    assert "--write" in violations([good], {})[0]


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
def test_the_kernels_compile_to_no_worse_than_the_baseline(arch, tmp_path, capsys):
    path = tmp_path / "table.csv"
    variants = ["--arch", arch, "--head_dim", "64", "--kernel", "forward+statistics", "dq", "dkv"]
    out = ["--csv", str(path), "--json", str(tmp_path / "table.json")]
    assert main(["kernels", *variants, "--check", *out]) == 0, capsys.readouterr().out
    assert [line["kernel"] for line in json.loads((tmp_path / "table.json").read_text())] == variants[-3:]
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
