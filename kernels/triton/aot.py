"""Compiles the kernels ahead of time for GPUs that need not be here, and counts what the compilers made of them.

The launches are the wrapper's own: a driver that only names a target stands in for the GPU, so tiles, dtypes and
specialisation are those of a real call. What is counted is static: no time is measured.

A kernel has two loops over tiles, one with the mask and one without. In the assembly a loop is what a backward branch
closes; of the innermost loops those with the most matrix instructions are these two, and the shorter one is the loop
over full tiles (the loop of the statistics multiplies 16 keys and has fewer). Waits for asynchronous copies and
products are loops of two instructions that the compilers put behind the kernel's end.
"""

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from sinkbed.kernels.normalizers import Fused
from sinkbed.kernels.triton import kernels as triton_kernels
from sinkbed.kernels.triton import op
from sinkbed.kernels.triton.tiles import Tiles, override

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SCORINGS = ("softcap", "alibi", "sigmoid", "softpick")
MASKS = ("document", "causal", "prefix_lm", "one_document", *SCORINGS)
"""`document` and `causal`; `prefix_lm`: a prefix LM within documents, a learned sink, a gradient of lse and a T that
is no multiple of 16; `one_document`: causal, with such a T and statistics of rows without documents; `softcap` to
`softpick`: `document`, with that scoring."""
KERNELS = ("forward", "forward+statistics", "delta", "dq", "dkv", "dkv+groups", "received")
"""`dkv`: a key head for every query head; `dkv+groups`: one for two."""
PRODUCTS = {"forward": 2, "dq": 3, "dkv": 4, "received": 1}
"""Matrix products of a tile of queries and keys, each of 2·M·N·D operations."""
# The opcode and no modifier: HFMA2.MMA moves a constant.
_GUARD = r"(?:@!?U?P\w+\s+)?"
_MATRIX = re.compile(_GUARD + r"((?:[HIDQO]|[HIQ]G|UTC[HIQO])MMA|v_mfma)(?![A-Z0-9])")
_GROUP_PRODUCT = re.compile(_GUARD + r"HGMMA\.64x(\d+)x16\.\S+\s+R\d+, (gdesc|R)")
_WARP_PRODUCT = re.compile(_GUARD + r"HMMA\.168(8|16)\.F32(?:\.BF16)?\s")
_MATRICES = re.compile(_GUARD + r"(?:LDSM|STSM)\.16\.MT?88(?:\.([24]))?")
_SHARED = re.compile(_GUARD + r"(?:LDS|STS|LDGSTS)(?:\.(?:(64|128)\b|\w+))*\s")
_SPECIAL = re.compile(_GUARD + r"MUFU\b")
_LOCAL = re.compile(_GUARD + r"(?:(?P<store>STL|scratch_store)|LDL|scratch_load)(?P<width>\S*)")


