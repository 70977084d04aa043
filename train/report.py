"""`sinkbed report`: what a study found, as a table, figures and one self-contained HTML page.

Reads the run directories only, so it can be made again at any time, also of a study that is half done.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from train import rundir
from train.plain_text import console, markdown, markdown_table, visible
from train.results import Result, load_result
from train.tables import (
    STRATEGY,
    Section,
    SummaryRow,
    caption,
    effects_csv,
    rows_of,
    sections,
    summarise,
    table_of,
    to_csv,
    verdicts,
    write_parquet,
)
from train.yaml_files import read_mapping

if TYPE_CHECKING:
    from train.arms import ArmRun
    from train.study_file import StudyConfig


def to_markdown(title: str, summary: Sequence[SummaryRow], note: str, more: Sequence[Section] = ()) -> str:
    """table.md: the result, its note, then the other tables under headings, as a paper's appendix takes them."""
    lines = [f"# {markdown(title)}", "", *markdown_table(*table_of(summary)), "", markdown(note), ""]
    for section in more:
        cells = markdown_table(section.header, section.cells)
        lines += [f"## {markdown(section.heading)}", "", *cells, "", markdown(section.note), ""]
    return "\n".join(lines)


def print_table(title: str, summary: Sequence[SummaryRow], note: str) -> None:
    """The table in the terminal; an arm's name, mask and BOS stand once, on its first line."""
    from rich.table import Table

    table = Table(title=visible(title), caption=note, caption_justify="left", title_justify="left")
    header, lines = table_of(summary)
    if len({(r.mask, r.bos) for r in summary}) == len({r.arm for r in summary}) > 1:  # told apart without the name
        header, lines = header[1:], [line[1:] for line in lines]
    words = sum(name in ("arm", "input", *STRATEGY) for name in header)
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index < words else "right")
    before = None
    for row, line in zip(summary, lines, strict=True):
        cells = list(line)
        if row.arm == before:
            cells[: words - 1] = [""] * (words - 1)
        elif before is not None:
            table.add_section()
        before = row.arm
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
    from train.effects import check
    from train.figures import write_figures
    from train.page import write_page

    _tell(missing)
    folder = study.out / "report"
    folder.mkdir(parents=True, exist_ok=True)
    rundir.remove_temporaries(folder)
    note = caption(results, study.published_source if study.published else "")
    absent = [f"Not in it: {what}." for what in missing]
    summary, rows, found = (
        summarise(results, study.published),
        rows_of(results),
        check(results, study.effects, study.published),
    )
    more = sections(results, found)
    rundir.write_atomic(folder / "table.csv", to_csv(rows))
    rundir.write_atomic(folder / "table.md", to_markdown(study.title, summary, "\n\n".join([note, *absent]), more))
    if found:
        rundir.write_atomic(folder / "effects.csv", effects_csv(found))
    else:
        (folder / "effects.csv").unlink(missing_ok=True)
    write_parquet(results, rows, folder)
    write_figures(results, folder)
    write_page(study, results, summary, note, more, absent, folder / "index.html")
    print_table(study.title, summary, note)
    if found:
        print("\n".join(verdicts(found)))
    seconds = [r.final["seconds"] for r in results]
    training = sum(s["training"] for s in seconds)
    measuring = sum(s["measuring_live"] + s["measuring_final"] for s in seconds)
    print(f"training {training:.0f} s, measuring {measuring:.1f} s ({100 * measuring / training:.1f} %), over all arms")
    if track:
        from train.sweep import log_summary

        header, cells = table_of(summary)
        shown = [dict(zip(header, line, strict=True)) for line in cells]
        log_summary(study, runs, {"table": shown, "effects": [item.record() for item in found], "runs": rows})
    print(f"report: {folder / 'index.html'} (also table.csv, table.md, *.parquet, *.png beside it)")
    return folder


def of_all_seeds(study: StudyConfig) -> list[ArmRun]:
    """Every arm under the study's seeds and under those that have a finished run of it in the study's folder."""
    from train.arms import plan

    more = {seed for _, _, seed in load_folder(study.out)} - set(study.seeds)
    found = plan(dataclasses.replace(study, seeds=[*study.seeds, *sorted(more)]))
    done = {r.seed for r in found if r.status() == "finished"}
    return [r for r in found if r.seed in done or r.seed in study.seeds]


