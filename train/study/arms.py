"""Arms: one arm of a study under one seed, what its folder says of it, and how it is started, resumed and judged.

An arm is `sinkbed fit` on one config file, `arm.yaml` in its run directory; whoever runs it (this machine's
processes, a Ray cluster, a W&B agent) calls `begin`, runs the arguments it gives, and calls `conclude`.
"""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sinkbed.data.files import differences, sha256_file, write_atomic, write_json
from sinkbed.train.config.keys import fit_keys, wrong_keys
from sinkbed.train.config.yaml_files import read_mapping
from sinkbed.train.run import directory
from sinkbed.train.run.wandb_files import link_for_leet
from sinkbed.train.run.world import leave
from sinkbed.train.study.file import StudyConfig

RECORD, SETTINGS, LOG = "arm.json", "arm.yaml", "fit.log"
SECONDS_FOR_THE_DEAD = 15.0
"""Longest wait for a process of a study that was killed to be gone from the run directory."""


@dataclass(frozen=True, kw_only=True)
class ArmRun:
    """One arm under one seed."""

    arm: str
    seed: int
    folder: Path
    names: tuple[str, ...]
    """What its settings are from, for messages."""
    config: dict[str, Any]
    """The settings one over the other: a run config."""
    settings: dict[str, Any]
    """The config, the seed, the token store's hash: with `deciding`, all that the result depends on."""

    def record(self) -> dict[str, Any]:
        """What the folder says of itself; empty before the arm is started."""
        path = self.folder / RECORD
        return directory.read_json(path) if path.exists() else {}

    def status(self) -> str:
        """`finished`, `failed`, `interrupted` (has a checkpoint), `new`, or `other` (of another configuration)."""
        record = self.record()
        if record and deciding(record["settings"]) != deciding(self.settings):
            return "other"
        if record and directory.is_finished(self.folder):
            return "finished"
        if "failed" in record:
            return "failed"
        return "interrupted" if record and self.resumable() else "new"

    def resumable(self) -> bool:
        """Whether a checkpoint is there to go on from."""
        return directory.newest_checkpoint(self.folder) is not None

    def reason(self) -> str:
        """Why the arm failed, or what makes its folder one of another configuration."""
        record = self.record()
        if self.status() != "other":
            return str(record.get("failed", ""))
        changed = list(differences(deciding(record["settings"]), deciding(self.settings)))
        shown = "; ".join(f"{key} was {was!r}, is {now!r}" for key, was, now in changed[:3])
        return shown + (f"; and {len(changed) - 3} more" if len(changed) > 3 else "")

    def setting(self, key: str, default: Any = None) -> Any:
        """A setting by its dotted key; `default` where the arm leaves it to the run's own default."""
        value: Any = self.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return default if value is None else value

    @property
    def can_be_forked(self) -> bool:
        """Whether it is one process on CPUs.

        Lightning's launcher of several repeats the command line, and CUDA does not survive a fork.
        """
        alone = self.setting("trainer.devices", 1) == 1 and self.setting("trainer.num_nodes", 1) == 1
        return alone and self.setting("trainer.accelerator") == "cpu"


