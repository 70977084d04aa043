"""The instructions of `tests.support.ptx`, a table: mnemonic -> what makes a function of a group of warps of it.

References are to the sections of the PTX ISA, 9.0. Only forms that Triton emits are known; any other is a fault.
"""

from collections.abc import Callable

import numpy as np

from tests.support.ptx import UNSIGNED, Decoder, Execute, Group, Statement, bits_of, split
from tests.support.ptx_matrix import FROM_FLOAT, TO_FLOAT, group_product, load_matrix, matrix_product, store_matrix
from tests.support.ptx_memory import Array, Fault

Make = Callable[[Statement, Decoder], Execute]


def decode(statement: Statement, decoder: Decoder) -> Execute | None:
    """What a statement does; None for a barrier of the block."""
    mnemonic = statement.opcode.split(".")[0]
    if statement.opcode.startswith(("bar.sync", "barrier.sync")) and statement.operands == ["0"]:
        return None
    if statement.opcode == "bar.warp.sync":
        return lambda group, mask: None  # lanes are in step anyway
    if mnemonic not in _TABLE:
        raise Fault(f"{statement.text}: an instruction that the interpreter does not know")
    execute = _TABLE[mnemonic](statement, decoder)
    if not statement.predicate:
        return execute
    predicate = decoder.read(statement.predicate, "pred")

    def predicated(group: Group, mask: Array | None) -> None:
        lanes = predicate(group)
        if lanes.all():
            execute(group, None)
        elif lanes.any():
            execute(group, lanes)

    return predicated


# Arithmetic, comparison, logic (§9.7.1 to §9.7.8)


def _elementwise(functions: tuple[Callable[..., Array], Callable[..., Array]]) -> Make:
    """destination = function(sources), all of the opcode's type; the first function is that of floats."""

    def make(statement: Statement, decoder: Decoder) -> Execute:
        kind = statement.opcode.split(".")[-1]
        function = functions[kind != "f32"]
        write = decoder.write(statement.operands[0], kind)
        read = [decoder.read(x, kind) for x in statement.operands[1:]]
        return lambda group, mask: write(group, function(*(x(group) for x in read)), mask)

    return make


def _shift(function: Callable[[Array, Array], Array]) -> Make:
    """§9.7.8: amounts are unsigned and clamped to the width."""

    def make(statement: Statement, decoder: Decoder) -> Execute:
        kind = statement.opcode.split(".")[-1]
        bits = bits_of(kind)
        write = decoder.write(statement.operands[0], kind)
        a, amount = decoder.read(statement.operands[1], kind), decoder.read(statement.operands[2], "u32")

        def execute(group: Group, mask: Array | None) -> None:
            value, by = a(group), amount(group)
            shifted = function(value, np.minimum(by, bits - 1).astype(value.dtype))
            write(group, shifted if kind[0] == "s" else np.where(by < bits, shifted, value.dtype.type(0)), mask)

        return execute

    return make


def _funnel_shift(statement: Statement, decoder: Decoder) -> Execute:
    """shf (§9.7.8): the upper half of b:a shifted left, the lower half shifted right."""
    left = ".l." in statement.opcode
    write = decoder.write(statement.operands[0], "b32")
    a, b, c = (decoder.read(x, "u32") for x in statement.operands[1:])

    def execute(group: Group, mask: Array | None) -> None:
        both = a(group) | b(group).astype(np.uint64) << np.uint64(32)
        by = c(group).astype(np.uint64) & np.uint64(31)
        write(group, ((both << by >> np.uint64(32)) if left else both >> by).astype(np.uint32), mask)

    return execute


def _multiply(statement: Statement, decoder: Decoder) -> Execute:
    """mul, mad, fma (§9.7.1, §9.7.3): of integers `lo`, `hi` or `wide`."""
    parts, kind = statement.opcode.split("."), statement.opcode.split(".")[-1]
    wide = "wide" in parts
    kind_out = f"{kind[0]}{2 * bits_of(kind)}" if wide or "hi" in parts else kind
    double = np.float64 if kind == "f32" else np.dtype(f"{'i' if kind[0] == 's' else 'u'}{bits_of(kind_out) // 8}").type
    write = decoder.write(statement.operands[0], kind_out if wide else kind)
    a, b = (decoder.read(x, kind) for x in statement.operands[1:3])
    c = decoder.read(statement.operands[3], kind_out if wide else kind) if len(statement.operands) > 3 else None

    def execute(group: Group, mask: Array | None) -> None:
        x, y = a(group), b(group)
        if kind == "f32" and c is None:
            return write(group, x * y, mask)
        product = x.astype(double) * y.astype(double)  # of float32 exact: rounded once, with the sum
        if "hi" in parts:
            product = (product >> double(bits_of(kind))).astype(x.dtype)
        if c is not None:
            product = product + c(group)
        write(group, product.astype(np.float32) if kind == "f32" else product, mask)

    return execute


