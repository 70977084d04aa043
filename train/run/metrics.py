"""metrics.jsonl, the durable record of every point, and how a point comes to every logger.

A point is of a step, with one x axis: tokens seen.
"""

import errno
import json
import math
import os
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from sinkbed.train.run import directory

IN_A_POINT = (int, float, str, torch.Tensor)
"""What others than ours may log."""


class MetricsFile(Logger):
    """One JSON object a point in metrics.jsonl, flushed line by line."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__()
        self.run_dir = run_dir
        self.trainer: L.Trainer | None = None
        """Whose steps and tokens the points of others are of."""
        self.step = 0

    @property
    def name(self) -> str:
        """Name of the logger."""
        return "metrics"

    @property
    def version(self) -> str:
        """Unused."""
        return ""

    @property
    def save_dir(self) -> str:
        """The run directory, which Lightning takes as its own."""
        return str(self.run_dir)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run directory holds config.yaml."""

    @rank_zero_only
    def log_point(self, point: dict[str, Any]) -> None:
        """Append one point."""
        self.step = point["step"]
        path = self.run_dir / directory.METRICS
        with path.open("ab", buffering=0) as file:
            size = file.tell()
            line = (json.dumps(point, allow_nan=False) + "\n").encode()
            try:
                written = file.write(line)
                if written != len(line):  # a disk that fills up takes a part
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError as error:
                os.truncate(path, size)
                raise OSError(error.errno, error.strerror, str(path)) from None

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """What Lightning's callbacks log becomes a point as any other, in every logger, at the step now reached."""
        if self.trainer is None:
            return
        values: dict[str, Any] = {
            key: value.item() if isinstance(value, torch.Tensor) else value
            for key, value in metrics.items()
            if isinstance(value, IN_A_POINT) and key not in ("step", "train/tokens")
        }
        step = max(self.trainer.global_step, self.step)  # not theirs, which may go back
        tokens = self.trainer.datamodule.tokens_at(step)  # type: ignore[attr-defined]
        if values:
            record(self.trainer, values, step=step, tokens=tokens)


def record(
    trainer: L.Trainer,
    values: dict[str, float],
    *,
    step: int,
    tokens: int,
    heatmaps: dict[str, list[list[float]]] | None = None,
) -> None:
    """Hand one point to every logger: scalars, and maps as lists (metrics.jsonl) or images (W&B)."""
    point: dict[str, Any] = {"step": step, "train/tokens": tokens, **values, **(heatmaps or {})}
    point = _without_nan(point)
    for logger in trainer.loggers:
        logger.log_point(point)  # type: ignore[attr-defined]  # of a MetricsFile and a Tracker


def _without_nan(value: Any) -> Any:
    """JSON has no NaN; a gap in a curve is written as null."""
    if isinstance(value, dict):
        return {key: _without_nan(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
