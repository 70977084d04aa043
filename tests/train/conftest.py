"""A tiny run through the real command line."""

from collections.abc import Callable
from pathlib import Path

import pytest

from sinkbed.train.cli.main import main


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


@pytest.fixture
def fit(tiny_store: Path, tmp_path: Path) -> Callable:
    """Call `sinkbed fit` on a tiny model; returns (exit status, run directory)."""
    config = write_run_config(tmp_path / "run.yaml", tiny_store)

    def call(*extra: str, run_dir: str = "run") -> tuple[int, Path]:
        folder = tmp_path / run_dir
        return main(["fit", "--config", str(config), "--run_dir", str(folder), *extra]), folder

    call.config = config
    return call
