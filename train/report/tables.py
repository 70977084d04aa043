"""The tables of a report: the result, effects, arms, differences of arms; and all numbers as files."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sinkbed.plain_text import counted, csv_of
from sinkbed.train.measure.modes import MODE_LABELS
from sinkbed.train.report.effects import (
    DIGITS,
    LABELS,
    SIGNS,
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
from sinkbed.train.report.intervals import Interval, paired
from sinkbed.train.report.result import Result, arms_of, describe, mean, modes_of, spread
from sinkbed.train.report.table import Table

if TYPE_CHECKING:
    from sinkbed.train.study.file import Published

_MOST_PAIRS = 60
_DERIVED = ("loss_gap", "sink_rate_placed", "sink_rate_area", "sink_rate_share", "sink_share")


def filled(lines: Sequence[dict[str, str]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and cells of lines (header -> cell), without the columns that no line has anything for."""
    header = tuple(name for name in lines[0] if any(line[name] for line in lines))
    return header, [tuple(line[name] for name in header) for line in lines]


def answer(results: Sequence[Result], effects: Sequence[Outcome]) -> str:
    """What the study found, in a few sentences: where the sink is, whether arms differ, what became of the effects."""
    mode = main_mode(results)
    rates = {arm: figures(results, arm, "sink_rate_0.3", mode) for arm in arms_of(results)}
    means = {arm: Interval.of(list(values.values())) for arm, values in rates.items() if values}
    low, high = (choose(means, key=lambda arm: means[arm].mean) for choose in (min, max))
    at = {arm: f"{spread(interval, 1)} %" for arm, interval in means.items()}
    given = "As trained" if mode == "as_trained" else f"With {MODE_LABELS[mode]} as input"
    if len(means) == 1:
        sentences = [f"{given}, the sink rate is {at[low]}."]
    else:
        difference = paired(rates[high], rates[low]) if same_documents(results, low, high) else None
        noise = ""
        if difference is not None and difference.count > 1:
            noise = f", within the noise of {difference.count} seeds"
            if difference.exceeds_noise():
                noise = f", a difference of {spread(difference, 1)}"
                noise += f" (the extremes of {len(means)} arms, so chosen)" if len(means) > 2 else ""
        sentences = [f"{given}, the sink rate goes from {at[low]} ({low}) to {at[high]} ({high}){noise}."]
    gaps = {arm: list(figures(results, arm, "loss_gap", "text").values()) for arm in means}
    if any(gaps.values()) and mode != "text":
        arm = max((arm for arm in gaps if gaps[arm]), key=lambda arm: mean([gaps[arm]]))
        costs = f"{'Reading' if len(gaps) == 1 else f'In {arm}, where it costs most, reading'} the text alone"
        sentences.append(f"{costs} changes the loss by {spread(gaps[arm], 3, sign=True)} nats per token.")
    if effects:
        sentences.append(f"{counted(len(effects), 'expected effect')}: {listed(counts(effects))}.")
    if max(map(len, rates.values())) == 1:
        sentences.append("One run an arm: no telling a difference from noise.")
    return " ".join(sentences)


def main_mode(results: Sequence[Result]) -> str:
    """The mode that tables compare arms in: the first of those that most runs were measured in."""
    return max(modes_of(results), key=lambda mode: sum(mode in r.final["modes"] for r in results))


def summary(results: Sequence[Result], published: Published, title: str = "") -> Table:
    """The study's table, a row an arm over its seeds: its strategy, the sink and the loss in the two main modes."""
    modes, mode = modes_of(results), main_mode(results)
    columns = [("sink_rate_0.3", mode), ("sink_rate_placed", mode), ("sink_rate_0.3", "text"), ("sink_mass", mode)]
    columns += [(name, mode) for name in ("sink_rate_share", "sink_share") if has_shares(results)]
    columns += [("loss", mode), ("loss_gap", "text")]
    if not any(r.final["modes"].get(mode, {}).get("rate_placed") for r in results):
        columns.remove(("sink_rate_placed", mode))
    columns = [column for column in dict.fromkeys(columns) if column[1] in modes]
    reported = list(dict.fromkeys(m for arm in arms_of(results) for m in published.get(arm, {})))
    lines = []
    for arm in arms_of(results):
        values = {column: list(figures(results, arm, *column).values()) for column in columns}
        # An arm that is trained on the text alone has been measured on it once.
        gaps = values.get(("loss_gap", "text"), [])
        once = mode != "bos" and bool(gaps) and not any(gaps)
        strategy = next(r.strategy for r in results if r.arm == arm)
        lines.append({
            "arm": arm,
            **dict(zip(STRATEGY, describe(strategy), strict=True)),
            **{
                label(*column): "" if once and column[1] == "text" else spread(of, DIGITS.get(column[0], 1))
                for column, of in values.items()
            },
            **{
                f"published, {MODE_LABELS[m]}: sink % / loss": " / ".join(
                    "–" if x is None else f"{x:.2f}" for x in published.get(arm, {}).get(m, ())
                )
                for m in reported
            },
        })  # fmt: skip
    shared = STRATEGY if len(lines) > 1 and len({tuple(line[name] for name in STRATEGY) for line in lines}) == 1 else ()
    return Table(
        "summary", title, *filled([{name: cell for name, cell in line.items() if name not in shared} for line in lines])
    )


