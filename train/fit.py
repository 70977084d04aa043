"""`sinkbed fit`: Lightning's command line with the run directory around it.

Every argument is a typed key of the config; `--print_config` shows all, unknown keys are errors, later
`--config` files and options override earlier ones.
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import Callback, TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers.logger import Logger

from train import rundir
from train.checkpoint import LAST, AtomicCheckpointIO, Checkpoints, load_checkpoint
from train.datamodule import TokenData
from train.loggers import MetricsFile, Tracker, WandbConfig, finish_wandb, start_wandb
from train.measure import MeasureConfig
from train.module import SinkbedModule
from train.monitor import SinkMonitor


class ProgressBar(TQDMProgressBar):
    """Lightning's bar without the version column; loss, tokens/s, sink rate and time left."""

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """Leave `v_num` out."""
        items = super().get_metrics(trainer, pl_module)
        items.pop("v_num", None)
        return items

    def init_train_tqdm(self) -> Any:
        """Count optimizer steps to the end of the run, not batches of an endless epoch."""
        bar = super().init_train_tqdm()
        bar.set_description("train")
        return bar

    def on_train_epoch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Set the total, so that the bar knows the time left."""
        self.train_progress_bar.reset(trainer.max_steps)
        self.train_progress_bar.initial = trainer.global_step
        self.train_progress_bar.n = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Move to the optimizer step reached."""
        bar = self.train_progress_bar
        if trainer.global_step % self.refresh_rate == 0 or trainer.global_step == trainer.max_steps:
            bar.n = trainer.global_step
            bar.set_postfix(self.get_metrics(trainer, pl_module))


