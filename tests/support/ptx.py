"""Runs compiled kernels without a GPU: an interpreter of the PTX that Triton emits for sm_80 and sm_90, on numpy.

What a kernel's own interpreter cannot show is here as on the chip: layouts, swizzled shared memory, bfloat16 and TF32
products, asynchronous copies and products, barriers. References are to the PTX ISA, 9.0.

Warps run in groups in lock step: one warp, or the four of a warp group. Between two barriers the groups run one
after another, in an order drawn anew each time; shared memory that one writes and another reads meanwhile is a fault.
Asynchronous work takes place as late as it may, at its wait, or as early, at its issue.

Registers hold unsigned integers or booleans, [lanes]; None: never written, or the destination of a product in flight.
"""

import functools
import random
import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from tests.support.ptx_memory import Array, Fault, Memory, Shared

Read = Callable[["Group"], Array]
Write = Callable[["Group", Array, "Array | None"], None]
Execute = Callable[["Group", "Array | None"], None]
"""An instruction of a group, with the lanes that take part; None: all."""

UNSIGNED = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
_SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}


@functools.cache
def bits_of(kind: str) -> int:
    """Of a fundamental type such as `f32`, `bf16x2` or `pred` (§5.2)."""
    return 1 if kind == "pred" else 32 if kind.endswith("x2") or kind == "tf32" else int(re.sub(r"^\D+", "", kind))


def numpy_type(kind: str) -> type:
    """What an instruction computes in; 16-bit floats stay raw bits."""
    bits = bits_of(kind)
    return np.float32 if kind == "f32" else _SIGNED[bits] if kind[0] == "s" else UNSIGNED[bits]


class Statement(NamedTuple):
    """One instruction: `@!%p1 add.f32 %r1, %r2, %r3` (§4.1)."""

    predicate: str
    """`%p1`, `!%p1` or empty."""
    opcode: str
    operands: list[str]
    text: str


class Program:
    """The one kernel of a PTX module."""

    def __init__(self, text: str) -> None:
        entry = text[text.index(".entry") :]
        self.parameters: list[tuple[str, str]] = re.findall(r"\.param \.(\w+)[^\n]*? (\w+_param_\d+)", entry)
        self.threads = int(re.search(r"\.reqntid (\d+)", entry)[1])
        self.statements: list[Statement] = []
        self.labels: dict[str, int] = {}
        body = entry[entry.index("\n{\n") + 3 : entry.index("\n}")]
        for line in re.split(r"[;\n]", re.sub(r"//[^\n]*", "", body)):
            line = line.strip()
            if line.endswith(":"):
                self.labels[line[:-1]] = len(self.statements)
            elif line and not line.startswith("."):
                match = re.match(r"(?:@(\S+)\s+)?(\S+)\s*(.*)", line)
                assert match is not None
                self.statements.append(Statement(match[1] or "", match[2], split(match[3]), line))


def split(operands: str) -> list[str]:
    """At the commas outside braces and brackets."""
    return [x.strip() for x in re.findall(r"(?:\{[^}]*\}|\[[^]]*\]|[^,{\[])+", operands)]


@dataclass(eq=False)
class Group:
    """Warps in lock step."""

    block: "Block"
    threads: Array
    """Their %tid.x, [lanes]."""
    registers: list[Array | None]
    bit: int
    """Of the group, among those of the block."""
    at: int = 0
    done: bool = False
    copies: list[list[Callable[[], None]]] = field(default_factory=lambda: [[]])
    """cp.async groups in order; the last is open (§9.7.9)."""
    products: "list[list[Product]]" = field(default_factory=lambda: [[]])
    """wgmma groups, likewise (§9.7.15)."""
    sums: dict[int, Array] = field(default_factory=dict)
    """Destinations of products in flight, float32."""
    locked: frozenset[int] = frozenset()
    """Registers that products in flight read or write."""

    def wait(self, keep: int) -> None:
        """Complete all but the last `keep` groups of copies."""
        while len(self.copies) - 1 > keep:
            for copy in self.copies.pop(0):
                copy()

    def wait_products(self, keep: int) -> None:
        """Complete all but the last `keep` groups of products."""
        while len(self.products) - 1 > keep:
            for product in self.products.pop(0):
                product.finish()
        self.lock()
        for register in self.sums.keys() - self.locked:
            self.registers[register] = self.sums.pop(register).view(np.uint32)

    def lock(self) -> None:
        """Renew `locked`."""
        self.locked = frozenset(r for group in self.products for product in group for r in product.registers)


@dataclass
class Product:
    """A wgmma in flight."""

    registers: tuple[int, ...]
    """That it reads or writes."""
    finish: Callable[[], None]


@dataclass(eq=False)
class Block:
    """A thread block: its groups and its shared memory."""

    index: tuple[int, ...]
    grid: tuple[int, ...]
    shared: Shared
    memory: Memory
    late: bool

    def run(self, code: Sequence[tuple[Execute | None, str]], groups: list[Group], order: random.Random) -> None:
        """Run every group to its end."""
        while live := [group for group in groups if not group.done]:
            order.shuffle(live)
            for group in live:
                _run_to_barrier(code, group)
            self.shared.settle()


def _run_to_barrier(code: Sequence[tuple[Execute | None, str]], group: Group) -> None:
    while group.at < len(code):
        execute, text = code[group.at]
        group.at += 1
        if execute is None:
            return
        try:
            execute(group, None)
        except (Fault, AttributeError, TypeError) as error:
            unset = "a register that is not written, or not waited for"
            reason = error if isinstance(error, Fault) else unset
            where = f"thread {group.threads[0]} of block {group.block.index}"
            raise Fault(f"{text[:120]}: {reason} ({where})") from error
    group.done = True


