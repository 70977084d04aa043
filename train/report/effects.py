"""Effects: each figure of a run by name, differences of arms, and what became of the expected ones."""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sinkbed.registry import plain
from sinkbed.train.measure.config import MeasureConfig
from sinkbed.train.measure.modes import MODE_LABELS
from sinkbed.train.report.intervals import Interval, area, paired, seeds_for, verdict
from sinkbed.train.report.result import Result, fixed, mean, spread
from sinkbed.train.study.arms import ArmRun
from sinkbed.train.study.file import Effect, Published, StudyConfig

LABELS = {
    "sink_rate_0.3": "sink rate %",
    **{f"sink_rate_{eps}": f"sink rate % (eps {eps})" for eps in ("0.2", "0.5", "0.8")},
    "sink_rate_placed": "sink rate % at the placed token",
    "sink_mass": "sink mass",
    "sink_mass_raw": "raw sink mass",
    "sink_rate_share": "sink rate % of shares",
    "sink_share": "sink share",
    "learned_mass": "mass on the learned key",
    "loss": "loss",
    "bits_per_byte": "bits per byte",
    "loss_gap": "loss gap",
    "sink_rate_deep": "sink rate %, layers 3 and up",
    "sink_rate_area": "sink rate % over log tokens",
    "sink_rate_peak": "highest live sink rate %",
    "sink_rate_deep_peak": "highest live sink rate %, layers 3 and up",
    "sink_mass_excess": "sink mass above that of step 0",
    "onset_tokens": "onset, tokens",
    "perturbation": "perturbation spread",
    "jacobian": "size of the Jacobian",
    "effective_rank": "effective rank",
}
DIGITS = {
    "sink_mass": 3,
    "sink_mass_excess": 3,
    "sink_mass_raw": 3,
    "sink_share": 3,
    "learned_mass": 3,
    "loss": 3,
    "bits_per_byte": 3,
    "loss_gap": 3,
    "onset_tokens": 0,
    "perturbation": 3,
    "jacobian": 3,
}
"""Decimals of a figure; others have one."""
LIVE = {
    "sink_rate_area": "sink/rate_eps0.3/{mode}",
    "sink_rate_peak": "sink/rate_eps0.3/{mode}",
    "sink_rate_deep_peak": "sink/rate_deep_eps0.3/{mode}",
    "sink_mass_excess": "sink/mass/{mode}",
}
"""Figures of a curve of training, and its key."""
MIXING = {
    "perturbation": "mixing/perturbation/{mode}",
    "jacobian": "mixing/jacobian/{mode}",
    "effective_rank": "mixing/effective_rank/layer{layer}/{mode}",
}
"""Figures of mixing, of what the last layer writes, and the key of their curve."""
SIGNS = {
    "reproduced": ("✓", "good"),
    "as expected": ("✓", "good"),
    "not reproduced": ("✗", "bad"),
    "not as expected": ("✗", "bad"),
    "within noise": ("≈", "open"),
    "one run": ("·", "open"),
    "not reached by all": ("–", "open"),
    "not measured": ("–", "open"),
}
"""A sign of each verdict, and its kind on a page."""


def figure(result: Result, metric: str, mode: str) -> float | None:
    """A figure of a run; None where it was not measured, or an onset was not reached.

    `loss_gap`: loss of the mode − loss with BOS (as trained, where BOS was not measured), nats. `sink_rate_area`: mean
    of the live sink rate (eps 0.3) over the logarithm of tokens, in %, of the last hundredfold; `sink_rate_peak`: its
    maximum; `sink_rate_deep`, `sink_rate_deep_peak`: the final one and the maximum without the first two layers.
    `sink_mass_excess`: the last live sink mass − that of step 0, of random weights. `onset_tokens`: the first live
    measurement at `measure.onset_rate`, in the first live mode whatever the mode here.
    `sink_rate_placed`: at the last position where the strategy places a token; None in modes that do not place it.
    Of rates and masses see `train.measure.sinks`: `sink_mass_raw` of the weights as they are, `sink_rate_share` (eps
    0.3) and `sink_share` among the tokens; each is as `sink_mass` or `sink_rate_0.3` where the run has no such reading.
    `learned_mass`: as `sink_mass`, on the learned key or the registers; None without any.
    `perturbation`, `jacobian`, `effective_rank`: of what the last layer writes, the last ones measured in training.
    """
    if metric == "onset_tokens":
        return result.final["onset_tokens"]  # type: ignore[no-any-return]
    if metric in (*LIVE, *MIXING):
        points = [*curve(result, metric, mode).items()]
        if metric in MIXING:
            return points[-1][1] if points else None
        if metric == "sink_rate_area":
            return area(points)
        if metric == "sink_mass_excess":
            return points[-1][1] - points[0][1] if points and points[0][0] == 0 else None
        return max((rate for _, rate in points), default=None)
    modes = result.final["modes"]
    measured = modes.get(mode)
    if measured is None:
        return None
    if metric == "loss_gap":
        reference = reference_mode(modes)
        return None if reference is None else measured["loss"] - modes[reference]["loss"]
    if metric == "sink_rate_deep":
        deep = measured["rate"]["0.3"][2:]
        return mean(deep) if deep else None
    if metric == "sink_rate_placed":
        if placed := (measured.get("rate_placed") or {}).get("0.3"):
            return mean(placed)
        # One that is placed at position 0, and nowhere after, is the first key.
        first_tokens = result.strategy["first_token"]
        first, *others = first_tokens if isinstance(first_tokens, list) else [first_tokens]
        at_0 = mode in ("as_trained", {"bos": "bos", "random": "random_first"}.get(first))
        only = first not in ("none", None) and all(what == "none" for what in others)
        return result.value(mode, "0.3") if at_0 and only else None
    if metric == "sink_rate_share":
        return mean((measured.get("rate_share") or measured["rate"])["0.3"])
    if metric in ("sink_share", "sink_mass_raw"):
        return mean(measured.get(metric.removeprefix("sink_")) or measured["mass"])
    if metric == "learned_mass":
        return mean(measured["learned_mass"]) if measured.get("learned_mass") else None
    return result.value(mode, {"sink_mass": "mass"}.get(metric, metric.removeprefix("sink_rate_")))


