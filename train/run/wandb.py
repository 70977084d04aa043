"""W&B, online or offline, as one of the two loggers that `metrics.record` hands every point to."""

import hashlib
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_warn

from sinkbed.ranges import check_number
from sinkbed.train.run import directory
from sinkbed.train.run.charts import Charts, Detail, Map
from sinkbed.train.run.metrics import IN_A_POINT
from sinkbed.train.run.wandb_files import earlier_steps, in_time, mend_wandb_files


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
    detail: Detail = "layers"
    """Charts: headline (sink, losses, training), layers (also maps of layers and heads), all (also each figure)."""
    finish_seconds: float = 300.0
    """Longest wait for the upload when the run ends; `wandb sync` uploads what was left."""

    def __post_init__(self) -> None:
        check_number("wandb.finish_seconds", self.finish_seconds, least=0)
        wrong = sorted({c for c in self.project if c in "/\\#?%:"})
        if wrong or not 0 < len(self.project) <= _LONGEST_NAME:
            raise ValueError(
                f"wandb.project: expected a name of 1 to {_LONGEST_NAME} characters, none of them / \\ # ? % :, "
                f"got {self.project!r}"
            )
        if not all(tag.strip() for tag in self.tags):
            raise ValueError(f"wandb.tags: expected tags that are not empty, got {self.tags}")


# What W&B takes; it refuses the run for more.
_LONGEST_NAME, _LONGEST_TAG = 128, 64


def shortened(name: str, longest: int) -> str:
    """A name as it is, or cut to a length, with what tells it from others that begin alike."""
    if len(name) <= longest:
        return name
    return f"{name[: longest - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


class Tracker(WandbLogger):
    """Lightning's W&B logger for points that W&B counts: the n-th line of metrics.jsonl is W&B's step n, for as long as
    a run logs at the same steps.

    So a run that is resumed leaves out the points that W&B has and sends those it lacks, and segments
    written offline continue one count.
    """

    def __init__(
        self, run: Any, run_dir: Path, charts: Charts, *, sent: int, steps: Sequence[int], number: int
    ) -> None:
        """Configure what is left out.

        Args:
            charts: what W&B is sent of a point.
            sent: points of metrics.jsonl that W&B had when this process began.
            steps: the training step of each; fewer than `sent` where they are not known.
            number: W&B's step of the next point: `sent`, and what was logged beside the points.
        """
        super().__init__(experiment=run, save_dir=str(run_dir))
        self.run_dir = run_dir
        self.charts = charts
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
        if not self._sent(lambda: self.experiment.log(row, step=self.number, commit=True)):
            return
        beside = directory.read_json(self.run_dir / directory.RUN).get("beside", ())
        directory.note(self.run_dir, beside=[*beside, self.number])
        self.number += 1

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Send what has a form in W&B alone, such as an image; numbers come as a point, from `MetricsFile`."""
        beside = {key: value for key, value in metrics.items() if not isinstance(value, IN_A_POINT)}
        if beside:
            self.log_beside(beside)

    def summarize(self, figures: dict[str, Any]) -> None:
        """Put figures of the whole run into W&B's summary of it."""
        self._sent(lambda: self.experiment.summary.update(figures))

    def log_point(self, point: dict[str, Any]) -> None:
        """Send the charts of one line of metrics.jsonl; a map becomes an image."""
        charts = self.charts.row(point)
        if self._has(point["step"]):
            return
        import wandb

        row = {
            key: wandb.Image(heatmap_image(value.values, value.top), caption=value.caption)
            if isinstance(value, Map)
            else value
            for key, value in charts.items()
        }
        self._sent(lambda: self.experiment.log(row, step=self.number, commit=True))
        self.number += 1

    def _sent(self, send: Callable[[], None]) -> bool:
        """Whether W&B's process took something; the first time that it does not, say so, and then try no more."""
        if self.lost:
            return False
        try:
            send()
        except Exception as error:
            self.lost = True
            rank_zero_warn(
                f"W&B takes no more points ({error or type(error).__name__}); training goes on, and metrics.jsonl has "
                "them all"
            )
        return not self.lost