@dataclass(frozen=True)
class Chip:
    """A GPU to compile for."""

    backend: str
    arch: int | str
    shared_block: int
    """Bytes of shared memory that one block may have."""
    warp_size: int = 32
    shared_sm: int = 0
    """Bytes of shared memory of a multiprocessor; 0 where `blocks` is not known."""
    warps_sm: int = 64
    """Warps of a multiprocessor at most."""
    products: int = 0
    """Operations of 16-bit matrix products that a multiprocessor does in a cycle; 0 where cycles are not counted."""
    hmma_share: float = 1.0
    """The part of `products` that a product of one warp reaches where there are those of four (HMMA and HGMMA)."""

    def blocks(self, registers: int, warps: int, shared: int) -> int:
        """Blocks that a multiprocessor holds at a time, by its 65,536 registers, its shared memory and its warps
        (CUDA C++ Programming Guide, compute capabilities); 0: not known."""
        by_registers = 65_536 // (-(-registers // 8) * 8 * 32 * warps)
        return min(by_registers, self.shared_sm // (shared + 1024), self.warps_sm // warps)


CHIPS = {
    "sm_80": Chip("cuda", 80, 166912, shared_sm=167936, products=2048),
    "sm_89": Chip("cuda", 89, 101376, shared_sm=102400, warps_sm=48),
    "sm_90": Chip("cuda", 90, 232448, shared_sm=233472, products=4096, hmma_share=0.629),  # arXiv 2402.13499
    "sm_100": Chip("cuda", 100, 232448, shared_sm=233472),
    "gfx942": Chip("hip", "gfx942", 65536, warp_size=64),
}


@dataclass(frozen=True, order=True)
class Variant:
    """One thing to compile."""

    arch: str
    kernel: str
    mask: str
    """One of MASKS."""
    dtype: str
    head_dim: int


@dataclass(frozen=True)
class Counts:
    """What the compiler made of a variant."""

    tiles: str
    """queries × keys, warps, stages."""
    registers: int
    """A lane; on AMD with the accumulation registers."""
    spilled: int
    """Bytes a lane stores in memory for want of registers, by the code's instructions, each counted once. What AMD
    moves to accumulation registers is no spill."""
    reloaded: int
    """Bytes a lane loads again, counted in the same way."""
    in_loops: int
    """Bytes that a lane stores or loads for want of registers in a turn of each of the loops over tiles."""
    shared: int
    """Bytes a block."""
    unit: str
    """The matrix instruction: `HMMA` (a warp's), `HGMMA` (four warps', sm_90), `UTCHMMA` (tensor memory, sm_100),
    `v_mfma` (AMD)."""
    matrix: int
    """Matrix instructions in the loop over full tiles; in the whole kernel where it has no such loop."""
    full_loop: int
    """Instructions a warp issues for a full tile; 0 without such a loop."""
    masked_loop: int
    """The same for a masked tile."""
    total: int
    """Instructions of the kernel's code."""
    special_cycles: int
    """Cycles for which a full tile keeps the units of exponentials of a multiprocessor busy; see `busy_cycles`."""
    shared_cycles: int
    """The same of its shared memory, read or written, also by matrix products and copies."""
    matrix_cycles: int
    """The same of its matrix units."""


class _Target:
    """Stands in for Triton's driver: names a target, owns no device."""

    def __init__(self, chip: Chip, number: int) -> None:
        self.target = GPUTarget(chip.backend, chip.arch, chip.warp_size)
        self.number = number

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.number  # Triton caches per device

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def stand_in(arch: str) -> Chip:
    """Compile for `arch`, one of CHIPS, from here on in this process.

    Raises RuntimeError in Triton's interpreter, where nothing compiles.
    """
    if op.interpreted():
        raise RuntimeError("compiling: expected a process without TRITON_INTERPRET, got one with it")
    chip = CHIPS[arch]
    triton.runtime.driver.set_active(_Target(chip, 1 + list(CHIPS).index(arch)))
    return chip


class _Recorder:
    """A kernel that compiles where it would be launched, or does nothing where it is not asked for."""

    def __init__(self, kernel: Any, compiled: list[Any] | None) -> None:
        self.kernel = kernel
        self.compiled = compiled

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*arguments: Any, **options: Any) -> None:
            if self.compiled is not None:
                self.compiled.append((self.kernel.warmup(*arguments, grid=(1,), **options), options))

        return launch


def compile_variant(variant: Variant, tiles: Tiles | None = None) -> Counts:
    """Compile one variant, through the wrapper's own launch.

    Raises RuntimeError in Triton's interpreter, where nothing compiles, and whatever the compiler raises.
    """
    chip = stand_in(variant.arch)
    name = variant.kernel.split("+")[0]
    compiled: list[Any] = []
    originals = {n: getattr(triton_kernels, f"{n}_kernel") for n in ("forward", "delta", "dq", "dkv", "received")}
    if tiles is not None:
        override[name] = tiles
    try:
        for n, kernel in originals.items():
            setattr(triton_kernels, f"{n}_kernel", _Recorder(kernel, compiled if n == name else None))
        _launch(variant)
    finally:
        override.pop(name, None)
        for n, kernel in originals.items():
            setattr(triton_kernels, f"{n}_kernel", kernel)
    [(kernel, options)] = compiled
    return _count(kernel, options, chip)


