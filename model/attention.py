"""Self-attention: the projections around `kernels.attention`."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from sinkbed.kernels import AttentionOutput, Implementation, Mask, Statistics, attention
from sinkbed.kernels.normalizers import NORMALIZERS, Normalizer, check_weights
from sinkbed.kernels.scoring import Scoring
from sinkbed.model.attention_parts import ATTENTION_PARTS
from sinkbed.model.config import DecoderConfig
from sinkbed.model.positions import PositionEncoding
from sinkbed.model.registers import of_tokens
from sinkbed.model.sinks import SINKS, Sink


class Operator(nn.Module):
    """`kernels.attention` as a module without weights: hooks see what it is given and what it makes."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, *, registers: int = 0, **options: Any
    ) -> AttentionOutput:
        """See `kernels.attention`; statistics without the first `registers` positions of a row."""
        out = attention(q, k, v, mask, **options)
        if not registers or out.statistics is None:
            return out
        assert mask is not None
        return of_tokens(out, q, k, mask, scoring_of(q, options), registers)


def scoring_of(q: Tensor, options: dict[str, Any]) -> Scoring:
    """How the operator scores, of what it is called with."""
    return Scoring(scale=q.shape[-1] ** -0.5, **{name: options[name] for name in ("softcap", "slopes", "normalizer")})


@dataclass(frozen=True, eq=False, kw_only=True)
class ForwardPass:
    """What the layers of one forward pass have in common."""

    position: PositionEncoding
    prepared: Any
    """What the position encoding has prepared."""
    mask: Mask | None
    statistics: bool
    implementation: Implementation | None
    left: dict[str, Tensor] = field(default_factory=dict)
    """What layers leave for later ones."""


class SelfAttention(nn.Module):
    """Grouped-query self-attention with the parts and the learned sink of the config."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        heads = config.n_heads + 2 * config.key_heads
        self.qkv = nn.Linear(config.d_model, heads * config.dim, bias=False)
        self.out = nn.Linear(config.n_heads * config.dim, config.d_model, bias=False)
        self.operator = Operator()
        self.normalizer: Normalizer | None = NORMALIZERS.make(config.normalizer, config.n_heads)
        if self.normalizer is not None:
            check_weights(self.normalizer, config.n_heads)
        self.sink: Sink | None = SINKS.make(config.sink, config)
        self.parts: Any = nn.ModuleList(
            ATTENTION_PARTS.make(choice, config, layer) for choice in config.attention_parts
        )

    def forward(self, x: Tensor, run: ForwardPass) -> tuple[Tensor, Statistics | None]:
        """x [B, T, C] -> [B, T, C], and the statistics [B, H, T] when asked for."""
        c = self.config
        q_k, v = self.qkv(x).unflatten(-1, (-1, c.dim)).split([c.n_heads + c.key_heads, c.key_heads], dim=2)
        for part in self.parts:
            q_k, v = part.queries_keys(q_k), part.values(v, x, run.left)
        rotated = run.position.rotate(q_k, run.prepared)
        q, k = (y.transpose(1, 2) for y in rotated.split([c.n_heads, c.key_heads], dim=2))
        logit, value = (None, None) if self.sink is None else self.sink.key(q)
        out = self.operator(
            q,
            k,
            v.transpose(1, 2),
            run.mask,
            softcap=c.softcap,
            slopes=run.position.slopes,
            sink_logit=logit,
            sink_value=value,
            normalizer=self.normalizer,
            registers=c.n_registers,
            statistics=run.statistics,
            implementation=run.implementation,
        )
        o = out.output.transpose(1, 2)
        for part in self.parts:
            o = part.output(o, x)
        return self.out(o.flatten(2)), out.statistics