def curve(result: Result, metric: str, mode: str) -> dict[float, float]:
    """Tokens -> what a figure of `LIVE` or `MIXING` is read from."""
    last = len(next(iter(result.final["modes"].values()))["mass"]) - 1
    key = {**LIVE, **MIXING}[metric].format(layer=last, mode=mode)
    return {p["train/tokens"]: p[key] for p in result.points if p.get(key) is not None}


def reference_mode(modes: Iterable[str]) -> str | None:
    """The mode whose loss the others are compared with: with BOS, else as trained; None where neither was measured."""
    return next((m for m in ("bos", "as_trained") if m in modes), None)


def figures(results: Sequence[Result], arm: str, metric: str, mode: str) -> dict[int, float]:
    """Seed -> figure of an arm, where there is one."""
    values = {r.seed: figure(r, metric, mode) for r in results if r.arm == arm}
    return {seed: value for seed, value in values.items() if value is not None and math.isfinite(value)}


def written(metric: str, values: Interval | Iterable[float] | None, *, sign: bool = False) -> str:
    """A figure over runs, or a difference, with its decimals; see `spread`."""
    return spread(values, DIGITS.get(metric, 1), sign=sign)


def label(metric: str, mode: str) -> str:
    """The title of a figure's column."""
    return f"{LABELS[metric]}, {MODE_LABELS[mode]}"


def check_measured(study: StudyConfig, runs: Sequence[ArmRun]) -> None:
    """Raise ValueError for an effect whose figure one of its arms will not have."""
    of_arm = {run.arm: run for run in runs}
    for effect in study.effects:
        for arm, mode in ((effect.arm, effect.mode), effect.other):
            if needed := _needed(effect.metric, mode, of_arm[arm]):
                raise ValueError(f"effect {effect.name!r}: {effect.metric} of arm {arm}: expected {needed}")


def _needed(metric: str, mode: str, run: ArmRun) -> str | None:
    """What an arm lacks for a figure, and what it has instead; None where it will be measured."""
    key = "live_modes" if metric in (*LIVE, *MIXING) else "modes"
    modes = run.setting(f"measure.{key}", getattr(MeasureConfig, key))
    if mode not in modes and metric != "onset_tokens":
        return f"a mode that it is measured in (measure.{key}: {', '.join(modes)}); got {mode}"
    first, layers = run.setting("data.strategy.first_token", "none"), run.setting("model.decoder.n_layers", 0)
    strategy = run.setting("trainer.strategy", "auto")
    if metric in MIXING and not (points := run.setting("measure.mixing_points", MeasureConfig.mixing_points)):
        return f"mixing to be measured while it trains (measure.mixing_points), got {points}"
    if metric == "jacobian" and "fsdp" in str(strategy):
        return f"a trainer.strategy under which gradients of states can be taken, such as ddp, got {strategy}"
    if metric == "loss_gap" and reference_mode(modes) in (None, mode):
        return f"bos or as_trained in measure.modes, and another mode to compare with it, got {', '.join(modes)}"
    if metric.startswith("sink_rate_deep") and layers < 3:
        return f"three layers or more, got {layers}"
    if metric == "sink_rate_placed":
        if all(what == "none" for what in (first if isinstance(first, list) else [first])):
            return f"a token that data.strategy.first_token places, got {first}"
        if mode == "text":
            return f"a mode that places a token, got {mode}"
        if prefix_lm := run.setting("data.strategy.prefix_lm", 0):
            return f"data.strategy.prefix_lm 0, got {prefix_lm}"
    if metric == "learned_mass" and plain(run.setting("model.decoder.sink", "none")) == "none":
        return None if run.setting("model.decoder.n_registers", 0) else "a model.decoder.sink or registers, got neither"
    return None