class Decoder:
    """Turns statements into functions of a group, for one launch."""

    def __init__(self, program: Program, arguments: dict[str, int], lanes: int) -> None:
        self.program = program
        self.arguments = arguments
        """Bits of the kernel's parameters."""
        self.lanes = lanes
        self.slots: dict[str, int] = {}

    def slot(self, register: str) -> int:
        """Where a register is kept."""
        return self.slots.setdefault(register, len(self.slots))

    def read(self, operand: str, kind: str) -> Read:
        """Reader of an operand as [lanes] of the instruction's type; a wider register is cut (§9.4.1)."""
        dtype, bits = numpy_type(kind), bits_of(kind)
        if operand.startswith("!"):
            positive = self.read(operand[1:], kind)
            return lambda group: ~positive(group)
        if operand in _SPECIAL:
            special = _SPECIAL[operand]
            return lambda group: special(group).astype(dtype)
        if operand.startswith("%"):
            slot = self.slot(operand)
            if _width(operand) == bits:
                return lambda group: group.registers[slot].view(dtype)
            return lambda group: group.registers[slot].astype(UNSIGNED[bits]).view(dtype)
        constant = np.full(self.lanes, _constant(operand, bits), UNSIGNED[bits]).view(dtype)
        return lambda group: constant

    def write(self, register: str, kind: str) -> Write:
        """Writer of a register; a value narrower than it is extended by its sign, or with zeros (§9.4.1).

        `_` takes what an unpacking leaves unused (§9.7.9).
        """
        if register == "_":
            return lambda group, value, mask: None
        slot, width = self.slot(register), UNSIGNED[_width(register)]
        wider = _SIGNED[_width(register)] if kind[0] == "s" else width
        extends = _width(register) > bits_of(kind)

        def write(group: Group, value: Array, mask: Array | None) -> None:
            if slot in group.locked:
                raise Fault(f"{register} is overwritten while a product in flight uses it")
            value = (value.astype(wider) if extends else value).view(width)
            if mask is not None:
                old = group.registers[slot]
                value = np.where(mask, value, ~width(0) if old is None else old)  # a NaN where nothing was written
            group.registers[slot] = value

        return write

    def address(self, operand: str) -> Read:
        """Reader of `[%rd1 + 16]` as bytes, [lanes] uint64; shared memory begins at 0."""
        match = re.fullmatch(r"\[\s*(\S+?)\s*(?:\+\s*(\S+?)\s*)?\]", operand)
        assert match is not None
        offset = np.uint64(int(match[2] or "0", 0) % 2**64)
        base = self.read(match[1], f"u{_width(match[1])}" if match[1].startswith("%") else "u64")
        return lambda group: base(group).astype(np.uint64) + offset


def _width(register: str) -> int:
    """Bits of a register, by the letter that LLVM gives its class."""
    return {"p": 1, "rs": 16, "r": 32, "f": 32, "rd": 64, "fd": 64}[register[1:].rstrip("0123456789")]


def _constant(text: str, bits: int) -> int:
    """§4.5. Shared memory begins at 0."""
    if text == "global_smem":
        return 0
    if text[:2] in ("0f", "0d"):
        return int(text[2:], 16)
    return int(text, 0) % 2**bits


def _every_lane(of: str, axis: int) -> Read:
    return lambda group: np.full(len(group.threads), getattr(group.block, of)[axis])


_SPECIAL: dict[str, Read] = {
    "%tid.x": lambda group: group.threads,
    **{f"%ctaid.{name}": _every_lane("index", axis) for axis, name in enumerate("xyz")},
    **{f"%nctaid.{name}": _every_lane("grid", axis) for axis, name in enumerate("xyz")},
}
"""§10."""


def launch(
    ptx: str,
    grid: Sequence[int],
    arguments: Sequence[int | float],
    memory: Memory,
    shared: int,
    *,
    lanes: int = 128,
    late: bool = True,
    seed: int = 0,
) -> None:
    """Run a kernel over a grid.

    Args:
        arguments: of the kernel's parameters, in order; pointers as addresses in `memory`.
        shared: bytes of a block's shared memory.
        lanes: of a group that runs in lock step, 32 or 128.
        late: asynchronous work takes place at its wait; else at its issue.
        seed: of the groups' order.

    Raises Fault where the result on a GPU would be undefined, and for instructions that this does not know.
    """
    from tests.support.ptx_isa import decode

    program = Program(ptx)
    bits = {
        name: struct.unpack("<I", struct.pack("<f", value))[0] if kind == "f32" else int(value) % 2**64
        for (kind, name), value in zip(program.parameters, arguments, strict=True)
    }
    decoder = Decoder(program, bits, lanes)
    code = [(decode(statement, decoder), statement.text) for statement in program.statements]
    order = random.Random(seed)
    threads = np.arange(program.threads, dtype=np.uint32).reshape(-1, lanes)
    grid = (*grid, 1, 1)[:3]
    with np.errstate(all="ignore"):
        for x, y, z in np.ndindex(*grid):
            block = Block((x, y, z), grid, Shared(shared), memory, late)
            count = len(decoder.slots)
            block.run(code, [Group(block, of, [None] * count, 1 << i) for i, of in enumerate(threads)], order)
