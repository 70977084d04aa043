"""A run, and the same as a folder of Hugging Face."""

import pytest

from sinkbed.train.cli.main import main
from tests.support.runs import write_run_config


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, tiny_store):
    folder = tmp_path_factory.mktemp("probe")
    config = write_run_config(folder / "run.yaml", tiny_store)
    assert main(["fit", "--config", str(config), "--wandb.mode", "disabled"]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def exported(run_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("hf") / "model"
    assert main(["export", str(run_dir), "--out", str(out)]) == 0
    return out
