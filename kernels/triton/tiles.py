"""Tile sizes of the kernels: chosen from what the compilers make of them (`sinkbed kernels --tiles …`), not timed.

With a document mask nothing is spilled inside a loop over tiles, but in float32 at D 256, which is for checks, and 12
bytes on sm_89 at D 128; what is spilled outside costs next to nothing. Among such tiles, for a query and a key, on
sm_80 the fewest cycles of the unit that is busiest (`aot.busy_cycles`), elsewhere the fewest instructions; then the
most blocks on a multiprocessor. A forward block at D 64 has no fewer than 128 queries: at 350 TFLOP/s blocks of 64
would read keys and values from the L2 cache at 5.5 TB/s, twice as fast. A forward pass with statistics has as many
queries and keys a tile as one without, for the same bits. On sm_90 at D 64 it is in two blocks of four warps: one of
eight issues a twelfth less, but all of its warps wait for one another in every tile.
"""

from typing import Any, NamedTuple

HEAD_DIMS = (16, 32, 64, 96, 128, 256)
"""D that the Triton kernels take. Here for readers without triton."""


class Tiles(NamedTuple):
    """Configuration of one kernel."""

    block_m: int
    """Queries a tile."""
    block_n: int
    """Keys a tile."""
    warps: int
    stages: int
    registers: int | None = None
    """At most, a lane; None leaves it to the compiler."""

    @property
    def options(self) -> dict[str, Any]:
        """How the kernel is compiled."""
        limit = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True, **limit}


# Architecture -> (kernel, BLOCK_D) -> tiles of 16-bit inputs.
_AMPERE = {
    ("forward", 32): Tiles(128, 64, 4, 3),
    ("forward", 64): Tiles(128, 64, 4, 2),
    ("forward", 128): Tiles(128, 32, 4, 2),
    ("forward+statistics", 128): Tiles(128, 32, 8, 2),  # of four warps it spills 56 bytes in the loop
    ("forward", 256): Tiles(32, 64, 4, 2),
    ("dq", 32): Tiles(128, 64, 8, 2),
    ("dq", 64): Tiles(128, 32, 4, 2),
    ("dq", 128): Tiles(128, 32, 8, 2),
    ("dq", 256): Tiles(32, 32, 4, 2),
    ("dkv", 32): Tiles(64, 128, 8, 2),
    ("dkv", 64): Tiles(32, 128, 4, 2),
    ("dkv", 128): Tiles(32, 64, 4, 2),
    ("dkv", 256): Tiles(32, 32, 4, 2),
}
_TILES = {
    "sm_80": _AMPERE,
    "sm_90": {
        ("forward", 32): Tiles(128, 64, 8, 3),
        ("forward+statistics", 32): Tiles(128, 64, 8, 3, registers=128),  # two blocks on a multiprocessor
        ("forward", 64): Tiles(128, 64, 4, 3),
        ("forward", 128): Tiles(128, 128, 8, 2),
        ("forward", 256): Tiles(128, 32, 8, 2),
        ("dq", 32): Tiles(64, 128, 4, 2),
        ("dq", 64): Tiles(128, 128, 8, 2),
        ("dq", 128): Tiles(128, 64, 8, 2),
        ("dq", 256): Tiles(128, 32, 8, 2),
        ("dkv", 32): Tiles(64, 64, 4, 2),
        ("dkv", 64): Tiles(64, 64, 4, 2),
        ("dkv", 128): Tiles(32, 128, 8, 2),
        ("dkv", 256): Tiles(64, 32, 8, 2),
    },
    "sm_100": {
        ("forward", 32): Tiles(128, 64, 8, 4),
        ("forward", 64): Tiles(128, 64, 8, 2),
        ("forward", 128): Tiles(128, 64, 8, 2),
        ("forward", 256): Tiles(128, 32, 8, 2),
        ("dq", 32): Tiles(128, 64, 8, 2),
        ("dq", 64): Tiles(128, 64, 8, 2),
        ("dq", 128): Tiles(128, 64, 8, 2),
        ("dq", 256): Tiles(128, 32, 8, 2),
        ("dkv", 32): Tiles(64, 128, 8, 2),
        ("dkv", 64): Tiles(32, 128, 8, 2),
        ("dkv", 128): Tiles(32, 32, 4, 2),
        ("dkv", 256): Tiles(32, 64, 8, 2),
    },
    "gfx942": {
        ("forward", 32): Tiles(128, 64, 4, 3),
        ("forward", 64): Tiles(128, 64, 4, 3),
        ("forward", 128): Tiles(128, 32, 4, 2),
        ("forward", 256): Tiles(64, 32, 4, 1),
        ("dq", 32): Tiles(128, 64, 8, 2),
        ("dq", 64): Tiles(128, 64, 8, 2),
        ("dq", 128): Tiles(128, 32, 8, 2),
        ("dq", 256): Tiles(64, 32, 4, 1),
        ("dkv", 32): Tiles(32, 64, 4, 2),
        ("dkv", 64): Tiles(32, 64, 4, 2),
        ("dkv", 128): Tiles(32, 64, 4, 2),
        ("dkv", 256): Tiles(16, 32, 4, 1),
    },
}
_RECEIVED = Tiles(64, 128, 8, 2)
_RECEIVED_256 = Tiles(64, 64, 4, 1)
# float32 inputs: three products instead of one on NVIDIA's matrix units, so that wide heads need small tiles.
_FULL_PRECISION = Tiles(32, 32, 4, 2)
_FULL_PRECISION_WIDE = {
    "forward": Tiles(32, 32, 8, 2),
    "dq": Tiles(16, 32, 4, 1),
    "dkv": Tiles(32, 16, 4, 1),
    "received": Tiles(64, 32, 8, 1),
}
_FULL_PRECISION_256 = Tiles(16, 16, 4, 1)
_INTERPRETED = Tiles(32, 32, 4, 1)

override: dict[str, Tiles] = {}
"""Tiles by kernel name that take precedence; for tests and sweeps."""


def tiles(architecture: str | None, kernel: str, itemsize: int, block_d: int) -> Tiles:
    """Configuration of a kernel.

    Args:
        architecture: of the device, such as `sm_90` or `gfx942`; None in Triton's interpreter. One without a table of
            its own takes that of the nearest with as little shared memory.
        kernel: `forward`, `dq`, `dkv` or `received`; `forward+statistics`, and `dkv+groups` of several query heads a
            key head, have the plain one's where they have no tiles of their own.
        itemsize: bytes of the inputs' dtype.
        block_d: head dim, padded to a power of two.
    """
    plain = kernel.partition("+")[0]
    if plain in override:
        return override[plain]
    if architecture is None:
        return _INTERPRETED
    if itemsize > 2:
        if block_d > 128:
            return _FULL_PRECISION_256
        wide = block_d > 64 and architecture.startswith("sm_")
        return _FULL_PRECISION_WIDE[plain] if wide else _FULL_PRECISION
    if kernel == "received":
        return _RECEIVED if block_d <= 128 else _RECEIVED_256
    if architecture not in _TILES:
        architecture = "gfx942" if architecture.startswith("gfx") else "sm_100" if architecture == "sm_103" else "sm_80"
    table = _TILES[architecture]
    return table.get((kernel, max(32, block_d))) or table[plain, max(32, block_d)]
