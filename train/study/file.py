"""A study file: the question, its arms, at which sizes, and which effects are expected.

Arms are a list by name or a grid of axes; an overlay is a file or the settings themselves, so that most studies
are one file. A size (`demo`, `small`, `paper`) is a set of the file's keys that replace those above it.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from sinkbed.plain_text import did_you_mean
from sinkbed.ranges import check_choice, check_number
from sinkbed.train.config.yaml_files import read_mapping, read_yaml
from sinkbed.train.measure.modes import MODE_LABELS
from sinkbed.train.run import directory

Overlay = Path | dict[str, Any]
"""Keys of a run config: in a file, or as they are."""
Expected = Literal["up", "down", "none"]
Published = dict[str, dict[str, list[float | None]]]
"""Arm -> inference mode -> [sink metric in %, loss]; null where a paper gives one of them only."""
METRICS = (
    *("sink_rate_0.2", "sink_rate_0.3", "sink_rate_0.5", "sink_rate_0.8", "sink_rate_placed", "sink_mass"),
    *("sink_rate_share", "sink_share", "sink_mass_raw", "learned_mass", "sink_rate_deep"),
    *("loss", "bits_per_byte", "loss_gap", "sink_rate_area", "sink_rate_peak", "sink_rate_deep_peak"),
    *("sink_mass_excess", "onset_tokens", "perturbation", "jacobian", "effective_rank"),
)
_MOST_ARMS = 1_000
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True, kw_only=True)
class Effect:
    """One expected difference between two arms, or two inference modes of an arm. Raises ValueError."""

    name: str
    """What is claimed, in a few words."""
    metric: str
    """One of METRICS; `train.report.effects.figure` says what they are."""
    arm: str
    """The arm whose figure is expected to differ."""
    against: str | None = None
    """The arm it is compared with; None: the same arm, in another mode."""
    mode: str = "bos"
    """Inference mode of `arm`."""
    against_mode: str | None = None
    """Inference mode of `against`; None: the same mode."""
    expected: Expected
    """Whether the figure is larger than the other one, smaller, or the same within `tolerance`."""
    tolerance: float = 0.0
    """`none`: differences up to this, in the metric's unit, count as the same."""
    half_width: float | None = None
    """How narrow the 95 % interval of the difference should be, in the metric's unit; see `most_seeds`."""
    source: str = ""
    """Where the effect is published."""
    note: str = ""
    """What a reader has to know of it, such as that it was expected only after the runs; stands behind the name."""

    def __post_init__(self) -> None:
        for key in ("name", "source", "note"):
            if not isinstance(text := getattr(self, key), str):
                raise ValueError(f"effect {self.name!r}: {key}: expected text, got {text!r}; put it in quotes")
        check_choice(f"effect {self.name!r}: metric", self.metric, METRICS)
        check_choice(f"effect {self.name!r}: expected", self.expected, get_args(Expected))
        for key, mode in (("mode", self.mode), ("against_mode", self.against_mode)):
            if mode is not None:
                check_choice(f"effect {self.name!r}: {key}", mode, list(MODE_LABELS))
        check_number(f"effect {self.name!r}: tolerance", self.tolerance, least=0)
        if self.half_width is not None:
            check_number(f"effect {self.name!r}: half_width", self.half_width, above=0)
        if (self.expected == "none") != (self.tolerance > 0):
            raise ValueError(
                f"effect {self.name!r}: tolerance: expected more than 0 with expected: none, and 0 otherwise; got "
                f"{self.tolerance} with {self.expected}"
            )
        if self.against in (None, self.arm) and self.against_mode in (None, self.mode):
            raise ValueError(f"effect {self.name!r}: expected another arm or another mode to compare with, got none")

    @property
    def other(self) -> tuple[str, str]:
        """Arm and mode that are compared with."""
        return self.against or self.arm, self.against_mode or self.mode


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """A study at one size. Paths of configs are relative to the file; paths of folders to the working directory."""

    title: str
    """One line for the report."""
    question: str = ""
    """What the study asks, and where the question comes from."""
    out: Path
    """Folder of the study: runs/ and report/ go inside. Default: runs/NAME, or runs/NAME-SIZE."""
    base: list[Overlay]
    """Run configs that every arm starts from, later ones overriding earlier ones."""
    arms: dict[str, list[Overlay]]
    """Arm name -> overlays on the base; those of the file's `arms`, then those of its `grid`."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """Each arm runs once a seed (model, row order and random first tokens)."""
    most_seeds: int | None = None
    """Where set, one seed more is run at a time, up to so many, until the interval of every effect is as narrow as its
    `half_width`. The rule looks at widths alone, never at which side of 0 a difference lies."""
    workers: int | None = None
    """Arms that run at a time on this machine; None: as many as its cores, or GPUs, are for."""
    cpus: int = 1
    """Cores that an arm is for."""
    gpus: float = 0
    """GPUs that an arm is for: 0, a share such as 0.5 (two arms on a GPU), or a whole number."""
    published: Published = field(default_factory=dict)
    """Figures of the literature, printed beside ours."""
    published_source: str = ""
    """Where `published` is from, and what it was measured with."""
    effects: list[Effect] = field(default_factory=list)
    """Differences that the report checks."""
    prepare: dict[Path, Path] = field(default_factory=dict)
    """Token stores to prepare first where they are not there yet, each with its data config."""
    size: str = ""
    """Name of the size, where the file has several."""
    source: Path | None = None
    """The study file."""

    def __post_init__(self) -> None:
        for name in ("base", "arms", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"study.{name}: expected at least one, got none")
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"study.seeds: expected distinct seeds, got {self.seeds}")
        if self.most_seeds is not None:
            check_number("study.most_seeds", self.most_seeds, least=len(self.seeds), integer=True)
            if all(effect.half_width is None for effect in self.effects):
                raise ValueError("study.most_seeds: expected a half_width in one of the effects, got none")
        check_number("study.cpus", self.cpus, least=1, integer=True)
        if self.workers is not None:
            check_number("study.workers", self.workers, least=1, integer=True)
        check_number("study.gpus", self.gpus, least=0)
        if self.gpus > 1 and self.gpus != int(self.gpus):
            raise ValueError(f"study.gpus: expected 0, a share below 1 or a whole number; got {self.gpus}")
        for effect in self.effects:
            missing = sorted({effect.arm, effect.other[0]} - set(self.arms))
            if missing:
                raise ValueError(f"effect {effect.name!r}: expected one of {_some(self.arms)}; got {missing[0]!r}")

    @property
    def name(self) -> str:
        """What W&B groups the runs under."""
        return self.out.name


_FILE_KEYS = tuple(f.name for f in dataclasses.fields(StudyConfig) if f.name not in ("size", "source"))
_SIZE_KEYS = (*(name for name in _FILE_KEYS if name not in ("title", "question")), "grid")


def load_study(path: Path, size: str | None = None) -> StudyConfig:
    """Read a study file at a size (default: `demo`, or the file's first).

    Raises FileNotFoundError, or ValueError that names the key at fault.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: expected a study file, such as those in configs/study, got none there"
            + directory.did_you_mean(path)
        )
    raw = _mapping(path, "the file", read_yaml(path), (*_FILE_KEYS, "grid", "sizes"))
    sizes = _mapping(path, "sizes", raw.pop("sizes", None) or {}, None)
    if size is None and sizes:
        size = "demo" if "demo" in sizes else next(iter(sizes))
    if size is not None and size not in sizes:
        raise ValueError(f"{path}: --size {size}: expected one of {', '.join(sizes) or 'none'}; got {size}")
    if size is not None:
        raw |= _mapping(path, f"sizes.{size}", sizes[size] or {}, _SIZE_KEYS)
    missing = [name for name in ("title", "base") if name not in raw]
    if "arms" not in raw and "grid" not in raw:
        missing.append("arms")
    if missing:
        raise ValueError(f"{path}: expected the key {missing[0]!r}, got none")
    raw.setdefault("out", f"runs/{path.stem}" + (f"-{size}" if size else ""))
    if not isinstance(raw["out"], str):
        raise ValueError(f"{path}: out: expected a folder, got {raw['out']!r}")
    for key in ("title", "question", "published_source"):
        if not isinstance(raw.get(key, ""), str):
            raise ValueError(f"{path}: {key}: expected text, got {raw[key]!r}; put it in quotes")
    seeds = raw.get("seeds", [0])
    if not isinstance(seeds, list) or not all(type(seed) is int for seed in seeds):
        raise ValueError(f"{path}: seeds: expected a list of integers, got {seeds!r}")
    if not isinstance(raw.get("effects") or [], list):
        raise ValueError(f"{path}: effects: expected a list, got {raw['effects']!r}")
    arms = _arms(path, raw.get("arms") or {}) | _grid(path, raw.pop("grid", None) or {})
    _check_published(path, raw.get("published") or {}, arms)
    raw |= {
        "out": Path(raw["out"]).expanduser(),
        "base": _overlays(path, "base", raw["base"]),
        "arms": arms,
        "prepare": _prepare(path, raw.get("prepare")),
        "published": raw.get("published") or {},
        "effects": [_effect(path, value) for value in raw.get("effects") or []],
        "size": size or "",
        "source": path,
    }
    try:
        return StudyConfig(**raw)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def _mapping(path: Path, what: str, value: Any, known: tuple[str, ...] | None) -> dict[str, Any]:
    if not isinstance(value, dict):
        expected = f"keys {', '.join(known)}" if known else "a mapping"
        raise ValueError(f"{path}: {what}: expected {expected}; got {type(value).__name__}")
    unknown = sorted(set(map(str, value)) - set(known or map(str, value)))
    if unknown:
        meant = did_you_mean(unknown[0], known or ())
        raise ValueError(f"{path}: unknown key {unknown[0]!r}; expected some of {', '.join(known or ())}{meant}")
    return dict(value)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _resolve(path: Path, value: Any) -> Path:
    if not isinstance(value, str):
        raise ValueError(f"{path}: expected a path, got {value!r}")
    config = (path.parent / Path(value).expanduser()).resolve()
    if not config.is_file():
        raise FileNotFoundError(f"{path}: names {value}, but there is no file {config}")
    return config


