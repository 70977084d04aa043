"""Plain definitions to hold components of the model against, and how two functions are held to be the same."""

import torch

from sinkbed.model.attention import ForwardPass
from sinkbed.model.config import DecoderConfig
from sinkbed.model.positions import POSITIONS


def config(**changes) -> DecoderConfig:
    """A small decoder with two query heads a key head, and without positions."""
    shape = dict(n_layers=2, d_model=20, n_heads=4, n_kv_heads=2, head_dim=6, d_ff=28, position="none")
    return DecoderConfig(**{**shape, **changes})


def drawn(module: torch.nn.Module) -> torch.nn.Module:
    """The module in float64 with every parameter drawn anew, so that none is a 0 or a 1 that hides something."""
    generator = torch.Generator().manual_seed(1)
    for parameter in module.double().parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5
    return module


def stream(*shape: int) -> torch.Tensor:
    """Something to feed a component: [B, T, C] unless told otherwise."""
    return torch.randn(shape or (2, 9, 20), generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def assert_same(ours, plain, module: torch.nn.Module, x: torch.Tensor, atol: float = 1e-10) -> None:
    """Hold two functions of x to each other: the output, and the gradients of x and of each of the parameters."""
    inputs = [x.requires_grad_(), *module.parameters()]
    outputs = [function(x) for function in (ours, plain)]
    torch.testing.assert_close(*outputs, atol=atol, rtol=atol)
    weight = torch.linspace(-1, 1, outputs[0].numel(), dtype=x.dtype).view_as(outputs[0])
    actual, expected = (torch.autograd.grad((output * weight).sum(), inputs) for output in outputs)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, atol=atol, rtol=atol)
        assert b.any(), "a gradient of zeros would compare nothing"


def forward_pass(c: DecoderConfig, length: int = 9, **changes) -> ForwardPass:
    """What layers share, for rows of this length."""
    position = POSITIONS.make(c.position, c)
    prepared = position.prepare(torch.arange(length))
    common = dict(position=position, prepared=prepared, mask=None, statistics=True, implementation=None)
    return ForwardPass(**{**common, **changes})


def projections(attention, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values of `SelfAttention`, [B, T, H or Hkv, D]."""
    c = attention.config
    return (x @ attention.qkv.weight.T).unflatten(-1, (-1, c.dim)).split([c.n_heads, c.key_heads, c.key_heads], dim=2)


def heads(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra=None, bias=0.0) -> torch.Tensor:
    """Causal softmax attention of the textbook, [B, T, H, D]; `extra` is a key and a value [H, D] that all see."""
    q, k, v = (y.repeat_interleave(q.shape[2] // y.shape[2], dim=2).transpose(1, 2) for y in (q, k, v))
    T = q.shape[2]
    hidden = torch.ones(T, T, dtype=torch.bool).triu(1)
    if extra is not None:
        k, v = (
            torch.cat([e[None, :, None].expand(len(y), -1, 1, -1), y], 2) for e, y in zip(extra, (k, v), strict=True)
        )
        hidden = torch.cat([torch.zeros(T, 1, dtype=torch.bool), hidden], 1)
    logits = q @ k.mT / q.shape[-1] ** 0.5 + bias
    return (logits.masked_fill(hidden, -torch.inf).softmax(-1) @ v).transpose(1, 2)


def numbers(value, path=()):
    """Every number of a nested value, with where it is."""
    if isinstance(value, dict):
        for key, inside in value.items():
            yield from numbers(inside, (*path, key))
    elif isinstance(value, list):
        for index, inside in enumerate(value):
            yield from numbers(inside, (*path, index))
    elif isinstance(value, int | float):
        yield path, value
