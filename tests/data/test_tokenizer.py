"""The tokenizer is lossless, counts its bytes exactly and never makes a control token from text."""

from __future__ import annotations

import json
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

from data.manifest import sha256_json
from data.tokenizer import Tokenizer, read_definition

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
    assert sha256_json(read_definition(tmp_path / "tokenizer.json")) == trained.sha256
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


def _folder(path: Path, **files: Any) -> Path:
    """A tokenizer as `transformers` saves it, with the given configuration files."""
    backend = Tokenizer.train(TEXTS, vocab_size=270).backend
    backend.add_special_tokens(["<|begin|>", "<|end|>"])
    path.mkdir()
    backend.save(str(path / "tokenizer.json"))
    for name, fields in files.items():
        (path / f"{name}.json").write_text(json.dumps(fields))
    return path


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config": {"bos_token": "<|begin|>", "eos_token": "<|end|>", "model_max_length": 8}},
        {"tokenizer_config": {"bos_token": {"content": "<|begin|>", "lstrip": False}, "eos_token": "<|end|>"}},
        {"special_tokens_map": {"bos_token": "<|begin|>", "eos_token": {"content": "<|end|>"}}},
        {
            "special_tokens_map": {"bos_token": "<eos>", "eos_token": "<|end|>"},
            "tokenizer_config": {"bos_token": "<|begin|>", "eos_token": None},
        },
    ],
    ids=["config", "objects", "map", "both"],
)
def test_a_folder_of_transformers_names_its_bos_and_eos(files: dict[str, Any], tmp_path: Path) -> None:
    folder = _folder(tmp_path / "hf", **files)
    found = Tokenizer.load(folder)
    assert (found.bos_id, found.eos_id) == (270, 271)
    assert Tokenizer.load(folder, eos="<bos>").eos_id == 0, "what the caller names goes first"
    assert Tokenizer.load(folder / "tokenizer.json").bos_id == 0, "a file stands for itself"


def test_a_folder_without_a_tokenizer_or_with_a_broken_configuration_is_named(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "hf")
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is no JSON"):
        Tokenizer.load(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no tokenizer\.json.*use_fast"):
        Tokenizer.load(folder)


@settings(max_examples=100, deadline=None)
@given(text=ANY_TEXT)
def test_with_a_normaliser_the_normalised_text_comes_back_and_its_bytes_add_up(text: str) -> None:
    backend = Tokenizer.train([], vocab_size=258).backend
    backend.normalizer = normalizers.NFC()
    tokenizer = Tokenizer(backend)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == tokenizer.normalize(text) == unicodedata.normalize("NFC", text)
    assert tokenizer.token_bytes[ids].sum() == len(tokenizer.normalize(text).encode())


def _metaspace() -> tokenizers.Tokenizer:
    """As Llama 2's: a space is a letter of its own, with bytes to fall back on."""
    letters = ["<bos>", "<eos>", "\u2581", *"abc", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(letters)}, [], byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
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


@pytest.mark.parametrize("make", [_spacing, _metaspace, _word_level])
def test_a_tokenizer_that_loses_text_is_refused(make: Callable[[], tokenizers.Tokenizer]) -> None:
    with pytest.raises(ValueError, match="expected a lossless byte-level BPE"):
        Tokenizer(make())


def test_a_tokenizer_that_encodes_at_random_is_refused(tmp_path: Path) -> None:
    Tokenizer.train(["some text"] * 3, vocab_size=262).save(tmp_path / "t.json")
    definition = json.loads((tmp_path / "t.json").read_text())
    definition["model"]["dropout"] = 0.3
    (tmp_path / "t.json").write_text(json.dumps(definition))
    with pytest.raises(ValueError, match=r"found BPE dropout \(0\.3"):
        Tokenizer.load(tmp_path / "t.json")
