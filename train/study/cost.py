"""What a study takes before anything starts: tokens, FLOPs, hours per kind of device, disk; and whether it fits here.

FLOPs of a training token: 6 for each parameter of a matrix product (2 forward, 4 backward; the input embedding is a
look-up), and 12·L·H·D for each key that a query sees on average, T/2 of them under a causal mask or the window's
(document masks see fewer, so this is an upper bound). Activation checkpointing adds a forward pass.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table

from sinkbed.data.pack.batches import Rows
from sinkbed.data.pack.strategy import Strategy
from sinkbed.data.prepare.config import VOCAB_SIZE
from sinkbed.data.prepare.prepare import available_cores
from sinkbed.data.store.token_store import TokenStore
from sinkbed.kernels.triton.tiles import HEAD_DIMS
from sinkbed.model import Decoder, DecoderConfig
from sinkbed.plain_text import console
from sinkbed.train.config.yaml_files import read_mapping
from sinkbed.train.loop.optim import OptimizerConfig
from sinkbed.train.loop.settings import training_bytes
from sinkbed.train.measure.config import MeasureConfig
from sinkbed.train.measure.heldout import Probe
from sinkbed.train.run import directory
from sinkbed.train.study.arms import ArmRun
from sinkbed.train.study.file import StudyConfig
from sinkbed.train.study.local import slots

MFU = 0.35
"""Assumed share of a GPU's peak that training reaches."""
PEAKS = {"A100": 312e12, "H100": 989e12}
"""Dense bf16 FLOP/s of the SXM cards, from their data sheets."""
CORE = 2.6e10
"""Assumed FLOP/s of one CPU core where no finished arm says better: small models on an AMD EPYC."""
PROCESS_BYTES = 700_000_000
"""A training process beside its model (peak of a demo arm)."""


@dataclass(frozen=True)
class Cost:
    """What one arm under one seed takes."""

    parameters: int
    tokens: int
    flops: float
    disk: int
    """Bytes of its checkpoints, one that is being written included."""
    memory: int
    """Bytes of weights, gradients and what the optimizer keeps."""


def training_flops(
    decoder: DecoderConfig, vocab_size: int, context_length: int, window: int | None, checkpointing: bool = False
) -> float:
    """FLOPs of one training token."""
    looked_up = 0 if decoder.tie_embeddings else vocab_size * decoder.d_model
    keys = min(context_length / 2, window or context_length)
    products = 6 * (Decoder.parameters_of(decoder, vocab_size) - looked_up)
    attention = 12 * decoder.n_layers * decoder.n_heads * decoder.dim * keys
    return (products + attention) * (4 / 3 if checkpointing else 1)


def vocabulary(study: StudyConfig, run: ArmRun) -> int:
    """Vocabulary of the arm's token store; of one that is not there yet, what it will be at most."""
    manifest = Path(run.setting("data.store", "")) / directory.MANIFEST
    if manifest.is_file():
        return int(directory.read_json(manifest)["vocab_size"])
    config = prepared_by(study, run)
    tokenizer = read_mapping(config).get("tokenizer") if config else None
    return int((tokenizer.get("vocab_size") if isinstance(tokenizer, dict) else None) or VOCAB_SIZE)


def prepared_by(study: StudyConfig, run: ArmRun) -> Path | None:
    """The data config of the study that makes the arm's token store."""
    return study.prepare.get(Path(run.setting("data.store", "")).resolve())


def cost(study: StudyConfig, run: ArmRun) -> Cost:
    """What an arm takes, whose settings `check_configs` found to be good."""
    decoder = DecoderConfig(**run.setting("model.decoder", {}))
    steps, context = run.setting("trainer.max_steps"), run.setting("data.context_length")
    tokens, vocab_size = steps * run.setting("data.batch_size") * context, vocabulary(study, run)
    window, checkpointing = run.setting("data.strategy.window"), run.setting("model.activation_checkpointing", False)
    each = training_flops(decoder, vocab_size, context, window, checkpointing)
    size = Decoder.parameters_of(decoder, vocab_size)
    # The newest, the best, and the one that is being written.
    kept = len(directory.kept_steps(run.setting("checkpoint_points", 12), steps)) + 3
    memory = training_bytes(OptimizerConfig(**run.setting("model.optimizer", {}))) * size
    return Cost(size, tokens, each * tokens, (memory - 4 * size) * kept, memory)  # a checkpoint has no gradients


