"""The report of one study, or of any finished runs."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sinkbed.data.files import write_files
from sinkbed.plain_text import console, csv_of, markdown, markdown_table, visible
from sinkbed.train.config.yaml_files import read_mapping
from sinkbed.train.report.result import Result, load_result
from sinkbed.train.report.tables import (
    STRATEGY,
    Line,
    Section,
    caption,
    effects_csv,
    parquet,
    rows_of,
    sections,
    summarise,
    table_of,
    verdicts,
)
from sinkbed.train.run import directory

if TYPE_CHECKING:
    from sinkbed.train.study.arms import ArmRun
    from sinkbed.train.study.file import StudyConfig


def to_markdown(title: str, summary: Sequence[Line], note: str, more: Sequence[Section] = ()) -> str:
    """table.md: the result, its note, then the other tables under headings, as a paper's appendix takes them."""
    lines = [f"# {markdown(title)}", "", *markdown_table(*table_of(summary)), "", markdown(note), ""]
    for section in more:
        cells = markdown_table(section.header, section.cells)
        lines += [f"## {markdown(section.heading)}", "", *cells, "", markdown(section.note), ""]
    return "\n".join(lines)


def print_table(title: str, summary: Sequence[Line], note: str) -> None:
    """The table in the terminal; an arm's name, mask and BOS stand once, on its first line."""
    from rich.table import Table

    table = Table(title=visible(title), caption=note, caption_justify="left", title_justify="left")
    header, lines = table_of(summary)
    words = sum(name in ("arm", "input", *STRATEGY) for name in header)
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index < words else "right")
    before = None
    for arm, line in zip([line["arm"] for line in summary], lines, strict=True):
        cells = list(line)
        if arm == before:
            cells[: words - 1] = [""] * (words - 1)
        elif before is not None:
            table.add_section()
        before = arm
        table.add_row(*cells)
    console(170).print(table)


def write_report(
    study: StudyConfig,
    runs: Sequence[ArmRun],
    results: Sequence[Result],
    missing: Sequence[str],
    *,
    track: bool = False,
) -> Path:
    """Write the report of finished runs, at least one, and their results to the study's report/ and print its table.

    Args:
        missing: what is not among them and why, as `split_finished` says it.
        track: send the tables to W&B too, as a run of the study's group.
    """
    from sinkbed.train.report.effects import check
    from sinkbed.train.report.figures import study_figures
    from sinkbed.train.report.html import page

    tell_missing(missing)
    folder = study.out / "report"
    note = caption(results, study.published_source if study.published else "")
    absent = [f"Not in it: {what}." for what in missing]
    summary, rows = summarise(results, study.published), rows_of(results)
    effects = check(results, study.effects, study.published)
    more = sections(results, effects)
    files: dict[str, str | bytes] = {
        "table.csv": csv_of(rows, tuple(rows[0])),
        "table.md": to_markdown(study.title, summary, "\n\n".join([note, *absent]), more),
        **({"effects.csv": effects_csv(effects)} if effects else {}),
        **parquet(results, rows),
        **study_figures(results),
        "index.html": page(study, results, summary, note, more, absent),
    }
    write_files(folder, files)
    if not effects:
        (folder / "effects.csv").unlink(missing_ok=True)
    print_table(study.title, summary, note)
    if effects:
        print("\n".join(verdicts(effects)))
    seconds = [r.final["seconds"] for r in results]
    training = sum(s["training"] for s in seconds)
    measuring = sum(s["measuring_live"] + s["measuring_final"] for s in seconds)
    print(f"training {training:.0f} s, measuring {measuring:.1f} s ({100 * measuring / training:.1f} %), over all arms")
    if track:
        from sinkbed.train.study.sweep import log_summary

        header, cells = table_of(summary)
        table = [dict(zip(header, line, strict=True)) for line in cells]
        log_summary(study, runs, {"table": table, "effects": [item.record() for item in effects], "runs": rows})
    print(f"report: {folder / 'index.html'} (also table.csv, table.md, *.parquet, *.png beside it)")
    return folder


def of_all_seeds(study: StudyConfig) -> list[ArmRun]:
    """Every arm under the study's seeds and under those that have a finished run of it in the study's folder."""
    from sinkbed.train.study.arms import plan

    more = {seed for _, _, seed in load_folder(study.out)} - set(study.seeds)
    runs = plan(dataclasses.replace(study, seeds=[*study.seeds, *sorted(more)]))
    done = {r.seed for r in runs if r.status() == "finished"}
    return [r for r in runs if r.seed in done or r.seed in study.seeds]


def load_folder(folder: Path) -> list[tuple[Path, str, int]]:
    """(run directory, arm, seed) of the finished runs of a folder: a run, a study, or a folder of runs."""
    below = (folder, *sorted(folder.glob("*/")), *sorted(folder.glob("runs/*/")))
    runs = []
    for path in below:
        if (path / directory.MEASUREMENT).is_file() and (path / directory.CONFIG).is_file():
            arm, seed = path.name, 0
            with contextlib.suppress(ValueError, LookupError, TypeError):  # what is damaged is said when it is read
                seed = read_mapping(path / directory.CONFIG)["data"]["seed"]
                record = directory.read_json(path / "arm.json") if (path / "arm.json").is_file() else {}
                arm, seed = record.get("arm", arm), record.get("seed", seed)
            runs.append((path, arm, seed))
    return runs


def split_finished(runs: Sequence[ArmRun]) -> tuple[list[ArmRun], list[Result], list[str]]:
    """The runs that a report can be made of and their results; the others by name with why they are not."""
    finished, results, missing = [], [], []
    for run in runs:
        try:
            status = run.status() if run.settings else "finished"
            why = "" if status == "finished" else run.reason()
            if status == "finished":
                results.append(load_result(run.folder, run.arm, run.seed))
                finished.append(run)
                continue
        except (OSError, ValueError) as error:
            status, why = "damaged", str(error)
        missing.append(f"{run.folder.name} ({_STATUS.get(status, status)}{f': {why}' if why else ''})")
    return finished, results, missing


_STATUS = {"other": "of other settings", "new": "not run"}


def tell_missing(missing: Sequence[str]) -> None:
    for what in missing:
        print(f"not in the report: {what}")
