"""The shape of a decoder, checked where it is written down. Imports nothing heavy: the command line reads it."""

from dataclasses import dataclass, field

from sinkbed.kernels.normalizers import NORMALIZERS
from sinkbed.model.attention_parts import ATTENTION_PARTS
from sinkbed.model.blocks import BLOCKS
from sinkbed.model.feed_forward import FEED_FORWARDS
from sinkbed.model.initializers import INITIALIZERS
from sinkbed.model.norms import NORMS
from sinkbed.model.positions import POSITIONS
from sinkbed.model.sinks import SINKS
from sinkbed.ranges import check_number
from sinkbed.registry import Choice, plain

PARTS = {
    "position": POSITIONS,
    "block": BLOCKS,
    "norm": NORMS,
    "feed_forward": FEED_FORWARDS,
    "normalizer": NORMALIZERS,
    "sink": SINKS,
    "init": INITIALIZERS,
}
"""Parts of which a decoder has one, by their keys."""
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
    """F, width of the feed-forward; 0 for those without a width, `none` and `linear`."""
    position: Choice = "rope"
    """Position encoding, a file of model/positions."""
    block: Choice = "pre_norm"
    """Where the norms of a block stand, a file of model/blocks."""
    norm: Choice = "rms"
    """Norm of a block's parts and of the end, a file of model/norms."""
    norm_eps: float = 1e-5
    """Added to the mean square in a norm."""
    feed_forward: Choice = "swiglu"
    """Feed-forward of a block, a file of model/feed_forward."""
    attention_parts: list[Choice] = field(default_factory=list)
    """What attention has besides its projections (gates, norms of heads …), in order; files of
    model/attention_parts."""
    tie_embeddings: bool = False
    """Whether the output matrix is the embedding's."""
    normalizer: Choice = "softmax"
    """How logits become the weights of values, a file of kernels/normalizers."""
    softcap: float | None = None
    """Logits are softcap · tanh(logits / softcap) where set (Gemma 2, arXiv 2408.00118)."""
    sink: Choice = "none"
    """A key that is no token's, for attention to rest on, a file of model/sinks."""
    n_registers: int = 0
    """Learned vectors before every row, which every query sees (arXiv 2309.16588)."""
    init: Choice = "residual_scaled"
    """How matrices are drawn, a file of model/initializers."""
    init_std: float = 0.02
    """Standard deviation of the normal initialisation."""

    def __post_init__(self) -> None:
        for name, registry in PARTS.items():
            choice = getattr(self, name)
            registry.check(choice)
            object.__setattr__(self, name, plain(choice))
        for choice in self.attention_parts:
            ATTENTION_PARTS.check(choice)
        object.__setattr__(self, "attention_parts", list(map(plain, self.attention_parts)))
        parts = [ATTENTION_PARTS.name_of(choice) for choice in self.attention_parts]
        if len(set(parts)) < len(parts):
            raise ValueError(f"model.decoder.attention_parts: expected each once, got {', '.join(parts)}")
        if self.normalizer != "softmax" and self.sink != "none":
            raise ValueError(
                f"model.decoder.sink: expected none beside normalizer {self.normalizer!r}, whose weights no sink logit "
                f"joins, got {self.sink!r}"
            )
        check_number("model.decoder.n_registers", self.n_registers, least=0, integer=True)
        if self.n_registers and self.normalizer != "softmax":
            raise ValueError(
                f"model.decoder.n_registers: expected 0 beside normalizer {self.normalizer!r}, under which their mass "
                f"is not measured, got {self.n_registers}"
            )
        check_number("model.decoder.n_layers", self.n_layers, least=1, most=_MOST_LAYERS, integer=True)
        for name in ("d_model", "n_heads", "n_kv_heads", "head_dim"):
            if getattr(self, name) is not None or name in ("d_model", "n_heads"):
                check_number(f"model.decoder.{name}", getattr(self, name), least=1, integer=True)
        if self.feed_forward in ("none", "linear"):
            if self.d_ff:
                raise ValueError(
                    f"model.decoder.d_ff: expected 0 beside feed_forward {self.feed_forward}, got {self.d_ff!r}"
                )
        else:
            if self.d_ff == 0:
                raise ValueError(
                    f"model.decoder.d_ff: expected at least 1 beside feed_forward {self.feed_forward!r}, got 0, which "
                    "none and linear have"
                )
            check_number("model.decoder.d_ff", self.d_ff, least=1, integer=True)
        if self.n_heads % self.key_heads:
            raise ValueError(
                f"model.decoder.n_kv_heads: expected a divisor of n_heads={self.n_heads}, got {self.n_kv_heads}"
            )
        if self.head_dim is None and self.d_model % self.n_heads:
            raise ValueError(
                f"model.decoder.d_model: expected a multiple of n_heads={self.n_heads}, got {self.d_model}; change "
                "one, or set head_dim"
            )
        for name in ("norm_eps", "init_std"):
            check_number(f"model.decoder.{name}", getattr(self, name), above=0)
        if self.softcap is not None:
            check_number("model.decoder.softcap", self.softcap, above=0)

    @property
    def key_heads(self) -> int:
        """Hkv, resolved."""
        return self.n_kv_heads or self.n_heads

    @property
    def dim(self) -> int:
        """D, resolved."""
        return self.head_dim or self.d_model // self.n_heads
