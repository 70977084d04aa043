"""`sinkbed report`: what a study found, as a table, figures and one self-contained HTML page.

Reads the run directories only, so it can be made again at any time, also of a study that is half done.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import yaml

from train import rundir
from train.statistics import Interval

if TYPE_CHECKING:
    from train.arms import ArmRun
    from train.study_file import Published, StudyConfig

MODE_LABELS = {
    "bos": "BOS + text",
    "text": "text",
    "first_key_masked": "as trained, key 0 masked",
    "random_first": "random token + text",
    "as_trained": "as trained",
}


@dataclass(frozen=True)
class Result:
    """One finished run: its strategy, its points and its final measurement."""

    arm: str
    seed: int
    strategy: dict[str, Any]
    context_length: int
    points: list[dict[str, Any]]
    final: dict[str, Any]
    documents: str = ""
    """Digests of the token store and its documents; equal where two runs read the same ones."""
    made_by: tuple[dict[str, Any], ...] = ()
    """Provenance of each process that the run was made by."""

    def value(self, mode: str, key: str) -> float:
        """A figure of the final measurement: `loss`, `bits_per_byte`, `mass`, or an eps for a sink rate."""
        found = self.final["modes"][mode]
        if key in found["rate"]:
            return _mean(found["rate"][key])
        value = found[key]
        return float(value) if isinstance(value, int | float) else _mean(value)


def _mean(rows: list[list[float]]) -> float:
    return fmean(x for row in rows for x in row)


def load_result(folder: Path, arm: str, seed: int) -> Result:
    """Read one run directory. Raises FileNotFoundError or ValueError that names the file at fault."""
    for name in (rundir.CONFIG, rundir.MEASUREMENT):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name}: expected a finished run, found no such file")
    config = yaml.safe_load((folder / rundir.CONFIG).read_text())
    audit, run = (
        {} if not path.is_file() else rundir.read_json(path) for path in (folder / rundir.AUDIT, folder / rundir.RUN)
    )
    return Result(
        arm=arm,
        seed=seed,
        strategy=config["data"]["strategy"],
        context_length=config["data"]["context_length"],
        points=list(rundir.read_metrics(folder / rundir.METRICS)),
        final=rundir.read_json(folder / rundir.MEASUREMENT),
        documents=f"{audit.get('store_digest', '')} {audit.get('document_order', '')}",
        made_by=tuple(run.get("made_by", ())),
    )


def describe(strategy: dict[str, Any]) -> tuple[str, str]:
    """Mask, with any packing but `concat`, and first token of a strategy in the words of the published table."""
    mask = "causal" if strategy["mask"] == "causal" else "intra-document"
    if strategy["shared_prefix"]:
        what = "position 0" if strategy["shared_prefix"] == 1 else f"positions below {strategy['shared_prefix']}"
        mask += f", {what} visible to all"
    if strategy["window"]:
        mask += f", window {strategy['window']}"
    if strategy["prefix_lm"]:
        mask += f", prefix LM {strategy['prefix_lm']}"
    packing = strategy.get("packing", "concat")
    if packing != "concat":
        details = ["long ones cropped"] if strategy["long_documents"] == "crop" else []
        details += {"pad": [], "crop": ["filled up by cropping"], "repeat": ["filled up by repeating"]}[
            strategy["fill"]
        ]
        mask += f"; {packing}" + (f" ({', '.join(details)})" if details else "")
    parts = []
    first = strategy["first_token"]
    share = strategy.get("first_token_share", 1)
    rows = "" if share == 1 else f" of {100 * share:g} % of rows"
    for position, what in enumerate(first if isinstance(first, list) else [first]):
        if what == "bos":
            parts.append(f"fixed at position {position}{rows}")
        elif what != "none":
            parts.append(f"{'random token' if what == 'random' else f'token {what}'} at position {position}{rows}")
    if strategy["document_start"] == "bos":
        parts.append("at document starts")
    elif strategy["document_start"] != "none":
        parts.append(f"token {strategy['document_start']} at document starts")
    has_bos = any("fixed" in part or part == "at document starts" for part in parts)
    return mask, ("" if has_bos or not parts else "none; ") + " and ".join(parts) or "none"


COLUMNS = (
    "arm",
    "seed",
    "mode",
    "sink_rate_0.2",
    "sink_rate_0.3",
    "sink_rate_0.5",
    "sink_rate_0.8",
    "sink_rate_row_0.3",
    "sink_mass",
    "sink_alpha",
    "loss",
    "bits_per_byte",
    "loss_gap",
    "sink_rate_placed",
    "sink_rate_area",
    "onset_tokens",
    "tokens",
    "parameters",
    "context_length",
)


def rows_of(results: Sequence[Result]) -> list[dict[str, Any]]:
    """One row per arm, seed and mode, with the columns of table.csv."""
    from train.effects import figure

    rows = []
    for r in results:
        for mode, found in r.final["modes"].items():
            rates = {f"sink_rate_{eps}": round(_mean(map_), 4) for eps, map_ in found["rate"].items()}
            row = {
                "arm": r.arm,
                "seed": r.seed,
                "mode": mode,
                **rates,
                "sink_rate_row_0.3": round(_mean(found["rate_row"]["0.3"]), 4),
                "sink_mass": round(r.value(mode, "mass"), 6),
                "sink_alpha": round(r.value(mode, "alpha"), 6),
                "loss": round(found["loss"], 6),
                "bits_per_byte": round(found["bits_per_byte"], 6),
                "loss_gap": _rounded(figure(r, "loss_gap", mode)),
                "sink_rate_placed": _rounded(figure(r, "sink_rate_placed", mode)),
                "sink_rate_area": _rounded(figure(r, "sink_rate_area", mode)),
                "onset_tokens": r.final["onset_tokens"],
                "tokens": r.final["tokens"],
                "parameters": r.final["parameters"],
                "context_length": r.context_length,
            }
            rows.append({name: row[name] for name in COLUMNS})
    return rows


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)


def to_csv(rows: Sequence[dict[str, Any]], columns: Sequence[str] = COLUMNS) -> str:
    """table.csv, or another table of its kind."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


