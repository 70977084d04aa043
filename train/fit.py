"""`sinkbed fit`: Lightning's command line with the run directory around it.

Every argument is a typed key of the config; `--print_config` shows all, unknown keys are errors, later
`--config` files and options override earlier ones.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import Callback, TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from train import rundir
from train.arguments import ShortErrors, describe_fields
from train.checkpoint import Checkpoints, SyncedCheckpointIO, load_checkpoint, remove_partial
from train.datamodule import StoreCheck, TokenData
from train.loggers import MetricsFile, WandbConfig, finish_wandb, process_rank, start_wandb
from train.measure import MeasureConfig
from train.module import SinkbedModule, check_identity
from train.monitor import SinkMonitor
from train.provenance import provenance
from train.state_monitor import StateMonitor
from train.validate import measurement_table


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
        bar.reset(self.trainer.max_steps)
        bar.initial = bar.n = self.trainer.global_step
        return bar

    def on_train_epoch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Nothing: the bar does not count epochs."""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Move to the optimizer step reached."""
        bar = self.train_progress_bar
        if trainer.global_step % self.refresh_rate == 0 or trainer.global_step == trainer.max_steps:
            bar.n = trainer.global_step
            bar.set_postfix(self.get_metrics(trainer, pl_module))


class RunFiles(SaveConfigCallback):
    """Writes config.yaml, the manifest and the audit once the checkpoint has been accepted, cuts metrics.jsonl back
    to it, and starts W&B; a refused run leaves the directory as it was."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Nothing yet: the checkpoint may still be refused."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """See `start`."""
        self.start(trainer, pl_module)

    def start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write atomically, from one process. Points after the checkpoint will be made again."""
        if not trainer.is_global_zero:
            return
        assert isinstance(pl_module, SinkbedModule)
        run_dir = Path(self.config["run_dir"])
        checkpoints = _checkpoints(trainer)
        config = self.config.clone()
        config["ckpt_path"] = None  # else a run started from this file would continue this one
        text, path = self.parser.dump(config, skip_none=False), run_dir / rundir.CONFIG
        # A run that never came to a checkpoint may be started again with other settings: to W&B that is another run.
        other = not checkpoints.resumed and path.exists() and path.read_text() != text
        rundir.write_atomic(path, text)
        manifest = pl_module.data.store_path / rundir.MANIFEST
        rundir.write_atomic(run_dir / rundir.MANIFEST, manifest.read_bytes())
        rundir.write_json(run_dir / rundir.AUDIT, pl_module.data.audit())
        (run_dir / rundir.MEASUREMENT).unlink(missing_ok=True)  # of an end that is now to come again
        told = rundir.restore_metrics(run_dir / rundir.METRICS, checkpoints.restored)
        if told is not None:
            rank_zero_warn(told)
        settings = json.loads(self.parser.dump(config, format="json"))
        made = provenance(trainer.strategy.root_device, trainer.world_size)
        checkpoints.run, told = rundir.identify(run_dir, checkpoints.run, pl_module.parent, made, anew=other)
        if told is not None:
            rank_zero_warn(told)
        tracker = start_wandb(WandbConfig(**config["wandb"].as_dict()), run_dir, settings)
        if tracker is not None:
            trainer.loggers = [*trainer.loggers, tracker]

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Lightning ends an interrupted run without a word."""
        if isinstance(exception, KeyboardInterrupt):
            _say(_interrupted(trainer), file=sys.stderr)


def _checkpoints(trainer: L.Trainer) -> Checkpoints:
    return next(c for c in trainer.callbacks if isinstance(c, Checkpoints))  # type: ignore[attr-defined]


def _interrupted(trainer: L.Trainer) -> str:
    """What is kept of a run that was stopped, and how it goes on."""
    checkpoints = _checkpoints(trainer)
    saved = checkpoints.saved
    if saved is None and rundir.newest_checkpoint(
        checkpoints.folder.parent
    ):  # resumed, and stopped before the first step
        return "stopped before the first step; resume with --ckpt_path last"
    if saved is None:
        return f"stopped at step {trainer.global_step}, before a checkpoint; start it again with the same command"
    return f"stopped at step {trainer.global_step}; step {saved} is saved: resume with --ckpt_path last"


