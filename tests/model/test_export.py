"""Weights go to Hugging Face's models with equal logits; what none can express is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from sinkbed.kernels import interval_mask
from sinkbed.model import Decoder, DecoderConfig
from sinkbed.model.hf.export import export

transformers = pytest.importorskip("transformers")
SMALL = dict(n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, d_ff=48, init_std=0.2)
LEARNED = dict(position={"learned": {"length": 40}}, norm="layer", n_kv_heads=None)
GEMMA = dict(block="sandwich_norm", feed_forward="geglu")


def small(**changes) -> Decoder:
    """Vectors are drawn too, so that none is a 0 or a 1 that hides something."""
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(**{**SMALL, **changes}), vocab_size=50)
    for parameter in decoder.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape)
    return decoder


def write(decoder, folder, window=None):
    folder.mkdir(exist_ok=True)
    config, weights = export(decoder, bos_id=0, eos_id=1, context_length=64, window=window)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


MODELS = {
    "LlamaForCausalLM": [
        dict(n_kv_heads=1),
        dict(n_kv_heads=4, tie_embeddings=True),
        dict(head_dim=16, position={"rope": {"theta": 500.0}}, norm_eps=1e-3),
        dict(n_kv_heads=2, tie_embeddings=True, head_dim=6),
        dict(feed_forward="geglu"),
        dict(feed_forward="reglu"),
    ],
    "Qwen3ForCausalLM": [
        dict(attention_parts=["qk_norm"], norm_eps=1e-3, tie_embeddings=True),
        dict(attention_parts=["qk_norm"], head_dim=6, position={"rope": {"theta": 500.0}}, feed_forward="geglu"),
    ],
    "GptOssForCausalLM": [
        dict(sink="learned", head_dim=6, position={"rope": {"theta": 500.0}}),
        dict(sink="off_by_one", tie_embeddings=True, norm_eps=1e-3),
    ],
    "Gemma2ForCausalLM": [
        dict(**GEMMA, softcap=0.7, head_dim=6, position={"rope": {"theta": 500.0}}),
        dict(**GEMMA, tie_embeddings=True, norm_eps=1e-3),
    ],
    "GPT2LMHeadModel": [
        dict(**LEARNED, feed_forward="gelu", tie_embeddings=True, norm_eps=1e-3),
        dict(LEARNED, feed_forward="relu2", norm={"layer": {"bias": False}}),
        dict(**LEARNED, feed_forward="relu"),
        dict(**LEARNED, feed_forward="silu"),
    ],
}
CASES = [(name, shape) for name, shapes in MODELS.items() for shape in shapes]


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize(("name", "shape"), CASES, ids=str)
def test_an_exported_folder_gives_our_logits(name, shape, window, tmp_path):
    if window is not None and name == "GPT2LMHeadModel":
        with pytest.raises(
            ValueError, match=r"data.strategy.window: expected none, as Hugging Face's GPT-2 has, got 5"
        ):
            write(small(**shape), tmp_path / "hf", window)
        return
    ours = small(**shape)
    theirs, loading = transformers.AutoModelForCausalLM.from_pretrained(
        write(ours, tmp_path / "hf", window), output_loading_info=True
    )
    expected = "MistralForCausalLM" if window is not None and name == "LlamaForCausalLM" else name
    assert type(theirs).__name__ == expected and theirs.dtype == torch.float32
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    tokens = torch.randint(50, (2, 33))
    mask = None if window is None else interval_mask(2, 33, window=window)
    with torch.no_grad():
        logits, actual = ours(tokens, mask=mask).logits, theirs.eval()(tokens).logits
        torch.testing.assert_close(actual, logits, atol=2e-5, rtol=2e-5)
        assert (ours(tokens, mask=interval_mask(2, 33, window=4)).logits - actual).abs().max() > 1e-3
        for parameter in ours.parameters():  # each of them counts
            parameter.mul_(1.3)
            assert (ours(tokens, mask=mask).logits - actual).abs().max() > 1e-5
            parameter.div_(1.3)


REFUSED = [
    (dict(sink="k_bias"), "sink: expected learned or off_by_one, which Hugging Face's gpt-oss has, got 'k_bias'"),
    (dict(sink="learned", feed_forward="gelu"), "feed_forward: expected swiglu, which Hugging Face's gpt-oss has"),
    (dict(sink="learned", attention_parts=["qk_norm"]), "sink: expected none, which Hugging Face's Qwen 3 has"),
    (dict(attention_parts=("qk_norm", "head_norm")), r"attention_parts: expected \['qk_norm'\], which .* Qwen 3 has"),
    (dict(attention_parts=["v_bias"]), r"attention_parts: expected none, which .* Llama has, got \['v_bias'\]"),
    (dict(softcap=3.0), "block: expected sandwich_norm, which Hugging Face's Gemma 2 has, got 'pre_norm'"),
    (dict(**GEMMA, norm="layer"), "norm: expected rms, which Hugging Face's Gemma 2 has, got 'layer'"),
    (dict(block="post_norm"), "block: expected pre_norm, which Hugging Face's Llama has, got 'post_norm'"),
    (dict(normalizer="sigmoid"), "normalizer: expected softmax, which Hugging Face's Llama has, got 'sigmoid'"),
    (dict(feed_forward="none", d_ff=0), "feed_forward: expected swiglu or geglu or reglu, which .* Llama has"),
    (dict(position={"learned": {"length": 40}}), "norm: expected layer, which Hugging Face's GPT-2 has, got 'rms'"),
    (dict(LEARNED, n_kv_heads=2, feed_forward="gelu"), "expected n_kv_heads 4 and head_dim 8, .*GPT-2.*, got 2 and 8"),
    (dict(block="post_norm", n_registers=2), "block: expected pre_norm, .*; model.decoder.n_registers: expected 0"),
    (dict(n_registers=2), "n_registers: expected 0, which Hugging Face's Llama has, got 2"),
    (dict(position="alibi"), "position: expected rope, which Hugging Face's Llama has, got 'alibi'"),
    (dict(position={"rope": {"share": 0.5}}), "position: expected rope over whole heads"),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "message"), REFUSED, ids=[str(shape) for shape, _ in REFUSED])
def test_what_no_model_can_express_is_refused_by_name(shape, message):
    with pytest.raises(ValueError, match=rf"model\.decoder.*{message}"):
        export(small(**shape), bos_id=0, eos_id=1, context_length=64)


def test_exported_weights_are_float32_and_hold_tied_ones_once(tmp_path):
    found = load_file(write(small(tie_embeddings=True).bfloat16(), tmp_path) / "model.safetensors")
    assert "lm_head.weight" not in found and {t.dtype for t in found.values()} == {torch.float32}
