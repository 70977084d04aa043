"""The contenders of `sinkbed bench attention`: our operator, torch's and others', on the same inputs."""

import functools
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sinkbed.kernels import Mask, attention, interval_mask
from sinkbed.kernels.reference import probabilities
from sinkbed.kernels.scoring import Scoring

OURS = ("Sinkbed", "Sinkbed + statistics")
Contender = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One input: H query and Hkv key heads, T positions, D head dim."""

    layout: str
    """`causal`: one document a row. `even`: eight of equal length. `mixed`: lengths as of web text, cut at T."""
    batch: int
    heads: int
    key_heads: int
    length: int
    dim: int
    dtype: torch.dtype
    device: torch.device

    def documents(self) -> list[int]:
        """Lengths of the documents of a row; the same in every row."""
        T = self.length
        if self.layout == "causal":
            return [T]
        if self.layout == "even":
            return [T * (i + 1) // 8 - T * i // 8 for i in range(8)]
        generator = torch.Generator().manual_seed(2)
        lengths: list[int] = []
        while sum(lengths) < T:
            drawn = int(torch.empty(1).log_normal_(5.0, 1.2, generator=generator))
            lengths.append(min(max(1, drawn), T - sum(lengths)))
        return lengths

    def flops(self) -> float:
        """Of the forward pass."""
        return 2.0 * self.batch * self.heads * self.dim * sum(n * n for n in self.documents())

    def boundaries(self) -> tuple[Tensor, Tensor]:
        """doc_start, doc_end [B, T] int32."""
        lengths = torch.tensor(self.documents())
        end = lengths.cumsum(0)
        pair = (x.repeat_interleave(lengths).int().expand(self.batch, -1).contiguous() for x in (end - lengths, end))
        start, stop = (x.to(self.device) for x in pair)
        return start, stop

    def mask(self) -> Mask:
        """The document mask; plain causal where a row is one document."""
        start, end = self.boundaries()
        return interval_mask(
            self.batch, self.length, doc_start=start, doc_end=end, document=self.layout != "causal", device=self.device
        )

    def inputs(self) -> list[Tensor]:
        """q, k, v as a model's projections leave them: [B, T, H, D] in memory, seen as [B, H, T, D]."""
        torch.manual_seed(0)
        shapes = [(self.batch, self.length, heads, self.dim) for heads in (self.heads, self.key_heads, self.key_heads)]
        drawn = [torch.randn(shape, dtype=self.dtype, device=self.device) for shape in shapes]
        return [x.transpose(1, 2).requires_grad_() for x in drawn]


def contenders(case: Case) -> Iterator[tuple[str, Contender | str]]:
    """Ours first, then the peers of the device, each with a function or the reason why it is not there."""
    mask = case.mask()
    yield OURS[0], lambda q, k, v: attention(q, k, v, mask).output
    yield OURS[1], lambda q, k, v: attention(q, k, v, mask, statistics=True).output
    groups = case.heads // case.key_heads
    plain = case.layout == "causal"

    def sdpa(backend: SDPBackend, repeated: bool = False) -> Contender:
        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            bias = None if plain else mask.bias(case.dtype, case.device)
            with sdpa_kernel(backend):
                if repeated:
                    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
                gqa = groups > 1 and not repeated
                return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=plain, enable_gqa=gqa)

        return call

    if case.device.type == "cpu":
        yield "SDPA flash", sdpa(SDPBackend.FLASH_ATTENTION)
        yield "SDPA math", sdpa(SDPBackend.MATH)
        yield "eager + statistics", _eager(case, mask)
        return
    no_mask = "takes no document mask"
    yield "SDPA flash", sdpa(SDPBackend.FLASH_ATTENTION) if plain else no_mask
    yield "SDPA cuDNN", sdpa(SDPBackend.CUDNN_ATTENTION) if plain else no_mask
    # It takes no groups: who uses it pays for the copies of k and v.
    repeated = ", k and v repeated" if groups > 1 else ""
    yield f"SDPA efficient{repeated}", sdpa(SDPBackend.EFFICIENT_ATTENTION, repeated=groups > 1)
    yield "FlexAttention", _flex(case)
    yield "flash-attn", _flash_attn(case)
    yield "fla", _fla(case)


def _eager(case: Case, mask: Mask) -> Contender:
    """The common way to look at a sink: the whole T×T matrix, output and masses read off it."""
    start = case.boundaries()[0].long()[:, None, :, None].expand(-1, case.heads, -1, 1)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        a, _ = probabilities(q, k, mask, Scoring(scale=case.dim**-0.5))
        with torch.no_grad():
            a[..., 0].clone(), a.gather(-1, start).clone()
        return a @ v.repeat_interleave(case.heads // case.key_heads, 1)

    return call


def _flex(case: Case) -> Contender:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    start, _ = case.boundaries()
    compiled = torch.compile(flex_attention, dynamic=False)

    @functools.cache
    def block_mask() -> Any:
        T = case.length
        return create_block_mask(
            lambda b, h, i, j: (j <= i) & (j >= start[b, i]), case.batch, None, T, T, case.device.type
        )

    return lambda q, k, v: compiled(q, k, v, block_mask=block_mask(), enable_gqa=case.heads != case.key_heads)


def _flash_attn(case: Case) -> Contender | str:
    longest = max(case.documents())
    return _unpadded(
        case, "flash_attn", "flash_attn_varlen_func", torch.int32,
        lambda call, q, k, v, ends: call(q, k, v, ends, ends, longest, longest, causal=True),
    )  # fmt: skip


def _fla(case: Case) -> Contender | str:
    return _unpadded(
        case, "fla.ops.attn", "parallel_attn", torch.int64,
        lambda call, q, k, v, ends: call(q[None], k[None], v[None], cu_seqlens=ends),
    )  # fmt: skip


def _unpadded(case: Case, module: str, name: str, kind: torch.dtype, apply: Callable[..., Tensor]) -> Contender | str:
    """A peer that takes all documents of a batch end to end, [B·T, H, D], with their offsets."""
    try:
        function = getattr(importlib.import_module(module), name)
    except ImportError:
        return "not installed"
    lengths = torch.tensor(case.documents() * case.batch)
    offsets = F.pad(lengths.cumsum(0), (1, 0)).to(case.device, kind)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        flat = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
        out = apply(function, *flat, offsets)
        return out.view(case.batch, case.length, case.heads, case.dim).transpose(1, 2)

    return call
