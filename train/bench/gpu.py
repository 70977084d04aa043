"""The steps of `sinkbed check gpu`: what only a GPU can tell of the kernels.

Each is a function of the device and of sizes, prints as it goes, and raises AssertionError for a wrong result. They
need torch and triton alone. On a CPU Triton's interpreter runs them, at sizes of its own: that rehearses the steps.
"""

import itertools
import json
import platform
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from sinkbed.kernels import Mask, attention, attention_received, interval_mask
from sinkbed.kernels.triton.tiles import Tiles, override
from sinkbed.model import Decoder, DecoderConfig


class Sizes(NamedTuple):
    """How much of each step is done."""

    matrix: int
    """Side of the matrices that the ceiling is measured with."""
    memory: int
    """Bytes that are copied for the memory's ceiling."""
    shapes: tuple[tuple[int, int, int, int], ...]
    """B, H, Hkv, T of the sweep; reruns take the first."""
    dims: tuple[int, ...]
    reruns: int
    steps: int
    batch: tuple[int, int]
    """B, T of training."""


FULL = Sizes(
    matrix=8192,
    memory=2**31,
    shapes=((4, 16, 16, 4096), (16, 12, 2, 2048), (64, 6, 6, 1024)),
    dims=(64, 128),
    reruns=40,
    steps=40,
    batch=(4, 256),
)
REHEARSAL = Sizes(matrix=64, memory=2**16, shapes=((1, 2, 1, 40),), dims=(16,), reruns=2, steps=2, batch=(1, 32))

CANDIDATES = {
    "forward": ((128, 64, 8, 3), (128, 128, 8, 2), (128, 64, 4, 3), (64, 64, 4, 3), (128, 64, 8, 2)),
    "dq": ((64, 64, 4, 2), (128, 64, 8, 2), (128, 128, 8, 2), (64, 64, 4, 3), (128, 32, 8, 2)),
    "dkv": ((64, 64, 4, 2), (64, 128, 8, 2), (64, 128, 8, 3), (32, 128, 8, 2), (32, 64, 4, 2), (16, 128, 8, 2)),
}
"""Tiles (queries, keys, warps, stages) that the sweep tries of each kernel."""


def milliseconds(call: Callable[[], Any], device: str) -> float:
    """Median time of a call: by events on a GPU, its L2 emptied between calls."""
    if device == "cuda":
        return float(triton.testing.do_bench(call, warmup=5, rep=30, return_mode="median"))
    began = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - began)


