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

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class Mask:
    """Interval mask of a batch of rows; build it with `interval_mask`, once per batch.

    Raises ValueError for tensors of the wrong shape, dtype or device, and for intervals that leave a query without
    itself, reach outside the row or decrease along it. Values are looked at once a mask, when it is built: on CUDA and
    ROCm without waiting for them, by an assertion on the device that stops the process; inside torch.compile not at
    all.
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
    # Computed from the fields, and not taken along by `dataclasses.replace`.
    _bias: dict[torch.dtype, Tensor] = field(default_factory=dict, init=False, repr=False)
    _ends: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        device = None
        kept: dict[int, Tensor] = {}
        for name in ("first_key", "end_key", "doc_start"):
            tensor = getattr(self, name)
            if tensor is None:
                continue
            _check_positions(name, tensor, self.rows, self.length, device)
            device = tensor.device
            # The kernels count on it. One tensor under two names stays one: `is_document` looks at that.
            object.__setattr__(self, name, kept.setdefault(id(tensor), tensor.contiguous()))
            if not torch.compiler.is_compiling() and (name == "doc_start" or tensor is not self.doc_start):
                self._check_values(name, tensor)
        for name in ("shared_prefix", "shared_from"):
            _check_setting(name, getattr(self, name), self.length)
        if not torch.compiler.is_compiling():
            # Now, not on first use: a compiled function that finds other cached tensors than before compiles anew.
            _ = self.first_query, self.last_query
            if device is not None and device.type != "cpu":
                _ = self.doc_end

    def _check_values(self, name: str, tensor: Tensor) -> None:
        index = torch.arange(self.length, dtype=torch.int32, device=tensor.device)
        decreasing = F.pad(tensor.diff(dim=1) < 0, (1, 0))
        if name == "end_key":
            outside = (tensor <= index) | (tensor > self.length)
            rule = "i < end_key[i] <= T, never decreasing along a row"
        else:
            outside = (tensor < 0) | (tensor > index)
            rule = f"0 <= {name}[i] <= i, never decreasing along a row"
        _refuse(outside | decreasing, name, tensor, rule)
        if name == "doc_start":
            # Clamped: on a GPU the assertion above has not been looked at yet.
            start = tensor.gather(1, tensor.clamp(0, self.length - 1).long())
            _refuse(start != tensor, name, tensor, "a document's first position to start it: s[s[i]] == s[i]")

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
        adds = self.first_key is not None and self.shared_from < self.shared_prefix
        return (self.shared_from, self.shared_prefix) if adds else (0, 0)

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
        if self.doc_start is self.first_key:
            return self.last_query
        return self._count_up_to("doc_end", self.doc_start)

    def _count_up_to(self, name: str, tensor: Tensor | None) -> Tensor | None:
        """Per row and position j, how many entries of a never-decreasing tensor [B, T] are at most j."""
        if tensor is None:
            return None
        if name not in self._ends:
            with torch.inference_mode(False):  # what is cached may be saved for a later backward pass
                index = torch.arange(self.length, dtype=torch.int32, device=tensor.device)
                every = index.repeat(self.rows, 1)
                self._ends[name] = torch.searchsorted(tensor, every, right=True, out_int32=True)
        return self._ends[name]

    def queries_per_key(self, device: torch.device | None = None) -> Tensor:
        """[B, T] int64, how many queries see key j; at least 1."""
        key = torch.arange(self.length, device=device or self.device).expand(self.rows, -1)
        first = key if self.first_query is None else self.first_query.long()
        last = torch.full_like(key, self.length) if self.last_query is None else self.last_query.long()
        # A key of the shared prefix is seen by every later query, whatever the intervals say.
        shared = (key >= self.shared_from) & (key < self.shared_prefix)
        return torch.where(shared, self.length, last) - first

    def visible(
        self, device: torch.device | None = None, queries: slice = slice(None), rows: slice = slice(None)
    ) -> Tensor:
        """The mask written out: [B, 1, M, T] bool, True where query i (second to last axis) sees key j.

        B and M are those of the slices of rows and queries that are asked for.
        """
        device = device or self.device
        query = torch.arange(self.length, device=device)[queries, None]
        key = torch.arange(self.length, device=device)[None, :]
        causal = key <= query
        below_end = causal if self.end_key is None else key < self.end_key[rows, queries, None]
        above_start = True if self.first_key is None else key >= self.first_key[rows, queries, None]
        shared = (key >= self.shared_from) & (key < self.shared_prefix)
        visible = below_end & above_start | causal & shared
        return visible.expand(len(range(self.rows)[rows]), len(query), self.length)[:, None]

    def bias(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The mask as an additive [B, 1, T, T] float: 0 where visible, -inf elsewhere. Cached per dtype,
        so that all layers of a forward pass and its backward share one."""
        if dtype not in self._bias:
            with torch.inference_mode(False):
                hidden = ~self.visible(device)
                shown = torch.zeros(hidden.shape, dtype=dtype, device=device)
                self._bias[dtype] = shown.masked_fill_(hidden, float("-inf"))
        return self._bias[dtype]

    @property
    def device(self) -> torch.device:
        """Of its tensors; a CPU where it has none."""
        tensors = (self.first_key, self.end_key, self.doc_start)
        return next((tensor.device for tensor in tensors if tensor is not None), torch.device("cpu"))


