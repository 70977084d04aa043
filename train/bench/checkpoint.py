"""`sinkbed bench checkpoint`: how long saving stops training, and how long a resumed run takes to its first step."""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from sinkbed.model import Decoder
from sinkbed.train.bench.timing import interleave
from sinkbed.train.bench.training import decoder_config, read_config
from sinkbed.train.loop.optim import OptimizerConfig, build_optimizer
from sinkbed.train.run import directory
from sinkbed.train.run.checkpoint import SyncedCheckpointIO, load_checkpoint


def saving(config: dict[str, Any], vocab_size: int, step_seconds: float, repeats: int) -> None:
    """Print the time that a checkpoint of a run config's model takes, and its share of the training time.

    The most saves that the run can make: its cadence, the log-spaced ones, and one wherever it is measured and is
    better than ever before.
    """
    decoder = Decoder(decoder_config(config), vocab_size)
    optimizer, _ = build_optimizer(decoder, OptimizerConfig(), total_steps=10)
    for parameter in decoder.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    content = {"state_dict": decoder.state_dict(), "optimizer_states": [optimizer.state_dict()], "global_step": 1}
    content |= {"lr_schedulers": [], "loops": {}, "callbacks": {}}
    steps, every = config["trainer"]["max_steps"], config["checkpoint_every"]
    saves = steps // every + config.get("checkpoint_points", 12) + config["measure"]["live_points"]
    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".bench-") as folder:
        path = Path(folder) / "step.ckpt"
        contenders = {
            "saving": lambda: SyncedCheckpointIO().save_checkpoint(content, path),
            "loading": lambda: load_checkpoint(path),
        }
        save, load = (t.median for t in interleave(contenders, repeats, warmup=1))
        size = path.stat().st_size
    print(f"{decoder.parameter_count():,} parameters and AdamW's moments: {size / 1e9:.2f} GB")
    print(f"saving {save:.2f} s ({size / save / 1e9:.2f} GB/s, synced), checking and loading {load:.2f} s")
    share = saves * save / (steps * step_seconds)
    print(
        f"{saves} saves at most in {steps:,} steps of {step_seconds:g} s: {100 * share:.2f} % of the training time; "
        f"2 % at {saves * save / steps / 0.02:.2g} s a step"
    )


def resuming(config: Path, repeats: int) -> None:
    """Print the time from the command to the first new point for an early and a late checkpoint."""
    environment = os.environ | {"WANDB_MODE": "offline"}
    command = [sys.executable, "-m", "sinkbed", "fit", "--config", str(config)]
    quiet = ["--trainer.enable_progress_bar", "false", "--trainer.log_every_n_steps", "1", "--checkpoint_points", "8"]
    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".bench-") as temporary:
        whole = Path(temporary) / "whole"
        log = (Path(temporary) / "log").open("w")

        def until(folder: Path, is_there: Any, *extra: str) -> float:
            began = time.perf_counter()
            process = subprocess.Popen(
                [*command, *quiet, "--run_dir", str(folder), *extra], env=environment, stdout=log, stderr=log
            )
            try:
                while not is_there() and process.poll() is None:
                    time.sleep(0.005)
                seconds = time.perf_counter() - began
                if process.poll() is not None:
                    raise ValueError(f"bench checkpoint: the run ended early; it says {Path(log.name).read_text()}")
            finally:
                process.kill()
                process.wait()
            return seconds

        checkpoints = whole / directory.CHECKPOINTS
        steps = read_config(config)["trainer"]["max_steps"]
        enough = steps // 3
        until(whole, lambda: any(int(p.stem[5:]) > enough for p in checkpoints.glob("step-*.ckpt")))
        paths = sorted(checkpoints.glob("step-*.ckpt"))
        chosen = [paths[0], paths[-1]]
        seconds: dict[str, list[float]] = {path.name: [] for path in chosen}
        for _ in range(repeats):
            for path in chosen:
                folder = Path(temporary) / "run"
                shutil.copytree(whole, folder, symlinks=True)
                step, metrics = int(path.stem[5:]), folder / directory.METRICS
                points = load_checkpoint(path)["callbacks"]["Checkpoints"]["metrics"]

                def goes_on(metrics: Path = metrics, points: str = points, step: int = step) -> bool:
                    later = metrics.read_text().removeprefix(points)
                    return len(later) < len(metrics.read_text()) and later.startswith(f'{{"step": {step + 1},')

                # The points after the checkpoint go first, so that the first one there is a new one.
                metrics.write_text(points)
                arguments = ("--ckpt_path", str(folder / directory.CHECKPOINTS / path.name))
                seconds[path.name].append(until(folder, goes_on, *arguments))
                shutil.rmtree(folder)
        log.close()
    for name, values in seconds.items():
        print(f"resuming {config} at {name}: {statistics.median(values):.1f} s to the first new step")


def run(arguments: Any) -> int:
    """Saving at the shape of one config, resuming a run of another."""
    saving(read_config(arguments.config), arguments.vocab_size, arguments.step_seconds, arguments.repeats)
    if arguments.resume is not None:
        resuming(arguments.resume, arguments.repeats)
    return 0
