"""Writing what `sinkbed probe` found: CSV, figures, one HTML page that holds them all, and a point in W&B."""

from __future__ import annotations

import csv
import html
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train import rundir
from train.figures import STYLE
from train.page import document, table
from train.probe_figures import figures
from train.probe_tables import Found, scalars, tables


def write(found: Found, folder: Path) -> Path:
    """Write probe.json, a CSV a table, the figures as PNG and SVG, and index.html; returns the page."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    rundir.write_json(folder / "probe.json", found)
    for t in tables(found):
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(t.header)
        writer.writerows(["" if value is None else value for value in row] for row in t.rows)
        rundir.write_atomic(folder / f"{t.name}.csv", buffer.getvalue())
    parts = []
    with plt.rc_context({**STYLE, "svg.fonttype": "path", "svg.hashsalt": "sinkbed"}):
        for name, title, words, figure in figures(found):
            vector = io.BytesIO()
            figure.savefig(vector, format="svg", metadata={"Date": None})
            raster = io.BytesIO()
            figure.savefig(raster, format="png", dpi=140)
            plt.close(figure)
            rundir.write_atomic(folder / f"{name}.svg", vector.getvalue())
            rundir.write_atomic(folder / f"{name}.png", raster.getvalue())
            parts.append(_section(title, words, vector.getvalue().decode()))
    rundir.write_atomic(folder / "index.html", _page(found, parts))
    return folder / "index.html"


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
    intro = (
        f"{found['documents']} held-out documents; T = {settings['sink_tokens']}; states and mixing on the first "
        f"{settings['mixing_documents']} documents. One measurement of one model: no interval over seeds."
    )
    body = [f'<p class="note">{html.escape(intro)}</p>', *figures]
    for t in tables(found):
        body.append(f"<h2>{html.escape(t.title)}</h2>")
        body.append(table(t.header, t.cells()))
        if t.note:
            body.append(f'<p class="note">{html.escape(t.note)}</p>')
    return document(f"Probe of {found['model']}", body)


def log_to_wandb(found: Found, run_dir: Path, step: int) -> str:
    """Log figures, tables and numbers as one more point of the run's W&B history; returns a line that says where.

    metrics.jsonl, the record of training, is left as it is.
    """
    import matplotlib
    import wandb
    import yaml
    from PIL import Image

    from train.loggers import WandbConfig, finish_wandb, start_wandb

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    held = rundir.lock(run_dir)
    try:
        config = yaml.safe_load((run_dir / rundir.CONFIG).read_text())
        tracker = start_wandb(WandbConfig(**(config.get("wandb") or {})), run_dir, {})
        if tracker is None:
            raise ValueError(
                f"--wandb: expected a run with W&B, found wandb.mode: disabled in {run_dir / rundir.CONFIG}"
            )
        row: dict[str, Any] = {"trainer/global_step": step, "train/tokens": _tokens_of(run_dir, step), **scalars(found)}
        with plt.rc_context(dict(STYLE)):
            for name, _, words, figure in figures(found):
                raster = io.BytesIO()
                figure.savefig(raster, format="png", dpi=140)
                plt.close(figure)
                row[f"probe/figure/{name}"] = wandb.Image(Image.open(raster), caption=words)
        for t in tables(found):
            row[f"probe/table/{t.name}"] = wandb.Table(columns=list(t.header), data=t.cells())
        tracker.experiment.log(row, step=tracker.number, commit=True)
        where = (
            tracker.experiment.url
            or f"the offline run in {run_dir}/wandb; upload it with: wandb sync {run_dir}/wandb/*run-*"
        )
        finish_wandb(0)
    finally:
        held.close()
    return f"logged to {where}"


def _tokens_of(run_dir: Path, step: int) -> int:
    points = [p for p in rundir.read_metrics(run_dir / rundir.METRICS) if p["step"] <= step]
    return int(points[-1]["train/tokens"]) if points else 0
