"""Lightning's trainer as `sinkbed fit` shows it, and what it refuses of it: settings that it sets itself, that cannot
work here, or that run code."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import LightningArgumentParser

from sinkbed.train.config.arguments import ShortErrors
from sinkbed.train.loop.parts import REGISTRIES

# Trainer settings that this command sets itself, or that would end or repeat the endless walk over rows.
_TRAINER_FIXED = {
    "accumulate_grad_batches": (1, "data.micro_batch_size"),
    "gradient_clip_val": (None, "model.max_grad_norm"),
    "gradient_clip_algorithm": (None, "model.max_grad_norm"),
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

_STRATEGIES = ("auto", "ddp", "fsdp2", "fsdp2_sharded")

_TRAINER_SHOWN = ("max_steps", "accelerator", "devices", "num_nodes", "strategy", "precision", "log_every_n_steps")


class ShortLightningParser(ShortErrors, LightningArgumentParser):  # type: ignore[misc]
    """Lightning's parser with short errors, and a help in which our keys come first."""

    every_key = False
    """Whether the help lists all of the trainer's keys too."""

    def format_help(self, *arguments: Any) -> str:
        """Groups of keys, the trainer's last and cut to what a run is likely to set."""
        if not self.every_key:
            self.usage = "%(prog)s --config FILE [--config OVERLAY ...] [--KEY VALUE ...]"
            self.epilog = "--help=all lists the other keys of Lightning's trainer too."
        groups: list[Any] = self._action_groups  # type: ignore[assignment]
        for action in self._actions:
            if action.dest in REGISTRIES:
                variants = str(REGISTRIES[action.dest])
                options = "; with options {NAME: {OPTION: VALUE}}" if "(" in variants else ""
                said, _, _ = (action.help or "").partition(" One of ")  # a help is formatted more than once
                action.help = f"{said} One of {variants}{options}."
        for group in groups:
            group._group_actions = [
                action
                for action in group._group_actions
                if self.every_key or not action.dest.startswith("trainer") or action.dest[8:] in _TRAINER_SHOWN
            ]
        groups.sort(key=lambda group: any(action.dest.startswith("trainer.") for action in group._group_actions))
        return super().format_help(*arguments)


def check_trainer(trainer: Any) -> None:
    """Raise ValueError for a setting of the trainer that cannot work, with the one to set in its place."""
    if str(trainer.precision).startswith("16"):  # 16 is 16-mixed to Lightning, which makes bf16 of it on a CPU
        raise ValueError(
            "trainer.precision: expected bf16-mixed, bf16-true or 32-true, got "
            f"{trainer.precision}, which overflows (16-mixed to find its loss scale) and counts as diverged here"
        )
    strategy = str(trainer.strategy)
    if strategy not in _STRATEGIES:
        raise ValueError(f"trainer.strategy: expected one of {', '.join(_STRATEGIES)}; got {strategy}")
    if trainer.accelerator == "cpu" and str(trainer.precision).startswith("bf16") and not _has_bfloat16():
        raise ValueError(
            "trainer.precision: expected 32-true on a CPU without arithmetic in bfloat16, which would only be slower, "
            f"got {trainer.precision}"
        )
    for name, (fixed, instead) in _TRAINER_FIXED.items():
        if trainer.get(name, fixed) not in (fixed, None):
            raise ValueError(f"trainer.{name}: has no effect here, got {trainer.get(name)}; set {instead} instead")


def _has_bfloat16() -> bool:
    """Whether the CPU multiplies in bfloat16 (AVX512-BF16, AMX, Arm's BF16)."""
    return any(there and "bf16" in name for name, there in torch.cpu.get_capabilities().items())


def expand_home(config: Any, *keys: str) -> None:
    """Put the home folder in place of `~`. Raises ValueError for a user who has none."""
    for key in keys:
        try:
            if config[key]:
                config[key] = type(config[key])(Path(config[key]).expanduser())
        except RuntimeError:
            raise ValueError(
                f"{key}: expected a path, got {config[key]}, of a user without a home folder; write it out"
            ) from None
