"""A run of ten steps: its config, how to kill it, and what it leaves."""

import hashlib
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from sinkbed.data.files import sha256_file, write_json
from sinkbed.train.loop.module import SinkbedModule
from sinkbed.train.run import directory
from sinkbed.train.run.checkpoint import load_checkpoint


def write_run_config(path: Path, store: Path) -> Path:
    """The config of a run of ten steps, a second on one core."""
    path.write_text(
        f"""
seed_everything: 0
run_dir: {path.parent / "run"}
threads: 1
checkpoint_every: 4
checkpoint_points: 3
model:
  decoder: {{n_layers: 2, d_model: 32, n_heads: 2, d_ff: 48}}
  optimizer: {{lr: 1.0e-2, warmup_steps: 2}}
data:
  store: {store}
  context_length: 48
  batch_size: 4
  strategy: {{first_token: bos}}
measure: {{documents: 6, live_documents: 3, sink_tokens: 16, first_step: 2, live_points: 3}}
trainer: {{accelerator: cpu, devices: 1, max_steps: 10, log_every_n_steps: 1, enable_progress_bar: false}}
"""
    )
    return path


def points(folder):
    """metrics.jsonl without what depends on the clock."""
    found = list(directory.read_metrics(folder / directory.METRICS))
    return [{k: v for k, v in p.items() if k != "train/tokens_per_second"} for p in found]


def weights(folder, step):
    return torch.load(folder / "checkpoints" / f"step-{step:07d}.ckpt", weights_only=True)["state_dict"]


def training_state(folder, step):
    """Weights, moments, schedule and data of a checkpoint."""
    found = load_checkpoint(folder / "checkpoints" / f"step-{step:07d}.ckpt")
    return {key: found[key] for key in ("state_dict", "optimizer_states", "lr_schedulers", "TokenData", "global_step")}


def equal(a, b):
    """Whether two values of a checkpoint are the same, bit for bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def content(folder: Path) -> dict[str, str]:
    """sha256 of every file of a folder, by name."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def refused(capsys, status):
    message = capsys.readouterr().err
    assert status != 0
    return message


class Killed(BaseException):
    """Stops training where a test wants it; for a real kill -9 see the test of that name."""


@contextmanager
def killed_at(step):
    """The run that is started inside stops after so many steps, saving nothing more."""
    original = SinkbedModule.training_step

    def training_step(self, *args):
        if self.trainer.global_step == step:
            raise Killed
        return original(self, *args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(SinkbedModule, "training_step", training_step)
        yield


def seal(path):
    """Put the files of a sharded checkpoint under checksums."""
    sums = {p.name: sha256_file(p) for p in path.iterdir() if p.name != "checksums.json"}
    write_json(path / "checksums.json", sums)
    return sums
