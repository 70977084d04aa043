"""`sinkbed validate`: measure a checkpoint of a run on its probe set, with the code that measures live."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train import rundir
from train.yaml_files import read_mapping

if TYPE_CHECKING:
    from data.strategy import Strategy
    from data.tokenizer import Tokenizer
    from model import Decoder
    from train.measure import InferenceMode, ModeResult


def load_decoder(checkpoint: dict[str, Any]) -> tuple[Decoder, Strategy]:
    """The decoder of a checkpoint, and the strategy it was trained under.

    Raises ValueError for a checkpoint that sinkbed did not write.
    """
    from data.strategy import Strategy
    from model import Decoder, DecoderConfig

    identity = checkpoint.get("sinkbed")
    if identity is None:
        raise ValueError("the checkpoint: expected one written by sinkbed fit, found no `sinkbed` entry")
    decoder = Decoder(DecoderConfig(**identity["decoder"]), identity["vocab_size"])
    prefix = "decoder."
    weights = {k.removeprefix(prefix): v for k, v in checkpoint["state_dict"].items() if k.startswith(prefix)}
    decoder.load_state_dict(weights)
    return decoder, Strategy(**identity["strategy"])


def find_run(path: Path) -> tuple[Path, Path]:
    """The checkpoint that a path names, or the newest of a run directory, and the run directory; loads nothing.

    Raises FileNotFoundError for a path that is neither, ValueError for a finished run whose files are damaged.
    """
    chosen = path.name.endswith(".ckpt")  # a sharded checkpoint is a folder too
    folder = path.parent.parent if chosen else path
    if not (folder / rundir.CONFIG).is_file():
        raise FileNotFoundError(
            f"{path}: expected a run directory or a checkpoint inside one, found no {folder / rundir.CONFIG}"
        )
    rundir.check_finished(folder)
    newest = path if chosen else rundir.newest_checkpoint(folder)
    if newest is None:
        raise FileNotFoundError(f"{path}: expected a run with a checkpoint, found one that has none yet")
    return newest, folder


def open_run(path: Path) -> tuple[dict[str, Any], Path]:
    """What the checkpoint of `find_run` holds, and the run directory. Raises ValueError where it does not load."""
    checkpoint, folder = find_run(path)
    from train.checkpoint import load_checkpoint

    return load_checkpoint(checkpoint, option="the path"), folder


def run_tokenizer(identity: dict[str, Any], store: Path | None) -> Tokenizer:
    """The tokenizer a checkpoint was trained with, from its token store or another one that has it.

    Raises ValueError for a store with another tokenizer.
    """
    from data.store import TokenStore

    opened = TokenStore.open(store or Path(identity["store"]), "train")
    if opened.manifest.tokenizer_sha256 != identity["tokenizer"]:
        raise ValueError(
            f"{opened.path}: expected the tokenizer that the checkpoint was trained with "
            f"({identity['tokenizer'][:12]}), found {opened.manifest.tokenizer_sha256[:12]}; give its --store"
        )
    return opened.tokenizer()


def measurement_table(step: int, results: dict[InferenceMode, ModeResult], sink_tokens: int) -> str:
    """The figures of one measurement, a line for each inference mode."""
    from train.results import MODE_LABELS

    documents = next(iter(results.values())).documents
    lines = [
        f"step {step}, {documents} documents, T = {sink_tokens}, eps 0.3",
        f"{'input':26}{'sink rate %':>12}{'sink mass':>11}{'loss':>8}{'bits/byte':>11}",
    ]
    for mode, result in results.items():
        m = result.metrics(mode)
        lines.append(
            f"{MODE_LABELS[mode]:26}{m[f'sink/rate/0.3/{mode}']:12.1f}{m[f'sink/mass/{mode}']:11.3f}"
            f"{result.loss:8.3f}{result.bits_per_byte:11.3f}"
        )
    return "\n".join(lines)


def run(command: str, argv: Sequence[str]) -> int:
    """Parse, measure, print a table."""
    import argparse

    parser = argparse.ArgumentParser(
        prog=f"sinkbed {command}", allow_abbrev=False, description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("run", type=Path, help="run directory, or a checkpoint inside one")
    parser.add_argument("--modes", nargs="+", help="inference modes (default: the run's)")
    parser.add_argument("--documents", type=int, help="documents of the probe set (default: the run's)")
    parser.add_argument("--store", type=Path, help="token store (default: the run's)")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--json", type=Path, help="also write every figure, per layer and head, to this file")
    arguments = parser.parse_args(list(argv))

    checkpoint, folder = open_run(arguments.run)  # first: a path that is none is answered before torch is imported
    import torch

    from data.store import TokenStore
    from train.measure import MeasureConfig, Probe, check_modes, measure
    from train.progress import Steps

    config = read_mapping(folder / rundir.CONFIG)
    settings: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in config["measure"].items()}
    if arguments.documents is not None:
        settings |= {"documents": arguments.documents, "live_documents": 1}
    if arguments.modes is not None:
        settings |= {"modes": check_modes(arguments.modes)}
    measuring = MeasureConfig(**settings)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)

    decoder, strategy = load_decoder(checkpoint)
    identity = checkpoint["sinkbed"]
    run_tokenizer(identity, arguments.store)
    store = TokenStore.open(arguments.store or Path(identity["store"]), "validation")
    store.verify()
    probe = Probe.from_store(store, identity["context_length"], measuring)
    results: dict[InferenceMode, ModeResult] = {}
    steps = Steps()
    for mode in measuring.modes:

        def step(mode: InferenceMode = mode) -> None:
            results[mode] = measure(decoder, probe, mode, strategy, measuring)

        steps.add(f"sinks, mode {mode}", len(probe.documents), step)
    steps.run()
    print(measurement_table(checkpoint["global_step"], results, measuring.sink_tokens))
    if len(probe.documents) < measuring.documents:
        print(
            f"asked for {measuring.documents} documents; the validation split has {len(probe.documents)} of at least "
            f"{measuring.sink_tokens} tokens"
        )
    if arguments.json is not None:
        rundir.write_json(arguments.json, {mode: dataclasses.asdict(r) for mode, r in results.items()}, seal=False)
    return 0