def is_stored(arch: str, kernel: str, mask: str, dtype: str, head_dim: int) -> bool:
    """Whether the stored table has this variant: on two chips what differs in kind, on others a document mask."""
    central, common = arch in ("sm_80", "sm_90"), head_dim in (64, 128)
    if mask == "document":
        return (dtype == "bf16" and (central or common or head_dim == 256)) or (central and head_dim == 64)
    of_mask = {"one_document": kernel == "forward+statistics", "causal": kernel != "delta"}  # which reads no mask
    of_mask |= dict.fromkeys(SCORINGS, kernel in ("forward", "dq", "dkv+groups"))
    return central and common and dtype == "bf16" and of_mask.get(mask, True)


def _launch(variant: Variant) -> None:
    T = 761 if variant.mask in ("prefix_lm", "one_document") else 256
    heads = (4, 4 if variant.kernel == "dkv" else 2)
    q, k = (torch.zeros(1, h, T, variant.head_dim, dtype=DTYPES[variant.dtype]) for h in heads)
    interval, lse = torch.zeros(1, T, dtype=torch.int32), torch.zeros(1, 4, T)
    prefix_lm = variant.mask == "prefix_lm"
    first_key = last_query = None if variant.mask in ("causal", "one_document") else interval
    end_key = first_query = interval if prefix_lm else None  # None: the diagonal
    ends = (first_key, end_key, first_query, last_query)
    sink_logit = torch.zeros(4) if prefix_lm else None
    slopes = torch.zeros(4) if variant.mask == "alibi" else None
    softcap = 50.0 if variant.mask == "softcap" else None
    scale = variant.head_dim**-0.5
    scoring = (scale, softcap, *Fused(variant.mask if variant.mask in ("sigmoid", "softpick") else "softmax"))
    if variant.kernel.startswith("forward"):
        statistics = "+" in variant.kernel
        docs = interval if statistics and variant.mask != "one_document" else None
        op._forward(q, k, k, *ends, docs, docs, sink_logit, slopes, 0, 0, *scoring, statistics)
    elif variant.kernel == "received":
        op._received(q, k, lse, first_query, last_query, 0, 0, scale)
    else:
        grad_lse = lse if prefix_lm else None
        op._backward_kernels(q, grad_lse, q, k, k, q, lse, *ends, sink_logit, slopes, 0, 0, *scoring)


def _count(kernel: Any, options: dict[str, Any], chip: Chip) -> Counts:
    registers, lines = machine_code(kernel) if chip.backend == "cuda" else _amd(kernel)
    metadata = kernel.metadata
    spilled, reloaded = spilled_bytes(lines)
    full, masked = tile_loops(lines)
    code = instructions_of(lines)
    refuse(lines)
    units = [match[1] for line in code[slice(*full) if full else slice(None)] if (match := _MATRIX.match(line))]
    return Counts(
        tiles=f"{options.get('BLOCK_M')}x{options.get('BLOCK_N', '')} w{metadata.num_warps} s{metadata.num_stages}",
        registers=registers,
        spilled=spilled,
        reloaded=reloaded,
        in_loops=sum(sum(spilled_bytes(code[slice(*loop)])) for loop in (full, masked) if loop),
        shared=metadata.shared,
        unit=units[0] if units else "",
        matrix=len(units),
        full_loop=full[1] - full[0] if full else 0,
        masked_loop=masked[1] - masked[0] if masked else 0,
        total=len(code),
        **busy_cycles(code[slice(*full)] if full else [], metadata.num_warps, chip),
    )


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def machine_code(kernel: Any) -> tuple[int, list[str]]:
    """Registers a lane, and the SASS: a label or an instruction a line."""
    knobs = triton.knobs.nvidia
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder, "kernel.cubin")
        binary.write_bytes(kernel.asm["cubin"])
        usage = _run(knobs.cuobjdump.path, "--dump-resource-usage", str(binary))
        sass = _run(knobs.nvdisasm.path, "-c", str(binary))
    registers = re.search(r"REG:(\d+)", usage)
    assert registers is not None
    return int(registers[1]), sass_lines(sass)


