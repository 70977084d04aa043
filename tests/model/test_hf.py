"""Models of `transformers` under our operator: their own logits, and the sinks of their eager attention."""

import json

import pytest
import torch

from sinkbed.data.pack.strategy import Strategy
from sinkbed.data.tokenizer import token_bytes
from sinkbed.kernels import interval_mask
from sinkbed.kernels.mask import Mask
from sinkbed.model import loss
from sinkbed.model.hf.adapter import HFModel
from sinkbed.model.hf.attention import (
    ATTENTION,
    Pass,
    asking,
    attend,
    moved,
    narrowed,
    register,
    sampled_mask,
    sampled_queries,
)
from sinkbed.model.hf.tokenizer import special_ids
from sinkbed.train.measure.config import MeasureConfig
from sinkbed.train.measure.heldout import Probe
from sinkbed.train.measure.sinks import measure

transformers = pytest.importorskip("transformers")
COMMON = dict(
    vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    bos_token_id=0, eos_token_id=1, pad_token_id=1, initializer_range=0.3,
)  # fmt: skip
GQA = dict(num_key_value_heads=2)
FAMILIES = {
    "Llama": GQA,
    "GPT2": dict(n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "GPTNeoX": {},
    "OPT": dict(ffn_dim=48, word_embed_proj_dim=32, init_std=0.3),
    "Mistral": dict(**GQA, sliding_window=7),
    "Qwen2": GQA,
    "Qwen3": dict(**GQA, head_dim=8),
    "Olmo": GQA,
    "Olmo2": GQA,
    "Gemma": dict(num_key_value_heads=1, head_dim=16),
    "Gemma2": dict(
        num_key_value_heads=1, head_dim=16, sliding_window=6, attn_logit_softcapping=3.0, final_logit_softcapping=2.0
    ),
    "Gemma3Text": dict(num_key_value_heads=1, head_dim=16, sliding_window=6),
    "GptOss": dict(**GQA, head_dim=8, num_local_experts=2, num_experts_per_tok=1, sliding_window=6),
    "Phi3": GQA,
    "ModernBertDecoder": dict(local_attention=12, global_attn_every_n_layers=2),
}


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request, tmp_path_factory):
    """A tiny model of a family as `transformers` loads it, and its folder."""
    torch.manual_seed(0)
    name = request.param
    keep = {"GPT2": ("vocab_size", "bos_token_id", "eos_token_id", "initializer_range")}.get(name, COMMON)
    config = getattr(transformers, f"{name}Config")(**{k: COMMON[k] for k in keep}, **FAMILIES[name])
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    folder = tmp_path_factory.mktemp(name)
    model.save_pretrained(folder)
    return model, folder


def test_logits_and_masses_equal_those_of_eager_attention(saved):
    theirs, folder = saved
    ours = HFModel.load(str(folder))
    tokens = torch.randint(96, (2, 20))
    with torch.no_grad():
        eager, found = theirs(tokens, output_attentions=True), ours(tokens, statistics=True)
    torch.testing.assert_close(found.logits, eager.logits, atol=2e-5, rtol=1e-4)
    assert len(found.statistics) == len(eager.attentions) == ours.config.n_layers == 2
    for statistics, matrix in zip(found.statistics, eager.attentions, strict=True):
        assert matrix.shape[1] == ours.config.n_heads
        torch.testing.assert_close(statistics.first_key_mass, matrix[..., 0], atol=1e-5, rtol=1e-4)
    if theirs.config.model_type in ("mistral", "gemma2", "gemma3_text", "gpt_oss"):
        assert any((m[:, :, -1, 0] == 0).all() for m in eager.attentions), "a window hides key 0 from the last query"
    if theirs.config.model_type == "gpt_oss":
        assert all(m.sum(-1).min() < 0.99 for m in eager.attentions), "its sink logits take a share"


