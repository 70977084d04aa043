"""The compiled kernels, run without a GPU by `tests.support.ptx`, with a GPU's own tiles against the float64 reference.

`--every_kernel` takes every dtype, head dim, mask and scoring with every other, on both chips: 2,124 cases, some hours.
"""

import functools
import itertools
import re

import pytest
import torch

from sinkbed.kernels import attention, available, interval_mask
from sinkbed.kernels.triton.tiles import HEAD_DIMS, tiles
from tests.kernels.test_gpu import assert_near, drawn
from tests.support.masks import MASKS, boundaries
from tests.support.ptx import Fault
from tests.support.ptx_launch import Compiler, running_on
from tests.support.scorings import SCORINGS, scoring

pytestmark = pytest.mark.skipif("triton" not in available("cpu"), reason="without a GPU only")
CHIPS = ("sm_80", "sm_90")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LENGTHS = {"bf16": [290, 1, 20, 9], "fp16": [290, 1, 20, 9], "fp32": [100, 1, 29]}
"""Of documents, by dtype: the first has full tiles in every kernel; no T is a multiple of a tile."""


@pytest.fixture(scope="module")
def compiler(tmp_path_factory):
    compiler = Compiler(tmp_path_factory.mktemp("triton"))
    yield compiler
    compiler.worker.shutdown()


@pytest.fixture(autouse=True)
def unwritten_outputs_are_nan():
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN
    yield
    torch.use_deterministic_algorithms(False)


def masked(name, dtype="bf16"):
    start, end = boundaries(LENGTHS[dtype])
    return interval_mask(1, start.shape[1], doc_start=start, doc_end=end, **MASKS[name](start, end))


def check_mask(compiler, arch, dtype, D, name, groups, sink, **settings):
    """Output, every statistic, column sums and every gradient."""
    inputs = drawn(1, 2, 2 // groups, sum(LENGTHS[dtype]), D, DTYPES[dtype], "cpu")
    logit = [torch.tensor([-2.0, 1.25])] if sink else []
    with running_on(arch, compiler, **settings):
        assert_near(DTYPES[dtype], masked(name, dtype), inputs, *logit, floor=5e-5 if dtype == "fp32" else 2e-3)


def check_scoring(compiler, arch, dtype, D, name, **settings):
    inputs, arguments = drawn(1, 2, 1, sum(LENGTHS[dtype]), D, DTYPES[dtype], "cpu"), scoring(**SCORINGS[name])
    mask, floor = masked("document, first position shared", dtype), 1e-4 if dtype == "fp32" else 2e-3
    with running_on(arch, compiler, **settings):
        assert_near(DTYPES[dtype], mask, inputs, floor=floor, **arguments)


@pytest.mark.parametrize("arch", [pytest.param("sm_80", marks=pytest.mark.slow), "sm_90"])
def test_values_statistics_and_gradients_equal_the_float64_reference(compiler, arch):
    check_mask(compiler, arch, "bf16", 64, "document, first position shared", groups=2, sink=True, lanes=32)


SIZES = [("fp16", 128), *(("bf16", D) for D in HEAD_DIMS[::-1]), ("fp32", 32)]  # the first masks have full tiles
# Each chip has every size with one mask, and with or without groups and a sink; the two have every mask.
MASKED = [
    (arch, size, name, 1 + i % 2)
    for arch, names in zip(CHIPS, (list(MASKS), list(MASKS)[::-1]), strict=True)
    for i, (size, name) in enumerate(zip(SIZES, names, strict=False))
]


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "size", "name", "groups"), MASKED)
def test_every_mask_dtype_and_head_dim(compiler, arch, size, name, groups):
    check_mask(compiler, arch, *size, name, groups, sink=groups == 1)


SCORED = ("softcap", "ALiBi", "sigmoid", "elu, normalized", "softpick, softcap, ALiBi", "sigmoid, softcap, ALiBi")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "arch"), zip(SCORED, CHIPS * 3, strict=True))
def test_scorings_of_every_kind(compiler, arch, name):
    check_scoring(compiler, arch, "bf16", 64, name, late=False)


def pytest_generate_tests(metafunc):
    if "kind" in metafunc.fixturenames:
        masked = itertools.product(MASKS, (1, 2), (False, True))
        kinds = [
            *(pytest.param(kind, id=f"{kind[0]}, G {kind[1]}{', sink' * kind[2]}") for kind in masked),
            *(pytest.param((name,), id=name) for name in SCORINGS),
        ]
        every = metafunc.config.getoption("every_kernel")
        none = [pytest.param(None, marks=pytest.mark.skip("long: --every_kernel"))]
        for name, values in {"arch": CHIPS, "dtype": DTYPES, "D": HEAD_DIMS, "kind": kinds}.items():
            metafunc.parametrize(name, values if every else none)


def test_everything_with_everything(compiler, arch, dtype, D, kind):
    (check_scoring if kind[0] in SCORINGS else check_mask)(compiler, arch, dtype, D, *kind, lanes=32)


