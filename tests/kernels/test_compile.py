"""Ahead-of-time compiling: the counters on assembly written by hand, the check on a doctored table, and a few real
variants against the stored one. Compiling needs a process without Triton's interpreter: the command starts its own."""

import csv
import itertools
import json
import re

import pytest

from sinkbed.kernels.triton.aot import (
    CHIPS,
    DTYPES,
    KERNELS,
    MASKS,
    PRODUCTS,
    SCORINGS,
    busy_cycles,
    instructions_of,
    is_stored,
    loops_of,
    overwritten_operand,
    refuse,
    spilled_bytes,
    tile_loops,
)
from sinkbed.kernels.triton.tiles import HEAD_DIMS
from sinkbed.train.cli.kernels import TABLES, _derived, compile_all, read_table, stored_table, violations
from sinkbed.train.cli.main import main

STORED = {path.stem.removeprefix("baseline-"): read_table(path) for path in sorted(TABLES.glob("baseline-*.csv"))}
"""Tables by the version of Triton; that of torch's CUDA builds is the first, the newest the last."""
of_each_version = pytest.mark.parametrize("version", STORED)
with_a_table = pytest.mark.skipif(not stored_table().is_file(), reason="no stored table of this version of Triton")

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


# Bytes that a lane stores or loads for want of registers in a turn of the loops over tiles; what is not here, none.
# Beside the table, because `--write` stores whatever it finds.
IN_LOOPS = {
    "3.7.1": {
        "sm_80 forward causal bf16 128": 12,
        "sm_80 dkv+groups softcap bf16 64": 424,
        "sm_80 dkv+groups softpick bf16 64": 120,
        "sm_89 forward document bf16 128": 12,
        "sm_90 dq softcap bf16 64": 4,
    },
    "3.9.0": {
        "sm_80 forward prefix_lm bf16 128": 8,
        "sm_80 dkv+groups softcap bf16 64": 456,
        "sm_80 dkv+groups softpick bf16 64": 104,
        "sm_90 forward+statistics prefix_lm bf16 128": 4,
        "sm_90 dq softcap bf16 64": 88,
        "sm_90 dkv+groups softcap bf16 128": 8,
        "sm_90 forward alibi bf16 128": 56,
    },
}


@of_each_version
def test_the_baseline_holds_every_variant_and_spills_in_loops_only_what_is_allowed(version):
    table = STORED[version]
    variants = itertools.product(CHIPS, KERNELS, MASKS, DTYPES, HEAD_DIMS)
    reads_no_mask = ("delta", "one_document", "causal", *SCORINGS)
    assert set(table) == {
        (*map(str, v),) for v in variants if is_stored(*v) and not (v[1] == "delta" and v[2] in reads_no_mask)
    }
    in_loops = {}
    for names, line in table.items():
        assert int(line["shared"]) <= CHIPS[names[0]].shared_block
        assert names[1] == "delta" or (
            int(line["matrix"]) > 0 and 0 < int(line["full_loop"]) < int(line["masked_loop"])
        )
        if int(line["in_loops"]) > 0:
            in_loops[" ".join(names)] = int(line["in_loops"])
    assert in_loops == IN_LOOPS[version]


@of_each_version
@pytest.mark.parametrize(
    ("kernel", "head_dim", "most", "blocks"),
    [("dkv", "128", 600, 1), ("dkv+groups", "128", 600, 1), ("dkv", "64", 350, 2), ("dkv+groups", "64", 350, 2),
     ("forward", "64", 245, 2), ("forward+statistics", "64", 240, 2), ("forward", "128", 270, 1)],
)  # fmt: skip
def test_what_an_h100_trains_with_takes_few_instructions_and_spills_in_no_loop(version, kernel, head_dim, most, blocks):
    """Instructions that warps issue for 1,000 pairs, with a document mask; a few more with others."""
    for mask in ("document", "causal", "prefix_lm"):
        line = STORED[version]["sm_90", kernel, mask, "bf16", head_dim]
        assert 1000 * in_a_tile(line) <= most + 5 * (mask != "document")
        assert line["in_loops"] == "0"
        assert queries_at_a_time(line) == blocks * int(line["tiles"].partition("x")[0])


