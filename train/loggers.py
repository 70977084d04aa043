"""Where points go: metrics.jsonl, the durable record, and W&B, online or offline.

Both are Lightning loggers, and `record` hands a point to each with the same x axis, tokens seen.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as L
import numpy as np
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from train import rundir


@dataclass(frozen=True, kw_only=True)
class WandbConfig:
    """W&B settings."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: online when an API key is configured, else offline."""
    project: str = "sinkbed"
    """Project of the run."""
    entity: str | None = None
    """Team or user; null is the key's default."""
    group: str | None = None
    """Group of the run: the name of a study."""
    name: str | None = None
    """Display name; null is the run directory's name."""
    tags: list[str] = field(default_factory=list)
    """Tags of the run."""
    finish_seconds: float = 300.0
    """Longest wait for the upload when the run ends; `wandb sync` uploads what was left."""


class Tracker(WandbLogger):
    """Lightning's W&B logger for points that W&B counts: the n-th line of metrics.jsonl is W&B's step n, for as long as
    a run logs at the same steps.

    So a run that is resumed leaves out the points that W&B has and sends those it lacks, and segments
    written offline continue one count.
    """

    def __init__(self, run: Any, run_dir: Path, *, sent: int, steps: Sequence[int], number: int) -> None:
        """Configure what is left out.

        Args:
            sent: points of metrics.jsonl that W&B had when this process began.
            steps: the training step of each; fewer than `sent` where they are not known.
            number: W&B's step of the next point: `sent`, and what was logged beside the points.
        """
        super().__init__(experiment=run, save_dir=str(run_dir))
        self.run_dir = run_dir
        self.sent = sent
        self.number = number
        """W&B's step of the next point."""
        self.reached = (steps[-1], steps.count(steps[-1])) if steps and len(steps) == sent else None
        """Training step of W&B's last point, and how many of its points are of that step."""
        self.at, self.seen = (-1, 0), 0
        self.lost = False
        """Whether W&B's process failed; a resumed run sends what is missing."""

    def _has(self, step: int) -> bool:
        """Whether W&B has this point, the next of metrics.jsonl."""
        self.at = (step, self.at[1] + 1 if step == self.at[0] else 1)
        self.seen += 1
        return self.seen <= self.sent if self.reached is None else self.at <= self.reached

    def log_beside(self, row: dict[str, Any]) -> None:
        """Send what is no point of metrics.jsonl, and remember its number: a resumed run counts the points alone."""
        self.experiment.log(row, step=self.number, commit=True)
        path = self.run_dir / rundir.RUN
        known = rundir.read_json(path)
        rundir.write_json(path, {**known, "beside": [*known.get("beside", ()), self.number]})
        self.number += 1

    def log_point(self, point: dict[str, Any]) -> None:
        """Send one line of metrics.jsonl; a map becomes an image, a gap is left out."""
        if self._has(point["step"]) or self.lost:
            return
        import wandb

        row: dict[str, Any] = {}
        for key, value in point.items():
            if key == "step":
                row["trainer/global_step"] = value
            elif isinstance(value, list):
                scale = "layers down, heads across; 0 dark to 1 bright, by the root"
                caption = f"{key}: {scale}; {point['train/tokens']:,} tokens"
                row[key] = wandb.Image(heatmap_image(value), caption=caption)
            elif value is not None:
                row[key] = value
        try:
            self.experiment.log(row, step=self.number, commit=True)
        except Exception as error:
            self.lost = True
            rank_zero_warn(
                f"W&B takes no more points ({error or type(error).__name__}); training goes on, and metrics.jsonl has "
                "them all"
            )
        self.number += 1