def _check_positions(name: str, tensor: Tensor, rows: int, length: int, device: torch.device | None) -> None:
    """Refuse what is not int32 [rows, length], on `device` where there is one."""
    if tuple(tensor.shape) != (rows, length) or tensor.dtype != torch.int32:
        raise ValueError(
            f"{name}: expected int32 of shape [{rows}, {length}], got {tensor.dtype} of shape {list(tensor.shape)}"
        )
    if device is not None and tensor.device != device:
        raise ValueError(f"{name}: expected the mask's tensors on one device, {device}, got {tensor.device}")


def _check_setting(name: str, value: int, length: int) -> None:
    if not 0 <= value <= length:
        raise ValueError(f"{name}: expected 0 to {length} (T), got {value}")


def _refuse(wrong: Tensor, name: str, tensor: Tensor, rule: str) -> None:
    """Stop where `wrong` [B, T] holds of a tensor. On a GPU the host does not wait to see: the device stops at the
    assertion."""
    message = f"{name}: expected {rule}; got"
    if wrong.device.type == "cuda":
        torch._assert_async(wrong.any().logical_not(), f"{message} a tensor that breaks this")
    elif wrong.device.type != "meta" and wrong.any():
        row, i = wrong.nonzero()[0].tolist()
        raise ValueError(f"{message} {int(tensor[row, i])} at i = {i} of row {row}")


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
            exclusive). `document` needs the start, and with `prefix_lm` the end too, which may leave out padding at a
            document's end; else `doc_start` serves the statistics only.
        document: queries see keys of their own document only (intra-document masking, arXiv 2402.13991).
        window: queries see at most this many keys, themselves included (sliding window).
        shared_prefix: row positions below this are visible to every later query (arXiv 2504.02732, Table 2).
        prefix_lm: row positions below this see each other in both directions (arXiv 2410.10781, §4),
            within a document where `document` is set.
        hide_first_key: no query but the first sees key 0 (the inference mode `first_key_masked`).

    Raises ValueError for settings outside their range and for boundaries that are missing or contradict each other;
    their values are looked at as `Mask` says.
    """
    if device is None:
        device = doc_start.device if doc_start is not None else "cpu"
    for name, bound in (("doc_start", doc_start), ("doc_end", doc_end)):
        if bound is not None:
            _check_positions(name, bound, rows, length, doc_start.device if doc_start is not None else None)
    if document and doc_start is None:
        raise ValueError("document: expected doc_start [B, T] with it, got None")
    if window is not None and window < 1:
        raise ValueError(f"window: expected at least 1, got {window}")
    _check_setting("prefix_lm", prefix_lm, length)
    _check_setting("shared_prefix", shared_prefix, length)
    if document and prefix_lm and doc_end is None:
        raise ValueError("prefix_lm with document: expected doc_end [B, T], got None")
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
        if document and doc_start is not None and doc_end is not None:
            if not torch.compiler.is_compiling():
                last = doc_start.gather(1, (doc_end - 1).clamp(0, length - 1).long())
                wrong = (doc_end < 1) | (doc_end > length) | (last != doc_start)
                _refuse(wrong, "doc_end", doc_end, "1 to T, and position doc_end[i] − 1 to be of i's document")
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