_COMPARISONS: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)), "nan": lambda a, b: np.isnan(a) | np.isnan(b),
}  # fmt: skip
_BOOLEAN = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def _set_predicate(statement: Statement, decoder: Decoder) -> Execute:
    """setp (§9.7.6): of floats `ltu` and the like are true of NaN, `lt` and the like false."""
    _, name, *modifiers, kind = statement.opcode.split(".")
    unordered = kind == "f32" and name.endswith("u")
    compare = _COMPARISONS[name.removesuffix("u") if unordered else name]
    write = decoder.write(statement.operands[0], "pred")
    a, b = (decoder.read(x, kind) for x in statement.operands[1:3])
    join = next((_BOOLEAN[m] for m in modifiers if m in _BOOLEAN), None)
    other = decoder.read(statement.operands[3], "pred") if join else None

    def execute(group: Group, mask: Array | None) -> None:
        x, y = a(group), b(group)
        result = compare(x, y)
        if unordered:
            result = result | np.isnan(x) | np.isnan(y)
        elif kind == "f32" and name == "ne":
            result = result & ~np.isnan(x) & ~np.isnan(y)
        write(group, join(result, other(group)) if join and other else result, mask)

    return execute


def _select(statement: Statement, decoder: Decoder) -> Execute:
    """selp (§9.7.6)."""
    kind = statement.opcode.split(".")[-1]
    write, chosen = decoder.write(statement.operands[0], kind), decoder.read(statement.operands[3], "pred")
    a, b = (decoder.read(x, kind) for x in statement.operands[1:3])
    return lambda group, mask: write(group, np.where(chosen(group), a(group), b(group)), mask)


def _extract(statement: Statement, decoder: Decoder) -> Execute:
    """bfe (§9.7.1), of constant positions."""
    kind = statement.opcode.split(".")[-1]
    write, a = decoder.write(statement.operands[0], kind), decoder.read(statement.operands[1], kind)
    position, length = (int(x, 0) for x in statement.operands[2:])
    left, right = bits_of(kind) - position - length, bits_of(kind) - length

    def execute(group: Group, mask: Array | None) -> None:
        value = a(group)
        write(group, value << value.dtype.type(left) >> value.dtype.type(right), mask)

    return execute


# Data movement and conversion (§9.7.9)


def _convert(statement: Statement, decoder: Decoder) -> Execute:
    """cvt (§9.7.9); of two floats the first becomes the upper half."""
    *_, to, of = statement.opcode.split(".")
    write = decoder.write(statement.operands[0], "b32" if to == "tf32" else to)
    read = [decoder.read(x, of) for x in statement.operands[1:]]

    def convert(x: Array) -> Array:
        if of in TO_FLOAT:
            x = TO_FLOAT[of](x)
        if to.removesuffix("x2") in FROM_FLOAT:
            return FROM_FLOAT[to.removesuffix("x2")](x)
        if to == "f32":
            return x.astype(np.float32)
        return x.astype(np.dtype(f"{'i' if of[0] == 's' else 'u'}{bits_of(to) // 8}"))

    def execute(group: Group, mask: Array | None) -> None:
        values = [convert(x(group)) for x in reversed(read)]
        write(group, values[0] if len(values) == 1 else np.stack(values, 1).view(np.uint32)[:, 0], mask)

    return execute


def _move(statement: Statement, decoder: Decoder) -> Execute:
    """mov (§9.7.9), which also packs and unpacks."""
    kind = statement.opcode.split(".")[-1]
    to, of = (split(x.strip("{} ")) for x in statement.operands)
    part = kind if len(to) == len(of) else f"b{bits_of(kind) // max(len(to), len(of))}"
    write = [decoder.write(x, kind if len(to) == 1 else part) for x in to]
    read = [decoder.read(x, kind if len(of) == 1 else part) for x in of]

    def execute(group: Group, mask: Array | None) -> None:
        values = [x(group) for x in read]
        if len(read) > len(write):
            values = [np.stack(values, 1).view(UNSIGNED[bits_of(kind)])[:, 0]]
        elif len(write) > len(read):
            values = list(values[0][:, None].view(UNSIGNED[bits_of(part)]).T.copy())
        for store, value in zip(write, values, strict=True):
            store(group, value, mask)

    return execute


def _access(statement: Statement, decoder: Decoder) -> Execute:
    """ld and st (§9.7.9) of parameters, of shared and of global memory."""
    mnemonic, space, *_, kind = statement.opcode.split(".")
    loads = mnemonic == "ld"
    where, what = statement.operands if not loads else reversed(statement.operands)
    names = split(what.strip("{} "))
    if space == "param":
        bits = decoder.arguments[where.strip("[] ")] % 2 ** bits_of(kind)
        value = np.full(decoder.lanes, bits, UNSIGNED[bits_of(kind)])
        write_one = decoder.write(names[0], kind)
        signed = value.view(f"i{value.itemsize}") if kind[0] == "s" else value
        return lambda group, mask: write_one(group, signed, mask)
    address, dtype = decoder.address(where), UNSIGNED[bits_of(kind)]
    write = [decoder.write(x, kind) for x in names] if loads else []
    read = [] if loads else [decoder.read(x, f"b{bits_of(kind)}") for x in names]

    def execute(group: Group, mask: Array | None) -> None:
        lanes = slice(None) if mask is None else mask
        rows, at = _rows(group, space, address(group)[lanes], dtype, len(names), not loads)
        if not loads:
            rows[at] = np.stack([x(group) for x in read], 1)[lanes]
            return
        values = np.zeros((decoder.lanes, len(names)), dtype)
        values[lanes] = rows[at]
        for i, store in enumerate(write):
            column = values[:, i].copy()
            store(group, column.view(f"i{column.itemsize}") if kind[0] == "s" else column, mask)

    return execute