def core_rate(study: StudyConfig, runs: Sequence[ArmRun]) -> tuple[float, str]:
    """FLOP/s of a core in training, and whether it was measured in the finished arms of this study or assumed."""
    seconds = flops = 0.0
    for run in runs:
        path = run.folder / directory.MEASUREMENT
        if run.setting("trainer.accelerator") == "cpu" and run.status() == "finished" and path.exists():
            threads = run.setting("threads", available_cores())
            seconds += threads * sum(directory.read_json(path)["seconds"].values())
            flops += cost(study, run).flops
    return (flops / seconds, "measured in the arms that are finished") if seconds else (CORE, "assumed")


def print_plan(study: StudyConfig, runs: Sequence[ArmRun]) -> None:
    """Print the arms, what they take and how long that is on one device of each kind."""
    rate, how = core_rate(study, runs)
    rates = {"CPU core": rate, **{name: MFU * peak for name, peak in PEAKS.items()}}
    size = f", size {study.size}" if study.size else ""
    table = Table(title=f"{study.title}{size}: {len(runs)} runs", title_justify="left")
    for name in ("arm", "state", "parameters", "context", "tokens", "FLOPs", *(f"{k}, h" for k in rates), "disk"):
        table.add_column(name, justify="left" if name in ("arm", "state") else "right")
    for arm in study.arms:
        of_arm = [r for r in runs if r.arm == arm]
        costs = [cost(study, r) for r in of_arm]
        states = [r.status() for r in of_arm]
        table.add_row(
            arm,
            ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(states)),
            f"{costs[0].parameters:,}",
            f"{of_arm[0].setting('data.context_length'):,}",
            *_sums(costs, rates),
        )
    table.add_section()
    table.add_row("all", "", "", "", *_sums([cost(study, r) for r in runs], rates))
    left = [cost(study, r) for r in runs if r.status() != "finished"]
    if len(left) < len(runs):
        table.add_row("not finished", "", "", "", *_sums(left, rates))
    console(170).print(table)
    print(
        f"Hours on one device: a CPU core at {rate / 1e9:.1f} GFLOP/s ({how}); an A100 or H100 at {MFU:.0%} of its "
        "bf16 peak (assumed; small models reach less)."
    )
    for line in _stores(study, runs):
        print(line)
    for run in runs:
        if run.status() in ("failed", "other", "interrupted"):
            print(f"{run.status():12} {run.folder}" + (f"  ({run.reason()})" if run.reason() else ""))


def _sums(costs: Sequence[Cost], rates: dict[str, float]) -> list[str]:
    flops = sum(c.flops for c in costs)
    hours = [flops / rate / 3600 for rate in rates.values()]
    per_rate = [f"{h:,.0f}" if h >= 100 else f"{h:.2g}" for h in hours]
    return [f"{sum(c.tokens for c in costs):,}", f"{flops:.2g}", *per_rate, gigabytes(sum(c.disk for c in costs))]


def gigabytes(size: float) -> str:
    """Bytes in GB."""
    return f"{size / 1e9:,.0f} GB" if size >= 1e11 else f"{size / 1e9:.3g} GB"


def _stores(study: StudyConfig, runs: Sequence[ArmRun]) -> list[str]:
    """A line on each token store that is not there yet."""
    readers: dict[str, list[ArmRun]] = {}
    for run in runs:
        store = run.setting("data.store")
        if store and not (Path(store) / directory.MANIFEST).is_file():
            readers.setdefault(store, []).append(run)
    lines = []
    for store, of_it in readers.items():
        path, size = prepared_by(study, of_it[0]), vocabulary(study, of_it[0])
        how = f"`sinkbed prepare --config {path} --dry_run` estimates it" if path else "prepare it first"
        read = (2 if size <= 65_536 else 4) * max(cost(study, run).tokens for run in of_it)
        lines.append(
            f"Token store {store} is not there yet: {how}; its vocabulary is taken to be {size:,}; an arm reads "
            f"{gigabytes(read)} of it if no document comes twice."
        )
    return lines