def test_an_operand_that_is_overwritten_before_the_wait_is_seen():
    """triton-lang/triton#11781: ptxas gave a product's A registers away while it was in flight."""
    product = "HGMMA.64x64x16.F32.BF16 R24, R4, gdesc[UR4], R24"
    wait = "WARPGROUP.DEPBAR.LE gsb0, 0x0"
    for other in ("MOV R6, R1", "@!P0 LDS.128 R4, [R9+0x10]", "LDSM.16.M88.4 R1, [R9]", "IMAD.WIDE R3, R1, R2, R5"):
        assert overwritten_operand([product, other, wait]) == (product, other)
    for other in ("LDS.128 R0, [R4]", "STS [R6], R5", "MOV R8, R4", "ISETP.GE.AND P0, PT, R4, R5, PT", "R2UR UR4, R4"):
        assert overwritten_operand([product, other, wait]) is None
    assert overwritten_operand([product, wait, "MOV R6, R1"]) is None


def test_code_that_is_wrong_or_whose_products_wait_for_one_another_is_refused():
    product, wait = "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24", "WARPGROUP.DEPBAR.LE gsb0, 0x0"
    back = "@P0 BRA `(.L_x_1)"
    for right in ([product, product, wait], [product, wait]):
        refuse([".L_x_1:", *right, back, product, wait])
    with pytest.raises(RuntimeError, match="serialized"):
        refuse([".L_x_1:", *[product, wait] * 2, back])
    with pytest.raises(RuntimeError, match="miscompiled"):
        refuse([".L_x_1:", "HGMMA.64x64x16.F32.BF16 R24, R4, gdesc[UR4], R24", "MOV R6, R1", wait, back])


