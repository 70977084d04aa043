"""The measurement against its definition, computed from whole attention matrices."""

import dataclasses
import itertools
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import sinkbed.model.attention as attention_module
from sinkbed.data.pack.strategy import Strategy
from sinkbed.data.store.token_store import TokenStore
from sinkbed.kernels import Statistics
from sinkbed.kernels.reference import probabilities
from sinkbed.kernels.scoring import Scoring
from sinkbed.model import Decoder, DecoderConfig, loss
from sinkbed.model.decoder import DecoderOutput
from sinkbed.model.observe import observing, over_sum
from sinkbed.train.measure import inputs
from sinkbed.train.measure.config import MeasureConfig
from sinkbed.train.measure.excerpts import Excerpts
from sinkbed.train.measure.heldout import Probe
from sinkbed.train.measure.inputs import first_tokens
from sinkbed.train.measure.measures import MEASURES, plain
from sinkbed.train.measure.perplexity import by_position
from sinkbed.train.measure.sinks import EPSILONS, measure, measurement_table
from tests.support.plain import numbers

CONFIG = MeasureConfig(documents=7, live_documents=3, sink_tokens=16, batch_tokens=200)


@pytest.fixture(scope="module")
def probe(tiny_store):
    return Probe.from_store(TokenStore.open(tiny_store, "validation"), 48, CONFIG)


@pytest.fixture
def decoder():
    torch.manual_seed(1)
    return Decoder(DecoderConfig(n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, d_ff=48, init_std=0.4), 300)


@pytest.mark.parametrize("part", [{"sink": "k_bias"}, {"n_registers": 2}, {}], ids=["K bias", "registers", "neither"])
def test_what_tokens_lack_to_1_is_on_the_learned_key(probe, part):
    torch.manual_seed(1)
    decoder = Decoder(DecoderConfig(n_layers=2, d_model=32, n_heads=4, d_ff=48, init_std=0.4, **part), 300)
    result = measure(decoder, probe, "text", Strategy(), CONFIG)
    if not part:
        assert result.learned_mass is None and "sink/learned_mass/text" not in result.metrics("text")
        return
    texts = [text[None, : CONFIG.sink_tokens] for text in probe.documents]
    with torch.no_grad():
        sums = [[layer.row_sum[0, :, 1:] for layer in decoder(text, statistics=True).statistics] for text in texts]
    expected = torch.stack([1 - torch.stack(layers) for layers in sums]).mean((0, 3))
    torch.testing.assert_close(torch.tensor(result.learned_mass), expected, atol=1e-5, rtol=1e-4)
    assert result.metrics("text")["sink/learned_mass/text"] == pytest.approx(float(expected.mean()), rel=1e-4)


@pytest.mark.parametrize("normalizer", ["elu", "sigmoid", {"sigmoid": {"bias": -20}}, "softpick"])
def test_masses_are_parts_of_all_that_a_query_gives_out(probe, normalizer):
    torch.manual_seed(1)
    shape = dict(n_layers=2, d_model=32, n_heads=4, d_ff=48, init_std=0.4)
    decoder = Decoder(DecoderConfig(**shape, normalizer=normalizer), 300)
    result = measure(decoder, probe, "text", Strategy(), CONFIG)
    weights = []  # of each document [L, H, T, T]
    for text in probe.documents:
        of_layers = []
        with torch.no_grad(), observing(decoder, attention=of_layers.append):
            decoder(text[None, :16])
        weights.append(torch.stack([torch.cat([w for _, w in x.blocks(normalized=False)], 2)[0] for x in of_layers]))
    raw = torch.stack([w[..., 0] for w in weights])  # [documents, L, H, T]
    sums = torch.stack([w.sum(-1) for w in weights])
    parts = (raw / sums).masked_fill(sums == 0, 0.0)
    close = partial(torch.testing.assert_close, atol=1e-5, rtol=1e-4)
    close(torch.tensor(result.mass), parts[..., 1:].mean((0, 3)))
    close(torch.cat([w for _, w in of_layers[-1].blocks()], 2)[0, ..., 0], parts[-1, -1])
    close(torch.tensor(result.mass_raw), raw[..., 1:].mean((0, 3)))
    close(torch.tensor(result.rate["0.3"]), 100 * (parts.mean(-1) > 0.3).float().mean(0))
    assert result.share is None and result.learned_mass is None
    unlike = not torch.allclose(raw, parts, atol=1e-3)
    assert unlike or normalizer == "softpick"
    assert "raw mass" in measurement_table(0, {"text": result}, 16)


