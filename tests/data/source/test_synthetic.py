"""Synthetic documents follow their task exactly, are functions of their number, and make one token a symbol."""

import itertools
import math
import re
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from sinkbed.data.prepare.config import PrepareConfig, TokenizerConfig
from sinkbed.data.prepare.prepare import prepare
from sinkbed.data.prepare.recipe import source_identity
from sinkbed.data.source.config import Source
from sinkbed.data.source.documents import Documents
from sinkbed.data.source.synthetic import SYMBOLS, TRIGGERS, Synthetic, bigram, synthetic_documents
from sinkbed.data.store.token_store import TokenStore
from tests.support import ROOT

CONFIGS = [
    ROOT / f"configs/data/{task}.yaml" for task in ("bigram_backcopy", "trigger_averaging", "uniform", "repeated")
]


def made(**parameters: Any) -> list[str]:
    return list(synthetic_documents(Synthetic(**parameters)))


def surprisal(task: Synthetic, text: str) -> list[float]:
    """−log p of each token of a document given those before, from the task's description."""
    if task.task in ("uniform", "repeated"):
        known = 0.0 if task.task == "repeated" else math.log(task.symbol_count)
        return [math.log(task.symbol_count) if t < (task.phrase or 1) else known for t in range(len(text))]
    p, S = task.chance, task.symbol_count
    P = bigram(S, task.trigger_count, p)
    alphabet = SYMBOLS[:S] + TRIGGERS[: task.trigger_count]
    out = [math.log(S)]
    for before, symbol in itertools.pairwise(text):
        if before in TRIGGERS:
            out.append(0.0)
        elif task.task == "bigram_backcopy" and before in alphabet:
            out.append(-math.log(P[alphabet.index(before), alphabet.index(symbol)]))
        else:
            out.append(-math.log(p if symbol in TRIGGERS else (1 - p) / S))
    return out


@given(
    symbols=st.integers(2, 62), triggers=st.integers(1, 10), chance=st.floats(0.01, 0.9), seed=st.integers(0, 2**62),
    length=st.integers(2, 60),
)  # fmt: skip
@settings(deadline=None, max_examples=40)
def test_after_a_trigger_comes_the_symbol_before_it_and_no_trigger_follows_another(
    symbols: int, triggers: int, chance: float, seed: int, length: int
) -> None:
    documents = made(
        task="bigram_backcopy", documents=20, length=length, symbols=symbols, triggers=triggers,
        trigger_probability=chance, seed=seed,
    )  # fmt: skip
    for text in documents:
        assert len(text) == length and set(text) <= set(SYMBOLS[:symbols] + TRIGGERS[:triggers])
        assert text[0] not in TRIGGERS
        for before, trigger, after in zip(text, text[1:], text[2:], strict=False):
            if trigger in TRIGGERS:
                assert after == before and after not in TRIGGERS


def test_transitions_that_are_drawn_follow_the_bigram() -> None:
    """Chi-square of each row's counts against its chances; the statistic's mean is its degrees of freedom."""
    S, K, p = 12, 3, 0.2
    P = bigram(S, K, p)
    assert P.shape == (S, S + K)
    np.testing.assert_allclose(P.sum(1), 1)
    np.testing.assert_allclose(P[:, S:].sum(1), p)
    assert P.max() > 10 * np.median(P), "skewed, as the bigram of a text is"
    alphabet = SYMBOLS[:S] + TRIGGERS[:K]
    counts = np.zeros_like(P)
    for text in made(task="bigram_backcopy", documents=1000, length=200, symbols=S, triggers=K, trigger_probability=p):
        assert any(symbol in TRIGGERS for symbol in text)
        for before, after in itertools.pairwise(text):
            if before not in TRIGGERS:
                counts[alphabet.index(before), alphabet.index(after)] += 1
    expected = P * counts.sum(1, keepdims=True)
    enough = expected >= 5
    statistic = ((counts - expected) ** 2 / expected)[enough].sum()
    freedom = enough.sum() - S
    assert freedom > 100
    assert abs(statistic - freedom) < 4 * math.sqrt(2 * freedom)


