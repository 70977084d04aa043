"""`sinkbed study`: a set of arms, each a run of its own process, then one report.

A study file names a base run, overlays for each arm, and seeds. An arm that finished under the same
configuration is not run again; one that was interrupted resumes; one that failed is reported and does
not stop the rest.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from data.manifest import differences
from train import rundir

ARM = "arm.json"


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """A study file. Paths of configs are relative to the file; paths of folders to the working directory."""

    title: str
    """One line for the report."""
    question: str = ""
    """What the study asks, and where the question comes from."""
    out: Path
    """Folder of the study: runs/ and report/ go inside."""
    base: list[Path]
    """Run configs that every arm starts from, later ones overriding earlier ones."""
    arms: dict[str, list[Path]]
    """Arm name -> overlays on the base."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """Each arm runs once a seed (model, row order and random first tokens)."""
    workers: int = 1
    """Arms that run at a time."""
    published: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    """Arm -> inference mode -> [sink metric in %, loss] of the literature, printed beside ours."""
    prepare: Path | None = None
    """Data config to prepare first, if its token store is not there yet."""

    def __post_init__(self) -> None:
        for name in ("base", "arms", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"study.{name}: expected at least one, found none")
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"study.seeds: expected distinct seeds, found {self.seeds}")
        if self.workers < 1:
            raise ValueError(f"study.workers: expected at least 1, found {self.workers}")


@dataclass(frozen=True, kw_only=True)
class ArmRun:
    """One arm under one seed."""

    arm: str
    seed: int
    folder: Path
    configs: tuple[Path, ...]
    settings: dict[str, Any]
    """Everything that decides the result: the configs one over the other, the seed, the token store's hash."""

    def record(self) -> dict[str, Any]:
        """What the folder says of itself; empty before the arm is started."""
        path = self.folder / ARM
        return rundir.read_json(path) if path.exists() else {}

    def status(self) -> str:
        """`finished`, `failed`, `interrupted` (has a checkpoint), `new`, or `other` (of another configuration)."""
        record = self.record()
        if record and record["settings"] != self.settings:
            return "other"
        if record and rundir.is_finished(self.folder):
            return "finished"
        if "failed" in record:
            return "failed"
        return "interrupted" if record and self.resumable() else "new"

    def resumable(self) -> bool:
        """Whether a checkpoint is there to go on from."""
        return rundir.newest_checkpoint(self.folder) is not None

    def reason(self) -> str:
        """Why the arm failed, or what makes its folder one of another configuration."""
        record = self.record()
        if self.status() != "other":
            return str(record.get("failed", ""))
        changed = list(differences(record["settings"], self.settings))
        shown = "; ".join(f"{key} was {was!r}, is {now!r}" for key, was, now in changed[:3])
        return shown + (f"; and {len(changed) - 3} more" if len(changed) > 3 else "")


def load_study(path: Path) -> StudyConfig:
    """Read a study file. Raises FileNotFoundError, or ValueError that names the key at fault."""
    if not path.is_file():
        raise FileNotFoundError(f"study: no file at {path}")
    try:
        raw = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: expected YAML, found {error}") from None
    known = {f.name: f for f in dataclasses.fields(StudyConfig)}
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: expected keys {', '.join(known)}; found {type(raw).__name__}")
    unknown = sorted(set(raw) - set(known))
    if unknown:
        raise ValueError(f"{path}: unknown key {unknown[0]!r}; expected some of {', '.join(known)}")
    missing = [n for n in ("title", "out", "base", "arms") if n not in raw]
    if missing:
        raise ValueError(f"{path}: expected the key {missing[0]!r}, found none")

    def resolve(value: Any) -> Path:
        if not isinstance(value, str):
            raise ValueError(f"{path}: expected a path, found {value!r}")
        found = (path.parent / value).resolve()
        if not found.is_file():
            raise FileNotFoundError(f"{path}: names {value}, but there is no file {found}")
        return found

    if not isinstance(raw["out"], str) or not isinstance(raw["base"], list):
        raise ValueError(
            f"{path}: out: expected a folder, and base: a list of configs; found {raw['out']!r}, {raw['base']!r}"
        )
    for key, kind, words in (("seeds", list, "a list of integers"), ("workers", int, "an integer")):
        value = raw.get(key, [0] if kind is list else 1)
        items = value if isinstance(value, list) else [value]
        if not isinstance(value, kind) or not all(isinstance(x, int) and not isinstance(x, bool) for x in items):
            raise ValueError(f"{path}: {key}: expected {words}, found {value!r}")
    arms = raw["arms"]
    if not isinstance(arms, dict) or not all(isinstance(v, list) for v in arms.values()):
        raise ValueError(f"{path}: arms: expected a mapping of arm name to list of overlays, found {arms!r}")
    for name in arms:
        if not isinstance(name, str) or not name.replace("-", "").replace("_", "").isalnum():
            raise ValueError(f"{path}: arm {name!r}: expected letters, digits, - and _ (it names a folder)")
    for arm, modes in (raw.get("published") or {}).items():
        pairs = modes.values() if isinstance(modes, dict) else [modes]
        if arm not in arms or not all(isinstance(p, list) and len(p) == 2 for p in pairs):
            raise ValueError(
                f"{path}: published.{arm}: expected an arm, and [sink metric, loss] for each mode; found {modes!r}"
            )
    raw |= {
        "out": Path(raw["out"]),
        "base": [resolve(p) for p in raw["base"]],
        "arms": {name: [resolve(p) for p in overlays] for name, overlays in arms.items()},
        "prepare": resolve(raw["prepare"]) if raw.get("prepare") else None,
    }
    try:
        return StudyConfig(**raw)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def plan(study: StudyConfig) -> list[ArmRun]:
    """Every arm under every seed, seeds outermost so that the first table is there early."""
    runs = []
    for seed in study.seeds:
        for arm, overlays in study.arms.items():
            configs = (*study.base, *overlays)
            merged: dict[str, Any] = {}
            for config in configs:
                merged = _over(merged, read_overlay(config))
            store = _store_hash((merged.get("data") or {}).get("store"))
            settings = json.loads(json.dumps({**merged, "seed": seed, "sha256 of the token store": store}, default=str))
            folder = study.out / "runs" / f"{arm}-seed{seed}"
            runs.append(ArmRun(arm=arm, seed=seed, folder=folder, configs=configs, settings=settings))
    return runs


