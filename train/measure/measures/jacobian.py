"""The Jacobian ∂v_j^(l) / ∂v_i^(0) of a row's last token j: how much each source i moves it (arXiv 2504.02732, §3).

v^(l) are the hidden states of layer l; l = 0 is what the first block reads. Exact by one vector-Jacobian product for
each channel of v_j; else estimated as Hutch++ does (arXiv 2010.09649): half of the directions span what moves most,
found by Jacobian-vector products with noise on the sources, and their part is exact; the other half are drawn at random
from the rest, and their part has an error that their spread tells.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from sinkbed.kernels import Mask
from sinkbed.model.observe import evaluating, input_device, observing
from sinkbed.train.measure.excerpts import Excerpts, hidden_states
from sinkbed.train.measure.inputs import Arranged
from sinkbed.train.measure.measures import Column, Layers, register_measure


def _step(dtype: torch.dtype) -> float:
    """Size of the noise of the Jacobian-vector products, relative to the sources: above what the dtype rounds away, and
    small enough to find a subspace."""
    return max(1e-3, 8 * torch.finfo(dtype).eps)


@dataclass(frozen=True, kw_only=True)
class Jacobian:
    """Frobenius norm of ∂v_j^(l) / ∂v_i^(0) for the last token j of a row, mean over documents."""

    layers: list[int]
    """The l measured: evenly spaced, the last among them."""
    norm: list[list[float]]
    """[layers][T] for each source i."""
    error: list[list[float]]
    """[layers][T] standard error of `norm` that the sampling of directions leaves; 0 where exact."""
    others: list[float]
    """[layers] mean over the sources of text before j, the first token of the row left out."""
    others_error: list[float]
    """[layers] standard error of `others` from the sampling of directions (its sources share them)."""
    across: list[float]
    """[layers] standard error of `others` over documents; 0 with one."""
    spectral: list[list[float]] | None
    """[layers][T] largest singular value; where exact."""
    directions: int
    """Output directions taken: the width of the model where exact."""


def _sparse(result: Any, key: str) -> Layers:
    values = dict(zip(result["layers"], result[key], strict=True))
    return [values.get(layer) for layer in range(result["layers"][-1] + 1)]


@register_measure(
    "jacobian",
    group="mixing",
    columns=(
        Column("others", "‖∂v_last/∂vᵢ‖", "mixing/jacobian/{mode}", _sparse, error="across"),
        Column("others_error", "± directions", read=_sparse),
        Column("across", "± documents", read=_sparse),
    ),
    note="‖∂v_last/∂vᵢ‖: Frobenius norm, mean over the text tokens i before the last. ±: standard errors, over "
    "documents and of the directions drawn.",
    options=("directions",),
    documents="jacobian_documents",
    live={"directions": 8, "most_layers": 1},
    live_documents=2,
    differentiates=True,
)
def measure_jacobian(
    model: Any,
    excerpts: Excerpts,
    batch_tokens: int,
    *,
    directions: int | Literal["exact"] = 16,
    most_layers: int = 8,
    seed: int = 0,
) -> Jacobian:
    """Norms of the Jacobian of the last token of each document.

    Args:
        directions: vector-Jacobian products a document and layer, at least 4; exact too where they are as many as the
            model is wide. Drawn anew for each document, from generators of their own.
        most_layers: measured at most.

    Raises ValueError for too few directions.
    """
    if directions != "exact" and directions < 4:
        raise ValueError(f"directions: expected at least 4, or exact, got {directions}")
    last = int(model.config.n_layers)
    count = min(last, most_layers)
    layers = sorted({round((i + 1) * last / count) for i in range(count)})
    device, width = input_device(model), 0
    norms, errors, others, others_errors, spectral = [], [], [], [], []
    with evaluating(model):
        for number in range(len(excerpts.rows)):
            _, row = excerpts.batch(slice(number, number + 1), device)
            generator = torch.Generator().manual_seed(seed * 1_000_003 + excerpts.rows[number])
            document = _document(model, row, layers, batch_tokens, directions, generator)
            width = document.width
            norm, error = document.norms()
            norms.append(norm)
            errors.append(error)
            sources = row.slots[(row.slots > 0) & (row.slots < row.tokens.shape[1] - 1)].cpu()
            others.append(norm[:, sources].mean(-1))
            others_errors.append(document.mean_error(sources, norm))
            if document.spectral is not None:
                spectral.append(document.spectral)
    documents = len(norms)
    across = torch.stack(others).std(0) / math.sqrt(documents) if documents > 1 else torch.zeros(len(layers))
    return Jacobian(
        layers=layers,
        norm=torch.stack(norms).mean(0).tolist(),
        error=(torch.stack(errors).square().sum(0).sqrt() / documents).tolist(),
        others=torch.stack(others).mean(0).tolist(),
        others_error=(torch.stack(others_errors).square().sum(0).sqrt() / documents).tolist(),
        across=across.tolist(),
        spectral=torch.stack(spectral).mean(0).tolist() if spectral else None,
        directions=width if directions == "exact" else min(directions, width),
    )


@dataclass(frozen=True, eq=False)
class _Document:
    """Squared norms of one row: an exact part, and estimates of the rest."""

    known: Tensor
    """[layers, T] ‖QᵀJ‖² of the directions that span what moves most, or of all."""
    drawn: Tensor | None
    """[layers, m, T] estimates of ‖(1 − QQᵀ)J‖², one a direction; None where exact."""
    rest: int
    """Directions that the drawn ones are drawn from."""
    width: int
    spectral: Tensor | None

    def norms(self) -> tuple[Tensor, Tensor]:
        """[layers, T] norm, and its standard error."""
        if self.drawn is None:
            return self.known.sqrt(), torch.zeros_like(self.known)
        norm = (self.known + self.drawn.mean(1)).sqrt()
        return norm, self._deviation(self.drawn) / (2 * norm).clamp_min(torch.finfo(norm.dtype).tiny)

    def mean_error(self, sources: Tensor, norm: Tensor) -> Tensor:
        """[layers] standard error of the mean norm over some sources, which the same directions move together."""
        if self.drawn is None:
            return torch.zeros(len(self.known), dtype=self.known.dtype)
        slope = 1 / (2 * norm[:, sources]).clamp_min(torch.finfo(norm.dtype).tiny) / len(sources)
        return self._deviation((self.drawn[:, :, sources] * slope[:, None]).sum(-1))

    def _deviation(self, values: Tensor) -> Tensor:
        """Standard error of a mean over dimension 1, of `rest` values whose sum is fixed and none is drawn twice."""
        count = values.shape[1]
        return values.std(1) * math.sqrt(max(0.0, 1 - (count - 1) / max(1, self.rest - 1)) / count)


def _document(
    model: Any,
    row: Arranged,
    layers: Sequence[int],
    batch_tokens: int,
    directions: int | Literal["exact"],
    generator: torch.Generator,
) -> _Document:
    size = max(1, batch_tokens // row.tokens.shape[1])
    source = _sources(model, row)
    width = source.shape[-1]
    if directions == "exact" or directions >= width:
        every = torch.eye(width).expand(len(layers), -1, -1)
        squares, gradients = _products(model, row, layers, every, size, keep=directions == "exact")
        spectral = None
        if directions == "exact":
            spectral = torch.stack([torch.linalg.matrix_norm(g.transpose(0, 1), ord=2) for g in gradients])
        return _Document(squares.sum(1), None, 0, width, spectral)
    known = directions // 2
    span = _span(model, row, layers, source, known, size, generator)  # [layers, width, known]
    noise = torch.randn(len(layers), width, directions - known, generator=generator)
    noise -= span @ (span.transpose(1, 2) @ noise)
    drawn = torch.linalg.qr(noise).Q * math.sqrt(width - known)  # orthogonal to one another: only a lower variance
    u = torch.cat([span, drawn], 2).transpose(1, 2)
    squares, _ = _products(model, row, layers, u, size)
    return _Document(squares[:, :known].sum(1), squares[:, known:], width - known, width, None)


def _sources(model: Any, row: Arranged) -> Tensor:
    """[1, T, C] what the first block reads."""
    sources: list[Tensor] = []

    def keep(layer: int, h: Tensor) -> None:
        if layer == 0:
            sources.append(h)

    with torch.no_grad(), observing(model, hidden=keep):
        model(row.tokens, mask=row.mask, logits=False)
    return sources[0]


def _span(
    model: Any,
    row: Arranged,
    layers: Sequence[int],
    source: Tensor,
    count: int,
    size: int,
    generator: torch.Generator,
) -> Tensor:
    """[layers, C, count] orthonormal: how v_last moves when the sources before it do, in so many random ways."""
    moves: list[list[Tensor]] = [[] for _ in layers]
    noise = torch.randn(count, *source.shape[1:], generator=generator).to(source)
    noise[:, -1] = 0  # its own way through the residual stream would hide the others'
    noise *= _step(source.dtype) * source.norm(dim=-1, keepdim=True) / math.sqrt(source.shape[-1])
    for part in noise.split(size):
        ends = []
        for sign in (1, -1):
            end: list[Tensor] = []

            def moved(layer: int, h: Tensor, by: Tensor = sign * part, end: list[Tensor] = end) -> Tensor | None:
                end.append(h[:, -1].float().cpu())
                return h + by if layer == 0 else None

            with torch.no_grad(), observing(model, hidden=moved):
                model(row.tokens.expand(len(part), -1), mask=_repeated(row.mask, len(part)), logits=False)
            ends.append(end)
        for index, layer in enumerate(layers):
            moves[index].append(ends[0][layer] - ends[1][layer])
    return torch.stack([torch.linalg.qr(torch.cat(m).T).Q for m in moves])


def _products(
    model: Any, row: Arranged, layers: Sequence[int], u: Tensor, size: int, *, keep: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """uᵀJ for each row of u [layers, n, C]: squared norms [layers, n, T] in float64, and where kept itself, [n, T, C]
    a layer. The document's row is repeated, so that a backward pass takes several directions."""
    squares: list[list[Tensor]] = [[] for _ in layers]
    kept: list[list[Tensor]] = [[] for _ in layers]
    for at in range(0, u.shape[1], size):
        part = u[:, at : at + size]
        rows = part.shape[1]
        several = row.tokens.expand(rows, -1)
        states, _ = hidden_states(model, partial(model, several, mask=_repeated(row.mask, rows), logits=False))
        for index, layer in enumerate(layers):
            into = torch.zeros_like(states[layer])
            into[:, -1] = part[index].to(into)
            more = index + 1 < len(layers)
            (gradient,) = torch.autograd.grad(states[layer], states[0], into, retain_graph=more)
            gradient = gradient.double().cpu()
            squares[index].append(gradient.square().sum(-1))
            if keep:
                kept[index].append(gradient)
    return torch.stack([torch.cat(s) for s in squares]), [torch.cat(k) for k in kept if k]


def _repeated(mask: Mask | None, rows: int) -> Mask | None:
    """The mask of one row, for several."""
    if mask is None:
        return None
    wide = {
        name: getattr(mask, name).expand(rows, -1).contiguous()
        for name in ("first_key", "end_key", "doc_start")
        if getattr(mask, name) is not None
    }
    return replace(mask, rows=rows, **wide)
