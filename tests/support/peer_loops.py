"""Busy cycles of other attention kernels of which speeds are published, for tests/kernels/published.csv.

A line of that file has the tile, the published speed and its source, and the cycles for which a tile keeps schedulers,
special functions, shared memory and matrix units busy; of a forward and a backward pass together the sum of their
loops, which have as many pairs of a query and a key a tile.

FlashAttention-2's loops are in a library that brings its machine code, such as that of the wheel `xformers==0.0.25`:

    python -m tests.support.peer_loops xformers/_C_flashattention.so

Those of Triton's tutorial and of FlexAttention are compiled here, from loops that do what theirs do.
"""

import argparse
import re
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import triton
import triton.language as tl

from sinkbed.kernels.triton.aot import CHIPS, busy_cycles, instructions_of, loops_of, machine_code, sass_lines, stand_in


@triton.jit
def _forward(Q, K, V, Out, Lse, scale, T, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, FLEX: tl.constexpr):
    """Without a mask. FLEX: scales before and after a score function, and knows of rows that see nothing."""
    row = tl.program_id(1).to(tl.int64) * T * D
    queries, keys, dims = tl.program_id(0) * M + tl.arange(0, M), tl.arange(0, N), tl.arange(0, D)
    q = tl.load(Q + row + queries[:, None] * D + dims[None, :])
    k_pointers = K + row + keys[None, :] * D + dims[:, None]
    v_pointers = V + row + keys[:, None] * D + dims[None, :]
    highest = tl.full([M], float("-inf"), tl.float32)
    total = tl.full([M], 1.0, tl.float32)
    output = tl.zeros([M, D], tl.float32)
    for _ in range(0, T, N):
        logits = tl.dot(q, tl.load(k_pointers))
        if FLEX:
            logits = logits * scale * 1.44269504
            new = tl.maximum(highest, tl.max(logits, 1))
            safe = tl.where(new == float("-inf"), 0, new)
            weights = tl.math.exp2(logits - safe[:, None])
            keep = tl.math.exp2(highest - safe)
        else:
            new = tl.maximum(highest, tl.max(logits, 1) * (scale * 1.44269504))
            weights = tl.math.exp2(logits * (scale * 1.44269504) - new[:, None])
            keep = tl.math.exp2(highest - new)
        total = total * keep + tl.sum(weights, 1)
        output = tl.dot(weights.to(V.dtype.element_ty), tl.load(v_pointers), output * keep[:, None])
        highest = new
        k_pointers += N * D
        v_pointers += N * D
    tl.store(Lse + tl.program_id(1) * T + queries, highest + tl.math.log2(total))
    tl.store(Out + row + queries[:, None] * D + dims[None, :], (output / total[:, None]).to(Out.dtype.element_ty))