class RunFiles(SaveConfigCallback):
    """Writes config.yaml, the manifest and the audit once the checkpoint has been accepted, and cuts
    metrics.jsonl back to it; a refused resume leaves the directory as it was."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Nothing yet: the checkpoint may still be refused."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write atomically, from one process. Points after the checkpoint will be made again."""
        if not trainer.is_global_zero:
            return
        assert isinstance(pl_module, SinkbedModule)
        run_dir = Path(self.config["run_dir"])
        config = self.config.clone()
        config["ckpt_path"] = None  # else a run started from this file would continue this one
        rundir.write_atomic(run_dir / rundir.CONFIG, self.parser.dump(config, skip_none=False))
        manifest = pl_module.data.store_path / rundir.MANIFEST
        rundir.write_atomic(run_dir / rundir.MANIFEST, manifest.read_bytes())
        rundir.write_json(run_dir / rundir.AUDIT, pl_module.data.audit())
        dropped = rundir.cut_metrics(run_dir / rundir.METRICS, trainer.global_step if trainer.ckpt_path else -1)
        for logger in trainer.loggers:
            if isinstance(logger, Tracker):
                logger.already_sent = dropped if trainer.ckpt_path else 0

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Lightning ends an interrupted run without a word."""
        if isinstance(exception, KeyboardInterrupt):
            print(f"interrupted at step {trainer.global_step}; resume with --ckpt_path last", file=sys.stderr)


# Trainer settings that this command sets itself, or that would end or repeat the endless walk over rows.
_TRAINER_FIXED = {
    "accumulate_grad_batches": (1, "data.micro_batch"),
    "gradient_clip_val": (None, "model.clip_norm"),
    "gradient_clip_algorithm": (None, "model.clip_norm"),
    "max_epochs": (-1, "trainer.max_steps"),
    "min_epochs": (None, "trainer.max_steps"),
    "min_steps": (None, "trainer.max_steps"),
    "max_time": (None, "trainer.max_steps"),
    "limit_train_batches": (None, "trainer.max_steps"),
    "overfit_batches": (0.0, "trainer.max_steps"),
    "fast_dev_run": (False, "trainer.max_steps"),
    "logger": (False, "wandb.mode"),
    "enable_checkpointing": (None, "checkpoint_every"),
    "default_root_dir": (None, "run_dir"),
    "plugins": (None, "nothing: checkpoints are written by this command"),
}


class SinkbedCLI(LightningCLI):
    """LightningCLI with a run directory, the sink monitor and W&B."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Keys beside model, data and trainer."""
        parser.add_argument("--run_dir", type=Path, required=True, help="folder of this run")
        parser.add_argument("--threads", type=int, default=None, help="CPU threads; null: torch's choice")
        parser.add_argument("--checkpoint_every", type=int, default=100, help="steps between checkpoints")
        parser.add_class_arguments(MeasureConfig, "measure")
        parser.add_class_arguments(WandbConfig, "wandb")
        parser.set_defaults(
            {
                "trainer.max_epochs": -1,
                "trainer.logger": False,
                "trainer.log_every_n_steps": 10,
                "trainer.num_sanity_val_steps": 0,
                "trainer.enable_model_summary": False,
                "trainer.use_distributed_sampler": False,
            }
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """fit; a run is measured anew by `sinkbed validate`, which needs no trainer."""
        return {"fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule", "weights_only"}}

    def _parse_ckpt_path(self) -> None:
        """Nothing: our checkpoints carry no hyperparameters to merge, and a damaged one is refused later."""

    def before_instantiate_classes(self) -> None:
        """Refuse what cannot work, before anything is built or written."""
        config = self.config.fit
        if config.threads is not None and config.threads < 1:
            raise ValueError(f"threads: expected at least 1, found {config.threads}")
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        if config.trainer.max_steps is None or config.trainer.max_steps < 1:
            raise ValueError(
                f"trainer.max_steps: expected at least 1 (the schedules need the end), found {config.trainer.max_steps}"
            )
        for name, (fixed, instead) in _TRAINER_FIXED.items():
            if config.trainer.get(name, fixed) not in (fixed, None):
                raise ValueError(
                    f"trainer.{name}: has no effect here, found {config.trainer.get(name)}; set {instead} instead"
                )
        run_dir = Path(config.run_dir)
        last = run_dir / rundir.CHECKPOINTS / LAST
        if last.exists() and not config.ckpt_path:
            raise FileExistsError(
                f"run_dir {run_dir}: expected a new folder, found a run. Resume it with --ckpt_path last, "
                "or choose another --run_dir"
            )
        if config.ckpt_path == "last":
            if not last.exists():
                raise FileNotFoundError(
                    f"--ckpt_path last: expected {last}, found none; leave --ckpt_path out to start the run"
                )
            config.ckpt_path = str(last)
        if config.ckpt_path:
            load_checkpoint(Path(config.ckpt_path))
        run_dir.mkdir(parents=True, exist_ok=True)
        for partial in (run_dir / rundir.CHECKPOINTS).glob(".*"):
            partial.unlink()  # what a kill in the middle of writing left

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """The trainer with our callbacks, checkpoint files and loggers."""
        config = self.config_init.fit
        run_dir = Path(config.run_dir)
        callbacks: list[Callback] = [
            SinkMonitor(config.measure, run_dir),
            Checkpoints(run_dir / rundir.CHECKPOINTS, config.checkpoint_every),
        ]
        if config.trainer.enable_progress_bar is not False:
            callbacks.append(ProgressBar(refresh_rate=1 if sys.stderr.isatty() else 20))
        self.trainer_defaults = {"callbacks": callbacks}
        settings = json.loads(self._parser("fit").dump(self.config.fit, format="json"))
        loggers: list[Logger] = [MetricsFile(run_dir)]
        tracker = start_wandb(config.wandb, run_dir, settings)
        if tracker is not None:
            loggers.append(tracker)
        trainer = super().instantiate_trainer(
            logger=loggers,
            default_root_dir=str(run_dir),
            plugins=[AtomicCheckpointIO()],
            enable_checkpointing=True,
            **kwargs,
        )
        # The files come before the first measurement writes to them; checkpoints stay last.
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        callbacks.sort(key=lambda callback: not isinstance(callback, RunFiles))
        trainer.accumulate_grad_batches = self.datamodule.accumulation(trainer.world_size)
        return trainer

    def after_fit(self) -> None:
        """A run killed between its last step and its final measurement is measured when it is resumed."""
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        monitor = next(c for c in callbacks if isinstance(c, SinkMonitor))
        done = self.trainer.global_step >= self.trainer.max_steps
        if done and not (monitor.run_dir / rundir.MEASUREMENT).exists():
            monitor.finish(self.trainer, self.model)


def run(command: str, argv: Sequence[str]) -> int:
    """Train."""
    ours = ["sinkbed", command, *argv]
    theirs, sys.argv = sys.argv, ours  # LightningCLI reads the real command line
    # Lightning's advice on workers and its notices of devices say nothing that a user here can use.
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*exists and is not empty.*")
    exit_code = 1
    try:
        SinkbedCLI(
            SinkbedModule,
            TokenData,
            save_config_callback=RunFiles,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            parser_kwargs={"prog": "sinkbed", "fit": {"description": (__doc__ or "").split("\n")[0]}},
        )
        exit_code = 0
    finally:
        sys.argv = theirs
        finish_wandb(exit_code)
    return 0
