"""`sinkbed bench parts`: an optimizer step with each variant of a part of the decoder, against the config's own.

With `--operator` attention alone, forward and backward, under each way to score keys, against the plain softmax.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from sinkbed.kernels import attention
from sinkbed.kernels.normalizers import NORMALIZERS
from sinkbed.model.attention_parts import ATTENTION_PARTS
from sinkbed.model.config import PARTS, DecoderConfig
from sinkbed.train.bench.timing import interleave
from sinkbed.train.bench.training import decoder_step, random_batch, shape_of


def variants(base: DecoderConfig) -> tuple[dict[str, DecoderConfig], list[str]]:
    """The base with one part changed, for every variant of every part, by name; and those that do not go with it."""
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
        for d_ff in dict.fromkeys((base.d_ff, 0, 4 * base.d_model)):  # some feed-forwards have no width
            try:
                made.setdefault(name, dataclasses.replace(base, d_ff=d_ff, **change))
            except ValueError:
                continue
    return made, [name for name in changes if name not in made]


def operator_steps(base: DecoderConfig, batch: int, length: int) -> dict[str, Callable[[], None]]:
    """Forward and backward of attention under every normaliser, and with a softcap, slopes and sinks, by name."""
    H, D = base.n_heads, base.dim
    q, k, v = (
        torch.randn(batch, heads, length, D, requires_grad=True) for heads in (H, base.key_heads, base.key_heads)
    )
    options: dict[str, dict[str, Any]] = {"softmax": {}}
    options |= {name: {"normalizer": NORMALIZERS.make(name, H)} for name in NORMALIZERS.names if name != "softmax"}
    options |= {
        "sigmoid, normalized": {"normalizer": NORMALIZERS.make({"sigmoid": {"normalized": True}}, H)},
        "softcap": {"softcap": 30.0},
        "ALiBi": {"slopes": torch.full((H,), 2.0**-4)},
        "KV bias": {
            "sink_logit": torch.randn(batch, H, length, requires_grad=True),
            "sink_value": torch.randn(H, D, requires_grad=True),
        },
    }

    def step(given: dict[str, Any]) -> Callable[[], None]:
        return lambda: attention(q, k, v, **given).output.sum().backward()

    return {name: step(given) for name, given in options.items()}


def run(arguments: Any) -> int:
    """Median ms, and the ratio to the base's, measured in turn."""
    base, B, T = shape_of(arguments)
    left_out: list[str] = []
    if arguments.operator:
        steps = operator_steps(base, B, T)
    else:
        batch = random_batch(B, T, arguments.vocab_size)
        shapes, left_out = variants(base)
        shapes = {n: s for n, s in shapes.items() if not arguments.only or any(part in n for part in arguments.only)}
        shapes = {"base": base, **shapes}
        steps = {name: decoder_step(shape, batch, arguments.vocab_size) for name, shape in shapes.items()}
    timings = interleave(steps, arguments.repeats, warmup=3)
    print(f"{B} rows of {T} tokens, {arguments.threads} threads, {arguments.repeats} times each, medians")
    for timing in timings:
        print(f"{timing.name:36}{timing.median * 1e3:9.1f} ms{timing.median / timings[0].median:8.2f}")
    if left_out:
        print(f"left out, as they do not go with the base: {', '.join(left_out)}")
    return 0