_say = rank_zero_only(print)


class AlreadyFinished(Exception):
    """The run to resume has nothing left to do."""


class ProcessLost(RuntimeError):
    """Another process of the job is gone, so that this one cannot go on."""


# What gloo, NCCL and the rendezvous say then; they have no exception of its own for it.
_LOST = ("gloo/transport", "ncclRemoteError", "remote process exited", "Connection closed by", "Connection reset by")


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
    "use_distributed_sampler": (False, "nothing: rows are dealt to the processes here"),
}


_TRAINER_SHOWN = ("max_steps", "accelerator", "devices", "num_nodes", "strategy", "precision", "log_every_n_steps")


class ShortLightningParser(ShortErrors, LightningArgumentParser):
    """Lightning's parser with short errors, and a help in which our keys come first."""

    every_key = False
    """Whether the help lists all of the trainer's keys too."""

    def format_help(self, *arguments: Any) -> str:
        """Groups of keys, the trainer's last and cut to what a run is likely to set."""
        if not self.every_key:
            self.usage = "%(prog)s --config FILE [--config OVERLAY ...] [--KEY VALUE ...]"
            self.epilog = "--help=all lists the other keys of Lightning's trainer too."
        groups: list[Any] = self._action_groups  # type: ignore[assignment]
        for group in groups:
            group._group_actions = [
                action
                for action in group._group_actions
                if self.every_key or not action.dest.startswith("trainer") or action.dest[8:] in _TRAINER_SHOWN
            ]
        groups.sort(key=lambda group: any(action.dest.startswith("trainer.") for action in group._group_actions))
        return super().format_help(*arguments)


