"""What a resumed run has to share with its checkpoint, and what may change."""

import copy
import dataclasses
import shutil

import pytest
import torch
import yaml

from sinkbed.data.prepare.config import PrepareConfig, TokenizerConfig
from sinkbed.data.prepare.prepare import prepare
from sinkbed.data.source.config import Source
from sinkbed.data.store.manifest import Manifest
from sinkbed.train.loop.identity import _CONFIG_KEYS, _MAY_CHANGE, check_identity, check_manifest, other_sums
from sinkbed.train.run import directory, provenance
from sinkbed.train.run.checkpoint import load_checkpoint
from tests.support.runs import points, refused, weights


def test_a_resumed_run_says_what_changed_since_its_checkpoint(fit, cut, capsys, monkeypatch):
    cut()
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    monkeypatch.setattr(provenance, "_cpu", lambda: "another")
    capsys.readouterr()
    assert fit("--ckpt_path", "last")[0] == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "since the checkpoint" in line)
    assert (
        line.startswith("since the checkpoint: ")
        and "-> another, variables None -> {'ATEN_CPU_CAPABILITY': 'default'}" in line
        and "bits will differ" in line
    )
    made = provenance.provenance(torch.device("cpu"))
    assert provenance.changes(made, made) == ""


def test_another_bos_or_manifest_is_refused_with_both_values_and_the_own_copy_stays(
    fit, cut, tiny_store, tmp_path, capsys
):
    folder = cut()
    store, before = tmp_path / "store", (folder / directory.MANIFEST).read_bytes()
    source = Source(kind="jsonl", files=(str(tiny_store.parent / "docs.jsonl"),), column="text")
    names = {"bos": "<eos>", "eos": "<bos>"}
    swapped = TokenizerConfig(path=str(tiny_store / "tokenizer.json"), **names)
    prepare(PrepareConfig(source=source, tokenizer=swapped, validation_share=0.1, out=str(store)), progress=False)
    manifest = Manifest.read(tiny_store)
    assert Manifest.read(store).bos_id == manifest.eos_id
    message = refused(capsys, fit("--data.store", str(store), "--ckpt_path", "last")[0])
    assert f"bos_id in the token store's manifest: the checkpoint has {manifest.bos_id}, " in message
    assert "eos_id in the token store's manifest" in message
    assert (folder / directory.MANIFEST).read_bytes() == before
    # Of a checkpoint that says nothing of it the run's own copy of the manifest does.
    with pytest.raises(ValueError, match=f"bos_id: expected {manifest.bos_id}, got {manifest.eos_id}"):
        check_manifest(folder, Manifest.read(store))
    # The same documents made from elsewhere are the same store.
    moved = tmp_path / "moved"
    shutil.copytree(tiny_store, moved)
    dataclasses.replace(manifest, left_out={"duplicate": 1}).write(moved)
    assert fit("--data.store", str(moved), "--ckpt_path", "last")[0] == 0
    assert (folder / directory.MANIFEST).read_bytes() == before


NO_BIT = {"data.micro_batch_size", "data.workers", "data.store", "model.activation_checkpointing"}
"""Settings of model and data that no bit of a run depends on, but the order in which sums are rounded."""


def leaves(settings, prefix=()):
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, (*prefix, key))
        else:
            yield (*prefix, key)


def test_a_change_of_any_setting_of_model_and_data_is_refused_or_said(cut):
    folder = cut()
    settings = yaml.safe_load((folder / directory.CONFIG).read_text())
    checkpoint = load_checkpoint(directory.newest_checkpoint(folder))
    saved = checkpoint["sinkbed"]
    names = {key: _CONFIG_KEYS.get(key, key) for key in saved}
    keys = {".".join(leaf) for name in ("model", "data") for leaf in leaves(settings[name], (name,))}
    decides = {".".join((names[first], *rest)) for first, *rest in leaves(saved)}
    said = {key.removeprefix("arithmetic.") for key in decides if key.startswith("arithmetic.")}
    assert len(keys) > 40 and keys - decides - said == NO_BIT
    for first, *rest in leaves(saved):
        ours = copy.deepcopy(saved)
        place = ours
        for key in (first, *rest)[:-1]:
            place = place[key]
        place[[first, *rest][-1]] = "another"
        if first in _MAY_CHANGE:
            check_identity(checkpoint, ours)
            assert first == "store" or other_sums(saved, ours).endswith("-> another")
        else:
            with pytest.raises(ValueError, match="'another'"):
                check_identity(checkpoint, ours)


CONSTANT = ("--model.optimizer.schedule", "constant")


def test_a_finished_run_at_a_constant_rate_is_trained_on_in_place(fit, capsys):
    _, longer = fit(*CONSTANT, "--trainer.max_steps", "16", run_dir="longer")
    _, folder = fit(*CONSTANT)
    capsys.readouterr()
    stay = {path.name for path in (folder / "checkpoints").glob("step-*")}
    status, _ = fit(*CONSTANT, "--trainer.max_steps", "16", "--ckpt_path", "last")
    assert stay < {path.name for path in (folder / "checkpoints").glob("step-*")}
    assert status == 0 and "was to end at step 10" in capsys.readouterr().out
    assert all(
        torch.equal(a, b) for a, b in zip(weights(folder, 16).values(), weights(longer, 16).values(), strict=True)
    )
    training = [[p for p in points(f) if "train/loss" in p] for f in (folder, longer)]
    assert training[0] == training[1] and training[0][-1]["step"] == 16
    assert directory.is_finished(folder)


def test_one_whose_steps_would_have_been_others_is_refused(fit, capsys):
    cooled = (*CONSTANT, "--model.optimizer.cooldown_steps", "4")
    _, folder = fit(*cooled)
    message = refused(capsys, fit(*cooled, "--trainer.max_steps", "16", "--ckpt_path", "last")[0])
    assert "the checkpoint has 10" in message and "its cooldown began with step 7: go on from a checkpoint" in message
    # From before its cooldown it may.
    early = str(folder / "checkpoints" / "step-0000003.ckpt")
    assert fit(*cooled, "--trainer.max_steps", "16", "--ckpt_path", early)[0] == 0
    share = (*CONSTANT, "--model.optimizer.warmup_steps", "0", "--model.optimizer.warmup_fraction", "0.25")
    fit(*share, run_dir="share")
    message = refused(capsys, fit(*share, "--trainer.max_steps", "16", "--ckpt_path", "last", run_dir="share")[0])
    assert "its warm-up, optimizer.warmup_fraction, was 2 steps and would have been 4" in message