def load_folder(folder: Path) -> list[tuple[Path, str, int]]:
    """(run directory, arm, seed) of the finished runs of a folder: a run, a study, or a folder of runs."""
    below = (folder, *sorted(folder.glob("*/")), *sorted(folder.glob("runs/*/")))
    found = []
    for path in below:
        if (path / rundir.MEASUREMENT).is_file() and (path / rundir.CONFIG).is_file():
            arm, seed = path.name, 0
            with contextlib.suppress(ValueError, LookupError, TypeError):  # what is damaged is said when it is read
                seed = read_mapping(path / rundir.CONFIG)["data"]["seed"]
                record = rundir.read_json(path / "arm.json") if (path / "arm.json").is_file() else {}
                arm, seed = record.get("arm", arm), record.get("seed", seed)
            found.append((path, arm, seed))
    return found


def run(command: str, argv: Sequence[str]) -> int:
    """Make the report of a study anew from what is finished, or one of any runs."""
    from train.arms import ArmRun, plan
    from train.study import chosen
    from train.study_file import StudyConfig

    parser = argparse.ArgumentParser(
        prog=f"sinkbed {command}", allow_abbrev=False, description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("what", type=Path, nargs="+", help="study files, or folders of runs or studies")
    parser.add_argument("--size", help="of study files: one of their sizes (default: demo)")
    parser.add_argument(
        "--seeds", type=int, nargs="+", help="of study files: seeds (default: the file's, and others that are finished)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="of one study file: the study's folder, with its runs (default: the file's); of folders: where report/ is "
        "written (default: the one folder); of several study files: where their page is written",
    )
    arguments = parser.parse_args(list(argv))
    folders = [path for path in arguments.what if path.is_dir()]
    if not folders and len(arguments.what) > 1:
        return _digest(arguments)
    if not folders:
        arguments.study = arguments.what[0]
        study = chosen(arguments)
        runs = plan(study) if arguments.seeds else of_all_seeds(study)
    else:
        missing = [path for path in arguments.what if path not in folders]
        if missing:
            raise FileNotFoundError(f"{missing[0]}: expected study files only, or folders only; found no folder")
        only = folders[0] if len(folders) == 1 else None
        if arguments.out is None and only and (only / "report").exists() and (only / "runs").exists():
            raise ValueError(
                f"{only}: expected a study file, which makes a study's own report (sinkbed report FILE --out "
                f"{only}), or another --out for one without effects; found the folder alone"
            )
        if arguments.out is None and len(folders) > 1:
            raise ValueError("report: expected --out, the folder for the report of several folders; found none")
        runs = [
            ArmRun(arm=arm, seed=seed, folder=path, names=(), config={}, settings={})
            for folder in folders
            for path, arm, seed in load_folder(folder)
        ]
        out = arguments.out or folders[0]
        study = StudyConfig(title=f"Runs of {', '.join(map(str, folders))}", out=out, base=[out], arms={"any": [out]})
    seen: dict[tuple[str, int], Path] = {}
    for each in runs:
        if (each.arm, each.seed) in seen:
            raise ValueError(
                f"report: expected one run of each arm and seed, found arm {each.arm}, seed {each.seed} in both "
                f"{seen[each.arm, each.seed]} and {each.folder}; report the studies one by one"
            )
        seen[each.arm, each.seed] = each.folder
    finished, results, missing = split_finished(runs)
    if not finished:
        others = f" ({'; '.join(missing[:3])})" if missing else ""
        raise ValueError(
            f"{', '.join(map(str, arguments.what))}: expected at least one finished run, found none in {study.out}"
            f"{others}; name another folder with --out, or finish one with `sinkbed study` or `sinkbed fit`"
        )
    write_report(study, finished, results, missing)
    return 0


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


def _tell(missing: Sequence[str]) -> None:
    for what in missing:
        print(f"not in the report: {what}")


def _digest(arguments: argparse.Namespace) -> int:
    """One page of several studies, of the seeds that are finished where none are named."""
    from train.arms import plan
    from train.digest import write_digest
    from train.study_file import load_study

    if arguments.out is None:
        raise ValueError("report: expected --out, the folder for the page of several studies; found none")
    studies = []
    for path in arguments.what:
        study = load_study(path, arguments.size)
        runs = plan(dataclasses.replace(study, seeds=arguments.seeds)) if arguments.seeds else of_all_seeds(study)
        if all(run.status() == "new" for run in runs):
            print(f"not on the page: {path} (no run in {study.out})")
            continue
        _, results, missing = split_finished(runs)
        _tell(missing)
        if results:
            studies.append((study, results))
    if not studies:
        raise ValueError("report: expected a study with a finished run, found none; start one with `sinkbed study`")
    print(f"page: {write_digest(studies, arguments.out)}")
    return 0
