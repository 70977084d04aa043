"""`sinkbed bench parts`: an optimizer step with each variant of a part of the decoder, against the config's own."""

from __future__ import annotations

import dataclasses
from contextlib import suppress
from typing import Any

import torch

from sinkbed.model.attention_parts import ATTENTION_PARTS
from sinkbed.model.config import PARTS, DecoderConfig
from sinkbed.train.bench.timing import interleave
from sinkbed.train.bench.training import decoder_config, decoder_step, random_batch, read_config


def variants(base: DecoderConfig) -> dict[str, DecoderConfig]:
    """The base with one part changed, for every variant of every part that it goes with, by name."""
    changes: dict[str, dict[str, Any]] = {}
    for key, registry in PARTS.items():
        for name in registry.names:
            if name != registry.name_of(getattr(base, key)):
                changes[f"{key}: {name}"] = {key: name}
    for name in ATTENTION_PARTS.names:
        changes[f"attention_parts: [{name}]"] = {"attention_parts": [name]}
    changes |= {"softcap: 30": {"softcap": 30.0}, "n_registers: 1": {"n_registers": 1}}
    made: dict[str, DecoderConfig] = {}
    for name, change in changes.items():
        for d_ff in (base.d_ff, 0):  # some feed-forwards have no width
            with suppress(ValueError):
                made.setdefault(name, dataclasses.replace(base, d_ff=d_ff, **change))
    return made


def run(arguments: Any) -> int:
    """Median ms of a step, and its ratio to the base's, measured in turn."""
    config = read_config(arguments.config)
    base = decoder_config(config)
    B = arguments.batch or config["data"]["batch_size"]
    T = arguments.length or config["data"]["context_length"]
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    batch = random_batch(B, T, arguments.vocab_size)
    shapes = {"base": base, **variants(base)}
    if arguments.only:
        shapes = {n: s for n, s in shapes.items() if n == "base" or any(part in n for part in arguments.only)}
    steps = {name: decoder_step(shape, batch, arguments.vocab_size) for name, shape in shapes.items()}
    timings = interleave(steps, arguments.repeats, warmup=3)
    print(f"{B} rows of {T} tokens, {arguments.threads} threads, {arguments.repeats} steps each, medians")
    for timing in timings:
        print(f"{timing.name:36}{timing.median * 1e3:9.1f} ms{timing.median / timings[0].median:8.2f}")
    return 0
