"""A tiny run through the real command line."""

from collections.abc import Callable
from pathlib import Path

import pytest

from sinkbed.train.cli.main import main
from tests.support.runs import seal, write_run_config


@pytest.fixture
def fit(tiny_store: Path, tmp_path: Path) -> Callable:
    """Call `sinkbed fit` on a tiny model; returns (exit status, run directory)."""
    config = write_run_config(tmp_path / "run.yaml", tiny_store)

    def call(*extra: str, run_dir: str = "run") -> tuple[int, Path]:
        folder = tmp_path / run_dir
        return main(["fit", "--config", str(config), "--run_dir", str(folder), *extra]), folder

    call.config = config
    return call


@pytest.fixture
def sharded(tmp_path):
    """A sharded checkpoint of one tensor in two chunks, made by one process."""
    import torch
    import torch.distributed.checkpoint as dcp

    path = tmp_path / "step-0000003.ckpt"
    dcp.save({"model|w": torch.arange(8.0)}, storage_writer=dcp.FileSystemWriter(path), no_dist=True)
    parts = {"global_step": 3, "state_dict": {}, "optimizer_states": [], "lr_schedulers": [], "loops": {}}
    torch.save({**parts, "callbacks": {}}, path / "meta.ckpt")
    seal(path)
    return path
