"""The text that `sinkbed probe` has a model read: a token store's validation split, a file of prompts, or what a model
was trained beside; and texts made from it."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from sinkbed.data.store.manifest import Manifest
from sinkbed.train.measure.config import MeasureConfig
from sinkbed.train.measure.heldout import Probe
from sinkbed.train.measure.model import Subject

_NO_TEXT = "the text: expected documents to read, got none; give --prompts FILE, or --store with a token store"


def check_text(arguments: Any, *, own: bool) -> None:
    """Raise FileNotFoundError or ValueError for a text that is not there; loads nothing.

    Args:
        own: whether a model may have a text of its own.
    """
    if not own and arguments.prompts is None and arguments.store is None:
        raise ValueError(_NO_TEXT)
    if arguments.prompts is not None and not arguments.prompts.is_file():
        raise FileNotFoundError(f"--prompts: expected a file, got nothing at {arguments.prompts}; check the path")
    if arguments.store is not None:
        Manifest.read(arguments.store)


def texts(arguments: Any, subject: Subject) -> Iterator[str]:
    """The documents to read. Raises ValueError where nothing says which, or a file holds none."""
    if arguments.prompts is not None:
        yield from _prompts(arguments.prompts)
    elif subject.store is not None:
        from sinkbed.data.store.token_store import TokenStore

        store = TokenStore.open(subject.store, "validation")
        store.verify()
        tokenizer = store.tokenizer()
        yield from (tokenizer.decode(store.slice(number)) for number in range(store.documents))
    elif subject.own_texts is not None:
        yield from subject.own_texts
    else:
        raise ValueError(_NO_TEXT)


def _prompts(path: Path) -> Iterator[str]:
    if path.suffix == ".jsonl":
        from sinkbed.data.source.config import Source
        from sinkbed.data.source.documents import Documents

        yield from Documents(Source(kind="jsonl", files=str(path), shuffle_seed=None, streaming=True))
        return
    try:
        # At line feeds alone: other separators, as U+2028, may be part of a text.
        lines = [line.removesuffix("\r") for line in path.read_bytes().decode("utf-8-sig").split("\n")]
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompts {path}: expected UTF-8, got {error}") from None
    if not any(line.strip() for line in lines):
        raise ValueError(f"--prompts {path}: expected a document a line, got an empty file")
    yield from (line for line in lines if line.strip())


def probe_of(subject: Subject, documents: Iterator[str], limit: int, config: MeasureConfig) -> Probe:
    """The first documents with at least `sink_tokens` tokens, cropped to `limit`.

    Raises ValueError where there is none, saying how long the longest was, and where the bytes of its tokens are not
    those of its text.
    """
    import torch

    chosen, longest = [], 0
    for text in documents:
        every = subject.encode(text)
        ids = every[: limit - 1]
        longest = max(longest, len(ids))
        if len(ids) >= config.sink_tokens:
            _check_bytes(subject, every)
            chosen.append(torch.tensor(ids))
        if len(chosen) == config.documents:
            break
    if not longest:
        raise ValueError("the text: expected documents, got none that holds a token; give others with --prompts")
    if not chosen:
        raise ValueError(
            f"--sink_tokens {config.sink_tokens}: expected documents of at least as many tokens, got {longest} in "
            f"the longest, cropped to --length {limit} with room for BOS; give longer ones, or lower it"
        )
    return subject.probe(chosen)


def changed_prompt(subject: Subject, arguments: Any) -> tuple[list[int], list[int]]:
    """Token ids of the first prompt before and after, as many.

    Raises ValueError where the word is not there, or the texts differ in their number of tokens.
    """
    old, new = arguments.change
    prompt = next(texts(arguments, subject))
    if old not in prompt:
        raise ValueError(f"--change: expected a word of the first prompt, {prompt[:60]!r} …, got {old!r}")
    before, after = subject.encode(prompt), subject.encode(prompt.replace(old, new, 1))
    if len(before) != len(after):
        raise ValueError(
            f"--change: expected as many tokens, got {len(before)} with {old!r} and {len(after)} with {new!r}; "
            "choose a word of as many tokens"
        )
    before, after = before[: arguments.sink_tokens], after[: arguments.sink_tokens]
    if before == after:
        raise ValueError(
            f"--change: expected a word among the first {arguments.sink_tokens} tokens of the prompt, got {old!r} past "
            "them; raise --sink_tokens"
        )
    return before, after


def artificial(probe: Probe, kind: Literal["random", "repeated"]) -> Probe:
    """Documents of the same lengths, of uniformly random tokens, or each of one random token over and over."""
    import numpy as np
    import torch

    from sinkbed.data.pack.assemble import random_tokens

    documents = []
    for number, document in enumerate(probe.documents):
        count = len(document) if kind == "random" else 1
        drawn = random_tokens(
            np.arange(count), seed=0, epoch=number, vocab_size=len(probe.token_bytes),
            special_ids=tuple(sorted(probe.special_ids)),
        )  # fmt: skip
        documents.append(torch.from_numpy(np.resize(drawn, len(document))))
    return dataclasses.replace(probe, documents=tuple(documents))


def _check_bytes(subject: Subject, ids: list[int]) -> None:
    """Refuse a tokenizer whose tokens do not make up their text byte by byte, which bits per byte rests on."""
    size = len(subject.token_bytes)
    if max(ids) >= size:
        raise ValueError(f"{subject.name}: expected token ids below {size}, its embeddings, got {max(ids)} in the text")
    counted = sum(int(subject.token_bytes[index]) for index in ids)
    # What a second copy adds: decoders drop the space that they put before a text, but not one inside it.
    once, twice = (len(subject.decode(read).encode()) for read in (ids, ids + ids))
    if counted != twice - once:
        raise ValueError(
            f"{subject.name}: expected the tokens of a document to have the {twice - once} bytes of its decoded text, "
            f"for bits per byte, got {counted}; measure a model with byte-level BPE, or with SentencePiece's ▁"
        )
