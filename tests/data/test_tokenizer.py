"""The tokenizer is lossless, counts its bytes exactly and never makes a control token from text."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

from data.tokenizer import Tokenizer, tokenizer_file_sha256

TEXTS = ["the cat sat on the mat", "le chat, l'été", "ein Bär \u6f22\u5b57 \U0001f600"] * 3
# Any text that UTF-8 can hold: every code point but lone surrogates.
ANY_TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=60)


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return Tokenizer.train(TEXTS, vocab_size=300)


@settings(max_examples=200, deadline=None)
@given(text=ANY_TEXT)
def test_any_text_decodes_to_itself_and_its_bytes_add_up(trained: Tokenizer, text: str) -> None:
    ids = trained.encode(text)
    assert trained.decode(ids) == text
    assert trained.token_bytes[ids].sum() == len(text.encode())
    assert trained.encode_batch([text, "x"])[0] == ids


@pytest.mark.parametrize("text", ["<bos>", "a<bos>b<eos>", "<eos><eos>", "<bos", "x <bos> y"])
def test_special_tokens_written_in_a_document_stay_text(trained: Tokenizer, tmp_path: Path, text: str) -> None:
    trained.save(tmp_path / "tokenizer.json")
    for tokenizer in (trained, Tokenizer.load(tmp_path / "tokenizer.json")):
        for ids in (tokenizer.encode(text), tokenizer.encode_batch([text])[0]):
            assert not set(ids) & set(tokenizer.special_ids)
            assert tokenizer.decode(ids) == text


def test_special_tokens_in_the_training_text_are_text_too() -> None:
    plain = Tokenizer.train(["[bos] word"] * 20, vocab_size=270)
    marked = Tokenizer.train(["<bos> word"] * 20, vocab_size=270)
    assert len(marked.encode("<bos>")) == len(plain.encode("[bos]")) < 5


def test_merges_span_several_bytes_and_specials_none(trained: Tokenizer) -> None:
    table = trained.token_bytes
    assert 258 < trained.vocab_size <= 300 and table.shape == (trained.vocab_size,)
    assert table[[trained.bos_id, trained.eos_id]].tolist() == [0, 0]
    assert (np.sort(table)[2:258] == 1).all() and table.max() > 2
    cat = trained.encode(" the")
    assert len(cat) == 1 and table[cat[0]] == 4


def test_training_is_deterministic_across_processes(trained: Tokenizer) -> None:
    script = (
        "import json, sys; from data.tokenizer import Tokenizer;"
        "print(Tokenizer.train(json.loads(sys.argv[1]), vocab_size=300).sha256)"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, json.dumps(TEXTS)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == trained.sha256


def test_the_hash_of_a_file_is_that_of_the_tokenizer_and_tells_others_apart(
    trained: Tokenizer, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    trained.save(tmp_path / "tokenizer.json")
    assert tokenizer_file_sha256(tmp_path / "tokenizer.json") == trained.sha256
    assert Tokenizer.load(tmp_path / "tokenizer.json").sha256 == trained.sha256
    assert tokenizer.sha256 != trained.sha256


def test_one_token_may_serve_as_both_and_added_tokens_keep_their_bytes(tmp_path: Path) -> None:
    backend = Tokenizer.train(TEXTS, vocab_size=270).backend
    backend.add_special_tokens(["<|endoftext|>", "<|pad|>"])
    backend.add_tokens(["mündung"])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.json", bos="<|endoftext|>", eos="<|endoftext|>")
    assert tokenizer.bos_id == tokenizer.eos_id == 270
    assert tokenizer.special_ids == (0, 1, 270, 271) and tokenizer.vocab_size == 273
    ids = tokenizer.encode("Donaumündung")
    assert 272 in ids and tokenizer.token_bytes[ids].sum() == len("Donaumündung".encode())


def test_a_vocabulary_too_small_for_the_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match="vocab_size: found 257, expected at least 258"):
        Tokenizer.train(TEXTS, vocab_size=257)


def test_a_missing_file_a_file_that_is_none_and_a_missing_special_are_named(tmp_path: Path, trained: Tokenizer) -> None:
    with pytest.raises(FileNotFoundError, match="no file at"):
        Tokenizer.load(tmp_path / "absent.json")
    (tmp_path / "other.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match=r"other\.json is no tokenizer"):
        Tokenizer.load(tmp_path / "other.json")
    trained.save(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match=r"no token '<s>' for bos.*tokenizer\.bos"):
        Tokenizer.load(tmp_path / "tokenizer.json", bos="<s>")


def _normalising() -> tokenizers.Tokenizer:
    backend = Tokenizer.train(TEXTS, vocab_size=270).backend
    backend.normalizer = normalizers.NFC()
    return backend


def _spacing() -> tokenizers.Tokenizer:
    backend = Tokenizer.train(TEXTS, vocab_size=270).backend
    backend.normalizer = normalizers.Prepend("x")
    return backend


def _word_level() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.WordLevel({"<bos>": 0, "<eos>": 1, "?": 2}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s"), "isolated")
    backend.decoder = decoders.Fuse()
    return backend


@pytest.mark.parametrize("make", [_normalising, _spacing, _word_level])
def test_a_tokenizer_that_loses_text_is_refused(make: Callable[[], tokenizers.Tokenizer]) -> None:
    with pytest.raises(ValueError, match="expected a lossless byte-level BPE"):
        Tokenizer(make())
