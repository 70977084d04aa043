"""What `sinkbed probe` measured, as tables for the terminal, CSV and the page, and as numbers under metric keys."""

import dataclasses
from collections.abc import Callable, Iterator
from itertools import zip_longest
from typing import Any, get_args

from sinkbed.train.measure.measures import Column, Group, measures
from sinkbed.train.measure.modes import MODE_LABELS
from sinkbed.train.report.result import mean
from sinkbed.train.report.table import Row, Table

Measured = dict[str, Any]
"""What a probe measured, as `steps.Measurement.result` has it."""

ALONG: tuple[tuple[str, str, Callable[[Measured, str], float]], ...] = (
    ("sink rate %", "sink rate, % (eps 0.3)", lambda v, mode: v[f"sink/rate_eps0.3/{mode}"]),
    ("sink mass", "sink mass", lambda v, mode: v[f"sink/mass/{mode}"]),
    ("loss", "loss, nats per token", lambda v, mode: v[f"val/loss/{mode}"]),
    ("largest ‖h₀‖/‖hₜ‖", "largest ‖h₀‖ / ‖hₜ‖", lambda v, _: max(_below(v, "state/first_token_norm_ratio/"))),
    ("smallest ‖v₀‖/‖vₜ‖", "smallest ‖v₀‖ / ‖vₜ‖", lambda v, _: min(_below(v, "state/value_norm_ratio/"))),
)
"""Name, title and reading (of a checkpoint's metrics in a mode) of what is followed along a run's checkpoints."""


def _below(metrics: dict[str, float], prefix: str) -> list[float]:
    return [value for key, value in metrics.items() if key.startswith(prefix)]


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


def modes_of(measured: Measured, *groups: Group) -> list[str]:
    """Modes that anything of these groups was measured in."""
    return list(dict.fromkeys(mode for name in measures(*groups) for mode in measured.get(name, {})))


def tables(measured: Measured) -> list[Table]:
    """Everything that has the form of a table; a note that several have stands under the first."""
    out = []
    if "sinks" in measured:
        header = ("mode", "input read", "key", *(f"sink rate %, eps {eps}" for eps in ("0.2", "0.3", "0.5", "0.8")))
        rows: list[Row] = [
            (
                MODE_LABELS[mode],
                kind,
                int(key),
                *rates.values(),
                mass,
                *_readings(result, key),
                result["loss"],
                result["bits_per_byte"],
            )
            for kind, mode, key, rates, mass, result in _sinks(measured)
        ]
        table = Table("sinks", "Sinks", (*header, "sink mass", *_OTHER_READINGS, "loss", "bits per byte"), rows)
        if any(value is not None for _, _, key, _, _, result in _sinks(measured) for value in _readings(result, key)):
            table = dataclasses.replace(table, note=_WHOLE)
        out.append(_without(table, {"input read": "natural", "key": 0}))
    out += [_layer_table(measured, group, mode) for group in get_args(Group) for mode in modes_of(measured, group)]
    for mode, states in measured.get("states", {}).items():
        out += [_massive_table(mode, states), _received_table(mode, states)]
    others = {"by_length": _length_table, "positions": _position_table, "streaming": _streaming_table}
    others["checkpoints"] = _checkpoint_table
    out += [table(measured[name]) for name, table in others.items() if name in measured]
    notes = [table.note for table in out]
    return [dataclasses.replace(t, note="") if t.note in notes[:n] else t for n, t in enumerate(out)]


def _without(table: Table, usual: dict[str, object]) -> Table:
    """A table without the columns that hold nothing but their usual value."""
    kept = [i for i, name in enumerate(table.header) if any(row[i] != usual.get(name) for row in table.rows)]
    rows = [tuple(row[i] for i in kept) for row in table.rows]
    return dataclasses.replace(table, header=tuple(table.header[i] for i in kept), rows=rows)


def _sinks(measured: Measured) -> Iterator[tuple[str, str, str, dict[str, float], float, Measured]]:
    """(input, mode, key, sink rate by eps, sink mass, all of it); a key after the first is where a token is placed."""
    for kind, modes in measured.get("sinks", {}).items():
        for mode, keys in modes.items():
            for key, result in keys.items():
                of_key = "" if key == "0" else "_placed"
                rates = {eps: mean(heads) for eps, heads in result[f"rate{of_key}"].items()}
                yield kind, mode, key, rates, mean(result[f"mass{of_key}"]), result


