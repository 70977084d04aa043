"""Ahead-of-time compiling: the counters on assembly written by hand, the check on a doctored table, and a few real
variants against the stored one. Compiling needs a process without Triton's interpreter: the command starts its own."""

import csv
import itertools
import json

import pytest

from sinkbed.kernels.triton.aot import (
    CHIPS,
    DTYPES,
    KERNELS,
    MASKS,
    SCORINGS,
    instructions_of,
    loops_of,
    spilled_bytes,
    tile_loops,
)
from sinkbed.train.cli.kernels import BASELINE, compile_all, read_table, violations
from sinkbed.train.cli.main import main

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


# Bytes that a lane spills, by head dim; what is not here spills nothing. Beside the table, because `--write` stores
# whatever it finds.
SPILLED = {
    "sm_80 dkv document bf16": {96: 36, 128: 32},
    "sm_80 dkv document fp16": {96: 36, 128: 32},
    "sm_80 dkv document fp32": {32: 36, 96: 8, 128: 8},
    "sm_80 forward+statistics document fp32": {96: 8},
    "sm_80 dkv causal bf16": {96: 24, 128: 20},
    "sm_80 dkv causal fp16": {96: 24, 128: 20},
    "sm_80 dkv causal fp32": {32: 20, 64: 16, 96: 8, 128: 8},
    "sm_89 dkv document bf16": {96: 36, 128: 32},
    "sm_89 dkv document fp16": {96: 36, 128: 32},
    "sm_89 dkv document fp32": {32: 16, 128: 8},
    "sm_89 dkv causal bf16": {96: 24, 128: 20},
    "sm_89 dkv causal fp16": {96: 24, 128: 20},
    "sm_89 dkv causal fp32": {32: 16, 96: 8, 128: 8},
    "sm_90 dkv document fp32": {32: 52, 64: 24, 96: 12, 128: 8},
    "sm_90 dq document fp32": {64: 8},
    "sm_90 dq causal fp32": {32: 36, 64: 20},
    "sm_90 dkv causal fp32": {32: 44, 128: 8},
    "sm_90 received causal fp32": {32: 4},
    "sm_100 delta document fp16": {64: 8},
    "sm_100 dkv document fp32": {32: 12, 64: 20, 96: 20, 128: 12},
    "sm_100 dq document fp32": {64: 32},
    "sm_100 dq causal fp32": {32: 36},
    "sm_100 dkv causal fp32": {32: 24, 96: 12, 128: 20},
    "gfx942 dkv document fp32": {96: 100, 128: 100},
    "gfx942 dkv causal fp32": {96: 56, 128: 56},
    "sm_80 dkv prefix_lm bf16": {64: 8, 128: 156},
    "sm_89 dkv prefix_lm bf16": {128: 152},
    "sm_90 dkv prefix_lm bf16": {128: 4},
    "sm_80 dkv softcap bf16": {128: 32},
    "sm_80 dkv alibi bf16": {128: 32},
    "sm_80 dkv sigmoid bf16": {128: 28},
    "sm_80 dkv softpick bf16": {128: 32},
    "sm_90 dq softcap bf16": {128: 8},
}


def test_the_baseline_holds_every_variant_and_spills_no_more_than_is_allowed():
    table = read_table(BASELINE)
    kernels = ("forward", "forward+statistics", "delta", "dq", "dkv", "received")
    sizes = list(itertools.product(("bf16", "fp16", "fp32"), ("32", "64", "96", "128")))
    expected = {
        (k, m, *s) for k in kernels for m in ("document", "causal") for s in sizes if (k, m) != ("delta", "causal")
    }
    expected |= {(k, "document", "bf16", "16") for k in kernels}
    expected |= {(k, "prefix_lm", "bf16", d) for k in kernels for d in ("32", "64", "128")}
    expected |= {("forward+statistics", "one_document", "bf16", d) for d in ("32", "64", "128")}
    scorings = itertools.product(("sm_80", "sm_90"), ("forward", "dq", "dkv"), SCORINGS, ("bf16",), ("64", "128"))
    assert set(table) == {(a, *rest) for a in CHIPS for rest in expected} | set(scorings)
    found: dict[str, dict[int, int]] = {}
    for (*names, head_dim), line in table.items():
        assert int(line["shared"]) <= CHIPS[names[0]].shared_block
        assert names[1] == "delta" or (
            int(line["matrix"]) > 0 and 0 < int(line["full_loop"]) < int(line["masked_loop"])
        )
        if int(line["spilled"]) > 0:
            found.setdefault(" ".join(names), {})[int(head_dim)] = int(line["spilled"])
    assert found == SPILLED