def _rows(group: Group, space: str, addresses: Array, dtype: type, width: int, writes: bool) -> tuple[Array, Array]:
    if space.startswith("shared"):
        return group.block.shared.rows(group.bit, addresses, dtype, width, writes)
    return group.block.memory.rows(addresses, dtype, width)


def _copy(statement: Statement, decoder: Decoder) -> Execute:
    """cp.async (§9.7.9): bytes beyond the source's size are zero."""
    parts = statement.opcode.split(".")
    if "commit_group" in parts:
        return lambda group, mask: group.copies.append([])
    if "wait_group" in parts:
        keep = int(statement.operands[0], 0)
        return lambda group, mask: group.wait(keep)
    to, of = (decoder.address(x) for x in statement.operands[:2])
    size = int(statement.operands[2], 0)
    ignored = statement.operands[3] if len(statement.operands) > 3 else str(size)
    available = decoder.read(ignored, "u32")
    width = size // 4

    def execute(group: Group, mask: Array | None) -> None:
        lanes = slice(None) if mask is None else mask
        target, source, present = to(group)[lanes], of(group)[lanes], available(group)[lanes] > 0

        def copy() -> None:
            rows, at = group.block.shared.rows(group.bit, target, np.uint32, width, True)
            values = np.zeros((len(at), width), np.uint32)
            if present.any():
                tensor, row = group.block.memory.rows(source[present], np.uint32, width)
                values[present] = tensor[row]
            rows[at] = values

        if group.block.late:
            group.copies[-1].append(copy)
        else:
            copy()

    return execute


def _shuffle(statement: Statement, decoder: Decoder) -> Execute:
    """shfl.sync (§9.7.9): within the 32 lanes of each warp."""
    across = {"bfly": np.bitwise_xor, "idx": lambda lane, which: which}[statement.opcode.split(".")[2]]
    write = decoder.write(statement.operands[0].split("|")[0], "b32")
    value, which = (decoder.read(x, "u32") for x in statement.operands[1:3])
    lane = np.arange(decoder.lanes) % 32

    def execute(group: Group, mask: Array | None) -> None:
        source = across(lane, which(group).astype(np.int64)) % 32
        write(group, np.take_along_axis(value(group).reshape(-1, 32), source.reshape(-1, 32), 1).reshape(-1), mask)

    return execute


# Control (§9.7.12)


def _branch(statement: Statement, decoder: Decoder) -> Execute:
    target = decoder.program.labels[statement.operands[-1]]

    def execute(group: Group, mask: Array | None) -> None:
        if mask is not None:
            raise Fault("the lanes of a warp part here")
        group.at = target

    return execute


def _leave(statement: Statement, decoder: Decoder) -> Execute:
    def execute(group: Group, mask: Array | None) -> None:
        group.at = len(decoder.program.statements)

    return execute


def _fence(statement: Statement, decoder: Decoder) -> Execute:
    """fence.proxy.async (§9.7.13): what was written so far is seen by wgmma."""

    def execute(group: Group, mask: Array | None) -> None:
        group.block.shared.unfenced[:] = False

    return execute


_TABLE: dict[str, Make] = {
    name: _elementwise(of if isinstance(of, tuple) else (of, of))
    for name, of in {
        "add": np.add, "sub": np.subtract, "neg": np.negative, "abs": np.abs,
        "min": (np.fmin, np.minimum), "max": (np.fmax, np.maximum),
        "div": (np.divide, lambda a, b: (a - np.fmod(a, b)) // b),
        "ex2": np.exp2, "lg2": np.log2, "rcp": np.reciprocal,
        "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.bitwise_not,
    }.items()
} | {
    "shl": _shift(np.left_shift), "shr": _shift(np.right_shift), "shf": _funnel_shift,
    "mul": _multiply, "mad": _multiply, "fma": _multiply,
    "setp": _set_predicate, "selp": _select, "bfe": _extract,
    "cvt": _convert, "mov": _move, "ld": _access, "st": _access, "cp": _copy, "shfl": _shuffle,
    "bra": _branch, "ret": _leave, "fence": _fence,
    "mma": matrix_product, "ldmatrix": load_matrix, "stmatrix": store_matrix, "wgmma": group_product,
}  # fmt: skip
