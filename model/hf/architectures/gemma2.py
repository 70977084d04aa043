"""Gemma 2: sandwich norms, GEGLU and a softcap of the logits.

It multiplies embeddings by √C and norms by 1 + weight, so both go out as what gives ours; the output matrix is its own.
"""

from typing import Any, ClassVar

from torch import Tensor

from sinkbed.model.config import DecoderConfig
from sinkbed.model.decoder import Decoder
from sinkbed.model.hf.architecture import ANY, Architecture, Parts, gated, layer_types, projections


class Gemma2(Architecture):
    name = "Gemma 2"
    parts: ClassVar[Parts] = {"block": ("sandwich_norm",), "feed_forward": ("geglu",), "softcap": ANY}

    def is_meant(self, config: DecoderConfig) -> bool:
        return config.block == "sandwich_norm" or config.softcap is not None

    def settings(self, decoder: Decoder, window: int | None) -> dict[str, Any]:
        return {
            "architectures": ["Gemma2ForCausalLM"],
            "model_type": "gemma2",
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": decoder.config.dim,
            "attn_logit_softcapping": decoder.config.softcap,
            "final_logit_softcapping": None,
            "layer_types": layer_types(decoder, window),
            "pad_token_id": None,
            "tie_word_embeddings": False,
            **super().settings(decoder, window),
        }

    def weights(self, decoder: Decoder) -> dict[str, Tensor]:
        state = super().weights(decoder)
        return state | {
            "model.embed_tokens.weight": decoder.embedding.weight * decoder.config.d_model**-0.5,
            "model.norm.weight": state["model.norm.weight"] - 1,
            "lm_head.weight": decoder.head.weight,
        }

    def of_block(self, block: Any) -> dict[str, Tensor]:
        norms = {
            "input_layernorm.weight": block.attention_norm.weight - 1,
            "post_attention_layernorm.weight": block.attention_out_norm.weight - 1,
            "pre_feedforward_layernorm.weight": block.feed_forward_norm.weight - 1,
            "post_feedforward_layernorm.weight": block.feed_forward_out_norm.weight - 1,
        }
        return projections(block) | norms | gated(block)
