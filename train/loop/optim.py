"""The optimizer's settings, its parameter groups (decay on matrices only), and the learning-rate schedules."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sinkbed.ranges import check_number
from sinkbed.registry import Choice, plain
from sinkbed.train.loop.optimizers import OPTIMIZERS

if TYPE_CHECKING:
    import torch
    from torch.optim.lr_scheduler import LambdaLR


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """An optimizer and its schedule. Raises ValueError for values outside their range."""

    name: Choice = "adamw"
    """A file of train/loop/optimizers."""
    lr: float = 4e-4
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of the moment estimates."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled decay, multiplied by the learning rate; on matrices only, never on norms or sink logits."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """After the warm-up: cosine or linear decay over all remaining steps, or constant with a linear
    cooldown over the last `cooldown_steps`."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0."""
    warmup_fraction: float = 0.0
    """The same as a share of all steps; one of the two."""
    cooldown_steps: int = 0
    """Steps of the linear cooldown; only with `constant`."""
    cooldown_fraction: float = 0.0
    """The same as a share of all steps; one of the two."""
    final_fraction: float = 0.1
    """Learning rate at the end, as a share of the peak."""

    def __post_init__(self) -> None:
        OPTIMIZERS.check(self.name)
        object.__setattr__(self, "name", plain(self.name))
        for name in ("lr", "eps"):
            check_number(f"optimizer.{name}", getattr(self, name), above=0)
        for beta in self.betas:
            check_number("optimizer.betas", beta, least=0, below=1)
        check_number("optimizer.weight_decay", self.weight_decay, least=0)
        check_number("optimizer.final_fraction", self.final_fraction, least=0, most=1)
        for name in ("warmup", "cooldown"):
            steps, fraction = getattr(self, f"{name}_steps"), getattr(self, f"{name}_fraction")
            check_number(f"optimizer.{name}_steps", steps, least=0)
            check_number(f"optimizer.{name}_fraction", fraction, least=0, most=1)
            if steps and fraction:
                raise ValueError(
                    f"optimizer.{name}_steps={steps} and {name}_fraction={fraction}: expected one of them; set the "
                    "other to 0"
                )
        if (self.cooldown_steps or self.cooldown_fraction) and self.schedule != "constant":
            raise ValueError(
                "optimizer.cooldown_steps and cooldown_fraction: have an effect with schedule constant only, got "
                f"{self.schedule}; set them to 0"
            )

    def check_steps(self, total_steps: int) -> None:
        """Raise ValueError when warm-up and cooldown do not fit into a run of `total_steps`."""
        warmup, cooldown = self.phases(total_steps)
        if warmup + cooldown > total_steps:
            raise ValueError(
                f"optimizer: warm-up of {warmup} and cooldown of {cooldown} steps "
                f"do not fit into trainer.max_steps={total_steps}; shorten them or train longer"
            )

    def phases(self, total_steps: int) -> tuple[int, int]:
        """Steps of warm-up and of cooldown in a run of `total_steps`."""
        return (
            self.warmup_steps or round(self.warmup_fraction * total_steps),
            self.cooldown_steps or round(self.cooldown_fraction * total_steps),
        )


def learning_rate_factor(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """Learning rate of optimizer step `step` (from 0) of `total_steps`, as a share of the peak."""
    warmup, cooldown = config.phases(total_steps)
    if step < warmup:
        return (step + 1) / warmup
    final = config.final_fraction
    if config.schedule == "constant":
        left = total_steps - step
        if left >= cooldown:
            return 1.0
        return final + (1 - final) * left / cooldown
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    if config.schedule == "linear":
        return 1 - (1 - final) * progress
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))


def build_optimizer(
    model: torch.nn.Module, config: OptimizerConfig, total_steps: int
) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """The optimizer over two groups (matrices with decay, the rest without) and its schedule, stepped each step.

    Raises ValueError: see `OptimizerConfig.check_steps`.
    """
    import torch

    config.check_steps(total_steps)
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = OPTIMIZERS.make(config.name, groups, config)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(config, step, total_steps)
    )
    return optimizer, schedule