_STRATEGY = ("mask in training", "BOS in training")


@dataclass(frozen=True)
class SummaryRow:
    """One line of the study's table: an arm in a mode, over its seeds."""

    arm: str
    mask: str
    bos: str
    mode: str
    rate: str
    mass: str
    loss: str
    gap: str
    published: str

    def columns(self) -> dict[str, str]:
        """Header -> cell."""
        return {
            "arm": self.arm,
            "mask in training": self.mask,
            "BOS in training": self.bos,
            "input": MODE_LABELS[self.mode],
            "sink rate %": self.rate,
            "sink mass": self.mass,
            "loss": self.loss,
            "loss gap": self.gap,
            "published: sink % / loss": self.published,
        }


def table_of(summary: Sequence[SummaryRow]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and cells, without the columns that no line has anything for, and the strategy's where all share it."""
    lines = [row.columns() for row in summary]
    shared = _STRATEGY if len({r.arm for r in summary}) > 1 and len({(r.mask, r.bos) for r in summary}) == 1 else ()
    header = tuple(name for name in lines[0] if any(line[name] for line in lines) and name not in shared)
    return header, [tuple(line[name] for name in header) for line in lines]


def fixed(value: float, digits: int) -> str:
    """A number with so many digits; never −0."""
    text = f"{value:.{digits}f}"
    return (text.lstrip("-") if float(text) == 0 else text).replace("-", "−")


def spread(found: Interval | Sequence[float] | None, digits: int, *, sign: bool = False) -> str:
    """Mean and the half-width of its 95 % interval; of one run, that it is one."""
    if found is None or (not isinstance(found, Interval) and not found):
        return ""
    interval = found if isinstance(found, Interval) else Interval.of(found)
    mean = fixed(interval.mean, digits)
    if sign and not mean.startswith("−") and float(mean) != 0:
        mean = f"+{mean}"
    return f"{mean} (1 run)" if interval.count == 1 else f"{mean} ± {fixed(interval.half, digits)}"


def summarise(results: Sequence[Result], published: Published) -> list[SummaryRow]:
    """The study's table, arms in their order."""
    from train.effects import figures, reference_mode

    rows = []
    for arm in dict.fromkeys(r.arm for r in results):
        of_arm = [r for r in results if r.arm == arm]
        mask, bos = describe(of_arm[0].strategy)
        for mode in of_arm[0].final["modes"]:
            theirs = published.get(arm, {}).get(mode)
            reference = reference_mode(of_arm[0].final["modes"])
            gap = list(figures(results, arm, "loss_gap", mode).values()) if mode != reference else []
            rows.append(
                SummaryRow(
                    arm=arm,
                    mask=mask,
                    bos=bos,
                    mode=mode,
                    rate=spread([r.value(mode, "0.3") for r in of_arm], 1),
                    mass=spread([r.value(mode, "mass") for r in of_arm], 3),
                    loss=spread([r.value(mode, "loss") for r in of_arm], 3),
                    gap=spread(gap, 3),
                    published=" / ".join("–" if x is None else f"{x:.2f}" for x in theirs) if theirs else "",
                )
            )
    return rows


def _span(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def caption(results: Sequence[Result], published: str = "") -> str:
    """What the numbers of the table are, with everything they depend on; `published`: what is beside them."""
    from train.provenance import describe as describe_provenance

    seeds = sorted({r.seed for r in results})
    modes = [next(iter(r.final["modes"].values())) for r in results]
    over = "mean ± half-width of the 95 % interval (Student's t)"
    several = f"{over} over seeds {', '.join(map(str, seeds))}"
    if len(seeds) == 1:
        several = f"one seed ({seeds[0]}), one run an arm: no interval, and no telling a difference from noise"
    made = describe_provenance([made for r in results for made in r.made_by], sum(not r.made_by for r in results))
    strategies = {describe(r.strategy) for r in results}
    shared = ""
    if len(strategies) == 1 and len({r.arm for r in results}) > 1:
        mask, bos = next(iter(strategies))
        shared = f" All arms: mask {mask}; BOS {bos}."
    return (
        f"Sink rate: eps 0.3, T = {_span([r.final['sink_tokens'] for r in results])}, "
        f"{_span([m['documents'] for m in modes])} held-out documents, all layers and heads (arXiv "
        f"2410.10781). Sink mass: mean attention on key 0 of the other queries. Loss: nats per token of "
        f"the same {_span([m['tokens'] for m in modes])} targets in every mode. "
        f"Loss gap: loss − loss(BOS + text), or − loss(as trained) where BOS + text was not measured. "
        f"{_span([r.final['parameters'] for r in results])} "
        f"parameters, {_span([r.final['tokens'] for r in results])} training tokens, context "
        f"{_span([r.context_length for r in results])}; {several}.{shared}"
        + (f" Published: {published}" if published else "")
        + (f" {made}" if made else "")
    )


def to_markdown(title: str, summary: Sequence[SummaryRow], note: str, more: Sequence[Section] = ()) -> str:
    """table.md: the result, its note, then the other tables under headings, as a paper's appendix takes them."""
    lines = [f"# {title}", "", *markdown_table(*table_of(summary)), "", note, ""]
    for section in more:
        lines += [f"## {section.heading}", "", *markdown_table(section.header, section.cells), "", section.note, ""]
    return "\n".join(lines)


@dataclass(frozen=True)
class Section:
    """A table under a heading, with a note below it."""

    heading: str
    header: tuple[str, ...]
    cells: list[tuple[str, ...]]
    note: str


def markdown_table(header: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    rows = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in (header, *cells)]
    return [rows[0], "|" + " --- |" * len(header), *rows[1:]]


def print_table(title: str, summary: Sequence[SummaryRow], note: str) -> None:
    """The table in the terminal; an arm's name, mask and BOS stand once, on its first line."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, caption=note, caption_justify="left", title_justify="left")
    header, lines = table_of(summary)
    if len({(r.mask, r.bos) for r in summary}) == len({r.arm for r in summary}) > 1:  # told apart without the name
        header, lines = header[1:], [line[1:] for line in lines]
    words = sum(name in ("arm", "input", *_STRATEGY) for name in header)
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
    console = Console()
    # A pipe or a log has no width of its own; 80 columns would fold every cell.
    console = console if console.is_terminal else Console(width=170)
    console.print(table)


def write_report(study: StudyConfig, runs: Sequence[ArmRun], failed: dict[str, str], *, track: bool = False) -> Path:
    """Write the report of the finished runs to the study's report/ and print its table.

    `track`: send the tables to W&B too, as a run of the study's group.
    """
    from train.effects import check
    from train.figures import write_figures
    from train.page import write_page
    from train.tables import effects_csv, sections, verdicts, write_parquet

    results = [load_result(run.folder, run.arm, run.seed) for run in runs]
    folder = study.out / "report"
    folder.mkdir(parents=True, exist_ok=True)
    note = caption(results, study.published_source if study.published else "")
    summary, rows, found = (
        summarise(results, study.published),
        rows_of(results),
        check(results, study.effects, study.published),
    )
    more = sections(results, found)
    rundir.write_atomic(folder / "table.csv", to_csv(rows))
    rundir.write_atomic(folder / "table.md", to_markdown(study.title, summary, note, more))
    if found:
        rundir.write_atomic(folder / "effects.csv", effects_csv(found))
    write_parquet(results, rows, folder)
    write_figures(results, folder)
    write_page(study, results, summary, note, more, failed, folder / "index.html")
    print_table(study.title, summary, note)
    if found:
        print("\n".join(verdicts(found)))
    seconds = [r.final["seconds"] for r in results]
    training = sum(s["training"] for s in seconds)
    measuring = sum(s["measuring_live"] + s["measuring_final"] for s in seconds)
    print(f"training {training:.0f} s, measuring {measuring:.1f} s ({100 * measuring / training:.1f} %), over all arms")
    if track:
        from train.sweep import log_summary

        log_summary(study, runs, rows, [item.record() for item in found])
    print(f"report: {folder / 'index.html'} (also table.csv, table.md, *.parquet, *.png beside it)")
    return folder


def load_folder(folder: Path) -> list[tuple[Path, str, int]]:
    """(run directory, arm, seed) of the finished runs of a folder: a run, a study, or a folder of runs."""
    below = (folder, *sorted(folder.glob("*/")), *sorted(folder.glob("runs/*/")))
    found = []
    for path in below:
        if (path / rundir.MEASUREMENT).is_file() and (path / rundir.CONFIG).is_file():
            arm = rundir.read_json(path / "arm.json") if (path / "arm.json").is_file() else {}
            seed = yaml.safe_load((path / rundir.CONFIG).read_text())["data"]["seed"]
            found.append((path, arm.get("arm", path.name), arm.get("seed", seed)))
    return found


def run(command: str, argv: Sequence[str]) -> int:
    """Make the report of a study anew from what is finished, or one of any runs."""
    import argparse

    from train.arms import ArmRun, plan
    from train.study import chosen
    from train.study_file import StudyConfig

    parser = argparse.ArgumentParser(prog=f"sinkbed {command}", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("what", type=Path, nargs="+", help="a study file, or folders of runs or studies")
    parser.add_argument("--size", help="of a study file: one of its sizes (default: demo)")
    parser.add_argument("--seeds", type=int, nargs="+", help="of a study file: seeds (default: the file's)")
    parser.add_argument("--out", type=Path, help="where report/ is written (default: the study's, or the folder)")
    arguments = parser.parse_args(list(argv))
    folders = [path for path in arguments.what if path.is_dir()]
    if not folders and len(arguments.what) == 1:
        arguments.study = arguments.what[0]
        study = chosen(arguments)
        runs = plan(study)
    else:
        missing = [path for path in arguments.what if path not in folders]
        if missing:
            raise FileNotFoundError(f"{missing[0]}: expected one study file, or folders only; found no folder")
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
    finished = [r for r in runs if not r.settings or r.status() == "finished"]
    left = [r for r in runs if r not in finished]
    for arm in left:
        print(f"not in the report: {arm.folder.name} ({arm.status()}{': ' * bool(arm.reason())}{arm.reason()})")
    if not finished:
        raise ValueError(
            f"{', '.join(map(str, arguments.what))}: expected at least one finished run, found none; finish one with "
            "`sinkbed study` or `sinkbed fit`"
        )
    write_report(study, finished, {r.folder.name: r.reason() for r in left if r.status() == "failed"})
    return 0