@given(symbols=st.integers(2, 26), chance=st.floats(0.01, 0.9), seed=st.integers(0, 2**62), length=st.integers(2, 60))
@settings(deadline=None, max_examples=40)
def test_after_a_trigger_comes_the_mean_of_the_values_so_far(
    symbols: int, chance: float, seed: int, length: int
) -> None:
    for text in made(
        task="trigger_averaging", documents=20, length=length, symbols=symbols, trigger_probability=chance, seed=seed
    ):
        assert len(text) == length
        values: list[int] = []
        expected = ""
        for before, symbol in zip(" " + text, text, strict=False):
            if before == "?":
                mean = Fraction(sum(values), len(values))
                expected += SYMBOLS[26 + math.floor(mean + Fraction(1, 2))]
            else:
                if symbol != "?":
                    assert symbol in SYMBOLS[:symbols]
                    values.append(SYMBOLS.index(symbol))
                expected += symbol
        assert text == expected


def test_symbols_and_triggers_are_as_frequent_as_they_should_be() -> None:
    counts = Counter("".join(made(task="uniform", documents=1000, length=100, symbols=10)))
    assert sorted(counts) == sorted(SYMBOLS[:10])
    statistic = sum((count - 10_000) ** 2 / 10_000 for count in counts.values())
    assert statistic < 9 + 4 * math.sqrt(18)
    for task in ("bigram_backcopy", "trigger_averaging"):
        text = made(task=task, documents=1000, length=100, trigger_probability=0.25)
        drawn = sum(before not in TRIGGERS for d in text for before in d[:-1])
        triggers = sum(symbol in TRIGGERS for d in text for symbol in d[1:])
        assert triggers / drawn == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / drawn))


def test_a_phrase_is_repeated_to_the_end_of_its_document() -> None:
    documents = made(task="repeated", documents=50, length=(7, 23), phrase=3)
    assert all(text == (text[:3] * 8)[: len(text)] for text in documents)
    assert len({text[:3] for text in documents}) > 40 and {len(text) for text in documents} > {7, 23}
    assert all(len(set(text)) == 1 for text in made(task="repeated", documents=50, length=20))


PARAMETERS = [
    {"task": "bigram_backcopy", "length": (5, 40), "triggers": 2, "trigger_probability": 0.3},
    {"task": "trigger_averaging", "length": (5, 40), "symbols": 9, "trigger_probability": 0.3},
    {"task": "uniform", "length": (5, 40)},
    {"task": "repeated", "length": (5, 40), "phrase": 2},
]
each_task = pytest.mark.parametrize("parameters", PARAMETERS, ids=lambda p: p["task"])


@each_task
def test_a_document_is_a_function_of_its_number_and_the_seed(
    parameters: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    task = Synthetic(documents=300, **parameters)
    documents = list(synthetic_documents(task))
    assert len(documents) == 300 and len(set(documents)) > 290
    monkeypatch.setattr("sinkbed.data.source.synthetic._BLOCK_TOKENS", 300)
    assert list(synthetic_documents(task)) == documents, "however many are made at a time"
    assert list(synthetic_documents(Synthetic(documents=9, **parameters))) == documents[:9]
    other = list(synthetic_documents(Synthetic(documents=300, seed=1, **parameters)))
    assert sum(a == b for a, b in zip(documents, other, strict=True)) < 10


def test_documents_are_the_same_on_every_machine() -> None:
    """Spelled out, so that a change of the generator is noticed and GENERATOR_VERSION raised with it."""
    shown = {p["task"]: made(documents=3, **p)[2] for p in PARAMETERS}
    assert shown == {
        "bigram_backcopy": "7X!XysT?TdPGj!jiDeSbY!YAE?",
        "trigger_averaging": "if?Hd?F?Fafeaiia?Efadia?E?",
        "uniform": "8O9nzgp4xbKCf49eMlKcA9byrR",
        "repeated": "8O8O8O8O8O8O8O8O8O8O8O8O8O",
    }


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_floors_in_the_readme_are_the_mean_surprisal_of_the_documents(path: Path) -> None:
    task = Synthetic(**{**yaml.safe_load(path.read_text())["source"]["synthetic"], "documents": 2000})
    nats = [value for text in synthetic_documents(task) for value in surprisal(task, text)[1:]]
    [row] = [line for line in (ROOT / "data/README.md").read_text().splitlines() if line.startswith(f"| `{path.stem}`")]
    loss, determined = (float(re.findall(r"[\d.]+", cell)[-1]) for cell in row.split("|")[4:6])
    # Eight times the error of independent tokens: those of a document are not independent.
    assert loss == pytest.approx(np.mean(nats), abs=8 * np.std(nats) / math.sqrt(len(nats)) + 1e-3)
    assert determined / 100 == pytest.approx(np.mean([value == 0 for value in nats]), abs=8 / math.sqrt(len(nats)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "copy"}, "synthetic.task: expected one of bigram_backcopy, trigger_averaging.*, got 'copy'"),
        ({"documents": 0}, "synthetic.documents: expected an integer of at least 1, got 0"),
        ({"length": 1}, "synthetic.length: expected an integer of at least 2, got 1"),
        ({"length": (9, 8)}, "synthetic.length: expected an integer of at least 9, got 8"),
        ({"length": (9, 10, 11)}, "synthetic.length: expected a number or two"),
        ({"symbols": 63}, "synthetic.symbols: expected an integer of at least 2 and at most 62, got 63"),
        (
            {"task": "trigger_averaging", "symbols": 27},
            "symbols: expected an integer of at least 2 and at most 26, got 27",
        ),
        (
            {"task": "bigram_backcopy", "triggers": 0},
            "triggers: expected an integer of at least 1 and at most 10, got 0",
        ),
        (
            {"task": "trigger_averaging", "triggers": 2},
            "trigger_averaging, which ignores it, got 2; it belongs to bigram_b",
        ),
        (
            {"trigger_probability": 0.1},
            "synthetic.trigger_probability: expected none with task uniform, which ignores it, got 0.1",
        ),
        (
            {"task": "bigram_backcopy", "trigger_probability": 1.0},
            "trigger_probability: expected more than 0 and less than 1, got 1.0",
        ),
        ({"phrase": 2}, "synthetic.phrase: expected none with task uniform, .* got 2"),
        (
            {"task": "repeated", "phrase": 21},
            "synthetic.phrase: expected an integer of at least 1 and at most 20, got 21",
        ),
        ({"seed": -1}, "synthetic.seed: expected an integer of at least 0 and at most 9.22337e.18, got -1"),
        ({"seed": 2**64}, "synthetic.seed: expected an integer of at least 0 and at most 9.22337e.18, got 18446744"),
    ],
)
def test_settings_out_of_range_or_without_effect_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Synthetic(**{"task": "uniform", "documents": 5, "length": 20, **settings})


