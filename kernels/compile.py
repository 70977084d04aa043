"""Compiles the kernels ahead of time for GPUs that need not be here, and counts what the compilers made of them.

The launches are the wrapper's own: a driver that only names a target stands in for the GPU, so tiles, dtypes and
specialisation are those of a real call. What is counted is static: no time is measured.

A kernel has two loops over tiles, one with the mask and one without. In the assembly a loop is what a backward branch
closes; of the innermost loops those with the most matrix instructions are these two, and the shorter one is the loop
over full tiles (the loop of the statistics multiplies 16 keys and has fewer).
"""

from __future__ import annotations

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

from kernels import triton_gpu, triton_kernels
from kernels.tiles import Tiles, override

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
HEAD_DIMS = (32, 64, 96, 128)
KERNELS = ("forward", "forward+statistics", "forward+full", "delta", "dq", "dkv", "received")


@dataclass(frozen=True)
class Chip:
    """Limits of a multiprocessor."""

    backend: str
    arch: int | str
    shared_block: int
    """Bytes of shared memory that one block may have."""
    shared: int
    """Bytes of shared memory."""
    warps: int
    """Warps that may be resident."""
    registers: int
    """32-bit registers of a lane, over all warps of a scheduler's share times schedulers."""
    warp_size: int = 32


CHIPS = {
    "sm_80": Chip("cuda", 80, 166912, 167936, 64, 65536),
    "sm_89": Chip("cuda", 89, 101376, 102400, 48, 65536),
    "sm_90": Chip("cuda", 90, 232448, 233472, 64, 65536),
    "sm_100": Chip("cuda", 100, 232448, 233472, 64, 65536),
    "gfx942": Chip("hip", "gfx942", 65536, 65536, 32, 4 * 512 * 64, warp_size=64),
}


@dataclass(frozen=True, order=True)
class Variant:
    """One thing to compile."""

    arch: str
    kernel: str
    dtype: str
    head_dim: int


@dataclass(frozen=True)
class Counts:
    """What the compiler made of a variant."""

    tiles: str
    """queries × keys, warps, stages."""
    registers: int
    """A lane."""
    spilled: int
    """Bytes a lane writes to memory for want of registers."""
    shared: int
    """Bytes a block."""
    occupancy: int
    """Resident warps, in % of the chip's limit."""
    matrix: int
    """Matrix instructions in the loop over full tiles; in the whole kernel where it has no such loop."""
    full_loop: int
    """Instructions a warp issues for a full tile; 0 without such a loop."""
    masked_loop: int
    """The same for a masked tile."""
    total: int
    """Instructions of the kernel's code."""


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


def compile_variant(variant: Variant, documents: bool = True, tiles: Tiles | None = None) -> Counts:
    """Compile one variant, through the wrapper's own launch, with a document mask or plain causal.

    Raises RuntimeError in Triton's interpreter, where nothing compiles, and whatever the compiler raises.
    """
    if triton_gpu.interpreted():
        raise RuntimeError("compiling: expected a process without TRITON_INTERPRET, found one with it")
    chip = CHIPS[variant.arch]
    triton.runtime.driver.set_active(_Target(chip, 1 + list(CHIPS).index(variant.arch)))
    name = variant.kernel.split("+")[0]
    compiled: list[Any] = []
    originals = {n: getattr(triton_kernels, f"{n}_kernel") for n in ("forward", "delta", "dq", "dkv", "received")}
    if tiles is not None:
        override[name] = tiles
    try:
        for n, kernel in originals.items():
            setattr(triton_kernels, f"{n}_kernel", _Recorder(kernel, compiled if n == name else None))
        _launch(variant, documents)
    finally:
        override.pop(name, None)
        for n, kernel in originals.items():
            setattr(triton_kernels, f"{n}_kernel", kernel)
    [(kernel, options)] = compiled
    return _count(kernel, options, chip)


def _launch(variant: Variant, documents: bool) -> None:
    q, k = (torch.zeros(1, h, 256, variant.head_dim, dtype=DTYPES[variant.dtype]) for h in (4, 2))
    interval = torch.zeros(1, 256, dtype=torch.int32) if documents else None
    ends = (interval, None, None, interval)  # first_key, end_key, first_query, last_query
    scale = variant.head_dim**-0.5
    if variant.kernel.startswith("forward"):
        statistics, full = "+" in variant.kernel, variant.kernel.endswith("+full")
        docs = interval if statistics else None
        triton_gpu._forward(q, k, k, *ends, docs, docs, None, 0, 0, scale, statistics, full)
    elif variant.kernel == "received":
        triton_gpu._received(q, k, torch.zeros(1, 4, 256), *ends[2:], 0, 0, scale)
    else:
        lse = torch.zeros(1, 4, 256)
        triton_gpu._backward_kernels(q, None, q, k, k, q, lse, *ends, None, 0, 0, scale)


