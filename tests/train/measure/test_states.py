"""States around the sink, against their definitions on the hidden states and attention that `transformers` returns."""

from functools import partial

import pytest
import torch

from sinkbed.data.pack.strategy import Strategy
from sinkbed.model import Decoder, DecoderConfig
from sinkbed.model.hf.adapter import HFModel
from sinkbed.model.observe import observing
from sinkbed.train.measure.excerpts import Excerpts, hidden_states
from sinkbed.train.measure.heldout import Probe
from sinkbed.train.measure.inputs import target_nll
from sinkbed.train.measure.measures.gradients import measure_gradients
from sinkbed.train.measure.measures.states import measure_states, strongest_head

transformers = pytest.importorskip("transformers")
T = 24  # tokens of text


@pytest.fixture(scope="module")
def probe():
    generator = torch.Generator().manual_seed(3)
    documents = tuple(torch.randint(2, 96, (length,), generator=generator) for length in (30, 24, 40, 23, 26))
    return Probe(documents, torch.ones(96, dtype=torch.int64), 0, 1, frozenset({0, 1}))


def excerpts_of(probe, mode="bos", count=8, tokens=T, strategy=None):
    return Excerpts.of(probe, mode, strategy or Strategy(first_token="bos"), tokens, count)


def build(family):
    """A tiny model of transformers with eager attention, and ours of the same weights."""
    torch.manual_seed(0)
    common = dict(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=0, eos_token_id=1, pad_token_id=1, initializer_range=0.3,
    )  # fmt: skip
    extra = {"Gemma2": dict(head_dim=8, sliding_window=6, attn_logit_softcapping=3.0), "Llama": {}}[family]
    config = getattr(transformers, f"{family}Config")(**common, **extra)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


@pytest.fixture(scope="module", params=["Llama", "Gemma2"])
def models(request, tmp_path_factory):
    theirs = build(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)
    return theirs, HFModel.load(str(folder))


