"""Llama, or with a sliding window Mistral, whose weights have the same names."""

from typing import Any, ClassVar

from sinkbed.model.config import DecoderConfig
from sinkbed.model.decoder import Decoder
from sinkbed.model.hf.architecture import Architecture, Parts, name_of

ACTIVATIONS = {"swiglu": "silu", "geglu": "gelu_pytorch_tanh", "reglu": "relu"}


class Llama(Architecture):
    name = "Llama"
    parts: ClassVar[Parts] = {"feed_forward": tuple(ACTIVATIONS)}

    def is_meant(self, config: DecoderConfig) -> bool:
        return True

    def settings(self, decoder: Decoder, window: int | None) -> dict[str, Any]:
        kind = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "mlp_bias": False}
        if window is not None:
            kind = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
        activation = ACTIVATIONS[name_of(decoder.config.feed_forward)]
        return {**kind, "hidden_act": activation, **super().settings(decoder, window)}