def _prepare(path: Path, value: Any) -> dict[Path, Path]:
    """Token stores of a data config or of a list of them, and which makes each."""
    stores: dict[Path, Path] = {}
    for config in [] if value is None else [_resolve(path, each) for each in _listed(value)]:
        out = read_mapping(config).get("out")
        if not isinstance(out, str):
            raise ValueError(f"{config}: out: expected a folder, got {out!r}")
        if (store := Path(out).expanduser().resolve()) in stores:
            raise ValueError(f"{path}: prepare: expected a token store for each config, got {out} twice")
        stores[store] = config
    return stores


def _overlays(path: Path, what: str, value: Any) -> list[Overlay]:
    """Overlays of an arm, of the base or of a value on an axis: a list of paths and settings, or one by itself."""
    if what == "base" and not isinstance(value, list):
        raise ValueError(f"{path}: base: a list of configs expected, got {value!r}")
    items = _listed(value)
    for item in items:
        if not isinstance(item, str | dict):
            raise ValueError(f"{path}: {what}: expected overlays, each a path or settings; got {item!r}")
    return [item if isinstance(item, dict) else _resolve(path, item) for item in items]


def _arms(path: Path, value: Any) -> dict[str, list[Overlay]]:
    arms = _mapping(path, "arms", value, None)
    return {_name(path, name): _overlays(path, f"arm {name}", overlays) for name, overlays in arms.items()}