def test_what_training_runs_spills_nothing():
    for name, by_head_dim in SPILLED.items():
        arch, kernel, mask, dtype = name.split()
        promised = kernel in ("forward", "forward+statistics", "dq") or (kernel == "dkv" and arch == "sm_90")
        if promised and dtype != "fp32" and mask in ("document", "causal"):
            assert set(by_head_dim) <= {96}, name


def executed(line, length):
    """Instructions of a warp over the blocks of queries of one document."""
    queries, keys = map(int, line["tiles"].split()[0].split("x"))
    assert queries % keys == 0 and length % queries == 0
    full, masked = int(line["full_loop"]), int(line["masked_loop"])
    blocks, diagonal = length // queries, queries // keys
    tiles = sum(block * diagonal for block in range(blocks))
    return blocks * (int(line["total"]) - full - masked) + tiles * full + blocks * diagonal * masked


def test_what_statistics_cost_is_what_the_readme_says():
    """In instructions, bf16, D 32, 64 and 128: the loop over full tiles, and rows of one document of 512."""
    table = read_table(BASELINE)
    loop, row = [], []
    for arch, mask, head_dim in itertools.product(CHIPS, ("document", "causal"), ("32", "64", "128")):
        plain, measured = (table[arch, f"forward{k}", mask, "bf16", head_dim] for k in ("", "+statistics"))
        assert plain["tiles"] == measured["tiles"]
        loop.append(int(measured["full_loop"]) / int(plain["full_loop"]) - 1)
        row.append(executed(measured, 512) / executed(plain, 512) - 1)
    readme = (BASELINE.parent.parent / "README.md").read_text().replace("\n", " ")
    assert f"add at most {100 * max(loop):.0f} % to the loop over full tiles" in readme
    percent = f"{100 * min(row):.0f} to {100 * max(row):.0f} %"
    assert f"{percent} to the whole forward pass of one document at T 512" in readme
    assert int(table["sm_80", "forward+statistics", "document", "bf16", "64"]["full_loop"]) <= 351
    assert int(table["sm_90", "forward+statistics", "document", "bf16", "64"]["full_loop"]) <= 305


def test_a_worse_table_is_refused_with_every_reason():
    key = ("sm_90", "forward", "document", "bf16", "64")
    stored = read_table(BASELINE)
    good = {
        **stored[key],
        **{n: int(stored[key][n]) for n in ("shared", "matrix", "spilled", "full_loop")},
    }
    assert violations([good], stored) == []
    worse = {
        "spilled": good["spilled"] + 4,
        "shared": 300_000,
        "matrix": 0,
        "full_loop": good["full_loop"] * 1.03,
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
    ("sm_80", "dkv", "document", "fp16", 128),
    ("sm_80", "received", "causal", "bf16", 32),
    ("sm_89", "forward", "document", "fp16", 64),
    ("sm_90", "forward+statistics", "prefix_lm", "bf16", 64),
    ("sm_90", "dq", "causal", "bf16", 128),
    ("sm_90", "dkv", "prefix_lm", "bf16", 64),
    ("sm_90", "delta", "prefix_lm", "bf16", 128),
    ("sm_90", "dq", "document", "fp32", 32),
    ("sm_100", "forward+statistics", "one_document", "bf16", 64),
    ("gfx942", "dq", "document", "bf16", 96),
    ("sm_80", "dkv", "softcap", "bf16", 64),
    ("sm_90", "dq", "alibi", "bf16", 64),
    ("sm_90", "forward", "sigmoid", "bf16", 64),
    ("sm_90", "dkv", "softpick", "bf16", 64),
]


@pytest.mark.slow
def test_the_kernels_compile_to_no_worse_than_the_baseline():
    """Every chip, kernel, mask, dtype and head dim is in some variant; all of them are `sinkbed kernels --all`."""
    lines = compile_all([(*variant, None) for variant in COMPILED], workers=2)
    assert violations(lines, read_table(BASELINE)) == []
    for i, names in enumerate((tuple(CHIPS), KERNELS, MASKS, tuple(DTYPES), (32, 64, 96, 128))):
        assert {variant[i] for variant in COMPILED} == set(names)


def test_the_command_checks_and_writes_what_it_is_asked_for(tmp_path, capsys):
    path = tmp_path / "table.csv"
    kernels = ["forward+statistics", "received"]
    variants = ["--arch", "sm_90", "--head_dim", "16", "--kernel", *kernels]
    out = ["--csv", str(path), "--json", str(tmp_path / "table.json")]
    assert main(["kernels", *variants, "--check", *out]) == 0, capsys.readouterr().out
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
