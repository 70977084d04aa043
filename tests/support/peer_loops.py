"""Busy cycles of other attention kernels of which speeds are published, for kernels/triton/published.csv.

FlashAttention-2's are in a library that brings its machine code, such as that of the wheel `xformers==0.0.25`:

    python -m tests.support.peer_loops xformers/_C_flashattention.so

The forward passes of Triton's tutorial and of FlexAttention are compiled here, from a loop that does what theirs do.
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

from sinkbed.kernels.triton.aot import CHIPS, busy_cycles, counts_of, instructions_of, loops_of, sass_lines, stand_in


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


def forward_loop(arch: str, head_dim: int, queries: int, keys: int, warps: int, flex: bool) -> tuple[int, ...]:
    """Cycles of issue, special functions, shared memory and products of a tile of the forward loop of Triton's
    tutorial, or of FlexAttention, in three stages."""
    chip = stand_in(arch)
    x, lse = torch.zeros(1, 2, 1024, head_dim, dtype=torch.float16), torch.zeros(1, 2, 1024)
    arguments = (x, x, x, x, lse, 0.125, 1024, head_dim, queries, keys, flex)
    counts = counts_of(_forward.warmup(*arguments, grid=(1,), num_warps=warps, num_stages=3), {}, chip)
    return counts.full_loop * warps // 4, counts.special_cycles, counts.shared_cycles, counts.matrix_cycles


def machine_code(library: bytes) -> Iterator[tuple[int, bytes]]:
    """The pieces of machine code that nvcc put into a shared library, each with its architecture, such as 80."""
    for container in re.finditer(rb"\x50\xed\x55\xba", library):
        _, _, header, size = struct.unpack_from("<IHHQ", library, container.start())
        at = container.start() + header
        end = min(at + size, len(library))
        while at < end:
            kind, _, header, size = struct.unpack_from("<HHIQ", library, at)
            [arch] = struct.unpack_from("<I", library, at + 28)
            if kind == 2:
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
    for arch, cubin in machine_code(parser.parse_args().library.read_bytes()):
        if not re.search(rb"flash_(fwd_kernel|bwd_dq_dk_dv_loop_seqk).*bfloat16", cubin):
            continue
        for name, text in functions(cubin).items():
            if match := plain.match(name):
                head_dim, queries, keys, warps = map(int, match.groups()[1:])
                lines = sass_lines(text)
                loops = (instructions_of(lines)[begin:end] for begin, end in loops_of(lines))
                busy = [
                    (len(loop) * warps // 4, *busy_cycles(loop, warps, CHIPS[f"sm_{arch}"]).values()) for loop in loops
                ]
                most = max(cycles[-1] for cycles in busy)
                title = f"sm_{arch} {match[1]} D {head_dim}, {queries}x{keys} w{warps}"
                tiles = [cycles for cycles in busy if cycles[-1] == most]
                shortest[title] = min([*tiles, *([shortest[title]] if title in shortest else [])])
    for title, cycles in shortest.items():
        print(f"{title}: {'/'.join(map(str, cycles))}")


if __name__ == "__main__":
    main()
