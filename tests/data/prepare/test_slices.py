"""A long document is encoded in slices, with the tokens of the whole and in bounded memory."""

import random
from collections.abc import Callable, Iterator
from itertools import chain

import pytest
import tokenizers
from tokenizers import Regex, normalizers, pre_tokenizers

from sinkbed.data.prepare import slices as slices_module
from sinkbed.data.prepare.encoding import Encoded, Encoder, encode_texts
from sinkbed.data.prepare.slices import slices
from sinkbed.data.source.selection import Batch, Document
from sinkbed.data.tokenizer import Tokenizer
from tests.support.tokenizers import marked

GENERATOR = random.Random(0)
WORDS = [
    "the",
    "cat",
    "don't",
    "I'll",
    "漢字。",
    "あい",
    "été",
    "😀😁",
    "1234567",
    "3.14",
    "--",
    "...",
    "!?)",
    "<bos>",
    "x_y",
    "ภาษา",
    "Donaumündung",
    "ab",
    "\x00",
    "/*",
    "a1b2",
]
GAPS = [" ", " ", " ", "", "  ", "   ", "\n", "\n\n", " \n ", "\t", "\r\n", "\u3000", "\u2028", ", ", ".\n\n", "'"]
TEXT = "".join(GENERATOR.choice(WORDS) + GENERATOR.choice(GAPS) for _ in range(12_000))
CL100K = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
CL100K += r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def trained(*pre_tokenizer: pre_tokenizers.PreTokenizer) -> tokenizers.Tokenizer:
    """Trained with those words, so that merges go as far as they may."""
    backend = Tokenizer.train([], vocab_size=258).backend
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*pre_tokenizer, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not pre_tokenizer)]
    )
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=1200,
        special_tokens=["<bos>", "<eos>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator([TEXT], trainer)
    return backend


def gpt2() -> tokenizers.Tokenizer:
    return trained()


def llama3() -> tokenizers.Tokenizer:
    return trained(pre_tokenizers.Split(Regex(CL100K), "isolated"))


def deepseek() -> tokenizers.Tokenizer:
    split = [Regex(r"\p{N}{1,3}"), Regex("[\u4e00-\u9fa5\u3040-\u30ff]+"), Regex(CL100K)]
    return trained(*(pre_tokenizers.Split(pattern, "isolated") for pattern in split))


def neox() -> tokenizers.Tokenizer:
    """With tokens added by hand that hold spaces, and a normaliser."""
    backend = trained()
    backend.normalizer = normalizers.NFC()
    backend.add_tokens([" " * 2, " " * 3, "cat\n", "\n\nthe"])
    return backend


def gemma() -> tokenizers.Tokenizer:
    return marked(normalizers.Replace(" ", "\u2581"))


def gemma2() -> tokenizers.Tokenizer:
    """As it is published: the words of its pre-tokenizer are those of the text before the normaliser."""
    backend = gemma()
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    return backend


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(slices_module, "SLICE", 500)
    monkeypatch.setattr(slices_module, "_CONTEXT", 60)
    monkeypatch.setattr(slices_module, "LONGEST", 20_000)
    yield


@pytest.mark.parametrize("make", [gpt2, llama3, deepseek, neox, gemma, gemma2], ids=lambda make: make.__name__)
def test_the_tokens_of_slices_are_those_of_the_whole(make: Callable[[], tokenizers.Tokenizer]) -> None:
    tokenizer = Tokenizer(make())
    text = tokenizer.normalize(TEXT)
    for begin in range(0, 300, 7):  # so that cuts fall on other places
        part = text[begin : begin + 5_000]
        cut = list(slices(tokenizer, part))
        assert "".join(cut) == part and len(cut) > 7 and max(map(len, cut)) < 900
        assert list(chain.from_iterable(map(tokenizer.encode, cut))) == tokenizer.encode(part)
    cut = list(slices(tokenizer, text))
    assert list(chain.from_iterable(map(tokenizer.encode, cut))) == tokenizer.encode(text)


def test_a_word_is_never_cut_and_one_beyond_all_bounds_is_refused(tokenizer: Tokenizer) -> None:
    word = "x" * 10_000
    text = "some words " * 30 + word + " and more" * 300
    assert any(word in part for part in slices(tokenizer, text))
    assert list(slices(tokenizer, word)) == [word]
    with pytest.raises(ValueError, match=r"at least every 20,000 characters.*got none from character.*max_bytes"):
        list(slices(tokenizer, "some words " * 100 + "x" * 21_000))


def test_documents_of_a_batch_keep_their_tokens_whatever_is_cut(tokenizer: Tokenizer) -> None:
    texts = ["short", TEXT[:6000], "", "other", TEXT[6000:9000], "last"]
    batch = Batch(0, [Document(text, "train", len(text.encode()), 0) for text in texts], last=True)
    expected = encode_texts(tokenizer, texts)
    for workers in (1, 2):
        seen: list[Encoded] = []
        with Encoder(tokenizer, workers) as encoder:
            [(_, encoded)] = encoder.map([batch], seen=seen.append)
        assert encoded is not None and len(seen) > 10, "progress moves inside a document"
        assert all((a == b).all() for a, b in zip(encoded, expected, strict=True))
        assert sum(int(part.sizes.sum()) for part in seen) == int(expected.sizes.sum())
