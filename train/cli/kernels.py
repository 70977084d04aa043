"""`sinkbed kernels`: compile the Triton kernels for GPUs that need not be here, and count registers, spills and
instructions."""

import csv
import importlib.util
import itertools
import json
import multiprocessing
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sinkbed.data.files import write_atomic
from sinkbed.plain_text import console, counted, csv_of
from sinkbed.train.config.arguments import PlainParser, positive

TABLES = Path(__file__).resolve().parents[2] / "kernels" / "triton"
_KEYS = ("arch", "kernel", "mask", "dtype", "head_dim")
_CHECKED = ("tiles", "spilled", "in_loops", "unit", "matrix", "full_loop", "shared_cycles")
_GROWTH = 1.02  # of a loop over full tiles, before a check fails


def compile_one(task: tuple[str, str, str, str, int, tuple[int, int, int, int] | None]) -> dict[str, Any]:
    """One line of the table; runs in a process of its own. A compiler's refusal is the line's `error`."""
    from sinkbed.kernels.triton.aot import CHIPS, Variant, compile_variant
    from sinkbed.kernels.triton.tiles import Tiles

    arch, kernel, mask, dtype, head_dim, tiles = task
    variant = Variant(arch, kernel, mask, dtype, head_dim)
    try:
        counts = compile_variant(variant, tiles=None if tiles is None else Tiles(*tiles))
    except Exception as error:
        return {**asdict(variant), "error": f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}"}
    if counts.shared > (most := CHIPS[arch].shared_block):
        return {**asdict(variant), "error": f"expected at most {most} bytes of shared memory, got {counts.shared}"}
    return {**asdict(variant), **asdict(counts)}


def compile_all(tasks: Sequence[Any], workers: int) -> list[dict[str, Any]]:
    """Every line, in order, in processes without Triton's interpreter and with an empty cache."""
    from tqdm import tqdm

    spawn = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as cache,
        ProcessPoolExecutor(workers, spawn, initializer=compile_only, initargs=(cache,)) as pool,
    ):
        return list(tqdm(pool.map(compile_one, tasks), "compiling", len(tasks), unit=" kernels"))


def compile_only(cache: str) -> None:
    """Make a process that has not imported triton one that compiles, with its cache in a folder."""
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_CACHE_DIR"] = cache  # a warm cache would hide a compiler's failure


def stored_table() -> Path:
    """The stored table of the Triton that is here: what compilers make of a kernel is a version's."""
    return TABLES / f"baseline-{version('triton')}.csv"


def read_table(path: Path) -> dict[tuple[str, ...], dict[str, str]]:
    """Lines of a stored table by variant. Raises FileNotFoundError or ValueError that names the file."""
    if not path.is_file():
        stored = ", ".join(sorted(p.stem.removeprefix("baseline-") for p in TABLES.glob("baseline-*.csv")))
        raise FileNotFoundError(
            f"{path}: expected a table of `sinkbed kernels --write`, got no file; those of Triton {stored} are stored"
        )
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    if not lines or not {*_KEYS, *_CHECKED} <= set(lines[0]):
        raise ValueError(f"{path}: expected a table of `sinkbed kernels --write`, got other columns")
    return {tuple(line[key] for key in _KEYS): line for line in lines}


def violations(lines: Sequence[dict[str, Any]], baseline: dict[tuple[str, ...], dict[str, str]]) -> list[str]:
    """What a table does worse than a stored one, a message each."""
    keys = (tuple(str(line[k]) for k in _KEYS) for line in lines)
    pairs = zip(keys, lines, strict=True)
    return [f"{' '.join(key)}: expected {what}" for key, line in pairs for what in _worse(line, baseline.get(key))]


def _worse(line: dict[str, Any], stored: dict[str, str] | None) -> Iterator[str]:
    """What a line should be and is, for each figure that is worse than the stored one."""
    if "error" in line:
        yield f"it to compile, got {line['error']}"
        return
    if stored is None:
        yield "a line in the baseline, got none; make it anew with --write"
        return
    if line["tiles"] != stored["tiles"]:
        yield f"the baseline's tiles {stored['tiles']}, got {line['tiles']}; make it anew with --write"
        return
    actual, expected = (f"{each['matrix']} {each['unit']}" for each in (line, stored))
    if actual != expected:
        yield f"{expected} in the loop over full tiles, got {actual}"
    if line["spilled"] > int(stored["spilled"]):
        yield f"at most {stored['spilled']} spilled bytes, got {line['spilled']}"
    if line["in_loops"] > int(stored["in_loops"]):
        yield f"at most {stored['in_loops']} bytes spilled in the loops, got {line['in_loops']}"
    if line["shared_cycles"] > _GROWTH * int(stored["shared_cycles"]):
        limit = f"at most {stored['shared_cycles']} cycles of shared memory for a full tile (and 2 %)"
        yield f"{limit}, got {line['shared_cycles']}"
    if line["full_loop"] > _GROWTH * int(stored["full_loop"]):
        yield f"at most {stored['full_loop']} instructions for a full tile (and 2 %), got {line['full_loop']}"


