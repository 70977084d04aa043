"""The decoder: embedding, pre-norm blocks, final norm, output matrix."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sinkbed.kernels import Implementation, Mask, Statistics
from sinkbed.model.attention import Operator, SelfAttention
from sinkbed.model.config import DecoderConfig
from sinkbed.model.feed_forward import FEED_FORWARDS
from sinkbed.model.loss import linear_cross_entropy
from sinkbed.model.norms import NORMS
from sinkbed.model.observe import Attentions, LayerAttention
from sinkbed.model.positions import POSITIONS, PositionEncoding


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: DecoderConfig, position: PositionEncoding) -> None:
        super().__init__()
        self.attention_norm = NORMS.make(config.norm, config)
        self.attention = SelfAttention(config, position)
        self.feed_forward_norm = NORMS.make(config.norm, config)
        self.feed_forward = FEED_FORWARDS.make(config.feed_forward, config)

    def forward(
        self,
        x: Tensor,
        prepared: Any,
        mask: Mask | None,
        *,
        statistics: bool,
        implementation: Implementation | None,
    ) -> tuple[Tensor, Statistics | None]:
        """x [B, T, C] -> [B, T, C]."""
        mixed, layer_statistics = self.attention(
            self.attention_norm(x),
            prepared,
            mask,
            statistics=statistics,
            implementation=implementation,
        )
        x = x + mixed
        return x + self.feed_forward(self.feed_forward_norm(x)), layer_statistics


class DecoderOutput(NamedTuple):
    """What a decoder returns."""

    logits: Tensor | None
    """[B, T, V], in the dtype of the compute; None where targets were given."""
    loss: Tensor | None
    """Mean negative log-likelihood of the targets that count, in nats; None without targets."""
    statistics: tuple[Statistics, ...] | None
    """One entry a layer; None unless asked for."""


class Decoder(nn.Module):
    """Llama-like decoder: RMSNorm, RoPE, SwiGLU, GQA, no biases (arXiv 2302.13971)."""

    def __init__(self, config: DecoderConfig, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = vocab_size
        self.implementation: Implementation | None = None
        self.checkpoint_activations = False
        """Whether training computes each block again in its backward pass instead of keeping what is inside."""
        self.embedding = nn.Embedding(vocab_size, config.d_model)
        self.position: PositionEncoding = POSITIONS.make(config.position, config)
        self.blocks = nn.ModuleList(Block(config, self.position) for _ in range(config.n_layers))
        self.norm = NORMS.make(config.norm, config)
        self.head = nn.Linear(config.d_model, vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw every matrix anew: normal(0, init_std), residual outputs scaled by 1/√(2L). Vectors stay as made."""
        residual = self.config.init_std / math.sqrt(2 * self.config.n_layers)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                writes_residual = name.endswith(("attention.out.weight", "feed_forward.down.weight"))
                std = residual if writes_residual else self.config.init_std
                nn.init.normal_(parameter, std=std, generator=generator)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        mask: Mask | None = None,
        *,
        targets: Tensor | None = None,
        statistics: bool = False,
    ) -> DecoderOutput:
        """Logits of the next token at every position, or the loss of given targets.

        Args:
            tokens: [B, T] token ids.
            positions: [B, T]; None counts along the row.
            mask: which keys a query sees; None is causal.
            targets: [B, T] next tokens, `loss.IGNORED` where none counts. With them the mean loss is returned
                and the logits are not kept.
            statistics: also return each layer's sink statistics.
        """
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)
        prepared = self.position.prepare(positions)
        x = self.position.embed(self.embedding(tokens), positions)
        per_layer: list[Statistics] = []
        again = self.checkpoint_activations and torch.is_grad_enabled()
        for block in self.blocks:
            call = partial(checkpoint, block, use_reentrant=False) if again else block
            x, layer = call(x, prepared, mask, statistics=statistics, implementation=self.implementation)
            if layer is not None:
                per_layer.append(layer)
        x = self.norm(x)
        seen = tuple(per_layer) if statistics else None
        if targets is None:
            return DecoderOutput(self.head(x), None, seen)
        loss = linear_cross_entropy(x.flatten(0, 1), self.head.weight, targets.flatten())
        return DecoderOutput(None, loss, seen)

    @contextmanager
    def observed(self, attention: Attentions) -> Iterator[None]:
        """Hand each layer's attention to a callback; see `model.observe`."""

        def hook(layer: int) -> Any:
            def seen(module: nn.Module, args: Any, options: dict[str, Any], output: Any) -> None:
                q, k, v, mask = args
                mask = Mask(rows=len(q), length=q.shape[2]) if mask is None else mask
                scale = q.shape[-1] ** -0.5
                attention(
                    LayerAttention(
                        layer, q, k, v, output.lse, mask, scale, None, output.statistics, options["normalizer"]
                    )
                )

            return seen

        operators = [m for m in self.modules() if isinstance(m, Operator)]
        handles = [o.register_forward_hook(hook(layer), with_kwargs=True) for layer, o in enumerate(operators)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @staticmethod
    def parameters_of(config: DecoderConfig, vocab_size: int) -> int:
        """Parameters of a decoder that is not built: of one layer, and of each further one."""
        with torch.device("meta"):
            one, two = (
                Decoder(dataclasses.replace(config, n_layers=layers), vocab_size).parameter_count() for layers in (1, 2)
            )
        return one + (config.n_layers - 1) * (two - one)

    def parameter_count(self) -> int:
        """Number of parameters, tied ones once."""
        return sum(p.numel() for p in self.parameters())
