"""Inputs of the attention operator, and masks of every kind."""

import torch


def boundaries(lengths: list[int], rows: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """doc_start, doc_end [rows, T] of documents of these lengths."""
    start, end, at = [], [], 0
    for length in lengths:
        start += [at] * length
        end += [at + length] * length
        at += length
    as_tensor = lambda x: torch.tensor([x] * rows, dtype=torch.int32)  # noqa: E731
    return as_tensor(start), as_tensor(end)


def inputs(B, H, Hkv, T, D, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = [(B, H, T, D), (B, Hkv, T, D), (B, Hkv, T, D)]
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


MASKS = {
    "causal": lambda s, e: dict(),
    "document": lambda s, e: dict(document=True),
    "document, first position shared": lambda s, e: dict(document=True, shared_prefix=1),
    "document, three positions shared": lambda s, e: dict(document=True, shared_prefix=3),
    "window 1": lambda s, e: dict(window=1),
    "window 5": lambda s, e: dict(window=5),
    "window 5, two shared": lambda s, e: dict(window=5, shared_prefix=2),
    "document, window 4": lambda s, e: dict(document=True, window=4),
    "prefix LM": lambda s, e: dict(prefix_lm=6),
    "document, prefix LM": lambda s, e: dict(document=True, prefix_lm=9),
    "first key hidden": lambda s, e: dict(hide_first_key=True),
    "first key hidden, window 5, three shared": lambda s, e: dict(hide_first_key=True, window=5, shared_prefix=3),
}