_WHOLE = (
    "Sink rate and sink mass: of all that a query gives out, a learned key's or registers' part included. Raw: the "
    "weight as a normaliser leaves it. Of shares, sink share: of what the query gives to tokens alone."
)
_OTHER_READINGS = ("raw sink mass", "rate of shares %", "sink share", "mass on the learned key")


def _readings(result: Measured, key: str) -> tuple[float | None, ...]:
    """What `_OTHER_READINGS` names, at key 0; None where the model has no such reading."""
    rates = (result.get("rate_share") or {}).get("0.3")
    values = (result.get("mass_raw"), rates, result.get("share"), result.get("learned_mass"))
    return tuple(mean(value) if value and key == "0" else None for value in values)


def _layer_name(index: int) -> str | int:
    return index - 1 if index else "input"


def _layer_table(measured: Measured, group: Group, mode: str) -> Table:
    columns = [(name, c) for name, c in columns_of(measured, group) if mode in measured[name]]
    values = [c.values(measured[name][mode]) for name, c in columns]
    return Table(
        f"{group}-{mode}",
        f"{group.capitalize()} by layer: {MODE_LABELS[mode]}",
        ("layer", *(c.title for _, c in columns)),
        [(_layer_name(index), *line) for index, line in enumerate(zip(*values, strict=True))],
        note_of(measured, group),
        ("layer", *(f"{name}/{c.key}" for name, c in columns)),
    )


def _massive_table(mode: str, states: Measured) -> Table:
    rows: list[Row] = [
        (_layer_name(index), at["value"], at["channel"], at["position"], _token(at), at["document"])
        for index, at in enumerate(states["massive"])
    ]
    header = ("layer", "largest |h|", "channel", "position", "token", "document")
    note = "Where the largest activation of all documents is (arXiv 2402.17762), BOS included."
    return Table(f"massive-{mode}", f"Massive activations: {MODE_LABELS[mode]}", header, rows, note)


def _token(at: Measured) -> str:
    return repr(at.get("text", at["token"]))


def _received_table(mode: str, states: Measured) -> Table:
    positions: list[Row] = [(at["position"], 100 * at["share"]) for at in states["strongest_position"]]
    tokens: list[Row] = [
        (_token(at) + (" at the start" if at["first"] else ""), 100 * at["share"]) for at in states["strongest_token"]
    ]
    return Table(
        f"received-{mode}",
        f"Where most attention goes: {MODE_LABELS[mode]}",
        ("position", "% of cases", "token", "% of cases"),
        [(*position, *token) for position, token in zip_longest(positions, tokens, fillvalue=("", ""))],
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


def _position_table(positions: Measured) -> Table:
    rows: list[Row] = []
    for spans in zip(*positions.values(), strict=True):
        first, last = spans[0]["start"], spans[0]["end"] - 1
        at = str(first) if first == last else f"{first} to {last}"
        rows.append((at, spans[0]["tokens"], *(span["perplexity"] for span in spans)))
    header = ("position in the document", "targets", *(MODE_LABELS[mode] for mode in positions))
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
    rows: list[Row] = [
        (point["step"], point["tokens"], MODE_LABELS[mode], *(read(values, mode) for _, _, read in ALONG))
        for point in checkpoints["points"]
        for mode, values in point["modes"].items()
    ]
    rate, mode = checkpoints["onset_rate"], MODE_LABELS[checkpoints["onset_mode"]]
    onset, before = checkpoints["onset_tokens"], checkpoints["onset_after"]
    reached = "not reached at any checkpoint"
    if onset is not None:
        earlier = "the first one" if before is None else f"not at the one before, of {before:,}"
        reached = f"first seen at the checkpoint of {onset:,} tokens, {earlier}"
    header = ("step", "tokens", "mode", *(name for name, _, _ in ALONG))
    note = f"Onset: a sink rate of {rate:g} % ({mode}) {reached}."
    return Table("checkpoints", "Along the run's checkpoints", header, rows, note)


def scalars(measured: Measured) -> dict[str, float]:
    """Every figure that is one number, under its metric key."""
    out: dict[str, float] = {}
    for kind, mode, key, rates, mass, result in _sinks(measured):
        prefix = f"probe/{kind}/{mode}" + ("" if key == "0" else f"/key {key}")
        out |= {f"{prefix}/sink_rate/{eps}": rate for eps, rate in rates.items()}
        out |= {f"{prefix}/sink_mass": mass, f"{prefix}/loss": result["loss"]}
    for name, column in columns_of(measured, "states", "mixing"):
        for mode in measured[name]:
            value = last_layer(measured, name, column, mode)  # the layers' own figures are in the tables
            if value is not None:
                out[f"probe/{mode}/{name}/{column.key}"] = value
    return out