@pytest.mark.slow
def test_statistics_in_tiles_of_other_warps_change_no_bit_of_the_output(compiler):
    """D 128 on sm_80: a plain forward pass has four warps, one with statistics eight."""
    plain, measured = (tiles("sm_80", kernel, 2, 128) for kernel in ("forward", "forward+statistics"))
    assert plain.warps != measured.warps and plain[:2] == measured[:2]
    inputs, mask = drawn(1, 2, 1, sum(LENGTHS["bf16"]), 128, torch.bfloat16, "cpu"), masked("document")
    with running_on("sm_80", compiler):
        without, beside = (
            attention(*inputs, mask, statistics=statistics, implementation="triton") for statistics in (False, True)
        )
    assert torch.equal(without.output, beside.output) and torch.equal(without.lse, beside.lse)


@pytest.mark.slow
def test_statistics_change_no_bit_of_the_output_and_neither_does_the_order_of_warps(compiler):
    inputs, mask = drawn(1, 1, 1, sum(LENGTHS["bf16"]), 64, torch.bfloat16, "cpu"), masked("document")
    outputs = []
    for statistics, settings in ((False, {}), (True, {}), (True, dict(lanes=32, seed=1)), (True, dict(late=False))):
        with running_on("sm_90", compiler, **settings):
            out = attention(*inputs, mask, statistics=statistics, implementation="triton")
        outputs.append((out.output, out.lse))
    assert all(torch.equal(a, b) for other in outputs[1:] for a, b in zip(outputs[0], other, strict=True))


# Faults put in on purpose


class Runs:
    """A forward pass on `arch` with something changed in its code."""

    def __init__(self, compiler, arch):
        self.compiler, self.arch = compiler, arch
        self.inputs, self.mask = drawn(1, 1, 1, sum(LENGTHS["bf16"]), 64, torch.bfloat16, "cpu"), masked("document")
        self.code = ""
        self.right = self.output(self.keep)

    def keep(self, name, code):
        self.code = code
        return code

    def output(self, change, **settings):
        with running_on(self.arch, self.compiler, change=change, **settings):
            return attention(*self.inputs, self.mask, statistics=True, implementation="triton").output

    def notices(self, code, **settings):
        """The fault, or whether the output differs."""
        assert code != self.code
        try:
            return not torch.equal(self.output(lambda *_: code, **settings), self.right)
        except Fault as fault:
            return str(fault)

    def without(self, pattern):
        """The code with each of the matches removed, one at a time."""
        for match in re.finditer(pattern, self.code):
            yield self.code[: match.start()] + self.code[match.end() :]


@pytest.fixture(scope="module")
def runs(compiler):
    return functools.cache(lambda arch: Runs(compiler, arch))


BARRIER, COPIED = r"bar\.sync\s+0;", r"cp\.async\.wait_group\s+\d+;"


@pytest.mark.parametrize(("arch", "pattern", "unnoticed"), [
    ("sm_90", BARRIER, 5), ("sm_90", r"wgmma\.wait_group\S*\s+\d+;", 0), ("sm_90", r"fence\.proxy\S*;", 2),
    pytest.param("sm_80", BARRIER, 5, marks=pytest.mark.slow), pytest.param("sm_80", COPIED, 2, marks=pytest.mark.slow),
    pytest.param("sm_90", COPIED, 2, marks=pytest.mark.slow),
])  # fmt: skip
def test_what_is_removed_is_missed(runs, arch, pattern, unnoticed):
    """But for what nothing hangs on: behind the last tile, or twice in a row."""
    noticed = [runs(arch).notices(code, lanes=32) for code in runs(arch).without(pattern)]
    assert len(noticed) > unnoticed and noticed.count(False) <= unnoticed


@pytest.mark.parametrize(("arch", "pattern", "replacement", "reason"), [
    # The layout field of a matrix descriptor: 64 instead of 128 bytes.
    ("sm_90", r"or\.b64(\s+\S+ \S+) 46116862\d+;", rf"or.b64\1 {(2 << 62) + (64 << 32) + (1 << 16)};", None),
    ("sm_80", r"xor\.b32(\s+%r\d+, %r\d+,) 64;", r"xor.b32\1 32;", None),
    ("sm_90", r"(ld\.global\S+ .*?\+) 0 \]", r"\1 2097152 ]", "in no tensor"),
    ("sm_90", r"(cp\.async\.cg\S+ \[.*?\], \[.*?\+) 0 \]", rf"\1 {sum(LENGTHS['bf16']) * 128 - 2048} ]", "(thread"),
    ("sm_90", r"(wgmma\.mma_async[^{]*\{[^}]*\}, \{(%r\d+).*;)", r"\1\nmov.b32 \2, 0;", "overwritten"),
])  # fmt: skip
def test_a_wrong_swizzle_address_or_operand_is_noticed(runs, arch, pattern, replacement, reason):
    noticed = runs(arch).notices(re.sub(pattern, replacement, runs(arch).code, count=1))
    assert noticed is True if reason is None else reason in noticed
