"""litgpt: `lit_model.pth` beside `model_config.yaml`, as its pretraining, fine-tuning and download leave them
(github.com/Lightning-AI/litgpt, litgpt/model.py and config.py).

What Llama and GPT-NeoX (Pythia) of `transformers` express is read; other settings are refused by name.
"""

from collections.abc import Collection, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sinkbed.model.hf.foreign import FORMATS, Foreign, load_tensors, without_prefix

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS, CONFIG = "lit_model.pth", "model_config.yaml"

_DEFAULTS: dict[str, Any] = {
    "block_size": 4096,
    "n_layer": 16,
    "n_embd": 4096,
    "vocab_size": 50254,
    "padding_multiple": 512,
    "padded_vocab_size": None,
    "norm_class_name": "LayerNorm",
    "norm_eps": 1e-5,
    "parallel_residual": True,
    "n_head": 32,
    "head_size": None,
    "n_query_groups": None,
    "attn_bias": False,
    "attention_scores_scalar": None,
    "rope_base": 10000,
    "rotary_percentage": 0.25,
    "rope_condense_ratio": 1,
    "rope_adjustments": None,
    "intermediate_size": None,
    "bias": True,
    "mlp_class_name": "GptNeoxMLP",
    "gelu_approximate": "none",
    "norm_1": True,
    "norm_2": True,
}
"""litgpt's defaults of the settings that are read here. Others change nothing while they are off; else refused."""
_NO_EFFECT = {"name", "hf_config", "norm_qk_type", "sliding_window_indices", "rope_indices", "routed_scaling_factor"}
"""Settings that change nothing without others."""
_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "LLaMAMLP": ("Llama", {"norm_class_name": "RMSNorm", "parallel_residual": False, "rotary_percentage": 1.0}),
    "GptNeoxMLP": ("GPTNeoX", {"norm_class_name": "LayerNorm"}),
}
"""Feed-forward -> the model of `transformers`, and the other settings that it takes for granted."""
_ACTIVATIONS = {"none": "gelu", "tanh": "gelu_pytorch_tanh"}
_LLAMA3 = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_seq_len": "original_max_position_embeddings",
}
"""Rotary positions of Llama 3: litgpt's names, and those of `transformers`."""
_LAYER = "transformer.h.{}."
_MODULES: dict[str, dict[str, Sequence[str]]] = {
    "Llama": {
        "transformer.wte": ["model.embed_tokens"],
        "transformer.ln_f": ["model.norm"],
        "lm_head": ["lm_head"],
        _LAYER + "norm_1": ["model.layers.{}.input_layernorm"],
        _LAYER + "norm_2": ["model.layers.{}.post_attention_layernorm"],
        _LAYER + "attn.qkv": [f"model.layers.{{}}.self_attn.{part}_proj" for part in "qkv"],
        _LAYER + "attn.proj": ["model.layers.{}.self_attn.o_proj"],
        _LAYER + "mlp.fc_1": ["model.layers.{}.mlp.gate_proj"],
        _LAYER + "mlp.fc_2": ["model.layers.{}.mlp.up_proj"],
        _LAYER + "mlp.proj": ["model.layers.{}.mlp.down_proj"],
    },
    "GPTNeoX": {
        "transformer.wte": ["gpt_neox.embed_in"],
        "transformer.ln_f": ["gpt_neox.final_layer_norm"],
        "lm_head": ["lm_head"],
        _LAYER + "norm_1": ["gpt_neox.layers.{}.input_layernorm"],
        _LAYER + "norm_2": ["gpt_neox.layers.{}.post_attention_layernorm"],
        _LAYER + "attn.qkv": ["gpt_neox.layers.{}.attention.query_key_value"],
        _LAYER + "attn.proj": ["gpt_neox.layers.{}.attention.dense"],
        _LAYER + "mlp.fc": ["gpt_neox.layers.{}.mlp.dense_h_to_4h"],
        _LAYER + "mlp.proj": ["gpt_neox.layers.{}.mlp.dense_4h_to_h"],
    },
}
"""litgpt's modules, and where their weights are in `transformers`."""