def to_csv(lines: Sequence[dict[str, Any]]) -> str:
    """The stored table."""
    names = max(lines, key=len)  # a line of an error has no counts
    return csv_of(lines, [n for n in names if n != "error"])


def _derived(line: dict[str, Any]) -> tuple[str, str, str, str]:
    """Instructions that warps issue for 1,000 pairs of a query and a key, cycles of a tile by unit, the share of the
    peak estimated from them, and blocks on a multiprocessor. No estimate where a loop spills or a multiprocessor has
    fewer than four warps, of which the cycles know nothing."""
    from sinkbed.kernels.triton.aot import CHIPS

    queries, keys, warps = _tile(line)
    instructions = f"{1000 * int(line['full_loop']) * warps / (queries * keys):.0f}" if keys else ""
    blocks = CHIPS[line["arch"]].blocks(line["registers"], warps, line["shared"])
    cycles, share = estimate(line) if line["matrix_cycles"] else ("", 0.0)
    estimated = share and not line["in_loops"] and blocks * warps >= 4
    return instructions, cycles, f"{100 * share:.0f} %" if estimated else "", str(blocks or "")


def _tile(line: dict[str, Any]) -> tuple[int, int, int]:
    """Queries, keys and warps of a line's tile."""
    queries, keys, warps = map(int, re.findall(r"\d+", line["tiles"].replace("x ", "x0 "))[:3])
    return queries, keys, warps