def heatmap_image(values: list[list[float]], top: float = 1.0) -> np.ndarray:
    """A map of values in [0, top], [rows][columns], as an RGB image, rows downwards from the first.

    Colours go by the square root, so that values far below `top` differ.
    Drawn by hand because a matplotlib figure would cost more than the measurement itself.
    """
    shares = np.asarray(values, dtype=np.float64) / (top or 1.0)
    levels = np.sqrt(np.clip(np.nan_to_num(shares), 0, 1))[..., None]
    low, middle, high = np.array([13, 8, 60]), np.array([187, 55, 84]), np.array([252, 255, 164])
    colour = np.where(levels < 0.5, low + (middle - low) * levels * 2, middle + (high - middle) * (levels * 2 - 1))
    cell = max(4, 256 // max(levels.shape[:2]))
    return np.kron(colour.astype(np.uint8), np.ones((cell, cell, 1), dtype=np.uint8))


def wandb_mode(mode: str) -> Any:
    """A mode as W&B knows it: for `auto` that of the environment, else online where there is a key."""
    if mode != "auto":
        return mode
    return os.environ.get("WANDB_MODE") or ("online" if has_wandb_key() else "offline")


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
    the run goes on offline; where W&B does not start at all, without it.
    """
    if config.mode == "disabled":
        return None
    if not os.environ.get("HOME"):  # which W&B's process needs
        try:
            os.environ["HOME"] = str(Path("~").expanduser())
        except RuntimeError:  # a user without a name, as in a container: W&B's own folders go to the run
            os.environ["HOME"] = str((run_dir / "wandb").absolute())
    try:
        return _start(config, run_dir, settings)
    except Exception as error:  # whatever W&B's client raises
        rank_zero_warn(f"W&B does not start ({error}); training goes on without it, metrics.jsonl has every point")
        return None


def _start(config: WandbConfig, run_dir: Path, settings: dict[str, Any]) -> Tracker:
    import wandb

    path = run_dir / directory.RUN
    known = directory.read_json(path)
    if "parent" in known:
        settings = settings | {"parent": known["parent"]}
    mode: Any = wandb_mode(config.mode)
    arguments: dict[str, Any] = dict(
        project=config.project,
        entity=config.entity,
        group=shortened(config.group, _LONGEST_NAME) if config.group else None,
        name=shortened(config.name or run_dir.name, _LONGEST_NAME),
        tags=[shortened(tag, _LONGEST_TAG) for tag in config.tags] or None,
        id=known["wandb_id"],
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
    try:  # without a server W&B warns that resuming has no meaning
        run = wandb.init(mode=mode, resume=None if mode == "offline" else "allow", **arguments)
    except Exception as error:  # whatever W&B's client raises
        if mode == "online":
            rank_zero_warn(f"W&B refused the run ({error}); it goes on offline. Upload it later with: {_sync(run_dir)}")
        wandb.teardown()  # the failed attempt still holds the run's id
        mode = "offline"
        run = wandb.init(mode=mode, **arguments)
    run.define_metric("train/tokens")
    run.define_metric("*", step_metric="train/tokens")
    own = Path(run.dir).parent
    earlier = in_time(f for f in run_dir.glob(f"wandb/*run-*/run-{arguments['id']}.wandb") if f.parent != own)
    message = mend_wandb_files(earlier)
    if message is not None:
        rank_zero_warn(message)
    rows = earlier_steps(f for f in earlier if f.exists())
    number = run.starting_step if mode == "online" else len(rows)
    sent = number - sum(beside < number for beside in known.get("beside", ()))
    steps = [step for step in rows if step is not None]
    tracker = Tracker(run, run_dir, Charts(config.detail), sent=sent, steps=steps[:sent], number=number)
    for point in directory.read_metrics(run_dir / directory.METRICS):
        tracker.log_point(point)
    return tracker


def _sync(run_dir: Path) -> str:
    return f"wandb sync --no-skip-online {shlex.quote(str(run_dir))}/wandb/*run-*"


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
