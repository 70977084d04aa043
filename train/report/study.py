"""The report of one study, or of any runs, also of those that are still running."""

import dataclasses
from collections.abc import Sequence

from sinkbed.data.files import write_files
from sinkbed.plain_text import counted, csv_of, markdown, markdown_table
from sinkbed.train.report import html
from sinkbed.train.report.effects import Outcome, check, counts, explanation
from sinkbed.train.report.figures import Drawing, draw
from sinkbed.train.report.pictures import pictures
from sinkbed.train.report.result import Result, arms_of
from sinkbed.train.report.table import Table
from sinkbed.train.report.tables import answer, by_mode, caption, parquet, rows_of, sections, summary, verdicts
from sinkbed.train.study.arms import ArmRun
from sinkbed.train.study.file import StudyConfig
from sinkbed.train.study.sweep import log_summary


def to_markdown(title: str, tables: Sequence[Table], notices: Sequence[str]) -> str:
    """table.md: the result and the notices, then the other tables under headings, as a paper's appendix takes them."""
    blocks = [f"# {markdown(title)}"]
    for number, table in enumerate(tables):
        blocks += [f"## {markdown(table.title)}"] if number else []
        blocks += ["\n".join(markdown_table(table.header, table.cells())), markdown(table.note)]
        blocks += [] if number else map(markdown, notices)
    return "\n\n".join(filter(None, blocks)) + "\n"


def write_report(
    study: StudyConfig, results: Sequence[Result], missing: Sequence[str], log: Sequence[ArmRun] = ()
) -> None:
    """Write the report of results, at least one, to the study's report/ and print its table.

    What has not finished is in the curves; in the tables only where nothing has. `missing`: what is not among the
    results and why, as `split_finished` says it. `log`: finished runs for whose group W&B is sent the tables too.
    """
    finished = [r for r in results if not r.progress]
    where = "in the curves alone" if finished else "as of its last measurement"
    final = finished or results
    notices = [f"Not in the report: {what}." for what in missing]
    notices += [f"Not finished: {r.arm}, seed {r.seed} ({r.progress}), {where}." for r in results if r.progress]
    notices += apart(final)
    for notice in notices:
        print(notice[0].lower() + notice[1:-1])
    folder = study.out / "report"
    there = {path.name for path in folder.glob("[!.]*")}
    if there and not there & {"table.csv", "table.parquet"}:  # a report begins with its table
        raise FileExistsError(f"{folder}: expected an earlier report or nothing, got other files; choose another --out")
    effects = check(final, study.effects, study.published) if finished else []
    note = caption(final, study.published_source if study.published else "")
    main = dataclasses.replace(summary(final, study.published, study.title), note=note)
    rows, more = rows_of(final), sections(final, effects, study.most_seeds)
    result, *others = pictures(final, results)
    drawings = [draw(result, ("svg", "pdf", "png")), *map(draw, others)]
    content: dict[str, str | bytes] = {
        "table.csv": csv_of(rows, tuple(rows[0])),
        "table.md": to_markdown(study.title, [main, *more, *by_mode(final)], notices),
        **parquet(results, rows),
        "index.html": page(study, final, effects, [main, *more], drawings, notices),
    }
    for drawing in drawings:
        content |= drawing.files
    records = [item.record() for item in effects]
    if records:
        content["effects.csv"] = csv_of(records, tuple(records[0]))
    else:
        (folder / "effects.csv").unlink(missing_ok=True)
    for kind in ("svg", "pdf", "png"):
        for path in folder.glob(f"*.{kind}"):  # of an earlier report
            if path.name not in content:
                path.unlink()
    write_files(folder, content)
    main.print()
    print("".join(f"{line}\n" for line in verdicts(effects)), end="")
    if finished:
        seconds = [r.final["seconds"] for r in finished]
        training = sum(s["training"] for s in seconds)
        measuring = sum(s["measuring_live"] + s["measuring_final"] for s in seconds)
        print(f"training {training:.0f} s, measuring {measuring:.1f} s, over all arms")
    if log:
        table = [dict(zip(main.header, line, strict=True)) for line in main.cells()]
        log_summary(study, log, {"table": table, "effects": records, "runs": rows})
    print(f"report: {folder / 'index.html'} (beside it: table.csv, table.md, *.parquet; figures as *.svg, *.pdf)")


def apart(results: Sequence[Result]) -> list[str]:
    """What keeps figures of these runs from being compared: lengths or texts that differ between arms."""
    lengths: dict[int, list[str]] = {}
    for result in results:
        lengths.setdefault(result.final["sink_tokens"], []).append(result.arm)
    notices = []
    if len(lengths) > 1:
        each = "; ".join(f"{length} in {', '.join(dict.fromkeys(arms))}" for length, arms in sorted(lengths.items()))
        notices.append(f"Sinks are over the first T queries, which differ, so they do not compare: {each}.")
    texts: dict[str, list[str]] = {}
    for result in results:
        texts.setdefault(result.texts, []).append(result.arm)
    if len(texts) > 1:
        each = " against ".join(", ".join(dict.fromkeys(arms)) for arms in texts.values())
        notices.append(f"Runs are of different texts, so losses and sinks do not compare: {each}.")
    return notices


def page(
    study: StudyConfig,
    results: Sequence[Result],
    effects: Sequence[Outcome],
    tables: Sequence[Table],
    drawings: Sequence[Drawing],
    notices: Sequence[str],
) -> str:
    """index.html: the answer, the picture of it, the expected effects, curves; the rest folds."""
    rows = rows_of(results)
    main, *more = tables
    more.append(Table("every", "Every measurement", tuple(rows[0]), [tuple(row.values()) for row in rows]))
    sizes = {"arm": len(arms_of(results)), "seed": len({r.seed for r in results}), "run": len(results)}
    curves = [drawing for drawing in drawings if drawing.picture.name == "curves"]
    others = [drawing for drawing in drawings[1:] if drawing not in curves]
    explained = html.paragraph(explanation(counts(effects), study.most_seeds))
    parts = [
        html.paragraph(study.question, "question"),
        html.paragraph(" · ".join(counted(number, noun) for noun, number in sizes.items()), "facts"),
        html.paragraph(answer(results, effects), "answer"),
        html.notices(notices),
        html.picture(drawings[0]),
        html.section("Expected effects", html.effects(effects), explained) if effects else "",
        *map(html.picture, curves),
        html.section(
            "Numbers",
            html.folded("Every arm", html.table(main)),
            html.folded("By input", *(f"<h3>{table.title}</h3>{html.table(table)}" for table in by_mode(results))),
            *(html.folded(table.title, html.table(table)) for table in more),
        ),
        html.section("More pictures", *(html.picture(other, html.folded) for other in others)),
        html.paragraph("Beside this page: every figure as SVG and PDF, the tables as Markdown, CSV and Parquet."),
    ]  # fmt: skip
    return html.document(study.title, parts)
