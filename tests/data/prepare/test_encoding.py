"""Encoding gives the same tokens, in order, by any number of processes, which end with whoever started them."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import normalizers

from sinkbed.data.prepare import encoding
from sinkbed.data.prepare.encoding import Encoded, Encoder, WorkerDiedError, encode_texts
from sinkbed.data.source.selection import Batch, Document
from sinkbed.data.tokenizer import Tokenizer
from tests.support import ROOT


def batch_of(number: int, count: int = 20) -> Batch:
    texts = [f"batch {number} document {i} é" for i in range(count)]
    return Batch(number, [Document(text, "train", len(text.encode()), 0) for text in texts], last=True)


@pytest.mark.slow
def test_batches_come_back_in_order_with_the_tokens_of_one_process(tokenizer: Tokenizer) -> None:
    found = []
    for workers in (1, 2):
        with Encoder(tokenizer, workers) as encoder:
            found.append(list(encoder.map(map(batch_of, range(30)), done={4, 29})))
    for (batch, alone), (other, parallel) in zip(*found, strict=True):
        assert batch.chunk == other.chunk
        if batch.chunk in (4, 29):
            assert alone is parallel is None
        else:
            assert alone is not None and parallel is not None
            assert all(np.array_equal(a, b) for a, b in zip(alone, parallel, strict=True))
            assert alone.sizes.tolist() == [document.size for document in batch.documents]
    assert [batch.chunk for batch, _ in found[0]] == list(range(30))


def test_the_process_that_reads_encodes_too_while_the_others_start(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    here: list[str] = []

    class Late(ProcessPoolExecutor):
        """Processes that take half a second to start, however idle the machine is."""

        def submit(self, work: Any, *arguments: Any) -> Any:  # type: ignore[override]
            promised: Future[Any] = Future()

            def later() -> None:
                time.sleep(0.5)
                if promised.set_running_or_notify_cancel():
                    promised.set_result(ProcessPoolExecutor.submit(self, work, *arguments).result())

            threading.Thread(target=later).start()
            return promised

    monkeypatch.setattr(encoding, "ProcessPoolExecutor", Late)

    def spy(tokenizer: Tokenizer, texts: list[str]) -> Encoded:
        here.append(texts[0])
        return encode_texts(tokenizer, texts)

    monkeypatch.setattr(encoding, "encode_texts", spy)
    with Encoder(tokenizer, 2) as encoder:
        found = list(encoder.map(map(batch_of, range(40))))
    assert 0 < len(here) < 40 and len(set(here)) == len(here)
    assert [batch.chunk for batch, _ in found] == list(range(40))
    for batch, encoded in found:
        assert encoded is not None
        expected = encode_texts(tokenizer, [document.text for document in batch.documents])
        assert all(np.array_equal(a, b) for a, b in zip(encoded, expected, strict=True))


def test_a_corpus_of_one_batch_starts_no_process(tokenizer: Tokenizer) -> None:
    with Encoder(tokenizer, 2) as encoder:
        [(_, encoded)] = encoder.map([batch_of(0)])
        assert encoded is not None and encoder._pool is None


def test_the_callers_choice_of_threads_is_put_back(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    for before in ("true", None):
        if before is None:
            monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
        else:
            monkeypatch.setenv("TOKENIZERS_PARALLELISM", before)
        with Encoder(tokenizer, 1):
            assert os.environ["TOKENIZERS_PARALLELISM"] == "false"
        assert os.environ.get("TOKENIZERS_PARALLELISM") == before


def test_a_process_that_is_killed_ends_the_work_with_a_message(tokenizer: Tokenizer) -> None:
    with (
        Encoder(tokenizer, 2) as encoder,
        pytest.raises(WorkerDiedError, match=r"finished shards are kept.*--workers 2"),
    ):
        for number, _ in enumerate(encoder.map(map(batch_of, range(2000)))):
            if number == 3:
                assert encoder._pool is not None
                os.kill(next(iter(encoder._pool._processes)), signal.SIGKILL)


def test_processes_end_with_the_one_that_started_them_even_when_it_is_killed(tmp_path: Path) -> None:
    script = """
import itertools, os, sys
from tests.data.prepare.test_encoding import batch_of
from sinkbed.data.prepare.encoding import Encoder
from sinkbed.data.tokenizer import Tokenizer
with Encoder(Tokenizer.train([], vocab_size=258), 2) as encoder:
    for number, _ in enumerate(encoder.map(map(batch_of, itertools.count()))):
        if number == 5:
            print(*encoder._pool._processes, flush=True)
"""
    path = str(ROOT)
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}) as parent:
        assert parent.stdout is not None
        workers = [int(pid) for pid in parent.stdout.readline().split()]
        parent.kill()
    assert len(workers) == 2
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


def test_bytes_are_those_of_the_normalised_text(tokenizer: Tokenizer) -> None:
    backend = Tokenizer.train([], vocab_size=258).backend
    backend.normalizer = normalizers.NFC()
    composed, decomposed = "é", "e\u0301"
    found = encode_texts(Tokenizer(backend), [composed, decomposed, "a"])
    assert (found.sizes.tolist(), found.counts.tolist()) == ([2, 2, 1], [2, 2, 1])
    assert encode_texts(tokenizer, [decomposed]).sizes.tolist() == [3]


def test_a_text_that_does_not_come_back_is_refused() -> None:
    tokenizer = Tokenizer.train([], vocab_size=258)
    tokenizer.backend.normalizer = normalizers.Replace("secret", "")  # behind the check made when it was loaded
    with pytest.raises(ValueError, match=r"the 8 bytes of a document .* got 2"):
        encode_texts(tokenizer, ["a secret"])
    tokenizer.backend.normalizer = None
    tokenizer.token_bytes[5] = 7
    letter = tokenizer.decode([5])
    with pytest.raises(ValueError, match=r"the 2 bytes of a document .* got 8"):
        encode_texts(tokenizer, ["a" + letter])
