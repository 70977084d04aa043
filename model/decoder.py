"""The decoder: embedding, blocks, final norm, output matrix."""

import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sinkbed.kernels import Implementation, Mask, Statistics
from sinkbed.model.attention import ForwardPass, Operator, scoring_of
from sinkbed.model.blocks import BLOCKS
from sinkbed.model.config import DecoderConfig
from sinkbed.model.initializers import INITIALIZERS
from sinkbed.model.loss import linear_cross_entropy, token_nll
from sinkbed.model.norms import NORMS
from sinkbed.model.observe import Attentions, LayerAttention
from sinkbed.model.positions import POSITIONS, PositionEncoding
from sinkbed.model.registers import with_registers, without_registers


class DecoderOutput(NamedTuple):
    """What a decoder returns."""

    logits: Tensor | None
    """[B, T, V], in the dtype of the compute; None where targets were given, or no logits asked for."""
    loss: Tensor | None
    """Mean negative log-likelihood of the targets that count, in nats; None without targets."""
    statistics: tuple[Statistics, ...] | None
    """One entry a layer; None unless asked for."""
    nll: Tensor | None = None
    """[B, T] negative log-likelihood, nats, of each of the `next_tokens`; None without them."""


class Decoder(nn.Module):
    """By default Llama-like: pre-norm, RMSNorm, RoPE, SwiGLU, GQA, no biases (arXiv 2302.13971)."""

    def __init__(self, config: DecoderConfig, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = vocab_size
        self.implementation: Implementation | None = None
        self.checkpoint_activations = False
        """Whether training computes each block again in its backward pass instead of keeping what is inside."""
        self.embedding = nn.Embedding(vocab_size, config.d_model)
        self.registers = nn.Parameter(torch.empty(config.n_registers, config.d_model)) if config.n_registers else None
        self.position: PositionEncoding = POSITIONS.make(config.position, config)
        blocks = [BLOCKS.make(config.block, config, layer) for layer in range(config.n_layers)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = NORMS.make(config.norm, config) if blocks[0].norm_at_end else nn.Identity()
        self.head = nn.Linear(config.d_model, vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw every matrix anew, as `config.init` says. Vectors stay as made."""
        std = INITIALIZERS.make(self.config.init, self.config)
        for name, parameter in self.named_parameters():
            if parameter.ndim >= 2:
                nn.init.normal_(parameter, std=std(name, parameter), generator=generator)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        mask: Mask | None = None,
        *,
        targets: Tensor | None = None,
        next_tokens: Tensor | None = None,
        logits: bool = True,
        statistics: bool = False,
    ) -> DecoderOutput:
        """Logits of the next token at every position, or the loss of given targets.

        Args:
            tokens: [B, T] token ids.
            positions: [B, T]; None counts along the row.
            mask: which keys a query sees; None is causal.
            targets: [B, T] next tokens, `loss.IGNORED` where none counts. With them the mean loss is returned
                and the logits are not kept (in half precision, or on a GPU compiled or in autocast, they are).
            next_tokens: [B, T], as targets: the loss of each is returned, its logits made a block at a time.
            logits: whether they are wanted.
            statistics: also return each layer's sink statistics.

        Raises ValueError for rows longer than the position encoding has positions, and for both targets and
        next_tokens.
        """
        most = self.position.max_length
        if most is not None and tokens.shape[1] > most:
            raise ValueError(f"tokens: expected at most the {most} positions of this model, got {tokens.shape[1]}")
        if targets is not None and next_tokens is not None:
            raise ValueError("targets: expected none beside next_tokens, got both")
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.position.embed(self.embedding(tokens), positions)
        if self.registers is not None:
            count = len(self.registers)
            mask = Mask(rows=len(x), length=x.shape[1]) if mask is None else mask
            mask = with_registers(mask, count, x.device)
            x = torch.cat([self.registers.to(x.dtype).expand(len(x), -1, -1), x], dim=1)
            before = torch.arange(-count, 0, device=x.device).expand(*positions.shape[:-1], -1)
            positions = torch.cat([before, positions], dim=-1)
        run = ForwardPass(
            position=self.position,
            prepared=self.position.prepare(positions),
            mask=mask,
            statistics=statistics,
            implementation=self.implementation,
        )
        per_layer: list[Statistics] = []
        again = self.checkpoint_activations and torch.is_grad_enabled()
        for block in self.blocks:
            call = partial(checkpoint, block, use_reentrant=False) if again else block
            x, layer = call(x, run)
            if layer is not None:
                per_layer.append(layer)
        x = self.norm(x[:, self.config.n_registers :])
        seen = tuple(per_layer) if statistics else None
        if next_tokens is not None:
            return DecoderOutput(None, None, seen, token_nll(self.head, x, next_tokens, self.vocab_size))
        if targets is None:
            return DecoderOutput(self.head(x) if logits else None, None, seen)
        loss = linear_cross_entropy(x.flatten(0, 1), self.head.weight, targets.flatten())
        return DecoderOutput(None, loss, seen)

    @contextmanager
    def observed(self, attention: Attentions) -> Iterator[None]:
        """Hand each layer's attention to a callback; see `model.observe`."""

        def seen(layer: int, module: nn.Module, args: Any, options: dict[str, Any], output: Any) -> None:
            q, k, v, mask = args
            if self.registers is not None:
                mask = without_registers(mask, len(self.registers))
                q, k, v, lse = (each[:, :, len(self.registers) :] for each in (q, k, v, output.lse))
            else:
                mask, lse = Mask(rows=len(q), length=q.shape[2]) if mask is None else mask, output.lse
            scoring, implementation = scoring_of(q, options), options["implementation"]
            attention(LayerAttention(layer, q, k, v, lse, mask, scoring, output.statistics, implementation))

        operators = [m for m in self.modules() if isinstance(m, Operator)]
        with ExitStack() as stack:
            for layer, operator in enumerate(operators):
                hook = operator.register_forward_hook(partial(seen, layer), with_kwargs=True)
                stack.callback(hook.remove)
            yield

    @staticmethod
    def parameters_of(config: DecoderConfig, vocab_size: int) -> int:
        """Parameters of a decoder that is not built: of its first layers, two at most, and of each further one."""
        first = min(2, config.n_layers)
        with torch.device("meta"):
            few, more = (
                Decoder(dataclasses.replace(config, n_layers=layers), vocab_size).parameter_count()
                for layers in (first, first + 1)
            )
        return few + (config.n_layers - first) * (more - few)

    def parameter_count(self) -> int:
        """Number of parameters, tied ones once."""
        return sum(p.numel() for p in self.parameters())