def estimate(line: dict[str, Any]) -> tuple[str, float]:
    """Busy cycles of a full tile (issue/special functions/shared memory/products), and the share of the peak estimated
    from them, of a line whose cycles are counted."""
    from sinkbed.kernels.triton.aot import CHIPS, PRODUCTS, estimated_share

    queries, keys, warps = _tile(line)
    operations = 2 * PRODUCTS[line["kernel"].partition("+")[0]] * queries * keys * int(line["head_dim"])
    special, shared, matrix = (int(line[f"{unit}_cycles"]) for unit in ("special", "shared", "matrix"))
    busy = (int(line["full_loop"]) * warps // 4, special, shared, matrix)
    return "/".join(map(str, busy)), estimated_share(CHIPS[line["arch"]], operations, *busy)


def checked_tiles(sizes: Sequence[int]) -> tuple[int, ...]:
    """Queries, keys, warps and stages of a tile that a compiler may be given. Raises ValueError."""
    queries, keys, warps, stages = sizes
    limits = {"M": (queries, 16, 256), "N": (keys, 16, 256), "WARPS": (warps, 1, 16)}
    for name, (size, least, most) in limits.items():
        if not least <= size <= most or size & (size - 1):
            raise ValueError(f"--tiles: expected {name} as a power of two, {least} to {most}, got {size}")
    if not 1 <= stages <= 16:
        raise ValueError(f"--tiles: expected STAGES of 1 to 16, got {stages}")
    return tuple(sizes)


def print_table(lines: Sequence[dict[str, Any]]) -> None:
    """The lines for people."""
    from rich.measure import Measurement
    from rich.table import Table

    table = Table(title="Compiled ahead of time: static counts, nothing was run", title_justify="left")
    table.caption = (
        "cycles: for a full tile, of issue/special functions/shared memory/matrix products\n"
        "estimate: share of the peak of matrix products in full tiles, computed from these cycles, not timed; may be "
        "off by more than a third, and does not rank tiles of one kernel"
    )
    table.caption_justify = "left"
    names = {
        "arch": "GPU", "kernel": "kernel", "mask": "mask", "dtype": "dtype", "head_dim": "D", "tiles": "tile",
        "registers": "reg.", "spilled": "spilled B", "in_loops": "in loops", "shared": "shared B",
        "full_loop": "full tile", "masked_loop": "masked",
    }  # fmt: skip
    for name in (*names.values(), "a 1,000 pairs", "cycles", "estimate", "blocks", "products"):
        left = name in ("GPU", "kernel", "mask", "dtype", "tile")
        table.add_column(name, justify="left" if left else "right", no_wrap=left)
    before = None
    for line in lines:
        if before not in (None, line["arch"]):
            table.add_section()
        before = line["arch"]
        if "error" in line:
            table.add_row(*(str(line[k]) for k in _KEYS), "refused")
            continue
        products = f"{line['matrix']} {line['unit']}" if line["unit"] else ""
        table.add_row(*(str(line[k]) for k in names), *_derived(line), products)
    out = console(180)
    out.width = Measurement.get(out, out.options.update(max_width=400), table).maximum  # a number cut short misleads
    out.print(table)


def run(command: str, argv: Sequence[str]) -> int:
    """Compile what is asked for, print it, compare it or store it."""
    if importlib.util.find_spec("triton") is None:
        raise ValueError("kernels: expected the package triton, got none; pip install triton")
    from sinkbed.kernels.triton.aot import CHIPS, DTYPES, KERNELS, MASKS, is_stored
    from sinkbed.kernels.triton.tiles import HEAD_DIMS

    archs, baseline = tuple(CHIPS), stored_table()
    parser = PlainParser(prog=f"sinkbed {command}", description=(__doc__ or "").replace("\n", " "))
    parser.add_argument("--arch", nargs="+", choices=archs, default=archs, help="GPUs (default: all)")
    parser.add_argument("--kernel", nargs="+", choices=KERNELS, default=KERNELS, help="default: all")
    parser.add_argument("--mask", nargs="+", choices=MASKS, default=("document",), help="default: document")
    parser.add_argument("--dtype", nargs="+", choices=tuple(DTYPES), default=("bf16",), help="default: bf16")
    parser.add_argument("--head_dim", nargs="+", type=int, choices=HEAD_DIMS, default=(64, 128), help="default: 64 128")
    parser.add_argument(
        "--all", action="store_true", help="every variant of the stored table, which is made anew with --write"
    )
    parser.add_argument(
        "--tiles", nargs=4, type=int, metavar=("M", "N", "WARPS", "STAGES"), help="instead of the table's"
    )
    parser.add_argument("--workers", type=positive, default=2, help="processes that compile")
    parser.add_argument("--csv", type=Path, help="write the table to this file")
    parser.add_argument("--json", type=Path, help="the same as a list of objects, refused variants with their error")
    parser.add_argument(
        "--check", type=Path, nargs="?", const=baseline, help="fail where it is worse than a stored table"
    )
    parser.add_argument("--write", action="store_true", help=f"store the table ({baseline.name})")
    arguments = parser.parse_args(list(argv))
    if arguments.write and arguments.tiles:
        raise ValueError("--write: expected the kernels' own tiles, got --tiles; leave one of them out")
    expected = read_table(arguments.check) if arguments.check else {}
    tiles = checked_tiles(arguments.tiles) if arguments.tiles else None
    sizes = [MASKS, DTYPES, HEAD_DIMS] if arguments.all else [arguments.mask, arguments.dtype, arguments.head_dim]
    tasks = dict.fromkeys(
        # delta reads no mask; a prefix LM's brings it a gradient of lse.
        (arch, kernel, "document" if kernel == "delta" and mask != "prefix_lm" else mask, dtype, head_dim, tiles)
        for arch, mask, dtype, head_dim, kernel in itertools.product(arguments.arch, *sizes, arguments.kernel)
        if not arguments.all or is_stored(arch, kernel, mask, dtype, head_dim)
    )
    lines = compile_all(list(tasks), arguments.workers)
    print_table(lines)
    wrong = [f"{' '.join(str(line[k]) for k in _KEYS)}: {line['error']}" for line in lines if "error" in line]
    if arguments.csv is not None:
        write_atomic(arguments.csv, to_csv(lines))
    if arguments.json is not None:
        write_atomic(arguments.json, json.dumps(lines, indent=1) + "\n")
    if arguments.check:
        wrong = violations(lines, expected)
        if not wrong:
            print(f"{counted(len(lines), 'variant')}, none worse than in {arguments.check}")
    if arguments.write and not wrong:
        # Lines of variants that were not compiled now stay, but for a whole new table.
        keep = baseline.is_file() and not arguments.all
        stored: dict[tuple[str, ...], Any] = dict(read_table(baseline)) if keep else {}
        stored |= {tuple(str(line[key]) for key in _KEYS): line for line in lines}
        write_atomic(baseline, to_csv(list(stored.values())))
    for message in wrong:
        print(message)
    return 1 if wrong else 0