def eager(theirs, tokens):
    """Hidden states [L+1][B, T, C] as blocks write them, without the final norm, and attention [L][B, H, T, T]."""
    outputs = []
    hooks = [
        layer.register_forward_hook(lambda m, a, out: outputs.append(out if isinstance(out, torch.Tensor) else out[0]))
        for layer in theirs.model.layers
    ]
    with torch.no_grad():
        found = theirs(tokens, output_attentions=True, output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    return [found.hidden_states[0], *outputs], found.attentions


def test_states_equal_their_definitions(models, probe):
    theirs, ours = models
    excerpts = excerpts_of(probe)
    found = measure_states(ours, excerpts, batch_tokens=60)  # two documents a pass
    tokens = torch.cat([torch.zeros(len(excerpts.rows), 1, dtype=torch.int64), excerpts.text], 1)
    assert len(tokens) == 4 == found.documents and found.tokens == T + 1, "one document is too short"
    hidden, attentions = eager(theirs, tokens)
    for layer, h in enumerate(hidden):
        norms = h.norm(dim=-1)
        close(found.norm[layer], norms.mean(0))
        close(found.norm_ratio[layer], (norms[:, 0] / norms[:, 1:].mean(1)).mean())
        largest = h.abs().flatten(1).amax(1)
        close(found.max_activation[layer], largest.mean())
        close(found.max_over_median[layer], (largest / h.abs().flatten(1).median(1).values).mean())
        where = found.massive[layer]
        row = excerpts.rows.index(where["document"])
        close(where["value"], h.abs().max())
        close(where["value"], h[row, where["position"], where["channel"]].abs())
        assert where["token"] == int(tokens[row, where["position"]])
        kurtosis = ((h - h.mean(-1, keepdim=True)) ** 4).mean(-1) / h.var(-1, correction=0) ** 2
        close(found.kurtosis_first[layer], kurtosis[:, 0].mean())
        close(found.kurtosis[layer], kurtosis[:, 1:].mean())
        alike = torch.nn.functional.cosine_similarity(h, h[:, :1], dim=-1)[:, 1:].abs() > 0.9
        close(found.secondary_share[layer], alike.float().mean())
    for layer, a in enumerate(attentions):
        close(found.entropy[layer], -(a * a.clamp_min(1e-30).log()).sum(-1)[..., 1:].mean((0, 2)))
        seen = (a > 0).any(1, keepdim=True).sum(2)  # queries that see a key
        close(found.received[layer], (a.sum(2) / seen).mean((0, 1)), atol=1e-4)


def test_keys_values_and_queries_are_those_of_the_layer(models, probe):
    """Cosines and norms against the projections, seen through our operator alone for the rotation."""
    _, ours = models
    excerpts = excerpts_of(probe)
    found = measure_states(ours, excerpts, batch_tokens=10_000)
    layers = []
    _, row = excerpts.batch(slice(None), torch.device("cpu"))
    with torch.no_grad(), observing(ours, attention=layers.append):
        ours(row.tokens, mask=row.mask)
    assert [seen.layer for seen in layers] == [0, 1, 2]
    for seen in layers:
        for x, ratio in ((seen.k, found.key_norm_ratio), (seen.v, found.value_norm_ratio)):
            norms = x.norm(dim=-1)
            close(ratio[seen.layer], (norms[:, :, 0] / norms[:, :, 1:].mean(-1)).mean(0))
        k = seen.k.repeat_interleave(2, 1)
        cosine = torch.nn.functional.cosine_similarity(seen.q[:, :, :, None], k[:, :, None], dim=-1)  # [B, H, T, T]
        close(found.cosine_first[seen.layer], cosine[:, :, 1:, 0].mean((0, 2)))
        others = torch.stack([cosine[:, :, t, 1 : t + 1].mean(-1) for t in range(1, T + 1)])
        close(found.cosine_others[seen.layer], others.mean((0, 1)))


def test_the_strongest_keys_are_those_of_the_whole_matrix(models, probe):
    theirs, ours = models
    excerpts = excerpts_of(probe)
    found = measure_states(ours, excerpts, batch_tokens=10_000)
    tokens = torch.cat([torch.zeros(4, 1, dtype=torch.int64), excerpts.text], 1)
    _, attentions = eager(theirs, tokens)
    tally = torch.zeros(T + 1)
    for a in attentions:
        seen = (a > 0).any(1, keepdim=True).sum(2)
        received = (a.sum(2) / seen).masked_fill(seen < min(16, int(seen.max())), -1)
        tally += torch.bincount(received.argmax(-1).flatten(), minlength=T + 1)
    shares = (tally.sort(descending=True).values / tally.sum())[:10]
    close([line["share"] for line in found.strongest_position], shares[shares > 0])
    by_position = {line["position"]: line["share"] for line in found.strongest_position}
    assert by_position[int(tally.argmax())] == pytest.approx(float(tally.max() / tally.sum()))
    assert sum(line["share"] for line in found.strongest_token if line["first"]) <= by_position.get(0, 0) + 1e-9


def test_gradients_equal_those_of_the_summed_loss(models, probe):
    _, ours = models
    excerpts = excerpts_of(probe)
    found = measure_gradients(ours, excerpts, batch_tokens=60)
    text, row = excerpts.batch(slice(None), torch.device("cpu"))
    # By differences: the loss along a direction at one token of one layer's input.
    states, (nll, _) = hidden_states(ours, partial(target_nll, ours, row, text))
    gradients = torch.autograd.grad(nll.sum(), states)
    for layer, gradient in enumerate(gradients):
        norms = gradient.norm(dim=-1)
        close(found.norm[layer], norms.mean(0))
        close(found.ratio[layer], (norms[:, 0] / norms[:, 1:].mean(1)).mean())
    direction, step = torch.randn_like(states[0][:, 0]), 1e-3
    losses = []
    for sign in (1, -1):

        def moved(layer, h, sign=sign):
            if layer == 0:
                h = h.clone()
                h[:, 0] += sign * step * direction
                return h
            return None

        with torch.no_grad(), observing(ours, hidden=moved):
            losses.append(target_nll(ours, row, text)[0].sum().double())
    slope = (losses[0] - losses[1]) / (2 * step)
    assert float(slope) == pytest.approx(float((gradients[0][:, 0] * direction).sum()), rel=0.05, abs=0.02)
    assert all(p.grad is None for p in ours.parameters())


def test_the_map_is_of_the_head_that_looks_most_at_the_first_key(models, probe):
    theirs, ours = models
    excerpts = excerpts_of(probe)
    found = strongest_head(ours, excerpts, tokens=12)
    tokens = torch.cat([torch.zeros(1, 1, dtype=torch.int64), excerpts.text[:1]], 1)
    _, attentions = eager(theirs, tokens)
    masses = torch.stack([a[0, :, 1:12, 0].mean(-1) for a in attentions])
    assert divmod(int(masses.argmax()), 4) == (found["layer"], found["head"])
    close(found["attention"], attentions[found["layer"]][0, found["head"], :12, :12])
    assert found["tokens"] == tokens[0, :12].tolist()


def test_a_decoder_of_ours_is_observed_as_its_export_is(probe, tmp_path):
    """The same code for both: states and gradients of a decoder equal those of the Llama made of it."""
    from sinkbed.model.hf.export import export

    torch.manual_seed(5)
    config = DecoderConfig(n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, d_ff=48, init_std=0.3)
    decoder = Decoder(config, 96)
    settings, weights = export(decoder, bos_id=0, eos_id=1, context_length=64)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))
    theirs.load_state_dict(weights)
    theirs.save_pretrained(tmp_path)
    ours = HFModel.load(str(tmp_path))
    for mode in ("bos", "text", "first_key_masked"):
        excerpts = excerpts_of(probe, mode)
        a, b = (measure_states(m, excerpts, 1000) for m in (decoder, ours))
        for name in ("norm", "max_activation", "kurtosis", "key_norm_ratio", "value_norm_ratio", "entropy", "received"):
            torch.testing.assert_close(
                torch.tensor(getattr(a, name)), torch.tensor(getattr(b, name)), rtol=1e-3, atol=1e-4
            )
        close(a.cosine_first, torch.tensor(b.cosine_first), atol=1e-4)
        x, y = (measure_gradients(m, excerpts, 1000) for m in (decoder, ours))
        torch.testing.assert_close(torch.tensor(x.norm), torch.tensor(y.norm), rtol=1e-3, atol=1e-4)


