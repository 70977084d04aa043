"""A page of several studies: of each its question, a picture, the expected effects and a line an arm."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from sinkbed.data.files import write_files
from sinkbed.plain_text import markdown, markdown_table
from sinkbed.train.measure.modes import MODE_LABELS
from sinkbed.train.report.effects import DIGITS, LABELS, Outcome, check, figures, reference_mode
from sinkbed.train.report.result import Result, spread
from sinkbed.train.report.tables import circumstances, definitions, filled, made_by

if TYPE_CHECKING:
    from sinkbed.train.study.file import StudyConfig

NAME = "README.md"
TITLE = "# What the studies found"


def write_digest(studies: Sequence[tuple[StudyConfig, Sequence[Result]]], folder: Path) -> Path:
    """Write README.md and NAME.png of each study from its finished runs; other studies of an earlier page stay on it.

    Raises ValueError where two studies have one name, and FileExistsError where the folder has files of these names
    that are not of such a page. Nothing is written before all is read.
    """
    from sinkbed.train.report.figures import study_figures

    path = folder / NAME
    names = [study.source.stem if study.source else study.name for study, _ in studies]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"report: expected study files of different names, got two that are called {twice}")
    parts = _earlier(path)
    for name in names:
        if name not in parts and (folder / f"{name}.png").exists():
            raise FileExistsError(
                f"{folder / f'{name}.png'}: expected none, or one of an earlier page of studies; got another file; "
                "choose another --out"
            )
    files: dict[str, str | bytes] = {}
    for name, (study, results) in zip(names, studies, strict=True):
        effects = check(results, study.effects, study.published)
        parts[name] = (_index(name, study.title, counts(effects)), _section(study, name, results, effects))
        files[f"{name}.png"] = study_figures(results, "result")["result.png"]
    lines = [
        TITLE,
        "",
        "Written by `sinkbed report`, which has more of each study: curves, heat maps, differences of all arms.",
        "",
        *markdown_table(("study", "question", "expected effects"), []),
        *(parts[name][0] for name in sorted(parts)),
        "",
        f"In all: {_total(index for index, _ in parts.values())}.",
        "",
        "Cells are mean ± half-width of the 95 % t interval over seeds. A verdict is on the mean difference of arms on "
        "the same documents, paired by seed. Reproduced: its interval lies on the expected side of 0 (for the same: "
        "inside the tolerance). Not reproduced: it lies on another side. Within noise: it reaches both. One comparison "
        "in twenty leaves 0 out by chance. As expected: reproduced, of what has no source. Effects that share an arm, "
        "also those of several studies, are not independent of each other.",
        "",
        *(line for name in sorted(parts) for line in parts[name][1]),
    ]
    write_files(folder, {**files, NAME: "\n".join(lines).rstrip() + "\n"})
    return path


def _index(name: str, title: str, verdicts: str) -> str:
    """A study's line in the list at the top, with a link to its heading as GitHub names it."""
    anchor = name.lower().replace(" ", "-")
    return markdown_table((f"[{name}](#{anchor})", title, verdicts), [])[0]


def _total(lines: Iterable[str]) -> str:
    """The counts of verdicts of all lines of the list together."""
    total: Counter[str] = Counter()
    for line in lines:
        for count, verdict in re.findall(r"(\d+) ([a-z: ]+)", line.split("|")[-2]):
            total[verdict.strip()] += int(count)
    return ", ".join(f"{count} {verdict}" for verdict, count in total.most_common()) or "no effects"


def _earlier(path: Path) -> dict[str, tuple[str, list[str]]]:
    """Study -> its line of the list and its section, of a page written before.

    Raises FileExistsError where the file is no such page.
    """
    if not path.exists():
        return {}
    text = path.read_text(errors="replace")
    if not text.startswith(TITLE):
        raise FileExistsError(
            f"{path}: expected none, or an earlier page of studies; got another file; choose another --out"
        )
    head, *sections = text.split("\n## ")
    earlier = {}
    for section in sections:
        name = section.splitlines()[0]
        [index] = [line for line in head.splitlines() if line.startswith(f"| [{name}](")]
        earlier[name] = (index, [*f"## {section}".rstrip().splitlines(), ""])
    return earlier


def counts(effects: Sequence[Outcome]) -> str:
    """How many effects came to which verdict."""
    verdicts = [item.verdict for item in effects]
    return ", ".join(f"{verdicts.count(v)} {v}" for v in dict.fromkeys(verdicts))


def _section(study: StudyConfig, name: str, results: Sequence[Result], effects: Sequence[Outcome]) -> list[str]:
    seconds = sum(sum(r.final["seconds"].values()) for r in results)
    title = markdown(study.title)
    lines = [f"## {name}", "", f"**{title}** {markdown(study.question)}".rstrip(), ""]
    lines += [f"![{title}]({quote(name)}.png)", ""]
    if effects:
        lines += [*markdown_table(*_effects(effects)), ""]
    lines += [*markdown_table(*_arms(results)), ""]
    published = f"Published: {study.published_source}" if study.published else ""
    notes = (definitions(results), circumstances(results), published, made_by(results))
    lines += [
        f"`{_command(study, results)}`: {len(results)} runs, "
        f"{seconds / 60:.0f} minutes of training and measuring, summed over runs. "
        + " ".join(note for note in notes if note),
        "",
    ]
    return lines


def _command(study: StudyConfig, results: Sequence[Result]) -> str:
    seeds = sorted({r.seed for r in results})
    size = f" --size {study.size}" if study.size not in ("", "demo") else ""
    chosen = "" if seeds == sorted(study.seeds) else f" --seeds {' '.join(map(str, seeds))}"
    return f"sinkbed study {study.source}{size}{chosen}"


def _effects(effects: Sequence[Outcome]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    lines = []
    for item in effects:
        cells = item.columns()
        lines.append({
            "expected effect": cells["effect"],
            "of": item.subtraction,
            "difference": f"{cells['figure']}: {cells['difference']}" if cells["difference"] else "",
            **{name: cells[name] for name in ("expected", "published", "verdict", "source")},
        })  # fmt: skip
    return filled(lines)


def _arms(results: Sequence[Result]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and cells: an arm a line, the sink with its first token and with the text alone."""
    arms = list(dict.fromkeys(r.arm for r in results))
    modes = {mode for r in results for mode in r.final["modes"]}
    first = reference_mode(modes) or next(iter(results[0].final["modes"]))
    columns = [("sink_rate_0.3", first), ("sink_rate_0.3", "text"), ("sink_mass", first), ("loss", first)]
    columns.append(("loss_gap", "text"))
    if any(r.final["modes"].get(first, {}).get("rate_placed") for r in results):
        columns.insert(1, ("sink_rate_placed", first))
    columns = [column for column in dict.fromkeys(columns) if column[1] in modes]
    header = ("arm", *(f"{LABELS[metric]}, {MODE_LABELS[mode]}" for metric, mode in columns))
    cells: list[tuple[str, ...]] = []
    for arm in arms:
        values = [(mode, metric, list(figures(results, arm, metric, mode).values())) for metric, mode in columns]
        # An arm that is trained on the text alone has been measured on it once.
        gaps = [figure for mode, metric, each in values if metric == "loss_gap" for figure in each]
        same = first != "bos" and bool(gaps) and not any(gaps)
        cells.append(
            (arm, *("" if same and mode == "text" else spread(v, DIGITS.get(metric, 1)) for mode, metric, v in values))
        )
    return header, cells
