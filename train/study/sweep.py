"""W&B beside a study: a sweep file whose agent runs the same arms, and a run that holds the study's tables.

    sinkbed study configs/study/packing.yaml --sweep sweep.yaml
    wandb sweep sweep.yaml          # a server makes the sweep and says its id
    wandb agent ENTITY/sinkbed/ID   # on any number of machines: one arm after another

The arms that agents ran are those of the study: `sinkbed study FILE` then writes the report, `sinkbed report FILE` too.
"""

import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from sinkbed.data.files import write_atomic, write_json
from sinkbed.train.run import directory
from sinkbed.train.study.arms import ArmRun, plan
from sinkbed.train.study.file import StudyConfig

SUMMARY = "summary.json"


def sweep_of(study: StudyConfig) -> dict[str, Any]:
    """A W&B sweep over the study's arms and seeds, every pair once."""
    modes = plan(study)[0].setting("measure.modes", ["bos"])
    command = ["${env}", "sinkbed", "study", str(study.source)]
    command += ["--size", study.size] if study.size else []
    return {
        "name": study.name,
        "description": study.title,
        "project": "sinkbed",
        "method": "grid",
        "metric": {"name": f"final/val/loss/{modes[0]}", "goal": "minimize"},
        "parameters": {"arm": {"values": list(study.arms)}, "seed": {"values": list(study.seeds)}},
        "command": [*command, "--out", str(study.out), "${args}"],
    }


def write_sweep(study: StudyConfig, path: Path) -> int:
    """Write the sweep file."""
    text = "# Written by `sinkbed study --sweep`; run the agents where the study file's paths are right.\n"
    write_atomic(path, text + yaml.safe_dump(sweep_of(study), sort_keys=False))
    count = len(study.arms) * len(study.seeds)
    print(f"{path}: {count} runs; `wandb sweep {path}`, then `wandb agent` with the id it prints")
    return 0


def log_summary(study: StudyConfig, runs: Sequence[ArmRun], tables: dict[str, Sequence[dict[str, Any]]]) -> None:
    """Send tables, by name, to a W&B run of the study's group, the same run each time.

    A server that is gone costs a word.
    """
    settings = runs[0].setting("wandb", {})
    mode = settings.get("mode", "auto")
    if mode == "disabled":
        return
    import wandb

    from sinkbed.train.run.wandb import wandb_mode

    mode = wandb_mode(mode)
    known = directory.read_json(study.out / SUMMARY) if (study.out / SUMMARY).exists() else {}
    known = {"wandb_id": known.get("wandb_id") or secrets.token_hex(4)}
    write_json(study.out / SUMMARY, known)
    more: dict[str, Any] = {} if mode == "offline" else {"resume": "allow"}
    try:
        with wandb.init(
            project=settings.get("project", "sinkbed"),
            entity=settings.get("entity"),
            group=study.name,
            job_type="summary",
            name=f"{study.name} summary",
            id=known["wandb_id"],
            dir=str(study.out),
            mode=mode,
            settings=wandb.Settings(console="off", silent=mode == "offline", quiet=True, init_timeout=30),
            **more,
        ) as tracker:
            for name, content in tables.items():
                if content:
                    columns: list[Any] = list(content[0])
                    tracker.log({name: wandb.Table(columns=columns, data=[[r[c] for c in columns] for r in content])})
    except Exception as error:  # whatever W&B's client raises
        print(f"W&B has no summary of the study ({error}); the report has it all")