def test_losses_in_blocks_are_those_of_all_logits(saved, monkeypatch):
    """With the scale and the soft cap that a model puts on its logits."""
    theirs, folder = saved
    ours = HFModel.load(str(folder))
    monkeypatch.setattr(loss, "BLOCK_LOGITS", 7 * 96)
    tokens, made = torch.randint(96, (2, 20)), []
    ours.model.get_output_embeddings().register_forward_hook(lambda *call: made.append(call[-1].numel()))
    wanted = tokens.roll(-1, 1)
    wanted[:, -1] = loss.IGNORED
    expected = torch.nn.functional.cross_entropy(theirs(tokens).logits.mT, wanted, reduction="none")
    output = ours(tokens, next_tokens=wanted)
    torch.testing.assert_close(output.nll, expected, atol=2e-5, rtol=1e-4)
    assert output.logits is None and len(made) == 6 and max(made) == 7 * 96
    gradients = [torch.autograd.grad(nll.sum(), model.get_input_embeddings().weight)[0]
                 for nll, model in ((output.nll, ours.model), (expected, theirs))]  # fmt: skip
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-3)
    made.clear()
    states = ours(tokens, logits=False, statistics=True)
    assert states.logits is None and len(states.statistics) == 2 and not made


def test_more_queries_than_are_sampled_and_positions_that_restart_change_nothing(saved):
    """Past 64 tokens the model gets a sample of its mask; left alone, it would make documents of the positions."""
    theirs, folder = saved
    ours = HFModel.load(str(folder))
    length = 64 if theirs.config.model_type == "gpt2" else 90
    tokens = torch.randint(96, (2, length))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens).logits, theirs(tokens).logits, atol=2e-5, rtol=1e-4)
        restarting = torch.arange(length).remainder(30).expand(2, -1)
        found = ours(tokens, restarting).logits
        expected = theirs(tokens, position_ids=restarting, attention_mask=torch.ones_like(tokens)).logits
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


def test_the_sampled_queries_hold_both_ends_and_are_few():
    for length in (1, 2, 63, 64, 65, 127, 1000, 2**20):
        rows = sampled_queries(length)
        assert len(rows) == min(length, 64) and rows[0] == 0 and rows[-1] == length - 1
        assert (rows.diff() > 0).all()


def test_the_sampled_mask_is_rows_of_the_whole_one():
    from transformers.masking_utils import sdpa_mask, sliding_window_causal_mask_function

    given = dict(batch_size=2, q_length=200, kv_length=200, mask_function=sliding_window_causal_mask_function(9))
    found, rows = sampled_mask(**given), sampled_queries(200)
    assert found.shape == (2, 1, 64, 200) and found.dtype == torch.bool
    assert torch.equal(found, sdpa_mask(**given, allow_is_causal_skip=False)[:, :, rows])


def test_a_mask_of_ours_applies_in_every_layer(saved):
    """Hiding key 0: what stands there changes nothing after it. A document start moves the second mass."""
    _, folder = saved
    ours = HFModel.load(str(folder))
    tokens = torch.randint(2, 96, (1, 12))
    other = tokens.clone()
    other[0, 0] = (other[0, 0] + 7) % 90 + 2
    hidden = interval_mask(1, 12, hide_first_key=True)
    with torch.no_grad():
        a, b = (ours(t, mask=hidden, statistics=True) for t in (tokens, other))
        torch.testing.assert_close(a.logits[:, 1:], b.logits[:, 1:], atol=1e-5, rtol=1e-5)
        assert (ours(tokens).logits - ours(other).logits)[:, 1:].abs().max() > 1e-3
        start = torch.where(torch.arange(12) < 3, 0, 3).to(torch.int32)[None]
        third = interval_mask(1, 12, doc_start=start, doc_end=torch.full_like(start, 12), document=False)
        found = ours(tokens, mask=third, statistics=True)
        plain = ours(tokens, statistics=True)
    assert all((s.first_key_mass[..., 1:] == 0).all() for s in a.statistics), "query 0 sees itself alone"
    torch.testing.assert_close(found.logits, plain.logits, atol=1e-5, rtol=1e-5)
    for statistics in found.statistics:
        assert (statistics.document_mass[..., 3] > 0).any() and (statistics.document_mass[..., 3:] <= 1).all()


