"""gpt-oss: a Llama with a learned sink logit a head.

Its feed-forward is a mixture of experts with a SwiGLU of its own, (up + 1) · gate · sigmoid(alpha · gate) within a
limit. One expert, alpha 1, a limit that no activation reaches and a bias of −1 make it ours.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor

from sinkbed.model.config import DecoderConfig
from sinkbed.model.decoder import Decoder
from sinkbed.model.hf.architecture import Architecture, Parts, gate_and_up, layer_types, pre_norms, projections


class GptOss(Architecture):
    name = "gpt-oss"
    parts: ClassVar[Parts] = {"sink": ("learned", "off_by_one")}

    def is_meant(self, config: DecoderConfig) -> bool:
        return config.sink != "none"

    def settings(self, decoder: Decoder, window: int | None) -> dict[str, Any]:
        return {
            "architectures": ["GptOssForCausalLM"],
            "model_type": "gpt_oss",
            "num_local_experts": 1,
            "num_experts_per_tok": 1,
            "swiglu_alpha": 1.0,
            "swiglu_limit": 1e30,
            "layer_types": layer_types(decoder, window),
            **super().settings(decoder, window),
        }

    def of_block(self, block: Any) -> dict[str, Tensor]:
        gate, up = gate_and_up(block)
        width, channels = gate.shape
        sink = block.attention.sink
        biases = torch.stack([gate.new_zeros(width), -gate.new_ones(width)], -1).flatten()
        own = {
            "self_attn.sinks": sink.weight if hasattr(sink, "weight") else sink.zeros,
            "mlp.router.weight": gate.new_zeros(1, channels),
            "mlp.router.bias": gate.new_zeros(1),
            "mlp.experts.gate_up_proj": torch.stack([gate, up], 1).flatten(0, 1).T[None],
            "mlp.experts.gate_up_proj_bias": biases[None],
            "mlp.experts.down_proj": block.feed_forward.down.weight.T[None],
            "mlp.experts.down_proj_bias": gate.new_zeros(1, channels),
        }
        return projections(block) | own | pre_norms(block)
