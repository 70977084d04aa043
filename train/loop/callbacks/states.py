"""The state monitor: states and mixing while training, on a few documents and at a cadence of its own."""

import time
from typing import Any

import lightning.pytorch as L

from sinkbed.train.loop.callbacks.sinks import SinkMonitor
from sinkbed.train.loop.fsdp import FSDP2Strategy
from sinkbed.train.loop.module import SinkbedModule
from sinkbed.train.measure.config import MeasureConfig
from sinkbed.train.measure.excerpts import Excerpts
from sinkbed.train.measure.measures import Group, measures
from sinkbed.train.measure.modes import InferenceMode
from sinkbed.train.run.metrics import record


class StateMonitor(L.Callback):
    """Logs what the measures of a group say at `measure.state_points` and `measure.mixing_points` steps.

    What it costs is bounded by the documents it looks at (`measure.state_documents`, the first `measure.sink_tokens`
    tokens of each, in every live mode), whatever the model and the corpus: 2 forward passes over them for states (one
    with gradients) and 4 for mixing, and for the Jacobian 17 forward and 8 backward passes over the first two. The
    time is counted as measuring, not as training. What needs gradients is left out under FSDP2.
    """

    def __init__(self, config: MeasureConfig, sinks: SinkMonitor) -> None:
        self.config = config
        self.sinks = sinks
        self.measured: int | None = None
        self.steps: dict[Group, set[int]] = {}

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint: a step is measured once."""
        return {"measured": self.measured}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From the checkpoint."""
        self.measured = state_dict["measured"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Choose the steps; measure the untrained model."""
        if trainer.max_steps > 0:
            points: dict[Group, int] = {"states": self.config.state_points, "mixing": self.config.mixing_points}
            self.steps = {group: set(self.config.steps(trainer.max_steps, n)) for group, n in points.items() if n}
        self.on_train_batch_end(trainer, pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Measure after the steps that are due, once each."""
        step = trainer.global_step
        due = [group for group, steps in self.steps.items() if step in steps]
        if not due or step == self.measured:
            return
        assert isinstance(pl_module, SinkbedModule)
        began = time.perf_counter()
        values: dict[str, float] = {}
        for mode in self.config.live_modes:
            values |= self._values(trainer, pl_module, mode, due)
        record(trainer, values, step=step, tokens=pl_module.data.tokens_at(step))
        self.measured = step
        seconds = time.perf_counter() - began
        self.sinks.seconds += seconds
        pl_module.skip_time(seconds)

    def _values(
        self, trainer: L.Trainer, module: SinkbedModule, mode: InferenceMode, due: list[Group]
    ) -> dict[str, float]:
        c, probe, decoder = self.config, self.sinks.probe, module.decoder
        assert probe is not None and decoder is not None
        values: dict[str, float] = {}
        for measure in measures(*due).values():
            if not measure.while_training:
                continue
            if measure.differentiates and isinstance(trainer.strategy, FSDP2Strategy):
                continue
            documents = measure.live_documents or c.state_documents
            excerpts = Excerpts.of(probe, mode, module.data.strategy, c.sink_tokens, documents)
            values |= measure.metrics(measure.measure(decoder, excerpts, c.batch_tokens, **measure.live), mode)
        return values
