"""Schedules, parameter groups, and a step of each optimizer against its formula."""

import sys

import pytest
import torch

from sinkbed.model import Decoder, DecoderConfig
from sinkbed.train import loop
from sinkbed.train.loop import trainer
from sinkbed.train.loop.optim import OptimizerConfig, build_optimizer, decay_until, learning_rate_factor
from sinkbed.train.loop.optimizers import OPTIMIZERS
from sinkbed.train.loop.settings import training_bytes


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


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("adamw", dict(betas=[0.9, 1.0])),
        ("adamw", dict(eps=0.0)),
        ("adamw", dict(betas=[0.9])),
        ("adamw", dict(betas=["0.9", 0.95])),
        ("sgd", dict(momentum=1.0)),
        ("sgd", dict(nesterov=True, momentum=0.0)),
        ("muon", dict(momentum=-0.1)),
        ("muon", dict(betas=[float("nan"), 0.95])),
        ("lion", dict(betas=[0.9, float("inf")])),
        ("soap", dict(frequency=0)),
    ],
)
def test_an_option_out_of_range_is_refused(name, wrong):
    if name in ("lion", "soap"):
        pytest.importorskip("pytorch_optimizer")
    with pytest.raises(ValueError, match=rf"model\.optimizer\.name\.{name}\.{next(iter(wrong))}: expected"):
        build_optimizer(decoder(), OptimizerConfig(name={name: wrong}), 10)


def test_an_option_is_the_same_as_a_list_and_as_a_tuple():
    ours = OptimizerConfig(name={"adamw": {"betas": (0.8, 0.9)}})
    assert ours == OptimizerConfig(name={"adamw": {"betas": [0.8, 0.9]}})
    optimizer, _ = build_optimizer(decoder(), ours, 10)
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.9)


