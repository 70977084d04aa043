"""The page of several models that `sinkbed probe` measured: which has how much sink, where in its depth, at what loss.

Each model's own report is in a folder beside it.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from urllib.parse import quote

from matplotlib.axes import Axes

from sinkbed.plain_text import counted
from sinkbed.train.measure.modes import MODE_LABELS
from sinkbed.train.report import html
from sinkbed.train.report.effects import figure, figures
from sinkbed.train.report.figures import Drawing, Picture, line, look, mode_panels
from sinkbed.train.report.model import publish
from sinkbed.train.report.model_tables import Measured
from sinkbed.train.report.pictures import dots
from sinkbed.train.report.result import Result, mean, modes_of
from sinkbed.train.report.table import Row, Table
from sinkbed.train.report.tables import by_mode

_MOST_NAMED = 4
"""Models up to which the answer names each."""
_NOTES = {
    "loss": "Nats per token of each model's own tokenizer: they do not compare where tokenizers differ.",
    "bits_per_byte": "The same loss over the UTF-8 bytes of its tokens: these compare across tokenizers.",
}


def folders(labels: Iterable[str]) -> dict[str, str]:
    """The folder of each model's own report, whose name a file system takes: of a long label the end."""
    return {label: f"{n}-{re.sub(r'[^A-Za-z0-9_.-]+', '-', label)[-80:]}" for n, label in enumerate(labels, 1)}


def write(models: Mapping[str, Measured], missing: Mapping[str, str], folders: Mapping[str, str], folder: Path) -> Path:
    """Write probe.json, CSV, figures and index.html of models by name; returns the page.

    Args:
        missing: why a model is not, or not whole, among them.
        folders: where below `folder` each model's own report is.
    """
    results = results_of(models)
    record = {"models": dict(models), "missing": dict(missing), "folders": {name: folders[name] for name in models}}
    return publish(record, folder, [table(models)], _pictures(results), partial(_page, record, results))


def results_of(models: Mapping[str, Measured]) -> list[Result]:
    """What was measured of each model's sinks on the first of the inputs, in the form of a run's result."""
    results = []
    for name, measured in models.items():
        by_input = measured.get("sinks") or {"": {}}
        modes = {mode: next(iter(keys.values())) for mode, keys in next(iter(by_input.values())).items()}
        if modes:
            results.append(Result(name, 0, {}, 0, [], {"modes": modes}))
    return results


def table(models: Mapping[str, Measured]) -> Table:
    """All of them in one table, mode by mode."""
    results = results_of(models)
    rows: list[Row] = [
        (MODE_LABELS[mode], r.arm, *(figure(r, key, mode) for key in ("sink_rate_0.3", "sink_mass", *_NOTES)))
        for mode in modes_of(results)
        for r in results
        if mode in r.final["modes"]
    ]
    header = ("mode", "model", "sink rate %", "sink mass", "loss", "bits per byte")
    return Table("models", "Side by side", header, rows, "Bits per byte compare across tokenizers, losses do not.")


def _by_mode(results: Sequence[Result]) -> list[Table]:
    """A table a figure: a row a model, modes as columns."""
    tables = by_mode(results, "bits_per_byte", "model") if results else []
    return [replace(t, note=_NOTES.get(t.name, "")) for t in tables]


def _seen(results: Sequence[Result]) -> list[str]:
    """The modes in which key 0 can be looked at."""
    return [mode for mode in modes_of(results) if mode != "first_key_masked"]


def answer(results: Sequence[Result]) -> str:
    """Which model has how much sink in each mode."""
    sentences = []
    for mode in _seen(results):
        rates = {r.arm: rate for r in results for rate in figures([r], r.arm, "sink_rate_0.3", mode).values()}
        ordered = sorted(rates, key=lambda name: -rates[name])
        at = [f"{rates[name]:.1f}\N{NO-BREAK SPACE}% in {name}" for name in ordered]
        if len(at) > _MOST_NAMED:
            at = [f"between {at[-1]}", at[0]]
        given = "As trained" if mode == "as_trained" else f"With {MODE_LABELS[mode]} as input"
        sentences.append(f"{given}, the sink rate is {' and '.join(filter(None, (', '.join(at[:-1]), at[-1])))}.")
    return " ".join(sentences)


def _pictures(results: Sequence[Result]) -> list[Picture]:
    modes = _seen(results)
    marks = dots(results, "sink_rate_0.3", modes, "sink rate, % (eps 0.3)")
    marks += dots(results, "bits_per_byte", modes_of(results), "bits per byte")
    words = (
        "Sink rate: share of (document, layer, head) whose mean attention on the first key is above 0.3. Bits per "
        "byte: the loss, in a unit that tokenizers share."
    )
    by_mode = {mode: {r.arm: _rates(r.final["modes"].get(mode)) for r in results} for mode in modes}
    top = max((rate for of_mode in by_mode.values() for rates in of_mode.values() for rate in rates), default=0)
    depth = mode_panels(by_mode, partial(_depth, 1.05 * top or 1))
    layers = "Sink rate of each layer, the share of (document, head). At 1 is the last layer."
    every = [
        Picture("rates", "Sink rate, and how well the text is predicted", words, marks, across=2),
        Picture("depth", "Sink rate by relative depth", layers, depth, across=2),
    ]
    return [picture for picture in every if picture.panels]


def _rates(measured: Measured | None) -> list[float]:
    """[L] sink rate over heads (eps 0.3); empty for a mode that was not measured."""
    return [mean([heads]) for heads in measured["rate"]["0.3"]] if measured else []


def _depth(top: float, models: Mapping[str, Sequence[float]], axis: Axes) -> None:
    """A line a model, which has one look in every mode."""
    for n, (name, rates) in enumerate(models.items()):
        if rates:
            line(axis, [layer / len(rates) for layer in range(1, len(rates) + 1)], rates, name, look(n))
    axis.set(xlabel="layer / layers", ylabel="sink rate, %", xlim=(0, 1.03), ylim=(-0.03 * top, top))
    axis.grid(axis="y")


def _page(record: Measured, results: Sequence[Result], drawings: Sequence[Drawing]) -> str:
    models, missing = record["models"], record["missing"]
    names = dict.fromkeys([*models, *missing])
    first = next(iter(models.values()))
    T = first["settings"]["sink_tokens"]
    facts = (", ".join(names), counted(first["documents"], "document"), f"T = {T}")
    note = (
        "All read the same documents, each cropped to as many tokens of a model's own tokenizer, which are not the "
        "same length of text. One measurement of each model: no interval."
    )
    notices = [f"{'Not all' if name in models else 'Nothing'} of {name}: {why}." for name, why in missing.items()]
    places = {
        name: (f"{quote(folder)}/index.html", f"{models[name]['model']}{_size(models[name])}")
        for name, folder in record["folders"].items()
    }
    parts = [
        html.paragraph(" · ".join(facts), "facts"),
        html.paragraph(answer(results), "answer"),
        html.notices(notices),
        *map(html.picture, drawings),
        html.paragraph(note),
        html.section("Numbers", *(html.folded(t.title, html.table(t)) for t in _by_mode(results))) if results else "",
        html.section("Each model", html.links(places)) if places else "",
        html.paragraph("Beside this page: its figures as SVG, PDF and PNG, the numbers as models.csv and probe.json."),
    ]
    return html.document(f"Sinks of {counted(len(names), 'model')}", parts)


def _size(measured: Measured) -> str:
    for result in results_of({"": measured}):
        masses = next(iter(result.final["modes"].values()))["mass"]
        return f", {counted(len(masses), 'layer')} of {counted(len(masses[0]), 'head')}"
    return ""