def _over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """A config with an overlay on it."""
    merged = dict(below)
    for key, value in above.items():
        known = merged.get(key)
        merged[key] = _over(known, value) if isinstance(known, dict) and isinstance(value, dict) else value
    return merged


def check_configs(runs: Sequence[ArmRun]) -> None:
    """Have `sinkbed fit` read the configs of every arm. Raises ValueError that names the arm with a wrong one."""
    import contextlib
    import io

    from train.fit import run as fit

    for name, configs in {r.arm: r.configs for r in runs}.items():
        options = [part for config in configs for part in ("--config", str(config))]
        complaint = io.StringIO()
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(complaint):
                fit("fit", [*options, "--run_dir", "unused", "--print_config"])
        except SystemExit as stop:
            if stop.code:
                why = re.sub(r"^sinkbed[ \w]*: ", "", complaint.getvalue().splitlines()[0])
                raise ValueError(f"arm {name}: {why} (in {', '.join(map(str, configs))})") from None


def read_overlay(path: Path) -> dict[str, Any]:
    """A run config or overlay. Raises ValueError that names a file that is no mapping of keys."""
    try:
        found = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: expected YAML, found {error}") from None
    if not isinstance(found, dict) or not isinstance(found.get("data", {}), dict):
        raise ValueError(f"{path}: expected keys such as model, data, trainer; found {str(found)[:60]!r}")
    return found


def _store_hash(store: str | None) -> str:
    """sha256 of a token store's manifest; empty where there is none yet."""
    manifest = Path(store or "") / rundir.MANIFEST
    return hashlib.sha256(manifest.read_bytes()).hexdigest() if store and manifest.is_file() else ""