def test_a_missing_package_names_the_extra(monkeypatch):
    for name in ("sinkbed.train.loop.optimizers.lion", "sinkbed.train.loop.extra_optimizers"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.delitem(OPTIMIZERS._variants, "lion", raising=False)
    monkeypatch.delattr(loop, "extra_optimizers", raising=False)
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    with pytest.raises(ValueError, match=r"pytorch-optimizer, got none; pip install -e '.\[optimizers\]'"):
        training_bytes(OptimizerConfig(name="lion"))


def test_what_a_run_checks_before_it_starts(fit, capsys, monkeypatch):
    """Options of the optimizer, and whether it takes sharded parameters; and no random number is drawn for it."""
    pytest.importorskip("pytorch_optimizer")
    assert fit("--model.optimizer.name", "{adamw: {eps: -1}}")[0] == 1
    assert "model.optimizer.name.adamw.eps: expected more than 0, got -1" in capsys.readouterr().err
    status, folder = fit("--model.optimizer.name", "soap", "--trainer.strategy", "fsdp2")
    assert status == 1 and not folder.exists()
    assert "expected one that works on sharded matrices beside trainer.strategy fsdp2" in capsys.readouterr().err
    states = []
    original = trainer.check_settings

    def watched(config):
        states.append(torch.get_rng_state())
        original(config)
        states.append(torch.get_rng_state())
        raise ValueError("stop here")

    monkeypatch.setattr(trainer, "check_settings", watched)
    assert fit()[0] == 1
    assert torch.equal(*states)


def test_accumulated_decay_is_the_sum_of_rates_times_decay_whatever_it_goes_on_from():
    c = OptimizerConfig(lr=0.3, weight_decay=0.2, warmup_steps=3, final_fraction=0.0)
    expected = sum(0.3 * learning_rate_factor(c, step, 20) * 0.2 for step in range(17))
    whole = decay_until(c, 17, 20)
    assert whole == pytest.approx(expected)
    assert decay_until(c, 17, 20, since=(5, decay_until(c, 5, 20))) == whole, "bit for bit"
    assert decay_until(OptimizerConfig(weight_decay=0.0), 20, 20) == 0


def decoder():
    torch.manual_seed(0)
    return Decoder(DecoderConfig(n_layers=1, d_model=8, n_heads=2, d_ff=12, sink="kv_bias"), 40)


def steps_of(name, count=3, **options):
    """Weights of a decoder before and after steps at one learning rate, and the gradients that were given."""
    model = decoder()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    settings = OptimizerConfig(name={name: options}, lr=0.01, weight_decay=0.5, schedule="constant")
    optimizer, schedule = build_optimizer(model, settings, 10)
    gradients = []
    for step in range(count):
        generator = torch.Generator().manual_seed(step)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
        optimizer.step()
        schedule.step()
    return before, dict(model.named_parameters()), gradients, optimizer


def decay_of(weight):
    return 1 - 0.01 * 0.5 * (weight.ndim > 1)


def adamw(weight, gradients, betas=(0.9, 0.95), eps=1e-8):
    m = v = torch.zeros_like(weight)
    for n, g in enumerate(gradients, 1):
        m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g**2
        step = (m / (1 - betas[0] ** n)) / ((v / (1 - betas[1] ** n)).sqrt() + eps)
        weight = weight * decay_of(weight) - 0.01 * step
    return weight


def sgd(weight, gradients, momentum=0.9):
    b = torch.zeros_like(weight)
    for g in gradients:
        b = momentum * b + g
        weight = weight * decay_of(weight) - 0.01 * b
    return weight


def lion(weight, gradients, betas=(0.9, 0.99)):
    m = torch.zeros_like(weight)
    for g in gradients:
        weight = weight * decay_of(weight) - 0.01 * (betas[0] * m + (1 - betas[0]) * g).sign()
        m = betas[1] * m + (1 - betas[1]) * g
    return weight


def muon(weight, gradients, momentum=0.95):
    """As its paper: five Newton-Schulz steps of a Nesterov momentum, scaled to AdamW's size."""
    b = torch.zeros_like(weight)
    for g in gradients:
        b = momentum * b + (1 - momentum) * g
        x = (momentum * b + (1 - momentum) * g).bfloat16()
        x = x.T if (tall := len(x) > x.shape[1]) else x
        x = x / x.norm()
        for _ in range(5):
            a = x @ x.T
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        x = (x.T if tall else x).float()
        weight = weight * decay_of(weight) - 0.01 * 0.2 * max(weight.shape) ** 0.5 * x
    return weight


@pytest.mark.parametrize(
    ("name", "plain", "options"),
    [
        ("adamw", adamw, {}),
        ("adamw", adamw, {"betas": (0.5, 0.7), "eps": 1e-3}),
        ("sgd", sgd, {}),
        ("sgd", sgd, {"momentum": 0.3}),
        ("lion", lion, {}),
        ("lion", lion, {"betas": (0.5, 0.7)}),
        ("muon", None, {}),
        ("muon", None, {"momentum": 0.6}),
    ],
)
def test_steps_are_those_of_the_formula(name, plain, options):
    if name == "lion":
        pytest.importorskip("pytorch_optimizer")
    before, after, gradients, _ = steps_of(name, **options)
    for parameter, weight in before.items():
        of_matrix = parameter.startswith("blocks") and parameter.endswith("weight") and weight.ndim == 2
        formula = plain or (muon if of_matrix else adamw)
        used = {} if plain is None and not of_matrix else options
        expected = formula(weight, [g[parameter] for g in gradients], **used)
        tolerance = 1e-3 if formula is muon else 1e-6  # its products are in bfloat16
        torch.testing.assert_close(after[parameter], expected, atol=tolerance, rtol=tolerance, msg=parameter)
        assert not torch.equal(after[parameter], weight)


def test_muon_orthogonalises_the_steps_of_weight_matrices_and_of_nothing_else():
    before, after, _, optimizer = steps_of("muon", count=1)
    moved = {name: (after[name] - before[name] * decay_of(before[name])).detach() for name in before}
    for name in ("blocks.0.attention.qkv.weight", "blocks.0.feed_forward.down.weight"):
        sizes = torch.linalg.svdvals(moved[name]) / (0.01 * 0.2 * max(moved[name].shape) ** 0.5)
        assert (sizes > 0.6).all() and (sizes < 1.3).all(), sizes
    for name in ("embedding.weight", "head.weight", "norm.weight", "blocks.0.attention.sink.k"):
        torch.testing.assert_close(moved[name].abs(), torch.full_like(moved[name], 0.01), atol=1e-5, rtol=1e-3)
    kept = {name: len(optimizer.state[p]) for name, p in after.items()}
    assert kept["blocks.0.attention.out.weight"] == 1 and kept["embedding.weight"] == 3


def test_soap_is_adam_in_the_eigenbases_of_its_first_gradient():
    """The first step gathers; the second is Adam's first, whose every element is a sign, in the turned axes."""
    pytest.importorskip("pytorch_optimizer")
    before, after, gradients, optimizer = steps_of("soap", count=2)
    for name in ("blocks.0.attention.out.weight", "embedding.weight", "norm.weight"):
        weight = before[name].view(len(before[name]), -1)
        first, second = (g[name].view_as(weight) for g in gradients)
        left = torch.linalg.eigh(first @ first.T)[1] if name.startswith("blocks") else torch.eye(len(weight))
        right = torch.linalg.eigh(first.T @ first)[1]
        step = left @ (left.T @ second @ right).sign() @ right.T
        expected = (weight - 0.01 * step) * decay_of(before[name])
        torch.testing.assert_close(after[name].view_as(weight), expected, atol=1e-4, rtol=1e-3)
    widths = {name: [len(m) for m in optimizer.state[p]["GG"]] for name, p in after.items()}
    assert widths["blocks.0.feed_forward.down.weight"] == [8, 12] and widths["embedding.weight"] == [0, 8]
