"""Weights go to Hugging Face's Llama with equal logits; what it cannot express is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from sinkbed.model import Decoder, DecoderConfig
from sinkbed.model.hf.llama import llama_config, to_llama

transformers = pytest.importorskip("transformers")
SMALL = dict(n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, d_ff=48, init_std=0.2)


def small(**changes) -> Decoder:
    torch.manual_seed(0)
    return Decoder(DecoderConfig(**{**SMALL, **changes}), vocab_size=50)


def write(decoder, folder):
    folder.mkdir(exist_ok=True)
    save_file(to_llama(decoder), folder / "model.safetensors", metadata={"format": "pt"})
    config = llama_config(decoder, bos_id=0, eos_id=1, context_length=64)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens).logits


SHAPES = [
    dict(n_kv_heads=1),
    dict(n_kv_heads=4, tie_embeddings=True),
    dict(head_dim=16, position={"rope": {"theta": 500.0}}, norm_eps=1e-3),
    dict(n_kv_heads=2, tie_embeddings=True, head_dim=6),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_an_exported_folder_gives_our_logits(shape, tmp_path):
    ours = small(**shape)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(write(ours, tmp_path / "hf"))
    assert type(theirs).__name__ == "LlamaForCausalLM" and theirs.dtype == torch.float32
    tokens = torch.randint(50, (2, 33))
    torch.testing.assert_close(logits(ours, tokens), logits(theirs, tokens), atol=1e-5, rtol=1e-5)
    changed = small(**{**shape, "position": {"rope": {"theta": 77.0}}})
    assert (logits(changed, tokens) - logits(theirs, tokens)).abs().max() > 1e-3, "the base is under test"


@pytest.mark.parametrize("sink", ["learned", "off_by_one"])
def test_a_sink_logit_is_refused(sink):
    with pytest.raises(ValueError, match=f"expected none, which Hugging Face's Llama has, got '{sink}'"):
        llama_config(small(sink=sink), bos_id=0, eos_id=1, context_length=64)


def test_exported_weights_are_float32_and_hold_tied_ones_once(tmp_path):
    found = load_file(write(small(tie_embeddings=True), tmp_path) / "model.safetensors")
    assert "lm_head.weight" not in found and {t.dtype for t in found.values()} == {torch.float32}
