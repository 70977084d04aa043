"""Llama, or with a sliding window Mistral, whose weights have the same names."""

from typing import Any

from sinkbed.model.decoder import Decoder
from sinkbed.model.hf.architecture import (
    Architecture,
    gated,
    name_of,
    named,
    pre_norms,
    projections,
    rotary_settings,
)

ACTIVATIONS = {"swiglu": "silu", "geglu": "gelu_pytorch_tanh", "reglu": "relu"}


def _settings(decoder: Decoder, window: int | None) -> dict[str, Any]:
    kind = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "mlp_bias": False}
    if window is not None:
        kind = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    activation = ACTIVATIONS[name_of(decoder.config.feed_forward)]
    return {**kind, "hidden_act": activation, **rotary_settings(decoder, window)}


LLAMA = Architecture(
    name="Llama",
    is_meant=lambda c: True,
    parts={"feed_forward": tuple(ACTIVATIONS)},
    settings=_settings,
    weights=lambda decoder: named(decoder, lambda block: projections(block) | gated(block) | pre_norms(block)),
)
