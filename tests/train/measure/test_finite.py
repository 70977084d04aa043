"""A number that is not finite is refused by name, wherever it is measured."""

import math

import pytest
import torch

from sinkbed.data.pack.strategy import Strategy
from sinkbed.model import Decoder, DecoderConfig
from sinkbed.train.loop.module import SinkbedModule
from sinkbed.train.loop.optim import OptimizerConfig
from sinkbed.train.measure import perplexity
from sinkbed.train.measure.config import MeasureConfig
from sinkbed.train.measure.excerpts import Excerpts
from sinkbed.train.measure.finite import finite
from sinkbed.train.measure.heldout import Probe
from sinkbed.train.measure.measures import MEASURES
from sinkbed.train.measure.sinks import measure


@pytest.fixture
def probe():
    generator = torch.Generator().manual_seed(0)
    documents = tuple(torch.randint(2, 40, (24,), generator=generator) for _ in range(10))
    return Probe(documents, torch.ones(40, dtype=torch.int64), 0, 1, frozenset({0, 1}))


@pytest.fixture
def overflowing():
    """A decoder whose first token id overflows; four of the ten documents hold it."""
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(n_layers=2, d_model=16, n_heads=2, d_ff=16), 40)
    with torch.no_grad():
        decoder.embedding.weight[39] = math.inf  # as float16 has it past 65,504
    return decoder


CONFIG = MeasureConfig(documents=10, live_documents=1, sink_tokens=16)
STRATEGY = Strategy(first_token="bos")


def with_token(probe: Probe, token: int) -> Probe:
    documents = [document.clamp_max(38) for document in probe.documents]
    for document in documents[:4]:
        document[3] = token
    return Probe(tuple(documents), probe.token_bytes, 0, 1, probe.special_ids)


def test_four_documents_that_overflow_are_no_lower_sink_rate(overflowing, probe):
    assert measure(overflowing, with_token(probe, 2), "bos", STRATEGY, CONFIG).loss > 0
    with pytest.raises(ValueError, match="measuring sinks, mode bos: expected finite numbers, got nan in mass"):
        measure(overflowing, with_token(probe, 39), "bos", STRATEGY, CONFIG)


@pytest.mark.parametrize("name", MEASURES.names)
def test_no_measure_gives_a_number_that_is_not_finite(name, overflowing, probe):
    def call(token: int) -> object:
        excerpts = Excerpts.of(with_token(probe, token), "text", STRATEGY, 16, 10)
        options = {"vocabulary": 37} if name == "vocabulary" else {}  # all of the text's but the one that overflows
        return MEASURES[name].measure(overflowing, excerpts, 64, **options)

    assert call(2) is not None
    with pytest.raises(ValueError, match=f"measuring {name}, mode text: expected finite numbers, got (nan|inf) in"):
        call(39)


def test_no_loss_is_given_that_is_not_finite(overflowing, probe):
    with pytest.raises(ValueError, match=r"loss by position, mode text: .* got nan in \[\d\]\.loss"):
        perplexity.by_position(overflowing, with_token(probe, 39), "text", STRATEGY, 64)
    with pytest.raises(ValueError, match=r"streaming, mode text: .* got nan in \[0\]\.loss"):
        perplexity.streaming(overflowing, with_token(probe, 39), "text", STRATEGY, 64, cache=8, kept=[0, 1])


def test_the_place_of_the_number_is_named():
    assert finite({"a": [1.0, 2], "b": ("x", None)}, "it") == {"a": [1.0, 2], "b": ("x", None)}
    with pytest.raises(ValueError, match=r"got inf in a\.b\[1\]"):
        finite({"a": {"b": [0.0, math.inf]}}, "it")


BAD = (math.nan, math.inf, -math.inf)

SMALLEST = {"n_layers": 1, "d_model": 8, "n_heads": 1, "d_ff": 8}


@pytest.mark.parametrize(
    ("config", "required", "names", "worse"),
    [
        (OptimizerConfig, {}, ("lr", "weight_decay", "warmup_fraction", "final_fraction"), -1.0),
        (MeasureConfig, {}, ("onset_rate",), 0.0),
        (DecoderConfig, SMALLEST, ("norm_eps", "init_std"), 0.0),
        (SinkbedModule, {"decoder": DecoderConfig(**SMALLEST)}, ("max_grad_norm",), 0.0),
    ],
)  # fmt: skip
def test_a_setting_that_is_not_finite_is_refused(config, required, names, worse):
    for name in names:
        for value in (*BAD, worse):
            with pytest.raises(ValueError, match=rf"{name}: expected .*, got {value}"):
                config(**required, **{name: value})
