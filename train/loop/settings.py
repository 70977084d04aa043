"""What settings of a run contradict each other: refused before a store is opened, a model built or a file written."""

import os
import shutil
import sys
from typing import Any

import torch

from sinkbed.data.pack.strategy import Strategy
from sinkbed.model import Decoder, DecoderConfig
from sinkbed.model.positions import POSITIONS
from sinkbed.ranges import check_number
from sinkbed.train.loop.optim import OptimizerConfig, build_optimizer
from sinkbed.train.loop.optimizers import OPTIMIZERS
from sinkbed.train.measure.config import MeasureConfig
from sinkbed.train.measure.modes import first_tokens_of, placed_positions

_SMALLEST = DecoderConfig(n_layers=1, d_model=2, n_heads=1, d_ff=2)


def training_bytes(optimizer: OptimizerConfig) -> int:
    """About the bytes of a parameter's weight, its gradient and what the optimizer keeps of it, float32."""
    return 8 + 4 * OPTIMIZERS[optimizer.name].state_tensors


def check_settings(config: Any) -> None:
    """Raise ValueError for settings that are out of their range, alone or beside each other.

    Args:
        config: the parsed keys of `sinkbed fit`, as jsonargparse has them: groups with an attribute a key.
    """
    data, trainer = config.data, config.trainer
    decoder = DecoderConfig(**vars(config.model.decoder))
    optimizer = OptimizerConfig(**vars(config.model.optimizer))
    needed = training_bytes(optimizer) * Decoder.parameters_of(decoder, 1)
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if trainer.accelerator == "cpu" and needed > there:
        raise ValueError(
            f"model.decoder: expected at most the {there / 1e9:.3g} GB of memory of this machine, got weights, "
            f"gradients and moments of {needed / 1e9:.3g} GB; make it smaller"
        )
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")  # the one that torch takes
    if config.model.compile and trainer.accelerator == "cpu" and shutil.which(compiler) is None:
        raise ValueError(
            f"model.compile: expected a C++ compiler, got no {compiler} on this machine; install it, name another in "
            "the environment variable CXX, or set model.compile to false"
        )
    strategy, measure = Strategy(**vars(data.strategy)), MeasureConfig(**vars(config.measure))
    check_number("data.context_length", data.context_length, least=2)
    for name in ("batch_size", "micro_batch_size", "unique_rows"):
        if getattr(data, name) is not None:
            check_number(f"data.{name}", getattr(data, name), least=1)
    if isinstance(trainer.devices, int) and trainer.devices > 0:
        micro_batches(data.batch_size, data.micro_batch_size, trainer.devices * trainer.num_nodes)
    if config.model.max_grad_norm is not None:
        check_number("model.max_grad_norm", config.model.max_grad_norm, above=0)
    check_number("data.workers", data.workers, least=0)
    check_number("data.seed", data.seed, least=0, below=2**63)
    check_number("checkpoint_every", config.checkpoint_every, least=1)
    check_number("checkpoint_points", config.checkpoint_points, least=0)
    if config.threads is not None:
        check_number("threads", config.threads, least=1)
    if trainer.max_steps is None or trainer.max_steps < 1:
        raise ValueError(
            f"trainer.max_steps: expected at least 1 (the schedules need the end), got {trainer.max_steps}"
        )
    check_number("trainer.log_every_n_steps", trainer.log_every_n_steps or 0, least=1)
    with torch.device("meta"):  # where no random number is drawn
        smallest = Decoder(_SMALLEST, 1)
    build_optimizer(smallest.to_empty(device="cpu"), optimizer, trainer.max_steps)  # which checks its own options
    if "fsdp" in str(trainer.strategy) and not OPTIMIZERS[optimizer.name].shards:
        raise ValueError(
            f"model.optimizer.name: expected one that works on sharded matrices beside trainer.strategy "
            f"{trainer.strategy}, got {OPTIMIZERS.name_of(optimizer.name)}; take trainer.strategy ddp"
        )
    strategy.check_context(data.context_length)
    _check_positions(decoder, strategy, measure, data.context_length)
    measure.check_context(data.context_length)
    for mode in {*measure.modes, *measure.live_modes}:
        measure.check_placed(mode, strategy)


def _check_positions(decoder: DecoderConfig, strategy: Strategy, measure: MeasureConfig, context_length: int) -> None:
    """Raise ValueError for rows that the position encoding cannot place."""
    position = POSITIONS.make(decoder.position, decoder)
    placed = max(len(placed_positions(mode, strategy)) for mode in (*measure.modes, *measure.live_modes))
    longest = context_length - 1 + max(1, placed)  # of a row that is measured
    if position.max_length is not None and position.max_length < longest:
        raise ValueError(
            f"model.decoder.position: expected at least {longest} positions, with data.context_length={context_length} "
            f"and the tokens before a text that is measured, got {position.max_length}; set "
            f"{{{POSITIONS.name_of(decoder.position)}: {{length: {longest}}}}}"
        )
    if decoder.n_registers > context_length:
        raise ValueError(
            f"model.decoder.n_registers: expected at most data.context_length={context_length}, got "
            f"{decoder.n_registers}; rows are as many positions longer"
        )
    hides = "first_key_masked" in (*measure.modes, *measure.live_modes)
    if decoder.n_registers and strategy.shared_prefix > 1 and hides:
        raise ValueError(
            f"measure.modes: expected none that hides key 0 between registers and the other keys of "
            f"data.strategy.shared_prefix={strategy.shared_prefix}, got first_key_masked; leave it out of "
            "modes and live_modes"
        )
    if position.slopes is None:
        return
    if decoder.n_registers and strategy.mask == "intra_document":
        raise ValueError(
            f"model.decoder.n_registers: expected 0 beside {decoder.position} and mask: intra_document, where each "
            f"document would be at another distance from them, got {decoder.n_registers}"
        )
    if strategy.prefix_lm:
        raise ValueError(
            f"model.decoder.position: {decoder.position} lowers logits by the distance back to a key; expected no keys "
            f"ahead, got data.strategy.prefix_lm={strategy.prefix_lm}"
        )
    if strategy.positions == "document" and (strategy.mask != "intra_document" or strategy.shared_prefix):
        raise ValueError(
            "data.strategy.positions: expected row, or mask: intra_document without a shared_prefix, as the distance "
            f"between documents that {decoder.position} needs is that in the row, got document"
        )


def unmeasured_input(config: Any) -> str:
    """A line where the rows that a run is trained on are no input that it is measured on; else nothing."""
    strategy, modes = Strategy(**vars(config.data.strategy)), config.measure.modes
    trained = first_tokens_of("as_trained", strategy)
    if any(first_tokens_of(mode, strategy) == trained for mode in modes if mode != "first_key_masked"):
        return ""
    begins = f"with {', '.join(map(str, trained))}" if trained else "with the text"
    return (
        f"measure.modes: no input of {', '.join(modes)} begins as the rows do that are trained on, {begins}; that of "
        "as_trained does (configs/measure)"
    )


def micro_batches(batch_size: int, micro_batch_size: int | None, processes: int) -> int:
    """Forward passes of a process in an optimizer step. Raises ValueError where the batch sizes do not divide."""
    per_process, rest = divmod(batch_size, processes)
    micro = per_process if micro_batch_size is None else micro_batch_size
    if rest or micro < 1 or per_process % micro:
        raise ValueError(
            f"data.batch_size={batch_size}: expected a multiple of micro_batch_size={micro} times {processes} "
            "processes; change one of them"
        )
    return per_process // micro
