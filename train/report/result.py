"""What a finished run found, read from its directory, and how its figures are written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from sinkbed.train.config.yaml_files import read_mapping
from sinkbed.train.report.intervals import Interval
from sinkbed.train.run import directory


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
        measured = self.final["modes"][mode]
        if key in measured["rate"]:
            return mean(measured["rate"][key])
        value = measured[key]
        return float(value) if isinstance(value, int | float) else mean(value)


def mean(rows: list[list[float]]) -> float:
    return fmean(x for row in rows for x in row)


def arms_of(results: Sequence[Result]) -> list[str]:
    """Arms in their order."""
    return list(dict.fromkeys(r.arm for r in results))


def common_modes(results: Sequence[Result]) -> list[str]:
    """Inference modes that every run was measured in, in the first run's order."""
    return [m for m in results[0].final["modes"] if all(m in r.final["modes"] for r in results)]


def load_result(folder: Path, arm: str, seed: int) -> Result:
    """Read one run directory. Raises FileNotFoundError or ValueError that names the file at fault."""
    for name in (directory.CONFIG, directory.MEASUREMENT):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name}: expected a finished run, got no such file")
    directory.check_finished(folder)
    config = read_mapping(folder / directory.CONFIG)
    audit, run = (
        {} if not path.is_file() else directory.read_json(path)
        for path in (folder / directory.AUDIT, folder / directory.RUN)
    )
    return Result(
        arm=arm,
        seed=seed,
        strategy=config["data"]["strategy"],
        context_length=config["data"]["context_length"],
        points=list(directory.read_metrics(folder / directory.METRICS)),
        final=directory.read_json(folder / directory.MEASUREMENT),
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
        details = ["long ones cropped"] if strategy["overflow"] == "truncate" else []
        details += {"pad": [], "crop": ["filled up by cropping"], "repeat": ["filled up by repeating"]}[
            strategy["fill"]
        ]
        name = packing if isinstance(packing, str) else " ".join(map(str, packing))
        details += [f"{k} {v}" for k, v in packing[name].items()] if isinstance(packing, dict) else []
        mask += f"; {name}" + (f" ({', '.join(details)})" if details else "")
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


def fixed(value: float, digits: int, *, sign: bool = False) -> str:
    """A number with so many digits, and a plus where it is asked for; never −0."""
    text = f"{value:{'+' if sign else ''}.{digits}f}"
    return (text.lstrip("+-") if float(text) == 0 else text).replace("-", "−")


def spread(figures: Interval | Sequence[float] | None, digits: int, *, sign: bool = False) -> str:
    """Mean and the half-width of its 95 % interval; of one run, that it is one."""
    if figures is None or (not isinstance(figures, Interval) and not figures):
        return ""
    interval = figures if isinstance(figures, Interval) else Interval.of(figures)
    mean = fixed(interval.mean, digits, sign=sign)
    return f"{mean} (1 run)" if interval.count == 1 else f"{mean} ± {fixed(interval.half, digits)}"
