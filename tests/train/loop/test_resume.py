"""What a resumed, split or forked run shares with the run it comes from."""

import pytest
import torch

from sinkbed.data.store.token_store import TokenStore
from sinkbed.train.loop.callbacks.sinks import SinkMonitor
from sinkbed.train.loop.optim import parameter_groups
from sinkbed.train.loop.optimizers import OPTIMIZERS
from sinkbed.train.measure.sinks import ModeResult
from sinkbed.train.report.result import load_result
from sinkbed.train.run import directory
from sinkbed.train.run.checkpoint import load_checkpoint
from sinkbed.train.run.directory import kept_steps
from sinkbed.train.run.wandb_files import read_wandb_file
from tests.support.runs import equal, killed_at, points, refused, training_state, weights


def test_a_run_stopped_thrice_and_across_an_epoch_is_the_uninterrupted_run(fit, tiny_store):
    # Rows so long that ten steps of four rows are more than two epochs.
    long_rows = ("--data.context_length", "800", "--checkpoint_every", "2")
    _, whole = fit(*long_rows, run_dir="whole")
    rows = directory.read_json(whole / directory.AUDIT)["rows_per_epoch"]
    assert rows < 4 * 9 and TokenStore.open(tiny_store).tokens > 800
    for step in (3, 5, 8):
        with killed_at(step):
            fit(*long_rows, "--ckpt_path", "auto", run_dir="cut")
    assert fit(*long_rows, "--ckpt_path", "auto", run_dir="cut")[0] == 0
    cut = whole.parent / "cut"
    assert points(cut) == points(whole)
    assert equal(training_state(cut, 10), training_state(whole, 10))
    segments = sorted(cut.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(segments) == 4
    tracked = [row["_step"] for segment in segments for row in read_wandb_file(segment)]
    assert tracked == list(range(len(points(whole))))


@pytest.mark.parametrize("micro_batch_size", ["1", "2"])
def test_a_run_resumed_with_other_micro_batches_sees_the_same_rows(fit, monkeypatch, capsys, micro_batch_size):
    from sinkbed.data.pack.batches import Rows

    seen = []
    original = Rows.__getitems__
    monkeypatch.setattr(
        Rows, "__getitems__", lambda self, n: seen.extend((self.store.split, i) for i in n) or original(self, n)
    )
    document = ("--data.strategy.mask", "intra_document")  # targets that do not count make micro-batches unequal
    _, whole = fit(*document, run_dir="whole")
    expected = [i for split, i in seen if split == "train"]
    seen.clear()
    with killed_at(7):
        fit(*document, run_dir="cut")
    before = [i for split, i in seen if split == "train"]
    assert before[:28] == expected[:28]
    seen.clear()
    cut = fit(*document, "--data.micro_batch_size", micro_batch_size, "--ckpt_path", "last", run_dir="cut")[1]
    assert "micro-batches a step 1 -> " in capsys.readouterr().out
    assert [i for split, i in seen if split == "train"][:24] == expected[16:40]
    for ours, theirs in zip(points(cut), points(whole), strict=True):
        assert ours["step"] == theirs["step"]
        if "train/loss" in ours:
            assert ours["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-5)
            assert ours["train/grad_norm"] == pytest.approx(theirs["train/grad_norm"], rel=1e-3)


def test_the_loss_and_gradient_of_a_step_are_the_mean_over_its_targets(fit):
    # The last token of a document has no target: every row counts another number.
    settings = ("--data.strategy.mask", "intra_document")
    _, whole = fit(*settings, run_dir="whole")
    _, parts = fit(*settings, "--data.micro_batch_size", "1", run_dir="parts")
    ours, theirs = (next(p for p in points(f) if "train/loss" in p) for f in (parts, whole))
    assert ours["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-6)
    assert ours["train/grad_norm"] == pytest.approx(theirs["train/grad_norm"], rel=1e-5)


def test_activation_checkpointing_changes_no_bit(fit):
    _, plain = fit(run_dir="plain")
    _, again = fit("--model.activation_checkpointing", "true", run_dir="again")
    assert points(plain) == points(again)
    assert equal(weights(plain, 10), weights(again, 10))


def test_kept_checkpoints_are_log_spaced_with_the_newest_and_the_best(fit, monkeypatch):
    assert kept_steps(4, 1000) == {1, 10, 100, 1000}
    assert kept_steps(0, 10) == set() and kept_steps(1, 10) == {1}
    losses = {4: 3.0, 8: 1.0, 12: 2.0}
    monkeypatch.setattr(SinkMonitor, "loss_at", lambda self, step: losses.get(step))
    _, folder = fit("--trainer.max_steps", "24", "--checkpoint_points", "3", "--checkpoint_every", "7")
    steps = {int(path.stem[5:]) for path in (folder / "checkpoints").glob("step-*.ckpt")}
    assert steps == {1, 5, 24} | {8}
    assert (folder / "checkpoints" / "last.ckpt").resolve().name == "step-0000024.ckpt"


def test_a_lost_link_does_not_lose_the_run(fit, cut):
    (cut() / "checkpoints" / "last.ckpt").unlink()
    assert fit()[0] == 1, "a run is there"
    assert fit("--ckpt_path", "last")[0] == 0


def test_a_copy_that_followed_the_link_goes_on(fit, cut):
    """Regression: last.ckpt was replaced by a link to itself."""
    saved = cut() / "checkpoints"
    content = (saved / "last.ckpt").read_bytes()
    for path in saved.iterdir():
        path.unlink()
    (saved / "last.ckpt").write_bytes(content)
    cut("--ckpt_path", "last")
    assert (saved / "last.ckpt").is_symlink() and (saved / "last.ckpt").read_bytes() == content
    assert fit("--ckpt_path", "last")[0] == 0


def test_what_a_user_puts_beside_the_checkpoints_stays(fit, cut):
    """Regression: a copied checkpoint ended the run at the next save, and hidden files were removed."""
    saved = cut() / "checkpoints"
    (saved / "step-0000003-keep.ckpt").write_text("")
    (saved / ".notes").mkdir()
    (saved / ".step-0000009.ckpt").write_text("half")
    assert fit("--ckpt_path", "last")[0] == 0
    assert (saved / "step-0000003-keep.ckpt").exists() and (saved / ".notes").exists()
    assert not (saved / ".step-0000009.ckpt").exists()


@pytest.mark.parametrize("name", [directory.CONFIG, directory.MANIFEST, directory.METRICS])
def test_a_folder_of_other_files_is_no_place_for_a_run(fit, capsys, name):
    folder = fit.config.parent / "run"
    folder.mkdir()
    (folder / name).write_text("mine")
    assert f"got a folder with a {name} that is no run's" in refused(capsys, fit()[0])
    assert [path.name for path in folder.iterdir()] == [name] and (folder / name).read_text() == "mine"


DAMAGE = {
    "a flipped byte": lambda b: b[:200] + bytes([b[200] ^ 1]) + b[201:],
    "a missing line": lambda b: b[b.index(b"\n") + 1 :],
    "cut short": lambda b: b[:300],
    "no file": None,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_metrics_are_restored_from_the_checkpoint(fit, damage, recwarn):
    _, whole = fit(run_dir="whole")
    with killed_at(7):
        fit(run_dir="cut")
    path = whole.parent / "cut" / directory.METRICS
    before = path.read_bytes()
    path.unlink()
    if DAMAGE[damage] is not None:
        path.write_bytes(DAMAGE[damage](before))
    _, cut = fit("--ckpt_path", "last", run_dir="cut")
    assert points(cut) == points(whole)
    [message] = [str(w.message) for w in recwarn if str(path) in str(w.message)]
    assert "restored from" in message
    kept = cut / f"{directory.METRICS}.damaged"
    assert kept.exists() == (damage in ("a flipped byte", "a missing line")), "what is only short is in the checkpoint"
    if kept.exists():
        assert kept.read_bytes() == DAMAGE[damage](before)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"{}", b'{"wandb_id": 1}', None])
def test_a_damaged_run_json_is_restored_from_the_checkpoint(fit, content):
    with killed_at(7):
        fit()
    path = fit.config.parent / "run" / directory.RUN
    before = directory.read_json(path)["wandb_id"]
    path.unlink()
    if content is not None:
        path.write_bytes(content)
        with pytest.warns(UserWarning, match=r"run\.json.*taken from the checkpoint"):
            assert fit("--ckpt_path", "last")[0] == 0
    else:
        assert fit("--ckpt_path", "last")[0] == 0
    assert directory.read_json(path)["wandb_id"] == before


def test_a_run_started_again_with_other_settings_before_its_first_checkpoint_is_another_to_wandb(fit):
    ids = []
    for extra in ((), (), ("--model.optimizer.lr", "2e-2")):
        with killed_at(0):
            fit(*extra)
        ids.append(directory.read_json(fit.config.parent / "run" / directory.RUN)["wandb_id"])
    assert ids[0] == ids[1] != ids[2]


def test_going_back_to_an_earlier_checkpoint_is_kept_to(fit, capsys, recwarn):
    """Killed before its next save, the run goes on from where the user went back to, not from the later ones."""
    _, folder = fit()
    with killed_at(3):
        fit("--ckpt_path", str(folder / "checkpoints" / "step-0000003.ckpt"))
    capsys.readouterr()
    assert fit("--ckpt_path", "auto")[0] == 0
    assert "at step 3 of 10" in capsys.readouterr().out
    assert not (folder / f"{directory.METRICS}.damaged").exists()


def test_points_of_another_cadence_reach_wandb(fit):
    """W&B has points beyond the checkpoint; those made again are fewer, and the later ones are sent all the same."""
    with killed_at(7):
        fit()
    other = ("--trainer.log_every_n_steps", "2", "--measure.live_points", "2", "--ckpt_path", "last")
    _, folder = fit(*other)
    segments = sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))
    first, second = (list(read_wandb_file(segment)) for segment in segments)
    reached = first[-1]["trainer/global_step"]
    assert reached == 7 and "train/loss" in first[-1]
    later = [p["step"] for p in points(folder) if p["step"] > reached]
    assert 8 in later and later[-2:] == [10, 10], "trained and measured at the last step"
    assert [row["trainer/global_step"] for row in second] == later
    assert [row["_step"] for row in second] == list(range(len(first), len(first) + len(second)))


