"""Which runs a report is of, and what became of them; draws nothing."""

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sinkbed.data.files import differing
from sinkbed.data.store.manifest import Manifest
from sinkbed.train.config.yaml_files import read_mapping
from sinkbed.train.report.result import Result, load_result
from sinkbed.train.run import directory
from sinkbed.train.study.arms import ArmRun, plan
from sinkbed.train.study.file import StudyConfig


def of_all_seeds(study: StudyConfig) -> list[ArmRun]:
    """Every arm under the study's seeds and under those that have a finished run of it in the study's folder."""
    more = {seed for _, _, seed in load_folder(study.out)} - set(study.seeds)
    runs = plan(dataclasses.replace(study, seeds=[*study.seeds, *sorted(more)]))
    done = {r.seed for r in runs if r.status() == "finished"}
    return [r for r in runs if r.seed in done or r.seed in study.seeds]


def load_folder(folder: Path) -> list[tuple[Path, str, int]]:
    """(run directory, arm, seed) of the runs of a folder, finished or not: a run, a study, or a folder of runs."""
    below = (folder, *sorted(folder.glob("*/")), *sorted(folder.glob("runs/*/")))
    runs = []
    for path in below:
        if (path / directory.METRICS).is_file() and (path / directory.CONFIG).is_file():
            arm, seed = path.name, 0
            with contextlib.suppress(ValueError, LookupError, TypeError):  # what is damaged is said when it is read
                config = read_mapping(path / directory.CONFIG)
                drawn = isinstance(config.get("seed_everything", True), bool)
                seed = config["data"]["seed"] if drawn else config["seed_everything"]
                record = directory.read_json(path / "arm.json") if (path / "arm.json").is_file() else {}
                arm, seed = record.get("arm", arm), record.get("seed", seed)
            runs.append((path, arm, seed))
    return runs


def check_alike(runs: Sequence[ArmRun]) -> None:
    """Raise ValueError where runs of one arm differ in more than their seed, or two of them in nothing."""
    first: dict[str, tuple[Path, dict[str, Any]]] = {}
    seeds: dict[tuple[str, int], Path] = {}
    for run in runs:
        other = seeds.setdefault((run.arm, run.seed), run.folder)
        if other != run.folder:
            raise ValueError(
                f"report: expected one run of each arm and seed, got arm {run.arm}, seed {run.seed} in both {other} "
                f"and {run.folder}; report the studies one by one"
            )
        try:
            settings = _settings(run.folder)
        except (OSError, ValueError, LookupError, TypeError):  # damage is said when it is read
            continue
        path, others = first.setdefault(run.arm, (run.folder, settings))
        if changed := differing(settings, others):
            raise ValueError(
                f"report: expected runs of arm {run.arm} to differ in their seed alone, got {changed} ({run.folder} "
                f"against {path}); report them one by one, or under folders of other names"
            )


def _settings(folder: Path) -> dict[str, Any]:
    """Of a run, those that make its figures others than those of another seed, with the digest of its token store."""
    config, manifest = read_mapping(folder / directory.CONFIG), folder / directory.MANIFEST
    data = {key: value for key, value in config["data"].items() if key not in ("seed", "store", *_NO_FIGURE)}
    model = {key: value for key, value in config["model"].items() if key not in _NO_FIGURE}
    measure = {key: value for key, value in config["measure"].items() if key not in _NO_FIGURE}
    trainer = {key: config["trainer"].get(key) for key in ("max_steps", "precision")}
    return {
        "model": model, "data": data, "measure": measure, "trainer": trainer, "fork": bool(config.get("fork")),
        "token store": Manifest.read(folder).digest if manifest.is_file() else "",
    }  # fmt: skip


_NO_FIGURE = ("workers", "micro_batch_size", "compile", "activation_checkpointing", "implementation", "batch_tokens")
"""Settings that a figure depends on in its last digits at most."""


def split_finished(runs: Sequence[ArmRun]) -> tuple[list[ArmRun], list[Result], list[str]]:
    """The runs that have finished; results of them, and of the others that were measured; why the rest have none."""
    finished, results, missing = [], [], []
    for run in runs:
        status, why = "not measured yet", ""
        try:
            status = run.status() if run.settings else status
            why = run.reason() if status in ("failed", "other") else ""
            if not why:
                results.append(load_result(run.folder, run.arm, run.seed))
                finished += [run] if not results[-1].progress else []
                continue
        except (OSError, ValueError) as error:
            if status == "finished" or not isinstance(error, FileNotFoundError):  # else there is nothing to read yet
                status, why = "damaged", str(error)
        status = {"other": "of other settings", "new": "not run"}.get(status, status)
        missing.append(f"{run.folder.name} ({status}{f': {why}' if why else ''})")
    return finished, results, missing
