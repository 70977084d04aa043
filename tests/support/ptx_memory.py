"""Memory of `tests.support.ptx`: that of tensors, and that of a block, with who touched it."""

import numpy as np

Array = np.ndarray


class Fault(Exception):
    """What a GPU would not do, or would do with undefined results."""


class Memory:
    """Global memory: the storages of tensors at their own addresses. Anything outside them is a fault."""

    def __init__(self) -> None:
        self.buffers: dict[int, tuple[Array, str]] = {}

    def add(self, name: str, storage: Array) -> None:
        """storage: [bytes] uint8."""
        self.buffers[storage.__array_interface__["data"][0]] = storage, name

    def rows(self, addresses: Array, dtype: type, width: int) -> tuple[Array, Array]:
        """The buffer at `addresses` as [rows, width] of dtype, and the row of each address."""
        size = np.dtype(dtype).itemsize * width
        low, high = int(addresses.min()), int(addresses.max()) + size
        for start, (storage, name) in self.buffers.items():
            if start <= low < start + len(storage):
                if high > start + len(storage):
                    raise Fault(f"bytes {low - start} to {high - start} of {name}, which has {len(storage)}")
                return rows_of(storage, addresses - np.uint64(start), dtype, width)
        raise Fault(f"address {low:#x}, which is in no tensor")


def rows_of(storage: Array, offsets: Array, dtype: type, width: int) -> tuple[Array, Array]:
    """`storage` as [rows, width] of dtype, and the row of each offset, which must be aligned (§5.4)."""
    size = np.dtype(dtype).itemsize * width
    if (offsets % size).any():
        raise Fault(f"an access of {size} bytes that is not aligned")
    return storage[: len(storage) // size * size].view(dtype).reshape(-1, width), (offsets // size).astype(np.int64)


class Shared:
    """Shared memory of a block, [bytes] uint8 from address 0, and who touched what since the last barrier.

    Where one group writes what another reads with no barrier between, the result hangs on their order: a fault.
    """

    def __init__(self, size: int) -> None:
        size = -(-size // 16) * 16
        self.storage = np.full(size, 0xFF, np.uint8)
        self.readers, self.writers = (np.zeros(size, np.uint16) for _ in range(2))
        """A bit a group, for every byte."""
        self.unfenced = np.zeros(size, np.bool_)
        """Written, and not yet visible to the asynchronous proxy, through which wgmma reads (§9.7.13)."""

    def rows(self, bit: int, addresses: Array, dtype: type, width: int, writes: bool) -> tuple[Array, Array]:
        """[rows, width] of dtype and the row of each address, for a group of warps that reads or writes them."""
        size = np.dtype(dtype).itemsize * width
        if int(addresses.max()) + size > len(self.storage):
            raise Fault(f"byte {int(addresses.max())} of shared memory, which has {len(self.storage)}")
        rows, at = rows_of(self.storage, addresses, dtype, width)
        mine, others = (self.writers, self.readers) if writes else (self.readers, self.writers)
        if (others.reshape(-1, size)[at] & ~np.uint16(bit)).any():
            raise Fault("a race: shared memory that other warps " + ("read" if writes else "write"))
        mine.reshape(-1, size)[at] |= np.uint16(bit)
        if writes:
            self.unfenced.reshape(-1, size)[at] = True
        return rows, at

    def settle(self) -> None:
        """A barrier: what was written is there for all."""
        self.readers[:] = self.writers[:] = 0