@triton.jit
def _backward(Q, K, V, Grad, DQ, DK, DV, Lse, Delta, T, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """Gradients of N keys from the later queries, M at a time; then of as many queries from the earlier keys."""
    row = tl.program_id(1).to(tl.int64) * T * D
    first, dims = tl.program_id(0) * N, tl.arange(0, D)
    own = row + (first + tl.arange(0, N))[:, None] * D + dims[None, :]
    k, v = tl.load(K + own), tl.load(V + own)
    dk, dv = tl.zeros([N, D], tl.float32), tl.zeros([N, D], tl.float32)
    queries = first + N + tl.arange(0, M)
    q_pointers = Q + row + queries[None, :] * D + dims[:, None]
    grad_pointers = Grad + row + queries[:, None] * D + dims[None, :]
    for _ in range((T - first - N) // M):
        q = tl.load(q_pointers)
        weights = tl.math.exp2(tl.dot(k, q) - tl.load(Lse + queries)[None, :])
        grad = tl.load(grad_pointers)
        dv += tl.dot(weights.to(Q.dtype.element_ty), grad)
        d_logits = weights * (tl.dot(v, tl.trans(grad)) - tl.load(Delta + queries)[None, :])
        dk += tl.dot(d_logits.to(Q.dtype.element_ty), tl.trans(q))
        queries += M
        q_pointers += M * D
        grad_pointers += M * D
    tl.store(DK + own, dk)
    tl.store(DV + own, dv)
    own_q, own_grad = tl.load(Q + own), tl.load(Grad + own)
    lse, delta = tl.load(Lse + first + tl.arange(0, N)), tl.load(Delta + first + tl.arange(0, N))
    dq = tl.zeros([N, D], tl.float32)
    others = row + tl.arange(0, M)[None, :] * D + dims[:, None]
    for _ in range(first // M):
        key, value = tl.load(K + others), tl.load(V + others)
        weights = tl.math.exp2(tl.dot(own_q, key) - lse[:, None])
        d_logits = weights * (tl.dot(own_grad, value) - delta[:, None])
        dq += tl.dot(d_logits.to(Q.dtype.element_ty), tl.trans(key))
        others += M * D
    tl.store(DQ + own, dq)


def forward_loop(arch: str, head_dim: int, queries: int, keys: int, warps: int, flex: bool) -> tuple[int, ...]:
    """Cycles of issue, special functions, shared memory and products of a tile of the forward loop of Triton's
    tutorial, or of FlexAttention, in three stages."""
    x, lse = torch.zeros(1, 2, 1024, head_dim, dtype=torch.float16), torch.zeros(1, 2, 1024)
    stand_in(arch)
    arguments = (x, x, x, x, lse, 0.125, 1024, head_dim, queries, keys, flex)
    compiled = _forward.warmup(*arguments, grid=(1,), num_warps=warps, num_stages=3)
    [cycles] = _busy(machine_code(compiled)[1], warps, arch)
    return cycles


def backward_loops(arch: str, head_dim: int, queries: int, keys: int, warps: int) -> tuple[int, ...]:
    """The same of the two loops of the tutorial's backward pass, in five stages, together."""
    x, lse = torch.zeros(1, 2, 1024, head_dim, dtype=torch.float16), torch.zeros(1, 2, 1024)
    stand_in(arch)
    arguments = (*[x] * 7, lse, lse, 1024, head_dim, queries, keys)
    compiled = _backward.warmup(*arguments, grid=(1,), num_warps=warps, num_stages=5)
    keys_loop, queries_loop = _busy(machine_code(compiled)[1], warps, arch)
    return tuple(a + b for a, b in zip(keys_loop, queries_loop, strict=True))


def _busy(lines: list[str], warps: int, arch: str) -> list[tuple[int, ...]]:
    """Of each innermost loop with matrix products."""
    loops = (instructions_of(lines)[begin:end] for begin, end in loops_of(lines))
    busy = [(len(loop) * warps // 4, *busy_cycles(loop, warps, CHIPS[arch]).values()) for loop in loops]
    return [cycles for cycles in busy if cycles[-1]]


def cubins(library: bytes) -> Iterator[tuple[int, bytes]]:
    """The pieces of machine code that nvcc put into a shared library, each with its architecture, such as 80.

    Raises ValueError for one that is compressed.
    """
    for container in re.finditer(rb"\x50\xed\x55\xba", library):
        _, _, header, size = struct.unpack_from("<IHHQ", library, container.start())
        at = container.start() + header
        end = min(at + size, len(library))
        while at < end:
            # Kind (1: PTX, 2: ELF), a version, the header's size, the size; at 28 the architecture, at 40 flags.
            kind, _, header, size = struct.unpack_from("<HHIQ", library, at)
            [arch], [flags] = struct.unpack_from("<I", library, at + 28), struct.unpack_from("<Q", library, at + 40)
            if kind == 2:
                if flags & 0x2000:
                    raise ValueError("machine code: expected some that is not compressed")
                yield arch, library[at + header : at + header + size]
            at += header + size


def functions(cubin: bytes) -> dict[str, str]:
    """The disassembled functions of machine code."""
    with tempfile.NamedTemporaryFile() as file:
        Path(file.name).write_bytes(cubin)
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    parts = re.split(r"\n\.text\.(\S+):\n", text)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def main() -> None:
    """Print the loop over tiles of FlashAttention-2's passes, in bfloat16 without dropout, mask or ALiBi."""
    parser = argparse.ArgumentParser()
    parser.add_argument("library", type=Path)
    # Head dim, queries, keys, warps; no dropout, no causal mask, no window, no ALiBi.
    plain = re.compile(r"_Z\d+flash_(fwd|bwd).*_traitsILi(\d+)ELi(\d+)ELi(\d+)ELi(\d+)E.*bfloat16.*EELb0ELb0ELb0ELb0E")
    shortest: dict[str, tuple[int, ...]] = {}
    for arch, cubin in cubins(parser.parse_args().library.read_bytes()):
        if not re.search(rb"flash_(fwd_kernel|bwd_dq_dk_dv_loop_seqk).*bfloat16", cubin):
            continue
        for name, text in functions(cubin).items():
            if match := plain.match(name):
                head_dim, queries, keys, warps = map(int, match.groups()[1:])
                busy = _busy(sass_lines(text), warps, f"sm_{arch}")
                most = max(cycles[-1] for cycles in busy)  # a masked tile's loop has as many products
                title = f"sm_{arch} {match[1]} D {head_dim}, {queries}x{keys} w{warps}"
                tiles = [cycles for cycles in busy if cycles[-1] == most]
                shortest[title] = min([*tiles, *([shortest[title]] if title in shortest else [])])
    if not shortest:
        parser.error("library: expected the machine code of FlashAttention-2, got none")
    for title, cycles in shortest.items():
        print(f"{title}: {'/'.join(map(str, cycles))}")


if __name__ == "__main__":
    main()
