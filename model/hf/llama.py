"""Our decoder as Hugging Face's Llama: config.json and the weights under Llama's names.

Nothing of `transformers` is needed. With the same weights both models give the same logits in float32. The one
difference is the order of rotary pairs: neighbours (2n, 2n + 1) here, halves (n, n + D/2) there, a permutation of the
rows of the query and key projections.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor

from sinkbed.model.decoder import Decoder
from sinkbed.model.positions.rope import Rope

CONFIG, WEIGHTS = "config.json", "model.safetensors"
_PARTS: dict[str, Any] = {
    "sink": "none",
    "normalizer": "softmax",
    "softcap": None,
    "norm": "rms",
    "feed_forward": "swiglu",
    "block": "pre_norm",
    "attention_parts": [],
    "n_registers": 0,
}


def llama_config(
    decoder: Decoder, *, bos_id: int, eos_id: int, context_length: int, window: int | None = None
) -> dict[str, Any]:
    """config.json of the decoder as a `LlamaForCausalLM`, or with a sliding window as a `MistralForCausalLM`, whose
    weights have the same names. A query sees the last `window` keys, its own among them, in both.

    Raises ValueError for what Llama cannot express.
    """
    c = decoder.config
    for part, of_llama in _PARTS.items():
        if getattr(c, part) != of_llama:
            raise ValueError(
                f"model.decoder.{part}: expected {of_llama}, which Hugging Face's Llama has, got {getattr(c, part)!r}"
            )
    rope = decoder.position
    if not isinstance(rope, Rope) or not rope.rotates_all:
        raise ValueError(
            f"model.decoder.position: expected rope over whole heads, as Hugging Face's Llama has, got {c.position!r}"
        )
    kind: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu"}
    kind |= {"attention_bias": False, "mlp_bias": False}
    if window is not None:
        kind = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_act": "silu"}
        kind["sliding_window"] = window
    return {
        **kind,
        "vocab_size": decoder.vocab_size,
        "hidden_size": c.d_model,
        "intermediate_size": c.d_ff,
        "num_hidden_layers": c.n_layers,
        "num_attention_heads": c.n_heads,
        "num_key_value_heads": c.key_heads,
        "head_dim": c.dim,
        "rms_norm_eps": c.norm_eps,
        "rope_theta": rope.theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": rope.theta},
        "max_position_embeddings": context_length,
        "tie_word_embeddings": c.tie_embeddings,
        "initializer_range": c.init_std,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "dtype": "float32",
    }


def to_llama(decoder: Decoder) -> dict[str, Tensor]:
    """The decoder's weights under Llama's names; tied ones once."""
    c = decoder.config
    state: dict[str, Tensor] = {
        "model.embed_tokens.weight": decoder.embedding.weight,
        "model.norm.weight": cast(Tensor, decoder.norm.weight),
    }
    if not c.tie_embeddings:
        state["lm_head.weight"] = decoder.head.weight
    for i, block in enumerate(cast(Any, decoder.blocks)):
        q, k, v = block.attention.qkv.weight.split([n * c.dim for n in (c.n_heads, c.key_heads, c.key_heads)])
        gate, up = block.feed_forward.gate_up.weight.chunk(2)
        state |= {
            f"model.layers.{i}.{name}.weight": weight
            for name, weight in {
                "self_attn.q_proj": _halves(q, c.dim),
                "self_attn.k_proj": _halves(k, c.dim),
                "self_attn.v_proj": v,
                "self_attn.o_proj": block.attention.out.weight,
                "mlp.gate_proj": gate,
                "mlp.up_proj": up,
                "mlp.down_proj": block.feed_forward.down.weight,
                "input_layernorm": block.attention_norm.weight,
                "post_attention_layernorm": block.feed_forward_norm.weight,
            }.items()
        }
    return {name: weight.detach().float().contiguous() for name, weight in state.items()}


def _halves(weight: Tensor, dim: int) -> Tensor:
    """Rows of a projection [H·D, C] from neighbouring rotary pairs to halves."""
    return weight.unflatten(0, (-1, dim // 2, 2)).transpose(1, 2).flatten(0, 2)
