"""The attention mask of rows under a strategy: one builder, of training and of measuring."""

from torch import Tensor

from sinkbed.data.pack.strategy import Strategy
from sinkbed.kernels import Mask, interval_mask


def strategy_mask(
    strategy: Strategy,
    doc_start: Tensor,
    doc_end: Tensor,
    *,
    document: bool | None = None,
    hide_first_key: bool = False,
) -> Mask:
    """The mask of a batch; it carries the document starts either way.

    Args:
        doc_start, doc_end: [B, T] int32, extent of the document at each row position, the end exclusive.
        document: queries see keys of their own document only; None: where the strategy says so.
        hide_first_key: no query but the first sees key 0.
    """
    B, T = doc_start.shape
    return interval_mask(
        B,
        T,
        doc_start=doc_start,
        doc_end=doc_end,
        document=strategy.mask == "intra_document" if document is None else document,
        window=strategy.window,
        shared_prefix=min(strategy.shared_prefix, T),
        prefix_lm=min(strategy.prefix_lm, T),
        hide_first_key=hide_first_key,
    )
