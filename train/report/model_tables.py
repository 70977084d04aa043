"""What `sinkbed probe` found, as tables for the terminal, CSV and the page, and as numbers under metric keys."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, NamedTuple

from sinkbed.plain_text import console
from sinkbed.train.measure.modes import MODE_LABELS
from sinkbed.train.report.result import fixed

Found = dict[str, Any]
Row = tuple[str | float | int | None, ...]


@dataclass(frozen=True)
class Table:
    """A table of the terminal, the page and a CSV file."""

    name: str
    title: str
    header: tuple[str, ...]
    rows: list[Row]
    note: str = ""
    keys: tuple[str, ...] = ()
    """Names of the columns in the CSV file, where the titles are formulas."""

    def cells(self) -> list[tuple[str, ...]]:
        """Rows as text: four significant digits."""
        return [tuple(_cell(value) for value in row) for row in self.rows]


def _cell(value: str | float | int | None) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, int):
        return f"{value:,}"
    size = abs(value)
    if size and (size >= 1e5 or size < 1e-3):
        return f"{value:.2e}"
    return fixed(value, 3 if size < 10 else 2 if size < 100 else 1)


class Column(NamedTuple):
    """One figure a layer, out of a measure's result."""

    measure: str
    key: str
    title: str
    read: Callable[[Any, int], float | None]
    """(result, l) -> its value; l = 0 is what the first block reads, which has no attention."""


def _hidden(measure: str, key: str, title: str, part: str | None = None) -> Column:
    return Column(measure, key, title, lambda found, at: (found[part] if part else found)[key][at])


def _heads(measure: str, key: str, title: str) -> Column:
    return Column(measure, key, title, lambda found, at: fmean(found[key][at - 1]) if at else None)


def _attention(measure: str, key: str, title: str) -> Column:
    return Column(measure, key, title, lambda found, at: found[key][at - 1] if at else None)


def _jacobian(key: str, title: str) -> Column:
    def read(found: Any, layer: int) -> float | None:
        return found[key][found["layers"].index(layer)] if layer in found["layers"] else None

    return Column("jacobian", key, title, read)


STATES: tuple[Column, ...] = (
    _hidden("states", "norm_ratio", "‖h₀‖ / ‖hₜ‖"),
    _hidden("states", "max_activation", "max |h|"),
    _hidden("states", "max_over_median", "max / median"),
    _hidden("states", "kurtosis_first", "kurtosis h₀"),
    _hidden("states", "kurtosis", "kurtosis hₜ"),
    _hidden("states", "secondary_share", "|cos(hₜ, h₀)| > 0.9"),
    _heads("states", "key_norm_ratio", "‖k₀‖ / ‖kₜ‖"),
    _heads("states", "value_norm_ratio", "‖v₀‖ / ‖vₜ‖"),
    _heads("states", "cosine_first", "cos(qₜ, k₀)"),
    _heads("states", "cosine_others", "cos(qₜ, kₛ)"),
    _heads("states", "entropy", "entropy"),
    _hidden("gradients", "ratio", "‖∂h₀‖ / ‖∂hₜ‖"),
)
MIXING: tuple[Column, ...] = (
    _hidden("perturbation", "spread", "perturbation spread"),
    _hidden("perturbation", "across", "± documents"),
    _hidden("rank", "relative_distance", "rank distance", "rest"),
    _hidden("rank", "effective_rank", "effective rank", "rest"),
    _hidden("rank", "matrix_entropy", "matrix entropy", "rest"),
    _hidden("rank", "relative_last_distance", "last distance", "rest"),
    _attention("paths", "first", "paths from key 0"),
    _attention("paths", "sources", "path sources"),
    _jacobian("others", "‖∂v_last/∂vᵢ‖"),
    _jacobian("others_error", "± directions"),
    _jacobian("across", "± documents"),
)
STATES_NOTE = (
    "A layer's line has the hidden states h that it writes and the attention inside it; input: what the first layer "
    "reads. Layers and heads count from 0. Subscript 0: the first token of the row; t: mean over the others; s: mean "
    "over the tokens 1 to t. max, median: of |h| over all tokens, the first included, and channels. |cos(hₜ, h₀)| > "
    "0.9: share of secondary sinks. Kurtosis: of a token's channels, 3 for a normal distribution. Entropy: of a "
    "query's attention, nats. ‖∂h₀‖/‖∂hₜ‖: gradient of the loss; 0 where no counted target depends on the first "
    "token's state, as after the last attention."
)
MIXING_NOTE = (
    "Perturbation spread: one token of the text (position n/4) replaced, mean change of the hidden states after it "
    "over their norm. Rank distance: ‖V − mean‖/‖V‖; effective rank: exp of the entropy of the singular values; matrix "
    "entropy: of their squares, nats; last distance: ‖vₙ − vₙ₋₁‖ over their norm; all without the first token, 0 is "
    "collapse. Paths: share of Theorem 3.2's bound (arXiv 2504.02732) into the last token that starts at key 0, and "
    "effective number of sources. ‖∂v_last/∂vᵢ‖: Frobenius norm, mean over the text tokens i before the last. ±: "
    "standard errors, over documents and of the directions drawn."
)