def test_what_little_a_query_gives_is_divided_all_the_same():
    """Beside a learned key that takes nearly everything; 1e-8 in the divisor made 0 of it."""
    weights = torch.tensor([[1e-20, 3e-20], [0.0, 0.0], [1.0, 3.0]])
    torch.testing.assert_close(over_sum(weights), torch.tensor([[0.25, 0.75], [0.0, 0.0], [0.25, 0.75]]))


def attention_matrices(decoder, tokens, hide_first, monkeypatch, window=None):
    """[L, H, T, T] of one document, from the inputs that the operator really receives."""
    found, operator = [], attention_module.attention

    def spy(q, k, v, mask, **kwargs):
        a, _ = probabilities(q, k, mask, Scoring(scale=q.shape[-1] ** -0.5))
        found.append(a[0])
        return operator(q, k, v, mask, **kwargs)

    from sinkbed.kernels import interval_mask

    monkeypatch.setattr(attention_module, "attention", spy)
    mask = interval_mask(1, tokens.shape[1], hide_first_key=hide_first, window=window)
    logits = decoder(tokens, mask=mask).logits
    monkeypatch.setattr(attention_module, "attention", operator)
    return torch.stack(found), logits


@pytest.mark.parametrize("mode", ["bos", "text", "first_key_masked"])
def test_rates_masses_and_loss_equal_their_definitions(mode, probe, decoder, monkeypatch):
    result = measure(decoder, probe, mode, Strategy(first_token="bos"), CONFIG)
    alphas, alphas_row, masses, nll, size = [], [], [], [], 0
    with torch.no_grad():
        for text in probe.documents:
            bos = torch.tensor([probe.bos_id])
            tokens = text if mode == "text" else torch.cat([bos, text])
            a, logits = attention_matrices(decoder, tokens[None], mode == "first_key_masked", monkeypatch)
            T = 16
            alphas.append(torch.stack([a[..., i, 0] for i in range(T)]).sum(0) / T)
            alphas_row.append(a[..., 0].sum(-1) / len(tokens))
            masses.append(a[..., 1:T, 0].mean(-1))
            targets = text[1:]
            nll.append(F.cross_entropy(logits[0, -len(text) : -1], targets, reduction="sum"))
            size += len(targets)
    lengths = {len(d) for d in probe.documents}
    assert len(lengths) > 1, "documents of different lengths, so that padding is under test"
    alpha, alpha_row = torch.stack(alphas), torch.stack(alphas_row)
    for eps in EPSILONS:
        expected = 100 * (alpha > eps).double().mean(0)
        torch.testing.assert_close(torch.tensor(result.rate[str(eps)], dtype=torch.float64), expected)
        expected = 100 * (alpha_row > eps).double().mean(0)
        torch.testing.assert_close(torch.tensor(result.rate_full[str(eps)], dtype=torch.float64), expected)
    torch.testing.assert_close(torch.tensor(result.mass), torch.stack(masses).mean(0), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(torch.tensor(result.alpha), alpha.mean(0), atol=1e-6, rtol=1e-5)
    assert result.tokens == size
    assert result.loss == pytest.approx(float(sum(nll)) / size, rel=1e-5)
    text_bytes = sum(int(probe.token_bytes[d[1:]].sum()) for d in probe.documents)
    assert result.bits_per_byte == pytest.approx(float(sum(nll)) / math.log(2) / text_bytes, rel=1e-5)
    if mode != "first_key_masked":
        assert max(max(row) for row in result.rate["0.2"]) > 0, "some head is over a threshold"


def test_masking_bos_equals_removing_it_since_rotary_positions_are_relative(probe, decoder):
    strategy = Strategy(first_token="bos")
    masked, text = (measure(decoder, probe, m, strategy, CONFIG) for m in ("first_key_masked", "text"))
    assert masked.loss == pytest.approx(text.loss, rel=1e-5)
    assert all(x == 0 for row in masked.mass for x in row)


def test_first_key_masked_keeps_the_input_a_strategy_trains_on(probe, decoder):
    without_bos = measure(decoder, probe, "first_key_masked", Strategy(), CONFIG)
    text = measure(decoder, probe, "text", Strategy(), CONFIG)
    assert abs(without_bos.loss - text.loss) > 1e-4, "hiding the text's own first token costs something"


@pytest.mark.parametrize(
    ("strategy", "mode"),
    [
        (Strategy(first_token="bos"), "bos"),
        (Strategy(document_start="bos"), "bos"),
        (Strategy(), "text"),
        (Strategy(first_token="random"), "random_first"),
        (Strategy(first_token="bos", document_start="eos"), "bos"),
    ],
)
def test_as_trained_is_the_input_of_the_strategy(strategy, mode, probe, decoder):
    assert measure(decoder, probe, "as_trained", strategy, CONFIG) == measure(decoder, probe, mode, strategy, CONFIG)


def test_as_trained_puts_the_token_that_the_strategy_fixes(probe):
    def placed(mode, rows, **axes):
        tokens, positions = first_tokens(mode, Strategy(**axes), probe, rows)
        return tokens.tolist(), positions

    assert placed("as_trained", [0, 1], first_token=7) == ([[7], [7]], (0,))
    assert placed("first_key_masked", [0], first_token=7) == ([[7]], (0,))
    assert placed("as_trained", [0], document_start="eos") == ([[probe.eos_id]], (0,))
    assert probe.eos_id != probe.bos_id
    assert placed("as_trained", [0], document_start=9) == ([[9]], (0,))
    assert placed("as_trained", [0, 1]) == ([[], []], ())
    assert placed("as_trained", [0], first_token=["none", "bos", 8]) == ([[probe.bos_id, 8]], (1, 2))
    [[one, two]], positions = placed("as_trained", [3], first_token=["random", "random"])
    assert positions == (0, 1) and one != two and not {one, two} & probe.special_ids
    assert placed("bos", [0], first_token=["none", 8]) == ([[probe.bos_id]], (0,))


def test_a_token_placed_beyond_the_documents_of_the_probe_is_refused(probe, decoder):
    strategy = Strategy(first_token=[*["none"] * 16, "bos"])
    with pytest.raises(ValueError, match=r"placed before measure\.sink_tokens=16, .* got one at position 16"):
        measure(decoder, probe, "as_trained", strategy, CONFIG)


@pytest.mark.parametrize("window", [None, 12])
def test_a_token_placed_further_on_is_measured_there(window, probe, decoder, monkeypatch):
    strategy = Strategy(first_token=["none", "none", "bos"], window=window)
    result = measure(decoder, probe, "as_trained", strategy, CONFIG)
    alphas, masses, nll, size = [], [], [], 0
    with torch.no_grad():
        for text in probe.documents:
            tokens = torch.cat([text[:2], torch.tensor([probe.bos_id]), text[2:]])
            a, logits = attention_matrices(decoder, tokens[None], False, monkeypatch, window=window)
            alphas.append(a[..., 2:16, 2].sum(-1) / 14)
            masses.append(a[..., 3:16, 2].mean(-1))
            # BOS is no target; the text after it is predicted from it.
            rows = [i for i in range(len(tokens) - 1) if i != 1]
            nll.append(F.cross_entropy(logits[0, rows], text[1:], reduction="sum"))
            size += len(text) - 1
    assert result.placed_key == 2 and result.tokens == size
    assert result.loss == pytest.approx(float(sum(nll)) / size, rel=1e-5)
    torch.testing.assert_close(torch.tensor(result.mass_placed), torch.stack(masses).mean(0), atol=1e-6, rtol=1e-5)
    for eps in EPSILONS:
        expected = 100 * (torch.stack(alphas) > eps).double().mean(0)
        torch.testing.assert_close(torch.tensor(result.rate_placed[str(eps)], dtype=torch.float64), expected)
    assert max(max(row) for row in result.rate_placed["0.2"]) > 0, "some head is over a threshold"
    metrics = result.metrics("as_trained")
    assert metrics["sink/rate_placed_eps0.2/as_trained"] > 0 and metrics["sink/mass_placed/as_trained"] > 0
    plain = measure(decoder, probe, "text", strategy, CONFIG)
    assert plain.placed_key == 0 and plain.rate_placed is None
    assert not any("placed" in name for name in plain.metrics("text"))


def test_a_prefix_lm_neither_sees_padding_nor_counts_what_it_shows(probe, decoder):
    import dataclasses

    strategy = Strategy(prefix_lm=6)
    one = measure(decoder, probe, "text", strategy, dataclasses.replace(CONFIG, batch_tokens=1))
    many = measure(decoder, probe, "text", strategy, dataclasses.replace(CONFIG, batch_tokens=10_000))
    assert one.loss == pytest.approx(many.loss, rel=1e-6)
    assert one.tokens == sum(len(d) - 6 for d in probe.documents)
    long = Strategy(prefix_lm=47)
    with pytest.raises(ValueError, match="prefix_lm=47"):
        measure(decoder, probe.head(1), "text", dataclasses.replace(long), CONFIG)


def test_a_window_applies_when_measuring_too(probe, decoder):
    result = measure(decoder, probe, "text", Strategy(window=4), CONFIG)
    # Of 15 later queries only the first 3 still see key 0.
    assert all(x <= 3 / 15 for row in result.mass for x in row)


def test_measuring_disturbs_nothing(probe, decoder):
    decoder.train()
    state, weights = torch.get_rng_state(), [p.clone() for p in decoder.parameters()]
    for mode in ("bos", "random_first"):
        measure(decoder, probe, mode, Strategy(), CONFIG)
    assert torch.equal(torch.get_rng_state(), state)
    assert decoder.training and torch.is_grad_enabled()
    assert all(torch.equal(a, b) for a, b in zip(decoder.parameters(), weights, strict=True))


@pytest.mark.parametrize("mode", ["bos", "text", "first_key_masked", "random_first"])
def test_the_batch_size_of_a_measurement_does_not_matter(mode, probe, decoder):
    import dataclasses

    strategy = Strategy(first_token="bos")
    one = measure(decoder, probe, mode, strategy, dataclasses.replace(CONFIG, batch_tokens=1))
    many = measure(decoder, probe, mode, strategy, dataclasses.replace(CONFIG, batch_tokens=10_000))
    assert one.rate == many.rate
    assert one.loss == pytest.approx(many.loss, rel=1e-6)


def test_measurements_are_dense_early_and_reach_the_end():
    steps = MeasureConfig(first_step=10, live_points=8).steps(1000)
    assert steps[0] == 0 and steps[1] == 10 and steps[-1] == 1000
    gaps = [b - a for a, b in itertools.pairwise(steps[1:])]
    assert gaps == sorted(gaps)
    assert MeasureConfig().steps(3) == [0, 3]


def test_a_probe_that_cannot_be_is_refused(tiny_store):
    store = TokenStore.open(tiny_store, "validation")
    with pytest.raises(ValueError, match="expected fewer than"):
        Probe.from_store(store, 16, CONFIG)
    with pytest.raises(ValueError, match="none that long"):
        Probe.from_store(store, 4096, MeasureConfig(sink_tokens=2000))


class Given(torch.nn.Module):
    """Stands in for a decoder: hands back attention matrices as the operator would have observed them."""

    def __init__(self, attention):
        """attention: [N, L, H, T, T], row i of a document that begins with token i."""
        super().__init__()
        self.attention, self.weight = attention, torch.nn.Parameter(torch.zeros(1))
        self.vocab_size = 50
        self.config = SimpleNamespace(n_layers=attention.shape[1], n_heads=attention.shape[2])

    def forward(self, tokens, positions=None, mask=None, *, statistics=False):
        found = self.attention[tokens[:, 0]]  # [B, L, H, T, T]
        start = torch.zeros(tokens.shape, dtype=torch.long) if mask is None else mask.doc_start.long()
        keys = start[:, None, None, :, None].expand(*found.shape[:4], 1)
        row, document = found[..., 0], found.gather(-1, keys)[..., 0]
        layers = tuple(Statistics(row[:, layer], document[:, layer], None) for layer in range(self.config.n_layers))
        return DecoderOutput(torch.zeros(*tokens.shape, 50), None, layers)


def published_sink_rate(attention, key, eps):
    """Equation 6 of arXiv 2410.10781, one sequence, layer and head at a time, in plain arithmetic."""
    sequences, layers, heads, length, _ = attention.shape
    above = 0
    for sequence, layer, head in itertools.product(range(sequences), range(layers), range(heads)):
        matrix = attention[sequence, layer, head]
        alpha = 0.0
        for query in range(key, length):
            alpha += float(matrix[query, key])
        above += alpha / (length - key) > eps
    return 100 * above / (sequences * layers * heads)


@pytest.mark.parametrize("length", [16, 64])
@pytest.mark.parametrize("key", [0, 1, 2, 7])
def test_the_sink_rate_is_the_published_one_of_the_same_attention(key, length):
    generator = torch.Generator().manual_seed(key)
    N, L, H = 12, 3, 4
    logits = 2 * torch.randn(N, L, H, length, length, generator=generator)
    # From no sink to a full one, so that every threshold parts the heads.
    logits[..., key] += torch.linspace(-2, 9, N * L * H)[torch.randperm(N * L * H, generator=generator)].view(
        N, L, H, 1
    )
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
    attention = logits.masked_fill(hidden, float("-inf")).softmax(-1)
    text = torch.randint(N, 48, (N, length), generator=generator)
    text[:, 0] = torch.arange(N)
    probe = Probe(tuple(text), torch.ones(50, dtype=torch.int64), 48, 49, frozenset({48, 49}))
    config = MeasureConfig(documents=N, live_documents=1, sink_tokens=length, batch_tokens=5 * length)
    result = measure(Given(attention), probe, "text", Strategy(), config, key=key)
    assert result.placed_key == key and EPSILONS == (0.2, 0.3, 0.5, 0.8)
    found = result.rate_placed if key else result.rate
    expected = {eps: published_sink_rate(attention, key, eps) for eps in EPSILONS}
    assert 0 < expected[0.8] < expected[0.5] < expected[0.3] < expected[0.2] < 100
    for eps in EPSILONS:
        layers = found[str(eps)]
        assert sum(map(sum, layers)) / (L * H) == pytest.approx(expected[eps], abs=1e-6), eps
        for layer, head in itertools.product(range(L), range(H)):
            one = published_sink_rate(attention[:, layer : layer + 1, head : head + 1], key, eps)
            assert layers[layer][head] == pytest.approx(one, abs=1e-6), (eps, layer, head)
    # The mean of the indicators is not the indicator of the mean: averaging documents first gives another number.
    mean_first = published_sink_rate(attention.mean(0, keepdim=True), key, 0.3)
    assert abs(mean_first - expected[0.3]) > 1


class Largest(TorchDispatchMode):
    """The most elements that any tensor whose last dimension is V had, of those that operations made."""

    def __init__(self, vocab_size):
        super().__init__()
        self.vocab_size, self.count = vocab_size, 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for made in result if isinstance(result, tuple | list) else [result]:
            if isinstance(made, torch.Tensor) and made.shape[-1:] == (self.vocab_size,):
                self.count = max(self.count, made.numel())
        return result


@pytest.mark.parametrize("what", ["sinks", "loss by position", "gradients", "states", "jacobian"])
def test_logits_of_many_tokens_are_made_a_block_at_a_time(what, probe, decoder, monkeypatch):
    excerpts = Excerpts.of(probe, "bos", Strategy(first_token="bos"), 16, 8)
    call = {
        "sinks": lambda: dataclasses.asdict(measure(decoder, probe, "bos", Strategy(), CONFIG)),
        "loss by position": lambda: list(map(dataclasses.asdict, by_position(decoder, probe, "bos", Strategy(), 200))),
        **{name: partial(_plain, name, decoder, excerpts) for name in ("gradients", "states", "jacobian")},
    }[what]
    with Largest(300) as whole:
        expected = call()
    needs_logits = what not in ("states", "jacobian")
    assert (whole.count >= 7 * 16 * 300) == needs_logits, "all at once, or none at all"
    block = 40 * 300
    monkeypatch.setattr(inputs, "MOST_LOGITS", block)
    monkeypatch.setattr(loss, "BLOCK_LOGITS", block)
    with Largest(300) as sliced:
        result = call()
    assert (0 < sliced.count <= block) == needs_logits
    for (where, value), (_, other) in zip(numbers(expected), numbers(result), strict=True):
        assert other == pytest.approx(value, rel=2e-4, abs=1e-6), where


def _plain(name, decoder, excerpts):
    return plain(MEASURES[name].measure(decoder, excerpts, 200))


@pytest.mark.parametrize("mode", ["bos", "text", "first_key_masked"])
def test_one_token_more_than_the_sink_rate_takes_is_enough(mode, probe, decoder):
    cropped = dataclasses.replace(probe, documents=tuple(d[:16] for d in probe.documents))
    assert max(map(len, probe.documents)) > 16
    long, short = (measure(decoder, each, mode, Strategy(first_token="bos"), CONFIG) for each in (probe, cropped))
    assert short.rate == long.rate and short.tokens < long.tokens
    torch.testing.assert_close(torch.tensor(short.mass), torch.tensor(long.mass), atol=1e-6, rtol=1e-5)
