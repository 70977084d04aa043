"""What a run writes about itself when it starts and ends, and what it says of itself on the way."""

import json
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from sinkbed.data.files import write_atomic, write_json
from sinkbed.train.config.yaml_files import read_mapping
from sinkbed.train.loop.callbacks.checkpoints import Checkpoints
from sinkbed.train.loop.identity import identify
from sinkbed.train.loop.module import SinkbedModule
from sinkbed.train.run import directory
from sinkbed.train.run.provenance import changes, provenance
from sinkbed.train.run.wandb import Tracker, WandbConfig, start_wandb

say = rank_zero_only(print)


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

    def close(self) -> None:
        """End the bar's line, so that what is printed next has one of its own."""
        if self._train_progress_bar is not None:
            self._train_progress_bar.close()

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

    started = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Nothing yet: the checkpoint may still be refused."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write atomically, from one process. Points after the checkpoint will be made again."""
        if not trainer.is_global_zero:
            return
        assert isinstance(pl_module, SinkbedModule)
        run_dir = Path(self.config["run_dir"])
        checkpoints = checkpoints_of(trainer)
        config = self.config.clone()
        config["ckpt_path"] = None  # else a run started from this file would continue this one
        settings = json.loads(self.parser.dump(config, format="json", skip_unset=False, skip_validation=True))
        # A run that never came to a checkpoint may be started again with other settings: to W&B that is another run.
        is_other = directory.write_config(run_dir / directory.CONFIG, directory.yaml_text(settings))
        other = is_other and not checkpoints.resumed
        if not (checkpoints.resumed and (run_dir / directory.MANIFEST).exists()):  # its own copy stays
            manifest = pl_module.data.store_path / directory.MANIFEST
            write_atomic(run_dir / directory.MANIFEST, manifest.read_bytes())
        write_json(run_dir / directory.AUDIT, pl_module.data.audit())
        (run_dir / directory.MEASUREMENT).unlink(missing_ok=True)  # of an end that is now to come again
        messages = [directory.restore_metrics(run_dir / directory.METRICS, checkpoints.restored)]
        made = provenance(trainer.strategy.root_device, trainer.world_size)
        earlier = checkpoints.run.get("made_by", [])
        if earlier and (changed := changes(earlier[-1], made)):
            say(f"since the checkpoint: {changed}, from those of a run that was not stopped")
        session = {"command": shlex.join(["sinkbed", *sys.argv[1:]]), "started": now()}
        checkpoints.run, more = identify(run_dir, checkpoints.run, pl_module.parent, made, anew=other, session=session)
        for message in filter(None, [*messages, *more]):
            rank_zero_warn(message)
        self.started = True
        tracker = start_wandb(WandbConfig(**config["wandb"].as_dict()), run_dir, settings)
        if tracker is not None:
            trainer.loggers = [*trainer.loggers, tracker]
        print(describe(trainer, pl_module, run_dir, tracker), flush=True)

    def end(self, status: int) -> None:
        """Note in run.json when and how this process ended."""
        if self.started:
            path = Path(self.config["run_dir"])
            *before, last = directory.read_json(path / directory.RUN)["sessions"]
            directory.note(path, sessions=[*before, last | {"ended": now(), "status": status}])

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Lightning ends an interrupted run without a word, and leaves the cursor behind its bar."""
        if isinstance(bar := trainer.progress_bar_callback, ProgressBar):  # type: ignore[attr-defined]
            bar.close()
        if isinstance(exception, KeyboardInterrupt):
            say(interrupted(trainer), file=sys.stderr)


def moved_to(config: Any) -> Path | None:
    """The run directory whose config.yaml was given, where that names another one and nothing else does."""
    for given in config.config or ():
        folder = Path(str(given)).parent
        if Path(str(given)).name == directory.CONFIG and (folder / directory.RUN).exists():
            named = Path(read_mapping(Path(str(given)))["run_dir"]).expanduser()
            if named == Path(config.run_dir) and named.resolve() != folder.resolve():
                return folder
    return None


def now() -> str:
    """The time, to the second, in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def describe(trainer: L.Trainer, module: SinkbedModule, run_dir: Path, tracker: Tracker | None) -> str:
    """What is about to be trained, on what, into which folder; a word more where most parameters are embeddings."""
    assert module.decoder is not None
    data, parameters = module.data, module.decoder.parameter_count()
    embeddings = sum(p.numel() for p in {module.decoder.embedding.weight, module.decoder.head.weight})
    tokens = data.tokens_at(trainer.max_steps)
    sent = "disabled" if tracker is None else "offline" if tracker.experiment.offline else "online"
    line = (
        f"{short(parameters)} parameters, to step {trainer.max_steps:,}: {short(tokens)} tokens, "
        f"{tokens / max(1, data.store.tokens):.2g} times those of {data.store_path}; into {run_dir}, W&B {sent}"
    )
    if embeddings > parameters / 2:
        line += (
            f"\n{embeddings / parameters:.0%} of the parameters are embeddings of {module.decoder.vocab_size:,} "
            "tokens: a smaller vocabulary (tokenizer.vocab_size of `sinkbed prepare`) leaves more to the layers"
        )
    return line


def short(number: int) -> str:
    """A count to three digits: 215k, 1.9M, 10B."""
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= 0.9995 * size:
            return f"{number / size:.3g}{unit}"
    return str(number)


def checkpoints_of(trainer: L.Trainer) -> Checkpoints:
    """The callback that saves."""
    return next(c for c in trainer.callbacks if isinstance(c, Checkpoints))  # type: ignore[attr-defined]


def interrupted(trainer: L.Trainer) -> str:
    """What is kept of a run that was stopped, and how it goes on."""
    checkpoints = checkpoints_of(trainer)
    saved = checkpoints.saved
    if saved is None and directory.newest_checkpoint(checkpoints.folder.parent):  # resumed
        return "stopped before the first step; resume with --ckpt_path last"
    if saved is None:
        return f"stopped at step {trainer.global_step}, before a checkpoint; start it again with the same command"
    return f"stopped at step {trainer.global_step}; step {saved} is saved: resume with --ckpt_path last"
