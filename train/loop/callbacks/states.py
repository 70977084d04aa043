"""The state monitor: states and mixing while training, on a few documents and at a cadence of its own."""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as L

from sinkbed.train.loop.callbacks.sinks import SinkMonitor
from sinkbed.train.loop.fsdp import FSDP2Strategy
from sinkbed.train.loop.module import SinkbedModule
from sinkbed.train.measure.config import MeasureConfig
from sinkbed.train.measure.jacobian import measure_jacobian
from sinkbed.train.measure.mixing import measure_paths, measure_perturbation, measure_rank
from sinkbed.train.measure.modes import InferenceMode
from sinkbed.train.measure.states import Excerpts, measure_gradients, measure_states
from sinkbed.train.run.metrics import record

_DIRECTIONS = 8
_JACOBIAN_DOCUMENTS = 2


class StateMonitor(L.Callback):
    """Logs `state/…` and `mixing/…` at `measure.state_points` and `measure.mixing_points` steps.

    What it costs is bounded by the documents it looks at (`measure.state_documents`, the first `measure.sink_tokens`
    tokens of each, in every live mode), whatever the model and the corpus: 2 forward passes over them for states (one
    with gradients) and 4 for mixing, and for the Jacobian 17 forward and 8 backward passes over the first two. The
    time is counted as measuring, not as training. Gradients are left out under FSDP2.
    """

    def __init__(self, config: MeasureConfig, sinks: SinkMonitor) -> None:
        self.config = config
        self.sinks = sinks
        self.measured: int | None = None
        self.steps: dict[str, set[int]] = {"states": set(), "mixing": set()}

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint: a step is measured once."""
        return {"measured": self.measured}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From the checkpoint."""
        self.measured = state_dict["measured"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Choose the steps; measure the untrained model."""
        if trainer.max_steps > 0:
            for name, points in (("states", self.config.state_points), ("mixing", self.config.mixing_points)):
                self.steps[name] = set(self.config.steps(trainer.max_steps, points)) if points else set()
        self._measure_if_due(trainer, pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Measure after the steps that are due, once each."""
        self._measure_if_due(trainer, pl_module)

    def _measure_if_due(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        step = trainer.global_step
        due = {name for name, steps in self.steps.items() if step in steps}
        if not due or step == self.measured:
            return
        assert isinstance(module, SinkbedModule)
        began = time.perf_counter()
        values: dict[str, float] = {}
        for mode in self.config.live_modes:
            values |= self._values(trainer, module, mode, due)
        record(trainer, values, step=step, tokens=module.tokens_at(step))
        self.measured = step
        seconds = time.perf_counter() - began
        self.sinks.seconds += seconds
        module.skip_time(seconds)

    def _values(
        self, trainer: L.Trainer, module: SinkbedModule, mode: InferenceMode, due: set[str]
    ) -> dict[str, float]:
        c, probe, decoder = self.config, self.sinks.probe, module.decoder
        assert probe is not None and decoder is not None
        excerpts = Excerpts.of(probe, mode, module.data.strategy, c.sink_tokens, c.state_documents)
        differentiable = not isinstance(trainer.strategy, FSDP2Strategy)
        values: dict[str, float] = {}
        if "states" in due:
            values |= measure_states(decoder, excerpts, c.batch_tokens).metrics(mode)
            if differentiable:
                ratios = measure_gradients(decoder, excerpts, c.batch_tokens).ratio
                values |= {
                    f"state/gradient_ratio/layer{layer}/{mode}": ratios[layer + 1] for layer in range(len(ratios) - 1)
                }
        if "mixing" in due:
            spread = measure_perturbation(decoder, excerpts, c.batch_tokens).spread
            rank = measure_rank(decoder, excerpts, c.batch_tokens)["rest"]
            paths = measure_paths(decoder, excerpts, c.batch_tokens)
            values |= {
                f"mixing/perturbation/{mode}": spread[-1],
                f"mixing/paths_from_first_key/{mode}": paths.first[-1],
                f"mixing/path_sources/{mode}": paths.sources[-1],
            }
            for layer in range(len(spread) - 1):
                values[f"mixing/rank_distance/layer{layer}/{mode}"] = rank.relative_distance[layer + 1]
                values[f"mixing/effective_rank/layer{layer}/{mode}"] = rank.effective_rank[layer + 1]
                values[f"mixing/last_distance/layer{layer}/{mode}"] = rank.relative_last_distance[layer + 1]
            if differentiable:
                few = Excerpts.of(probe, mode, module.data.strategy, c.sink_tokens, _JACOBIAN_DOCUMENTS)
                last = [decoder.config.n_layers]
                jacobian = measure_jacobian(decoder, few, c.batch_tokens, directions=_DIRECTIONS, layers=last)
                values[f"mixing/jacobian/{mode}"] = jacobian.others[-1]
        return values
