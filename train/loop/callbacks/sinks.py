"""The sink monitor: measures while training, dense early and sparser later, and once more at the end."""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch

from sinkbed.data.files import write_json
from sinkbed.data.pack.batches import Rows, SplitTooShort
from sinkbed.data.store.token_store import TokenStore
from sinkbed.model import Decoder
from sinkbed.model.observe import evaluating
from sinkbed.train.loop.module import SinkbedModule
from sinkbed.train.measure.config import MeasureConfig
from sinkbed.train.measure.finite import finite
from sinkbed.train.measure.heldout import Probe
from sinkbed.train.measure.masks import strategy_mask
from sinkbed.train.measure.modes import InferenceMode
from sinkbed.train.measure.sinks import ModeResult, measure
from sinkbed.train.run import directory
from sinkbed.train.run.metrics import record
from sinkbed.train.run.wandb import Tracker

_PACKED_ROWS = 4
_Results = dict[InferenceMode, ModeResult]


class SinkMonitor(L.Callback):
    """Measures the probe set at the steps of `MeasureConfig.steps` and writes measurement.json at the end."""

    def __init__(self, config: MeasureConfig, run_dir: Path) -> None:
        self.config = config
        self.run_dir = run_dir
        self.seconds = 0.0  # of measuring
        self.elapsed = 0.0  # of everything, before `started`
        self.started: float | None = None
        self.onset_tokens: int | None = None
        self.sink_at_start = False
        """Whether a fork had its sink when it began: its onset was before, in another run."""
        self.probe: Probe | None = None
        self.packed: Rows | None = None
        self.steps: set[int] = set()
        self.measured: int | None = None
        self.loss: float | None = None
        self.final: _Results | None = None

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {
            "onset_tokens": self.onset_tokens,
            "sink_at_start": self.sink_at_start,
            "measured": self.measured,
            "seconds": self.seconds,
            "elapsed": self._elapsed(),
            "figures": self._figures(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From the checkpoint. Raises ValueError where one curve would hold figures of two kinds."""
        for name, value in self._figures().items():
            earlier = state_dict["figures"].get(name)
            if earlier != value:
                raise ValueError(
                    f"resuming: expected the run's own measure.{name}: {earlier}, got {value}, and figures of two "
                    "kinds cannot be compared; leave it as it was and use `sinkbed validate` for other figures"
                )
        self.onset_tokens = state_dict["onset_tokens"]
        self.sink_at_start = state_dict["sink_at_start"]
        self.measured = state_dict["measured"]
        self.seconds = state_dict["seconds"]
        self.elapsed = state_dict["elapsed"]

    def _figures(self) -> dict[str, Any]:
        """The settings that decide a figure, not when it is taken."""
        settings = dataclasses.asdict(self.config)
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in settings.items()
            if name not in ("live_points", "first_step", "batch_tokens", "state_points", "mixing_points")
        }

    def _elapsed(self) -> float:
        return self.elapsed + (0.0 if self.started is None else time.perf_counter() - self.started)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Choose the probe set and the steps."""
        assert isinstance(pl_module, SinkbedModule)
        self.steps = set(self.config.steps(trainer.max_steps)) if trainer.max_steps > 0 else set()
        held_out = TokenStore.open(pl_module.data.store_path, "validation")
        self.probe = Probe.from_store(held_out, pl_module.data.context_length, self.config)
        try:
            self.packed = Rows(held_out, pl_module.data.strategy, pl_module.data.context_length, 0)
            self.packed.layout.verify()
        except SplitTooShort:  # no packed rows to look at
            self.packed = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock; measure the untrained model."""
        self.started = time.perf_counter()
        self.on_train_batch_end(trainer, pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Measure after the steps that are due, once each."""
        step = trainer.global_step
        if (step in self.steps or self.measured is None) and step != self.measured:
            self._measure_live(trainer, pl_module)

    def loss_at(self, step: int) -> float | None:
        """Validation loss measured after a step, in the first live mode; None where none was."""
        return self.loss if step == self.measured else None

    def _measure(self, module: SinkbedModule, probe: Probe, modes: Sequence[InferenceMode]) -> _Results:
        assert module.decoder is not None
        return {m: measure(module.decoder, probe, m, module.data.strategy, self.config) for m in modes}

    def _measure_live(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, SinkbedModule) and self.probe is not None and module.decoder is not None
        began = time.perf_counter()
        c, step = self.config, trainer.global_step
        results = self._measure(module, self.probe.head(c.live_documents), c.live_modes)
        values: dict[str, float] = {}
        for mode, result in results.items():
            values |= result.metrics(mode)
        values |= self._packed(module.decoder, module)
        tokens = module.data.tokens_at(step)
        rate = values[f"sink/rate_eps0.3/{c.live_modes[0]}"]
        if rate >= c.onset_rate and step > 0:
            self.sink_at_start |= self.measured is None
            if self.onset_tokens is None and not self.sink_at_start:
                self.onset_tokens = tokens
        maps = {f"sink/heatmap/{m}": r.mass for m, r in results.items()}
        record(trainer, values, step=step, tokens=tokens, heatmaps=maps)
        if step:
            module.log("sink %", rate, prog_bar=True, logger=False)
        self.measured, self.loss = step, values[f"val/loss/{c.live_modes[0]}"]
        seconds = time.perf_counter() - began
        self.seconds += seconds
        module.skip_time(seconds)

    def _packed(self, decoder: Decoder, module: SinkbedModule) -> dict[str, float]:
        """Mass on the first key of the query's document and of the row, in rows packed as in training.

        Queries that are that key themselves do not count, nor padding.
        """
        if self.packed is None:
            return {}
        batch = self.packed.__getitems__(list(range(min(_PACKED_ROWS, len(self.packed)))))
        batch = batch.to(module.device)
        with evaluating(decoder), torch.no_grad():
            positions = batch.positions if module.data.strategy.positions == "document" else None
            output = decoder(
                batch.tokens,
                positions,
                strategy_mask(module.data.strategy, batch.doc_start, batch.doc_end),
                statistics=True,
            )
        assert output.statistics is not None
        statistics = [s.normalized for s in output.statistics]
        index = torch.arange(batch.tokens.shape[1], device=module.device)
        real = torch.ones_like(batch.loss_mask)
        if self.packed.layout.pads:  # padding is a document without a target
            start = batch.doc_start.long()
            real = torch.zeros_like(start).scatter_add_(1, start, batch.loss_mask.long()).gather(1, start) > 0
        real = real[:, None, :].expand(-1, decoder.config.n_heads, -1)
        later = real & (batch.doc_start < index)[:, None, :]
        values = {}
        if later.any():
            document = torch.stack([s.document_mass[later].mean() for s in statistics]).mean()
            values["sink/packed_document_mass"] = float(document)
        if real[..., 1:].any():
            row = torch.stack([s.first_key_mass[..., 1:][real[..., 1:]].mean() for s in statistics]).mean()
            values["sink/packed_first_key_mass"] = float(row)
        return finite(values, "packed rows")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The final measurement, unless training was stopped before its last step."""
        if trainer.global_step >= trainer.max_steps and not trainer.interrupted:
            self.finish(trainer, pl_module)

    def finish(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure all documents and modes; write measurement.json and W&B's summary.

        It is no point of the curves, which keep to their own documents from first to last.
        """
        assert isinstance(pl_module, SinkbedModule) and pl_module.decoder is not None and self.probe is not None
        training = self._elapsed() - self.seconds
        began = time.perf_counter()
        self.final = results = self._measure(pl_module, self.probe, self.config.modes)
        final = {
            "step": trainer.global_step,
            "tokens": pl_module.data.tokens_at(trainer.global_step),
            "onset_tokens": self.onset_tokens,
            "parameters": pl_module.decoder.parameter_count(),
            "sink_tokens": self.config.sink_tokens,
            "seconds": {
                "training": training,
                "measuring_live": self.seconds,
                "measuring_final": time.perf_counter() - began,
            },
            "modes": {mode: dataclasses.asdict(result) for mode, result in results.items()},
        }
        if trainer.is_global_zero:
            write_json(self.run_dir / directory.MEASUREMENT, final)
        for logger in trainer.loggers:
            if isinstance(logger, Tracker):
                figures = {
                    f"final/{key}": x for mode, result in results.items() for key, x in result.metrics(mode).items()
                }
                if self.onset_tokens is not None:
                    figures["sink/onset_tokens"] = self.onset_tokens
                logger.summarize(figures)
