"""The tables of a report: the result, effects, arms, differences of arms; and all numbers as files."""

import itertools
from collections.abc import Sequence
from typing import Any

from sinkbed.plain_text import counted
from sinkbed.train.measure.modes import MODE_LABELS
from sinkbed.train.report.effects import (
    LABELS,
    LIVE,
    SIGNS,
    Outcome,
    counts,
    difference,
    explanation,
    figure,
    figures,
    label,
    listed,
    reference_mode,
    written,
)
from sinkbed.train.report.intervals import Interval
from sinkbed.train.report.result import Result, arms_of, describe, mean, modes_of, spread
from sinkbed.train.report.table import Table
from sinkbed.train.study.file import Published

_MOST_PAIRS = 60


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
        between, noise = difference(results, "sink_rate_0.3", (high, mode), (low, mode)), ""
        if between is not None and between.exceeds_noise():
            chosen = f" (the extremes of {len(means)} arms, so chosen)" if len(means) > 2 else ""
            noise = f", a difference of {spread(between, 1)}{chosen}"
        elif between is not None and between.count > 1:
            noise = f", within the noise of {between.count} seeds"
        sentences = [f"{given}, the sink rate goes from {at[low]} ({low}) to {at[high]} ({high}){noise}."]
    on_text = {arm: list(figures(results, arm, "sink_rate_0.3", "text").values()) for arm in means}
    if any(on_text.values()) and mode != "text":
        arm = max((arm for arm in on_text if on_text[arm]), key=lambda arm: mean([on_text[arm]]))
        where = "" if len(on_text) == 1 else f" in {arm}, which has most"
        sentences.append(f"On the text alone it is {spread(on_text[arm], 1)} %{where}.")
    gaps = {arm: list(figures(results, arm, "loss_gap", "text").values()) for arm in means}
    if any(gaps.values()) and mode != "text":
        arm = max((arm for arm in gaps if gaps[arm]), key=lambda arm: mean([gaps[arm]]))
        reading = "Reading" if len(gaps) == 1 else f"In {arm}, where it costs most, reading"
        change = written("loss_gap", gaps[arm], sign=True)
        sentences.append(f"{reading} the text alone changes the loss by {change} nats per token.")
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
    columns += [(name, mode) for name in _other_readings(results)]
    columns += [("learned_mass", mode), ("loss", mode), ("loss_gap", "text")]
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
        line = {
            "arm": arm,
            **dict(zip(STRATEGY, describe(next(r.strategy for r in results if r.arm == arm)), strict=True)),
        }
        for (metric, of), cells in values.items():
            line[label(metric, of)] = "" if once and of == "text" else written(metric, cells)
        for of in reported:
            pair = ("–" if x is None else f"{x:.2f}" for x in published.get(arm, {}).get(of, ()))
            line[f"published, {MODE_LABELS[of]}: sink % / loss"] = " / ".join(pair)
        lines.append(line)
    if len(lines) > 1 and len({tuple(line[name] for name in STRATEGY) for line in lines}) == 1:
        lines = [{name: cell for name, cell in line.items() if name not in STRATEGY} for line in lines]
    return Table("summary", title, *filled(lines))


STRATEGY = ("mask in training", "BOS in training")


def by_mode(results: Sequence[Result], last: str = "loss_gap", row: str = "arm") -> list[Table]:
    """A table a figure, the last one of `last`: a row an arm, in a column that is headed `row`, modes as columns."""
    modes = modes_of(results)
    tables = []
    for metric in ("sink_rate_0.3", "sink_mass", *_other_readings(results), "learned_mass", "loss", last):
        own = [m for m in modes if (metric, m) != ("loss_gap", reference_mode(modes))]
        lines = [
            {row: arm} | {MODE_LABELS[m]: written(metric, figures(results, arm, metric, m).values()) for m in own}
            for arm in arms_of(results)
        ]
        tables.append(Table(metric, LABELS[metric][0].upper() + LABELS[metric][1:], *filled(lines)))
    return [table for table in tables if len(table.header) > 1]


def _other_readings(results: Sequence[Result]) -> list[str]:
    """Figures of the sink that are of another whole than its mass, where some run has them."""
    modes = [mode for r in results for mode in r.final["modes"].values()]
    needs = {"sink_mass_raw": "mass_raw", "sink_rate_share": "share", "sink_share": "share"}
    return [name for name, key in needs.items() if any(mode.get(key) for mode in modes)]


