"""The tokenizer is lossless, counts its bytes exactly and never makes a control token from text."""

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

from sinkbed.data import tokenizer as tokenizer_module
from sinkbed.data.files import sha256_json
from sinkbed.data.source.selection import Selection
from sinkbed.data.store.token_store import TokenStore, read_definition
from sinkbed.data.tokenizer import Tokenizer
from tests.support import ROOT
from tests.support.stores import StoreWriter
from tests.support.tokenizers import marked

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


@pytest.mark.parametrize("in_vocab", [True, False], ids=["in the vocabulary", "added beside it"])
def test_the_tokenizer_of_a_store_makes_no_control_token_of_text_whoever_loads_it(
    trained: Tokenizer, tmp_path: Path, in_vocab: bool
) -> None:
    names = {"bos": "<bos>", "eos": "<eos>"}
    if not in_vocab:  # as in Llama 3; one of the two has settings of its own
        backend = tokenizers.Tokenizer.from_str(trained.backend.to_str())
        backend.add_special_tokens(["<|begin|>", tokenizers.AddedToken("<|end|>", rstrip=True)])
        backend.add_tokens(["mündung"])
        trained = Tokenizer(backend, bos="<|begin|>", eos="<|end|>")
        names = {"bos": "<|begin|>", "eos": "<|end|>"}
    with StoreWriter(tmp_path / "store", trained) as writer:
        writer.add("train", trained.encode("a"), 1)
        writer.finish(recipe={"tokenizer": names})
    text = "<bos> a<|end|> <eos> Donaumündung <|begin|>"
    loaded = tokenizers.Tokenizer.from_file(str(tmp_path / "store" / "tokenizer.json"))
    assert loaded.encode(text, add_special_tokens=False).ids == trained.encode(text)
    assert [loaded.token_to_id(names[role]) for role in names] == [trained.bos_id, trained.eos_id]
    ours = TokenStore.open(tmp_path / "store").tokenizer()
    assert ours.sha256 == trained.sha256 and ours.special_ids == trained.special_ids
    assert ours.backend.to_str() == trained.backend.to_str()


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
        "import json, sys; from sinkbed.data.tokenizer import Tokenizer;"
        "print(Tokenizer.train(json.loads(sys.argv[1]), vocab_size=300).sha256)"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, json.dumps(TEXTS)],
        cwd=ROOT,
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
    with pytest.raises(ValueError, match=r"vocab_size: expected at least 258 .* got 257"):
        Tokenizer.train(TEXTS, vocab_size=257)


def test_a_missing_file_a_file_that_is_none_and_a_missing_special_are_named(tmp_path: Path, trained: Tokenizer) -> None:
    with pytest.raises(FileNotFoundError, match="no file at"):
        Tokenizer.load(tmp_path / "absent.json")
    (tmp_path / "other.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match=r"other\.json is no tokenizer"):
        Tokenizer.load(tmp_path / "other.json")
    trained.save(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match=r"expected a token '<s>' for bos.*tokenizer\.bos"):
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


def _gemma() -> tokenizers.Tokenizer:
    return marked(normalizers.Replace(" ", "\u2581"))


def _llama2() -> tokenizers.Tokenizer:
    return marked(normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]))


def _normalized(*normalizer: normalizers.Normalizer) -> Callable[[], tokenizers.Tokenizer]:
    def make() -> tokenizers.Tokenizer:
        backend = Tokenizer.train(TEXTS, vocab_size=270).backend
        backend.normalizer = normalizers.Sequence(list(normalizer))
        return backend

    return make


def _split(pre_tokenizer: pre_tokenizers.PreTokenizer, **settings: Any) -> Callable[[], tokenizers.Tokenizer]:
    def make() -> tokenizers.Tokenizer:
        backend = Tokenizer.train(TEXTS, vocab_size=270).backend
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizer, pre_tokenizers.ByteLevel(**settings)])
        return backend

    return make


