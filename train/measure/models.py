"""Several models that are measured one after the other: what they are called, and the documents that all can read."""

import dataclasses
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from sinkbed.train.measure.config import MeasureConfig
from sinkbed.train.measure.model import Subject, load
from sinkbed.train.measure.texts import texts


def short_names(models: Sequence[str]) -> list[str]:
    """The ends of these paths, as short as tells them apart. Raises ValueError for a model that is named twice."""
    parts = [(Path(model).resolve() if Path(model).exists() else Path(model)).parts for model in models]
    twice = next((model for model, own in zip(models, parts, strict=True) if parts.count(own) > 1), None)
    if twice is not None:
        raise ValueError(f"MODEL: expected different models, got {twice} twice; leave one out")

    def shortest(own: tuple[str, ...]) -> str:
        lengths = range(1, len(own) + 1)
        alone = (n for n in lengths if sum(other[-n:] == own[-n:] for other in parts) == 1)
        return str(Path(*own[-next(alone, len(own)) :]))

    return [shortest(own) for own in parts]


def lazy(arguments: Any) -> Subject:
    """A model whose weights are read when its turn comes, those of a run once more: one is in memory at a time."""
    subject = load(arguments)
    if subject.run_dir is None:
        return subject
    return dataclasses.replace(subject, load_model=lambda: load(arguments).model)


def shared_texts(arguments: Any, subjects: Sequence[Subject], config: MeasureConfig) -> list[str]:
    """The first documents that have `sink_tokens` tokens under every model's tokenizer. Models without a text of their
    own read that of the others.

    Raises ValueError where no document is that long, or the models have several texts.
    """
    own = {
        str(s.store.resolve()) if s.store is not None else f"that of {s.name}": s
        for s in subjects
        if s.store is not None or s.own_texts is not None
    }
    if arguments.prompts is None and len(own) > 1:
        raise ValueError(
            f"the text: expected the same for all models, got {' and '.join(own)}; give --prompts FILE, or --store "
            "with a token store"
        )
    T, every = config.sink_tokens, texts(arguments, next(iter(own.values()), subjects[0]))
    long = (text for text in every if all(len(subject.encode(text)) >= T for subject in subjects))
    chosen = list(islice(long, config.documents))
    if not chosen:
        raise ValueError(
            f"--sink_tokens {T}: expected documents of at least as many tokens under every model's tokenizer, got "
            "none; give longer ones, or lower it"
        )
    return chosen
