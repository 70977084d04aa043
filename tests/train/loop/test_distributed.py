"""Two processes with gloo: the run of one process, written once, in every strategy and from one to the other."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from sinkbed.data.files import write_json
from sinkbed.train.cli.main import main
from sinkbed.train.run import directory
from sinkbed.train.run.checkpoint import load_checkpoint
from sinkbed.train.run.wandb_files import read_wandb_file
from tests.support.processes import Job, slurm, torchrun
from tests.support.runs import points

pytestmark = pytest.mark.slow

KINDS = ("one", "ddp", "fsdp2", "fsdp2_sharded")
# Under the document mask micro-batches and processes differ in the targets that count.
SETTINGS = ("--data.strategy.mask", "intra_document", "--data.micro_batch_size", "1")


def of_kind(kind):
    """Options and environments of a run of a kind: one process, or two under a strategy."""
    if kind == "one":
        return [], [{}]
    options = ["--trainer.devices", "2", "--trainer.strategy", kind]
    # The sharded kind computes its blocks again, too.
    again = ["--model.activation_checkpointing", "true"] if kind == "fsdp2_sharded" else []
    return [*options, *again], torchrun(2)


@pytest.fixture
def launch(fit):
    """Start a run of a kind."""
    jobs = []

    def call(kind, folder, *extra, environments=None):
        options, environments_of_kind = of_kind(kind)
        arguments = ["fit", "--config", str(fit.config), "--run_dir", str(folder), *SETTINGS, *options, *extra]
        jobs.append(Job(arguments, f"{folder}.log", environments or environments_of_kind))
        return jobs[-1]

    yield call
    for job in jobs:
        job.signal(signal.SIGKILL)
        job.finish()


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_store):
    """A finished run of each kind."""
    from tests.support.runs import write_run_config

    folder = tmp_path_factory.mktemp("runs")
    config = write_run_config(folder / "run.yaml", tiny_store)
    for kind in KINDS:
        options, environments = of_kind(kind)
        arguments = ["fit", "--config", str(config), "--run_dir", str(folder / kind), *SETTINGS, *options]
        job = Job(arguments, f"{folder / kind}.log", environments)
        assert set(job.finish()) == {0}, job.output()
        assert "Traceback" not in job.output()
    return folder


def close(ours, theirs):
    """Points of two runs that differ by the order of sums only."""
    assert [p.keys() for p in ours] == [p.keys() for p in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert (a["step"], a["train/tokens"]) == (b["step"], b["train/tokens"])
        for key in a.keys() & {"train/loss", "val/loss/bos", "val/loss/text", "sink/mass/bos", "train/lr"}:
            assert a[key] == pytest.approx(b[key], rel=1e-4), (a["step"], key)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_two_processes_make_the_run_of_one_and_write_it_once(runs, kind):
    close(points(runs / kind), points(runs / "one"))
    names = {path.name for path in (runs / "one").iterdir()}
    assert {path.name for path in (runs / kind).iterdir()} == names
    [segment] = (runs / kind).glob("wandb/offline-run-*/run-*.wandb")
    assert [row["_step"] for row in read_wandb_file(segment)] == list(range(len(points(runs / "one"))))
    ours, theirs = (load_checkpoint(runs / k / "checkpoints" / "step-0000010.ckpt") for k in (kind, "one"))
    assert ours["state_dict"].keys() == theirs["state_dict"].keys()
    for name, weight in theirs["state_dict"].items():
        torch.testing.assert_close(ours["state_dict"][name], weight, atol=1e-3, rtol=1e-3)
    [ours], [theirs] = ours["optimizer_states"], theirs["optimizer_states"]
    assert [g["params"] for g in ours["param_groups"]] == [g["params"] for g in theirs["param_groups"]]
    for name, state in theirs["state"].items():
        torch.testing.assert_close(ours["state"][name]["exp_avg_sq"], state["exp_avg_sq"], atol=1e-4, rtol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_validate_reads_every_kind_of_checkpoint(runs, kind, capsys, tmp_path):
    assert main(["validate", str(runs / kind), "--json", str(tmp_path / "figures.json")]) == 0
    found = json.loads((tmp_path / "figures.json").read_text())
    expected = directory.read_json(runs / kind / directory.MEASUREMENT)["modes"]
    for mode, figures in expected.items():
        assert found[mode]["loss"] == pytest.approx(figures["loss"], rel=1e-6)


PAIRS = [("one", "fsdp2_sharded"), ("fsdp2_sharded", "one"), ("fsdp2_sharded", "ddp"), ("ddp", "fsdp2"),
         ("fsdp2", "fsdp2_sharded"), ("fsdp2_sharded", "fsdp2_sharded"), ("fsdp2", "one")]  # fmt: skip


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_a_checkpoint_of_one_kind_resumes_as_another(runs, launch, tmp_path, first, second):
    import shutil

    folder = tmp_path / "run"
    shutil.copytree(runs / first, folder, symlinks=True)
    (folder / directory.MEASUREMENT).unlink()
    job = launch(second, folder, "--ckpt_path", str(folder / "checkpoints" / "step-0000003.ckpt"))
    assert set(job.finish()) == {0}, job.output()
    close(points(folder), points(runs / "one"))
    assert job.output().count("resuming") == 1, "said once"
    if (first, second) == ("fsdp2_sharded", "fsdp2_sharded"):
        assert points(folder) == points(runs / first), "the same processes, the same bits"


def test_muon_steps_on_sharded_matrices_as_on_whole_ones(launch, tmp_path):
    """Its products are in bfloat16, whose rounding depends on the order of sums."""
    found = []
    for kind in ("one", "fsdp2_sharded"):
        job = launch(kind, tmp_path / kind, "--model.optimizer.name", "muon", "--model.optimizer.lr", "1e-3")
        assert set(job.finish()) == {0}, job.output()
        found.append(load_checkpoint(tmp_path / kind / "checkpoints" / "step-0000010.ckpt"))
    for name, weight in found[0]["state_dict"].items():
        torch.testing.assert_close(found[1]["state_dict"][name], weight, atol=1e-3, rtol=1e-3)
    [ours], [theirs] = found[1]["optimizer_states"], found[0]["optimizer_states"]
    assert [g["params"] for g in ours["param_groups"]] == [g["params"] for g in theirs["param_groups"]]
    kept = [{name: sorted(state) for name, state in each["state"].items()} for each in (ours, theirs)]
    assert kept[0] == kept[1] and ["momentum_buffer"] in kept[0].values()


def parts(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_every_file_of_a_sharded_checkpoint_is_under_a_checksum(runs, tmp_path):
    import shutil

    original = runs / "fsdp2_sharded" / "checkpoints" / "step-0000010.ckpt"
    names = [path.name for path in parts(original)]
    assert len(names) == 5 and {".metadata", "meta.ckpt", "checksums.json"} < set(names)
    for name in names:
        for damage in (lambda b: b[:-1] + bytes([b[-1] ^ 1]), lambda b: b[: len(b) // 2], None):
            folder = tmp_path / "step-0000010.ckpt"
            shutil.copytree(original, folder)
            content = (folder / name).read_bytes()
            (folder / name).unlink()
            if damage is not None:
                (folder / name).write_bytes(damage(content))
            with pytest.raises(ValueError, match=r"step-0000010\.ckpt: expected a checkpoint") as refusal:
                load_checkpoint(folder)
            assert name in str(refusal.value)
            shutil.rmtree(folder)


TRAPS = {
    "a call": b"cos\nmkdir\n(S'{made}'\ntR.",
    # Through a module that is allowed to another one that it imports.
    "a dotted name": b"\x80\x04\x8c\x27torch.distributed.checkpoint.filesystem\x8c\x08os.mkdir\x93"
    b"\x8c{size}{made}\x85R.",
}


@pytest.mark.parametrize("trap", TRAPS)
def test_the_index_of_a_sharded_checkpoint_cannot_run_code(runs, tmp_path, trap):
    import hashlib
    import pickle
    import shutil

    made = str(tmp_path / "made")
    content = TRAPS[trap].replace(b"{size}", bytes([len(made)])).replace(b"{made}", made.encode())
    pickle.loads(content)
    os.rmdir(made)  # the trap works
    folder = tmp_path / "step-0000010.ckpt"
    shutil.copytree(runs / "fsdp2_sharded" / "checkpoints" / "step-0000010.ckpt", folder)
    (folder / ".metadata").write_bytes(content)
    sums = directory.read_json(folder / "checksums.json") | {".metadata": hashlib.sha256(content).hexdigest()}
    write_json(folder / "checksums.json", sums)
    with pytest.raises(ValueError, match=r"mkdir in \.metadata"):
        load_checkpoint(folder)
    assert not os.path.exists(made)


def test_a_sharded_checkpoint_stays_inside_its_folder(runs, tmp_path):
    import shutil

    folder = tmp_path / "step-0000010.ckpt"
    shutil.copytree(runs / "fsdp2_sharded" / "checkpoints" / "step-0000010.ckpt", folder)
    name = next(path.name for path in parts(folder) if path.suffix == ".distcp")
    shutil.copy(folder / name, tmp_path / name)
    sums = directory.read_json(folder / "checksums.json")
    write_json(folder / "checksums.json", {f"../{name}" if n == name else n: v for n, v in sums.items()})
    with pytest.raises(ValueError, match=rf"checksum of \.\./{name}"):
        load_checkpoint(folder)


def test_a_disk_that_fills_up_under_a_sharded_checkpoint(fit, tmp_path):
    folder = tmp_path / "full"
    options, environments = of_kind("fsdp2_sharded")
    arguments = ["fit", "--config", str(fit.config), "--run_dir", str(folder), *SETTINGS, *options]
    job = Job([*arguments, "--wandb.mode", "disabled"], f"{folder}.log", environments, largest_file=60_000)
    assert job.finish() == [1, 1], job.output()
    assert "the disk is full while writing" in job.output() and "step-0000001.ckpt" in job.output()
    assert "Traceback" not in job.output()
    assert not list((folder / "checkpoints").iterdir())


def test_processes_whose_losses_differ_save_together(launch, fit):
    """Which checkpoint is the best is one process's decision."""
    folder = fit.config.parent / "run"
    job = launch("ddp", folder, environments=[e | {"SINKBED_TEST_LOSS": e["RANK"]} for e in torchrun(2)])
    assert set(job.finish(timeout=60)) == {0}, job.output()


