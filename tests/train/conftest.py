"""A tiny run through the real command line."""

import contextlib
import io
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from sinkbed.train.cli.main import main
from tests.support.runs import killed_at, seal, write_run_config
from tests.support.studies import write_study


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


@pytest.fixture
def cut(fit):
    """A run killed at step 7, its newest checkpoint that of step 4."""

    def call(*extra):
        with killed_at(7):
            fit(*extra)
        return fit.config.parent / "run"

    return call


@pytest.fixture
def study(tiny_store, tmp_path):
    """A study that has not run."""
    return write_study(tmp_path, tiny_store)


@pytest.fixture(scope="session")
def _run_once(tiny_store, tmp_path_factory):
    path = write_study(tmp_path_factory.mktemp("study"), tiny_store)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main(["study", str(path), "--quiet"]) == 0
    return path, printed.getvalue()


@pytest.fixture
def finished(_run_once, study):
    """The same study, run; each test has its own copy."""
    shutil.copytree(_run_once[0].parent / "out", study.parent / "out", symlinks=True)
    # Its configs name this copy's folders; contents decide what an arm is, so they must be those of the run.
    shutil.copy(_run_once[0].parent / "run.yaml", study.parent / "run.yaml")
    return study
