"""From documents to batches of rows: sources, tokenizer, token store, packing, order, batches.

This package knows nothing of models or kernels. Importing it imports neither torch nor datasets: the
command line's help and configs stay fast, and each public name is loaded on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sinkbed.data.pack.batches import Batch, RowLoader, Rows, RowSampler
    from sinkbed.data.pack.strategy import Strategy
    from sinkbed.data.store.token_store import TokenStore

__all__ = ["Batch", "RowLoader", "RowSampler", "Rows", "Strategy", "TokenStore"]

_HOME = {
    **dict.fromkeys(("Batch", "RowLoader", "RowSampler", "Rows"), "sinkbed.data.pack.batches"),
    "Strategy": "sinkbed.data.pack.strategy",
    "TokenStore": "sinkbed.data.store.token_store",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'sinkbed.data' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