@pytest.mark.parametrize("hide", [False, True])
def test_a_window_narrows_any_mask(hide):
    mask = narrowed(interval_mask(2, 10, hide_first_key=hide), 4)
    index = torch.arange(10)
    expected = (index[None] <= index[:, None]) & (index[None] > index[:, None] - 4)
    if hide:
        expected[1:, 0] = False
    assert torch.equal(mask.visible(torch.device("cpu"))[0, 0, 1:], expected[1:])
    assert isinstance(mask, Mask)


@pytest.mark.parametrize("kind", ["Bloom", "Mpt", "Falcon", "XGLM", "GPTNeo", "Mamba", "Mamba2", "Rwkv", "Jamba"])
def test_a_model_whose_layers_bypass_the_interface_is_refused_before_its_weights_are_read(kind, tmp_path):
    getattr(transformers, f"{kind}Config")().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"call transformers' attention interface, .* got {kind}.*ForCausalLM"):
        HFModel.load(str(tmp_path))


def test_a_model_some_of_whose_layers_are_no_attention_is_refused(tmp_path):
    config = transformers.RecurrentGemmaConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, lru_width=32
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = HFModel.load(str(tmp_path))
    with pytest.raises(ValueError, match="got 1 layers whose attention can be observed, expected 3"):
        model(torch.randint(96, (1, 8)))


SHAPE = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
BOTH_WAYS = r"got an encoder \(bert\), whose attention sees both directions, expected a causal language model"
TWO_PARTS = r"got an encoder with a decoder \({}\), expected a causal language model"
NOT_OURS = {
    "an encoder": ("BertForMaskedLM", "BertConfig", SHAPE, BOTH_WAYS),
    "an encoder without a head": ("BertModel", "BertConfig", SHAPE, BOTH_WAYS),
    "an encoder that is never causal": (
        "ModernBertForMaskedLM", "ModernBertConfig", dict(**SHAPE, pad_token_id=0), "got a model of type modernbert",
    ),
    "T5": (
        "T5ForConditionalGeneration", "T5Config",
        dict(vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4), TWO_PARTS.format("t5"),
    ),
    "BART, whose decoder would load alone": (
        "BartForConditionalGeneration", "BartConfig",
        dict(vocab_size=96, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
             decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64),
        TWO_PARTS.format("bart"),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("name", "config", "options", "message"), NOT_OURS.values(), ids=list(NOT_OURS))
def test_what_is_no_causal_language_model_is_refused_when_it_is_loaded(name, config, options, message, tmp_path):
    getattr(transformers, name)(getattr(transformers, config)(**options)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        HFModel.load(str(tmp_path))


def test_a_bias_beside_the_mask_is_refused():
    q = torch.zeros(1, 2, 4, 8)
    with (
        asking(Pass(Mask(rows=1, length=4), statistics=True)),
        pytest.raises(ValueError, match="Linear: got attention with position_bias, expected none but a scale"),
    ):
        attend(torch.nn.Linear(1, 1), q, q, q, None, position_bias=torch.zeros(1))


def test_attention_in_both_directions_is_refused_in_the_pass_too():
    register()
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.BertConfig(**SHAPE), attn_implementation=ATTENTION
    )
    with pytest.raises(ValueError, match="attention in both directions, expected a causal"):
        HFModel(model.eval())(torch.randint(96, (1, 8)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "llamma"},
            "got a config.json with model_type 'llamma', which transformers .* a newer release",
        ),
        (
            {"model_type": "mine", "auto_map": {"AutoModelForCausalLM": "modeling_mine.Mine"}},
            "model_type 'mine', which .* code that comes with a model is not run",
        ),
        ({"model_type": None}, "expected the folder of a causal language model"),
    ],
)
def test_a_config_that_the_library_does_not_know_is_named(changes, message, tmp_path):
    from_family("Llama", GQA, tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    with pytest.raises(ValueError, match=message):
        HFModel.load(str(tmp_path))


SMALL = dict(**GQA, head_dim=8)
OTHER_KEYS = "got a mask whose query 7 of .* sees other keys than expected"
REFUSED = {
    "a bias in the mask": ("Doge", GQA, 12, "DogeAttention: got attention_mask of torch.float32 and shape"),
    "a bias in a mask that is sampled": ("Doge", GQA, 90, "DogeForCausalLM: expected a model that hands its mask on"),
    "chunks": (
        "Llama4Text", dict(**SMALL, intermediate_size_mlp=48, num_local_experts=2, attention_chunk_size=7), 12,
        f"Llama4TextAttention: {OTHER_KEYS}",
    ),
    "a window in the mask alone": (
        "Phimoe", dict(**GQA, sliding_window=7, num_local_experts=2), 12, f"PhimoeAttention: {OTHER_KEYS}",
    ),
}  # fmt: skip


def from_family(name, options, folder):
    config = getattr(transformers, f"{name}Config")(**{**COMMON, **options})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    model.save_pretrained(folder)
    return model, HFModel.load(str(folder))


@pytest.mark.parametrize(("name", "options", "length", "message"), REFUSED.values(), ids=list(REFUSED))
def test_layers_that_see_other_keys_or_other_logits_are_refused(name, options, length, message, tmp_path):
    _, ours = from_family(name, options, tmp_path)
    with pytest.raises(ValueError, match=message):
        ours(torch.randint(2, 96, (2, length)))


@pytest.mark.parametrize("kind", ["chunks", "a window in the mask alone"])
def test_a_row_that_fits_in_a_chunk_or_window_is_measured(kind, tmp_path):
    name, options, _, _ = REFUSED[kind]
    theirs, ours = from_family(name, options, tmp_path)
    tokens = torch.randint(2, 96, (2, 7))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens).logits, theirs(tokens).logits, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("long", [False, True])
