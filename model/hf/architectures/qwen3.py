"""Qwen 3: a Llama with QK-norm."""

from typing import Any, ClassVar

from torch import Tensor

from sinkbed.model.config import DecoderConfig
from sinkbed.model.decoder import Decoder
from sinkbed.model.hf.architecture import Architecture, Parts, halves, layer_types, name_of
from sinkbed.model.hf.architectures.llama import ACTIVATIONS


class Qwen3(Architecture):
    name = "Qwen 3"
    parts: ClassVar[Parts] = {"attention_parts": (["qk_norm"],), "feed_forward": tuple(ACTIVATIONS)}

    def is_meant(self, config: DecoderConfig) -> bool:
        return "qk_norm" in config.attention_parts

    def settings(self, decoder: Decoder, window: int | None) -> dict[str, Any]:
        return {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "hidden_act": ACTIVATIONS[name_of(decoder.config.feed_forward)],
            "use_sliding_window": window is not None,
            "layer_types": layer_types(decoder, window),
            **super().settings(decoder, window),
        }

    def of_block(self, block: Any) -> dict[str, Tensor]:
        [norm], dim = block.attention.parts, block.attention.config.dim
        return super().of_block(block) | {
            "self_attn.q_norm.weight": halves(norm.query_weight, dim),
            "self_attn.k_norm.weight": halves(norm.key_weight, dim),
        }