def test_cycles_of_units_are_those_of_the_instructions():
    code = [
        "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0",  # of four warps; A and B from shared memory
        "@P0 HGMMA.64x64x16.F32.BF16 R8, R4, gdesc[UR4], R8",  # A from registers
        "MUFU.EX2 R1, R2",
        "@!P0 LDS.128 R4, [R9]",
        "STS [R6], R5",
        "LDGSTS.E.BYPASS.128 [R1], [R2.64]",
        "LDSM.16.MT88.4 R1, [R9]",
        "LDSM.16.M88 R1, [R9]",
        "STSM.16.M88.2 [R9], R1",
        "@P1 STS.64 [R9], R1",
        "LDGSTS.E.BYPASS.128.ZFILL [R1], [R2.64]",
        "LDGDEPBAR",
        "HFMA2.MMA R7",
    ]
    shared = 2 * (128 * 16 + 64 * 16 + 64 * 16) * 2 + 8 * (
        512 + 128 + 512 + 512 + 128 + 256 + 256 + 512
    )  # bytes, of eight warps
    products = 2 * 2 * 64 * (128 + 64) * 16
    assert busy_cycles(code, 8, CHIPS["sm_90"]) == {
        "special_cycles": 8 * 32 // 16, "shared_cycles": shared // 128, "matrix_cycles": products // 4096
    }  # fmt: skip
    of_a_warp = busy_cycles(["HMMA.16816.F32.BF16 R4, R8, R12, R4"] * 4, 4, CHIPS["sm_80"])
    assert of_a_warp == {"special_cycles": 0, "shared_cycles": 0, "matrix_cycles": 4 * 4 * 2 * 16 * 8 * 16 // 2048}
    assert not any(busy_cycles(code, 8, CHIPS["sm_100"]).values())
    assert not any(busy_cycles(["HMMA.1684.F32.TF32 R4, R8, R12, R4", "LDS R1"], 8, CHIPS["sm_80"]).values())


@of_each_version
def test_matrix_units_are_as_busy_as_the_products_of_a_tile_keep_them(version):
    """So no product of 16 bits is left uncounted, nor one of padding counted."""
    counted = 0
    for (arch, kernel, _, dtype, head_dim), line in STORED[version].items():
        if kernel == "delta" or dtype == "fp32" or not CHIPS[arch].products or int(head_dim) & (int(head_dim) - 1):
            continue
        queries, keys = map(int, line["tiles"].split()[0].split("x"))
        work = PRODUCTS[kernel.partition("+")[0]] * 2 * queries * keys * int(head_dim)
        rate = CHIPS[arch].products * (CHIPS[arch].hmma_share if line["unit"] == "HMMA" else 1)
        assert int(line["matrix_cycles"]) == round(work / rate), line
        counted += 1
    assert counted > 100


@pytest.mark.parametrize(
    ("tile", "message"),
    [
        ((64, 64, 4, 0), "expected STAGES of 1 to 16, got 0"),
        ((64, 8, 4, 2), "expected N as a power of two, 16 to 256, got 8"),
        ((48, 64, 4, 2), "expected M as a power of two, 16 to 256, got 48"),
        ((64, 64, 3, 2), "expected WARPS as a power of two, 1 to 16, got 3"),
    ],
)
def test_tiles_that_no_compiler_takes_are_refused(tile, message, capsys):
    assert main(["kernels", "--tiles", *map(str, tile)]) == 1
    assert f"--tiles: {message}" in capsys.readouterr().err


def test_an_estimate_is_left_out_where_the_cycles_do_not_hold():
    line = {
        "arch": "sm_80", "kernel": "forward", "tiles": "128x64 w4 s2", "registers": 255, "shared": 49152, "in_loops": 0,
        "full_loop": 647, "head_dim": 64, "special_cycles": 544, "shared_cycles": 780, "matrix_cycles": 1024,
    }  # fmt: skip
    assert _derived(line)[1:] == ("647/544/780/1024", "51 %", "2")
    assert _derived({**line, "in_loops": 4})[2] == ""
    assert _derived({**line, "tiles": "128x64 w1 s2", "shared": 160_000})[2:] == ("", "1")


def executed(line, length):
    """Instructions of all warps over the blocks of queries of one document."""
    queries, keys, warps = map(int, re.findall(r"\d+", line["tiles"])[:3])
    full, masked = int(line["full_loop"]), int(line["masked_loop"])
    first_queries = range(0, length, queries)
    whole = sum((i + 1) // keys for i in first_queries)
    partly = sum(-(-(i + queries) // keys) for i in first_queries) - whole
    return warps * (len(first_queries) * (int(line["total"]) - full - masked) + whole * full + partly * masked)


def test_versions_differ_by_what_the_readme_says():
    """In the loop over full tiles."""
    first, last = STORED.values()
    changes = {"sm_80": 0.0, "sm_90": 0.0}
    for names, line in last.items():
        assert line["tiles"] == first[names]["tiles"]
        if names[0] in changes and names[1] != "delta":
            change = abs(int(first[names]["full_loop"]) / int(line["full_loop"]) - 1)
            changes[names[0]] = max(changes[names[0]], change)
    readme = (TABLES.parent / "README.md").read_text().replace("\n", " ")
    assert f"by at most {100 * changes['sm_80']:.0f} % on sm_80, {100 * changes['sm_90']:.0f} % on sm_90" in readme


def in_a_tile(line):
    """Instructions of all warps for a query and a key of a full tile."""
    queries, keys, warps = map(int, re.findall(r"\d+", line["tiles"])[:3])
    return int(line["full_loop"]) * warps / (queries * keys)


def queries_at_a_time(line):
    """Of the blocks on a multiprocessor."""
    queries, _, warps = map(int, re.findall(r"\d+", line["tiles"])[:3])
    return queries * CHIPS[line["arch"]].blocks(int(line["registers"]), warps, int(line["shared"]))


def test_what_statistics_cost_is_what_the_readme_says():
    """In instructions, bf16: the loop over full tiles, and rows of one document of 512."""
    loop, row = [], []
    lines = [(table, names, plain) for table in STORED.values() for names, plain in table.items()]
    for table, (arch, kernel, mask, dtype, head_dim), plain in lines:
        if kernel == "forward" and mask in ("document", "causal") and dtype == "bf16" and head_dim != "16":
            measured = table[arch, "forward+statistics", mask, dtype, head_dim]
            loop.append(in_a_tile(measured) / in_a_tile(plain) - 1)
            row.append(executed(measured, 512) / executed(plain, 512) - 1)
            four_warps = arch in ("sm_80", "sm_89") and head_dim in ("96", "128")  # instead of eight
            gains = (arch, head_dim) == ("sm_100", "64") and table is STORED["3.7.1"]
            assert queries_at_a_time(plain) == (2 if four_warps else 0.5 if gains else 1) * queries_at_a_time(measured)
    readme = (TABLES.parent / "README.md").read_text().replace("\n", " ")
    assert f"add at most {100 * max(loop):.0f} % to the loop over full tiles" in readme
    percent = f"{100 * min(row):.0f} to {100 * max(row):.0f} %"
    assert f"{percent} to the whole forward pass of one document at T 512" in readme


def test_a_worse_table_is_refused_with_every_reason():
    key = ("sm_90", "forward", "document", "bf16", "64")
    stored = STORED[max(STORED)]
    good = {
        **stored[key],
        **{n: int(stored[key][n]) for n in ("matrix", "spilled", "in_loops", "full_loop", "shared_cycles")},
    }
    assert violations([good], stored) == []
    worse = {
        "spilled": good["spilled"] + 4,
        "in_loops": good["in_loops"] + 4,
        "matrix": 0,
        "full_loop": good["full_loop"] * 1.03,
        "shared_cycles": good["shared_cycles"] * 1.03,
        "tiles": "64x64 w4 s2",
        "unit": "HMMA",
    }
    for name, value in worse.items():
        [message] = violations([{**good, name: value}], stored)
        assert message.startswith("sm_90 forward document bf16 64: expected ") and "got" in message
    assert "expected it to compile" in violations([{**good, "error": "OutOfResources: x"}], stored)[0]
    assert "--write" in violations([good], {})[0]


COMPILED = [
    ("sm_80", "forward+statistics", "document", "bf16", 64),
    ("sm_80", "dkv+groups", "causal", "bf16", 128),
    ("sm_80", "received", "document", "bf16", 32),
    ("sm_89", "forward", "document", "bf16", 64),
    ("sm_90", "forward+statistics", "prefix_lm", "bf16", 64),
    ("sm_90", "dq", "causal", "bf16", 128),
    ("sm_90", "dkv", "prefix_lm", "bf16", 64),
    ("sm_90", "dq", "document", "fp16", 64),
    ("sm_90", "dq", "document", "fp32", 64),
    ("sm_90", "forward+statistics", "one_document", "bf16", 64),
    ("sm_90", "delta", "document", "bf16", 16),
    ("sm_100", "dkv+groups", "document", "bf16", 64),
    ("gfx942", "dq", "document", "bf16", 128),
    ("sm_80", "dkv+groups", "softcap", "bf16", 64),
    ("sm_80", "dq", "document", "bf16", 96),
    ("sm_90", "dq", "alibi", "bf16", 64),
    ("sm_90", "forward", "sigmoid", "bf16", 64),
    ("sm_90", "dkv+groups", "softpick", "bf16", 64),
    ("sm_100", "dq", "document", "bf16", 256),
]


@pytest.mark.slow
@with_a_table
def test_the_kernels_compile_to_no_worse_than_the_baseline():
    """Every chip, kernel, mask, dtype and head dim is in some variant; all of them are `sinkbed kernels --all`."""
    lines = compile_all([(*variant, None) for variant in COMPILED], workers=2)
    assert violations(lines, read_table(stored_table())) == []
    for i, names in enumerate((tuple(CHIPS), KERNELS, MASKS, tuple(DTYPES), HEAD_DIMS)):
        assert {variant[i] for variant in COMPILED} == set(names)


@pytest.mark.slow
@with_a_table
def test_the_command_checks_and_writes_what_it_is_asked_for(tmp_path, capsys):
    path = tmp_path / "table.csv"
    kernels = ["forward+statistics", "received"]
    variants = ["--arch", "sm_90", "--head_dim", "16", "--kernel", *kernels]
    out = ["--csv", str(path), "--json", str(tmp_path / "table.json")]
    assert main(["kernels", *variants, "--check", *out]) == 0, capsys.readouterr().out
    assert "2 variants, none worse than in" in capsys.readouterr().out
    assert [line["kernel"] for line in json.loads((tmp_path / "table.json").read_text())] == kernels
    with path.open() as file:
        lines = list(csv.DictReader(file))
    assert [line["kernel"] for line in lines] == kernels
    assert int(lines[1]["full_loop"]) > 50 and int(lines[1]["masked_loop"]) > int(lines[1]["full_loop"])


def test_wrong_requests_are_one_message(tmp_path, capsys):
    assert main(["kernels", "--check", str(tmp_path / "nowhere.csv")]) == 1
    assert "expected a table of `sinkbed kernels --write`, got no file" in capsys.readouterr().err
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    assert main(["kernels", "--check", str(tmp_path / "other.csv")]) == 1
    assert "got other columns" in capsys.readouterr().err
    assert main(["kernels", "--write", "--tiles", "64", "64", "4", "2"]) == 1
    assert "leave one of them out" in capsys.readouterr().err