def _span(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def caption(results: Sequence[Result], published: str = "") -> str:
    """What the numbers of the table are, with everything they depend on; `published`: what is beside them."""
    from sinkbed.train.run.provenance import describe as describe_provenance

    source = f"Published: {published.rstrip('. ')}." if published else ""
    made = describe_provenance([made for r in results for made in r.made_by], sum(not r.made_by for r in results))
    return " ".join(filter(None, (_definitions(results), _circumstances(results), source, made)))


def _definitions(results: Sequence[Result]) -> str:
    modes = [next(iter(r.final["modes"].values())) for r in results]
    tokens = sorted({m["tokens"] for m in modes if m["tokens"]})  # those of a run that is not finished are not known
    targets = f"the same {tokens[0]:,} targets in every mode" if len(tokens) == 1 else "the same targets in every mode"
    targets += f", {_span(tokens)} of them depending on the arm" if len(tokens) > 1 else ""
    others = _other_readings(results)
    raw = "raw: the weight as it is; " if "sink_mass_raw" in others else ""
    share = "share: of its weights of tokens; " if "sink_share" in others else ""
    whole = f"A mass is a part of all the query's weights ({(raw + share)[:-2]}). " if others else ""
    return (
        f"Sink rate: eps 0.3, T = {_span([r.final['sink_tokens'] for r in results])}, "
        f"{_span([m['documents'] for m in modes])} held-out documents, all layers and heads (arXiv 2410.10781). Sink "
        f"mass: mean attention on key 0 of the other queries. {whole}Loss: nats per "
        f"token of {targets}. Loss gap: loss − loss(BOS + text), or − loss(as trained) where BOS + text was not "
        "measured."
    )


def _circumstances(results: Sequence[Result]) -> str:
    """Size, tokens, lengths and seeds of these runs, and the strategy where they share it."""
    seeds = sorted({r.seed for r in results})
    of_arms = {arm: sorted(r.seed for r in results if r.arm == arm) for arm in arms_of(results)}
    fewer = "; ".join(f"{arm} {', '.join(map(str, own))}" for arm, own in of_arms.items() if own != seeds)
    several = f"mean ± half-width of the 95 % interval (Student's t) over seeds {', '.join(map(str, seeds))}"
    several += f" (of fewer: {fewer})" if fewer else ""
    if len(seeds) == 1:
        several = f"one seed ({seeds[0]}), one run an arm: no interval, and no telling a difference from noise"
    elif min(map(len, of_arms.values())) == 1:
        several += "; figures without ± are of one run"
    (mask, bos), *others = {describe(r.strategy) for r in results}
    strategy = f" All arms: mask {mask}; BOS {bos}." if len(of_arms) > 1 and not others else ""
    parameters = [r.final["parameters"] for r in results if r.final["parameters"]]
    size = f"{_span(parameters)} parameters, " if parameters else ""
    return (
        f"{size}{_span([r.final['tokens'] for r in results])} training tokens, context "
        f"{_span([r.context_length for r in results])}; {several}.{strategy}"
    )


def sections(results: Sequence[Result], effects: Sequence[Outcome], most_seeds: int | None = None) -> list[Table]:
    """Effects, arms and differences, each where there is something to say."""
    return [*([effects_table(effects, most_seeds)] if effects else []), _arms(results), *_pairs(results)]


def effects_table(effects: Sequence[Outcome], most_seeds: int | None) -> Table:
    """A row an expected effect; `most_seeds`: the study's."""
    note = f"{listed(counts(effects))}. {explanation(counts(effects), most_seeds)}"
    return Table("effects", "Expected effects", *filled([item.columns() for item in effects]), note)


def _arms(results: Sequence[Result]) -> Table:
    lines, rate = [], "sink/rate_eps0.3/"
    for arm in arms_of(results):
        of_arm = [r for r in results if r.arm == arm]
        onsets = [tokens / 1000 for tokens in figures(of_arm, arm, "onset_tokens", "").values()]
        share = f"{len(onsets)} of {len(of_arm)}"
        onset = {"onset, thousand tokens": spread(onsets, 0) or "not seen", "reached": share}
        keys = dict.fromkeys(key for r in of_arm for point in r.points for key in point if key.startswith(rate))
        for mode in [key.removeprefix(rate) for key in keys] or modes_of(of_arm)[:1]:
            curve = {LABELS[metric]: written(metric, figures(of_arm, arm, metric, mode).values()) for metric in LIVE}
            lines.append({"arm": arm, "input": MODE_LABELS[mode], **curve, **onset})
            onset = dict.fromkeys(onset, "")  # it is of the first live mode
    return Table(
        "arms",
        "When the sink forms",
        *filled(lines),
        "Area: mean of the sink rate over the logarithm of tokens, in training's last hundredfold of them. Onset: the "
        "first measurement of training at measure.onset_rate (default 10 %) in the first live mode, over the runs that "
        "reached it.",
    )


def _pairs(results: Sequence[Result]) -> list[Table]:
    """Paired differences of every two arms, where there are several seeds; those that exceed the noise are marked."""
    arms, modes, mode = arms_of(results), modes_of(results), main_mode(results)
    if len(arms) < 2 or len({r.seed for r in results}) < 2:
        return []
    columns = [(metric, mode) for metric in ("sink_rate_0.3", "sink_mass", "loss")]
    if "text" in modes and reference_mode(modes) is not None:
        columns.append(("loss_gap", "text"))
    runs = {arm: [r for r in results if r.arm == arm] for arm in arms}
    lines = []
    for a, b in itertools.combinations(arms, 2):
        between = [(metric, difference([*runs[a], *runs[b]], metric, (a, of), (b, of))) for metric, of in columns]
        if any(interval for _, interval in between):
            stars = [" *" if interval and interval.exceeds_noise() else "" for _, interval in between]
            cells = [written(metric, interval, sign=True) for metric, interval in between]
            lines.append((a, b, *map("".join, zip(cells, stars, strict=True))))
    left_out = ""
    if len(lines) > _MOST_PAIRS:
        marked = [line for line in lines if any(cell.endswith("*") for cell in line[2:])]
        left_out = f" Of {len(lines)} pairs, the {len(marked)} that have a difference beyond the noise are listed."
        lines = marked
    note = (
        "Mean difference of arms whose stores hold the same texts, paired by seed, ± half-width of its 95 % interval. "
        "*: the interval leaves 0 out; of twenty differences that are none, one does so by chance. Losses and gaps "
        f"over other targets (another tokenizer's, a prefix LM's, another context's) are not compared.{left_out}"
    )
    header = ("arm", "minus", *(label(*column) for column in columns))
    return [Table("differences", "Differences of arms", header, lines, note)]


def verdicts(effects: Sequence[Outcome]) -> list[str]:
    """The effects for a terminal, a line each."""
    width = max((len(item.verdict) for item in effects), default=0)
    return [
        f"{SIGNS[item.finding][0]} {item.verdict:{width}}  {item.effect.name}: {item.measured} "
        f"(expected {item.columns()['expected']})"
        for item in effects
    ]


def rows_of(results: Sequence[Result]) -> list[dict[str, Any]]:
    """A row of table.csv for each arm, seed and mode."""
    readings = ("sink_mass_raw", "sink_rate_share", "sink_share", "learned_mass")
    derived = ("loss_gap", "sink_rate_placed", "sink_rate_area", *readings)
    rows = []
    for r, mode in ((each, mode) for each in results for mode in each.final["modes"]):
        measured = r.final["modes"][mode]
        values = {
            "sink_mass": r.value(mode, "mass"), "sink_alpha": r.value(mode, "alpha"), "loss": measured["loss"],
            "bits_per_byte": measured["bits_per_byte"], **{name: figure(r, name, mode) for name in derived},
        }  # fmt: skip
        rows.append({
            "arm": r.arm, "seed": r.seed, "mode": mode,
            **{f"sink_rate_{eps}": round(mean(heads), 4) for eps, heads in measured["rate"].items()},
            "sink_rate_full_0.3": round(mean(measured["rate_full"]["0.3"]), 4),
            **{name: None if value is None else round(value, 6) for name, value in values.items()},
            **{name: r.final[name] for name in ("onset_tokens", "tokens", "parameters")},
            "context_length": r.context_length,
        })  # fmt: skip
    return rows


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
