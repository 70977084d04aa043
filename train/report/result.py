"""What a run found, read from its directory, and how its figures are written."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from sinkbed.data.prepare.recipe import texts_digest
from sinkbed.train.config.yaml_files import read_mapping
from sinkbed.train.report.intervals import Interval
from sinkbed.train.run import directory


@dataclass(frozen=True)
class Result:
    """One run: its strategy, its points and its final measurement."""

    arm: str
    seed: int
    strategy: dict[str, Any]
    context_length: int
    points: list[dict[str, Any]]
    final: dict[str, Any]
    documents: str = ""
    """Digests of the token store and its documents; equal where two runs read the same ones."""
    texts: str = ""
    """Digest of what decided the documents before they were tokens; equal where only the tokenizer differs too."""
    made_by: tuple[dict[str, Any], ...] = ()
    """Provenance of each process that the run was made by."""
    progress: str = ""
    """How far a run is that has not finished; its final measurement is then its last live one."""

    def maps(self, mode: str) -> dict[int, list[list[float]]]:
        """Tokens -> sink mass [L][H] at the measurements while training."""
        return {p["train/tokens"]: p[key] for p in self.points if (key := f"sink/heatmap/{mode}") in p}

    def value(self, mode: str, key: str) -> float:
        """A figure of the final measurement: `loss`, `bits_per_byte`, `mass`, or an eps for a sink rate."""
        measured = self.final["modes"][mode]
        value = measured["rate"].get(key) or measured[key]
        return mean(value) if isinstance(value, list) else float(value)


def mean(rows: list[list[float]]) -> float:
    return fmean(x for row in rows for x in row)


def arms_of(results: Sequence[Result]) -> list[str]:
    """Arms in their order."""
    return list(dict.fromkeys(r.arm for r in results))


def modes_of(results: Sequence[Result]) -> list[str]:
    """Inference modes that any run was measured in: the one with the first token, then text, then others."""
    order = {"bos": 0, "as_trained": 1, "text": 2}
    return sorted(dict.fromkeys(m for r in results for m in r.final["modes"]), key=lambda m: order.get(m, 3))


def load_result(folder: Path, arm: str, seed: int) -> Result:
    """Read one run directory, of a run that has not finished up to its last measurement.

    Raises FileNotFoundError where nothing was measured yet, ValueError that names a damaged file.
    """
    if not (folder / directory.CONFIG).is_file():
        raise FileNotFoundError(f"{folder / directory.CONFIG}: expected a run directory, got no such file")
    finished = (folder / directory.MEASUREMENT).is_file()
    if finished:
        directory.check_finished(folder)
    config = read_mapping(folder / directory.CONFIG)
    audit, run, manifest = (
        directory.read_json(path) if path.is_file() else {}
        for path in (folder / directory.AUDIT, folder / directory.RUN, folder / directory.MANIFEST)
    )
    points = list(directory.read_metrics(folder / directory.METRICS))
    strategy, length = config["data"]["strategy"], config["data"]["context_length"]
    documents = f"{audit.get('store_digest', '')} {audit.get('document_order', '')}"
    try:
        texts = texts_digest(manifest) if manifest else documents
    except ValueError as error:
        raise ValueError(f"{folder / directory.MANIFEST}: {error}") from None
    if finished:
        final, progress = directory.read_json(folder / directory.MEASUREMENT), ""
        if any(mode.get("share") and not mode.get("learned_mass") for mode in final["modes"].values()):
            raise ValueError(
                f"{folder}: expected sink masses over the sum of a query's weights, got raw ones of an earlier version "
                "of Sinkbed; train the run anew, or report it with the version that wrote it"
            )
    else:
        final = _last_measured(folder, points, config)
        progress = f"step {points[-1]['step']:,} of {config['trainer']['max_steps']:,}"
    made_by = tuple(run.get("made_by", ()))
    return Result(arm, seed, strategy, length, points, final, documents, texts, made_by, progress)


def _last_measured(folder: Path, points: Sequence[dict[str, Any]], config: dict[str, Any]) -> dict[str, Any]:
    """The last live measurement in the form of a final one."""
    last = next((p for p in reversed(points) if any(key.startswith("sink/heatmap/") for key in p)), None)
    if last is None:
        raise FileNotFoundError(f"{folder / directory.METRICS}: expected a run with a measurement, got none yet")
    measured = config["measure"]
    onset = f"sink/rate_eps0.3/{measured['live_modes'][0]}"
    reached = [p for p in points if p.get(onset, -1) >= measured["onset_rate"] and p["step"]]
    first = next((p for p in points if onset in p), None)
    seen = reached and reached[0] is not first  # else it was before, in a fork's parent
    onset_tokens = reached[0]["train/tokens"] if seen else None
    modes = {}
    for mode in measured["live_modes"]:
        value = {key.removesuffix(f"/{mode}"): value for key, value in last.items() if key.endswith(f"/{mode}")}
        rates = {
            name: {eps: [[value[f"sink/{name}_eps{eps}"]]] for eps in ("0.2", "0.3", "0.5", "0.8")}
            for name in ("rate", "rate_full", "rate_share")
            if f"sink/{name}_eps0.3" in value
        }
        names = ("alpha", "mass_raw", "share", "learned_mass")
        masses = {name: [[value[key]]] for name in names if (key := f"sink/{name}") in value}
        modes[mode] = rates | masses | {
            "mass": value["sink/heatmap"], "loss": value["val/loss"], "bits_per_byte": value["val/bits_per_byte"],
            "documents": measured["live_documents"], "tokens": None,
        }  # fmt: skip
    return {
        "modes": modes, "step": last["step"], "tokens": last["train/tokens"], "onset_tokens": onset_tokens,
        "parameters": None, "sink_tokens": measured["sink_tokens"],
    }  # fmt: skip


def describe(strategy: dict[str, Any]) -> tuple[str, str]:
    """Mask, with positions by document and any packing but `concat`, and first token of a strategy in the words of the
    published table."""
    mask = "causal" if strategy["mask"] == "causal" else "intra-document"
    if prefix := strategy["shared_prefix"]:
        mask += f", {'position 0' if prefix == 1 else f'positions below {prefix}'} visible to all"
    mask += f", window {strategy['window']}" if strategy["window"] else ""
    mask += f", prefix LM {strategy['prefix_lm']}" if strategy["prefix_lm"] else ""
    mask += ", positions by document" if strategy.get("positions") == "document" else ""
    packing = strategy.get("packing", "concat")
    if packing != "concat":
        [(name, options)] = packing.items() if isinstance(packing, dict) else [(packing, {})]
        details = [
            *(["long ones cropped"] if strategy["overflow"] == "truncate" else []),
            *{"pad": [], "crop": ["filled up by cropping"], "repeat": ["filled up by repeating"]}[strategy["fill"]],
            *(f"{key} {value}" for key, value in options.items()),
        ]
        mask += f"; {name}" + (f" ({', '.join(details)})" if details else "")
    first, share = strategy["first_token"], strategy.get("first_token_share", 1)
    rows = "" if share == 1 else f" of {100 * share:g} % of rows"
    words = {"bos": "fixed", "random": "random token"}
    parts = [
        f"{words.get(what, f'token {what}')} at position {position}{rows}"
        for position, what in enumerate(first if isinstance(first, list) else [first])
        if what != "none"
    ]
    if (start := strategy["document_start"]) != "none":
        parts.append(f"{'' if start == 'bos' else f'token {start} '}at document starts")
    has_bos = any("fixed" in part or part == "at document starts" for part in parts)
    return mask, ("" if has_bos or not parts else "none; ") + " and ".join(parts) or "none"


def fixed(value: float, digits: int, *, sign: bool = False) -> str:
    """A number with so many digits, and a plus where it is asked for; never −0."""
    text = f"{value:{'+' if sign else ''}.{digits}f}"
    return (text.lstrip("+-") if float(text) == 0 else text).replace("-", "−")


def spread(figures: Interval | Iterable[float] | None, digits: int, *, sign: bool = False) -> str:
    """Mean and the half-width of its 95 % interval; of one run, the figure alone."""
    if figures is not None and not isinstance(figures, Interval):
        values = list(figures)
        figures = Interval.of(values) if values else None
    if figures is None:
        return ""
    mean = fixed(figures.mean, digits, sign=sign)
    return mean if figures.count == 1 else f"{mean} ± {fixed(figures.half, digits)}"