def _name(path: Path, name: Any) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"{path}: arm {name!r}: expected letters, digits, -, _ and . (it names a folder)")
    return name


def _grid(path: Path, value: Any) -> dict[str, list[Overlay]]:
    """The product of the axes, the last one fastest: `lr: {1e-3: …}` gives the arm lr-1e-3, `mask: {causal: …}` the arm
    causal."""
    axes: list[list[tuple[str, list[Overlay]]]] = []
    for axis, values in _mapping(path, "grid", value, None).items():
        choices = []
        for value, overlays in _mapping(path, f"grid.{axis}", values, None).items():
            named = f"{axis}-{value}" if str(value)[:1].isdigit() else str(value)
            choices.append((named, _overlays(path, f"grid.{axis}.{value}", overlays)))
        axes.append(choices)
    if (count := math.prod(map(len, axes))) > _MOST_ARMS:
        raise ValueError(f"{path}: grid: expected at most {_MOST_ARMS:,} arms, got {count:,}; take fewer values")
    arms: dict[str, list[Overlay]] = {}
    for chosen in itertools.product(*axes) if axes else ():
        name = _name(path, "-".join(named for named, _ in chosen))
        if name in arms:
            raise ValueError(f"{path}: grid: expected a name of its own for each arm, got {name!r} twice")
        arms[name] = [overlay for _, overlays in chosen for overlay in overlays]
    return arms


def _some(arms: Collection[str]) -> str:
    """The names of arms, for a message."""
    names = list(arms)
    return ", ".join([*names[:8], *([f"… ({len(names)} arms)"] if len(names) > 8 else [])])


def _check_published(path: Path, value: Any, arms: dict[str, Any]) -> None:
    for arm, modes in _mapping(path, "published", value, None).items():
        if arm not in arms:
            raise ValueError(f"{path}: published.{arm}: expected one of {_some(arms)}; got {arm!r}")
        known = isinstance(modes, dict) and set(modes) <= set(MODE_LABELS)
        if not known or not all(isinstance(p, list) and len(p) == 2 and all(map(_numeric, p)) for p in modes.values()):
            raise ValueError(
                f"{path}: published.{arm}: expected [sink metric, loss] for each mode "
                f"({', '.join(MODE_LABELS)}); got {modes!r}"
            )


def _numeric(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value))


def _effect(path: Path, value: Any) -> Effect:
    known = {f.name: f for f in dataclasses.fields(Effect)}
    raw = _mapping(path, "effects", value, tuple(known))
    missing = [name for name in ("name", "metric", "arm", "expected") if name not in raw]
    if missing:
        raise ValueError(f"{path}: effect {raw.get('name', raw)!r}: expected the key {missing[0]!r}, got none")
    try:
        return Effect(**raw)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
