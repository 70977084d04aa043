"""Several models that are measured one after the other: what they are called, and the documents that all can read."""

import dataclasses
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from sinkbed.train.measure.config import MeasureConfig
from sinkbed.train.measure.model import Subject, load, texts


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
    """The first documents that have `sink_tokens` tokens under every model's tokenizer.

    Raises ValueError where there is none, or models would read different texts.
    """

    def place(subject: Subject) -> str:
        if subject.store is not None:
            return str(subject.store.resolve())
        return "none" if subject.own_texts is None else f"beside {subject.name}"

    stores = {place(subject): subject.name for subject in subjects}
    if arguments.prompts is None and len(stores) > 1:
        listed = ", ".join(f"{store} ({name})" for store, name in stores.items())
        raise ValueError(f"expected one text for all models, got the stores {listed}; give --prompts FILE, or --store")
    T, every = config.sink_tokens, texts(arguments, subjects[0])
    long = (text for text in every if all(len(subject.encode(text)) >= T for subject in subjects))
    chosen = list(islice(long, config.documents))
    if not chosen:
        raise ValueError(
            f"--sink_tokens {T}: expected documents of at least as many tokens under every model's tokenizer, got "
            "none; give longer ones, or lower it"
        )
    return chosen