def facts(device: str, sizes: Sizes) -> None:
    """What the machine is, and its ceilings: large bfloat16 matrix products and copies of memory."""
    said: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        names = ("name", "multi_processor_count", "total_memory", "L2_cache_size", "shared_memory_per_block_optin")
        said |= {"cuda": torch.version.cuda, **{name: getattr(properties, name, None) for name in names}}
    a = torch.randn(sizes.matrix, sizes.matrix, device=device, dtype=torch.bfloat16)
    source = torch.empty(sizes.memory, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    said["TFLOP/s"] = 2 * sizes.matrix**3 / milliseconds(lambda: a @ a, device) / 1e9
    said["TB/s"] = 2 * sizes.memory / milliseconds(lambda: target.copy_(source), device) / 1e9
    print(json.dumps(said, indent=1))


def inputs(shape: tuple[int, int, int, int], dim: int, device: str) -> list[Tensor]:
    """q, k, v in bfloat16, as a model's projections leave them."""
    B, H, Hkv, T = shape
    torch.manual_seed(0)
    drawn = (torch.randn(B, T, heads, dim, device=device, dtype=torch.bfloat16) for heads in (H, Hkv, Hkv))
    return [x.transpose(1, 2).requires_grad_() for x in drawn]


def masks(shape: tuple[int, int, int, int], device: str) -> Iterator[tuple[str, Mask]]:
    """The causal mask, and that of documents of an eighth of a row."""
    B, _, _, T = shape
    start = (torch.arange(T, device=device) // (T // 8) * (T // 8)).int().expand(B, -1).contiguous()
    for kind in ("causal", "document"):
        yield kind, interval_mask(B, T, doc_start=start, document=kind == "document", device=torch.device(device))


def reruns(device: str, sizes: Sizes) -> None:
    """Outputs and gradients have the same bits each time; a race would change them."""
    shape = sizes.shapes[0]
    for dim, (kind, mask) in itertools.product(sizes.dims, masks(shape, device)):
        q, k, v = inputs(shape, dim, device)
        upstream, first = torch.randn_like(q), None
        for number in range(sizes.reruns):
            output = attention(q, k, v, mask, statistics=True, implementation="triton").output
            now = [output.detach(), *torch.autograd.grad(output, (q, k, v), upstream)]
            first = first or now
            assert all(map(torch.equal, first, now)), f"D {dim}, {kind}: run {number} differs from the first"
        print(f"D {dim}, {kind}: {sizes.reruns} runs, the same bits", flush=True)


def training(device: str, sizes: Sizes) -> None:
    """A short training with a document mask and a learned sink has the losses of the CPU, also under autocast."""
    V, B, T = 256, *sizes.batch
    phrases = torch.randint(V, (32, 16), generator=torch.Generator().manual_seed(0))
    start = (torch.arange(T) // (T // 2) * (T // 2)).int().expand(B, -1).contiguous()
    config = DecoderConfig(n_layers=2, d_model=128, n_heads=2, n_kv_heads=1, d_ff=256, sink="learned")

    def losses(device: str, implementation: Any, bfloat16: bool = False) -> list[float]:
        torch.manual_seed(0)
        decoder = Decoder(config, V).to(device)
        decoder.implementation = implementation
        optimizer = torch.optim.AdamW(decoder.parameters(), 3e-3)
        mask = interval_mask(B, T, doc_start=start.to(device), document=True, shared_prefix=1)
        made = []
        for step in range(sizes.steps):
            generator = torch.Generator().manual_seed(1 + step)
            tokens = phrases[torch.randint(32, (B, T // 16 + 1), generator=generator)].flatten(1)[:, : T + 1].to(device)
            with torch.autocast(device, torch.bfloat16, enabled=bfloat16):
                loss = decoder(tokens[:, :-1], mask=mask, targets=tokens[:, 1:].contiguous()).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            made.append(float(loss.detach()))
        return made

    torch.backends.cuda.matmul.allow_tf32 = False
    expected = losses("cpu", "torch")
    limits = {"float32": 2e-2, "bfloat16": 1e-1} if device == "cuda" else {"float32": 1e-5}
    for name, limit in limits.items():
        made = losses(device, "triton", bfloat16=name == "bfloat16")
        gap = max(abs(a - b) for a, b in zip(expected, made, strict=True))
        print(f"{name}: loss {made[0]:.4f} to {made[-1]:.4f}, at most {gap:.1e} from the CPU's in float32", flush=True)
        assert gap < limit, f"{name}: expected losses within {limit} of the CPU's, got {gap:.3g}"


def peers(device: str, sizes: Sizes) -> None:
    """`sinkbed bench attention` at a shape that fills the chip."""
    from types import SimpleNamespace

    from sinkbed.train.bench import attention as bench

    B, H, Hkv, T = sizes.shapes[0]
    shape = {"batch": B, "heads": H, "kv_heads": Hkv, "lengths": [T], "dims": list(sizes.dims)}
    options = {"device": device, "dtype": "bfloat16", "layouts": ["causal", "mixed"], "threads": 1, "repeats": 11}
    bench.run(SimpleNamespace(**shape, **options, csv=None, plot=None))


def touch(device: str, sizes: Sizes) -> None:
    """Every kernel once on a short row, for a sanitizer to watch."""
    shape = (1, 2, 1, 300 if device == "cuda" else 40)
    T = shape[3]
    start = (torch.arange(T, device=device) // 70 * 70).int()[None]
    end = (start + 70).clamp_max(T).int()
    for shared, prefix in ((1, 0), (0, T // 2)):
        mask = interval_mask(1, T, doc_start=start, doc_end=end, document=True, shared_prefix=shared, prefix_lm=prefix)
        q, k, v = inputs(shape, 64, device)
        sink = torch.zeros(2, device=device, requires_grad=True)
        out = attention(q, k, v, mask, sink_logit=sink, statistics=True, implementation="triton")
        assert out.lse is not None
        attention_received(q, k, out.lse.detach(), mask, implementation="triton")
        torch.autograd.grad(out.output.float().sum(), (q, k, v, sink))


def sweep(device: str, sizes: Sizes) -> None:
    """Time of each kernel under each of its candidate tiles: one JSON object a line."""
    for dim, shape in itertools.product(sizes.dims, sizes.shapes):
        q, k, v = inputs(shape, dim, device)
        for (kind, mask), (kernel, candidates) in itertools.product(masks(shape, device), CANDIDATES.items()):
            for tiles in itertools.starmap(Tiles, candidates[: None if device == "cuda" else 1]):
                override.clear()
                override[kernel] = tiles
                line: dict[str, Any] = {"kernel": kernel, "D": dim, "B, H, Hkv, T": shape, "mask": kind, "tiles": tiles}
                try:
                    line["ms"] = round(_time_of(kernel, q, k, v, mask, device), 4)
                except Exception as error:  # too much shared memory, a compiler's refusal
                    line["refused"] = str(error).splitlines()[0][:200]
                print(json.dumps(line), flush=True)
    override.clear()


def _time_of(kernel: str, q: Tensor, k: Tensor, v: Tensor, mask: Mask, device: str) -> float:
    if kernel == "forward":
        with torch.no_grad():
            return milliseconds(lambda: attention(q, k, v, mask, implementation="triton"), device)
    output = attention(q, k, v, mask, implementation="triton").output
    upstream = torch.randn_like(output)
    return milliseconds(lambda: torch.autograd.grad(output, (q, k, v), upstream, retain_graph=True), device)
