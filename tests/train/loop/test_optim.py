"""Schedules and parameter groups."""

import pytest
import torch

from sinkbed.model import Decoder, DecoderConfig
from sinkbed.train.loop.optim import OptimizerConfig, build_optimizer, learning_rate_factor


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_decay_starts_at_the_peak_and_ends_at_the_final_fraction(schedule):
    c = OptimizerConfig(schedule=schedule, warmup_steps=10, final_fraction=0.1)
    assert [learning_rate_factor(c, s, 110) for s in (0, 4, 9)] == [0.1, 0.5, 1.0]
    assert learning_rate_factor(c, 10, 110) == 1.0
    assert learning_rate_factor(c, 60, 110) == pytest.approx(0.55)
    assert learning_rate_factor(c, 110, 110) == pytest.approx(0.1)
    factors = [learning_rate_factor(c, s, 110) for s in range(10, 111)]
    assert factors == sorted(factors, reverse=True)


def test_constant_with_cooldown():
    c = OptimizerConfig(schedule="constant", warmup_steps=2, cooldown_steps=10, final_fraction=0.0)
    factors = [learning_rate_factor(c, s, 50) for s in range(51)]
    assert factors[:2] == [0.5, 1.0] and set(factors[2:41]) == {1.0}
    assert factors[45] == pytest.approx(0.5) and factors[50] == 0.0


def test_fractions_are_shares_of_the_run():
    steps = OptimizerConfig(schedule="constant", warmup_steps=2, cooldown_steps=10, final_fraction=0.0)
    shares = OptimizerConfig(schedule="constant", warmup_fraction=0.04, cooldown_fraction=0.2, final_fraction=0.0)
    assert [learning_rate_factor(shares, s, 50) for s in range(51)] == [
        learning_rate_factor(steps, s, 50) for s in range(51)
    ]
    with pytest.raises(ValueError, match="warm-up of 20 and cooldown of 40 steps do not fit"):
        build_optimizer(
            torch.nn.Linear(2, 2), OptimizerConfig(schedule="constant", warmup_steps=20, cooldown_fraction=0.8), 50
        )


def test_decay_is_on_matrices_only():
    model = Decoder(DecoderConfig(n_layers=1, d_model=8, n_heads=2, d_ff=8, sink="learned"), 300)
    optimizer, _ = build_optimizer(model, OptimizerConfig(weight_decay=0.3), 10)
    decayed = {id(p) for g in optimizer.param_groups if g["weight_decay"] for p in g["params"]}
    names = {n: id(p) in decayed for n, p in model.named_parameters()}
    assert names["embedding.weight"] and names["blocks.0.attention.qkv.weight"] and names["head.weight"]
    assert not any(d for n, d in names.items() if "norm" in n or n.endswith("sink.weight"))
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(names)


def test_decay_is_decoupled():
    weight = torch.nn.Linear(2, 2, bias=False)
    before = weight.weight.detach().clone()
    optimizer, _ = build_optimizer(weight, OptimizerConfig(lr=0.1, weight_decay=0.5), 10)
    weight.weight.grad = torch.zeros(2, 2)
    optimizer.step()
    torch.testing.assert_close(weight.weight, before * (1 - 0.1 * 0.5))


@pytest.mark.parametrize(
    "wrong",
    [
        dict(lr=0.0),
        dict(betas=(0.9, 1.0)),
        dict(cooldown_steps=5),
        dict(cooldown_fraction=0.1),
        dict(final_fraction=2.0),
        dict(warmup_steps=5, warmup_fraction=0.1),
        dict(warmup_fraction=1.5),
    ],
)
def test_a_setting_out_of_range_or_without_effect_is_refused(wrong):
    with pytest.raises(ValueError, match="optimizer"):
        OptimizerConfig(**wrong)
