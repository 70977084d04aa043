"""From documents to batches of rows: sources, tokenizer, token store, packing, order, batches.

This package knows nothing of models or kernels. Importing it imports neither torch nor datasets: the
command line's help and configs stay fast, and each public name is loaded on first use. The audit is
`from data.audit import audit`; its module carries the same name, so it is not re-exported here.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data.batches import Batch, Rows, RowSampler
    from data.store import TokenStore
    from data.strategy import Strategy

__all__ = ["Batch", "RowSampler", "Rows", "Strategy", "TokenStore"]

_HOME = {
    "Batch": "data.batches",
    "RowSampler": "data.batches",
    "Rows": "data.batches",
    "Strategy": "data.strategy",
    "TokenStore": "data.store",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'data' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
