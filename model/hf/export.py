"""Our decoder as a model of Hugging Face: config.json and weights of the architecture that has its parts."""

from typing import Any

from torch import Tensor

from sinkbed.model.config import DecoderConfig
from sinkbed.model.decoder import Decoder
from sinkbed.model.hf.architecture import OF_LLAMA, Architecture, name_of
from sinkbed.model.hf.architectures.gemma2 import Gemma2
from sinkbed.model.hf.architectures.gpt2 import GPT2
from sinkbed.model.hf.architectures.gpt_oss import GptOss
from sinkbed.model.hf.architectures.llama import Llama
from sinkbed.model.hf.architectures.qwen3 import Qwen3

CONFIG, WEIGHTS = "config.json", "model.safetensors"
_ARCHITECTURES = (GPT2(), Qwen3(), GptOss(), Gemma2(), Llama())


def architecture_of(config: DecoderConfig) -> Architecture:
    """The first architecture that is meant by a decoder's parts.

    Raises ValueError for parts that it lacks, by name.
    """
    architecture = next(each for each in _ARCHITECTURES if each.is_meant(config))
    lacking = []
    for part, known in {**OF_LLAMA, **architecture.parts}.items():
        value = getattr(config, part)
        if known and name_of(value) not in known:
            expected = " or ".join("none" if each in (None, []) else str(each) for each in known)
            lacking.append(
                f"model.decoder.{part}: expected {expected}, which Hugging Face's {architecture.name} has, "
                f"got {value!r}"
            )
    if lacking:
        raise ValueError("; ".join(lacking))
    return architecture


def export(
    decoder: Decoder, *, bos_id: int, eos_id: int, context_length: int, window: int | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and weights, float32, of a decoder. A query sees the last `window` keys, its own among them.

    Raises ValueError for what no architecture can express.
    """
    architecture = architecture_of(decoder.config)
    settings = {
        "vocab_size": decoder.vocab_size,
        "max_position_embeddings": context_length,
        "tie_word_embeddings": decoder.config.tie_embeddings,
        "initializer_range": decoder.config.init_std,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "dtype": "float32",
    }
    own = architecture.settings(decoder, window)
    if "n_positions" in own:  # GPT-2's name for the same
        del settings["max_position_embeddings"]
    state = architecture.weights(decoder)
    return settings | own, {name: weight.detach().float().contiguous() for name, weight in state.items()}