@pytest.mark.parametrize(("kind", "victim"), [("ddp", 0), ("ddp", 1), ("fsdp2_sharded", 1)])
def test_a_process_that_dies_ends_the_job_with_a_message(launch, fit, kind, victim):
    folder = fit.config.parent / "run"
    job = launch(kind, folder, "--trainer.max_steps", "5000", "--checkpoint_every", "5000")
    deadline = time.monotonic() + 60
    while directory.newest_checkpoint(folder) is None and time.monotonic() < deadline and job.alive():
        time.sleep(0.01)
    os.kill(job.processes[victim].pid, signal.SIGKILL)
    began = time.monotonic()
    assert job.finish()[1 - victim] == 1
    assert time.monotonic() - began < 30
    assert "another process of this job ended" in job.output() and "--ckpt_path auto" in job.output()
    assert "Traceback" not in job.output()


@pytest.mark.parametrize(("launcher", "number"), [(torchrun, signal.SIGTERM), (slurm, signal.SIGINT)])
def test_processes_told_to_stop_save_once_and_stop_together(launch, fit, launcher, number):
    folder = fit.config.parent / "run"
    job = launch("ddp", folder, "--trainer.max_steps", "5000", "--checkpoint_every", "5000", environments=launcher(2))
    deadline = time.monotonic() + 60
    while directory.newest_checkpoint(folder) is None and time.monotonic() < deadline and job.alive():
        time.sleep(0.01)
    os.kill(job.processes[1].pid, number)  # one of them is enough
    assert job.finish() == [128 + number] * 2, job.output()
    step = int(directory.newest_checkpoint(folder).stem[5:])
    assert job.output().count(f"step {step} is saved") == 1, job.output()


def test_real_torchrun(runs, tmp_path):
    """Lightning's own launcher: `test_an_arm_of_several_devices_is_a_command_of_its_own`."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "sinkbed"]
    options, _ = of_kind("ddp")
    arguments = ["--config", str(runs / "run.yaml"), "--run_dir", str(tmp_path / "run"), *SETTINGS, *options]
    done = subprocess.run([*command, "fit", *arguments], capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 10, 6 documents") == 1
    assert points(tmp_path / "run") == points(runs / "ddp")


def test_the_attention_operator_runs_sharded_and_compiled(launch, fit):
    # One layer: what takes the time is the compiler.
    settings = ("--trainer.max_steps", "4", "--model.decoder.n_layers", "1")
    found = []
    for kind, compiled in (("one", "false"), ("one", "true"), ("fsdp2", "true")):
        folder = fit.config.parent / f"{kind}-{compiled}"
        job = launch(kind, folder, "--model.compile", compiled, *settings)
        assert set(job.finish(timeout=400)) == {0}, job.output()
        found.append(points(folder))
    for other in found[1:]:
        close(other, found[0])