def _word_level() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.WordLevel({"<bos>": 0, "<eos>": 1, "?": 2}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s"), "isolated")
    backend.decoder = decoders.Fuse()
    return backend


LOSING = {
    "adds a letter": _normalized(normalizers.Prepend("x")),
    "adds a space to the text": _llama2,
    "adds a space to a text without one": _split(pre_tokenizers.Digits(), add_prefix_space=True),
    "collapses spaces": _normalized(normalizers.Replace(Regex(" +"), " ")),
    "strips spaces": _normalized(normalizers.Strip()),
    "strips accents": _normalized(normalizers.NFD(), normalizers.StripAccents()),
    "lowers letters": _normalized(normalizers.Lowercase()),
    "drops spaces": _split(pre_tokenizers.WhitespaceSplit(), add_prefix_space=False),
    "knows no word": _word_level,
}


@pytest.mark.parametrize("make", LOSING.values(), ids=LOSING.keys())
def test_a_tokenizer_that_loses_text_is_refused(make: Callable[[], tokenizers.Tokenizer]) -> None:
    with pytest.raises(ValueError, match=r"expected one that keeps every text, got .* turned into"):
        Tokenizer(make())


@settings(max_examples=100, deadline=None)
@given(text=st.one_of(ANY_TEXT, st.text("ab c", max_size=30)).filter(lambda text: "\u2581" not in text))
def test_a_tokenizer_that_marks_spaces_and_falls_back_on_bytes_loses_nothing(text: str) -> None:
    tokenizer = Tokenizer(_gemma())
    ids = tokenizer.encode(text)
    assert tokenizer.normalize(text) == tokenizer.decode(ids) == text
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())


def test_a_run_of_spaces_listed_as_a_token_keeps_its_bytes() -> None:
    """Regression: three bytes a mark, so that it was refused."""
    backend = _gemma()
    backend.add_tokens([tokenizers.AddedToken("\u2581\u2581", normalized=False)])
    tokenizer = Tokenizer(backend)
    ids = tokenizer.encode("a  b")
    assert "\u2581\u2581" in map(backend.id_to_token, ids) and tokenizer.token_bytes[ids].sum() == 4


def test_a_document_that_the_tokenizer_would_change_is_refused_or_left_out() -> None:
    gemma, quoted = Tokenizer(_gemma()), Tokenizer(_normalized(normalizers.Replace("``", '"'))())
    for tokenizer, text, message in (
        (gemma, "a \u2581", "'\u2581' turned into ' '"),
        (quoted, "a ``b", "'``b' turned into"),
    ):
        with pytest.raises(ValueError, match=f"expected one that keeps the text, got {message}"):
            tokenizer.normalize(text)
        with pytest.raises(ValueError, match="leave such documents out with --on_error skip"):
            list(Selection([text], validation_share=0.0, normalize=tokenizer.normalize))
        chosen = Selection(["b", text], validation_share=0.0, normalize=tokenizer.normalize, skip_changed=True)
        assert [document.text for document in chosen] == ["b"] and chosen.left_out == {"changed_by_tokenizer": 1}


def test_a_pattern_that_takes_for_ever_is_one_message(tmp_path: Path) -> None:
    bomb = pre_tokenizers.Split(Regex(r"(b+)+$"), "isolated")
    tokenizer = Tokenizer(_split(bomb, add_prefix_space=False)())
    with pytest.raises(ValueError, match="expected one that gets through every text, got that it gave up"):
        tokenizer.encode_batch(["b" * 40 + "?"])
    definition = tokenizer.backend.to_str().replace('"normalizer":null', '"normalizer":' + "[" * 10**5)
    (tmp_path / "deep.json").write_text(definition)
    with pytest.raises(ValueError, match=r"deep\.json is no tokenizer"):
        Tokenizer.load(tmp_path / "deep.json")


def test_training_cuts_words_that_would_take_it_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_module, "_LONGEST_WORD", 5)
    for text, parts in (
        ("a word", ["a word"]),
        ("some abcdefghijkl 1234567 ok", ["some abcde", "fghij", "kl 12345", "67 ok"]),
        ("x       y!!!!!!", ["x     ", "  y!!!!!", "!"]),
        ("\u6f22" * 11, ["\u6f22" * 5, "\u6f22" * 5, "\u6f22"]),
    ):
        assert list(tokenizer_module._short_words(text)) == parts and "".join(parts) == text


def test_a_tokenizer_that_encodes_at_random_is_refused(tmp_path: Path) -> None:
    Tokenizer.train(["some text"] * 3, vocab_size=262).save(tmp_path / "t.json")
    definition = json.loads((tmp_path / "t.json").read_text())
    definition["model"]["dropout"] = 0.3
    (tmp_path / "t.json").write_text(json.dumps(definition))
    with pytest.raises(ValueError, match=r"expected no BPE dropout.* got 0\.3"):
        Tokenizer.load(tmp_path / "t.json")


def test_a_model_other_than_a_bpe_is_refused_and_a_damaged_configuration_named(tmp_path: Path) -> None:
    pieces = [("<bos>", 0.0), ("<eos>", 0.0), *((f"<0x{byte:02X}>", -1.0) for byte in range(256))]
    backend = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    with pytest.raises(ValueError, match=r"tokenizer: expected a BPE, got a Unigram"):
        Tokenizer(backend)
    Tokenizer.train(["some text"] * 3, vocab_size=262).save(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is no JSON object"):
        Tokenizer.load(tmp_path)
