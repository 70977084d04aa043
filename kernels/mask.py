"""Which keys a query sees: one interval of keys per query, plus a prefix that every later query sees.

    query i sees key j   iff   first_key[i] <= j < end_key[i]   or   shared_from <= j < shared_prefix and j <= i

Causal, intra-document, windowed and prefix-LM masks are all of this form, so a kernel needs two integers
a query and never a T×T matrix. Row of two documents `a a a | b b b`, shared_prefix 1, one row a query:

        keys 0 1 2 3 4 5
    query 0  x
          1  x x
          2  x x x
          3  s . . x            s: visible only because of the shared prefix
          4  s . . x x
          5  s . . x x x

Shapes: B rows, T positions. Positions count from 0 in the row; ends are exclusive.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class Mask:
    """Interval mask of a batch of rows; build it with `interval_mask`, once per batch.

    Raises ValueError for tensors of the wrong shape or dtype, and for intervals that leave a query
    without itself, reach outside the row or decrease along it.
    """

    rows: int
    """B."""
    length: int
    """T."""
    first_key: Tensor | None = None
    """[B, T] int32, the first key of the interval, never decreasing along a row; None: 0 everywhere."""
    end_key: Tensor | None = None
    """[B, T] int32, the exclusive end of the interval, more than i, never decreasing along a row; None: i + 1
    everywhere (causal)."""
    shared_prefix: int = 0
    """Row positions below this are visible to every query at or after them."""
    shared_from: int = 0
    """Where the shared prefix begins: 1 where key 0 is hidden."""
    doc_start: Tensor | None = None
    """[B, T] int32, row position where the query's document starts; read by the statistics only.
    None: the row is one document."""
    _bias: dict[torch.dtype, Tensor] = field(default_factory=dict, repr=False)
    _ends: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for name in ("first_key", "end_key", "doc_start"):
            tensor = getattr(self, name)
            if tensor is None:
                continue
            if tuple(tensor.shape) != (self.rows, self.length) or tensor.dtype != torch.int32:
                raise ValueError(
                    f"{name}: expected int32 of shape [{self.rows}, {self.length}], "
                    f"received {tensor.dtype} of shape {list(tensor.shape)}"
                )
            # On an accelerator this check would stall the stream on every batch; there the builder is trusted.
            if tensor.device.type == "cpu" and not torch.compiler.is_compiling():
                self._check_values(name, tensor)
        if not 0 <= self.shared_prefix <= self.length:
            raise ValueError(f"shared_prefix: expected 0 to {self.length} (T), received {self.shared_prefix}")

    def _check_values(self, name: str, tensor: Tensor) -> None:
        index = torch.arange(self.length, dtype=torch.int32)
        if name == "end_key":
            wrong = ((tensor <= index) | (tensor > self.length)).any() or (tensor.diff(dim=1) < 0).any()
            rule = "i < end_key[i] <= T, never decreasing along a row"
        else:
            wrong = ((tensor < 0) | (tensor > index)).any() or (tensor.diff(dim=1) < 0).any()
            rule = f"0 <= {name}[i] <= i, never decreasing along a row"
        if wrong:
            raise ValueError(f"{name}: expected {rule}; the tensor received breaks this")

    @property
    def is_causal(self) -> bool:
        """Whether this is the plain causal mask, for which implementations have a faster path."""
        return self.first_key is None and self.end_key is None

    @property
    def is_document(self) -> bool:
        """Whether this is the causal mask within each document and nothing else."""
        same = self.first_key is not None and self.first_key is self.doc_start
        return same and self.end_key is None and self.shared_prefix == 0

    @property
    def shared(self) -> tuple[int, int]:
        """Where the shared prefix begins and ends; (0, 0) where it adds nothing to the intervals."""
        some = self.first_key is not None and self.shared_from < self.shared_prefix
        return (self.shared_from, self.shared_prefix) if some else (0, 0)

    # The transpose of an interval mask is one too: key j is in the interval of queries first_query[j] .. last_query[j].

    @property
    def first_query(self) -> Tensor | None:
        """[B, T] int32, the first query whose interval reaches key j; None: j itself. Cached."""
        return self._count_up_to("first_query", self.end_key)

    @property
    def last_query(self) -> Tensor | None:
        """[B, T] int32, the exclusive end of the queries whose interval has not left key j; None: T. Cached."""
        return self._count_up_to("last_query", self.first_key)

    @property
    def doc_end(self) -> Tensor | None:
        """[B, T] int32, the exclusive end of the document at position j; None: T. Cached."""
        return self._count_up_to("doc_end", self.doc_start)

    def _count_up_to(self, name: str, tensor: Tensor | None) -> Tensor | None:
        """Per row and position j, how many entries of a never-decreasing tensor [B, T] are at most j."""
        if tensor is None:
            return None
        if name not in self._ends:
            index = torch.arange(self.length, dtype=torch.int32, device=tensor.device)
            found = torch.searchsorted(
                tensor.contiguous(), index.expand_as(tensor).contiguous(), right=True, out_int32=True
            )
            self._ends[name] = found
        return self._ends[name]

    def queries_per_key(self, device: torch.device | None = None) -> Tensor:
        """[B, T] int64, how many queries see key j; at least 1."""
        device = device if device is not None else self._device()
        key = torch.arange(self.length, device=device).expand(self.rows, -1)
        first = key if self.first_query is None else self.first_query.long()
        last = torch.full_like(key, self.length) if self.last_query is None else self.last_query.long()
        # A key of the shared prefix is seen by every later query, whatever the intervals say.
        shared = (key >= self.shared_from) & (key < self.shared_prefix)
        return torch.where(shared, self.length, last) - first

    def visible(self, device: torch.device | None = None, queries: slice = slice(None)) -> Tensor:
        """The mask written out: [B, 1, M, T] bool, True where query i (second to last axis) sees key j.

        M is T, or the length of the slice of queries asked for.
        """
        device = device if device is not None else self._device()
        query = torch.arange(self.length, device=device)[queries, None]
        key = torch.arange(self.length, device=device)[None, :]
        causal = key <= query
        below_end = causal if self.end_key is None else key < self.end_key[:, queries, None]
        above_start = True if self.first_key is None else key >= self.first_key[:, queries, None]
        shared = (key >= self.shared_from) & (key < self.shared_prefix)
        visible = below_end & above_start | causal & shared
        return visible.expand(self.rows, len(query), self.length)[:, None]

    def bias(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The mask as an additive [B, 1, T, T] float: 0 where visible, -inf elsewhere. Cached per dtype,
        so that all layers of a forward pass and its backward share one."""
        if dtype not in self._bias:
            hidden = ~self.visible(device)
            self._bias[dtype] = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(
                hidden, float("-inf")
            )
        return self._bias[dtype]

    def _device(self) -> torch.device:
        for tensor in (self.first_key, self.end_key, self.doc_start):
            if tensor is not None:
                return tensor.device
        return torch.device("cpu")


