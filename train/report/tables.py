"""The tables of a report: the result, effects, arms, differences of arms; and all numbers as files."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sinkbed.plain_text import csv_of
from sinkbed.train.measure.modes import MODE_LABELS
from sinkbed.train.report.effects import (
    DIGITS,
    LABELS,
    VERDICTS,
    Outcome,
    counts,
    figure,
    figures,
    label,
    listed,
    reference_mode,
    same_documents,
    same_targets,
)
from sinkbed.train.report.intervals import paired
from sinkbed.train.report.result import Result, arms_of, common_modes, describe, mean, spread

if TYPE_CHECKING:
    from sinkbed.train.study.file import Published

_MOST_PAIRS = 60
_DERIVED = ("loss_gap", "sink_rate_placed", "sink_rate_area", "sink_rate_share", "sink_share")


@dataclass(frozen=True)
class Section:
    """A table under a heading, with a note below it."""

    heading: str
    header: tuple[str, ...]
    cells: list[tuple[str, ...]]
    note: str


STRATEGY = ("mask in training", "BOS in training")


Line = dict[str, str]
"""Header -> cell."""


def filled(lines: Sequence[Line]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and cells, without the columns that no line has anything for."""
    header = tuple(name for name in lines[0] if any(line[name] for line in lines))
    return header, [tuple(line[name] for name in header) for line in lines]