@FORMATS.register("litgpt")
class LitGPT(Foreign):
    """A folder with `lit_model.pth`, or that file."""

    @classmethod
    def weights_file(cls, path: Path) -> Path | None:
        """`lit_model.pth`, in a folder or by name. Raises ValueError for one that is a folder of shards."""
        path = path / WEIGHTS if (path / WEIGHTS).exists() else path
        if path.name != WEIGHTS or not path.exists():
            return None
        if path.is_dir():
            raise ValueError(f"{path}: expected one file, got a folder of shards; make one: fabric consolidate {path}")
        return path

    def __init__(self, file: Path) -> None:
        super().__init__(file)
        path = file.with_name(CONFIG)
        if not path.is_file():
            raise FileNotFoundError(f"{file}: expected litgpt's {CONFIG} beside it, got none; copy it there")
        import yaml

        try:
            given = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
            raise ValueError(f"{path}: expected YAML, got: {' '.join(str(error).split())}") from error
        if not isinstance(given, dict):
            raise ValueError(f"{path}: expected the settings of a litgpt model, got {type(given).__name__}")
        self.settings = _complete({**_DEFAULTS, **given}, path)
        self.family, _ = _FAMILIES[self.settings["mlp_class_name"]]

    def make_config(self) -> Any:
        """Llama's or GPT-NeoX's."""
        import transformers

        s = self.settings
        common = dict(
            vocab_size=s["padded_vocab_size"],
            hidden_size=s["n_embd"],
            intermediate_size=s["intermediate_size"],
            num_hidden_layers=s["n_layer"],
            num_attention_heads=s["n_head"],
            max_position_embeddings=s["block_size"],
            rope_parameters=_rope(s),
            tie_word_embeddings=False,  # litgpt saves both matrices, also where they are one
            bos_token_id=None,
            eos_token_id=None,
        )
        if self.family == "GPTNeoX":
            return transformers.GPTNeoXConfig(
                **common,
                layer_norm_eps=s["norm_eps"],
                hidden_act=_ACTIVATIONS[s["gelu_approximate"]],
                use_parallel_residual=s["parallel_residual"],
            )
        return transformers.LlamaConfig(
            **common,
            num_key_value_heads=s["n_query_groups"],
            head_dim=s["head_size"],
            rms_norm_eps=s["norm_eps"],
            attention_bias=s["bias"] or s["attn_bias"],
            mlp_bias=s["bias"],
        )

    @cached_property
    def interleaved(self) -> bool:
        """Whether one matrix holds queries, keys and values group by group, as in older versions."""
        return any(".attn.attn." in name for name in self._saved)

    @cached_property
    def _saved(self) -> "dict[str, Tensor]":
        checkpoint = load_tensors(self.file)  # of pretraining with the optimizer's state, else the weights alone
        inside = isinstance(checkpoint, dict) and isinstance(checkpoint.get("model"), dict)
        return without_prefix(checkpoint["model"] if inside else checkpoint, self.file)

    @property
    def tensors(self) -> "dict[str, Tensor]":
        """The weights under the names of newer versions."""
        return {name.replace(".attn.attn.", ".attn.qkv."): tensor for name, tensor in self._saved.items()}

    def targets(self, parameters: Collection[str]) -> dict[str, Sequence[str]]:
        """See `Foreign`."""
        s = self.settings
        targets: dict[str, Sequence[str]] = {}
        for source, modules in _MODULES[self.family].items():
            kinds = ["weight"]
            if "norm_" in source or source.endswith("ln_f"):
                kinds += ["bias"] * (s["norm_class_name"] == "LayerNorm")
            elif source.startswith(_LAYER):
                kinds += ["bias"] * (s["bias"] or (s["attn_bias"] and source.endswith("qkv")))
            for layer in range(s["n_layer"] if source.startswith(_LAYER) else 1):
                for kind in kinds:
                    targets[f"{source.format(layer)}.{kind}"] = [f"{m.format(layer)}.{kind}" for m in modules]
        return targets

    def split(self, name: str, tensor: "Tensor", count: int) -> "Sequence[Tensor]":
        """Queries, keys and values apart for Llama, head by head for GPT-NeoX; others as they are."""
        if ".attn.qkv." not in name:
            return [tensor]
        s, dim = self.settings, self.settings["head_size"]
        heads, groups = s["n_head"], s["n_query_groups"]
        if self.interleaved:
            parts = [p.flatten(0, 2) for p in tensor.unflatten(0, (groups, -1, dim)).split([heads // groups, 1, 1], 1)]
        else:
            parts = list(tensor.split([heads * dim, groups * dim, groups * dim]))
        if count == 3:
            return parts
        import torch

        return [torch.stack([part.unflatten(0, (heads, dim)) for part in parts], 1).flatten(0, 2)]


def _complete(s: dict[str, Any], path: Path) -> dict[str, Any]:
    """Settings, with those left out as litgpt computes them. Raises ValueError for what is not read here."""

    def check(name: str, fits: bool, expected: object) -> None:
        if not fits:
            raise ValueError(
                f"{path}: {name}: expected {expected}, got {s[name]!r}; give a model that is neither "
                "Llama's nor Pythia's as a Hugging Face folder"
            )

    for name in s.keys() - _DEFAULTS.keys() - _NO_EFFECT:
        check(name, not s[name], "none or off")
    check("mlp_class_name", s["mlp_class_name"] in list(_FAMILIES), " or ".join(_FAMILIES))
    for name in ("n_layer", "n_embd", "n_head", "block_size", "vocab_size", "padding_multiple"):
        check(name, type(s[name]) is int and s[name] > 0, "a number of at least 1")
    heads, multiple = s["n_head"], s["padding_multiple"]
    computed = {
        "head_size": s["n_embd"] // heads,
        "n_query_groups": heads,
        "padded_vocab_size": -(-s["vocab_size"] // multiple) * multiple,
        "intermediate_size": 4 * s["n_embd"],
    }
    fixed = {**_FAMILIES[s["mlp_class_name"]][1], "norm_1": True, "norm_2": True}
    if s["mlp_class_name"] == "GptNeoxMLP":
        fixed |= {name: computed[name] for name in ("head_size", "n_query_groups")}
    s |= {name: value for name, value in computed.items() if s[name] is None}
    for name, value in fixed.items():
        check(name, s[name] == value, value)
    if s.get("name"):  # litgpt changes the norm of models with these names
        own = {"RMSNorm": "Gemma", "LayerNorm": "OLMo"}[s["norm_class_name"]]
        check("name", own not in str(s["name"]), f"no {own}")
    check("attention_scores_scalar", s["attention_scores_scalar"] in (None, s["head_size"]), "the head_size")
    check("gelu_approximate", s["gelu_approximate"] in list(_ACTIVATIONS), " or ".join(_ACTIVATIONS))
    adjustments = s["rope_adjustments"] or {}
    known = isinstance(adjustments, dict) and adjustments.keys() in (set(), {"factor"}, _LLAMA3.keys())
    check("rope_adjustments", known, f"factor, or {', '.join(_LLAMA3)}")
    check("rope_condense_ratio", s["rope_condense_ratio"] == 1 or not adjustments, "1 beside rope_adjustments")
    return s


def _rope(s: dict[str, Any]) -> dict[str, Any]:
    """Rotary positions as `transformers` names them."""
    adjustments = s["rope_adjustments"] or {"factor": s["rope_condense_ratio"]}
    kind = "llama3" if len(adjustments) > 1 else "linear"
    return {
        "rope_type": kind,
        "rope_theta": float(s["rope_base"]),
        "partial_rotary_factor": s["rotary_percentage"],
        **{_LLAMA3[name]: value for name, value in adjustments.items()},
    }