@pytest.mark.parametrize("change", ["documents", "vocabulary"])
def test_resuming_on_another_token_store_is_refused(fit, tiny_store, tmp_path, capsys, change):
    from sinkbed.data.prepare.config import PrepareConfig, TokenizerConfig
    from sinkbed.data.prepare.prepare import prepare
    from sinkbed.data.source.config import Source

    with killed_at(7):
        fit()
    lines = (tiny_store.parent / "docs.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "docs.jsonl").write_text("".join(lines if change == "vocabulary" else lines[:-1]))
    tokenizer = (
        TokenizerConfig(vocab_size=290)
        if change == "vocabulary"
        else TokenizerConfig(path=str(tiny_store / "tokenizer.json"))
    )
    source = Source(kind="jsonl", files=(str(tmp_path / "docs.jsonl"),), column="text")
    out = tmp_path / "other"
    prepare(PrepareConfig(source=source, tokenizer=tokenizer, validation_share=0.1, out=str(out)), progress=False)
    message = refused(capsys, fit("--data.store", str(out), "--ckpt_path", "last")[0])
    assert "sha256 of the token store's documents" in message and "another run_dir" in message
    named = "sha256 of the token store's tokenizer" in message and "vocabulary: the checkpoint has 300" in message
    assert named == (change == "vocabulary")
    assert fit("--ckpt_path", "last")[0] == 0


def test_another_precision_is_another_run(fit, capsys):
    with killed_at(7):
        fit()
    message = refused(capsys, fit("--trainer.precision", "64-true", "--ckpt_path", "last")[0])
    assert "trainer.precision: the checkpoint has '32-true', this configuration '64-true'" in message


def test_a_fork_is_a_new_run_with_settings_of_its_own_that_names_its_parent(fit):
    _, parent = fit(run_dir="parent")
    checkpoint = parent / "checkpoints" / "step-0000003.ckpt"
    same = ("--fork", str(checkpoint))
    status, twin = fit(*same, run_dir="twin")
    assert status == 0
    # With the parent's settings it takes the parent's steps.
    later = [p for p in points(parent) if p["step"] > 3]
    assert [p for p in points(twin) if "train/loss" in p] == [p for p in later if "train/loss" in p]
    assert equal(weights(twin, 10), weights(parent, 10))
    theirs, ours = (directory.read_json(folder / directory.RUN) for folder in (parent, twin))
    assert ours["wandb_id"] != theirs["wandb_id"]
    assert ours["parent"] == {"checkpoint": str(checkpoint), "step": 3, "wandb_id": theirs["wandb_id"]}
    # A run stands for its newest checkpoint, of step 10.
    status, longer = fit("--fork", str(parent), "--trainer.max_steps", "12", run_dir="longer")
    assert status == 0 and directory.read_json(longer / directory.RUN)["parent"]["step"] == 10
    # Another learning rate, length and strategy: rows from the first of its own order, tokens counted on.
    other = ("--model.optimizer.lr", "1e-3", "--trainer.max_steps", "12", "--data.strategy.first_token", "none")
    status, fork = fit(*same, *other, run_dir="fork")
    assert status == 0
    first = next(p for p in points(fork) if "train/loss" in p)
    assert first["step"] == 4 and first["train/tokens"] == 4 * 4 * 48
    assert first["train/lr"] == pytest.approx(0.978e-3, rel=1e-3)  # cosine, 1 of 10 steps after the warm-up
    assert training_state(fork, 12)["TokenData"]["rows_consumed"] == 9 * 4
    assert training_state(twin, 10)["TokenData"]["rows_consumed"] == 10 * 4
    # A fork is resumed like any run.
    (fork / directory.MEASUREMENT).unlink()
    assert fit(*same, *other, "--ckpt_path", "last", run_dir="fork")[0] == 0


def test_a_fork_begins_with_a_measurement_and_has_no_onset_where_its_sink_was_there(fit, monkeypatch):
    own = ModeResult.metrics
    monkeypatch.setattr(ModeResult, "metrics", lambda self, mode: own(self, mode) | {f"sink/rate_eps0.3/{mode}": 50.0})
    _, parent = fit(run_dir="parent")
    assert directory.read_json(parent / directory.MEASUREMENT)["onset_tokens"] > 0
    status, fork = fit("--fork", str(parent / "checkpoints" / "step-0000003.ckpt"), run_dir="fork")
    assert status == 0 and next(p["step"] for p in points(fork) if "sink/rate_eps0.3/bos" in p) == 3
    assert directory.read_json(fork / directory.MEASUREMENT)["onset_tokens"] is None
    for folder, found in ((parent, True), (fork, False)):
        (folder / directory.MEASUREMENT).unlink()
        assert (load_result(folder, "a", 0).final["onset_tokens"] is not None) == found, "also while it runs"


def test_a_fork_with_another_optimizer_leaves_what_the_old_one_kept_behind(fit, monkeypatch):
    class Toy(torch.optim.SGD):
        state_tensors, shards = 1, True

        def __init__(self, model, config):
            super().__init__(parameter_groups(model, config), lr=config.lr, momentum=0.5)

    monkeypatch.setitem(OPTIMIZERS._variants, "toy", Toy)
    _, parent = fit(run_dir="parent")
    checkpoint = str(parent / "checkpoints" / "step-0000003.ckpt")
    status, fork = fit("--fork", checkpoint, "--model.optimizer.name", "toy", run_dir="fork")
    assert status == 0
    [state] = load_checkpoint(fork / "checkpoints" / "last.ckpt")["optimizer_states"]
    assert {key for kept in state["state"].values() for key in kept} == {"momentum_buffer"}
    assert all("betas" not in group and group["momentum"] == 0.5 for group in state["param_groups"])


def available(name):
    if name in ("lion", "soap"):
        pytest.importorskip("pytorch_optimizer")
    return ("--model.optimizer.name", name, "--model.optimizer.lr", "1e-3")


def interrupted(fit, *options):
    """A run's folder, and that of one that was killed and resumed, with the same weights and points."""
    _, whole = fit(*options, run_dir="whole")
    with killed_at(7):
        fit(*options, run_dir="cut")
    status, cut = fit(*options, "--ckpt_path", "last", run_dir="cut")
    assert status == 0 and points(cut) == points(whole)
    assert equal(training_state(cut, 10), training_state(whole, 10))
    [first, *_, last] = [p for p in points(whole) if "train/loss" in p]
    assert last["train/loss"] < first["train/loss"]
    return whole


@pytest.mark.parametrize("name", ["muon", "soap"])
def test_a_run_under_any_optimizer_is_resumed_bit_for_bit(fit, name):
    whole = interrupted(fit, *available(name))
    logged = [p for p in points(whole) if "train/loss" in p]
    rates = [p["train/lr"] for p in logged]
    assert len(rates) == 10 and logged[-1]["train/accumulated_decay"] == pytest.approx(0.1 * sum(rates))


def test_a_run_in_bfloat16_is_resumed_bit_for_bit(fit, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    interrupted(fit, "--trainer.precision", "bf16-mixed")


@pytest.mark.parametrize(("before", "after"), [("adamw", "muon"), ("soap", "soap")])
def test_a_fork_may_have_an_optimizer_with_other_groups(fit, before, after):
    _, parent = fit(*available(before), run_dir="parent")
    checkpoint = str(parent / "checkpoints" / "step-0000003.ckpt")
    status, fork = fit("--fork", checkpoint, *available(after), run_dir="fork")
    assert status == 0
    [state] = load_checkpoint(fork / "checkpoints" / "last.ckpt")["optimizer_states"]
    parameters = [name for group in state["param_groups"] for name in group["params"]]
    assert sorted(parameters) == sorted({*parameters} & {*state["state"]}), "each once, with a state of its own"
    same = equal(weights(fork, 10), weights(parent, 10))
    assert same == (before == after)


def test_a_fork_into_another_model_is_refused(fit, capsys):
    _, parent = fit(run_dir="parent")
    checkpoint = str(parent / "checkpoints" / "step-0000003.ckpt")
    status, folder = fit("--fork", checkpoint, "--model.decoder.n_layers", "3", run_dir="fork")
    assert (
        "--fork" in (message := refused(capsys, status)) and "model.decoder.n_layers: the checkpoint has 2" in message
    )
    status, folder = fit("--fork", checkpoint, "--trainer.max_steps", "3", run_dir="fork")
    assert "above the checkpoint's step 3" in refused(capsys, status)
    assert not folder.exists()
