"""What an architecture says of itself, and what those that are like Llama have in common.

Rotary pairs are neighbours (2n, 2n + 1) here, halves (n, n + D/2) there: a permutation of the rows of the query and key
projections.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from sinkbed.model.config import DecoderConfig
from sinkbed.model.decoder import Decoder
from sinkbed.model.positions.rope import Rope
from sinkbed.registry import Choice

Parts = Mapping[str, Sequence[Any]]
ANY = ()
OF_LLAMA: Parts = {
    "position": ("rope",),
    "block": ("pre_norm",),
    "norm": ("rms",),
    "feed_forward": ("swiglu",),
    "attention_parts": ([],),
    "normalizer": ("softmax",),
    "softcap": (None,),
    "sink": ("none",),
    "n_registers": (0,),
}


def name_of(choice: Choice | list[Choice] | None) -> Any:
    """A choice without its options."""
    return next(iter(choice)) if isinstance(choice, dict) else choice


class Architecture:
    """A model class of `transformers` as a form of our decoder; by itself a Llama."""

    name: str
    """For messages."""
    parts: ClassVar[Parts]
    """Names of parts of `model.decoder` that it has, where they are others than Llama's; `ANY` for all."""

    def is_meant(self, config: DecoderConfig) -> bool:
        """Whether a decoder has what this one is taken for."""
        raise NotImplementedError

    def settings(self, decoder: Decoder, window: int | None) -> dict[str, Any]:
        """config.json of a decoder with a sliding window or none, as far as it is its own; raises ValueError."""
        c, rope = decoder.config, decoder.position
        if not isinstance(rope, Rope) or not rope.rotates_all:
            raise ValueError(
                "model.decoder.position: expected rope over whole heads, as Hugging Face's models have, got "
                f"{c.position!r}"
            )
        return {
            "hidden_size": c.d_model,
            "intermediate_size": c.d_ff,
            "num_hidden_layers": c.n_layers,
            "num_attention_heads": c.n_heads,
            "num_key_value_heads": c.key_heads,
            "head_dim": c.dim,
            "rms_norm_eps": c.norm_eps,
            "rope_theta": rope.theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": rope.theta},
            "attention_bias": False,
            **({} if window is None else {"sliding_window": window}),
        }

    def weights(self, decoder: Decoder) -> dict[str, Tensor]:
        """Its weights under their names there: each block's, embedding, norm and output matrix; tied ones once."""
        ours: Any = decoder
        state = {"model.embed_tokens.weight": ours.embedding.weight, "model.norm.weight": ours.norm.weight}
        if not decoder.config.tie_embeddings:
            state["lm_head.weight"] = ours.head.weight
        for i, block in enumerate(ours.blocks):
            state |= {f"model.layers.{i}.{name}": weight for name, weight in self.of_block(block).items()}
        return state

    def of_block(self, block: Any) -> dict[str, Tensor]:
        """A block's weights under their names in a layer."""
        return projections(block) | gated(block) | pre_norms(block)


def layer_types(decoder: Decoder, window: int | None) -> list[str]:
    """That all layers have the window, or none."""
    return ["full_attention" if window is None else "sliding_attention"] * decoder.config.n_layers


def projections(block: Any) -> dict[str, Tensor]:
    """Queries, keys, values and output of a block's attention."""
    c = block.attention.config
    q, k, v = block.attention.qkv.weight.split([n * c.dim for n in (c.n_heads, c.key_heads, c.key_heads)])
    return {
        "self_attn.q_proj.weight": halves(q, c.dim),
        "self_attn.k_proj.weight": halves(k, c.dim),
        "self_attn.v_proj.weight": v,
        "self_attn.o_proj.weight": block.attention.out.weight,
    }


def gate_and_up(block: Any) -> tuple[Tensor, Tensor]:
    """Both matrices [F, C] of a gated feed-forward."""
    layer = block.feed_forward
    return layer.gate_up.weight.chunk(2) if hasattr(layer, "gate_up") else (layer.gate.weight, layer.up.weight)


def gated(block: Any) -> dict[str, Tensor]:
    """A block's gated feed-forward."""
    gate, up = gate_and_up(block)
    return {
        "mlp.gate_proj.weight": gate,
        "mlp.up_proj.weight": up,
        "mlp.down_proj.weight": block.feed_forward.down.weight,
    }


def pre_norms(block: Any) -> dict[str, Tensor]:
    """The norms of a pre-norm block."""
    return {
        "input_layernorm.weight": block.attention_norm.weight,
        "post_attention_layernorm.weight": block.feed_forward_norm.weight,
    }


def halves(weight: Tensor, dim: int) -> Tensor:
    """Rows of a projection [H·D, C], or elements of a vector [D], from neighbouring rotary pairs to halves."""
    return weight.unflatten(0, (-1, dim // 2, 2)).transpose(1, 2).flatten(0, 2)