@dataclass(frozen=True)
class Outcome:
    """What became of an expected effect."""

    effect: Effect
    arm: Interval | None
    against: Interval | None
    difference: Interval | None
    published: tuple[float, float] | None
    """The published figures of `arm` and of what it is compared with, where both are known."""
    verdict: str

    @property
    def name(self) -> str:
        """The effect's name, with its note."""
        return self.effect.name + (f" ({self.effect.note})" if self.effect.note else "")

    @property
    def too_wide(self) -> bool:
        """Whether the interval of the difference is wider than it should be."""
        wanted = self.effect.half_width
        return wanted is not None and self.difference is not None and not self.difference.half <= wanted

    @property
    def seeds(self) -> str:
        """How many seeds the interval takes that is wanted of it, from those seen; empty where none is."""
        wanted, seen = self.effect.half_width or self.effect.tolerance, self.difference
        if not wanted:
            return ""
        if seen is None or seen.count < 2:
            return f"{self.name}: how many seeds ±{wanted:g} takes, two finished ones or more will tell"
        half = fixed(seen.half, DIGITS.get(self.effect.metric, 1))
        return f"{self.name}: ±{half} with {seen.count} seeds; ±{wanted:g} takes about {seeds_for(wanted, seen)}"

    @property
    def finding(self) -> str:
        """The verdict, without that it is of one run."""
        return self.verdict.removeprefix("one run: ")

    @property
    def measured(self) -> str:
        """The figure and its difference, where there is one."""
        return f"{LABELS[self.effect.metric]} {written(self.effect.metric, self.difference, sign=True)}".strip()

    @property
    def subtraction(self) -> str:
        """Which arms, or modes of one, the difference is of."""
        effect, (arm, mode) = self.effect, self.effect.other
        if arm == effect.arm:
            return f"{arm}: {MODE_LABELS[effect.mode]} − {MODE_LABELS[mode]}"
        if mode == effect.mode:
            return f"{effect.arm} − {arm}"
        return f"{effect.arm}, {MODE_LABELS[effect.mode]} − {arm}, {MODE_LABELS[mode]}"

    def columns(self) -> dict[str, str]:
        """Header -> cell, for a reader; `record` has the numbers."""
        effect, published = self.effect, ""
        expected = {"up": "larger", "down": "smaller", "none": f"same within {effect.tolerance:g}"}
        if self.published is not None:
            a, b = self.published
            published = f"{fixed(a, 2)} against {fixed(b, 2)} ({fixed(a - b, 2, sign=True)})"
        return {
            "effect": self.name,
            "verdict": self.verdict,
            "of": self.subtraction,
            "figure": LABELS[effect.metric],
            "difference": written(effect.metric, self.difference, sign=True),
            "expected": expected[effect.expected],
            "published": published,
            "source": effect.source,
        }

    def record(self) -> dict[str, Any]:
        """As a row of effects.csv: plain numbers, empty where there is none."""
        effect, (arm, mode) = self.effect, self.effect.other
        numbers = {
            f"{name}_{column}": round(value, 6) if math.isfinite(value := getattr(part, of, math.nan)) else None
            for name, part in (("difference", self.difference), ("arm", self.arm), ("against", self.against))
            for column, of in (("mean", "mean"), ("half_width", "half"))
        }
        return {
            "effect": effect.name, "metric": effect.metric, "arm": effect.arm, "mode": effect.mode, "against": arm,
            "against_mode": mode, "expected": effect.expected, "tolerance": effect.tolerance,
            "seeds": self.difference.count if self.difference else 0, **numbers, "verdict": self.verdict,
            "source": effect.source,
        }  # fmt: skip


