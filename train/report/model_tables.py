"""What `sinkbed probe` measured, as tables for the terminal, CSV and the page, and as numbers under metric keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, get_args

from sinkbed.plain_text import console
from sinkbed.train.measure.measures import Column, Group, measures
from sinkbed.train.measure.modes import MODE_LABELS
from sinkbed.train.report.result import fixed

Measured = dict[str, Any]
"""What a probe measured, as `steps.Measurement.result` has it."""
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


def note_of(measured: Measured, group: Group) -> str:
    """What is in a group's table."""
    lines = (
        "A layer's line has the hidden states h that it writes and the attention inside it; input: what the first "
        "layer reads. Layers and heads count from 0."
    )
    return " ".join((lines, *(measure.note for name, measure in measures(group).items() if name in measured)))


def columns_of(measured: Measured, *groups: Group) -> list[tuple[str, Column]]:
    """(measure, column) of what was measured in any mode."""
    return [(name, c) for name, measure in measures(*groups).items() if name in measured for c in measure.columns]


def last_layer(measured: Measured, name: str, column: Column, mode: str) -> float | None:
    """A column's figure of the last layer; None where it was not measured."""
    return column.values(measured[name][mode])[-1] if mode in measured.get(name, {}) else None


def tables(measured: Measured) -> list[Table]:
    """Everything that has the form of a table."""
    out = []
    if "sinks" in measured:
        out.append(_sink_table(measured["sinks"]))
    for group in get_args(Group):
        out += [_layer_table(measured, group, mode) for mode in modes_of(measured, group)]
    for mode, states in measured.get("states", {}).items():
        out += [_massive_table(mode, states), _received_table(mode, states)]
    if "by_length" in measured:
        out.append(_length_table(measured["by_length"]))
    if "positions" in measured:
        out.append(_position_table(measured["positions"]))
    if "streaming" in measured:
        out.append(_streaming_table(measured["streaming"]))
    if "checkpoints" in measured:
        out.append(_checkpoint_table(measured["checkpoints"]))
    return out


def modes_of(measured: Measured, *groups: Group) -> list[str]:
    """Modes that anything of these groups was measured in."""
    return list(dict.fromkeys(mode for name in measures(*groups) for mode in measured.get(name, {})))


def _sink_table(sinks: Measured) -> Table:
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


def _layer_table(measured: Measured, group: Group, mode: str) -> Table:
    columns = [(name, c) for name, c in columns_of(measured, group) if mode in measured[name]]
    values = [c.values(measured[name][mode]) for name, c in columns]
    rows: list[Row] = [(layer - 1 if layer else "input", *line) for layer, line in enumerate(zip(*values, strict=True))]
    return Table(
        f"{group}-{mode}",
        f"{group.capitalize()} by layer: {MODE_LABELS[mode]}",
        ("layer", *(c.title for _, c in columns)),
        rows,
        note_of(measured, group),
        ("layer", *(f"{name}/{c.key}" for name, c in columns)),
    )


def _massive_table(mode: str, states: Measured) -> Table:
    rows: list[Row] = [
        (layer - 1 if layer else "input", at["value"], at["channel"], at["position"], repr(at.get("text", at["token"])),
         at["document"])
        for layer, at in enumerate(states["massive"])
    ]  # fmt: skip
    header = ("layer", "largest |h|", "channel", "position", "token", "document")
    note = "Where the largest activation of all documents is (arXiv 2402.17762), BOS included."
    return Table(f"massive-{mode}", f"Massive activations: {MODE_LABELS[mode]}", header, rows, note)


def _received_table(mode: str, states: Measured) -> Table:
    rows: list[Row] = []
    pairs = list(states["strongest_position"])
    for index, by_token in enumerate(states["strongest_token"]):
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


def _length_table(by_length: Measured) -> Table:
    columns = columns_of(next(iter(by_length.values())), "mixing")
    rows: list[Row] = [
        (int(length), MODE_LABELS[mode], *(last_layer(measured, name, c, mode) for name, c in columns))
        for length, measured in by_length.items()
        for mode in modes_of(measured, "mixing")
    ]
    header = ("tokens", "mode", *(c.title for _, c in columns))
    return Table("by_length", "Mixing in the last layer by context length", header, rows)


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first} to {last}"


def _position_table(positions: Measured) -> Table:
    modes = list(positions)
    rows: list[Row] = [
        (_span(span["start"], span["end"] - 1), span["tokens"], *(positions[m][i]["perplexity"] for m in modes))
        for i, span in enumerate(positions[modes[0]])
    ]
    header = ("position in the document", "targets", *(MODE_LABELS[mode] for mode in modes))
    return Table("positions", "Perplexity by position in the document", header, rows)


def _streaming_table(streaming: Measured) -> Table:
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


def _checkpoint_table(checkpoints: Measured) -> Table:
    rows: list[Row] = []
    for point in checkpoints["points"]:
        for mode, values in point["modes"].items():
            rows.append((
                point["step"], point["tokens"], MODE_LABELS[mode], values[f"sink/rate_eps0.3/{mode}"],
                values[f"sink/mass/{mode}"], values[f"val/loss/{mode}"],
                max(v for key, v in values.items() if key.startswith("state/first_token_norm_ratio/")),
                min(v for key, v in values.items() if key.startswith("state/value_norm_ratio/")),
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


def scalars(measured: Measured) -> dict[str, float]:
    """Every figure that is one number, under its metric key."""
    out: dict[str, float] = {}
    for kind, modes in measured.get("sinks", {}).items():
        for mode, keys in modes.items():
            for key, r in keys.items():
                rate, mass = (r["rate"], r["mass"]) if key == "0" else (r["rate_placed"], r["mass_placed"])
                prefix = f"probe/{kind}/{mode}" + ("" if key == "0" else f"/key {key}")
                out |= {f"{prefix}/sink_rate/{eps}": mean_of(rate[eps]) for eps in rate}
                out |= {f"{prefix}/sink_mass": mean_of(mass), f"{prefix}/loss": r["loss"]}
    for name, column in columns_of(measured, "states", "mixing"):
        for mode in measured[name]:
            value = last_layer(measured, name, column, mode)  # the layers' own figures are in the tables
            if value is not None:
                out[f"probe/{mode}/{name}/{column.key}"] = value
    return out


def print_tables(measured: Measured) -> None:
    """The tables but that of the sinks, which was printed line by line."""
    from rich import box
    from rich.table import Table as Drawn

    terminal = console(180)
    notes = set()
    for t in tables(measured):
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
