"""`sinkbed probe` of models whose tokenizer is not ours."""

import json

import pytest

from sinkbed.model.hf.adapter import HFModel
from sinkbed.train.cli.main import main

transformers = pytest.importorskip("transformers")
TEXT = "sink bos row token mask head layer first key to the end: été, 漢."


def backend_of(kind):
    """A tokenizer of some kind that reads TEXT, with <s>, </s> and a reserved token."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

    special = ["<s>", "</s>", "<|reserved|>", "<unk>"]
    settings = dict(vocab_size=290, special_tokens=special, show_progress=False)
    if kind == "wordpiece":
        backend = tokenizers.Tokenizer(models.WordPiece(unk_token="<unk>"))
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(**settings)
    elif kind == "end-of-word":
        backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.Whitespace(), decoders.BPEDecoder()
        trainer = trainers.BpeTrainer(**settings, end_of_word_suffix="</w>")
    elif kind == "prefix space":
        backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer = trainers.BpeTrainer(**settings)
    else:
        backend = tokenizers.Tokenizer(models.BPE())
        backend.normalizer = normalizers.NFC()
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(**settings, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator([TEXT] * 3, trainer)
    return backend


@pytest.fixture
def with_tokenizer(exported, tmp_path):
    """The exported model with another tokenizer and 300 embeddings; prompts whose accents are decomposed."""
    import unicodedata

    def make(kind):
        folder = tmp_path / kind
        model = transformers.AutoModelForCausalLM.from_pretrained(exported)
        model.resize_token_embeddings(300)
        model.save_pretrained(folder)
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=backend_of(kind), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
        ).save_pretrained(folder)
        text = TEXT if kind == "prefix space" else unicodedata.normalize("NFD", TEXT)
        (tmp_path / "prompts.txt").write_text(f"{text}\n", encoding="utf-8")
        return folder, tmp_path / "prompts.txt"

    return make


def arguments_of(folder):
    import argparse

    return argparse.Namespace(
        model=str(folder), revision=None, gguf=None, tokenizer=None, dtype="auto", device_map=None, bos=None, store=None
    )


@pytest.mark.parametrize("kind", ["wordpiece", "end-of-word"])
def test_a_tokenizer_whose_tokens_are_not_the_bytes_of_their_text_is_refused(kind, with_tokenizer, capsys):
    folder, prompts = with_tokenizer(kind)
    assert main(["probe", str(folder), "--prompts", str(prompts), "--sink_tokens", "8"]) == 1
    captured = capsys.readouterr()
    assert "bytes of its decoded text, for bits per byte, got" in captured.err and not captured.out


@pytest.mark.parametrize("kind", ["prefix space", "byte-level"])
def test_a_prefix_space_and_a_normaliser_are_no_obstacle(kind, with_tokenizer, tmp_path):
    import math
    import unicodedata

    from sinkbed.train.measure.model import load

    folder, prompts = with_tokenizer(kind)
    found = tmp_path / "found.json"
    options = ["--sink_tokens", "8", "--modes", "text", "--length", "48", "--json", str(found)]
    assert main(["probe", str(folder), "--prompts", str(prompts), *options]) == 0
    result = json.loads(found.read_text())["sinks"]["natural"]["text"]["0"]
    subject = load(arguments_of(folder))
    ids = subject.encode(TEXT)
    assert len(ids) <= 47, "the whole document is measured"
    first = subject.token_bytes[ids[0]] - (kind == "prefix space")
    bytes_counted = len(unicodedata.normalize("NFC", TEXT).encode()) - first
    expected = result["loss"] * result["tokens"] / math.log(2) / bytes_counted
    assert result["bits_per_byte"] == pytest.approx(expected)


def test_random_tokens_are_neither_control_tokens_nor_without_a_token(with_tokenizer):
    import torch

    from sinkbed.data.pack.strategy import Strategy
    from sinkbed.train.measure.config import MeasureConfig
    from sinkbed.train.measure.inputs import first_tokens
    from sinkbed.train.measure.model import load
    from sinkbed.train.measure.texts import artificial, probe_of

    folder, _ = with_tokenizer("byte-level")
    subject = load(arguments_of(folder))
    count = len(HFModel.tokenizer(str(folder)))
    assert count < 300 == len(subject.token_bytes)
    assert subject.special_ids == {0, 1, 2, 3, *range(count, 300)}
    texts = iter([TEXT * 40] * 40)
    natural = probe_of(subject, texts, 2000, MeasureConfig(documents=40, live_documents=1))
    drawn = torch.cat(artificial(natural, "random").documents)
    assert len(drawn) > 20_000 and set(drawn.tolist()) == set(range(300)) - subject.special_ids
    first, _ = first_tokens("random_first", Strategy(), natural, range(40))
    assert not set(first.flatten().tolist()) & subject.special_ids