def check_stores(runs: Sequence[ArmRun]) -> str:
    """What `sinkbed fit` would refuse of the token stores that are there, for the first arm at fault; else nothing."""
    for run in {r.arm: r for r in runs}.values():
        store, context = Path(run.setting("data.store", "")), run.setting("data.context_length")
        if not (store / directory.MANIFEST).is_file():
            continue
        strategy = Strategy(**run.setting("data.strategy", {}))
        try:
            if strategy.packing == "concat":  # the others have a row for any document, and lay it out at length
                Rows(TokenStore.open(store), strategy, context, unique_rows=run.setting("data.unique_rows"))
            measure = MeasureConfig(**run.setting("measure", {}))
            Probe.from_store(TokenStore.open(store, "validation"), context, measure)
        except (ValueError, OSError) as error:
            return f"arm {run.arm}: {error} (token store {store})"
    return ""


def check_fits(study: StudyConfig, runs: Sequence[ArmRun], *, cluster: bool = False) -> None:
    """Raise ValueError where the disk, the memory or the GPUs are too few for what is not finished, with all of it.

    `cluster`: the arms run on other machines, so that of this one only the disk is asked.
    """
    left = [r for r in runs if r.status() != "finished"]
    if not left:
        return
    costs = [cost(study, r) for r in left]
    devices = "" if cluster else _devices(study, left, max(c.memory for c in costs))
    complaints = [what for what in (_head_dims(study, left), devices, _disk(study, left, costs)) if what]
    if complaints:
        raise ValueError("\n  and ".join(complaints))


def _disk(study: StudyConfig, runs: Sequence[ArmRun], costs: Sequence[Cost]) -> str:
    """What is wrong where the disk is too full for the checkpoints, as the others below say it."""
    there = sum(
        path.stat().st_size
        for run in runs
        for path in (run.folder / directory.CHECKPOINTS).rglob("*")
        if path.is_file() and not path.is_symlink()
    )
    needed = max(0, sum(c.disk for c in costs) - there)
    out = study.out.resolve()
    free = shutil.disk_usage(next(folder for folder in (out, *out.parents) if folder.exists())).free
    if needed <= free:
        return ""
    return (
        f"{study.out}: expected {gigabytes(needed)} free for the checkpoints of {len(runs)} runs, got "
        f"{gigabytes(free)}; keep fewer of them (checkpoint_points in the base), or choose --out on another disk"
    )


def _devices(study: StudyConfig, runs: Sequence[ArmRun], largest: int) -> str:
    """This machine's GPUs, or its memory, for arms of which the largest takes so many bytes."""
    wants_gpu = [r for r in runs if r.setting("trainer.accelerator") in ("gpu", "cuda")]
    if wants_gpu and not study.gpus:
        return (
            f"arm {wants_gpu[0].arm}: asks for a GPU (trainer.accelerator), and the study gives its arms none; "
            "expected gpus: 1, or a share of one"
        )
    try:
        workers = min(len(slots(study)), len(runs))
    except ValueError as error:
        return str(error)
    if study.gpus:
        memory = min(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count()))
        if largest > memory * study.gpus:
            return (
                f"an arm's weights, gradients and moments take {gigabytes(largest)}, and it has {study.gpus:g} GPU of "
                f"{gigabytes(memory)}; expected more gpus for each arm"
            )
        return ""
    available, needed = _memory(), workers * (largest + PROCESS_BYTES)
    if available is None or needed <= available:
        return ""
    return (
        f"{workers} arms at a time: expected {gigabytes(needed)} of memory, got {gigabytes(available)}; use fewer "
        "--workers"
    )


def _head_dims(study: StudyConfig, runs: Sequence[ArmRun]) -> str:
    """An arm for a GPU whose head dim the kernels there do not take."""
    for run in runs:
        accelerator = run.setting("trainer.accelerator", "auto")
        dim = DecoderConfig(**run.setting("model.decoder", {})).dim
        if (study.gpus or accelerator in ("gpu", "cuda")) and accelerator != "cpu" and dim not in HEAD_DIMS:
            return (
                f"arm {run.arm}: head dim (model.decoder.head_dim, or d_model / heads): expected one that the Triton "
                f"kernels take, {', '.join(map(str, HEAD_DIMS))}; got {dim}"
            )
    return ""


def _memory() -> int | None:
    """Bytes that processes can still take; None where the system does not say."""
    try:
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":") for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