def _count(kernel: Any, options: dict[str, Any], chip: Chip) -> Counts:
    warps = kernel.metadata.num_warps
    if chip.backend == "cuda":
        registers, spilled, lines = _cuda(kernel)
        per_warp = -(-registers * 32 // 256) * 256
        matrix = re.compile(r"\b(?:[HQIU]?[A-Z]*G?MMA)\b")
    else:
        registers, spilled, lines = _amd(kernel)
        per_warp = -(-registers // 8) * 8 * 64
        matrix = re.compile(r"\bv_mfma")
    shared = kernel.metadata.shared
    blocks = min(chip.registers // (per_warp * warps), chip.warps // warps, chip.shared // max(1, shared + 1024))
    full, masked = tile_loops(lines, matrix)
    body = lines[slice(*full)] if full else lines
    return Counts(
        tiles=f"{options.get('BLOCK_M')}x{options.get('BLOCK_N', '')} w{warps} s{kernel.metadata.num_stages}",
        registers=registers,
        spilled=spilled,
        shared=shared,
        occupancy=round(100 * blocks * warps / chip.warps),
        matrix=sum(bool(matrix.search(line)) for line in body),
        full_loop=full[1] - full[0] if full else 0,
        masked_loop=masked[1] - masked[0] if masked else 0,
        total=len(instructions_of(lines)),
    )


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _cuda(kernel: Any) -> tuple[int, int, list[str]]:
    """Registers a lane, spilled bytes a lane, and the SASS: a label or an instruction a line."""
    knobs = triton.knobs.nvidia
    ptx = kernel.asm["ptx"]
    gpu = re.search(r"\.target (sm_\w+)", ptx)
    assert gpu is not None
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        binary.write_bytes(kernel.asm["cubin"])
        source.write_text(ptx)
        usage = _run(knobs.cuobjdump.path, "--dump-resource-usage", str(binary))
        sass = _run(knobs.nvdisasm.path, "-c", str(binary))
    registers = re.search(r"REG:(\d+)", usage)
    assert registers is not None
    lines = []
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            lines.append(f"{label[1]}:")
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            lines.append(instruction[1])
    spilled = sum(_width(line) for line in lines if re.search(r"\bSTL\b|\bSTL\.", line))
    return int(registers[1]), spilled, lines


def _width(line: str) -> int:
    """Bytes that a store to local memory writes for a lane."""
    found = re.search(r"STL\S*?\.(64|128|U?8|U?16)\b", line)
    bits = int(found[1].lstrip("U")) if found else 32
    return bits // 8


def _amd(kernel: Any) -> tuple[int, int, list[str]]:
    """Vector registers a lane, spilled bytes a lane, and the assembly: a label or an instruction a line."""
    text = kernel.asm["amdgcn"]
    figure = {
        name: int(found[1]) if (found := re.search(rf"\.{name}:\s+(\d+)", text)) else 0
        for name in ("vgpr_count", "vgpr_spill_count")
    }
    lines = []
    for line in text.splitlines():
        if label := re.match(r"(\.LBB\w+):", line):
            lines.append(f"{label[1]}:")
        elif instruction := re.match(r"\t([a-z]\w+(?:\s.*)?)$", line):
            lines.append(instruction[1].split(";")[0].strip())
    return figure["vgpr_count"], 4 * figure["vgpr_spill_count"], lines


def instructions_of(lines: list[str]) -> list[str]:
    """The lines that are no labels."""
    return [line for line in lines if not line.endswith(":")]


def loops_of(lines: list[str]) -> list[tuple[int, int]]:
    """Innermost loops as (start, end) in instructions: from the target of a backward branch to the branch."""
    position, at = {}, 0
    found: list[tuple[int, int]] = []
    for line in lines:
        if line.endswith(":"):
            position[line[:-1]] = at
            continue
        at += 1
        branch = re.search(r"\b(?:BRA|s_c?branch)\S*\s.*?(\.L\w+)", line)
        if branch and branch[1] in position:
            found.append((position[branch[1]], at))
    return [a for a in found if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in found)]


def tile_loops(lines: list[str], matrix: re.Pattern[str]) -> tuple[tuple[int, int] | None, tuple[int, int] | None]:
    """The loops over full and over masked tiles, as (start, end) in instructions; None where there is no such loop."""
    code = instructions_of(lines)
    products = {a: sum(bool(matrix.search(line)) for line in code[slice(*a)]) for a in loops_of(lines)}
    most = max(products.values(), default=0)
    if most == 0:
        return None, None
    by_length = sorted((a for a, n in products.items() if n == most), key=lambda a: a[1] - a[0])
    return by_length[0], by_length[-1] if len(by_length) > 1 else None