class Runner:
    """Runs arms, each `sinkbed fit` in a process of its own with its output in fit.log."""

    def __init__(self, study: StudyConfig, runs: Sequence[ArmRun]) -> None:
        self.study = study
        self.runs = runs
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.failed: dict[str, str] = {}
        self.stopping = False

    def run_arm(self, run: ArmRun) -> None:
        """Start or resume one arm and wait for it."""
        if self.stopping:
            return
        name = run.folder.name
        resume = run.status() in ("interrupted", "failed") and run.resumable()
        if not resume:
            _clear(run.folder)
        run.folder.mkdir(parents=True, exist_ok=True)
        record = {"arm": run.arm, "seed": run.seed, "settings": run.settings}
        rundir.write_json(run.folder / ARM, record)
        command = [sys.executable, "-m", "train", "fit"]
        for config in run.configs:
            command += ["--config", str(config)]
        command += ["--run_dir", str(run.folder), "--seed_everything", str(run.seed)]
        command += ["--data.seed", str(run.seed), "--wandb.group", self.study.out.name]
        command += ["--wandb.name", name, "--wandb.tags", f"[{run.arm}]"]
        command += ["--trainer.enable_progress_bar", "false"]
        if resume:
            command += ["--ckpt_path", "last"]
        with (run.folder / "fit.log").open("ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=_environment())
            self.processes[name] = process
            if self.stopping:  # told to stop between the check above and here
                process.terminate()
            status = process.wait()
        del self.processes[name]
        if status != 0 and not self.stopping:
            self.failed[name] = _last_words(run.folder / "fit.log", status)
            rundir.write_json(run.folder / ARM, {**record, "failed": self.failed[name]})

    def run(self, progress: bool) -> None:
        """Run what is not finished, `workers` at a time. Interrupting stops the arms; they resume next time."""
        todo = [r for r in self.runs if r.status() != "finished"]
        with ThreadPoolExecutor(self.study.workers) as pool:
            futures = [pool.submit(self.run_arm, run) for run in todo]
            try:
                self._watch(futures, len(self.runs) - len(todo), progress)
            except BaseException:
                self.stopping = True
                for process in list(self.processes.values()):
                    process.send_signal(signal.SIGTERM)
                raise
        for future in futures:
            future.result()

    def _watch(self, futures: list[Any], finished_before: int, progress: bool) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[now]}"),
            TimeElapsedColumn(),
        )
        with Progress(*columns, disable=not progress) as bar:
            task = bar.add_task("arms", total=len(self.runs), completed=finished_before, now="")
            last_line = ""
            while True:
                done, left = wait_for(futures, timeout=1.0)
                now = "  ".join(_progress_of(self.study.out / "runs" / n) for n in sorted(self.processes))
                bar.update(task, completed=finished_before + len(done), now=now)
                if progress and not bar.console.is_terminal:
                    line = f"{finished_before + len(done)} of {len(self.runs)} arms done"
                    if line != last_line:
                        print(line, flush=True)
                    last_line = line
                if not left:
                    return


def _environment() -> dict[str, str]:
    """The arm's environment: this checkout importable, tokenizers without threads of their own."""
    root = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH")) if p)
    return {**os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"}


def _clear(folder: Path) -> None:
    import shutil

    if folder.exists():
        shutil.rmtree(folder)


def _last_words(log: Path, status: int) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return f"exit status {status}: {lines[-1] if lines else 'no output'} (all of it in {log})"


def _progress_of(folder: Path) -> str:
    last: dict[str, Any] = {}
    try:
        for point in rundir.read_metrics(folder / rundir.METRICS):
            last |= point
    except (OSError, ValueError):
        pass
    loss = last.get("train/loss")
    return f"{folder.name}: step {last.get('step', 0)}" + (f" loss {loss:.2f}" if loss else "")


def run(command: str, argv: Sequence[str]) -> int:
    """Parse, run the arms, write the report. Exit status 1 when an arm failed."""
    import argparse

    parser = argparse.ArgumentParser(prog=f"sinkbed {command}", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("study", type=Path, help="study file, such as configs/study/demo.yaml")
    parser.add_argument("--workers", type=int, help="arms at a time (default: the file's)")
    parser.add_argument("--seeds", type=int, nargs="+", help="seeds (default: the file's)")
    parser.add_argument("--out", type=Path, help="folder of the study (default: the file's)")
    parser.add_argument("--plan", action="store_true", help="list the arms and their state, run nothing")
    parser.add_argument("--force", action="store_true", help="run anew what was made under another configuration")
    parser.add_argument("--quiet", action="store_true", help="no progress display")
    arguments = parser.parse_args(list(argv))

    study = load_study(arguments.study)
    changes = {k: getattr(arguments, k) for k in ("workers", "seeds", "out") if getattr(arguments, k) is not None}
    study = dataclasses.replace(study, **changes)
    if study.prepare is not None and not arguments.plan:
        from train.prepare import run as prepare

        options = [f"--{name}" for name in ("quiet", "force") if getattr(arguments, name)]
        prepare("prepare", ["--config", str(study.prepare), *options])
    runs = plan(study)
    check_configs([r for r in runs if r.status() != "finished"])
    if arguments.plan:
        for arm in runs:
            print(f"{arm.status():12} {arm.folder}" + (f"  ({arm.reason()})" if arm.reason() else ""))
        return 0
    other = [r for r in runs if r.status() == "other"]
    if other and not arguments.force:
        raise ValueError(
            f"{other[0].folder}: expected a run of this configuration, found one of another "
            f"({other[0].reason()}). Use --force to run such arms anew, or another --out to keep them"
        )
    if arguments.force:
        for arm in other:
            _clear(arm.folder)
    lock = rundir.lock(study.out)
    runner = Runner(study, runs)
    # As under a scheduler: a terminated study stops its arms, which resume next time.
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    began = time.perf_counter()
    runner.run(progress=not arguments.quiet)
    print(f"arms took {time.perf_counter() - began:.0f} s")
    lock.close()

    from train.report import write_report

    finished = [r for r in runs if r.status() == "finished"]
    if finished:
        write_report(study, finished, runner.failed)
    for name, why in runner.failed.items():
        print(f"arm {name} failed: {why}", file=sys.stderr)
    return 1 if runner.failed else 0
