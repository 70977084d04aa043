"""Models in GGUF files, as llama.cpp's converter writes them, read by `transformers`."""

from argparse import Namespace

import numpy
import pytest
import torch

from sinkbed.data.tokenizer import token_bytes
from sinkbed.model.hf.adapter import HFModel
from sinkbed.model.hf.tokenizer import special_ids
from sinkbed.train.measure.model import load
from tests.model.test_hf import GQA, from_family

GGUF_TOKENS = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz"]


def write_gguf(path, model, *, frequencies=None, scaling=None):
    """A Llama as llama.cpp's converter writes it: float32, rows of q and k permuted, a SentencePiece vocabulary."""
    gguf = pytest.importorskip("gguf")
    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    if scaling is not None:
        writer.add_rope_scaling_type(gguf.RopeScalingType(scaling))
        writer.add_rope_scaling_factor(4.0)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(GGUF_TOKENS)
    writer.add_token_scores([-float(i) for i in range(len(GGUF_TOKENS))])
    writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * 27])  # unknown, control, byte, normal
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj.weight": config.num_attention_heads, "k_proj.weight": config.num_key_value_heads}
    for key, weight in model.state_dict().items():
        rows = weight.numpy()
        for ending, count in heads.items():
            if key.endswith(ending):  # halves of a head's rotary pairs become neighbours
                rows = rows.reshape(count, 2, -1, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)
        writer.add_tensor(names.get_name(key, try_suffixes=(".weight",)), numpy.ascontiguousarray(rows))
    if frequencies is not None:
        writer.add_tensor("rope_freqs.weight", numpy.array(frequencies, dtype=numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def gguf_source(tmp_path):
    """A tiny Llama, and a folder for its GGUF."""
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    options = dict(**GQA, vocab_size=len(GGUF_TOKENS), max_position_embeddings=64, rope_theta=500.0, rms_norm_eps=1e-5)
    torch.manual_seed(0)
    theirs, ours = from_family("Llama", options, tmp_path / "safetensors")
    (tmp_path / "gguf").mkdir()
    return theirs, ours, tmp_path / "gguf"


def test_a_gguf_file_gives_the_logits_masses_and_tokens_of_the_model_that_it_holds(gguf_source):
    theirs, ours, folder = gguf_source
    write_gguf(folder / "model.gguf", theirs, frequencies=[1.0] * 4)
    found = HFModel.load(str(folder), gguf="model.gguf")
    tokens = torch.randint(len(GGUF_TOKENS), (2, 20))
    with torch.no_grad():
        expected, got = ours(tokens, statistics=True), found(tokens, statistics=True)
    torch.testing.assert_close(got.logits, expected.logits, atol=1e-4, rtol=1e-4)
    for a, b in zip(got.statistics, expected.statistics, strict=True):
        torch.testing.assert_close(a.first_key_mass, b.first_key_mass, atol=1e-5, rtol=1e-5)
    tokenizer = HFModel.tokenizer(str(folder), gguf="model.gguf")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    ids = tokenizer("sink row é", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == "sink row é"
    special = special_ids(tokenizer, len(GGUF_TOKENS))
    table = token_bytes(tokenizer.backend_tokenizer, special, len(GGUF_TOKENS))
    assert sum(table[i] for i in ids) == len(" sink row é".encode()), "with the space that its tokenizer puts first"
    assert special == {0, 1, 2}


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"frequencies": [1.0, 1.0, 2.0, 8.0]}, "rope_freqs.weight"),
        ({"scaling": "yarn"}, "yarn"),
    ],
)
def test_scaled_positions_which_transformers_would_drop_from_a_gguf_file_are_refused(options, what, gguf_source):
    theirs, _, folder = gguf_source
    write_gguf(folder / "model.gguf", theirs, **options)
    with pytest.raises(ValueError, match=rf"model\.gguf: got scaled rotary positions \({what}\)"):
        HFModel.load(str(folder), gguf="model.gguf")


def test_a_gguf_file_that_is_not_there_or_cut_off_is_one_message(gguf_source):
    theirs, _, folder = gguf_source
    for length in (None, 100, -1000):
        if length is not None:
            write_gguf(folder / "model.gguf", theirs)
            content = (folder / "model.gguf").read_bytes()
            (folder / "model.gguf").write_bytes(content[:length])
        with pytest.raises(ValueError, match="expected the folder of a causal language model"):
            HFModel.load(str(folder), gguf="model.gguf")


def test_a_gguf_file_is_named_and_not_its_folder(gguf_source):
    theirs, _, folder = gguf_source
    write_gguf(folder / "model.gguf", theirs)
    given = dict.fromkeys(("prompts", "store", "revision", "gguf", "bos", "tokenizer", "device_map"), None)
    subject = load(Namespace(model=str(folder / "model.gguf"), dtype="auto", **given))
    assert subject.name == str(folder / "model.gguf")