def check(results: Sequence[Result], effects: Sequence[Effect], published: Published) -> list[Outcome]:
    """Every expected effect against what the finished runs gave, by differences of the same seeds."""
    results, outcomes = [r for r in results if not r.progress], []
    for effect in effects:
        cells = (effect.arm, effect.mode), effect.other
        by_seed = (list(figures(results, arm, effect.metric, mode).values()) for arm, mode in cells)
        one, other = (Interval.of(values) if values else None for values in by_seed)
        between = difference(results, effect.metric, *cells)
        name = verdict(between, effect.expected, effect.tolerance)
        if not effect.source:  # what nobody has published cannot be reproduced
            name = name.replace("reproduced", "as expected")
        if effect.metric == "onset_tokens" and not all(_reached(results, arm) for arm, _ in cells):
            name = "not reached by all"
        outcomes.append(Outcome(effect, one, other, between, _published(published, effect), name))
    seeds = [item.difference.count if item.difference else 0 for item in outcomes]
    if max(seeds, default=0) < 2:
        return outcomes
    # Among others, the side that one seed lies on is no verdict.
    pairs = zip(outcomes, seeds, strict=True)
    return [dataclasses.replace(item, verdict="one run") if count == 1 else item for item, count in pairs]


def _reached(results: Sequence[Result], arm: str) -> bool:
    """Whether every run of an arm has an onset. One that has none is later than its end, or before its fork."""
    return all(r.final["onset_tokens"] is not None for r in results if r.arm == arm)


def difference(results: Sequence[Result], metric: str, one: tuple[str, str], other: tuple[str, str]) -> Interval | None:
    """Of a figure of two (arm, mode), paired by seed; None where they cannot be compared.

    Arms must have stores of the same texts; their rows may differ, and some studies ask just that. Losses must be means
    of the same targets: another tokenizer has others, a prefix LM counts fewer, a shorter context crops them; all else
    is measured over the same T queries, and a loss gap against the same mode.
    """
    of_both = [(r, mode) for arm, mode in (one, other) for r in results if r.arm == arm]
    targets = {r.final["modes"][mode]["tokens"] for r, mode in of_both if mode in r.final["modes"]}
    of_targets = metric in ("loss", "bits_per_byte", "loss_gap")
    if of_targets and len(targets) > 1:
        return None
    if len({r.documents for r, _ in of_both}) > 1 and (of_targets or len({r.texts for r, _ in of_both}) > 1):
        return None
    if not of_targets and len({r.final["sink_tokens"] for r, _ in of_both}) > 1:
        return None
    if metric == "loss_gap" and len({reference_mode(r.final["modes"]) for r, _ in of_both}) > 1:
        return None
    if metric == "onset_tokens" and not all(_reached(results, arm) for arm, _ in (one, other)):
        return None
    return paired(*(figures(results, arm, metric, mode) for arm, mode in (one, other)))


def counts(effects: Iterable[Outcome]) -> Counter[str]:
    """How many effects came to which verdict; "one run: as expected" is no verdict."""
    return Counter(item.verdict for item in effects)


def explanation(verdicts: Counter[str], most_seeds: int | None = None) -> str:
    """What these verdicts mean, for a reader; `most_seeds`: the study's."""
    single = [name for name in verdicts if name.startswith("one run: ")]
    alone = "One run an arm: the side that each difference lies on, which is no verdict."
    none = (*single, "one run", "not measured", "not reached by all")
    made = sum(count for name, count in verdicts.items() if name not in none)
    parts = []
    if made:
        parts.append(
            "A verdict is on the mean difference of arms whose stores hold the same texts, paired by seed. Reproduced: "
            "its 95 % interval lies on the expected side of 0 (for the same: inside the tolerance). Not reproduced: it "
            "lies on another side. Within noise: it reaches both. As expected: reproduced, of what has no source."
        )
    parts += [alone] if single else []
    if verdicts["one run"]:
        parts.append("One run: the arms have one seed in common, which has no interval.")
    if verdicts["not reached by all"]:
        parts.append("Not reached by all: a run has no onset of its own, but one after its end, or before its fork.")
    if made:
        parts.append(
            f"Comparisons made: {made}; where nothing differs, one in twenty leaves 0 out by chance. Effects that "
            "share an arm are not independent of each other."
        )
    if made and most_seeds:
        rule = "Seeds were added one at a time until every interval was as narrow as its half_width, at most"
        parts.append(f"{rule} {most_seeds}.")
    return " ".join(parts)


def listed(verdicts: dict[str, int]) -> str:
    """`30 reproduced, 2 within noise`."""
    alone = "one run: "
    return ", ".join(
        f"{count} {verdict.removeprefix(alone)}{' (one run)' if verdict.startswith(alone) else ''}"
        for verdict, count in verdicts.items()
    )


def _published(published: Published, effect: Effect) -> tuple[float, float] | None:
    index = 1 if effect.metric == "loss" else 0 if effect.metric.startswith("sink_rate_0") else None
    arm, mode = effect.other
    pair = published.get(effect.arm, {}).get(effect.mode), published.get(arm, {}).get(mode)
    if index is None or not all(pair):
        return None
    a, b = (values[index] for values in pair if values)
    return None if a is None or b is None else (a, b)