def sass_lines(text: str) -> list[str]:
    """A label or an instruction a line, of what nvdisasm prints."""
    return _listing(text, r"\s*(\.L_x_\d+):", r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);")


def _amd(kernel: Any) -> tuple[int, list[str]]:
    """Vector registers a lane, and the assembly: a label or an instruction a line."""
    text = kernel.asm["amdgcn"]
    registers = re.search(r"\.vgpr_count:\s+(\d+)", text)
    assert registers is not None
    return int(registers[1]), _listing(text, r"(\.LBB\w+):", r"\t([a-z]\w+(?:\s[^;]*)?)(?:;|$)")


def _listing(text: str, label: str, instruction: str) -> list[str]:
    """A label, with its colon, or an instruction a line, where they match the patterns."""
    lines = []
    for line in text.splitlines():
        if match := re.match(label, line):
            lines.append(f"{match[1]}:")
        elif match := re.match(instruction, line):
            lines.append(match[1].strip())
    return lines


def spilled_bytes(lines: list[str]) -> tuple[int, int]:
    """Bytes that a lane stores in and loads from memory of its own, as `ptxas -v` counts them."""
    total = {True: 0, False: 0}
    for access in filter(None, map(_LOCAL.match, lines)):
        bits = re.search(r"\.[SU]?(8|16|64|128)\b", access["width"])
        words = re.search(r"dwordx(\d)", access["width"])
        total[bool(access["store"])] += int(bits[1]) // 8 if bits else 4 * int(words[1]) if words else 4
    return total[True], total[False]


def busy_cycles(code: list[str], warps: int, chip: Chip) -> dict[str, int]:
    """Cycles for which the instructions of a loop, of so many warps, keep units of a multiprocessor busy.

    By the throughputs in NVIDIA's CUDA C++ Programming Guide: 16 special functions and 128 bytes of shared memory a
    cycle. Bank conflicts, broadcasts, shuffles and spills are not seen. Counted for sm_80 and sm_90 in 16 bits, else 0.
    """
    special, size, products = 0, 0, 0.0
    for line in code if chip.products else ():
        if match := _GROUP_PRODUCT.match(line):  # of four warps
            columns, both_shared = int(match[1]), match[2] == "gdesc"
            products += 2 * 64 * columns * 16 // 4
            size += 2 * 16 * (columns + 64 * both_shared) // 4
        elif match := _WARP_PRODUCT.match(line):
            products += 2 * 16 * 8 * int(match[1]) / chip.hmma_share
        elif match := _MATRICES.match(line):
            size += 128 * int(match[1] or 1)
        elif match := _SHARED.match(line):
            size += 32 * int(match[1] or 32) // 8
        special += bool(_SPECIAL.match(line))
    work = {"special_cycles": special * 32 / 16, "shared_cycles": size / 128, "matrix_cycles": 0.0}
    if not products:
        return dict.fromkeys(work, 0)
    work["matrix_cycles"] = products / chip.products
    return {unit: round(warps * each) for unit, each in work.items()}


def estimated_share(chip: Chip, operations: int, issue: int, special: int, shared: int, matrix: int) -> float:
    """Share of the peak of matrix products that a loop over full tiles reaches, from the busy cycles of its units.

    A tile is taken to last as long as its products and half of the sum of the cycles for which schedulers (four
    instructions a cycle), special functions and shared memory are busy. The half is fitted to published speeds of other
    kernels, which it gives from 11 % below to 37 % above (kernels/README.md). None of them has warps that only copy, as
    FlashAttention-3 has, so it does not hold for such kernels.

    Args:
        chip: one of which cycles are counted.
        operations: that the products of a tile need, 2·`PRODUCTS`·M·N·D. What warps compute twice is not needed.
        issue, special, shared, matrix: cycles.
    """
    return operations / chip.products / (matrix + (issue + special + shared) / 2)


