"""What is measured during training and at its end."""

from dataclasses import dataclass

from sinkbed.data.pack.strategy import Strategy
from sinkbed.ranges import check_number
from sinkbed.train.measure.modes import InferenceMode, placed_positions


@dataclass(frozen=True, kw_only=True)
class MeasureConfig:
    """What is measured during training and at its end. Raises ValueError for values without meaning."""

    documents: int = 100
    """Documents of the final measurement."""
    live_documents: int = 32
    """Documents of the measurements during training: the first of the same set."""
    live_points: int = 12
    """Measurements during training, geometrically spaced over the steps: dense early, sparser later."""
    first_step: int = 10
    """Step of the first measurement after the one at step 0."""
    state_points: int = 0
    """Measurements of states (norms, massive activations, value drain, ...) during training, spaced alike; 0: none."""
    mixing_points: int = 0
    """Measurements of mixing (perturbation, rank, paths, Jacobian) during training, spaced alike; 0: none."""
    state_documents: int = 8
    """Documents of both, the first `sink_tokens` tokens of each."""
    modes: tuple[InferenceMode, ...] = ("bos", "text", "first_key_masked")
    """Inference modes of the final measurement."""
    live_modes: tuple[InferenceMode, ...] = ("bos", "text", "first_key_masked")
    """Inference modes of the measurements during training."""
    sink_tokens: int = 64
    """T of the sink rate; documents with fewer tokens are not in the probe set."""
    onset_rate: float = 10.0
    """The onset is the first measurement whose sink rate (eps 0.3, live mode named first) reaches this, in %."""
    batch_tokens: int = 4_096
    """Tokens per forward pass of a measurement, padding included."""

    def __post_init__(self) -> None:
        for name in ("documents", "live_documents", "live_points", "first_step", "batch_tokens", "state_documents"):
            check_number(f"measure.{name}", getattr(self, name), least=1)
        for name in ("state_points", "mixing_points"):
            check_number(f"measure.{name}", getattr(self, name), least=0)
        check_number("measure.onset_rate", self.onset_rate, above=0, most=100)
        if (self.state_points or self.mixing_points) and self.sink_tokens < 8:
            raise ValueError(
                f"measure.sink_tokens: expected at least 8 with state_points or mixing_points, got {self.sink_tokens}"
            )
        if self.sink_tokens < 2:
            raise ValueError(f"measure.sink_tokens: expected at least 2, got {self.sink_tokens}")
        if self.live_documents > self.documents:
            raise ValueError(
                f"measure.live_documents: expected at most documents={self.documents}, got {self.live_documents}"
            )
        for name in ("modes", "live_modes"):
            if len(set(getattr(self, name))) != len(getattr(self, name)) or not getattr(self, name):
                raise ValueError(f"measure.{name}: expected distinct modes, at least one")

    def check_context(self, context_length: int) -> None:
        """Raise ValueError where a row has no room for BOS and the tokens that are measured."""
        if context_length <= self.sink_tokens:
            raise ValueError(
                f"measure.sink_tokens={self.sink_tokens}: expected fewer than "
                f"data.context_length={context_length}; lower it or lengthen the context"
            )

    def check_placed(self, mode: InferenceMode, strategy: Strategy) -> None:
        """Raise ValueError where a mode places a token that no measured query can look at."""
        last = max(placed_positions(mode, strategy), default=0)
        if last >= self.sink_tokens:
            raise ValueError(
                f"data.strategy.first_token: expected tokens placed before measure.sink_tokens={self.sink_tokens}, so "
                f"that every document of the probe reaches them, got one at position {last}"
            )

    def steps(self, max_steps: int, points: int | None = None) -> list[int]:
        """Steps after which to measure during training: 0, then `points` (None: `live_points`), geometric from
        first_step to max_steps."""
        points = self.live_points if points is None else points
        first = min(self.first_step, max_steps)
        ratio = (max_steps / first) ** (1 / max(1, points - 1))
        return sorted({0, max_steps} | {round(first * ratio**i) for i in range(points)})