def tables(found: Found) -> list[Table]:
    """Everything that has the form of a table."""
    out = []
    if "sinks" in found:
        out.append(_sink_table(found["sinks"]))
    for mode in modes_of(found):
        for name, columns, note in (("states", STATES, STATES_NOTE), ("mixing", MIXING, MIXING_NOTE)):
            layers = _layer_table(found, mode, columns)
            if layers is not None:
                header, keys, rows = layers
                title = f"{name.capitalize()} by layer: {MODE_LABELS[mode]}"
                out.append(Table(f"{name}-{mode}", title, header, rows, note, keys))
    for mode, measured in found.get("states", {}).items():
        out.append(_massive_table(mode, measured))
        out.append(_received_table(mode, measured))
    if "by_length" in found:
        out.append(_length_table(found))
    if "positions" in found:
        out.append(_position_table(found["positions"]))
    if "streaming" in found:
        out.append(_streaming_table(found["streaming"]))
    if "checkpoints" in found:
        out.append(_checkpoint_table(found["checkpoints"]))
    return out


def modes_of(found: Found) -> list[str]:
    names = ("states", "gradients", "perturbation", "rank", "paths", "jacobian")
    return list(dict.fromkeys(mode for name in names for mode in found.get(name, {})))


def _sink_table(sinks: Found) -> Table:
    rows = []
    for kind, modes in sinks.items():
        for mode, keys in modes.items():
            for key, r in keys.items():
                rate, mass = (r["rate"], r["mass"]) if key == "0" else (r["rate_placed"], r["mass_placed"])
                rates = [mean_of(rate[eps]) for eps in rate]
                rows.append((kind, MODE_LABELS[mode], int(key), *rates, mean_of(mass), r["loss"], r["bits_per_byte"]))
    header = ("input read", "mode", "key", *(f"sink rate %, eps {eps}" for eps in ("0.2", "0.3", "0.5", "0.8")))
    return Table("sinks", "Sinks", (*header, "sink mass", "loss", "bits per byte"), rows)


def mean_of(rows: Sequence[Sequence[float]]) -> float:
    return fmean(x for row in rows for x in row)


def _layer_table(
    found: Found, mode: str, columns: Sequence[Column]
) -> tuple[tuple[str, ...], tuple[str, ...], list[Row]] | None:
    present = [c for c in columns if mode in found.get(c.measure, {})]
    if not present:
        return None
    depth = depth_of(found, mode)
    rows: list[Row] = [
        (layer - 1 if layer else "input", *(c.read(found[c.measure][mode], layer) for c in present))
        for layer in range(depth + 1)
    ]
    keys = (f"{c.measure}/{c.key}" for c in present)
    return ("layer", *(c.title for c in present)), ("layer", *keys), rows


def depth_of(found: Found, mode: str) -> int:
    """L."""
    for name, key in (("states", "norm_ratio"), ("gradients", "ratio"), ("perturbation", "spread")):
        if mode in found.get(name, {}):
            return len(found[name][mode][key]) - 1
    if mode in found.get("rank", {}):
        return len(found["rank"][mode]["rest"]["distance"]) - 1
    if mode in found.get("paths", {}):
        return len(found["paths"][mode]["first"])
    return int(found["jacobian"][mode]["layers"][-1])


def _massive_table(mode: str, measured: Found) -> Table:
    rows: list[Row] = [
        (layer - 1 if layer else "input", at["value"], at["channel"], at["position"], repr(at.get("text", at["token"])),
         at["document"])
        for layer, at in enumerate(measured["massive"])
    ]  # fmt: skip
    header = ("layer", "largest |h|", "channel", "position", "token", "document")
    note = "Where the largest activation of all documents is (arXiv 2402.17762), BOS included."
    return Table(f"massive-{mode}", f"Massive activations: {MODE_LABELS[mode]}", header, rows, note)


def _received_table(mode: str, measured: Found) -> Table:
    rows: list[Row] = []
    pairs = list(measured["strongest_position"])
    for index, by_token in enumerate(measured["strongest_token"]):
        position = pairs[index] if index < len(pairs) else None
        rows.append((
            *((position["position"], 100 * position["share"]) if position else (None, None)),
            repr(by_token.get("text", by_token["token"])) + (" at the start" if by_token["first"] else ""),
            100 * by_token["share"],
        ))  # fmt: skip
    return Table(
        f"received-{mode}",
        f"Where most attention goes: {MODE_LABELS[mode]}",
        ("position", "% of cases", "token", "% of cases"),
        rows,
        "A case is a (document, layer, head): by position and by token, the key that receives most in it.",
    )


