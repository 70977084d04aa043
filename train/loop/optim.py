"""The optimizer's settings, the groups of its parameters (decay on matrices only), and the learning-rate schedules."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.optim.lr_scheduler import LambdaLR

from sinkbed.ranges import check_number
from sinkbed.registry import Choice, plain
from sinkbed.train.loop.optimizers import OPTIMIZERS


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """An optimizer and its schedule. Raises ValueError for values outside their range."""

    name: Choice = "adamw"
    """A file of train/loop/optimizers; what it has of its own, such as AdamW's betas, are options of it."""
    lr: float = 4e-4
    """Peak learning rate."""
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
        check_number("model.optimizer.lr", self.lr, above=0)
        check_number("model.optimizer.weight_decay", self.weight_decay, least=0)
        check_number("model.optimizer.final_fraction", self.final_fraction, least=0, most=1)
        for name in ("warmup", "cooldown"):
            steps, fraction = getattr(self, f"{name}_steps"), getattr(self, f"{name}_fraction")
            check_number(f"model.optimizer.{name}_steps", steps, least=0)
            check_number(f"model.optimizer.{name}_fraction", fraction, least=0, most=1)
            if steps and fraction:
                raise ValueError(
                    f"model.optimizer.{name}_steps={steps} and {name}_fraction={fraction}: expected one of them; set "
                    "the other to 0"
                )
        if (self.cooldown_steps or self.cooldown_fraction) and self.schedule != "constant":
            raise ValueError(
                "model.optimizer.cooldown_steps and cooldown_fraction: have an effect with schedule constant only, got "
                f"{self.schedule}; set them to 0"
            )

    def check_steps(self, total_steps: int) -> None:
        """Raise ValueError when warm-up and cooldown do not fit into a run of `total_steps`."""
        warmup, cooldown = self.phases(total_steps)
        if warmup + cooldown > total_steps:
            raise ValueError(
                f"model.optimizer: warm-up of {warmup} and cooldown of {cooldown} steps "
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


def decay_until(config: OptimizerConfig, step: int, total_steps: int, since: tuple[int, float] = (0, 0.0)) -> float:
    """Σ lr · weight_decay over the first `step` optimizer steps of `total_steps`: −log of what decay alone would leave
    of a matrix, to first order. `since` is a step before and its sum, to go on from.
    """
    first, total = since
    for earlier in range(first, step):
        total += config.lr * learning_rate_factor(config, earlier, total_steps) * config.weight_decay
    return total


def parameter_groups(model: torch.nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """The two usual groups: matrices with weight decay, the rest without."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def groups_by_place(model: torch.nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Three groups: the weight matrices of blocks, whose sides are both widths of the model, then the two usual groups
    of the rest, embeddings and output matrix among them."""
    weights = [p for name, p in model.named_parameters() if "blocks." in name and name.endswith("weight")]
    of_blocks = [p for p in weights if p.requires_grad and p.ndim == 2]
    known = set(map(id, of_blocks))
    rest = [
        {**group, "params": [p for p in group["params"] if id(p) not in known]}
        for group in parameter_groups(model, config)
    ]
    return [{"params": of_blocks, "weight_decay": config.weight_decay}, *rest]


def check_betas(key: str, betas: tuple[float, float]) -> tuple[float, float]:
    """Decay rates of moments, a list in YAML; raises ValueError where one is not at least 0 and less than 1."""
    for beta in betas:
        check_number(key, beta, least=0, below=1)
    return betas[0], betas[1]


def build_optimizer(
    model: torch.nn.Module, config: OptimizerConfig, total_steps: int
) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """The optimizer of a model and its schedule, stepped each step.

    Raises ValueError: see `OptimizerConfig.check_steps`, and for options of the optimizer out of their range.
    """
    config.check_steps(total_steps)
    optimizer = OPTIMIZERS.make(config.name, model, config)
    return optimizer, LambdaLR(optimizer, lambda step: learning_rate_factor(config, step, total_steps))
