"""A page of several studies: of each its question, a picture, the expected effects and a line an arm."""

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sinkbed.data.files import NoRecord, write_files, write_json
from sinkbed.plain_text import counted, markdown, markdown_table
from sinkbed.train.report.effects import Outcome, check, counts, explanation, listed
from sinkbed.train.report.figures import draw
from sinkbed.train.report.pictures import pictures
from sinkbed.train.report.result import Result
from sinkbed.train.report.tables import caption, effects_table, summary
from sinkbed.train.run import directory
from sinkbed.train.study.file import StudyConfig

NAME = "README.md"
RECORD = "studies.json"
"""What the page is made from, a study each."""


def write_digest(studies: Sequence[tuple[StudyConfig, Sequence[Result]]], folder: Path) -> Path:
    """Write README.md and NAME.png of each study from its finished runs; other studies of an earlier page stay on it.

    Raises ValueError where two studies have one name, and FileExistsError where the folder has files of these names
    that are not of such a page. Nothing is written before all is read.
    """
    names = [study.source.stem if study.source else study.name for study, _ in studies]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"report: expected study files of different names, got two that are called {twice}")
    parts: dict[str, dict[str, Any]] = {}
    with suppress(NoRecord, FileNotFoundError):  # nothing, or a file of somebody else's
        parts = directory.read_json(folder / RECORD)
    for name in ([] if parts else [NAME, RECORD]) + [f"{name}.png" for name in names if name not in parts]:
        if (folder / name).exists():
            raise FileExistsError(
                f"{folder / name}: expected none, or one of an earlier page of studies; got another file; choose "
                "another --out"
            )
    files: dict[str, str | bytes] = {}
    for name, (study, results) in zip(names, studies, strict=True):
        effects = check(results, study.effects, study.published)
        section = _section(study, name, results, effects)
        parts[name] = {"title": study.title, "verdicts": counts(effects), "section": section}
        [files[f"{name}.png"]] = draw(pictures(results, results)[0], ["png"]).files.values()
    parts = dict(sorted(parts.items()))
    total = sum((Counter(part["verdicts"]) for part in parts.values()), Counter())
    # A heading's anchor as GitHub names it.
    index = [
        (f"[{name}](#{name.lower().replace(' ', '-')})", part["title"], listed(part["verdicts"]))
        for name, part in parts.items()
    ]
    blocks = [
        "# What the studies found",
        "Written by `sinkbed report`, which has more of each study: curves, heat maps, differences of all arms.",
        "\n".join(markdown_table(("study", "question", "expected effects"), index)),
        f"In all: {listed(dict(total.most_common())) or 'no effects'}.",
        f"Cells are mean ± half-width of the 95 % t interval over seeds. {explanation(total)}".rstrip(),
        *(part["section"] for part in parts.values()),
    ]
    write_json(folder / RECORD, parts)  # first: a page without it would be another file
    write_files(folder, {**files, NAME: "\n\n".join(blocks) + "\n"})
    return folder / NAME


def _section(study: StudyConfig, name: str, results: Sequence[Result], effects: Sequence[Outcome]) -> str:
    seconds = sum(sum(r.final["seconds"].values()) for r in results)
    title = markdown(study.title)
    tables = [effects_table(effects, study.most_seeds)] if effects else []
    length = f"{counted(len(results), 'run')}, {counted(round(seconds / 60), 'minute')} of training and measuring"
    made = f"`{_command(study, results)}`: {length}"
    blocks = [
        f"## {name}",
        f"**{title}** {markdown(study.question)}".rstrip(),
        f"![{title}]({quote(name)}.png)",
        *("\n".join(markdown_table(t.header, t.cells())) for t in (*tables, summary(results, {}))),
        f"{made}, summed over runs. {caption(results, study.published_source if study.published else '')}",
    ]
    return "\n\n".join(blocks)


def _command(study: StudyConfig, results: Sequence[Result]) -> str:
    seeds = sorted({r.seed for r in results})
    size = f" --size {study.size}" if study.size not in ("", "demo") else ""
    chosen = "" if seeds == sorted(study.seeds) else f" --seeds {' '.join(map(str, seeds))}"
    file = Path(study.source or study.name)
    if file.is_absolute():  # the folders of this machine say nothing to who reads the page
        file = file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else Path(file.name)
    return f"sinkbed study {file}{size}{chosen}"