def deciding(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings without those that no bit of a result depends on: where it logs, what it keeps, its workers."""
    kept = {k: v for k, v in settings.items() if k not in ("wandb", "checkpoint_every", "checkpoint_points")}
    if isinstance(kept.get("data"), dict):
        kept["data"] = {k: v for k, v in kept["data"].items() if k != "workers"}
    return kept


def plan(study: StudyConfig) -> list[ArmRun]:
    """Every arm under every seed, seeds outermost so that the first table is there early."""
    read: dict[Path, dict[str, Any]] = {}
    runs = []
    for seed in study.seeds:
        for arm, overlays in study.arms.items():
            config: dict[str, Any] = {}
            for overlay in (*study.base, *overlays):
                if isinstance(overlay, Path) and overlay not in read:
                    read[overlay] = read_overlay(overlay)
                config = over(config, overlay if isinstance(overlay, dict) else read[overlay])
            if not study.gpus:  # not by the machine's cores: the threads decide the bits of a result
                config.setdefault("threads", study.cpus)
            if not isinstance(config.get("data", {}), dict):
                raise ValueError(f"arm {arm}: data: expected keys, got {config['data']!r}")
            data = config.get("data") or {}
            if not isinstance(data.get("store") or "", str):
                raise ValueError(f"arm {arm}: data.store: expected a folder, got {data['store']!r}")
            if data.get("store"):
                config["data"] = data = {**data, "store": os.path.expanduser(data["store"])}
            manifest = Path(data.get("store") or "") / directory.MANIFEST  # there may be none yet
            store = sha256_file(manifest) if data.get("store") and manifest.is_file() else ""
            settings = json.loads(json.dumps({**config, "seed": seed, "sha256 of the token store": store}, default=str))
            runs.append(
                ArmRun(
                    arm=arm,
                    seed=seed,
                    folder=study.out / "runs" / f"{arm}-seed{seed}",
                    names=tuple(str(o if isinstance(o, Path) else study.source) for o in (*study.base, *overlays)),
                    config=config,
                    settings=settings,
                )
            )
    return runs


def over(below: dict[str, Any], above: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A config with an overlay on it; the value of a key, such as `{name: {option: …}}`, is replaced whole."""
    merged = dict(below)
    for key, value in above.items():
        known, path = merged.get(key), f"{prefix}{key}"
        groups = isinstance(known, dict) and isinstance(value, dict) and path not in fit_keys()
        merged[key] = over(known, value, f"{path}.") if groups else value  # type: ignore[arg-type]
    return merged


def read_overlay(path: Path) -> dict[str, Any]:
    """A run config or overlay. Raises ValueError that names a file that is no mapping of keys."""
    content = read_mapping(path)
    for complaint in wrong_keys(path, fit_keys()):
        raise ValueError(complaint)
    return content


def check_configs(runs: Sequence[ArmRun]) -> str:
    """Have `sinkbed fit` check the settings of every arm; what is wrong with the first wrong one, else nothing."""
    from sinkbed.train.loop.trainer import CheckingCLI, SettingsAreGood
    from sinkbed.train.loop.trainer import run as fit

    with tempfile.TemporaryDirectory() as folder:
        for run in {r.arm: r for r in runs}.values():
            config = Path(folder) / SETTINGS
            config.write_text(directory.yaml_text(run.config))
            printed, why = io.StringIO(), ""
            try:
                with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(printed):
                    fit("fit", ["--config", str(config), *_options(run, "unused")], CheckingCLI)
            except SettingsAreGood:
                continue
            except SystemExit:
                why = re.sub(r"^sinkbed[ \w]*: ", "", printed.getvalue().splitlines()[0])
                why = re.sub(f"^{re.escape(str(config))}(, line \\d+)?: ", "", why)
            except ValueError as error:
                why = str(error)
            return f"arm {run.arm}: {why} (in {', '.join(dict.fromkeys(run.names))})"
    return ""


def hold(folder: Path, seconds: float) -> directory.Lock:
    """Lock a run directory; a process that still writes to it has so many seconds to end, then ValueError is raised."""
    end = time.monotonic() + seconds
    while True:
        try:
            return directory.lock(folder)
        except ValueError:
            if time.monotonic() > end:
                raise
            time.sleep(min(1.0, seconds / 10))


def begin(run: ArmRun, group: str, seconds: float = SECONDS_FOR_THE_DEAD) -> list[str] | None:
    """Make the folder ready, none writing to it, and give the arguments of `sinkbed fit` that start or resume the arm.

    None where the process that was waited for has finished it. Raises ValueError, the folder as it was, where another
    process still writes to it after so many seconds.
    """
    lock = hold(run.folder, seconds)
    try:
        return None if run.status() == "finished" else make_ready(run, group)
    finally:
        lock.close()


def make_ready(run: ArmRun, group: str) -> list[str]:
    """`begin` for who holds the folder: closing another handle of its lock would give it back."""
    resume = run.status() in ("interrupted", "failed") and run.resumable()
    if not resume:
        clear(run.folder)
    run.folder.mkdir(parents=True, exist_ok=True)
    _write_record(run, {})
    write_atomic(run.folder / SETTINGS, directory.yaml_text(run.config))
    if "WANDB_SWEEP_ID" in os.environ and "WANDB_RUN_ID" in os.environ and not resume:
        # An agent has made the W&B run; a run of another id would not be the sweep's.
        write_json(run.folder / directory.RUN, {"wandb_id": os.environ["WANDB_RUN_ID"]})
    arguments = ["fit", "--config", str(run.folder / SETTINGS), *_options(run, group)]
    return arguments + (["--ckpt_path", "last"] if resume else [])


def _options(run: ArmRun, group: str) -> list[str]:
    """What an arm's run is told beside its config."""
    return [
        *("--run_dir", str(run.folder), "--seed_everything", str(run.seed), "--data.seed", str(run.seed)),
        # As JSON: a name such as `on` is no truth value, nor `1e-2` a number.
        *("--wandb.group", group, "--wandb.name", run.folder.name, "--wandb.tags", json.dumps([run.arm])),
        *("--trainer.enable_progress_bar", "false"),
    ]


def conclude(run: ArmRun, status: int) -> str:
    """Record how the arm's process ended; why it failed, or nothing where it finished."""
    link_for_leet(run.folder, run.folder.parents[1] / "leet")
    if status == 0:
        return ""
    failed = _last_words(run.folder / LOG, status)
    _write_record(run, {"failed": failed})
    return failed


def _write_record(run: ArmRun, more: dict[str, Any]) -> None:
    write_json(run.folder / RECORD, {"arm": run.arm, "seed": run.seed, "settings": run.settings, **more})


def clear(folder: Path) -> None:
    """Empty a run directory, of all but its lock: who holds that would go on holding a file that is gone."""
    for path in folder.iterdir() if folder.exists() else ():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != directory.LOCK:
            path.unlink()


def _last_words(log: Path, status: int) -> str:
    text = log.read_text(errors="replace") if log.exists() else ""
    lines = [line for line in text.splitlines() if line.strip()]
    ended = f"exit status {status}"
    if status < 0:
        ended = f"ended by {signal.Signals(-status).name}"
        ended += ", as where memory is short: use fewer --workers" if status == -signal.SIGKILL else ""
    return f"{ended}: {lines[-1] if lines else 'no output'} (all of it in {log})"


def environment() -> dict[str, str]:
    """The environment of an arm's process: this one's, with the working directory not importable,
    tokenizers without threads, and no place among the processes of a launcher that started the study."""
    variables = {**os.environ, "PYTHONSAFEPATH": "1", "TOKENIZERS_PARALLELISM": "false"}
    leave(variables)
    return variables
