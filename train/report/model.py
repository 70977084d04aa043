"""Writing what `sinkbed probe` measured: CSV, figures, one HTML page that holds them all, and a point in W&B."""

import io
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from sinkbed.data.files import NoRecord, write_files, write_json
from sinkbed.plain_text import counted, csv_text
from sinkbed.train.config.yaml_files import read_mapping
from sinkbed.train.report import html
from sinkbed.train.report.figures import Drawing, Picture, draw
from sinkbed.train.report.model_figures import pictures
from sinkbed.train.report.model_tables import Measured, scalars, tables
from sinkbed.train.report.table import Table
from sinkbed.train.run import directory

RECORD = "probe.json"
_UNFINISHED = "being_written"


def write(measured: Measured, folder: Path) -> Path:
    """Write probe.json, a CSV a table, the figures as SVG, PDF and PNG, and index.html; returns the page."""
    return publish(measured, folder, tables(measured), pictures(measured), partial(_page, measured))


def publish(
    record: Measured,
    folder: Path,
    tables: Iterable[Table],
    pictures: Iterable[Picture],
    page: Callable[[Sequence[Drawing]], str],
) -> Path:
    """Write a report from its record, which becomes probe.json, its tables, its pictures and what makes their page.

    An earlier report is removed before the first file of this one is written, so that a folder never holds figures of
    two measurements. probe.json comes first and last: it says what a writer that is killed left unfinished.
    """
    path = folder / RECORD
    earlier = directory.read_json(path) if path.is_file() else {}
    left = {"files": earlier.get("files", [])}  # to be removed, also after a kill
    if "folders" in earlier:
        # Under their own names, as a model may have moved to another folder.
        left["folders"] = {name: name for name in earlier["folders"].values()} | record.get("folders", {})
    write_json(path, {**record, _UNFINISHED: True, **left})  # before figures take their time
    _remove(folder, earlier, record.get("folders", {}).values())
    files: dict[str, str | bytes] = {f"{t.name}.csv": csv_text(t.keys or t.header, t.rows) for t in tables}
    drawings = [draw(picture, ("svg", "pdf", "png")) for picture in pictures]
    for drawing in drawings:
        files |= drawing.files
    files["index.html"] = page(drawings)
    write_json(path, {**record, _UNFINISHED: True, "files": sorted(files)})
    write_files(folder, files)
    write_json(path, {**record, "files": sorted(files)})
    return folder / "index.html"


def _remove(folder: Path, record: Measured, kept: Collection[str] = ()) -> None:
    """Remove the files of a report, and the reports of single models in folders below it, but for those kept."""
    for name in record.get("files", []):
        if Path(name).name == name:
            (folder / name).unlink(missing_ok=True)
    for name in record.get("folders", {}).values():
        below = folder / name / RECORD
        if Path(name).name == name and name not in kept and below.is_file():
            _remove(below.parent, directory.read_json(below))
            below.unlink()
            with suppress(OSError):  # files of others are in it
                below.parent.rmdir()


def check_out(folder: Path, force: bool) -> None:
    """Raise FileExistsError or ValueError, before anything is measured, for a folder that no report can go to."""
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"--out {folder}: expected a folder, got a file")
    killed = (f".{RECORD}.*.partial", directory.LOCK)  # what a probe leaves that is killed before it writes
    if folder.is_dir() and any(path for path in folder.iterdir() if not any(map(path.match, killed))):
        # Read with --force too: a damaged one would stop the writing, when all has been measured.
        earlier = None
        with suppress(NoRecord):  # a file of somebody else's
            earlier = directory.read_json(folder / RECORD) if (folder / RECORD).is_file() else None
        if not isinstance(earlier, dict):
            raise FileExistsError(
                f"--out {folder}: expected a new folder, or the report of an earlier probe, got other files; choose "
                "another folder"
            )
        if not force and _UNFINISHED not in earlier:
            raise FileExistsError(
                f"--out {folder}: got the report of an earlier probe; choose another folder, or --force to replace it"
            )
    check_writable("--out", folder)


