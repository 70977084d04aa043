"""Weights go to Hugging Face's Llama and back, with equal logits; what either cannot express is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from sinkbed.model import Decoder, DecoderConfig
from sinkbed.model.hf.llama import from_llama, llama_config, to_llama

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


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_a_folder_of_transformers_gives_its_logits(tied, sharded, tmp_path):
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=60,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        rope_theta=5000.0,
        initializer_range=0.2,
        tie_word_embeddings=tied,
    )
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path, max_shard_size="40KB" if sharded else "1GB")
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == sharded
    ours = from_llama(tmp_path)
    assert ours.position.theta == 5000.0 and ours.config.tie_embeddings == tied
    tokens = torch.randint(60, (2, 21))
    torch.testing.assert_close(logits(ours, tokens), logits(theirs, tokens), atol=1e-5, rtol=1e-5)
    assert (ours.head.weight is ours.embedding.weight) == tied


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_there_and_back_is_the_same_decoder_bit_for_bit(shape, tmp_path):
    ours = small(**shape)
    back = from_llama(write(ours, tmp_path))
    assert back.config.dim == ours.config.dim and back.vocab_size == 50
    for (name, a), (_, b) in zip(ours.state_dict().items(), back.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    tokens = torch.randint(50, (1, 9))
    assert torch.equal(logits(ours, tokens), logits(back, tokens))
    back(tokens, targets=tokens).loss.backward()


@pytest.mark.parametrize("sink", ["learned", "off_by_one"])
def test_a_sink_logit_is_refused(sink):
    with pytest.raises(ValueError, match=f"expected none, which Hugging Face's Llama has, got '{sink}'"):
        llama_config(small(sink=sink), bos_id=0, eos_id=1, context_length=64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "got model_type 'gpt2', expected 'llama'"),
        ({"attention_bias": True}, "got attention_bias = True, which our decoder cannot express"),
        ({"hidden_act": "gelu"}, "got hidden_act = 'gelu'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "got rope_scaling = "),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "got rope_scaling = "),
        ({"num_hidden_layers": 3}, "expected the tensor model.layers.2"),
        ({"num_hidden_layers": 1}, "got model.layers.1.*no place for"),
        ({"intermediate_size": 64}, "got blocks.0.feed_forward"),
        ({"hidden_size": None}, "hidden_size"),
    ],
)
def test_what_our_decoder_cannot_express_or_what_does_not_fit_is_named(change, message, tmp_path):
    write(small(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    with pytest.raises(ValueError, match=message):
        from_llama(tmp_path)


def test_missing_and_damaged_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"got no config\.json"):
        from_llama(tmp_path)
    write(small(), tmp_path)
    weights = tmp_path / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="damaged file"):
        from_llama(tmp_path)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="expected weights in safetensors"):
        from_llama(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="expected a JSON object, got list"):
        from_llama(tmp_path)


def test_exported_weights_are_float32_and_hold_tied_ones_once(tmp_path):
    found = load_file(write(small(tie_embeddings=True), tmp_path) / "model.safetensors")
    assert "lm_head.weight" not in found and {t.dtype for t in found.values()} == {torch.float32}
