"""What `sinkbed probe` measures: a model, its tokenizer, and the text it is given to read.

The model is a run or checkpoint of ours, or a Hugging Face model (folder, hub name, GGUF), whose attention goes
through our operator (`model.hf`). The text is a token store's validation split or a file of prompts.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from train import rundir

if TYPE_CHECKING:
    from data.strategy import Strategy
    from train.measure import MeasureConfig, Probe


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model to measure, with what its text is made of."""

    name: str
    model: Any
    """Called as our decoder is."""
    strategy: Strategy
    bos_id: int | None
    eos_id: int
    special_ids: frozenset[int]
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    token_bytes: Any
    """[V] UTF-8 bytes of text that each id stands for."""
    context_length: int | None
    longest: int | None
    """Tokens that the model reads at most. None: no limit."""
    store: Path | None
    """Where its own validation text is."""
    run_dir: Path | None = None
    """Of a run of ours."""
    step: int = 0
    """Of its checkpoint."""


def load(arguments: Any) -> Subject:
    """The model that `arguments.model` names. Raises FileNotFoundError or ValueError that says what is missing."""
    path = Path(arguments.model)
    if (path / rundir.CONFIG).is_file() or path.name.endswith(".ckpt"):
        return _ours(path, arguments)
    if path.exists() and not (path / "config.json").is_file() and arguments.gguf is None:
        raise ValueError(
            f"{path}: expected a run directory (with {rundir.CONFIG}), a checkpoint inside one, or a Hugging Face "
            "folder (with config.json), found none of these"
        )
    if not path.exists() and path.parent != Path() and path.parent.is_dir():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=1)
        meant = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise FileNotFoundError(
            f"{path}: expected a run directory, a checkpoint or a Hugging Face folder, found nothing there{meant}"
        )
    return _hugging_face(arguments)


def _ours(path: Path, arguments: Any) -> Subject:
    from train.validate import load_decoder, open_run, run_tokenizer

    checkpoint, run_dir = open_run(path)
    decoder, strategy = load_decoder(checkpoint)
    identity = checkpoint["sinkbed"]
    tokenizer = run_tokenizer(identity, arguments.store)
    bos = tokenizer.bos_id
    if arguments.bos is not None:
        bos = _token_id(tokenizer.backend.token_to_id(arguments.bos), arguments.bos, path)
    return Subject(
        name=f"{path}, step {checkpoint['global_step']}",
        model=decoder,
        strategy=strategy,
        bos_id=bos,
        eos_id=tokenizer.eos_id,
        special_ids=frozenset(tokenizer.special_ids),
        encode=tokenizer.encode,
        decode=tokenizer.decode,
        token_bytes=tokenizer.token_bytes,
        context_length=identity["context_length"],
        longest=None,
        store=arguments.store or Path(identity["store"]),
        run_dir=run_dir,
        step=checkpoint["global_step"],
    )


def _hugging_face(arguments: Any) -> Subject:
    from data.strategy import Strategy
    from model.hf import HFModel, special_ids, token_bytes

    name = arguments.model
    model = HFModel.load(
        name,
        revision=arguments.revision,
        gguf=arguments.gguf,
        dtype=arguments.dtype,
        device_map=arguments.device_map,
    )
    tokenizer = HFModel.tokenizer(name, revision=arguments.revision, gguf=arguments.gguf)
    bos = tokenizer.bos_token_id
    if arguments.bos is not None:
        found = tokenizer.convert_tokens_to_ids(arguments.bos)
        bos = _token_id(None if found == tokenizer.unk_token_id else found, arguments.bos, name)
    size = model.model.get_input_embeddings().num_embeddings
    context_length = getattr(model.model.config.get_text_config(), "max_position_embeddings", None)
    return Subject(
        name=name,
        model=model,
        strategy=Strategy() if bos is None else Strategy(first_token="bos"),
        bos_id=bos,
        eos_id=next(i for i in (tokenizer.eos_token_id, bos, 0) if i is not None),
        special_ids=special_ids(tokenizer, size),
        encode=lambda text: tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"],
        decode=lambda ids: tokenizer.decode(ids, clean_up_tokenization_spaces=False),
        token_bytes=token_bytes(tokenizer, size),
        context_length=context_length,
        longest=context_length,
        store=arguments.store,
    )


