"""Qwen 3: a Llama with QK-norm."""

from typing import Any

from torch import Tensor

from sinkbed.model.decoder import Decoder
from sinkbed.model.hf.architecture import (
    Architecture,
    gated,
    halves,
    layer_types,
    name_of,
    named,
    pre_norms,
    projections,
    rotary_settings,
)
from sinkbed.model.hf.architectures.llama import ACTIVATIONS


def _settings(decoder: Decoder, window: int | None) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_act": ACTIVATIONS[name_of(decoder.config.feed_forward)],
        "use_sliding_window": window is not None,
        "layer_types": layer_types(decoder, window),
        **rotary_settings(decoder, window),
    }


def _of_block(block: Any) -> dict[str, Tensor]:
    [norm], dim = block.attention.parts, block.attention.config.dim
    norms = {
        "self_attn.q_norm.weight": halves(norm.query_weight, dim),
        "self_attn.k_norm.weight": halves(norm.key_weight, dim),
    }
    return projections(block) | norms | gated(block) | pre_norms(block)


QWEN3 = Architecture(
    name="Qwen 3",
    is_meant=lambda c: "qk_norm" in c.attention_parts,
    parts={"attention_parts": (["qk_norm"],), "feed_forward": tuple(ACTIVATIONS)},
    settings=_settings,
    weights=lambda decoder: named(decoder, _of_block),
)