def test_a_secondary_sink_is_alike_or_opposite_to_the_first_token(probe):
    """Token 5 is BOS turned round, 6 BOS itself, 7 at a right angle."""
    decoder = Decoder(DecoderConfig(n_layers=1, d_model=8, n_heads=2, d_ff=8), 96)
    with torch.no_grad():
        decoder.embedding.weight[0] = torch.tensor([1.0, 2, 1, 1, 1, 1, 1, 1])
        decoder.embedding.weight[5] = -2 * decoder.embedding.weight[0]
        decoder.embedding.weight[6] = decoder.embedding.weight[0].clone()
        decoder.embedding.weight[7] = torch.tensor([2.0, -1, 1, -1, 1, -1, 1, -1])
    text = torch.tensor([5, 6, 7, 7] * 6)
    known = Probe((text,), probe.token_bytes, 0, 1, probe.special_ids)
    assert measure_states(decoder, excerpts_of(known), 100).secondary_share[0] == 0.5


def test_measuring_leaves_the_model_as_it_was(probe):
    decoder = Decoder(DecoderConfig(n_layers=2, d_model=32, n_heads=4, d_ff=48), 96).train()
    before = torch.get_rng_state()
    measure_states(decoder, excerpts_of(probe), 100)
    measure_gradients(decoder, excerpts_of(probe), 100)
    assert decoder.training and torch.equal(before, torch.get_rng_state())
    assert all(p.grad is None for p in decoder.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in decoder.modules())


def test_a_compiled_decoder_is_observed_too(probe):
    """torch.compile does not look for hooks that came after it."""
    torch.manual_seed(1)
    decoder = Decoder(DecoderConfig(n_layers=2, d_model=32, n_heads=4, d_ff=48), 96)
    plain = measure_states(decoder, excerpts_of(probe), 1000)
    decoder.compile(backend="eager")
    with torch.no_grad():
        decoder(torch.zeros(4, T + 1, dtype=torch.int64))
    assert measure_states(decoder, excerpts_of(probe), 1000) == plain


def test_documents_that_are_too_short_are_named(probe):
    with pytest.raises(ValueError, match="at least 50 tokens, got 40"):
        excerpts_of(probe, tokens=50)


def close(found, expected, **tolerances):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    found = torch.as_tensor(found, dtype=torch.float64)
    torch.testing.assert_close(found, expected, **{"rtol": 1e-4, "atol": 1e-5, **tolerances})


def test_a_gradient_that_vanishes_has_no_ratio_and_stops_no_run(probe):
    """Where no loss depends on a state at all, its ratio was nan, which ended the training that measured it."""
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(n_layers=1, d_model=8, n_heads=2, d_ff=12, block="post_norm"), 1000)
    torch.nn.init.zeros_(decoder.head.weight)
    assert measure_gradients(decoder, excerpts_of(probe, "text", strategy=Strategy()), 100).ratio == [0.0, 0.0]