def interval_mask(
    rows: int,
    length: int,
    *,
    doc_start: Tensor | None = None,
    doc_end: Tensor | None = None,
    document: bool = False,
    window: int | None = None,
    shared_prefix: int = 0,
    prefix_lm: int = 0,
    hide_first_key: bool = False,
    device: torch.device | str | None = None,
) -> Mask:
    """Build the mask of a batch from the boundaries of its documents and the strategy's mask settings.

    Args:
        rows, length: B and T.
        doc_start, doc_end: [B, T] int32, extent of the document that each position belongs to (end
            exclusive). Needed when `document` is set; else `doc_start` serves the statistics only.
        document: queries see keys of their own document only (intra-document masking, arXiv 2402.13991).
        window: queries see at most this many keys, themselves included (sliding window).
        shared_prefix: row positions below this are visible to every later query (arXiv 2504.02732, Table 2).
        prefix_lm: row positions below this see each other in both directions (arXiv 2410.10781, §4),
            within a document where `document` is set.
        hide_first_key: no query but the first sees key 0 (the inference mode `first_key_masked`).

    Raises ValueError for settings outside their range or boundaries that are missing.
    """
    if document and doc_start is None:
        raise ValueError("document: expected doc_start [B, T] with it, received None")
    if window is not None and window < 1:
        raise ValueError(f"window: expected at least 1, received {window}")
    if not 0 <= prefix_lm <= length:
        raise ValueError(f"prefix_lm: expected 0 to {length} (T), received {prefix_lm}")
    if document and prefix_lm and doc_end is None:
        raise ValueError("prefix_lm with document: expected doc_end [B, T], received None")
    if device is None:
        device = doc_start.device if doc_start is not None else "cpu"
    index = torch.arange(length, dtype=torch.int32, device=device).expand(rows, length)
    doc_start = None if doc_start is None else doc_start.contiguous()

    first_key = doc_start if document else None
    if window is not None:
        low = (index - (window - 1)).clamp_min(0)
        first_key = low if first_key is None else torch.maximum(first_key, low)
    if hide_first_key:
        low = index.clamp_max(1)
        first_key = low if first_key is None else torch.maximum(first_key, low)
    end_key = None
    if prefix_lm:
        limit = torch.full_like(index, prefix_lm)
        if document and doc_end is not None:
            limit = torch.minimum(limit, doc_end)
        end_key = torch.maximum(index + 1, torch.where(index < prefix_lm, limit, 0))
    return Mask(
        rows=rows,
        length=length,
        first_key=first_key,
        end_key=end_key,
        shared_prefix=shared_prefix if first_key is not None else 0,
        shared_from=1 if hide_first_key else 0,
        doc_start=doc_start,
    )
