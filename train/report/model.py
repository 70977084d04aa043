"""Writing what `sinkbed probe` found: CSV, figures, one HTML page that holds them all, and a point in W&B."""

from __future__ import annotations

import html
import io
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sinkbed.data.files import remove_temporaries
from sinkbed.plain_text import counted, csv_text
from sinkbed.train.config.yaml_files import read_mapping
from sinkbed.train.report.figures import STYLE
from sinkbed.train.report.html import document, table
from sinkbed.train.report.model_figures import figures
from sinkbed.train.report.model_tables import Found, scalars, tables
from sinkbed.train.run import directory

RECORD = "probe.json"
_UNFINISHED = "being_written"


def write(found: Found, folder: Path) -> Path:
    """Write probe.json, a CSV a table, the figures as PNG and SVG, and index.html; returns the page.

    An earlier report is removed before the first file of this one is written, so that a folder never holds figures of
    two measurements. probe.json comes first and last: it says what a writer that is killed left unfinished.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    earlier = _record(folder).get("files", [])
    directory.write_json(
        folder / RECORD, {**found, _UNFINISHED: True, "files": earlier}
    )  # before figures take their time
    for name in earlier:
        if Path(name).name == name:
            (folder / name).unlink(missing_ok=True)
    remove_temporaries(folder)
    files: dict[str, str | bytes] = {}
    for t in tables(found):
        files[f"{t.name}.csv"] = csv_text(t.keys or t.header, t.rows)
    parts = []
    with plt.rc_context({**STYLE, "svg.fonttype": "path", "svg.hashsalt": "sinkbed"}):
        for name, title, words, figure in figures(found):
            vector = io.BytesIO()
            figure.savefig(vector, format="svg", metadata={"Date": None})
            raster = io.BytesIO()
            figure.savefig(raster, format="png", dpi=140)
            plt.close(figure)
            files |= {f"{name}.svg": vector.getvalue(), f"{name}.png": raster.getvalue()}
            parts.append(_section(title, words, vector.getvalue().decode()))
    files["index.html"] = _page(found, parts)
    directory.write_json(folder / RECORD, {**found, _UNFINISHED: True, "files": sorted(files)})
    for name, content in files.items():
        directory.write_atomic(folder / name, content)
    directory.write_json(folder / RECORD, {**found, "files": sorted(files)})
    return folder / "index.html"


def _record(folder: Path) -> dict[str, Any]:
    """probe.json of a report that is there, whole or not; empty where there is none."""
    return dict(directory.read_json(folder / RECORD)) if (folder / RECORD).is_file() else {}


def check_out(folder: Path, force: bool) -> None:
    """Raise FileExistsError or ValueError, before anything is measured, for a folder that no report can go to."""
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"--out {folder}: expected a folder, got a file")
    if folder.is_dir() and any(path for path in folder.iterdir() if not path.match(f".{RECORD}.*.partial")):
        if not (folder / RECORD).is_file():
            raise FileExistsError(
                f"--out {folder}: expected a new folder, or the report of an earlier probe, got other files; choose "
                "another folder"
            )
        if not force and _UNFINISHED not in _record(folder):
            raise FileExistsError(
                f"--out {folder}: got the report of an earlier probe; choose another folder, or --force to replace it"
            )
    check_writable("--out", folder)


def check_writable(option: str, path: Path) -> None:
    """Raise ValueError where `path` cannot be written."""
    above = next(folder for folder in (path if path.is_dir() else path.parent, *path.parents) if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise ValueError(f"{option} {path}: expected a place to write to, got {above}, which cannot be written to")


def _section(title: str, words: str, svg: str) -> str:
    drawing = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL).replace(
        "<svg", f'<svg role="img" aria-label="{html.escape(title)}"', 1
    )
    return (
        f"<h2>{html.escape(title)}</h2><figure><div class='drawing'>{drawing}</div>"
        f"<figcaption>{html.escape(words)}</figcaption></figure>"
    )


def _page(found: Found, figures: Sequence[str]) -> str:
    settings = found["settings"]
    origin = counted(found["documents"], "prompt" if settings["prompts"] else "held-out document")
    origin += f" of {settings['prompts']}" if settings["prompts"] else ""
    T, few = settings["sink_tokens"], min(found["documents"], settings["mixing_documents"])
    intro = (
        f"{origin}. Sink rates: T = {T}. States and mixing: the first {T} tokens of "
        f"the first {few} of them (Jacobian: of {min(few, settings['jacobian_documents'])}, directions: "
        f"{settings['directions']}). One measurement of one model: no interval over seeds."
    )
    body = [f'<p class="note">{html.escape(intro)}</p>', *figures]
    notes = set()
    for t in tables(found):
        body.append(f"<h2>{html.escape(t.title)}</h2>")
        body.append(table(t.header, t.cells()))
        if t.note and t.note not in notes:
            body.append(f'<p class="note">{html.escape(t.note)}</p>')
            notes.add(t.note)
    given = [(name, str(value)) for name, value in settings.items() if value not in (None, [], False)]
    body += ["<h2>Settings</h2>", table(("option", "value"), [*given, *found["versions"].items()])]
    ending = f" (incomplete: {found['incomplete']})" if "incomplete" in found else ""
    return document(f"Probe of {found['model']}{ending}", body)


def log_to_wandb(found: Found, run_dir: Path, step: int) -> str:
    """Log figures, tables and numbers as one more point of the run's W&B history; returns a line that says where.

    metrics.jsonl, the record of training, is left as it is.
    """
    import matplotlib
    import wandb
    from PIL import Image

    from sinkbed.train.run.wandb import WandbConfig, finish_wandb, start_wandb

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    held = directory.lock(run_dir)
    try:
        config = read_mapping(run_dir / directory.CONFIG)
        tracker = start_wandb(WandbConfig(**(config.get("wandb") or {})), run_dir, {})
        if tracker is None:
            raise ValueError(
                f"--wandb: expected a run with W&B, got wandb.mode: disabled in {run_dir / directory.CONFIG}"
            )
        row: dict[str, Any] = {"probe/step": step, "train/tokens": _tokens_of(run_dir, step), **scalars(found)}
        with plt.rc_context(dict(STYLE)):
            for name, _, words, figure in figures(found):
                raster = io.BytesIO()
                figure.savefig(raster, format="png", dpi=140)
                plt.close(figure)
                row[f"probe/figure/{name}"] = wandb.Image(Image.open(raster), caption=words)
        for t in tables(found):
            row[f"probe/table/{t.name}"] = wandb.Table(columns=list(t.header), data=t.cells())
        tracker.log_beside(row)
        where = (
            tracker.experiment.url
            or f"the offline run in {run_dir}/wandb; upload it with: wandb sync {run_dir}/wandb/*run-*"
        )
        finish_wandb(0)
    finally:
        held.close()
    return f"logged to {where}"


def _tokens_of(run_dir: Path, step: int) -> int:
    points = [p for p in directory.read_metrics(run_dir / directory.METRICS) if p["step"] <= step]
    return int(points[-1]["train/tokens"]) if points else 0