class SinkbedCLI(LightningCLI):
    """LightningCLI with a run directory, the sink monitor and W&B."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Parse, build and train, with the run directory locked."""
        self.held: IO[str] | None = None
        self.checkpoint: dict[str, Any] | None = None
        self.parent: dict[str, Any] | None = None
        try:
            super().__init__(*args, **kwargs)
        except RuntimeError as error:
            if not (isinstance(error, torch.distributed.DistError) or any(words in str(error) for words in _LOST)):
                raise
            saved = rundir.newest_checkpoint(Path(self.config.fit.run_dir))
            step = "No step is saved: start the run" if saved is None else f"{saved.name} is saved: resume the run"
            reason = str(error).splitlines()[0].split("] ", 1)[-1].split(". ")[0]
            raise ProcessLost(
                f"another process of this job ended or does not answer ({reason}); see what it says itself. {step} "
                "with --ckpt_path auto"
            ) from None
        finally:
            if self.held is not None:
                rundir.release(self.held)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Keys beside model, data and trainer."""
        parser.add_argument("--run_dir", type=Path, required=True, help="folder of this run")
        parser.add_argument("--threads", type=int, default=None, help="CPU threads; null: torch's choice")
        parser.add_argument(
            "--checkpoint_every", type=int, default=100, help="steps between checkpoints; of these the newest is kept"
        )
        parser.add_argument(
            "--checkpoint_points", type=int, default=12, help="log-spaced checkpoints that are kept, dense early"
        )
        parser.add_argument(
            "--fork",
            type=Path | None,
            default=None,
            help="start a new run from another run's checkpoint, with settings of its own",
        )
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
        if (config.trainer.log_every_n_steps or 0) < 1:
            raise ValueError(
                f"trainer.log_every_n_steps: expected at least 1, found {config.trainer.log_every_n_steps}"
            )
        if config.trainer.precision == "16-mixed":
            raise ValueError(
                "trainer.precision: 16-mixed overflows to find its loss scale, which counts as diverged here; found "
                "16-mixed, expected bf16-mixed, bf16-true or 32-true"
            )
        for name, (fixed, instead) in _TRAINER_FIXED.items():
            if config.trainer.get(name, fixed) not in (fixed, None):
                raise ValueError(
                    f"trainer.{name}: has no effect here, found {config.trainer.get(name)}; set {instead} instead"
                )
        run_dir = Path(config.run_dir)
        last = rundir.newest_checkpoint(run_dir)
        folder = run_dir / rundir.CHECKPOINTS
        if last is not None and not config.ckpt_path:
            raise FileExistsError(
                f"run_dir {run_dir}: expected a new folder, found a run. Resume it with --ckpt_path last, "
                "or choose another --run_dir"
            )
        if config.ckpt_path == "auto":
            config.ckpt_path = "last" if last is not None else None
        if config.ckpt_path == "last":
            if last is None:
                raise FileNotFoundError(
                    f"--ckpt_path last: expected a checkpoint in {folder}, found none; leave --ckpt_path out to start "
                    "the run"
                )
            config.ckpt_path = str(last)
        if config.ckpt_path and Path(config.ckpt_path).resolve().parent != folder.resolve():
            raise ValueError(
                f"--ckpt_path {config.ckpt_path}: expected a checkpoint of this run, in {folder}; start a new run "
                "from another one's with --fork"
            )
        forking = config.fork is not None and not config.ckpt_path
        if forking:
            parent = Path(config.fork).resolve()
            if (parent / rundir.CONFIG).is_file():  # a run: its newest checkpoint
                parent = rundir.newest_checkpoint(parent) or parent / rundir.CHECKPOINTS / rundir.LAST
            config.ckpt_path = str(parent)
        if process_rank() == 0:
            self.held = rundir.lock(run_dir)
            rundir.remove_temporaries(run_dir)
            remove_partial(run_dir / rundir.CHECKPOINTS)
        if config.ckpt_path:
            option = "--fork" if forking else "--ckpt_path"
            # One process compares the bytes for all; where it finds damage, the job ends.
            verify = process_rank() == 0
            loaded = load_checkpoint(Path(config.ckpt_path), tensors=False, verify=verify, option=option)
            saved = (loaded.get("callbacks") or {}).get("Checkpoints", {})
            self.checkpoint = {k: loaded.get(k) for k in ("sinkbed", "global_step")} | {"saved": saved}
            if forking:
                run = {k: v for k, v in saved.get("run", {}).items() if k != "made_by"}
                self.parent = {"checkpoint": config.ckpt_path, "step": loaded.get("global_step"), **run}

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """The trainer with our callbacks, checkpoint files and loggers."""
        config = self.config_init.fit
        run_dir = Path(config.run_dir)
        monitor = SinkMonitor(config.measure, run_dir)
        checkpoints = Checkpoints(
            run_dir / rundir.CHECKPOINTS,
            every=config.checkpoint_every,
            points=config.checkpoint_points,
            metrics=run_dir / rundir.METRICS,
            loss=monitor.loss_at,
        )
        states = StateMonitor(config.measure, monitor)
        callbacks: list[Callback] = [StoreCheck(self.datamodule), monitor, states, checkpoints]
        if config.trainer.enable_progress_bar is not False:
            callbacks.append(ProgressBar(refresh_rate=1 if sys.stderr.isatty() else 20))
        self.trainer_defaults = {"callbacks": callbacks}
        plugins: list[Any] = [SyncedCheckpointIO()]
        if SLURMEnvironment.detect():
            plugins.append(SLURMEnvironment(auto_requeue=False))  # `requeue` does, from a checkpoint of ours
        trainer = super().instantiate_trainer(
            logger=[MetricsFile(run_dir)],
            default_root_dir=str(run_dir),
            plugins=plugins,
            enable_checkpointing=True,
            **kwargs,
        )
        # The files come before the first measurement writes to them; checkpoints stay last.
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        callbacks.sort(key=lambda callback: not isinstance(callback, RunFiles))
        trainer.accumulate_grad_batches = self.datamodule.accumulation(trainer.world_size)
        self.model.parent = self.parent
        if self.checkpoint is not None:
            self._check_resume(trainer, run_dir)
        return trainer

    def _check_resume(self, trainer: L.Trainer, run_dir: Path) -> None:
        """Before anything is written: is it this run's checkpoint, and is there anything left to do?"""
        assert self.checkpoint is not None
        ours = self.model.identity(self.datamodule, trainer)
        check_identity(self.checkpoint, ours, fork=self.parent is not None)
        step = self.checkpoint["global_step"]
        if self.parent is not None:
            if step >= trainer.max_steps:
                raise ValueError(
                    f"--fork: expected trainer.max_steps above the checkpoint's step {step}, found {trainer.max_steps}"
                )
            _say(f"forking {self.parent['checkpoint']} at step {step}, to step {trainer.max_steps} in {run_dir}")
            return
        if step >= trainer.max_steps and rundir.is_finished(run_dir):
            raise AlreadyFinished(
                f"{run_dir}: already finished, at step {step}; nothing was changed. `sinkbed validate {run_dir}` "
                "measures it again; a longer run needs a run_dir of its own"
            )
        metrics = run_dir / rundir.METRICS
        points = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
        later = max(0, points - self.checkpoint["saved"]["metrics"].count("\n"))
        _say(f"resuming {run_dir} at step {step} of {trainer.max_steps}; {later} later points will be made again")
        saved = self.checkpoint["sinkbed"]
        names = {"processes": "processes", "micro_batches": "micro-batches a step"}
        split = [f"{name} {saved[k]} -> {ours[k]}" for k, name in names.items() if saved[k] != ours[k]]
        if split:
            _say(f"{', '.join(split)}: the same rows in the same order, sums rounded in another one")

    def after_fit(self) -> None:
        """Say how it ended. A run killed after its last step, before W&B had everything, is measured again when it is
        resumed."""
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        monitor = next(c for c in callbacks if isinstance(c, SinkMonitor))
        if self.trainer.global_step < self.trainer.max_steps:
            _say(_interrupted(self.trainer), file=sys.stderr)
            return
        if monitor.final is None:
            self.model.to(self.trainer.strategy.root_device)  # Lightning has taken it off when fit ended
            next(c for c in callbacks if isinstance(c, RunFiles)).start(self.trainer, self.model)
            monitor.finish(self.trainer, self.model)
        if monitor.final is not None and self.trainer.is_global_zero:
            print(measurement_table(self.trainer.global_step, monitor.final, monitor.config.sink_tokens))
            finish_wandb(0)
            rundir.mark_finished(monitor.run_dir)
            curves = f"; curves: wandb leet {monitor.run_dir}/wandb" if (monitor.run_dir / "wandb").is_dir() else ""
            print(f"in {monitor.run_dir}{curves}")


