"""A page of several studies: of each its question, a picture, the expected effects and a line an arm."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from train import rundir
from train.effects import DIGITS, LABELS, Found, check, figures, reference_mode
from train.report import markdown_table
from train.results import MODE_LABELS, Result, load_result, spread
from train.tables import circumstances, definitions, made_by

if TYPE_CHECKING:
    from train.arms import ArmRun
    from train.study_file import StudyConfig

NAME = "README.md"
TITLE = "# What the studies found"


def write_digest(studies: Sequence[tuple[StudyConfig, Sequence[ArmRun]]], folder: Path) -> Path:
    """Write README.md and NAME.png of each study from its finished runs.

    Raises ValueError where two studies have one name, and FileExistsError where the folder has a README.md that is no
    such page.
    """
    from train.figures import write_result

    path = folder / NAME
    if path.exists() and not path.read_text(errors="replace").startswith(TITLE):
        raise FileExistsError(f"{path}: expected none, or an earlier page of studies; found another file; choose --out")
    names = [study.source.stem if study.source else study.name for study, _ in studies]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"report: expected study files of different names, found two that are called {twice}")
    parts, index = [], []
    for name, (study, runs) in zip(names, studies, strict=True):
        results = [load_result(run.folder, run.arm, run.seed) for run in runs]
        found = check(results, study.effects, study.published)
        write_result(results, folder / f"{name}.png")
        parts += _section(study, name, results, found)
        index.append((f"[{name}](#{name})", study.title, counts(found)))
    lines = [
        TITLE,
        "",
        "Written by `sinkbed report`, which has more of each study: curves, heat maps, differences of all arms.",
        "",
        *markdown_table(("study", "question", "expected effects"), index),
        "",
        "Cells are mean ± half-width of the 95 % t interval over seeds. A verdict is on the mean difference of arms on "
        "the same documents, paired by seed. Reproduced: its interval lies on the expected side of 0 (for the same: "
        "inside the tolerance). Not reproduced: it lies on another side. Within noise: it reaches both. One comparison "
        "in twenty leaves 0 out by chance.",
        "",
        *parts,
    ]
    rundir.write_atomic(path, "\n".join(lines).rstrip() + "\n")
    return path


def counts(found: Sequence[Found]) -> str:
    """How many effects came to which verdict."""
    verdicts = [item.verdict for item in found]
    return ", ".join(f"{verdicts.count(v)} {v}" for v in dict.fromkeys(verdicts))


def _section(study: StudyConfig, name: str, results: Sequence[Result], found: Sequence[Found]) -> list[str]:
    seconds = sum(sum(r.final["seconds"].values()) for r in results)
    lines = [f"## {name}", "", f"**{study.title}** {study.question}".rstrip(), ""]
    lines += [f"![{study.title}]({name}.png)", ""]
    if found:
        lines += [*markdown_table(*_effects(found)), ""]
    lines += [*markdown_table(*_arms(results)), ""]
    lines += [
        f"`{_command(study, results)}`: {len(results)} runs, "
        f"{seconds / 60:.0f} minutes of training and measuring, summed over runs. "
        + " ".join(part for part in (definitions(results), circumstances(results), made_by(results)) if part),
        "",
    ]
    return lines


def _command(study: StudyConfig, results: Sequence[Result]) -> str:
    seeds = sorted({r.seed for r in results})
    size = f" --size {study.size}" if study.size not in ("", "demo") else ""
    given = "" if seeds == sorted(study.seeds) else f" --seeds {' '.join(map(str, seeds))}"
    return f"sinkbed study {study.source}{size}{given}"


def _effects(found: Sequence[Found]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and cells; columns that no effect fills are left out."""
    lines = []
    for item in found:
        cells = item.columns()
        lines.append(
            {
                "expected effect": cells["effect"],
                "difference": f"{cells['figure']}: {cells['difference']}" if cells["difference"] else "",
                "expected": cells["expected"],
                "published": cells["published"],
                "verdict": cells["verdict"],
                "source": cells["source"],
            }
        )
    header = tuple(name for name in lines[0] if any(line[name] for line in lines))
    return header, [tuple(line[name] for name in header) for line in lines]


def _arms(results: Sequence[Result]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and cells: an arm a line, the sink with its first token and with the text alone."""
    arms = list(dict.fromkeys(r.arm for r in results))
    modes = {mode for r in results for mode in r.final["modes"]}
    first = reference_mode(modes) or next(iter(results[0].final["modes"]))
    columns = [("sink_rate_0.3", first), ("sink_rate_0.3", "text"), ("sink_mass", first), ("loss", first)]
    columns.append(("loss_gap", "text"))
    columns = [column for column in dict.fromkeys(columns) if column[1] in modes]
    header = ("arm", *(f"{LABELS[metric]}, {MODE_LABELS[mode]}" for metric, mode in columns))
    return header, [
        (arm, *(spread(list(figures(results, arm, *c).values()), DIGITS.get(c[0], 1)) for c in columns)) for arm in arms
    ]