def _length_table(found: Found) -> Table:
    rows = []
    for length, measures in found["by_length"].items():
        for mode in dict.fromkeys(mode for of in measures.values() for mode in of):
            values = []
            for column in MIXING:
                of = measures.get(column.measure, {}).get(mode)
                values.append(None if of is None else column.read(of, depth_of(measures, mode)))
            rows.append((int(length), MODE_LABELS[mode], *values))
    header = ("tokens", "mode", *(column.title for column in MIXING))
    keep = [i for i in range(len(header)) if any(row[i] is not None for row in rows)]
    rows = [tuple(row[i] for i in keep) for row in rows]
    return Table("by_length", "Mixing in the last layer by context length", tuple(header[i] for i in keep), rows)


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first} to {last}"


def _position_table(positions: Found) -> Table:
    modes = list(positions)
    rows: list[Row] = [
        (_span(span["start"], span["end"] - 1), span["tokens"], *(positions[m][i]["perplexity"] for m in modes))
        for i, span in enumerate(positions[modes[0]])
    ]
    header = ("position in the document", "targets", *(MODE_LABELS[mode] for mode in modes))
    return Table("positions", "Perplexity by position in the document", header, rows)


def _streaming_table(streaming: Found) -> Table:
    rows: list[Row] = []
    for mode, lines in streaming.items():
        for line in lines:
            keys = f"{line['kept']} + {line['window']}" if line["cached"] else "as trained"
            rows.append((MODE_LABELS[mode], keys, line["tokens"], line["loss"], line["perplexity"]))
    note = (
        "The keys that a query sees: first ones kept + last ones, its own among them (arXiv 2309.17453). The targets "
        "are those past what the cache holds, the same in every line of a mode; positions are those of the text."
    )
    return Table("streaming", "With a cache of keys", ("mode", "keys", "targets", "loss", "perplexity"), rows, note)


def _checkpoint_table(checkpoints: Found) -> Table:
    rows: list[Row] = []
    for point in checkpoints["points"]:
        for mode, values in point["modes"].items():
            last = max(int(k.split("/")[2]) for k in values if k.startswith("state/first_token_norm_ratio/"))
            rows.append((
                point["step"], point["tokens"], MODE_LABELS[mode], values[f"sink/rate_eps0.3/{mode}"],
                values[f"sink/mass/{mode}"], values[f"val/loss/{mode}"],
                max(values[f"state/first_token_norm_ratio/layer{layer}/{mode}"] for layer in range(last + 1)),
                min(values[f"state/value_norm_ratio/layer{layer}/{mode}"] for layer in range(last + 1)),
            ))  # fmt: skip
    header = ("step", "tokens", "mode", "sink rate %", "sink mass", "loss", "largest ‖h₀‖/‖hₜ‖", "smallest ‖v₀‖/‖vₜ‖")
    rate, mode = checkpoints["onset_rate"], MODE_LABELS[checkpoints["onset_mode"]]
    onset, before = checkpoints["onset_tokens"], checkpoints["onset_after"]
    reached = "not reached at any checkpoint"
    if onset is not None:
        reached = f"first seen at the checkpoint of {onset:,} tokens, not at the one before, of {before:,}"
    return Table(
        "checkpoints",
        "Along the run's checkpoints",
        header,
        rows,
        f"Onset: a sink rate of {rate:g} % ({mode}) {reached}.",
    )


def scalars(found: Found) -> dict[str, float]:
    """Every figure that is one number, under its metric key."""
    out: dict[str, float] = {}
    for kind, modes in found.get("sinks", {}).items():
        for mode, keys in modes.items():
            for key, r in keys.items():
                rate, mass = (r["rate"], r["mass"]) if key == "0" else (r["rate_placed"], r["mass_placed"])
                prefix = f"probe/{kind}/{mode}" + ("" if key == "0" else f"/key {key}")
                out |= {f"{prefix}/sink_rate/{eps}": mean_of(rate[eps]) for eps in rate}
                out |= {f"{prefix}/sink_mass": mean_of(mass), f"{prefix}/loss": r["loss"]}
    for mode in modes_of(found):
        for column in (*STATES, *MIXING):
            if mode in found.get(column.measure, {}):
                # Of the last layer: the layers' own figures are in the tables.
                value = column.read(found[column.measure][mode], depth_of(found, mode))
                if value is not None:
                    out[f"probe/{mode}/{column.measure}/{column.key}"] = value
    return out


def print_tables(found: Found) -> None:
    """The tables but that of the sinks, which was printed line by line."""
    from rich import box
    from rich.table import Table as Drawn

    terminal = console(180)
    notes = set()
    for t in tables(found):
        if t.name == "sinks":
            continue
        drawn = Drawn(title=t.title, title_justify="left", box=box.SIMPLE_HEAD, caption_justify="left")
        if t.note not in notes:
            drawn.caption = t.note
            notes.add(t.note)
        for name in t.header:
            drawn.add_column(name, justify="left" if name in ("mode", "token", "keys") else "right")
        for row in t.cells():
            drawn.add_row(*row)
        terminal.print(drawn)