@pytest.mark.parametrize("streaming", [False, True])
def test_a_synthetic_source_is_a_source_like_any_other(streaming: bool) -> None:
    task = Synthetic(task="uniform", documents=300, length=20)
    expected = list(synthetic_documents(task))
    documents = Documents(Source(kind="synthetic", synthetic=task, streaming=streaming, shuffle_seed=None))
    assert list(documents) == expected and list(documents) == expected
    assert documents.count() == (None if streaming else 300)
    shuffled = list(Documents(Source(kind="synthetic", synthetic=task, streaming=streaming)))
    assert shuffled != expected and sorted(shuffled) == sorted(expected)


def test_a_synthetic_source_needs_its_task_and_no_other_kind_takes_one() -> None:
    task = Synthetic(task="uniform", documents=5, length=20)
    with pytest.raises(ValueError, match=r"source\.synthetic: expected a task"):
        Source(kind="synthetic")
    with pytest.raises(ValueError, match=r"source\.synthetic: expected none with kind jsonl, which ignores it"):
        Source(kind="jsonl", files="a", synthetic=task)
    assert "generator" in source_identity(Source(kind="synthetic", synthetic=task))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_each_config_prepares_a_store_of_one_token_a_symbol(path: Path, tmp_path: Path) -> None:
    config = yaml.safe_load(path.read_text())
    task = Synthetic(**{**config["source"].pop("synthetic"), "documents": 120})
    config["out"] = str(tmp_path / "store")
    source = Source(**config.pop("source"), synthetic=task)
    tokenizer = TokenizerConfig(**config.pop("tokenizer"))
    manifest = prepare(PrepareConfig(source=source, tokenizer=tokenizer, **config), progress=False)
    assert task.task == path.stem and manifest.vocab_size == 258
    stores = [TokenStore.open(config["out"], split) for split in ("train", "validation")]
    texts = [store.tokenizer().decode(store.slice(i)) for store in stores for i in range(store.documents)]
    assert sorted(texts) == sorted(synthetic_documents(task))
    assert all(split.tokens == split.bytes for split in manifest.splits.values())


def test_a_million_tokens_take_about_a_second() -> None:
    """Far below that where nothing else runs; the bound catches a loop over documents or symbols."""
    script = (
        "import time; from sinkbed.data.source.synthetic import *; began = time.process_time();"
        "[list(synthetic_documents(Synthetic(task=t, documents=7937, length=126)))"
        " for t in ('bigram_backcopy', 'trigger_averaging')]; print(time.process_time() - began)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 4