@contextmanager
def claimed(folder: Path | None, force: bool) -> Iterator[None]:
    """Keep other probes out of a folder while its reports are made. Raises ValueError where one writes to it, and as
    `check_out` where one has written to it since."""
    if folder is None:
        yield
        return
    lock = directory.lock(folder)
    try:
        check_out(folder, force)
        yield
    finally:
        (folder / directory.LOCK).unlink(missing_ok=True)
        directory.release(lock)


def check_writable(option: str, path: Path) -> None:
    """Raise ValueError where `path` cannot be written."""
    above = next(folder for folder in (path if path.is_dir() else path.parent, *path.parents) if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise ValueError(f"{option} {path}: expected a place to write to, got {above}, which cannot be written to")


def _page(measured: Measured, drawings: Sequence[Drawing]) -> str:
    settings = measured["settings"]
    origin = counted(measured["documents"], "prompt" if settings["prompts"] else "held-out document")
    origin += f" of {settings['prompts']}" if settings["prompts"] else ""
    T, few = settings["sink_tokens"], min(measured["documents"], settings["mixing_documents"])
    intro = (
        f"{origin}. Sink rates: T = {T}. States and mixing: the first {T} tokens of "
        f"the first {few} of them (Jacobian: of {min(few, settings['jacobian_documents'])}, directions: "
        f"{settings['directions']}). One measurement of one model: no interval over seeds."
    )
    options = [(name, str(value)) for name, value in settings.items() if value not in (None, [], False)]
    used = Table("settings", "Settings", ("option", "value"), [*options, *measured["versions"].items()])
    every = tables(measured)
    first = [t for t in every if t.name == "sinks"]
    body = [
        html.paragraph(intro),
        *(html.section(t.title, html.table(t)) for t in first),
        *map(html.picture, drawings),
        html.section("Numbers", *(html.folded(t.title, html.table(t)) for t in (*every, used) if t not in first)),
    ]
    ending = f" (incomplete: {measured['incomplete']})" if "incomplete" in measured else ""
    return html.document(f"Probe of {measured['model']}{ending}", body)


def log_to_wandb(measured: Measured, run_dir: Path, step: int) -> str:
    """Log figures, tables and numbers as one more point of the run's W&B history; returns a line that says where.

    metrics.jsonl, the record of training, is left as it is.
    """
    import wandb
    from PIL import Image

    from sinkbed.train.run.wandb import WandbConfig, finish_wandb, start_wandb

    lock = directory.lock(run_dir)
    try:
        config = WandbConfig(**(read_mapping(run_dir / directory.CONFIG).get("wandb") or {}))
        if config.mode == "disabled":
            raise ValueError(
                f"--wandb: expected a run with W&B, got wandb.mode: disabled in {run_dir / directory.CONFIG}"
            )
        tracker = start_wandb(config, run_dir, {})
        if tracker is None:
            raise ValueError("--wandb: W&B does not start; the report is in --out")
        points = directory.read_metrics(run_dir / directory.METRICS)
        tokens = max((int(p["train/tokens"]) for p in points if p["step"] <= step), default=0)
        row: dict[str, Any] = {"probe/step": step, "train/tokens": tokens, **scalars(measured)}
        for picture in pictures(measured):
            [image] = draw(picture, ["png"]).files.values()
            row[f"probe/figure/{picture.name}"] = wandb.Image(Image.open(io.BytesIO(image)), caption=picture.words)
        for t in tables(measured):
            row[f"probe/table/{t.name}"] = wandb.Table(columns=list(t.header), data=t.cells())
        tracker.log_beside(row)
        offline = f"the offline run in {run_dir}/wandb; upload it with: wandb sync {run_dir}/wandb/*run-*"
        where = tracker.experiment.url or offline
        finish_wandb(0)
    finally:
        lock.close()
    return f"logged to {where}"
