"""Matrix instructions of `tests.support.ptx`, and the number formats they read. References are to the PTX ISA, 9.0."""

import functools
from collections.abc import Callable

import numpy as np

from tests.support.ptx import Decoder, Execute, Group, Product, Statement, split
from tests.support.ptx_memory import Array, Fault


def from_bf16(bits: Array) -> Array:
    """float32 of raw bfloat16."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bf16(x: Array) -> Array:
    """Raw bfloat16, rounded to the nearest even; NaN as the hardware has it."""
    bits = x.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded.astype(np.uint16))


TO_FLOAT: dict[str, Callable[[Array], Array]] = {
    "bf16": from_bf16,
    "f16": lambda bits: bits.view(np.float16).astype(np.float32),
    "tf32": lambda bits: (bits & np.uint32(0xFFFFE000)).view(np.float32),  # its low bits are not read
}
FROM_FLOAT: dict[str, Callable[[Array], Array]] = {
    "bf16": to_bf16,
    "f16": lambda x: x.astype(np.float16).view(np.uint16),
    "tf32": lambda x: (x.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000),  # .rna
}


def _fragments(registers: list[Array], kind: str) -> Array:
    """[warps, 8, k] in float32: lane 4·r + c has e elements of row r, from column e·c on; the next register goes on.

    A register has one element of TF32 or two of 16 bits.
    """
    values = [TO_FLOAT[kind](x if kind == "tf32" else x.view(np.uint16)) for x in registers]
    return np.concatenate([x.reshape(len(registers[0]) // 32, 8, -1) for x in values], 2)


def _a_matrix(registers: list[Array], kind: str) -> Array:
    """[warps, 16, k]: registers 0, 2 are the upper eight rows, 1, 3 the lower."""
    return np.concatenate([_fragments(registers[0::2], kind), _fragments(registers[1::2], kind)], 1)


def matrix_product(statement: Statement, decoder: Decoder) -> Execute:
    """mma.sync m16n8k* (§9.7.14): D = A · B + C in float32."""
    kind = statement.opcode.split(".")[-2]
    names = [split(x.strip("{} ")) for x in statement.operands]
    write = [decoder.write(x, "f32") for x in names[0]]
    a, b = ([decoder.read(x, "b32") for x in of] for of in names[1:3])
    c = [decoder.read(x, "f32") for x in names[3]]

    def execute(group: Group, mask: Array | None) -> None:
        left, right = _a_matrix([x(group) for x in a], kind), _fragments([x(group) for x in b], kind)
        product = (left @ right.transpose(0, 2, 1)).reshape(-1, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3).reshape(4, -1)
        for store, old, new in zip(write, c, product, strict=True):
            store(group, old(group) + new, mask)

    return execute


def load_matrix(statement: Statement, decoder: Decoder) -> Execute:
    """ldmatrix (§9.7.14): lane 8·j + i of a warp names row i of the 8 × 8 matrix j."""
    names = split(statement.operands[0].strip("{} "))
    write, address = [decoder.write(x, "b32") for x in names], decoder.address(statement.operands[1])
    transposed, count = "trans" in statement.opcode.split("."), len(names)

    def execute(group: Group, mask: Array | None) -> None:
        lines = address(group).reshape(-1, 32)[:, : 8 * count].reshape(-1)
        rows, at = group.block.shared.rows(group.bit, lines, np.uint16, 8, False)
        matrices = rows[at].reshape(-1, count, 8, 8)
        if transposed:
            matrices = matrices.transpose(0, 1, 3, 2)
        values = np.ascontiguousarray(matrices).view(np.uint32).reshape(-1, count, 32)
        for j, store in enumerate(write):
            store(group, values[:, j].reshape(-1), mask)

    return execute


def store_matrix(statement: Statement, decoder: Decoder) -> Execute:
    """stmatrix (§9.7.14), the inverse."""
    names = split(statement.operands[1].strip("{} "))
    read, address = [decoder.read(x, "b32") for x in names], decoder.address(statement.operands[0])
    transposed, count = "trans" in statement.opcode.split("."), len(names)

    def execute(group: Group, mask: Array | None) -> None:
        values = np.stack([x(group).reshape(-1, 32) for x in read], 1)  # [warps, count, 32]
        matrices = values.view(np.uint16).reshape(-1, count, 8, 8)
        if transposed:
            matrices = matrices.transpose(0, 1, 3, 2)
        lines = address(group).reshape(-1, 32)[:, : 8 * count].reshape(-1)
        rows, at = group.block.shared.rows(group.bit, lines, np.uint16, 8, True)
        rows[at] = matrices.reshape(-1, 8)

    return execute


@functools.lru_cache(maxsize=4096)
def described(descriptor: int, rows: int, transposed: bool) -> Array:
    """Bytes in shared memory of the [rows, 16] operand of a matrix descriptor (§9.7.15).

    Rows are of 16, 32, 64 or 128 bytes; the 16-byte units of the last three are swizzled by the address's bits from 7
    on. `leading` and `stride` are the steps between these boxes along k or m and across.
    """
    start, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    width, swizzle = {0: (16, 0), 1: (128, 7), 2: (64, 3), 3: (32, 1)}[descriptor >> 62]
    i, k = np.arange(rows)[:, None], np.arange(16)[None, :]
    if transposed:
        box = width // 2
        at = start + i // box * leading + k // 8 * stride + k % 8 * width + i % box * 2
    elif swizzle:
        at = start + i // 8 * stride + i % 8 * width + k * 2
    else:
        at = start + i // 8 * stride + i % 8 * width + k // 8 * leading + k % 8 * 2
    return at ^ ((at >> 7 & swizzle) << 4)


def _described(group: Group, descriptor: int, rows: int, transposed: bool, kind: str) -> Array:
    memory, at = group.block.shared.rows(group.bit, described(descriptor, rows, transposed), np.uint16, 1, False)
    if group.block.shared.unfenced.reshape(-1, 2)[at].any():
        raise Fault("shared memory written since the last fence.proxy.async")
    return TO_FLOAT[kind](memory[at, 0])


def group_product(statement: Statement, decoder: Decoder) -> Execute:
    """wgmma (§9.7.15): D = A · B + D of 64 rows, 16 a warp; A in registers or in shared memory, B in shared memory."""
    parts = statement.opcode.split(".")
    if parts[1] == "fence":
        return lambda group, mask: None
    if parts[1] == "commit_group":
        return lambda group, mask: group.products.append([])
    if parts[1] == "wait_group":
        keep = int(statement.operands[0], 0)
        return lambda group, mask: group.wait_products(keep)
    kind, n = parts[-1], int(parts[4].partition("n")[2].partition("k")[0])
    if kind not in ("bf16", "f16") or not parts[4].endswith("k16"):
        raise Fault(f"{statement.opcode}: a product that the interpreter does not know")
    d, a, b, scale, *signs = statement.operands
    to = [decoder.slot(x) for x in split(d.strip("{} "))]
    of = [decoder.slot(x) for x in split(a.strip("{} "))] if a.startswith("{") else []
    left, right, adds = None if of else decoder.read(a, "u64"), decoder.read(b, "u64"), decoder.read(scale, "pred")
    turned = [x != "0" for x in signs[2:]]  # A's only where it is in shared memory

    def execute(group: Group, mask: Array | None) -> None:
        descriptors = [0 if x is None else _uniform(x(group)) for x in (left, right)]
        keeps = bool(_uniform(adds(group)))
        for r in to:
            if r not in group.sums:
                old = group.registers[r]
                group.sums[r] = np.full(decoder.lanes, np.nan, np.float32) if old is None else old.view(np.float32)
                group.registers[r] = None

        def finish() -> None:
            warps = group.threads[::32] // 32 % 4
            if left is None:
                x = _a_matrix([group.registers[r] for r in of], kind)
            else:
                x = _described(group, descriptors[0], 64, turned[:-1] == [True], kind).reshape(4, 16, 16)[warps]
            y = _described(group, descriptors[1], n, turned[-1:] == [True], kind)
            product = (x @ y.T).reshape(-1, 2, 8, n // 8, 4, 2).transpose(3, 1, 5, 0, 2, 4).reshape(len(to), -1)
            for r, value in zip(to, product, strict=True):
                group.sums[r] = value + group.sums[r] if keeps else value

        if not group.block.late:
            finish()
        group.products[-1].append(Product((*to, *of), finish if group.block.late else lambda: None))
        group.lock()

    return execute


def _uniform(x: Array) -> int:
    if (x != x[0]).any():
        raise Fault("an operand that differs within the group of warps")
    return int(x[0])
