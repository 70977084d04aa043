"""What makes a run this run and no other: compared before anything goes on from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sinkbed.data.files import differences, differing
from sinkbed.data.pack.strategy import Strategy
from sinkbed.data.store.manifest import Manifest
from sinkbed.train.loop.optim import OptimizerConfig, learning_rate_factor
from sinkbed.train.run.directory import MANIFEST

# Parts of the identity by the names that a user gives them.
_CONFIG_KEYS = {
    "decoder": "model.decoder",
    "optimizer": "model.optimizer",
    "clip_norm": "model.clip_norm",
    "strategy": "data.strategy",
    "context_length": "data.context_length",
    "global_batch": "data.global_batch",
    "seed": "data.seed",
    "unique_rows": "data.unique_rows",
    "max_steps": "trainer.max_steps",
    "precision": "trainer.precision",
    "documents": "sha256 of the token store's documents",
    "tokenizer": "sha256 of the token store's tokenizer",
    "vocab_size": "tokens in the token store's vocabulary",
    "bos_id": "bos_id in the token store's manifest",
    "eos_id": "eos_id in the token store's manifest",
    "manifest": "sha256 of what decides training in the token store's manifest",
}


# The same documents may lie elsewhere; the same rows may be split in another way, and summed in another order.
_MAY_CHANGE = ("store", "micro_batches", "processes", "arithmetic")


# What a fork may not change either: without it the weights have no meaning.
_FORK = ("format", "decoder", "vocab_size", "tokenizer", "bos_id", "eos_id")


# Not in checkpoints of 0.1.0 before this was kept; there the run's own copy of the manifest says it.
_LATER = ("bos_id", "eos_id", "manifest")


def _may_be_longer(theirs: dict[str, Any], ours: dict[str, Any], step: int) -> bool:
    """Whether every step so far would have been the same had the run been as long from the start as it is to be now:
    so it is at a constant learning rate, before its cooldown."""
    before, after = theirs.get("max_steps"), ours["max_steps"]
    if theirs.get("optimizer") != ours["optimizer"] or ours["optimizer"]["schedule"] != "constant":
        return False
    if not isinstance(before, int) or not step <= before < after:
        return False
    config = OptimizerConfig(**ours["optimizer"])
    return all(learning_rate_factor(config, s, before) == learning_rate_factor(config, s, after) for s in range(step))


def other_sums(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    """What a checkpoint's run and this one do not share that only the last bits depend on; empty where nothing."""
    names = {"processes": "processes", "micro_batches": "micro-batches a step"}
    before, after = ({names[k]: each[k] for k in names} | each.get("arithmetic", {}) for each in (theirs, ours))
    return ", ".join(f"{key} {before[key]} -> {after[key]}" for key in before if before[key] != after.get(key))


def check_manifest(run_dir: Path, manifest: Manifest) -> None:
    """Refuse to go on with another token store than the one whose manifest the run directory has a copy of.

    Raises ValueError with both values of what differs.
    """
    if not (run_dir / MANIFEST).is_file():
        return
    own = Manifest.read(run_dir)
    if own.digest != manifest.digest:
        names = [name for name in own.to_dict() if name not in ("recipe", "fingerprint", "left_out")]
        theirs, ours = ({name: m.to_dict()[name] for name in names} for m in (own, manifest))
        raise ValueError(
            f"resuming: expected the token store whose manifest the run has a copy of, {run_dir / MANIFEST}, found "
            f"another one at data.store: {differing(ours, theirs)}; give the run's own store, or make a new run"
        )


def check_identity(checkpoint: dict[str, Any], ours: dict[str, Any], fork: bool = False) -> None:
    """Refuse a checkpoint of another shape, data or strategy; of another shape or vocabulary in a fork.

    Raises ValueError with both values of each setting.
    """
    theirs = checkpoint.get("sinkbed")
    if not isinstance(theirs, dict):
        raise ValueError("the checkpoint: expected one written by sinkbed fit, found no `sinkbed` entry")
    theirs = {**theirs, "strategy": Strategy.completed(theirs.get("strategy") or {})}
    if not fork and _may_be_longer(theirs, ours, checkpoint["global_step"]):
        ours = {**ours, "max_steps": theirs["max_steps"]}
    pairs = [
        f"{name}: the checkpoint has {found!r}, this configuration {expected!r}"
        for key, value in ours.items()
        if (key in _FORK if fork else key not in _MAY_CHANGE) and (key in theirs or key not in _LATER)
        for name, found, expected in differences(theirs.get(key), value, _CONFIG_KEYS.get(key, key))
    ]
    if pairs and fork:
        raise ValueError(f"--fork: expected the checkpoint's own model and vocabulary, found {'; '.join(pairs)}")
    if pairs:
        only_length = len(pairs) == 1 and theirs.get("max_steps") != ours["max_steps"]
        why = "; a run can be made longer where optimizer.schedule is constant, before its cooldown" * only_length
        raise ValueError(
            f"resuming: expected the run's own configuration, found {'; '.join(pairs)}{why}. Start from the "
            "run's config.yaml, or make a new run of it: another run_dir, and --fork CHECKPOINT instead of --ckpt_path"
        )
