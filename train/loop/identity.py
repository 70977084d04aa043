"""What makes a run this run and no other: compared before anything goes on from a checkpoint."""

import os
import secrets
from pathlib import Path
from typing import Any

from sinkbed.data.files import differences, differing, write_json
from sinkbed.data.store.manifest import Manifest
from sinkbed.train.loop.optim import OptimizerConfig, learning_rate_factor
from sinkbed.train.run import directory

# Parts of the identity by the names that a user gives them.
_CONFIG_KEYS = {
    "decoder": "model.decoder",
    "optimizer": "model.optimizer",
    "max_grad_norm": "model.max_grad_norm",
    "strategy": "data.strategy",
    "context_length": "data.context_length",
    "batch_size": "data.batch_size",
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


def _why_no_longer(config: OptimizerConfig, before: int, ours: dict[str, Any]) -> str:
    """What keeps a run of `before` steps from having been one of another length, for a message."""
    if config.schedule != "constant" or before > ours["max_steps"]:
        return "; a run can be made longer where optimizer.schedule is constant, before its cooldown"
    after = ours["max_steps"]
    (warmup, cooldown), (longer, _) = config.phases(before), config.phases(after)
    if learning_rate_factor(config, 0, before) != learning_rate_factor(config, 0, after):
        return f"; its warm-up, optimizer.warmup_fraction, was {warmup} steps and would have been {longer}"
    return f"; its cooldown began with step {before - cooldown + 1}: go on from a checkpoint before it"


def other_sums(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    """What a checkpoint's run and this one do not share that only the last bits depend on; empty where nothing."""
    names = {"processes": "processes", "micro_batches": "micro-batches a step"}
    before, after = ({names[k]: each[k] for k in names} | each.get("arithmetic", {}) for each in (theirs, ours))
    return ", ".join(f"{key} {before[key]} -> {after[key]}" for key in before if before[key] != after.get(key))


def check_manifest(run_dir: Path, manifest: Manifest) -> None:
    """Refuse to go on with another token store than the one whose manifest the run directory has a copy of.

    Raises ValueError with both values of what differs.
    """
    if not (run_dir / directory.MANIFEST).is_file():
        return
    own = Manifest.read(run_dir)
    if own.digest != manifest.digest:
        names = [name for name in own.to_dict() if name not in ("recipe", "fingerprint", "left_out")]
        theirs, ours = ({name: m.to_dict()[name] for name in names} for m in (own, manifest))
        raise ValueError(
            f"resuming: expected the token store whose manifest the run has a copy of, {run_dir / directory.MANIFEST}, "
            f"got another one at data.store: {differing(ours, theirs)}; give the run's own store, or make a new run"
        )


def check_identity(checkpoint: dict[str, Any], ours: dict[str, Any], fork: bool = False) -> None:
    """Refuse a checkpoint of another shape, data or strategy; of another shape or vocabulary in a fork.

    Raises ValueError with both values of each setting.
    """
    theirs = checkpoint.get("sinkbed")
    if not isinstance(theirs, dict):
        raise ValueError("the checkpoint: expected one written by sinkbed fit, got no `sinkbed` entry")
    if not fork and _may_be_longer(theirs, ours, checkpoint["global_step"]):
        ours = {**ours, "max_steps": theirs["max_steps"]}
    pairs = [
        f"{name}: the checkpoint has {saved_value!r}, this configuration {own_value!r}"
        for key, value in ours.items()
        if (key in _FORK if fork else key not in _MAY_CHANGE)
        for name, saved_value, own_value in differences(theirs.get(key), value, _CONFIG_KEYS.get(key, key))
    ]
    if pairs and fork:
        raise ValueError(
            f"--fork: expected the checkpoint's own model and vocabulary, got {'; '.join(pairs)}; train it from the "
            "beginning, without --fork"
        )
    if pairs:
        only_length = len(pairs) == 1 and theirs.get("max_steps") != ours["max_steps"]
        why = _why_no_longer(OptimizerConfig(**ours["optimizer"]), theirs["max_steps"], ours) if only_length else ""
        same_weights = all(theirs.get(key) == ours[key] for key in _FORK)
        new = "and --fork CHECKPOINT instead of" if same_weights else "without"
        raise ValueError(
            f"resuming: expected the run's own configuration, got {'; '.join(pairs)}{why}. Start from the "
            f"run's config.yaml, or make a new run of it: another run_dir, {new} --ckpt_path"
        )


def identify(
    folder: Path,
    saved: dict[str, Any],
    parent: dict[str, Any] | None,
    made: dict[str, Any],
    *,
    anew: bool,
    session: dict[str, Any],
) -> tuple[dict[str, Any], list[str]]:
    """Write run.json: the W&B id, made once, the run and step that this run is a fork of, and what made it.

    Args:
        saved: run.json as the checkpoint saved it that the run resumes from, empty without one. What it says of the
            id counts, as it is under a checksum.
        parent: of a fork.
        made: provenance of this process; put beside those that the checkpoint names, where it differs.
        anew: whether the run starts with other settings than before, and so with another id.
        session: command and start of this process.

    Returns its content, and what there is to tell the user.
    """
    path, messages = folder / directory.RUN, []
    known: dict[str, Any] = {}
    try:
        known = directory.read_json(path) if path.exists() else saved
        if not isinstance(known, dict) or (path.exists() and not isinstance(known.get("wandb_id"), str)):
            raise ValueError(f"{path}: expected a wandb_id, got none")
    except ValueError as error:
        known = saved
        messages.append(f"{error}; taken from the checkpoint, or made anew")
    ours, original = known.get("wandb_id"), saved.get("wandb_id")
    copied = known.get("copy_of") or {}  # which checkpoints that were copied too still name
    if original is not None and ours != original and copied.get("wandb_id") != original:
        messages.append(f"{path}: expected the W&B id {original}, got {ours}; taken from the checkpoint")
        known = {**known, "wandb_id": original}
    source = _original(folder, known)
    if source is not None:
        known = {"copy_of": {"folder": str(source), "wandb_id": known["wandb_id"]}, "wandb_id": secrets.token_hex(4)}
        messages.append(
            f"{folder} is a copy of the run {source}: it goes on from its own checkpoints, as the W&B run "
            f"{known['wandb_id']}"
        )
    if anew or "wandb_id" not in known:
        known = {"wandb_id": secrets.token_hex(4)}
    known = {k: v for k, v in known.items() if k != "finished"} | ({} if parent is None else {"parent": parent})
    known |= {"format": directory.FORMAT, "folder": str(folder.resolve()), "place": _place(folder)}
    earlier = saved.get("made_by", [])  # whose steps are kept; not those that a restart makes again
    known["sessions"] = [*known.get("sessions", ()), session]
    known["made_by"] = earlier if made in earlier else [*earlier, made]
    write_json(path, known)
    return known, messages


def _place(folder: Path) -> list[Any]:
    """Machine, file system and inode, which a folder keeps when it is moved within the file system, and a copy of it
    does not have; empty where the file system has no number."""
    system = os.statvfs(folder).f_fsid
    return [os.uname().nodename, system, folder.stat().st_ino] if system else []


def _original(folder: Path, known: dict[str, Any]) -> Path | None:
    """The run that a folder is a copy of: run.json says where it was written. On the same file system a folder that
    was moved has the same place; from another it is a copy where the run of its W&B id still is where it was."""
    written, there, here = Path(known.get("folder") or folder), known.get("place") or [], _place(folder)
    try:
        if there == here != [] or (written.exists() and written.samefile(folder)):
            return None
        if there and there[:2] == here[:2]:
            return written
        return written if directory.read_json(written / directory.RUN)["wandb_id"] == known["wandb_id"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
