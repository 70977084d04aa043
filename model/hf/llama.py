"""Between our decoder and a Hugging Face folder of Llama weights: config.json and safetensors, both ways.

Nothing of `transformers` is needed, and no code of a folder is run. With the same weights both models give the
same logits in float32. The one difference is the order of rotary pairs: neighbours (2n, 2n + 1) here, halves
(n, n + D/2) there, a permutation of the rows of the query and key projections.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from sinkbed.model.config import DecoderConfig
from sinkbed.model.decoder import Decoder
from sinkbed.model.positions.rope import Rope

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"

# Settings of a Llama config under which it is another model than ours, and the value under which it is not.
_PLAIN = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}

_PARTS = {
    "sink": "none",
    "normalizer": "softmax",
    "softcap": None,
    "norm": "rms",
    "feed_forward": "swiglu",
    "block": "pre_norm",
    "attention_parts": (),
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
    kind: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **_PLAIN}
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
    state = {"model.embed_tokens.weight": decoder.embedding.weight, "model.norm.weight": decoder.norm.weight}
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


def from_llama(folder: Path) -> Decoder:
    """The decoder of a Hugging Face folder of Llama weights, in float32.

    Raises FileNotFoundError for missing files, and ValueError for a model that ours cannot express or weights that
    do not fit the config.
    """
    config = decoder_config(folder)
    vocab_size = _read_json(folder / CONFIG).get("vocab_size")
    if not isinstance(vocab_size, int):
        raise ValueError(f"{folder / CONFIG}: got vocab_size {vocab_size!r}, expected a number")
    with torch.device("meta"):
        decoder = Decoder(config, vocab_size)
    theirs = _read_weights(folder)
    ours = _to_ours(theirs, config, folder)
    expected = {name: tuple(t.shape) for name, t in decoder.state_dict().items()}
    shapes = {name: tuple(t.shape) for name, t in ours.items()}
    for name in sorted(expected.keys() | shapes.keys()):
        if expected.get(name) != shapes.get(name):
            raise ValueError(
                f"{folder}: expected weights of the shape that {CONFIG} gives, got {name} with "
                f"{shapes.get(name, 'no such tensor')} instead of {expected.get(name, 'none')}"
            )
    decoder.load_state_dict(ours, assign=True)
    if config.tie_embeddings:
        decoder.head.weight = decoder.embedding.weight
    return decoder


def decoder_config(folder: Path) -> DecoderConfig:
    """Our shape of a Hugging Face Llama. Raises FileNotFoundError, or ValueError for what ours cannot express."""
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a Hugging Face model folder, got no {CONFIG}")
    fields = _read_json(path)
    if fields.get("model_type") != "llama":
        raise ValueError(f"{path}: got model_type {fields.get('model_type')!r}, expected 'llama'")
    rope = fields.get("rope_parameters") or {}
    scaling = fields.get("rope_scaling") or (rope if rope.get("rope_type", "default") != "default" else None)
    other = {name: fields[name] for name, plain in _PLAIN.items() if fields.get(name, plain) != plain}
    if scaling:
        other["rope_scaling"] = scaling
    if other:
        listed = ", ".join(f"{name} = {value!r}" for name, value in other.items())
        raise ValueError(f"{path}: got {listed}, which our decoder cannot express")
    try:
        return DecoderConfig(
            n_layers=fields["num_hidden_layers"],
            d_model=fields["hidden_size"],
            n_heads=fields["num_attention_heads"],
            n_kv_heads=fields.get("num_key_value_heads") or fields["num_attention_heads"],
            head_dim=fields.get("head_dim"),
            d_ff=fields["intermediate_size"],
            position={"rope": {"theta": float(fields.get("rope_theta") or rope.get("rope_theta") or 10_000.0)}},
            norm_eps=fields.get("rms_norm_eps", 1e-6),
            tie_embeddings=fields.get("tie_word_embeddings", False),
        )
    except KeyError as error:
        raise ValueError(f"{path}: got no {error}, expected the config of a Llama") from None


def _to_ours(theirs: dict[str, Tensor], config: DecoderConfig, folder: Path) -> dict[str, Tensor]:
    left = dict(theirs)

    def take(name: str) -> Tensor:
        if name not in left:
            raise ValueError(f"{folder}: expected the tensor {name}, got none of that name")
        return left.pop(name).float()

    state = {"embedding.weight": take("model.embed_tokens.weight"), "norm.weight": take("model.norm.weight")}
    if config.tie_embeddings:
        left.pop("lm_head.weight", None)
        state["head.weight"] = state["embedding.weight"]
    else:
        state["head.weight"] = take("lm_head.weight")
    for i in range(config.n_layers):
        there, here = f"model.layers.{i}.", f"blocks.{i}."
        q, k = (_pairs(take(f"{there}self_attn.{name}_proj.weight"), config.dim) for name in ("q", "k"))
        state[f"{here}attention.qkv.weight"] = torch.cat([q, k, take(f"{there}self_attn.v_proj.weight")])
        gate, up = (take(f"{there}mlp.{name}_proj.weight") for name in ("gate", "up"))
        state[f"{here}feed_forward.gate_up.weight"] = torch.cat([gate, up])
        state[f"{here}feed_forward.down.weight"] = take(f"{there}mlp.down_proj.weight")
        state[f"{here}attention.out.weight"] = take(f"{there}self_attn.o_proj.weight")
        state[f"{here}attention_norm.weight"] = take(f"{there}input_layernorm.weight")
        state[f"{here}feed_forward_norm.weight"] = take(f"{there}post_attention_layernorm.weight")
    left = {name: t for name, t in left.items() if not name.endswith("rotary_emb.inv_freq")}  # older exports keep it
    if left:
        raise ValueError(f"{folder}: got {', '.join(sorted(left)[:3])}, which our decoder has no place for")
    return state


def _read_weights(folder: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    files = [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        files = [folder / name for name in sorted(set(_read_json(folder / INDEX)["weight_map"].values()))]
    state: dict[str, Tensor] = {}
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file}: expected weights in safetensors, got no such file")
        try:
            state |= load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file}: expected safetensors, got a damaged file ({error}); copy it again") from None
    return state


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected JSON, got a damaged file ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def _halves(weight: Tensor, dim: int) -> Tensor:
    """Rows of a projection [H·D, C] from neighbouring rotary pairs to halves."""
    return weight.unflatten(0, (-1, dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def _pairs(weight: Tensor, dim: int) -> Tensor:
    """The inverse of `_halves`."""
    return weight.unflatten(0, (-1, 2, dim // 2)).transpose(1, 2).flatten(0, 2)
