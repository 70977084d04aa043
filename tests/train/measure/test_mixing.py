"""Mixing and perplexity against plain definitions: whole matrices, whole Jacobians, one token at a time."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from sinkbed.data.pack.strategy import Strategy
from sinkbed.kernels import interval_mask
from sinkbed.kernels.reference import probabilities
from sinkbed.model import Decoder, DecoderConfig
from sinkbed.model.observe import observing
from sinkbed.train.measure import perplexity
from sinkbed.train.measure.config import MeasureConfig
from sinkbed.train.measure.excerpts import Excerpts
from sinkbed.train.measure.heldout import Probe
from sinkbed.train.measure.measures.jacobian import measure_jacobian
from sinkbed.train.measure.measures.paths import measure_paths
from sinkbed.train.measure.measures.perturbation import measure_perturbation
from sinkbed.train.measure.measures.rank import measure_rank
from sinkbed.train.measure.measures.states import measure_states
from sinkbed.train.measure.sinks import measure

FIXED = Strategy(first_token="bos")
N, C, L, H = 14, 16, 3, 2  # tokens of text, width, layers, heads


@pytest.fixture(scope="module")
def probe():
    generator = torch.Generator().manual_seed(3)
    documents = tuple(torch.randint(2, 60, (length,), generator=generator) for length in (30, 14, 22, 17, 5))
    return Probe(documents, torch.ones(60, dtype=torch.int64), 0, 1, frozenset({0, 1}))


@pytest.fixture(scope="module", params=["none", "learned"])
def decoder(request):
    torch.manual_seed(2)
    config = DecoderConfig(n_layers=L, d_model=C, n_heads=H, n_kv_heads=1, d_ff=24, init_std=0.5, sink=request.param)
    made = Decoder(config, 60)
    for block in made.blocks:
        if request.param == "learned":
            torch.nn.init.normal_(block.attention.sink.weight)
    return made


def excerpts_of(probe, mode="bos", count=8, strategy=FIXED):
    return Excerpts.of(probe, mode, strategy, N, count)


def hidden_of(decoder, tokens, mask=None):
    found = []
    with torch.no_grad(), observing(decoder, hidden=lambda layer, h: found.append(h)):
        decoder(tokens, mask=mask)
    return torch.stack(found)


def sink_of(decoder, layer):
    sink = decoder.blocks[layer].attention.sink
    return None if sink is None else sink.key(None)[0].detach()


def with_bos(text):
    return F.pad(text, (1, 0), value=0)


def close(found, expected, **tolerances):
    found, expected = (torch.as_tensor(x, dtype=torch.float64) for x in (found, expected))
    torch.testing.assert_close(found, expected, **{"rtol": 1e-4, "atol": 1e-6, **tolerances})


@pytest.mark.parametrize("position", [None, 0, N - 1])
def test_a_perturbation_is_the_difference_of_two_passes(decoder, probe, position):
    excerpts = excerpts_of(probe)
    changed = excerpts.text.clone()
    at = N // 4 if position is None else position
    changed[:, at] = (changed[:, at] - 2 + torch.tensor([1, 7, 20, 40])[: len(changed)]) % 58 + 2
    found = measure_perturbation(decoder, excerpts, batch_tokens=40, changed=changed)
    before, after = (hidden_of(decoder, with_bos(t))[:, :, 1:] for t in (excerpts.text, changed))
    change = (after - before).norm(dim=-1)
    relative = change / before[..., 1:, :].norm(dim=-1).mean(-1, keepdim=True)
    assert found.position == at
    close(found.change, change.mean(1), atol=1e-5)
    close(found.relative, relative.mean(1), atol=1e-5)
    each = relative[:, :, at + 1 :].mean(2) if at + 1 < N else torch.zeros(L + 1, 4)
    close(found.across, each.std(1) / 2, atol=1e-5)
    close(found.spread, relative[:, :, at + 1 :].mean((1, 2)) if at + 1 < N else torch.zeros(L + 1), atol=1e-5)
    if at:
        assert max(map(max, (layer[:at] for layer in found.change))) < 1e-4, "what comes before does not change"


def test_the_token_in_another_ones_place_is_always_another(decoder, probe):
    found = measure_perturbation(decoder, excerpts_of(probe), 1000, position=3)
    again = measure_perturbation(decoder, excerpts_of(probe), 20, position=3)
    close(found.change, again.change, rtol=1e-3, atol=1e-5)  # in other batches the same tokens
    assert all(layer[3] > 0 for layer in found.change) and found.change[0][4] == 0


def test_rank_is_that_of_each_texts_own_matrix(decoder, probe):
    excerpts = excerpts_of(probe)
    found = measure_rank(decoder, excerpts, batch_tokens=40)
    hidden = hidden_of(decoder, with_bos(excerpts.text)).double()
    for part, start in (("row", 0), ("rest", 1)):
        for layer in range(L + 1):
            values = []
            for v in hidden[layer][:, start:]:
                n = len(v)
                one = torch.ones(n, 1, dtype=v.dtype)
                distance = (v - one @ one.T @ v / n).norm()
                s = torch.linalg.svdvals(v)
                p, lam = s / s.sum(), s**2 / (s**2).sum()
                last = (v[-1] - v[-2]).norm()
                values.append([
                    distance, distance / v.norm(), math.exp(-(p * p.log()).sum()), -(lam * lam.log()).sum(), last,
                    last / ((v[-1].norm() + v[-2].norm()) / 2),
                ])  # fmt: skip
            mean = torch.tensor(values).mean(0)
            r = found[part]
            close([r.distance[layer], r.relative_distance[layer], r.effective_rank[layer], r.matrix_entropy[layer],
                   r.last_distance[layer], r.relative_last_distance[layer]], mean, rtol=1e-3)  # fmt: skip


def test_representations_that_are_all_alike_have_collapsed(probe):
    """Weights of zero leave the embedding of one repeated token: distance 0, rank 1, entropy 0."""
    decoder = Decoder(DecoderConfig(n_layers=2, d_model=8, n_heads=2, d_ff=8, init_std=0.5), 60)
    for block in decoder.blocks:
        torch.nn.init.zeros_(block.attention.out.weight)
        torch.nn.init.zeros_(block.feed_forward.down.weight)
    same = Probe((torch.full((N,), 7),), probe.token_bytes, 0, 1, probe.special_ids)
    found = measure_rank(decoder, excerpts_of(same, "text"), 1000)["row"]
    close(found.distance, [0.0] * 3, atol=1e-5)
    close(found.effective_rank, [1.0] * 3, atol=1e-5)
    close(found.last_distance, [0.0] * 3, atol=1e-6)


@pytest.mark.parametrize("mode", ["bos", "text", "first_key_masked"])
def test_the_path_sum_equals_an_enumeration_of_paths(decoder, probe, mode):
    """Theorem 3.2 as it is written: over every causal path i → … → j, the product of ā^(l)."""
    tokens = 5
    excerpts = Excerpts.of(probe, mode, FIXED, tokens, 2)
    found = measure_paths(decoder, excerpts, batch_tokens=1000)
    text = excerpts.text if mode == "text" else with_bos(excerpts.text)
    T = text.shape[1]
    inputs = []
    mask = interval_mask(2, T, hide_first_key=mode == "first_key_masked")
    with torch.no_grad(), observing(decoder, attention=inputs.append):
        decoder(text, mask=mask)
    expected = torch.zeros(T, dtype=torch.float64)
    for b in range(2):
        scorings = [replace(x.scoring, sink_logit=sink_of(decoder, x.layer)) for x in inputs]
        a = [
            probabilities(x.q, x.k, mask, scoring)[0][b].double().sum(0) + torch.eye(T) / H
            for x, scoring in zip(inputs, scorings, strict=True)
        ]
        j = T - 1
        for path in itertools.product(range(T), repeat=L):  # path[0] = i, ..., then j
            nodes = (*path, j)
            weight = math.prod(float(a[layer][nodes[layer + 1], nodes[layer]]) for layer in range(L))
            expected[path[0]] += weight / 2
    close([10**found.log10_factor * share for share in found.share[-1]], expected, rtol=1e-4)
    close(found.first[-1], expected[0] / 10**found.log10_factor, rtol=1e-4)
    one = torch.tensor(found.share[-1])
    if decoder.config.sink == "none":
        assert float(one.sum()) == pytest.approx(1, abs=1e-5)
    else:
        assert float(one.sum()) < 0.9, "a learned sink takes a part"


@pytest.mark.parametrize("normalizer", ["sigmoid", "elu", "softpick"])
def test_paths_and_entropy_are_of_shares_where_weights_need_not_add_up_to_1(probe, normalizer):
    torch.manual_seed(2)
    shape = dict(n_layers=2, d_model=16, n_heads=4, d_ff=24, init_std=0.5)
    decoder = Decoder(DecoderConfig(**shape, normalizer=normalizer), 60)
    excerpts = excerpts_of(probe, "text")
    paths = measure_paths(decoder, excerpts, 1000)
    assert all(0 < sum(share) < 1 + 1e-6 for share in paths.share), "parts of one bound"
    layers = []
    _, row = excerpts.batch(slice(None), torch.device("cpu"))
    with torch.no_grad(), observing(decoder, attention=layers.append):
        decoder(row.tokens, mask=row.mask)
    for seen, entropy in zip(layers, measure_states(decoder, excerpts, 1000).entropy, strict=True):
        weights = torch.cat([p for _, p in seen.blocks()], 2)
        p = weights / weights.sum(-1, keepdim=True).clamp_min(1e-8)
        close(entropy, torch.special.entr(p).sum(-1)[..., 1:].mean((0, 2)), atol=1e-5)


def whole_jacobian(decoder, tokens, layer):
    """[C, T, C] ∂v_last^(layer) / ∂v^(0) of one row, by torch."""

    def last(x):
        found = []

        def hidden(at, h):
            if at == 0:
                return x
            found.append(h)
            return None

        with observing(decoder, hidden=hidden):
            decoder(tokens)
        return found[layer - 1][0, -1]

    return torch.autograd.functional.jacobian(last, decoder.embedding(tokens).detach())[:, 0]


def test_the_exact_jacobian_is_torchs(decoder, probe):
    excerpts = excerpts_of(probe, count=2)
    found = measure_jacobian(decoder, excerpts, batch_tokens=60, directions="exact")
    assert found.layers == [1, 2, 3] and found.directions == C
    for index, layer in enumerate(found.layers):
        whole = torch.stack([whole_jacobian(decoder, with_bos(t[None]), layer) for t in excerpts.text])
        norms = whole.square().sum((1, 3)).sqrt()  # [documents, T]
        close(found.norm[index], norms.mean(0), rtol=1e-3, atol=1e-5)
        close(found.others[index], norms[:, 1:N].mean(), rtol=1e-3)
        largest = torch.linalg.matrix_norm(whole.transpose(1, 2), ord=2)
        close(found.spectral[index], largest.mean(0), rtol=1e-3, atol=1e-5)
    assert all(e == 0 for layer in found.error for e in layer) and all(e == 0 for e in found.others_error)
    assert all(e > 0 for e in found.across)


@pytest.mark.parametrize("directions", [8, 28])
def test_random_directions_estimate_the_exact_norm_within_their_error(probe, directions):
    """Over many seeds the squared estimates average to the squared norm, and err by what they say."""
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(n_layers=2, d_model=32, n_heads=2, d_ff=48, init_std=0.4), 60)
    excerpts = excerpts_of(probe, count=1)
    exact = torch.tensor(measure_jacobian(decoder, excerpts, 2000, directions="exact").norm)
    drawn = [measure_jacobian(decoder, excerpts, 2000, directions=directions, seed=seed) for seed in range(40)]
    norms = torch.tensor([d.norm for d in drawn])
    kept = exact > 1e-3
    mean = exact[:, 1:N].mean(1)
    others = torch.tensor([d.others for d in drawn])
    assert ((others - mean).abs() / mean).median() < 0.05
    said = torch.tensor([d.others_error for d in drawn]).mean(0)
    assert (said / others.std(0) > 0.6).all() and (said / others.std(0) < 1.6).all()
    squares = norms.square()[:, kept]
    off = (squares.mean(0) - exact.square()[kept]) / (squares.std(0) / math.sqrt(len(drawn)))
    assert off.abs().max() < 4 and abs(float(off.mean())) < 2, "standard errors of the mean over the seeds"
    said = torch.tensor([d.error for d in drawn]).mean(0)[kept]
    real = norms.std(0)[kept]
    assert 0.7 < float((said / real).median()) < 1.3
    assert all(d.directions == directions and d.spectral is None for d in drawn)
    assert torch.equal(
        norms[0], torch.tensor(measure_jacobian(decoder, excerpts, 2000, directions=directions, seed=0).norm)
    )


def test_a_hidden_first_key_has_no_influence(decoder, probe):
    found = measure_jacobian(decoder, excerpts_of(probe, "first_key_masked", count=2), 500, directions="exact")
    assert all(layer[0] == 0 for layer in found.norm) and all(layer[1] > 0 for layer in found.norm)


def test_perplexity_by_position_adds_up_to_the_loss(decoder, probe):
    spans = perplexity.by_position(decoder, probe, "bos", FIXED, batch_tokens=50)
    assert [(s.start, s.end) for s in spans] == [(1, 2), (2, 4), (4, 8), (8, 16), (16, 30)]
    # Targets at 1 to n − 1 of documents of 30, 14, 22, 17 and 5 tokens.
    assert [s.tokens for s in spans] == [5, 10, 4 * 4 + 1, 8 + 6 + 8 + 8, 14 + 6 + 1]
    whole = measure(decoder, probe, "bos", FIXED, MeasureConfig(documents=5, live_documents=1, sink_tokens=5))
    assert sum(s.tokens for s in spans) == whole.tokens
    assert sum(s.tokens * s.loss for s in spans) / whole.tokens == pytest.approx(whole.loss, rel=1e-5)
    assert spans[0].perplexity == pytest.approx(math.exp(spans[0].loss))


def test_a_cache_is_a_window_beside_the_first_keys(decoder, probe):
    lines = perplexity.streaming(decoder, probe, "bos", FIXED, 50, cache=6, kept=[0, 2])
    assert [(s.cached, s.kept, s.window) for s in lines] == [(False, 0, None), (True, 0, 6), (True, 2, 4)]
    for line in lines[1:]:
        losses = []
        for text in probe.documents:
            tokens = with_bos(text[None])
            T = tokens.shape[1]
            mask = interval_mask(1, T, window=line.window, shared_prefix=line.kept)
            visible = mask.visible("cpu", slice(0, T))[0, 0]
            assert visible[-1].sum() == min(6, T), "the cache's size"
            with torch.no_grad():
                logits = decoder(tokens, mask=mask).logits
            nll = F.cross_entropy(logits[0, 1:-1], text[1:], reduction="none")  # targets at 1, 2, ...
            losses.append(nll[6:])  # the query of the target at p is row position p: p + 1 keys
        losses = torch.cat(losses)
        assert line.tokens == len(losses)
        assert line.loss == pytest.approx(float(losses.mean()), rel=1e-5)
    assert lines[0].tokens == lines[1].tokens and lines[0].loss != lines[1].loss


@pytest.mark.parametrize(
    ("cache", "kept", "window", "message"),
    [
        (29, [0], None, "fewer keys than the longest"),
        (6, [6], None, "expected 0 to 5"),
        (6, [0], 4, "expected at most 4 keys, the window"),
    ],
)
def test_a_cache_that_is_none_is_refused(decoder, probe, cache, kept, window, message):
    with pytest.raises(ValueError, match=message):
        strategy = Strategy(first_token="bos", window=window)
        perplexity.streaming(decoder, probe, "bos", strategy, 50, cache=cache, kept=kept)


def test_the_targets_of_a_prefix_lm_are_those_that_its_prefix_does_not_show(decoder, probe):
    strategy = Strategy(first_token="bos", prefix_lm=8)
    config = MeasureConfig(documents=5, live_documents=1, sink_tokens=4)
    whole = measure(decoder, probe, "bos", strategy, config)
    spans = perplexity.by_position(decoder, probe, "bos", strategy, 50)
    assert sum(s.tokens for s in spans) == whole.tokens < 5 * 4 + 4 * 4 + 30 + 21
    assert spans[0].start == 8, "spans without targets are left out"
    lines = perplexity.streaming(decoder, probe, "bos", strategy, 50, cache=4, kept=[1])
    assert lines[0].tokens == lines[1].tokens == sum(s.tokens for s in spans if s.start >= 8)


def test_a_windowed_model_is_compared_with_its_own_window(decoder, probe):
    strategy = Strategy(first_token="bos", window=5)
    lines = perplexity.streaming(decoder, probe, "bos", strategy, 50, cache=5, kept=[0, 1])
    assert (lines[0].window, lines[1].window) == (5, 5) and lines[0].loss == lines[1].loss != lines[2].loss
