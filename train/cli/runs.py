"""`sinkbed runs`: the runs below a folder, how far each is, its loss and its sink."""

import fcntl
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sinkbed.plain_text import console, visible
from sinkbed.train.config.arguments import PlainParser
from sinkbed.train.config.yaml_files import read_mapping
from sinkbed.train.run import directory


def run(command: str, argv: Sequence[str]) -> int:
    """Parse and print a line a run. Exit status 1 where there is none."""
    parser = PlainParser(prog=f"sinkbed {command}", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs"), help="where to look (default: runs)")
    folder = parser.parse_args(list(argv)).folder
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder}: expected a folder with runs, got none there{directory.did_you_mean(folder)}"
        )
    lines = [described(path, folder) for path in run_directories(folder)]
    if not lines:
        raise FileNotFoundError(f"{folder}: expected runs, got none; start one with `sinkbed fit` or `sinkbed study`")

    from rich.table import Table

    table = Table(
        caption="saved: step of the newest checkpoint; step, loss: the last that were logged; sink %: eps 0.3, "
        "the first live mode, on measure.live_documents documents"
    )
    for name in COLUMNS:
        table.add_column(name, justify="left" if name in ("run", "state") else "right")
    for line in lines:
        table.add_row(*(line.get(name, "") for name in COLUMNS))
    console(140).print(table)
    for line in lines:
        if "error" in line:
            print(f"{line['run']}: {line['error']}", file=sys.stderr)
    return 0


COLUMNS = ("run", "state", "saved", "step", "tokens", "loss", "val. loss", "sink %")


def run_directories(folder: Path) -> Iterator[Path]:
    """Every run directory in a folder, or the folder itself, by name."""
    for path, folders, files in os.walk(folder):
        folders.sort()
        if directory.CONFIG in files and (directory.METRICS in files or directory.RUN in files):
            folders.clear()  # nothing inside a run is another one
            yield Path(path)


def described(run_dir: Path, below: Path) -> dict[str, str]:
    """A line of the table, by COLUMNS; of a damaged run its state and the error, so that it hides no other."""
    name = visible(str(run_dir.relative_to(below))) if run_dir != below else visible(run_dir.name)
    try:
        config = read_mapping(run_dir / directory.CONFIG)
        last: dict[str, Any] = {}
        for point in directory.read_metrics(run_dir / directory.METRICS):
            last |= {key: value for key, value in point.items() if value is not None}
        mode = (config.get("measure") or {}).get("live_modes", ["bos"])[0]
        saved = [directory.step_of(path) for path in directory.step_checkpoints(run_dir / directory.CHECKPOINTS)]
        most = (config.get("trainer") or {}).get("max_steps", "?")
        return {
            "run": name,
            "state": state(run_dir),
            "saved": f"{max(saved):,}" if saved else "",
            "step": f"{last.get('step', 0):,} of {most:,}" if isinstance(most, int) else str(last.get("step", 0)),
            "tokens": f"{last.get('train/tokens', 0):,}",
            "loss": _number(last.get("train/loss"), 3),
            "val. loss": _number(last.get(f"val/loss/{mode}"), 3),
            "sink %": _number(last.get(f"sink/rate_eps0.3/{mode}"), 1),
        }
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        return {"run": name, "state": "damaged", "error": str(error)}


def state(run_dir: Path) -> str:
    """`finished`, `running`, `stopped` (has a checkpoint to go on from), or `no checkpoint`."""
    if _held(run_dir / directory.LOCK):
        return "running"
    if directory.is_finished(run_dir):
        return "finished"
    return "stopped" if directory.newest_checkpoint(run_dir) else "no checkpoint"


def _held(lock: Path) -> bool:
    """Whether a process of this machine, or of one that shares the file system's locks, writes to the run."""
    if not lock.is_file():
        return False
    with lock.open("rb") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
