"""GPT-2: learned positions, LayerNorm, a feed-forward without a gate. Its biases, which ours lacks, are zeros."""

from typing import Any, ClassVar

from torch import Tensor

from sinkbed.model.config import DecoderConfig
from sinkbed.model.decoder import Decoder
from sinkbed.model.hf.architecture import Architecture, Parts, name_of

_ACTIVATIONS = {"gelu": "gelu_new", "relu": "relu", "relu2": "relu2", "silu": "silu"}


class GPT2(Architecture):
    name = "GPT-2"
    parts: ClassVar[Parts] = {"position": ("learned",), "norm": ("layer",), "feed_forward": tuple(_ACTIVATIONS)}

    def is_meant(self, config: DecoderConfig) -> bool:
        return name_of(config.position) == "learned"

    def settings(self, decoder: Decoder, window: int | None) -> dict[str, Any]:
        c = decoder.config
        if window is not None:
            raise ValueError(f"data.strategy.window: expected none, as Hugging Face's GPT-2 has, got {window}")
        if c.key_heads != c.n_heads or c.n_heads * c.dim != c.d_model:
            raise ValueError(
                f"model.decoder: expected n_kv_heads {c.n_heads} and head_dim {c.d_model // c.n_heads}, as Hugging "
                f"Face's GPT-2 has, got {c.key_heads} and {c.dim}"
            )
        return {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "n_positions": decoder.position.max_length,
            "n_embd": c.d_model,
            "n_layer": c.n_layers,
            "n_head": c.n_heads,
            "n_inner": c.d_ff,
            "activation_function": _ACTIVATIONS[name_of(c.feed_forward)],
            "layer_norm_epsilon": c.norm_eps,
            **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        }

    def weights(self, decoder: Decoder) -> dict[str, Tensor]:
        ours: Any = decoder
        state = {
            "transformer.wte.weight": ours.embedding.weight,
            "transformer.wpe.weight": ours.position.table.weight,
            **_norm("transformer.ln_f", ours.norm),
        }
        if not decoder.config.tie_embeddings:
            state["lm_head.weight"] = ours.head.weight
        for i, block in enumerate(ours.blocks):
            at = f"transformer.h.{i}"
            state |= _norm(f"{at}.ln_1", block.attention_norm) | _norm(f"{at}.ln_2", block.feed_forward_norm)
            matrices = {
                "attn.c_attn": block.attention.qkv,
                "attn.c_proj": block.attention.out,
                "mlp.c_fc": block.feed_forward.up,
                "mlp.c_proj": block.feed_forward.down,
            }
            for name, matrix in matrices.items():  # [in, out] there
                zeros = matrix.weight.new_zeros(len(matrix.weight))
                state |= {f"{at}.{name}.weight": matrix.weight.T, f"{at}.{name}.bias": zeros}
        return state


def _norm(name: str, norm: Any) -> dict[str, Tensor]:
    bias = norm.weight.new_zeros(len(norm.weight)) if norm.bias is None else norm.bias
    return {f"{name}.weight": norm.weight, f"{name}.bias": bias}