class MetricsFile(Logger):
    """One JSON object a point in metrics.jsonl, flushed line by line."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__()
        self.run_dir = run_dir

    @property
    def name(self) -> str:
        """Name of the logger."""
        return "metrics"

    @property
    def version(self) -> str:
        """Unused."""
        return ""

    @property
    def log_dir(self) -> str:
        """The run directory, which Lightning takes as its own."""
        return str(self.run_dir)

    @property
    def save_dir(self) -> str:
        """The run directory."""
        return str(self.run_dir)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run directory holds config.yaml."""

    @rank_zero_only
    def log_point(self, point: dict[str, Any]) -> None:
        """Append one point."""
        path = self.run_dir / rundir.METRICS
        with path.open("ab", buffering=0) as file:
            size = file.tell()
            line = (json.dumps(point) + "\n").encode()
            try:
                written = file.write(line)
                if written != len(line):  # a disk that fills up takes a part
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError as error:
                os.truncate(path, size)
                raise OSError(error.errno, error.strerror, str(path)) from None

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Append values that Lightning itself logs."""
        self.log_point({"step": step, **metrics})


def heatmap_image(values: list[list[float]]) -> np.ndarray:
    """A [L][H] map of masses in [0, 1] as an RGB image, layers downwards from the first, heads across.

    Colours go by the square root, so that masses far below 1 differ, on a scale that is the same for every image.
    Drawn by hand because a matplotlib figure would cost more than the measurement itself.
    """
    levels = np.sqrt(np.clip(np.asarray(values, dtype=np.float64), 0, 1))[..., None]
    low, middle, high = np.array([13, 8, 60]), np.array([187, 55, 84]), np.array([252, 255, 164])
    colour = np.where(levels < 0.5, low + (middle - low) * levels * 2, middle + (high - middle) * (levels * 2 - 1))
    cell = max(4, 256 // max(levels.shape[:2]))
    return np.kron(colour.astype(np.uint8), np.ones((cell, cell, 1), dtype=np.uint8))


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
    # JSON has no NaN; a gap in a curve is written as null.
    point = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in point.items()}
    for logger in trainer.loggers:
        assert isinstance(logger, Tracker | MetricsFile)
        logger.log_point(point)


def has_wandb_key() -> bool:
    """Whether W&B has credentials: in the environment, its settings, or stored by `wandb login`."""
    import netrc

    import wandb

    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    settings = wandb.setup().settings
    if settings.api_key:
        return True
    try:
        hosts = netrc.netrc(os.environ.get("NETRC")).hosts
    except (OSError, netrc.NetrcParseError):
        return False
    return settings.base_url.split("://")[-1].strip("/") in hosts


def process_rank() -> int:
    """Rank of this process, as Lightning knows it before a trainer exists."""
    return int(getattr(rank_zero_only, "rank", 0))


_SECONDS_TO_ANSWER = 10


def _answers(url: str) -> bool:
    """Whether a server answers. Asked first, because an init that fails takes a minute and a half."""
    import requests

    try:
        return requests.head(url, timeout=_SECONDS_TO_ANSWER).status_code < 500
    except requests.RequestException:
        return False


def start_wandb(config: WandbConfig, run_dir: Path, settings: dict[str, Any]) -> Tracker | None:
    """Start or continue the run's W&B run, and send what metrics.jsonl holds and W&B lacks.

    Its id is the one in run.json, also offline. A server that does not answer, or refuses the run, costs a warning and
    the run goes on offline.
    """
    if config.mode == "disabled" or process_rank() != 0:
        return None
    import wandb

    path = run_dir / rundir.RUN
    known = rundir.read_json(path)
    if "parent" in known:
        settings = settings | {"parent": known["parent"]}
    mode: Any = config.mode
    if mode == "auto":
        mode = os.environ.get("WANDB_MODE") or ("online" if has_wandb_key() else "offline")
    arguments: dict[str, Any] = dict(
        project=config.project,
        entity=config.entity,
        group=config.group,
        name=config.name or run_dir.name,
        tags=config.tags or None,
        id=known["wandb_id"],
        resume="allow",
        dir=str(run_dir),
        config=settings,
        settings=wandb.Settings(
            console="off",
            silent=mode == "offline",
            finish_timeout=config.finish_seconds,
            finish_timeout_raises=True,
            quiet=True,
        ),
    )
    if mode == "online" and not _answers(wandb.setup().settings.base_url):
        rank_zero_warn(
            f"the W&B server {wandb.setup().settings.base_url} does not answer; the run goes on offline. "
            f"Upload it later with: {_sync(run_dir)}"
        )
        mode = "offline"
    if mode == "offline":
        arguments.pop("resume", None)  # W&B warns that it has no meaning without a server
    try:
        run = wandb.init(mode=mode, **arguments)
    except Exception as error:  # whatever W&B's client raises
        if mode == "online":
            rank_zero_warn(f"W&B refused the run ({error}); it goes on offline. Upload it later with: {_sync(run_dir)}")
        wandb.teardown()  # the failed attempt still holds the run's id
        arguments.pop("resume", None)
        mode = "offline"
        try:
            run = wandb.init(mode=mode, **arguments)
        except Exception as again:
            rank_zero_warn(f"W&B does not start ({again}); training goes on without it, metrics.jsonl has every point")
            return None
    run.define_metric("train/tokens")
    run.define_metric("*", step_metric="train/tokens")
    own = Path(run.dir).parent
    earlier = [f for f in run_dir.glob(f"wandb/*run-*/run-{arguments['id']}.wandb") if f.parent != own]
    for file in earlier:
        mend_wandb_file(file)
    rows = _earlier_steps(f for f in earlier if f.exists())
    number = run.starting_step if mode == "online" else len(rows)
    sent = number - sum(beside < number for beside in known.get("beside", ()))
    steps = [step for step in rows if step is not None]
    tracker = Tracker(run, run_dir, sent=sent, steps=steps[:sent], number=number)
    for point in rundir.read_metrics(run_dir / rundir.METRICS):
        tracker.log_point(point)
    return tracker


def _sync(run_dir: Path) -> str:
    return f"wandb sync --no-skip-online {run_dir}/wandb/*run-*"


def _earlier_steps(files: Iterable[Path]) -> list[int | None]:
    """Training step of each row in the W&B files that earlier processes wrote for a run, by W&B's count; None for one
    that is no point of metrics.jsonl."""
    in_time = sorted(files, key=lambda file: file.parent.name.partition("run-")[2])
    steps = {row["_step"]: row.get("trainer/global_step") for file in in_time for row in read_wandb_file(file)}
    return [steps[number] for number in sorted(steps)]


def _wandb_records(content: bytes) -> Iterator[tuple[bytes, int]]:
    """Records of a W&B run file, each with the offset at which it ends, up to where the file breaks off.

    The format is LevelDB's log: blocks of 32 KiB, in them pieces of records with checksum (4 bytes),
    length (2) and kind (1: whole, 2: first, 3: middle, 4: last); a record is a protocol buffer.
    """
    at, record = 7, b""  # after the file's own header
    while at + 7 <= len(content):
        left = 32768 - at % 32768
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        if left < 7 or kind == 0:  # a header never crosses a block
            at += left
            continue
        if at + 7 + length > len(content):
            return
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield record, at
            record = b""


def mend_wandb_file(path: Path) -> None:
    """Cut off the record that a kill left unfinished, and remove the folder of a file without any.

    At either, `wandb sync` stops and leaves the later segments of the run out.
    """
    content = path.read_bytes()
    end = max((end for _, end in _wandb_records(content)), default=0)
    if end == 0:
        shutil.rmtree(path.parent)
    elif end < len(content):
        os.truncate(path, end)


def read_wandb_file(path: Path) -> Iterator[dict[str, Any]]:
    """History rows of a W&B run file, `_step` among their keys, up to where it breaks off."""
    from google.protobuf.message import DecodeError
    from wandb.proto import wandb_internal_pb2

    for content, _ in _wandb_records(path.read_bytes()):
        record: Any = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
        try:
            record.ParseFromString(content)
        except DecodeError:
            return
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            row = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items}
            yield {**row, "_step": record.history.step.num}


def finish_wandb(exit_code: int) -> None:
    """Close the run, so that its file is complete; a code other than 0 marks it as failed."""
    wandb = sys.modules.get("wandb")
    if wandb is None or wandb.run is None:
        return
    run_dir = Path(wandb.run.dir).parents[2]
    try:
        wandb.finish(exit_code=exit_code)
    except Exception as error:
        reason = error or type(error).__name__
        rank_zero_warn(f"W&B did not take all of the run ({reason}); upload it with: {_sync(run_dir)}")
