"""`sinkbed fit`: Lightning's command line with the run directory around it."""

import contextlib
import logging
import os
import re
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.plugins.environments import SLURMEnvironment

from sinkbed.data.files import remove_temporaries
from sinkbed.memory import keep_freed_memory
from sinkbed.plain_text import counted
from sinkbed.train.config.arguments import describe_fields, refuse_classes
from sinkbed.train.config.overrides import overridden
from sinkbed.train.loop.callbacks.checkpoints import Checkpoints, remove_partial
from sinkbed.train.loop.callbacks.run_files import ProgressBar, RunFiles, checkpoints_of, interrupted, moved_to, say
from sinkbed.train.loop.callbacks.sinks import SinkMonitor
from sinkbed.train.loop.callbacks.states import StateMonitor
from sinkbed.train.loop.callbacks.store_check import StoreCheck
from sinkbed.train.loop.cpu import use_cpu
from sinkbed.train.loop.datamodule import TokenData
from sinkbed.train.loop.identity import check_identity, check_manifest, other_sums
from sinkbed.train.loop.module import SinkbedModule
from sinkbed.train.loop.settings import check_settings, unmeasured_input
from sinkbed.train.loop.trainer_settings import ShortLightningParser, check_trainer, expand_home
from sinkbed.train.measure.config import MeasureConfig
from sinkbed.train.measure.sinks import measurement_table
from sinkbed.train.run import directory
from sinkbed.train.run.checkpoint import SyncedCheckpointIO, load_checkpoint
from sinkbed.train.run.metrics import MetricsFile
from sinkbed.train.run.wandb import WandbConfig, finish_wandb
from sinkbed.train.run.world import devices_of, join, lost_process, requeue


class AlreadyFinished(Exception):
    """The run to resume has nothing left to do."""


class StoppedEarly(RuntimeError):
    """A callback ended training before its last step."""