def requeue() -> None:
    """Have SLURM start this job again; its script resumes with --ckpt_path auto."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{task}" if array and task else os.environ["SLURM_JOB_ID"]
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True)
        print(f"SLURM job {job} is queued again")
    except (OSError, subprocess.CalledProcessError) as error:
        detail = getattr(error, "stderr", "") or error
        print(f"SLURM job {job}: scontrol requeue failed ({detail}); submit the job again", file=sys.stderr)


def run(command: str, argv: Sequence[str]) -> int:
    """Train."""
    ours = [sys.argv[0], command, *argv]
    theirs, sys.argv = sys.argv, ours  # LightningCLI reads the real command line
    # Lightning's advice on workers and its notices of devices say nothing that a user here can use.
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if any(argument in ("-h", "--help", "--help=all") for argument in argv):
        describe_fields()
    if "--help=all" in argv:
        ShortLightningParser.every_key = True
        sys.argv = ["--help" if argument == "--help=all" else argument for argument in ours]
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*exists and is not empty.*")
    warnings.filterwarnings("ignore", ".*LeafSpec.*")
    exit_code = 1
    try:
        cli = SinkbedCLI(
            SinkbedModule,
            TokenData,
            parser_class=ShortLightningParser,
            save_config_callback=RunFiles,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            parser_kwargs={"prog": "sinkbed", "fit": {"description": (__doc__ or "").split("\n")[0]}},
        )
        stop = _checkpoints(cli.trainer).stop
        stopped_early = stop is not None and cli.trainer.global_step < cli.trainer.max_steps
        exit_code = 128 + stop if stop is not None and stopped_early else 0
        if stopped_early and stop == signal.SIGUSR1 and "SLURM_JOB_ID" in os.environ and process_rank() == 0:
            finish_wandb(exit_code)  # first: scontrol ends this job
            requeue()
    except AlreadyFinished as finished:
        _say(finished)
        exit_code = 0
    except SystemExit as stopped:
        # Lightning turns an interruption into the exit status 1.
        if not isinstance(stopped.__context__, KeyboardInterrupt):
            raise
        exit_code = 130
    finally:
        sys.argv = theirs
        finish_wandb(exit_code)
    return exit_code