def test_blocks_that_see_both_ways_are_refused(long, tmp_path, monkeypatch):
    """A mask function of a model's own, which transformers evaluates index by index (vmap)."""
    from transformers.models.llama import modeling_llama

    original = modeling_llama.create_causal_mask
    prefix = lambda batch, head, query, key: (query < 3) & (key < 3)  # noqa: E731
    monkeypatch.setattr(
        modeling_llama, "create_causal_mask", lambda **given: original(**given, or_mask_function=prefix)
    )
    _, ours = from_family("Llama", GQA, tmp_path)
    with pytest.raises(ValueError, match=r"LlamaAttention: got a mask whose query 0 of .* both ways"):
        ours(torch.randint(2, 96, (2, 90 if long else 12)))


@pytest.mark.parametrize("key", ["model.layers.1.mlp.up_proj.weight", "lm_head.weight"])
def test_weights_that_the_files_lack_are_named(key, tmp_path):
    from safetensors.torch import load_file, save_file

    from_family("Llama", GQA, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    full = weights.pop(key)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"expected all weights of LlamaForCausalLM, got 1 of them missing.*{key}"):
        HFModel.load(str(tmp_path))
    save_file({**weights, key: full[:-1].clone()}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="mismatch"):
        HFModel.load(str(tmp_path))


def test_weights_that_are_tied_are_not_missing(tmp_path):
    from safetensors.torch import load_file

    theirs, ours = from_family("Llama", dict(**GQA, tie_word_embeddings=True), tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    torch.testing.assert_close(ours.model.lm_head.weight, theirs.lm_head.weight)


def test_a_folder_that_holds_no_model_or_a_damaged_one_is_named(saved, tmp_path):
    with pytest.raises(ValueError, match="expected the folder of a causal language model"):
        HFModel.load(str(tmp_path))
    theirs, _ = saved
    theirs.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    for length in (0, 1000, len(whole) - 4):
        weights.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"model\.safetensors: expected whole weights, got a file that is cut off"):
            HFModel.load(str(tmp_path))
    with pytest.raises(ValueError, match="expected a tokenizer beside the model"):
        HFModel.tokenizer(str(tmp_path))


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
def test_tokens_stand_for_the_bytes_of_their_text(kind, tmp_path):
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

    text = "a été of row and bos, row of bos"
    backend = tokenizers.Tokenizer(models.BPE(byte_fallback=kind == "sentencepiece", unk_token=None))
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>"], show_progress=False)
    if kind == "byte-level":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer.initial_alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        backend.normalizer = normalizers.Replace(" ", "▁")
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        trainer = trainers.BpeTrainer(
            vocab_size=300, special_tokens=["<s>", *(f"<0x{i:02X}>" for i in range(256))], show_progress=False
        )
    backend.train_from_iterator([text] * 3, trainer)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")
    ids = theirs(text + " 漢", add_special_tokens=False)["input_ids"]
    table = token_bytes(backend, special_ids(theirs, 320), 320)
    assert len(table) == 320 and table[theirs.bos_token_id] == 0
    assert sum(table[i] for i in ids) == len((text + " 漢").encode())