STRATEGY = ("mask in training", "BOS in training")


def by_mode(results: Sequence[Result]) -> list[Table]:
    """A table a figure: a row an arm, modes as columns."""
    modes = modes_of(results)
    shares = ("sink_rate_share", "sink_share") if has_shares(results) else ()
    tables = []
    for metric in ("sink_rate_0.3", "sink_mass", *shares, "loss", "loss_gap"):
        lines = [
            {
                "arm": arm,
                **{
                    MODE_LABELS[m]: spread(list(figures(results, arm, metric, m).values()), DIGITS.get(metric, 1))
                    for m in modes
                    if (metric, m) != ("loss_gap", reference_mode(modes))
                },
            }
            for arm in arms_of(results)
        ]
        tables.append(Table(metric, LABELS[metric][0].upper() + LABELS[metric][1:], *filled(lines)))
    return [table for table in tables if len(table.header) > 1]


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
    tokens = [m["tokens"] for m in modes if m["tokens"]]  # those of a run that is not finished are not known
    targets = (
        f"the same {tokens[0]:,} targets in every mode" if len(set(tokens)) == 1 else "the same targets in every mode"
    )
    targets += f", {_span(tokens)} of them depending on the arm" if len(set(tokens)) > 1 else ""
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
    elif min(map(len, of_arms.values())) == 1:
        several += "; figures without ± are of one run"
    strategies = {describe(r.strategy) for r in results}
    shared = ""
    if len(strategies) == 1 and len({r.arm for r in results}) > 1:
        mask, bos = next(iter(strategies))
        shared = f" All arms: mask {mask}; BOS {bos}."
    parameters = [r.final["parameters"] for r in results if r.final["parameters"]]
    size = f"{_span(parameters)} parameters, " if parameters else ""
    return (
        f"{size}{_span([r.final['tokens'] for r in results])} training tokens, context "
        f"{_span([r.context_length for r in results])}; {several}.{shared}"
    )


def made_by(results: Sequence[Result]) -> str:
    """Commit, torch and machine of these runs; empty where none of them says."""
    from sinkbed.train.run.provenance import describe as describe_provenance

    return describe_provenance([made for r in results for made in r.made_by], sum(not r.made_by for r in results))


def sections(results: Sequence[Result], effects: Sequence[Outcome]) -> list[Table]:
    """Effects, arms and differences, each where there is something to say."""
    parts = [effects_table(effects)] if effects else []
    parts.append(_arms(results))
    pairs = _pairs(results)
    return parts + ([pairs] if pairs is not None else [])


def effects_table(effects: Sequence[Outcome]) -> Table:
    """A row an expected effect."""
    note = f"{listed(counts(effects))}. {VERDICTS} Effects that share an arm are not independent of each other."
    return Table("effects", "Expected effects", *filled([item.columns() for item in effects]), note)


def _arms(results: Sequence[Result]) -> Table:
    mode = main_mode(results)
    cells: list[tuple[str, ...]] = []
    for arm in arms_of(results):
        runs = sum(r.arm == arm for r in results)
        onsets = [tokens / 1000 for tokens in figures(results, arm, "onset_tokens", mode).values()]
        areas = list(figures(results, arm, "sink_rate_area", mode).values())
        cells.append((arm, str(runs), spread(areas, 1), spread(onsets, 0) or "never", f"{len(onsets)} of {runs}"))
    return Table(
        "arms",
        "When the sink forms",
        ("arm", "runs", label("sink_rate_area", mode), "onset, thousand tokens", "reached"),
        cells,
        "Area: mean of the sink rate over the logarithm of tokens, in training's last hundredfold of them. Onset: the "
        "first measurement of training at measure.onset_rate (default 10 %), over the runs that reached it.",
    )


def _pairs(results: Sequence[Result]) -> Table | None:
    """Paired differences of every two arms; those that exceed the noise are marked."""
    arms, modes, mode = arms_of(results), modes_of(results), main_mode(results)
    if len(arms) < 2 or len({r.seed for r in results}) < 2:
        return None
    columns = [(metric, mode) for metric in ("sink_rate_0.3", "sink_mass", "loss")]
    if "text" in modes and reference_mode(modes) is not None:
        columns.append(("loss_gap", "text"))
    runs = {arm: [r for r in results if r.arm == arm] for arm in arms}
    lines = [
        (a, b, *(_difference([*runs[a], *runs[b]], a, b, *column) for column in columns))
        for a, b in itertools.combinations(arms, 2)
        if same_documents([*runs[a], *runs[b]], a, b)
    ]
    left_out = ""
    if len(lines) > _MOST_PAIRS:
        cells = [line for line in lines if any(cell.endswith("*") for cell in line[2:])]
        left_out = f" Of {len(lines)} pairs, the {len(cells)} that have a difference beyond the noise are listed."
        lines = cells
    return Table(
        "differences",
        "Differences of arms",
        ("arm", "minus", *(label(*column) for column in columns)),
        lines,
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
    width = max(len(item.finding) for item in effects)
    lines = []
    for item in effects:
        cells = item.columns()
        unit = "" if not cells["difference"] else f": {cells['figure']} {cells['difference']}"
        lines.append(
            f"{SIGNS[item.finding][0]} {item.finding:{width}}  {item.effect.name}{unit} (expected {cells['expected']})"
        )
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
