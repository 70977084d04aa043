"""What is particular about position 0, against definitions on the eager attention of `transformers`."""

import dataclasses

import pytest
import torch

from sinkbed.train.measure.heldout import delimiters_of
from sinkbed.train.measure.measures.constancy import measure_constancy
from sinkbed.train.measure.measures.destinations import measure_destinations
from sinkbed.train.measure.measures.updates import measure_updates
from sinkbed.train.measure.measures.vocabulary import measure_vocabulary
from tests.train.measure.test_states import T, eager, excerpts_of, models, probe  # noqa: F401  (fixtures)


def rows(excerpts):
    return torch.cat([torch.zeros(len(excerpts.rows), 1, dtype=torch.int64), excerpts.text], 1)


def close(ours, expected):
    torch.testing.assert_close(torch.tensor(ours), expected.float(), atol=1e-5, rtol=1e-4)


def test_destinations_are_sums_of_attention_over_classes_of_keys(models, probe):  # noqa: F811
    reference, ours = models
    delimiters = frozenset(range(2, 96, 3))
    excerpts = excerpts_of(dataclasses.replace(probe, delimiters=delimiters))
    measured = measure_destinations(ours, excerpts, batch_tokens=60)
    tokens, counts = rows(excerpts), excerpts.text.flatten().bincount(minlength=96)
    frequent = set(counts.argsort(descending=True, stable=True)[:10].tolist())
    names = ("first", "second", "previous", "itself", "delimiters", "frequent", "elsewhere")
    for layer, attention in enumerate(eager(reference, tokens)[1]):
        sums = {name: torch.zeros(attention.shape[1]) for name in names}
        for b in range(len(tokens)):
            for i in range(3, T + 1):
                for j in range(i + 1):
                    name = {0: "first", 1: "second", i - 1: "previous", i: "itself"}.get(j)
                    token = int(tokens[b, j])
                    kind = "delimiters" if token in delimiters else "frequent" if token in frequent else "elsewhere"
                    name = name or kind
                    sums[name] += attention[b, :, i, j]
        for name in names:
            close(getattr(measured, name)[layer], sums[name] / (len(tokens) * (T - 2)))
        assert sum(float(sums[name].sum()) for name in names) == pytest.approx(len(tokens) * (T - 2) * 4, rel=1e-5)


def test_delimiters_are_tokens_without_letters_or_digits():
    texts = {1: " the", 2: ",", 3: "\n\n", 4: " 7", 5: "\N{REPLACEMENT CHARACTER}", 6: ""}
    documents = [torch.tensor([1, 2, 3]), torch.tensor([3, 4, 5, 6])]
    assert delimiters_of(documents, lambda ids: texts[ids[0]]) == {2, 3}


def test_updates_are_of_what_heads_give_to_later_queries(models, probe):  # noqa: F811
    reference, ours = models
    excerpts = excerpts_of(probe)
    measured = measure_updates(ours, excerpts, batch_tokens=60)
    tokens, values = rows(excerpts), []
    hooks = [
        layer.self_attn.v_proj.register_forward_hook(lambda m, a, out: values.append(out))
        for layer in reference.model.layers
    ]
    _, attentions = eager(reference, tokens)
    for hook in hooks:
        hook.remove()
    for layer, (attention, v) in enumerate(zip(attentions, values, strict=True)):
        v = v.unflatten(-1, (2, -1)).transpose(1, 2).repeat_interleave(2, 1)  # [B, H, T, D]
        given = (attention @ v)[:, :, 1:]
        close(measured.norm[layer], (given.norm(dim=-1).mean(-1) / v.norm(dim=-1).mean(-1)).mean(0))
        largest = torch.linalg.matrix_norm(given, ord=2)
        close(measured.stable_rank[layer], (given.square().sum((-2, -1)) / largest.square()).mean(0))
        first = (attention[..., 1:, :1] * v[:, :, :1]).norm(dim=-1)
        close(measured.from_first[layer], (first / given.norm(dim=-1)).mean(-1).mean(0))


@pytest.mark.parametrize("mode", ["bos", "text"])
def test_constancy_is_the_mean_cosine_of_two_documents(models, probe, mode):  # noqa: F811
    reference, ours = models
    excerpts = excerpts_of(probe, mode)
    measured = measure_constancy(ours, excerpts, batch_tokens=60)
    tokens = rows(excerpts) if mode == "bos" else excerpts.text
    for layer, h in enumerate(eager(reference, tokens)[0]):
        unit = torch.nn.functional.normalize(h.double(), dim=-1)
        pairs = [(unit[a] * unit[b]).sum(-1) for a in range(len(h)) for b in range(a)]
        cosine = torch.stack(pairs).mean(0)
        close(measured.first[layer], cosine[0])
        close(measured.others[layer], cosine[1:].mean())
    assert mode != "bos" or measured.first == pytest.approx([1.0] * len(measured.first))
    with pytest.raises(ValueError, match="constancy: expected at least two documents, got 1"):
        measure_constancy(ours, excerpts_of(probe, count=1), 60)


def test_every_token_is_tried_at_position_0(models, probe):  # noqa: F811
    reference, ours = models
    excerpts = excerpts_of(probe, "text")
    measured = measure_vocabulary(ours, excerpts, batch_tokens=10 * T, vocabulary=1000)
    usable = torch.tensor([token for token in range(96) if token not in probe.special_ids])
    known = len(usable)
    assert known < 96, "control tokens are no text"
    tokens = excerpts.text[:1].repeat(known, 1)
    tokens[:, 0] = usable
    strongest = torch.stack([a[..., 1:, 0].mean(-1).amax(-1) for a in eager(reference, tokens)[1]])  # [L, V]
    assert measured.tokens == known
    close(measured.strongest, strongest.mean(1))
    close(measured.share, 100 * (strongest > 0.3).float().mean(1))
    assert measured.any_layer == pytest.approx(100 * float((strongest > 0.3).any(0).float().mean()))
    fewer = measure_vocabulary(ours, excerpts, 10 * T, vocabulary=60)
    assert fewer.tokens == 60
    close(fewer.strongest, strongest[:, torch.arange(60) * known // 60].mean(1))
