"""The shape of a decoder, checked where it is written down. Imports nothing heavy: the command line reads it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sinkbed.model.feed_forward import FEED_FORWARDS
from sinkbed.model.norms import NORMS
from sinkbed.model.positions import POSITIONS
from sinkbed.ranges import check_number
from sinkbed.registry import Choice, plain

_MOST_LAYERS = 10_000
"""A module takes a millisecond to make; a slip of the hand should not take minutes."""


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Shape and parts of a decoder.

    Raises ValueError for sizes that do not fit each other.
    """

    n_layers: int
    """L, number of blocks."""
    d_model: int
    """C, width of the residual stream."""
    n_heads: int
    """H, query heads a layer."""
    n_kv_heads: int | None = None
    """Hkv, key/value heads a layer (GQA, arXiv 2305.13245); null is H."""
    head_dim: int | None = None
    """D; null is d_model / n_heads."""
    d_ff: int
    """F, width of the feed-forward."""
    position: Choice = "rope"
    """Position encoding, a file of model/positions."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies (arXiv 2104.09864)."""
    norm: Choice = "rms"
    """Norm before each part of a block and at the end, a file of model/norms."""
    feed_forward: Choice = "swiglu"
    """Feed-forward of a block, a file of model/feed_forward."""
    norm_eps: float = 1e-5
    """Added to the mean square in a norm."""
    tie_embeddings: bool = False
    """Whether the output matrix is the embedding's."""
    normalizer: Choice = "softmax"
    """How logits become the weights of values, a file of kernels/normalizers; all but the softmax need
    `model.implementation: reference`."""
    sink: Literal["none", "learned", "off_by_one"] = "none"
    """A logit per head that joins the softmax without a value: learned from 0 (arXiv 2508.10925), or 0
    for good (softmax-off-by-one)."""
    init_std: float = 0.02
    """Standard deviation of the normal initialisation; matrices that write to the residual stream get
    init_std / √(2L)."""

    def __post_init__(self) -> None:
        for registry, choice in ((POSITIONS, self.position), (NORMS, self.norm), (FEED_FORWARDS, self.feed_forward)):
            registry.check(choice)
        for part in ("position", "norm", "feed_forward", "normalizer"):
            object.__setattr__(self, part, plain(getattr(self, part)))
        if self.normalizer != "softmax" and self.sink != "none":
            raise ValueError(
                f"sink: expected none beside normalizer {self.normalizer!r}, whose weights no sink logit joins, got "
                f"{self.sink!r}"
            )
        check_number("n_layers", self.n_layers, least=1, most=_MOST_LAYERS)
        for name in ("d_model", "n_heads", "d_ff"):
            check_number(name, getattr(self, name), least=1)
        if self.n_kv_heads is not None and (self.n_kv_heads < 1 or self.n_heads % self.n_kv_heads):
            raise ValueError(f"n_kv_heads: expected a divisor of n_heads={self.n_heads}, got {self.n_kv_heads}")
        if self.head_dim is None and self.d_model % self.n_heads:
            raise ValueError(
                f"d_model: expected a multiple of n_heads={self.n_heads}, got {self.d_model}; change one, or set "
                "head_dim"
            )
        if self.dim % 2 or self.dim < 2:
            raise ValueError(f"head_dim: expected an even number (RoPE rotates pairs), got {self.dim}")
        for name in ("rope_theta", "norm_eps", "init_std"):
            check_number(name, getattr(self, name), above=0)

    @property
    def groups(self) -> int:
        """Query heads that share one key/value head."""
        return self.n_heads // self.key_heads

    @property
    def key_heads(self) -> int:
        """Hkv, resolved."""
        return self.n_kv_heads or self.n_heads

    @property
    def dim(self) -> int:
        """D, resolved."""
        return self.head_dim or self.d_model // self.n_heads
