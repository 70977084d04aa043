"""Checkpoints of other trainers as models of `transformers`: the logits of those trainers' own models."""

import os
import pickle

import pytest
import torch
import yaml

from sinkbed.model.hf.adapter import HFModel
from sinkbed.model.hf.foreign import foreign_at
from tests.support.trainers import PYTHIA, save_litgpt, save_nanogpt

transformers = pytest.importorskip("transformers")
LLAMA_3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=32)


def assert_same_logits(path, model, vocab_size):
    ours = HFModel.load(str(path), foreign=foreign_at(path))
    tokens = torch.randint(vocab_size, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, found = model(tokens), ours(tokens).logits
    assert expected.std() > 0.5, "logits that differ"
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


class Caller:
    """Makes a folder where it is unpickled with its code."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_nanogpt_has_equal_logits(bias, compiled, tmp_path):
    model = save_nanogpt(tmp_path / "ckpt.pt", bias=bias, compiled=compiled)
    assert_same_logits(tmp_path, model, 65)


def test_causal_masks_are_no_weights(tmp_path):
    model = save_nanogpt(tmp_path / "ckpt.pt", compiled=False, bias=True)
    masks = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 64, 64).tril() for i in range(2)}
    save_nanogpt(tmp_path / "ckpt.pt", bias=True, model=model.state_dict() | masks)
    assert_same_logits(tmp_path, model, 65)


def test_a_head_of_its_own_is_kept(tmp_path):
    model = save_nanogpt(tmp_path / "ckpt.pt", compiled=False)
    checkpoint = torch.load(tmp_path / "ckpt.pt")
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.flip(0))
    torch.save(checkpoint | {"model": model.state_dict()}, tmp_path / "ckpt.pt")
    assert_same_logits(tmp_path / "ckpt.pt", model, 65)


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(n_query_groups=1, head_size=16, rope_adjustments=LLAMA_3),
        dict(attn_bias=True, n_query_groups=4, rope_condense_ratio=4),
        dict(bias=True),
        PYTHIA,
        PYTHIA | dict(bias=False, attn_bias=True, gelu_approximate="tanh", rotary_percentage=0.5),
        PYTHIA | dict(parallel_residual=False, rotary_percentage=1.0),
    ],
    ids=["llama", "llama 3", "qwen 2", "biases", "pythia", "without biases", "sequential"],
)
def test_litgpt_has_equal_logits(settings, old, tmp_path):
    model = save_litgpt(tmp_path, old=old, pretraining=not old, settings=settings)
    assert_same_logits(tmp_path, model, 90)


def test_a_model_stays_as_it_was_read_where_its_trainer_overwrites_the_file(tmp_path):
    model = save_litgpt(tmp_path)
    ours = HFModel.load(str(tmp_path), foreign=foreign_at(tmp_path))
    with (tmp_path / "lit_model.pth").open("r+b") as file:
        file.write(bytes((tmp_path / "lit_model.pth").stat().st_size))
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens).logits, model(tokens), atol=1e-5, rtol=1e-5)


def test_weights_keep_their_precision(tmp_path):
    save_litgpt(tmp_path)
    half = {name: weight.bfloat16() for name, weight in torch.load(tmp_path / "lit_model.pth").items()}
    torch.save(half, tmp_path / "lit_model.pth")
    ours = HFModel.load(str(tmp_path), foreign=foreign_at(tmp_path))
    assert {weight.dtype for weight in ours.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(mlp_class_name="LLaMAMoE"), "mlp_class_name: expected LLaMAMLP or GptNeoxMLP, got 'LLaMAMoE'"),
        (dict(norm_class_name="LayerNorm"), "norm_class_name: expected RMSNorm, got 'LayerNorm'"),
        (dict(parallel_residual=True), "parallel_residual: expected False, got True"),
        (dict(rotary_percentage=0.5), "rotary_percentage: expected 1.0, got 0.5"),
        (dict(norm_qk=True), "norm_qk: expected none or off, got True"),
        (dict(sliding_window_size=32), "sliding_window_size: expected none or off, got 32"),
        (dict(norm_1=False), "norm_1: expected True, got False"),
        (dict(name="Gemma-2b"), "name: expected no Gemma, got 'Gemma-2b'"),
        (dict(a_newer_part=3), "a_newer_part: expected none or off, got 3"),
        (dict(n_layer="two"), "n_layer: expected a number of at least 1, got 'two'"),
        (dict(rope_adjustments=dict(factor=2.0, beta_fast=32)), "rope_adjustments: expected factor, or factor, low"),
        (PYTHIA | dict(n_query_groups=2), "n_query_groups: expected 4, got 2"),
        (PYTHIA | dict(shared_attention_norm=True), "shared_attention_norm: expected none or off, got True"),
    ],
)
def test_settings_of_litgpt_that_are_not_read_are_refused_by_name(settings, message, tmp_path):
    save_litgpt(tmp_path)
    path = tmp_path / "model_config.yaml"
    path.write_text(yaml.dump(yaml.safe_load(path.read_text()) | settings))
    with pytest.raises(ValueError, match="Hugging Face folder") as error:
        foreign_at(tmp_path)
    assert f"{path}: {message}" in str(error.value)


def test_settings_that_litgpt_computes_may_be_left_out(tmp_path):
    model = save_litgpt(tmp_path, settings=PYTHIA | dict(intermediate_size=128))
    path = tmp_path / "model_config.yaml"
    settings = yaml.safe_load(path.read_text())
    for name in ("head_size", "n_query_groups", "intermediate_size", "padded_vocab_size"):
        del settings[name]
    path.write_text(yaml.dump(settings))
    assert_same_logits(tmp_path, model, 90)


def test_settings_of_a_changed_nanogpt_are_refused(tmp_path):
    args = dict(n_layer=2, n_head=4, n_embd=32, block_size=64, bias=False)
    save_nanogpt(tmp_path / "ckpt.pt", model_args=args | dict(vocab_size=None, rotary=True))
    with pytest.raises(ValueError, match=r"model_args that lack \['vocab_size'\] and add \['rotary'\]"):
        _ = foreign_at(tmp_path).config
    save_nanogpt(tmp_path / "ckpt.pt", model_args=args | dict(vocab_size=65, n_head=5))
    with pytest.raises(ValueError, match=r"ckpt.pt: expected the settings of a model, got: .*: 32 and .*: 5"):
        HFModel.load(str(tmp_path), foreign=foreign_at(tmp_path))


def test_tensors_that_are_missing_left_over_or_of_another_shape_are_named(tmp_path):
    save_litgpt(tmp_path)
    weights = torch.load(tmp_path / "lit_model.pth")
    del weights["transformer.h.1.norm_2.weight"]
    weights["transformer.h.0.attn.norm_q.weight"] = torch.ones(8)
    weights["transformer.h.0.attn.qkv.weight"] = torch.ones(32, 32)
    torch.save(weights, tmp_path / "lit_model.pth")
    with pytest.raises(ValueError) as error:
        foreign_at(tmp_path).weights()
    assert (
        "got 1 missing (transformer.h.1.norm_2.weight), 1 left over (transformer.h.0.attn.norm_q.weight), "
        "1 of another shape (transformer.h.0.attn.qkv.weight [32, 32] for [64, 32])" in str(error.value)
    )


def test_no_code_of_a_checkpoint_is_run(tmp_path):
    marker = tmp_path / "marker"
    save_nanogpt(tmp_path / "ckpt.pt", loader=Caller(marker))
    with pytest.raises(ValueError, match=r"got posix.mkdir, whose code is not run; .* without that object"):
        _ = foreign_at(tmp_path).config
    assert not marker.exists()
    torch.load(tmp_path / "ckpt.pt", weights_only=False)
    assert marker.exists(), "the file does run code"


def test_characters_are_plain_data(tmp_path):
    from sinkbed.model.hf.foreign.nanogpt import character_tokenizer

    path, marker = tmp_path / "meta.pkl", tmp_path / "marker"
    ids = {character: index for index, character in enumerate("\n abcé▁")}
    path.write_bytes(pickle.dumps({"vocab_size": 7, "stoi": ids, "itos": dict(enumerate(ids))}))
    tokenizer = character_tokenizer(path)
    assert tokenizer("a▁ é\nb", add_special_tokens=False)["input_ids"] == [2, 6, 1, 5, 0, 3]
    assert tokenizer.decode([2, 6, 1, 5, 0, 3]) == "a▁ é\nb"
    with pytest.raises(ValueError, match=r"expected the 7 characters of .*meta.pkl, got also 'x', 'z'"):
        tokenizer("axz")
    for content, problem in (
        (pickle.dumps({"stoi": Caller(marker)}), "posix.mkdir, whose code is not run"),
        (pickle.dumps({"stoi": {"ab": 0}}), "tokens that are no characters"),
        (pickle.dumps({"stoi": {"a": 1}}), "ids with gaps"),
        (b"\x80\x04}", "got: "),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"expected the meta.pkl of a nanoGPT dataset.*{problem}"):
            character_tokenizer(path)
    assert not marker.exists()