def _token_id(found: int | None, token: str, where: object) -> int:
    if found is None:
        raise ValueError(f"--bos: found {token!r}, which is no token of {where}; expected one of its vocabulary")
    return found


def texts(arguments: Any, subject: Subject) -> Iterator[str]:
    """The documents to read. Raises ValueError where nothing says which, or a file holds none."""
    if arguments.prompts is not None:
        yield from _prompts(arguments.prompts)
        return
    if subject.store is None:
        raise ValueError("expected text to read, found none: give --prompts FILE, or --store with a token store")
    from data.store import TokenStore

    store = TokenStore.open(subject.store, "validation")
    tokenizer = store.tokenizer()
    yield from (tokenizer.decode(store.slice(number)) for number in range(store.documents))


def _prompts(path: Path) -> Iterator[str]:
    if not path.is_file():
        raise FileNotFoundError(f"--prompts: no file at {path}")
    if path.suffix == ".jsonl":
        from data.sources import Documents, Source

        yield from Documents(Source(kind="jsonl", files=str(path), shuffle_seed=None, streaming=True))
        return
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompts {path}: expected UTF-8, found {error}") from None
    if not any(line.strip() for line in lines):
        raise ValueError(f"--prompts {path}: expected a document a line, found an empty file")
    yield from (line for line in lines if line.strip())


def probe_of(subject: Subject, documents: Iterator[str], limit: int, config: MeasureConfig) -> Probe:
    """The first documents with at least `sink_tokens` tokens, cropped to `limit`.

    Raises ValueError where there is none, saying how long the longest was, and where the bytes of its tokens are not
    those of its text.
    """
    import torch

    from train.measure import Probe

    chosen, longest = [], 0
    for text in documents:
        whole = subject.encode(text)
        ids = whole[: limit - 1]
        longest = max(longest, len(ids))
        if len(ids) >= config.sink_tokens:
            _check_bytes(subject, whole)
            chosen.append(torch.tensor(ids))
        if len(chosen) == config.documents:
            break
    if not longest:
        raise ValueError("the text: expected documents, found none that holds a token; give others with --prompts")
    if not chosen:
        raise ValueError(
            f"--sink_tokens {config.sink_tokens}: expected documents of at least as many tokens, found {longest} in "
            f"the longest, cropped to --length {limit} with room for BOS; give longer ones, or lower it"
        )
    return Probe(
        tuple(chosen),
        torch.as_tensor(subject.token_bytes, dtype=torch.int64),
        subject.eos_id if subject.bos_id is None else subject.bos_id,
        subject.eos_id,
        subject.special_ids,
    )


def artificial(probe: Probe, kind: Literal["random", "repeated"]) -> Probe:
    """Documents of the same lengths, of uniformly random tokens, or each of one random token over and over."""
    import numpy as np
    import torch

    from data.packing import random_tokens
    from train.measure import Probe

    documents = []
    for number, document in enumerate(probe.documents):
        count = len(document) if kind == "random" else 1
        drawn = random_tokens(
            np.arange(count), seed=0, epoch=number, vocab_size=len(probe.token_bytes),
            special_ids=tuple(sorted(probe.special_ids)),
        )  # fmt: skip
        documents.append(torch.from_numpy(np.resize(drawn, len(document))))
    return Probe(tuple(documents), probe.token_bytes, probe.bos_id, probe.eos_id, probe.special_ids)


def _check_bytes(subject: Subject, ids: list[int]) -> None:
    """Refuse a tokenizer whose tokens do not make up their text byte by byte, which bits per byte rests on."""
    size = len(subject.token_bytes)
    if max(ids) >= size:
        raise ValueError(
            f"{subject.name}: found token {max(ids)} in the text, expected ids below {size}, its embeddings"
        )
    counted = sum(int(subject.token_bytes[index]) for index in ids)
    # What a second copy adds: decoders drop the space that they put before a text, but not one inside it.
    once, twice = (len(subject.decode(read).encode()) for read in (ids, ids + ids))
    if counted != twice - once:
        raise ValueError(
            f"{subject.name}: found {counted} bytes in the tokens of a document and {twice - once} in its decoded "
            "text, expected the same; this tokenizer's tokens cannot be told in bytes, which bits per byte needs "
            "(byte-level BPE and SentencePiece with ▁ can)"
        )
