"""The files of a finished run are believed only as the run left them."""

import shutil

import pytest

from sinkbed.data.files import write_json
from sinkbed.train.cli.main import main
from sinkbed.train.run import directory
from tests.support.runs import write_run_config


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_store):
    folder = tmp_path_factory.mktemp("finished")
    config = write_run_config(folder / "run.yaml", tiny_store)
    assert main(["fit", "--config", str(config), "--wandb.mode", "disabled", "--trainer.max_steps", "4"]) == 0
    return folder / "run"


@pytest.mark.parametrize(
    "name", [directory.CONFIG, directory.MANIFEST, directory.AUDIT, directory.METRICS, directory.MEASUREMENT]
)
@pytest.mark.parametrize("command", ["report", "validate", "probe", "export"])
def test_a_flipped_bit_is_named_by_every_reader(run, command, name, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    out = ["--out", str(tmp_path / "out")] if command == "export" else []
    assert main([command, str(copy), *out]) == 1
    said = capsys.readouterr().err
    assert f"{copy / name}: expected the file as the run left it" in said, said
    assert not (tmp_path / "out").exists() and not (copy / "report").exists()


@pytest.mark.parametrize("command", ["report", "validate", "export", "probe"])
def test_a_run_of_another_version_is_refused_with_its_name(command, run, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    record = directory.read_json(copy / directory.RUN)
    write_json(copy / directory.RUN, {key: value for key, value in record.items() if key != "format"})
    out = ["--out", str(tmp_path / "out")] if command == "export" else []
    assert main([command, str(copy), *out]) == 1
    assert f"{copy}: expected format {directory.FORMAT} of runs and checkpoints, got none" in capsys.readouterr().err
