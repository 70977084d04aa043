"""`sinkbed runs` and `sinkbed generate`: what is there, and what it writes."""

import json
import shutil

import pytest
import torch

from sinkbed.train.cli.main import main
from sinkbed.train.cli.runs import described, run_directories, state
from sinkbed.train.run import directory
from tests.support.runs import write_run_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_store):
    """A folder with a finished run, a copy that has no end yet, and a damaged one."""
    folder = tmp_path_factory.mktemp("runs")
    config = write_run_config(folder / "run.yaml", tiny_store)
    options = ["--wandb.mode", "disabled", "--trainer.max_steps", "4", "--run_dir", str(folder / "study/runs/a")]
    assert main(["fit", "--config", str(config), *options]) == 0
    shutil.copytree(folder / "study/runs/a", folder / "stopped")
    (folder / "stopped" / directory.MEASUREMENT).unlink()
    shutil.copytree(folder / "study/runs/a", folder / "damaged")
    (folder / "damaged" / directory.CONFIG).write_text("[1, 2]")
    return folder


def test_every_run_has_a_line(folder, capsys):
    assert [str(path.relative_to(folder)) for path in run_directories(folder)] == ["damaged", "stopped", "study/runs/a"]
    assert main(["runs", str(folder)]) == 0
    captured = capsys.readouterr()
    assert captured.out.count("damaged") == 2 and captured.out.count("study/runs/a") == 1
    assert captured.err.startswith("damaged: ") and "config.yaml: expected YAML with keys" in captured.err
    line = described(folder / "study/runs/a", folder)
    points = [json.loads(line) for line in (folder / "study/runs/a" / directory.METRICS).read_text().splitlines()]
    losses = [point["train/loss"] for point in points if "train/loss" in point]
    assert line == {
        "run": "study/runs/a", "state": "finished", "saved": "4", "step": "4 of 4", "tokens": "768",
        "loss": f"{losses[-1]:.3f}", "val. loss": line["val. loss"], "sink %": line["sink %"],
    }  # fmt: skip
    assert float(line["val. loss"]) > 0 and described(folder / "stopped", folder)["state"] == "stopped"


def test_a_run_that_is_written_to_is_running(folder):
    """A lock of another process: this one's own would not hinder it."""
    import subprocess
    import sys

    code = f"from sinkbed.train.run import directory as d; held = d.lock(d.Path({str(folder / 'stopped')!r})); "
    code += "print(1); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "1\n"
        assert state(folder / "stopped") == "running"
        process.communicate("\n")
    assert state(folder / "stopped") == "stopped"


def test_a_folder_without_runs_is_told_so(tmp_path, capsys):
    assert main(["runs", str(tmp_path)]) == 1
    assert f"{tmp_path}: expected runs, got none; start one" in capsys.readouterr().err
    assert main(["runs", str(tmp_path / "none")]) == 1
    assert "expected a folder with runs, got none there" in capsys.readouterr().err


def test_a_run_writes_what_its_logits_say(folder, capsys):
    """Greedily: each token is the likeliest after BOS, the prompt and the tokens before it."""
    from sinkbed.data.store.token_store import TokenStore
    from sinkbed.train.run.load import load_decoder, open_run

    run = folder / "study/runs/a"
    assert main(["generate", str(run), "--prompt", "sink row", "--tokens", "5", "--temperature", "0"]) == 0
    written = capsys.readouterr().out
    checkpoint, _ = open_run(run)
    decoder, _ = load_decoder(checkpoint)
    tokenizer = TokenStore.open(checkpoint["sinkbed"]["store"]).tokenizer()
    ids = [tokenizer.bos_id, *tokenizer.encode("sink row")]
    for _ in range(5):
        with torch.no_grad():
            ids.append(int(decoder(torch.tensor([ids])).logits[0, -1].argmax()))
    assert written.rstrip("\n") == tokenizer.decode(ids[1:]).rstrip("\n")


def test_a_seed_decides_what_is_drawn_and_a_long_text_moves_its_window(folder, capsys):
    run, texts = folder / "study/runs/a", []
    for seed in ("1", "1", "2"):
        assert main(["generate", str(run), "--tokens", "60", "--seed", seed, "--top_k", "40"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    for temperature in ("0", "1e-300"):
        assert main(["generate", str(run), "--tokens", "9", "--temperature", temperature]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[-1] == texts[-2]


def test_a_text_as_long_as_the_learned_positions_leaves_room_for_all_that_stands_before_it(tiny_store, tmp_path):
    config = write_run_config(tmp_path / "run.yaml", tiny_store)
    of_run = ["--wandb.mode", "disabled", "--trainer.max_steps", "3", "--data.strategy.first_token", "[bos, bos]"]
    positions = ["--model.decoder.position", "{learned: {length: 48}}"]  # as many as a row has tokens
    modes = ["--measure.modes", "[bos]", "--measure.live_modes", "[bos]"]
    assert main(["fit", "--config", str(config), *of_run, *positions, *modes]) == 0
    greedy = ["--tokens", "60", "--temperature", "0"]
    assert main(["generate", str(tmp_path / "run"), "--mode", "as_trained", *greedy]) == 0


def test_a_run_whose_points_are_of_another_kind_hides_no_other(folder, tmp_path):
    shutil.copytree(folder / "study/runs/a", tmp_path / "a")
    with (tmp_path / "a" / directory.METRICS).open("a") as file:
        file.write('{"step": 5, "train/loss": [1]}\n')
    assert described(tmp_path / "a", tmp_path)["state"] == "damaged"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mode", "text"], "--prompt: expected text for a model with no first token"),
        (["--tokens", "0"], "--tokens: expected at least 1, got 0"),
        (["--seed", "-1"], "--seed: expected at least 0 and less than 9.22337e+18, got -1"),
        (["--temperature", "nan"], "--temperature: expected at least 0, got nan"),
    ],
)
def test_what_cannot_be_written_is_told_so(options, message, folder, capsys):
    assert main(["generate", str(folder / "study/runs/a"), *options]) == 1
    assert message in capsys.readouterr().err