def test_reserved_tokens_and_ids_without_a_token_are_special():
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    backend = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(pre_tokenizers.ByteLevel.alphabet())}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "<|reserved_0|>"])
    backend.add_tokens(["ordinary"])
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")
    assert "<|reserved_0|>" not in theirs.all_special_tokens
    assert special_ids(theirs, 264) == {256, 257, *range(259, 264)}
    assert special_ids(theirs, 257) == {256}, "none past the embeddings"
    table = token_bytes(backend, special_ids(theirs, 264), 264)
    assert table.tolist()[255:] == [1, 0, 0, len("ordinary"), 0, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("options", "absent", "message"),
    [
        (
            {"gguf": "model.gguf"},
            {"gguf", "accelerate"},
            "gguf: needs the packages gguf and accelerate, got none; pip",
        ),
        ({"gguf": "model.gguf"}, {"gguf"}, "gguf: needs the package gguf, got none; pip install"),
        ({"device_map": "auto"}, {"accelerate"}, "device_map: needs the package accelerate, got none; pip install"),
    ],
)
def test_a_package_that_is_missing_is_named(options, absent, message, monkeypatch, tmp_path):
    from sinkbed.model.hf import adapter

    monkeypatch.setattr(adapter, "find_spec", lambda name: None if name in absent else object())
    with pytest.raises(ValueError, match=message):
        HFModel.load(str(tmp_path), **options)


PARTS = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
MAPS = {
    "auto": "auto",
    "a layer on disk": {**dict.fromkeys(PARTS, "cpu"), "model.layers.1": "disk"},
    "everything on disk": {"": "disk"},
}


@pytest.mark.parametrize("device_map", MAPS.values(), ids=list(MAPS))
def test_where_the_layers_are_changes_nothing_that_is_measured(device_map, tmp_path):
    pytest.importorskip("accelerate")
    torch.manual_seed(0)
    _, ours = from_family("Llama", GQA, tmp_path)
    found = HFModel.load(str(tmp_path), device_map=device_map)
    away = [parameter.device.type == "meta" for parameter in found.parameters()]
    assert any(away) == (device_map != "auto") and all(away) == (device_map == {"": "disk"})
    documents = tuple(torch.randint(2, 96, (3, 20)))
    probe = Probe(documents, torch.ones(96, dtype=torch.int64), 0, 1, frozenset({0, 1}))
    config = MeasureConfig(documents=3, live_documents=1, sink_tokens=16)
    for mode in ("bos", "text", "first_key_masked"):
        expected, got = (measure(m, probe, mode, Strategy(first_token="bos"), config) for m in (ours, found))
        assert got == expected


def test_a_mask_goes_to_the_device_of_the_layer():
    """One tensor under two names stays one, which is how a document mask is known."""
    start = torch.tensor([[0, 0, 2, 2]], dtype=torch.int32)
    mask = interval_mask(1, 4, doc_start=start, doc_end=torch.tensor([[2, 2, 4, 4]], dtype=torch.int32), document=True)
    assert mask.is_document and moved(mask, torch.device("cpu")) is mask
    there = moved(mask, torch.device("meta"))
    assert there.first_key.device.type == there.doc_start.device.type == "meta" and there.is_document
    plain = Mask(rows=1, length=4)
    assert moved(plain, torch.device("meta")) is plain