class SinkbedCLI(LightningCLI):
    """LightningCLI with a run directory, the sink monitor and W&B."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Parse, build and train, with the run directory locked."""
        self.held: directory.Lock | None = None
        self.checkpoint: dict[str, Any] | None = None
        self.parent: dict[str, Any] | None = None
        self.rank = 0
        status = 1
        try:
            super().__init__(*args, **kwargs)
            status = self.exit_status
        except Exception as error:
            # From a data worker: its traceback as text, at whose end the message is.
            if str(error).startswith("Caught ") and isinstance(error, ValueError | OSError):
                raise ValueError(re.split(r"\n[\w.]*(?:Error|Exception): ", str(error))[-1].strip()) from None
            lost = lost_process(error, lambda: directory.newest_checkpoint(Path(self.config.fit.run_dir)))
            if lost is not None:
                raise lost from None
            raise
        finally:
            if self.held is not None:
                with contextlib.suppress(OSError, ValueError, LookupError, RuntimeError):  # what ended the run is told
                    self._end(status)
                directory.release(self.held)

    @property
    def exit_status(self) -> int:
        """Of a training that has returned: as a shell has it where a signal stopped it before its last step."""
        stop = checkpoints_of(self.trainer).stop
        return 0 if stop is None or self.trainer.global_step >= self.trainer.max_steps else 128 + stop

    def _end(self, status: int) -> None:
        trainer: L.Trainer | None = getattr(self, "trainer", None)
        for callback in trainer.callbacks if trainer is not None else ():  # type: ignore[attr-defined]
            if isinstance(callback, RunFiles):
                callback.end(status)

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
        check_settings(config)
        check_trainer(config.trainer)
        use_cpu(config.threads)
        keep_freed_memory()
        for line in filter(None, (overridden(sys.argv[2:]), unmeasured_input(config))):
            say(line, file=sys.stderr)
        expand_home(config, "run_dir", "fork", "ckpt_path")
        expand_home(config.data, "store")
        self.rank = join(devices_of(config.trainer), config.trainer.num_nodes)
        moved = moved_to(config)
        if moved is not None:
            names = f"{moved / directory.CONFIG} names {config.run_dir}"
            say(f"{names}, but was moved or copied: the run goes on in {moved}")
            config.run_dir = moved
        run_dir = Path(config.run_dir)
        last = None if config.ckpt_path not in (None, "last", "auto") else directory.newest_checkpoint(run_dir)
        folder = run_dir / directory.CHECKPOINTS
        if last is not None and not config.ckpt_path:
            raise FileExistsError(
                f"run_dir {run_dir}: expected a new folder, got a run. Resume it with --ckpt_path last, "
                "or choose another --run_dir"
            )
        ours = (directory.CONFIG, directory.MANIFEST, directory.AUDIT, directory.METRICS, directory.MEASUREMENT)
        there = [name for name in ours if (run_dir / name).exists()]
        if there and not any((run_dir / name).exists() for name in (directory.RUN, directory.LOCK)):
            raise FileExistsError(
                f"run_dir {run_dir}: expected a new folder or a run, got a folder with a {there[0]} that is no run's; "
                "choose another --run_dir"
            )
        if config.ckpt_path == "auto":
            config.ckpt_path = "last" if last is not None else None
        if config.ckpt_path == "last":
            if last is None:
                raise FileNotFoundError(
                    f"--ckpt_path last: expected a checkpoint in {folder}, got none; leave --ckpt_path out to start "
                    "the run"
                )
            config.ckpt_path = str(last)
        if config.ckpt_path and Path(config.ckpt_path).resolve().parent != folder.resolve():
            raise ValueError(
                f"--ckpt_path {config.ckpt_path}: expected last, auto or a checkpoint of this run, in {folder}; start "
                "a new run from another one's with --fork"
            )
        forking = config.fork is not None and not config.ckpt_path
        if forking:
            parent = Path(config.fork).resolve()
            if (parent / directory.CONFIG).is_file():  # a run: its newest checkpoint
                parent = directory.newest_checkpoint(parent) or parent / directory.CHECKPOINTS / directory.LAST
            config.ckpt_path = str(parent)
        if self.rank == 0:
            self.held = directory.lock(run_dir)
            remove_temporaries(run_dir)
            remove_partial(run_dir / directory.CHECKPOINTS)
        if config.ckpt_path:
            option = "--fork" if forking else "--ckpt_path"
            # One process compares the bytes for all; where it finds damage, the job ends.
            loaded = load_checkpoint(Path(config.ckpt_path), tensors=False, verify=self.rank == 0, option=option)
            saved = (loaded.get("callbacks") or {}).get("Checkpoints", {})
            self.checkpoint = {k: loaded.get(k) for k in ("sinkbed", "global_step")} | {"saved": saved}
            if forking:
                run = {k: v for k, v in saved.get("run", {}).items() if k in ("wandb_id", "parent")}
                self.parent = {"checkpoint": config.ckpt_path, "step": loaded.get("global_step"), **run}

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """The trainer with our callbacks, checkpoint files and loggers."""
        config = self.config_init.fit
        run_dir = Path(config.run_dir)
        monitor = SinkMonitor(config.measure, run_dir)
        checkpoints = Checkpoints(
            run_dir / directory.CHECKPOINTS,
            every=config.checkpoint_every,
            points=config.checkpoint_points,
            metrics=run_dir / directory.METRICS,
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
        metrics = MetricsFile(run_dir)
        trainer = super().instantiate_trainer(
            logger=[metrics],
            default_root_dir=str(run_dir),
            plugins=plugins,
            enable_checkpointing=True,
            **kwargs,
        )
        metrics.trainer = trainer
        if trainer.is_global_zero != (self.rank == 0):
            raise ValueError(
                f"the first process of {trainer.world_size}: expected rank {trainer.global_rank}, got the "
                f"variables of rank {self.rank} in the environment; start the processes with torchrun or srun"
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
        if self.parent is None:
            check_manifest(run_dir, self.datamodule.store.manifest)
        step = self.checkpoint["global_step"]
        if self.parent is not None:
            if step >= trainer.max_steps:
                raise ValueError(
                    f"--fork: expected trainer.max_steps above the checkpoint's step {step}, got {trainer.max_steps}"
                )
            say(f"forking {self.parent['checkpoint']} at step {step}, to step {trainer.max_steps} in {run_dir}")
            return
        if step >= trainer.max_steps and directory.is_finished(run_dir):
            directory.check_finished(run_dir)
            raise AlreadyFinished(
                f"{run_dir}: already finished, at step {step}; nothing was changed. `sinkbed validate {run_dir}` "
                "measures it again; a larger --trainer.max_steps trains on where optimizer.schedule is constant, "
                "from a checkpoint before its cooldown, and a run_dir of its own with --fork always"
            )
        metrics = run_dir / directory.METRICS
        points = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
        later = max(0, points - self.checkpoint["saved"]["metrics"].count("\n"))
        again = f"; {counted(later, 'later point')} will be made again" if later else ""
        say(f"resuming {run_dir} at step {step} of {trainer.max_steps}{again}")
        saved = self.checkpoint["sinkbed"]
        if saved["max_steps"] != trainer.max_steps:
            say(f"it was to end at step {saved['max_steps']}, and is trained on as if it had been longer all along")
        if changed := other_sums(saved, ours):
            say(f"{changed}: the same rows in the same order, sums rounded in another one")

    def after_fit(self) -> None:
        """Say how it ended. A run killed after its last step, before W&B had everything, is measured again when it is
        resumed."""
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        monitor = next(c for c in callbacks if isinstance(c, SinkMonitor))
        if self.trainer.global_step < self.trainer.max_steps:
            if checkpoints_of(self.trainer).stop is None:
                raise StoppedEarly(
                    f"a callback ended the run before its step {self.trainer.max_steps}: {interrupted(self.trainer)}"
                )
            say(interrupted(self.trainer), file=sys.stderr)
            return
        if monitor.final is None:
            self.model.to(self.trainer.strategy.root_device)  # Lightning has taken it off when fit ended
            next(c for c in callbacks if isinstance(c, RunFiles)).on_train_start(self.trainer, self.model)
            monitor.finish(self.trainer, self.model)
        if monitor.final is not None and self.trainer.is_global_zero:
            print(measurement_table(self.trainer.global_step, monitor.final, monitor.config.sink_tokens))
            finish_wandb(0)
            directory.mark_finished(monitor.run_dir)
            curves = f"; curves: wandb leet {monitor.run_dir}/wandb" if (monitor.run_dir / "wandb").is_dir() else ""
            print(
                f"in {monitor.run_dir}: metrics.jsonl, measurement.json, checkpoints/last.ckpt{curves}; more figures: "
                f"sinkbed probe {monitor.run_dir} --measure all"
            )


class SettingsAreGood(Exception):
    """What `CheckingCLI` ends with."""


class CheckingCLI(SinkbedCLI):
    """Reads the settings of a run and refuses what `fit` would, as far as that needs no token store; builds nothing."""

    def before_instantiate_classes(self) -> None:
        """Raises ValueError, or `SettingsAreGood`."""
        check_settings(self.config.fit)
        check_trainer(self.config.fit.trainer)
        raise SettingsAreGood


def run(command: str, argv: Sequence[str], cli_class: type[SinkbedCLI] = SinkbedCLI) -> int:
    """Train, or with another class check."""
    if "--trust_config" in argv:
        argv = [argument for argument in argv if argument != "--trust_config"]
    else:
        refuse_classes()
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
        cli = cli_class(
            SinkbedModule,
            TokenData,
            parser_class=ShortLightningParser,
            save_config_callback=RunFiles,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            parser_kwargs={"prog": "sinkbed", "fit": {"description": (__doc__ or "").split("\n")[0]}},
        )
        exit_code = cli.exit_status
        if exit_code == 128 + signal.SIGUSR1 and "SLURM_JOB_ID" in os.environ and cli.rank == 0:
            finish_wandb(exit_code)  # first: scontrol ends this job
            requeue()
    except AlreadyFinished as finished:
        say(finished)
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
