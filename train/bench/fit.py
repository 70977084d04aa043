"""`sinkbed bench fit`: the rate of `sinkbed fit` on a CPU against a plain loop: AdamW, causal, in one piece."""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from sinkbed.data.store.token_store import TokenStore
from sinkbed.plain_text import counted
from sinkbed.ranges import check_number
from sinkbed.train.bench.timing import interleave, take_turns
from sinkbed.train.bench.training import Shape, decoder_step, random_batch, read_config, shape_of
from sinkbed.train.run import directory

_WINDOW = 25  # steps that a rate is the mean of
_WARMUP = 2  # windows


def fit_rate(arguments: Any, shape: Shape) -> float:
    """Tokens per second of a run, as it logs them: median of its windows, time to measure left out."""
    with tempfile.TemporaryDirectory() as folder:
        options = {
            "config": arguments.config,
            "run_dir": Path(folder) / "run",
            "threads": arguments.threads,
            "model.decoder.n_layers": shape.decoder.n_layers,
            "model.decoder.d_model": shape.decoder.d_model,
            "model.decoder.d_ff": shape.decoder.d_ff,
            "data.batch_size": shape.rows,
            "data.context_length": shape.length,
            "trainer.max_steps": arguments.steps,
            "trainer.log_every_n_steps": _WINDOW,
            "trainer.accelerator": "cpu",
            "wandb.mode": "offline",
        }
        command = [sys.executable, "-m", "sinkbed", "fit", *(f"--{key}={value}" for key, value in options.items())]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise ValueError("sinkbed fit: " + done.stderr.rpartition("sinkbed fit: ")[2].strip())
        points = map(json.loads, (options["run_dir"] / directory.METRICS).read_text().splitlines())
        rates = [point["train/tokens_per_second"] for point in points if "train/tokens_per_second" in point]
    return statistics.median(rates[_WARMUP:])


def run(arguments: Any) -> int:
    """Both in turn, with the precision and the compilation of the run config; each a run or a loop of as many steps."""
    check_number("--steps", arguments.steps, least=100, integer=True)
    config = read_config(arguments.config)
    data = config["data"]
    kind = (config["model"].get("optimizer", {}).get("name", "adamw"), data.get("strategy", {}).get("mask", "causal"))
    if kind != ("adamw", "causal") or data.get("micro_batch_size"):
        raise ValueError(
            "bench fit: expected a run with adamw, a causal mask and no micro batches, as the loop is; "
            f"{arguments.config} has {kind[0]}, {kind[1]} and micro_batch_size {data.get('micro_batch_size')}"
        )
    shape = shape_of(arguments)
    manifest = TokenStore.open(Path(data["store"])).manifest
    compiled = config["model"].get("compile", False)
    bfloat16 = config["trainer"].get("precision") == "bf16-mixed"

    def loop_rate() -> float:
        batch = random_batch(shape.rows, shape.length, manifest.vocab_size)
        step = decoder_step(shape.decoder, batch, manifest.vocab_size, compiled, bfloat16)

        def window() -> None:
            for _ in range(_WINDOW):
                step()

        [timing] = interleave({"loop": window}, arguments.steps // _WINDOW - _WARMUP, warmup=_WARMUP)
        return _WINDOW * shape.rows * shape.length / timing.median

    turns = {"sinkbed fit": lambda: fit_rate(arguments, shape), "the loop": loop_rate}
    rates = take_turns(turns, arguments.repeats)
    threads = counted(arguments.threads, "thread")
    print(f"{shape.rows} rows of {shape.length} tokens, {threads}, {arguments.steps} steps each")
    for name, each in rates.items():
        print(f"{name:12} {statistics.median(each):10,.0f} tokens/s  ({min(each):,.0f} to {max(each):,.0f})")
    ratio = statistics.median(ours / loop for ours, loop in zip(*rates.values(), strict=True))
    print(f"fit has {ratio:.2f} of the loop's rate")
    return 0
