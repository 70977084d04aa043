"""A run's W&B history: whose it is, what its segments hold, and what is sent again."""

import json
import pwd
import shutil
import time

import pytest

from sinkbed.data.files import write_json
from sinkbed.train.cli.main import main
from sinkbed.train.loop.identity import identify
from sinkbed.train.run import directory
from sinkbed.train.run.wandb import shortened
from sinkbed.train.run.wandb_files import mend_wandb_files, read_wandb_file, wandb_records
from tests.support.runs import points, refused


def test_a_copied_run_is_another_to_wandb_and_goes_on_from_its_own_checkpoints(fit, cut, capsys):
    original = cut()
    copy = original.with_name("copy")
    shutil.copytree(original, copy, symlinks=True)
    before = {p: p.read_bytes() for p in original.rglob("*") if p.is_file() and "wandb" not in p.parts}
    capsys.readouterr()
    with pytest.warns(UserWarning, match=f"{copy} is a copy of the run {original}: it goes on from its own"):
        assert main(["fit", "--config", str(copy / directory.CONFIG), "--ckpt_path", "last"]) == 0
    assert f"names {original}, but was moved or copied: the run goes on in {copy}" in capsys.readouterr().out
    assert before == {p: p.read_bytes() for p in original.rglob("*") if p.is_file() and "wandb" not in p.parts}
    ours, theirs = (directory.read_json(folder / directory.RUN)["wandb_id"] for folder in (copy, original))
    assert ours != theirs
    [segment] = copy.glob(f"wandb/offline-run-*/run-{ours}.wandb")
    assert len(list(read_wandb_file(segment))) == len(points(copy)) > 10
    # Its older checkpoints still name the other run; the copy keeps its id.
    early = copy / "checkpoints" / "step-0000003.ckpt"
    assert main(["fit", "--config", str(copy / directory.CONFIG), "--ckpt_path", str(early)]) == 0
    assert directory.read_json(copy / directory.RUN)["wandb_id"] == ours
    # A run that is moved stays the same run.
    moved = original.rename(original.with_name("moved"))
    assert main(["fit", "--config", str(moved / directory.CONFIG), "--ckpt_path", "last"]) == 0
    assert directory.read_json(moved / directory.RUN)["wandb_id"] == theirs


def test_which_of_two_run_directories_is_the_copy_is_known_in_either_order(tmp_path):
    def started(name):
        known, _ = identify(tmp_path / name, {}, None, {}, anew=False, session={})
        return known["wandb_id"]

    (tmp_path / "a").mkdir()
    first = started("a")
    for name in ("b", "d", "e"):
        shutil.copytree(tmp_path / "a", tmp_path / name)
    (tmp_path / "a").rename(tmp_path / "c")
    assert started("b") != first, "copied, then the original was moved"
    (tmp_path / "d").rename(tmp_path / "a")
    assert started("c") == first, "moved, then a copy was put in its place"
    # A backup that is put back where it was, and a run.json of earlier versions, say nothing of it.
    shutil.rmtree(tmp_path / "c")
    (tmp_path / "e").rename(tmp_path / "c")
    record = directory.read_json(tmp_path / "c" / directory.RUN) | {"folder": str(tmp_path / "c")}
    write_json(tmp_path / "c" / directory.RUN, record)
    assert started("c") == first


def test_a_user_without_a_name_or_a_home_has_a_wandb_run(fit, monkeypatch, recwarn):
    def nobody(uid):
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    for name in ("HOME", "USER", "LOGNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_DIR", "")
    status, folder = fit()
    assert status == 0 and list(folder.glob("wandb/offline-run-*/run-*.wandb"))
    assert not [w for w in recwarn if "W&B" in str(w.message)]


def test_what_is_too_long_for_wandb_is_shortened_and_what_it_refuses_is_refused_first(fit, capsys, recwarn):
    long = ("--wandb.tags", json.dumps(["t" * 200]), "--wandb.name", "n" * 300, "--wandb.group", "g" * 300)
    status, folder = fit(*long)
    assert status == 0 and list(folder.glob("wandb/offline-run-*/run-*.wandb"))
    assert not [w for w in recwarn if "W&B" in str(w.message)]
    assert len(shortened("t" * 200, 64)) == 64 and shortened("t" * 199, 64) != shortened("t" * 200, 64)
    for wrong in (("--wandb.project", "a/b"), ("--wandb.tags", '[""]')):
        try:
            status, other = fit(*wrong, run_dir="other")
        except SystemExit as stop:
            status, other = stop.code, folder.with_name("other")
        assert f"{wrong[0][2:]}: expected" in refused(capsys, status) and not other.exists()


def written(folder):
    """The one W&B file of a run, once W&B's process has written every point to it."""
    [segment] = folder.glob("wandb/offline-run-*/run-*.wandb")
    deadline = time.monotonic() + 30
    while len(list(read_wandb_file(segment))) < len(points(folder)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return segment


def test_a_flipped_bit_in_a_segment_is_named_and_the_points_are_sent_again(fit, cut):
    folder = cut()
    segment = written(folder)
    content = bytearray(segment.read_bytes())
    ends = [end for _, end in wandb_records(bytes(content))]
    content[(ends[len(ends) // 2] + ends[len(ends) // 2 + 1]) // 2] ^= 4
    segment.write_bytes(content)
    kept = len(list(read_wandb_file(segment)))
    assert 0 < kept < len(points(folder))
    with pytest.warns(UserWarning, match=f"{segment}: damaged, what stands at byte"):
        assert fit("--ckpt_path", "last")[0] == 0
    rows = [row for f in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")) for row in read_wandb_file(f)]
    assert [row["_step"] for row in rows] == list(range(len(points(folder))))
    assert segment.with_name(f"{segment.name}.damaged").read_bytes() == content


def test_every_bit_of_a_segment_is_looked_at(cut, tmp_path):
    content = written(cut()).read_bytes()
    ends = [end for _, end in wandb_records(content)]
    assert len(ends) > 10
    for at in range(0, len(content), max(1, len(content) // 300)):
        folder = tmp_path / f"offline-run-{at}"
        folder.mkdir()
        path = folder / "run-x.wandb"
        path.write_bytes(content[:at] + bytes([content[at] ^ 16]) + content[at + 1 :])
        message = mend_wandb_files([path])
        # In a length, the file seems to break off; then it is cut there as after a kill.
        left = [end for _, end in wandb_records(path.read_bytes())] if path.exists() else []
        assert left == [end for end in ends if end <= at][: len(left)] and len(left) < len(ends), at
        assert message is None or str(path) in message


def test_a_changed_wandb_id_does_not_make_a_second_run(fit, cut):
    path = cut() / directory.RUN
    known = directory.read_json(path)
    write_json(path, {**known, "wandb_id": "f" + known["wandb_id"][1:] + "0"})
    with pytest.warns(UserWarning, match=rf"expected the W&B id {known['wandb_id']}, got f\w+; taken from"):
        assert fit("--ckpt_path", "last")[0] == 0
    assert directory.read_json(path)["wandb_id"] == known["wandb_id"]
