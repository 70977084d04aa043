"""Learned sinks, a file each: a key that is no token's, as one more place for a query's attention.

Its mass is measured apart (`learned_sink_mass`), and is what the weights of the tokens lack to 1.
"""

from typing import TYPE_CHECKING

from sinkbed.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

SINKS = Registry("model.decoder.sink", __name__)


class Sink:
    """What every layer has one of, made from the decoder's config. One that has weights is an `nn.Module` too."""

    def key(self, q: "Tensor") -> "tuple[Tensor, Tensor | None]":
        """Logits of queries q [B, H, T, D], as attention takes them, and the value.

        Logits are [H], or [B, H, T]; a value is [H, D], None adds nothing to the output.
        """
        raise NotImplementedError