def table_of(summary: Sequence[Line]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and cells, without the strategy's where all arms share it."""
    strategies = {tuple(line[name] for name in STRATEGY) for line in summary}
    shared = STRATEGY if len({line["arm"] for line in summary}) > 1 and len(strategies) == 1 else ()
    return filled([{name: cell for name, cell in line.items() if name not in shared} for line in summary])


def summarise(results: Sequence[Result], published: Published) -> list[Line]:
    """The study's table, a line for an arm in a mode over its seeds, arms in their order."""
    lines = []
    shares = ("sink_rate_share", "sink_share") if has_shares(results) else ()
    for arm in arms_of(results):
        of_arm = [r for r in results if r.arm == arm]
        for mode in of_arm[0].final["modes"]:
            reported = published.get(arm, {}).get(mode, ())
            reference = reference_mode(of_arm[0].final["modes"])
            gap = list(figures(results, arm, "loss_gap", mode).values()) if mode != reference else []
            lines.append({
                "arm": arm,
                **dict(zip(STRATEGY, describe(of_arm[0].strategy), strict=True)),
                "input": MODE_LABELS[mode],
                "sink rate %": spread([r.value(mode, "0.3") for r in of_arm], 1),
                "sink mass": spread([r.value(mode, "mass") for r in of_arm], 3),
                **{
                    LABELS[name]: spread(list(figures(results, arm, name, mode).values()), DIGITS.get(name, 1))
                    for name in shares
                },
                "loss": spread([r.value(mode, "loss") for r in of_arm], 3),
                "loss gap": spread(gap, 3),
                "published: sink % / loss": " / ".join("–" if x is None else f"{x:.2f}" for x in reported),
            })  # fmt: skip
    return lines


def has_shares(results: Sequence[Result]) -> bool:
    """Whether some run's weights of tokens need not add up to 1 for a query."""
    return any(mode.get("share") for r in results for mode in r.final["modes"].values())


def _span(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def caption(results: Sequence[Result], published: str = "") -> str:
    """What the numbers of the table are, with everything they depend on; `published`: what is beside them."""
    source = f"Published: {published.rstrip('. ')}." if published else ""
    return " ".join(filter(None, (definitions(results), circumstances(results), source, made_by(results))))


def definitions(results: Sequence[Result]) -> str:
    """What the figures of these runs are."""
    modes = [next(iter(r.final["modes"].values())) for r in results]
    tokens = [m["tokens"] for m in modes]
    targets = f"the same {tokens[0]:,} targets in every mode" if len(set(tokens)) == 1 else ""
    targets = targets or f"the same targets in every mode, {_span(tokens)} of them depending on the arm"
    share = ""
    if has_shares(results):
        share = (
            "Where a query's weights of tokens need not add up to 1, the mass is the weight as it is, and the share is "
            "the mass over their sum. "
        )
    return (
        f"Sink rate: eps 0.3, T = {_span([r.final['sink_tokens'] for r in results])}, "
        f"{_span([m['documents'] for m in modes])} held-out documents, all layers and heads (arXiv "
        f"2410.10781). Sink mass: mean attention on key 0 of the other queries. {share}Loss: nats per token of "
        f"{targets}. "
        f"Loss gap: loss − loss(BOS + text), or − loss(as trained) where BOS + text was not measured."
    )


def circumstances(results: Sequence[Result]) -> str:
    """Size, tokens, lengths and seeds of these runs, and the strategy where they share it."""
    seeds = sorted({r.seed for r in results})
    over = "mean ± half-width of the 95 % interval (Student's t)"
    of_arms = {arm: sorted(r.seed for r in results if r.arm == arm) for arm in arms_of(results)}
    fewer = "; ".join(f"{arm} {', '.join(map(str, own))}" for arm, own in of_arms.items() if own != seeds)
    several = f"{over} over seeds {', '.join(map(str, seeds))}" + (f" (of fewer: {fewer})" if fewer else "")
    if len(seeds) == 1:
        several = f"one seed ({seeds[0]}), one run an arm: no interval, and no telling a difference from noise"
    strategies = {describe(r.strategy) for r in results}
    shared = ""
    if len(strategies) == 1 and len({r.arm for r in results}) > 1:
        mask, bos = next(iter(strategies))
        shared = f" All arms: mask {mask}; BOS {bos}."
    return (
        f"{_span([r.final['parameters'] for r in results])} "
        f"parameters, {_span([r.final['tokens'] for r in results])} training tokens, context "
        f"{_span([r.context_length for r in results])}; {several}.{shared}"
    )


def made_by(results: Sequence[Result]) -> str:
    """Commit, torch and machine of these runs; empty where none of them says."""
    from sinkbed.train.run.provenance import describe as describe_provenance

    return describe_provenance([made for r in results for made in r.made_by], sum(not r.made_by for r in results))


def sections(results: Sequence[Result], effects: Sequence[Outcome]) -> list[Section]:
    """Effects, arms and differences, each where there is something to say."""
    parts = [_effects(effects)] if effects else []
    parts.append(_arms(results))
    pairs = _pairs(results)
    return parts + ([pairs] if pairs is not None else [])


def _effects(effects: Sequence[Outcome]) -> Section:
    lines = [item.columns() for item in effects]
    # What is read first, on a narrow screen too.
    first = ("effect", "verdict", "figure", "difference", "expected")
    header, cells = filled([{name: line[name] for name in dict.fromkeys((*first, *line))} for line in lines])
    note = f"{listed(counts(effects))}. {VERDICTS} Effects that share an arm are not independent of each other."
    return Section("Expected effects", header, cells, note)


def _modes(results: Sequence[Result]) -> list[str]:
    """Inference modes of all runs, the one with the first token first, then text."""
    order = {"bos": 0, "as_trained": 0, "text": 1}
    return sorted(common_modes(results), key=lambda m: order.get(m, 2)) or list(results[0].final["modes"])[:1]


def _arms(results: Sequence[Result]) -> Section:
    mode = _modes(results)[0]
    cells: list[tuple[str, ...]] = []
    for arm in arms_of(results):
        runs = sum(r.arm == arm for r in results)
        onsets = [tokens / 1000 for tokens in figures(results, arm, "onset_tokens", mode).values()]
        areas = list(figures(results, arm, "sink_rate_area", mode).values())
        cells.append((arm, str(runs), spread(areas, 1), spread(onsets, 0) or "never", f"{len(onsets)} of {runs}"))
    return Section(
        "When the sink forms",
        ("arm", "runs", label("sink_rate_area", mode), "onset, thousand tokens", "reached"),
        cells,
        "Area: mean of the sink rate over the logarithm of tokens, in training's last hundredfold of them. Onset: the "
        "first measurement of training at measure.onset_rate (default 10 %), over the runs that reached it.",
    )


def _pairs(results: Sequence[Result]) -> Section | None:
    """Paired differences of every two arms; those that exceed the noise are marked."""
    arms, modes = arms_of(results), _modes(results)
    if len(arms) < 2 or len({r.seed for r in results}) < 2:
        return None
    columns = [(metric, modes[0]) for metric in ("sink_rate_0.3", "sink_mass", "loss")]
    if "text" in modes and reference_mode(modes) is not None:
        columns.append(("loss_gap", "text"))
    lines: list[tuple[str, ...]] = []
    for a, b in itertools.combinations(arms, 2):
        if same_documents(results, a, b):
            lines.append((a, b, *(_difference(results, a, b, metric, mode) for metric, mode in columns)))
    cells, left_out = lines, ""
    if len(lines) > _MOST_PAIRS:
        cells = [line for line in lines if any(cell.endswith("*") for cell in line[2:])]
        left_out = f" Of {len(lines)} pairs, the {len(cells)} that have a difference beyond the noise are listed."
    return Section(
        "Differences of arms",
        ("arm", "minus", *(label(*column) for column in columns)),
        cells,
        "Mean difference of arms on the same documents (one store), paired by seed, ± half-width of its 95 % interval. "
        "*: the interval leaves 0 out; of twenty differences that are none, one does so by chance. Losses and gaps "
        f"over other targets (a prefix LM's, another context's) are not compared.{left_out}",
    )


def _difference(results: Sequence[Result], a: str, b: str, metric: str, mode: str) -> str:
    """A cell of two arms, marked where it exceeds the noise; empty where they are not compared."""
    if not same_targets(results, metric, (a, mode), (b, mode)):
        return ""
    difference = paired(figures(results, a, metric, mode), figures(results, b, metric, mode))
    star = " *" if difference is not None and difference.exceeds_noise() else ""
    return spread(difference, DIGITS.get(metric, 1), sign=True) + star


def verdicts(effects: Sequence[Outcome]) -> list[str]:
    """The effects for a terminal, a line each."""
    width = max(len(item.verdict) for item in effects)
    lines = []
    for item in effects:
        cells = item.columns()
        unit = "" if not cells["difference"] else f": {cells['figure']} {cells['difference']}"
        lines.append(f"{item.verdict:{width}}  {item.effect.name}{unit} (expected {cells['expected']})")
    return lines


def rows_of(results: Sequence[Result]) -> list[dict[str, Any]]:
    """A row of table.csv for each arm, seed and mode."""
    return [_row(r, mode) for r in results for mode in r.final["modes"]]


def _row(result: Result, mode: str) -> dict[str, Any]:
    measured = result.final["modes"][mode]
    figures: dict[str, float | None] = {
        "sink_mass": result.value(mode, "mass"),
        "sink_alpha": result.value(mode, "alpha"),
        "loss": measured["loss"],
        "bits_per_byte": measured["bits_per_byte"],
        **{name: figure(result, name, mode) for name in _DERIVED},
    }
    return {
        "arm": result.arm,
        "seed": result.seed,
        "mode": mode,
        **{f"sink_rate_{eps}": round(mean(map_), 4) for eps, map_ in measured["rate"].items()},
        "sink_rate_row_0.3": round(mean(measured["rate_full"]["0.3"]), 4),
        **{name: None if value is None else round(value, 6) for name, value in figures.items()},
        **{name: result.final[name] for name in ("onset_tokens", "tokens", "parameters")},
        "context_length": result.context_length,
    }


def effects_csv(effects: Sequence[Outcome]) -> str:
    """effects.csv."""
    rows = [item.record() for item in effects]
    return csv_of(rows, tuple(rows[0]))


def parquet(results: Sequence[Result], rows: Sequence[dict[str, Any]]) -> dict[str, bytes]:
    """table.parquet, the rows of table.csv, and curves.parquet, every number measured or logged during training."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    points = [
        {"arm": r.arm, "seed": r.seed, **{k: v for k, v in point.items() if not isinstance(v, list)}}
        for r in results
        for point in r.points
    ]
    names = list(dict.fromkeys(name for point in points for name in point))
    curves = [{name: point.get(name) for name in names} for point in points]
    files = {}
    for name, content in (("table", list(rows)), ("curves", curves)):
        buffer = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(content), buffer)
        files[f"{name}.parquet"] = buffer.getvalue().to_pybytes()
    return files
