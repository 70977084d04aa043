"""How a query scores the keys that it sees, and what makes weights of the scores."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sinkbed.kernels.mask import Mask
from sinkbed.kernels.normalizers import Normalizer


@dataclass(frozen=True, eq=False, kw_only=True)
class Scoring:
    """logits = cap(scale · q·k) − slope · (i − j) for query i and key j; weights = normalizer(logits).

    Here i and j are row positions, of which only the distance counts.
    """

    scale: float
    softcap: float | None = None
    """c of cap(x) = c · tanh(x / c) (Gemma 2, arXiv 2408.00118); None: the identity."""
    slopes: Tensor | None = None
    """[H], a slope a query head (ALiBi, arXiv 2108.12409), without gradient; None: 0."""
    normalizer: Normalizer | None = None
    """None: the softmax."""
    sink_logit: Tensor | None = None
    """[H] or [B, H, T], the logit of a key that is no token's, which joins the softmax."""
    sink_value: Tensor | None = None
    """[H, D], the value of that key; None: 0."""

    @property
    def is_plain(self) -> bool:
        """Whether tokens have scaled dot products and a softmax, for which implementations have a faster path."""
        return self.softcap is None and self.slopes is None and self.normalizer is None

    def logits(self, q: Tensor, k: Tensor, mask: Mask, queries: slice) -> Tensor:
        """[B, H, M, T] logits of M of the queries, −inf where hidden.

        q [B, H, T, D] and k [B, Hkv, T, D]; products are taken at least in float32.
        """
        return self.block(q, k, mask, slice(None), queries, k.shape[2])[0]

    def block(
        self, q: Tensor, k: Tensor, mask: Mask, rows: slice, queries: slice, end: int, hidden: float = float("-inf")
    ) -> tuple[Tensor, Tensor | None]:
        """Logits [B, H, M, N] of M of the queries and the first N = `end` keys, taken at least in float32, `hidden`
        where a key is; and tanh(x / c) of the cap, None without one. q and k are those of these rows."""
        B, H, T, D = q.shape
        k = k[:, :, :end]
        dtype = torch.promote_types(k.dtype, torch.float32)
        grouped = q[:, :, queries].to(dtype).reshape(B, k.shape[1], -1, D)  # the query heads of a key head together
        with no_autocast(q.device):
            logits = ((grouped * self.scale) @ k.to(dtype).mT).view(B, H, -1, end)
        squashed = None
        if self.softcap is not None:
            squashed = logits.div_(self.softcap).tanh_()
            logits = squashed * self.softcap
        if self.slopes is not None:
            position = torch.arange(T, device=q.device, dtype=logits.dtype)
            distance = position[:end] - position[queries, None]
            logits += self.slopes.to(logits.dtype)[:, None, None] * distance
        if mask.is_causal and queries.start is not None:  # the keys before the block are seen by all of it
            seen = torch.ones(logits.shape[2], end - queries.start, dtype=torch.bool, device=q.device).tril_()
            if torch.compiler.is_compiling():  # Inductor makes of a write into a slice a masked pass over the whole
                rest = torch.where(seen, logits[..., queries.start :], hidden)
                logits = torch.cat((logits[..., : queries.start], rest), -1)
            else:
                logits[..., queries.start :].masked_fill_(~seen, hidden)
        else:
            logits.masked_fill_(~mask.visible(q.device, queries, rows)[..., :end], hidden)
        return logits, squashed


def no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Products are taken in the dtype of what they are given."""
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else nullcontext()


def per_query(sink_logit: Tensor, lse: Tensor) -> Tensor:
    """Logits of a learned sink, [H] or [B, H, T], as they broadcast to lse [B, H, T], in its dtype."""
    return (sink_logit if sink_logit.ndim == 3 else sink_logit[None, :, None]).to(lse.dtype)