_PRODUCT = re.compile(r"HGMMA\S*\s+R\d+, R(\d+), gdesc")
# Of an instruction that writes registers, the first of them; what stores, compares, jumps or waits writes none.
_WRITES = re.compile(_GUARD + r"(?!ST|RED|BAR|BRA|EXIT|WARP|DEPBAR|[IFDHU]*SETP|R2P|R2UR|U)(\S+)\s+(?:!?P\w+, )*R(\d+)")


def overwritten_operand(code: list[str]) -> tuple[str, str] | None:
    """The first HGMMA whose A registers another instruction writes before the wait for it, and that instruction.

    A fault of ptxas before 13.3 (triton-lang/triton#11781). Products are taken to be in flight up to the next wait.
    """
    flying: dict[str, set[int]] = {}
    for line in code:
        if "WARPGROUP.DEPBAR" in line:
            flying = {}
        elif match := _WRITES.match(line):
            opcode, first = match[1], int(match[2])
            size = re.search(r"HGMMA\.64x(\d+)x|\.(64|128|WIDE)\b|LDSM\S*\.([24])$", opcode)
            count = 1
            if size:
                words = {"64": 2, "WIDE": 2, "128": 4}
                count = int(size[1]) // 2 if size[1] else words[size[2]] if size[2] else int(size[3])
            for product, operands in flying.items():
                if operands & set(range(first, first + count)):
                    return product, line
        if match := _PRODUCT.match(line):
            flying[line] = set(range(int(match[1]), int(match[1]) + 4))
    return None


def serialized(code: list[str]) -> bool:
    """Whether each of several products of four warps in the code of a loop has a wait of its own.

    ptxas serializes the products of a whole kernel where other instructions define an accumulator while products are
    in flight (its warning C7515).
    """
    products = sum(bool(_GROUP_PRODUCT.match(line)) for line in code)
    return 1 < products <= sum("WARPGROUP.DEPBAR" in line for line in code)


def refuse(lines: list[str]) -> None:
    """Raise RuntimeError for machine code that is wrong, or whose products wait for one another."""
    code = instructions_of(lines)
    loops = [code[slice(*loop)] for loop in loops_of(lines)]
    for segment in [code, *(loop * 2 for loop in loops)]:
        if wrong := overwritten_operand(segment):
            raise RuntimeError(f"miscompiled: an operand of {wrong[0]} in flight is overwritten by {wrong[1]}")
    if any(map(serialized, loops)):
        raise RuntimeError("serialized: every matrix product of a loop is waited for before the next is issued")


def instructions_of(lines: list[str]) -> list[str]:
    """The lines that are no labels."""
    return [line for line in lines if not line.endswith(":")]


def loops_of(lines: list[str]) -> list[tuple[int, int]]:
    """Innermost loops as (start, end) in instructions: from the target of a backward branch to the branch."""
    position, at = {}, 0
    loops: list[tuple[int, int]] = []
    for line in lines:
        if line.endswith(":"):
            position[line[:-1]] = at
            continue
        at += 1
        branch = re.search(r"\b(?:BRA|s_c?branch)\S*\s.*?(\.L\w+)", line)
        if branch and branch[1] in position:
            loops.append((position[branch[1]], at))
    return [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]


def tile_loops(lines: list[str]) -> tuple[tuple[int, int] | None, tuple[int, int] | None]:
    """The loops over full and over masked tiles, as (start, end) in instructions; None where there is no such loop."""
    code = instructions_of(lines)
    products = {a: sum(bool(_MATRIX.match(line)) for line in code[slice(*a)]) for a in loops_of(lines)}
    most = max(products.values(), default=0)
    if most == 0:
        return None, None
    by_length = sorted((a for a, n in products.items() if n == most), key=lambda a: a[1] - a[0])
    return by_length[0], by_length[-1] if len(by_length) > 1 else None
