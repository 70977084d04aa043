"""`sinkbed probe`: the figures of `validate` for our runs, and the same through Hugging Face."""

import dataclasses
import json
import re
import shutil
import time

import pytest

from sinkbed.data import files
from sinkbed.train.cli.main import main
from sinkbed.train.measure.measures import MEASURES
from sinkbed.train.run import directory
from sinkbed.train.run.load import load_decoder, open_run
from tests.support.plain import numbers
from tests.support.runs import write_run_config

transformers = pytest.importorskip("transformers")


def probe(tmp_path, *arguments):
    path = tmp_path / "found.json"
    assert main(["probe", *map(str, arguments), "--sink_tokens", "16", "--documents", "6", "--json", str(path)]) == 0
    return json.loads(path.read_text())["sinks"]


def test_a_run_is_measured_as_validate_does(run_dir, tmp_path):
    assert main(["validate", str(run_dir), "--json", str(tmp_path / "validate.json")]) == 0
    expected = json.loads((tmp_path / "validate.json").read_text())
    found = probe(tmp_path, run_dir, "--batch_tokens", "4096")["natural"]
    for mode in ("bos", "text", "first_key_masked"):
        assert found[mode]["0"] == expected[mode]


def test_a_hugging_face_folder_gives_the_figures_of_the_run_it_came_from(run_dir, exported, tiny_store, tmp_path):
    options = ["--keys", "0", "2", "--inputs", "natural", "random", "repeated", "--length", "48"]
    ours = probe(tmp_path, run_dir, *options)
    theirs = probe(tmp_path, exported, *options, "--store", tiny_store)
    assert list(ours) == ["natural", "random", "repeated"]
    for kind, modes in ours.items():
        for mode, keys in modes.items():
            for key, one in keys.items():
                other = theirs[kind][mode][key]
                assert other["loss"] == pytest.approx(one["loss"], rel=1e-5), (kind, mode, key)
                assert other["bits_per_byte"] == pytest.approx(one["bits_per_byte"], rel=1e-5)
                assert other["rate"] == one["rate"] and other["rate_placed"] == one["rate_placed"]
                assert other["mass"] == [pytest.approx(row, abs=1e-5) for row in one["mass"]]
                assert (one["placed_key"], one["rate_placed"] is not None) == (int(key), key == "2")
    losses = {kind: ours[kind]["bos"]["0"]["loss"] for kind in ours}
    assert len(set(losses.values())) == 3, "three inputs that differ"


@pytest.mark.parametrize("name", ["prompts.txt", "prompts.jsonl"])
def test_prompts_come_from_a_file(name, exported, tmp_path):
    prompts = [f"{i}: sink bos row token mask head layer mass first key, and so on to the end." for i in range(4)]
    lines = prompts if name.endswith("txt") else [json.dumps({"text": prompt}) for prompt in prompts]
    (tmp_path / name).write_text("\n".join([*lines, ""]))
    found = probe(tmp_path, exported, "--prompts", tmp_path / name, "--modes", "text")
    assert found["natural"]["text"]["0"]["documents"] == 4


def test_prompts_are_parted_at_line_feeds_alone(tmp_path):
    from sinkbed.train.measure.texts import _prompts

    texts = ["a\u2028b", "c\x85d\x0ce", "f\rg", "h"]
    (tmp_path / "prompts.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(texts).encode() + b"\n\n")
    assert list(_prompts(tmp_path / "prompts.txt")) == texts


@pytest.mark.parametrize(
    ("option", "message"),
    [("--prompts", "--prompts: expected a file, got nothing at nowhere"), ("--store", "no token store at nowhere")],
)
def test_a_text_that_is_not_there_is_named_before_the_model_is_read(option, message, tmp_path, capsys):
    (tmp_path / "config.json").write_text("no config")
    assert main(["probe", str(tmp_path), option, "nowhere"]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "the text: expected documents to read, got none; give --prompts FILE, or --store"),
        (["--prompts", "nowhere.txt"], "--prompts: expected a file, got nothing at nowhere.txt"),
        (["--store", "STORE", "--sink_tokens", "400"], "got 47 in the longest, cropped to --length 48"),
        (["--store", "STORE", "--bos", "<none>"], "--bos: expected a token of the vocabulary of"),
        (["--store", "STORE", "--sink_tokens", "16", "--keys", "0", "15"], "--keys: expected 0 to 14, got 15"),
        (["--store", "STORE", "--keys", "-1"], "--keys: expected 0 to 62, got -1"),
        (["--store", "STORE", "--length", "-4"], "--length: expected at least 2, got -4"),
        (["--store", "STORE", "--length", "4096"], "--length: expected at most 48, the max_position_embeddings of"),
        (
            ["--store", "STORE", "--measure", "rank", "--sink_tokens", "16", "--lengths", "47", "--length", "40"],
            "--lengths: expected at most 39, the tokens of the longest document (cropped to --length 40",
        ),
        (
            ["--store", "STORE", "--measure", "streaming", "--sink_tokens", "16", "--cache", "46"],
            "cache: expected fewer keys than the longest document",
        ),
        (["--store", "STORE", "--lengths", "32"], "--lengths: expected a --measure that it applies to"),
        (["--store", "STORE", "--measure", "rank", "--lengths", "48"], "got 49; lower it"),
        (["--store", "STORE", "--change", "a", "b"], "--change: expected --prompts, whose first text holds the word"),
        (["--store", "STORE", "--checkpoints"], "--checkpoints: expected a run of ours, got"),
        (["--store", "STORE", "--wandb"], "--wandb: expected a run of ours, got"),
    ],
)
def test_what_is_missing_is_named(options, message, exported, tiny_store, capsys):
    options = [str(tiny_store) if option == "STORE" else option for option in options]
    assert main(["probe", str(exported), *options]) == 1
    captured = capsys.readouterr()
    assert message in captured.err and not captured.out, "nothing was measured before"


def test_directions_that_are_no_number_are_refused(exported, capsys):
    with pytest.raises(SystemExit):
        main(["probe", str(exported), "--directions", "few"])
    assert "--directions: expected exact, or a number of at least 4, got 'few'" in capsys.readouterr().err


ALL = ["--measure", "all", "--sink_tokens", "16", "--documents", "6", "--mixing_documents", "3", "--length", "48"]


def everything(tmp_path, *arguments):
    out = tmp_path / "report"
    assert main(["probe", *map(str, arguments), *ALL, "--out", str(out)]) == 0
    return json.loads((out / "probe.json").read_text()), out


@pytest.mark.slow
@pytest.mark.filterwarnings("error::UserWarning")
def test_every_measure_of_a_run_is_that_of_its_hugging_face_folder(run_dir, exported, tiny_store, tmp_path, capsys):
    ours, out = everything(tmp_path / "a", run_dir, "--directions", "exact", "--lengths", "16", "24")
    theirs, _ = everything(
        tmp_path / "b", exported, "--directions", "exact", "--lengths", "16", "24", "--store", tiny_store
    )
    for name in (*MEASURES.names, "positions", "streaming", "by_length"):
        expected = dict(numbers(ours[name]))
        found = dict(numbers(theirs[name]))
        assert expected.keys() == found.keys() and len(expected) > 10
        for where, value in expected.items():
            assert found[where] == pytest.approx(value, rel=2e-3, abs=1e-4), (name, *where)
    assert set(ours["by_length"]) == {"16", "24"}
    assert list(ours["states"]) == ["bos", "text", "first_key_masked"] and list(ours["streaming"]) == ["bos", "text"]
    assert {line["text"] for line in ours["states"]["bos"]["strongest_token"] if line["first"]} <= {"⟨bos⟩"}
    page = (out / "index.html").read_text()
    for name in ("sink_heads", "attention", "norms", "states", "perturbation", "mixing", "by_length", "positions"):
        assert (out / f"{name}.png").read_bytes()[:4] == b"\x89PNG" and (out / f"{name}.svg").is_file()
    assert page.count("<svg") >= 9 and "http://" not in page.replace("http://www.w3.org", "") and "https://" not in page
    header, *rows = (out / "mixing-bos.csv").read_text().splitlines()
    assert "perturbation/spread" in header.split(",") and [r.split(",")[0] for r in rows] == ["input", "0", "1"]
    assert set(ours["files"]) | {"probe.json"} == {path.name for path in out.iterdir()}
    printed = capsys.readouterr().out
    assert re.search(r"natural +bos +0 ", printed) and f"report: {out / 'index.html'}, 16 tables" in printed
    assert "by layer" not in printed, "they are in the report"
    assert "States by layer: BOS + text" in page and "With a cache of keys" in page


def test_an_earlier_report_is_replaced_whole_or_not_at_all(run_dir, tmp_path, capsys):
    out = tmp_path / "report"
    probing = ["probe", str(run_dir), "--sink_tokens", "16", "--documents", "3", "--modes", "bos", "--out", str(out)]
    assert main([*probing, "--measure", "sinks", "positions"]) == 0
    (out / "mine.txt").write_text("kept")
    assert (out / "positions.csv").is_file()
    before = (out / "probe.json").read_bytes()
    capsys.readouterr()
    assert main(probing) == 1
    captured = capsys.readouterr()
    assert "got the report of an earlier probe; choose another folder, or --force" in captured.err
    assert not captured.out and (out / "probe.json").read_bytes() == before
    assert main([*probing, "--force"]) == 0
    left = {path.name for path in out.iterdir()}
    assert left == {
        "probe.json",
        "index.html",
        "sinks.csv",
        "mine.txt",
        *(f"sink_heads.{kind}" for kind in ("svg", "pdf", "png")),
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "FILE"], "expected a folder, got a file"),
        (["--out", "OTHER"], "got other files; choose another folder"),
        (["--json", "OTHER"], "expected a file, got a folder"),
        (["--out", "FILE/x"], "which cannot be written to"),
        (["--measure", "streaming", "--modes", "first_key_masked"], "expected a mode besides first_key_masked"),
        (
            ["--measure", "rank", "--sink_tokens", "7"],
            "--sink_tokens: expected at least 8",
        ),
        (["--threads", "0"], "threads: expected at least 1, got 0"),
        (["--cache", "0"], "--cache: expected at least 1, got 0"),
        (["--prompts", "EMPTY"], "expected a document a line, got an empty file"),
    ],
)
def test_what_cannot_be_written_or_read_is_refused_before_measuring(options, message, run_dir, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine").write_text("x")
    paths = {"FILE": tmp_path / "file", "OTHER": tmp_path / "other", "EMPTY": tmp_path / "empty"}
    given = [str(paths.get(o, o)) if o != "FILE/x" else str(tmp_path / "file" / "x") for o in options]
    assert main(["probe", str(run_dir), "--sink_tokens", "16", *given]) == 1
    captured = capsys.readouterr()
    assert message in captured.err and "sink rate" not in captured.out


def test_a_word_is_changed_in_a_prompt(exported, tmp_path, capsys):
    prompt = "sink bos row token mask head layer mass first key, and so on to the end of this."
    (tmp_path / "prompts.txt").write_text(prompt + "\n")
    options = [exported, "--prompts", tmp_path / "prompts.txt", "--measure", "perturbation", "--modes", "bos", "text"]
    options += ["--sink_tokens", "16"]

    def change(old, new):
        return main(["probe", *map(str, options), "--change", old, new, "--json", str(tmp_path / "out.json")])

    assert change(",", ".") == 0
    found = json.loads((tmp_path / "out.json").read_text())["change"]
    modes = found["modes"]
    assert list(modes) == ["bos", "text"] and len(found["text"]) == 16
    at = modes["bos"]["position"]
    assert at > 0 and modes["bos"]["change"][0][at] > 0 and modes["bos"]["change"][0][:at] == [0.0] * at
    assert modes["bos"]["change"][-1][-1] > 0, "the last token feels it"
    for old, new, message in (
        ("nowhere", "there", "--change: expected a word of the first prompt"),
        (",", ", or not", "expected as many tokens, got"),
        (".", "!", "expected a word among the first 16 tokens"),
    ):
        capsys.readouterr()
        assert change(old, new) == 1
        assert message in capsys.readouterr().err


def test_all_checkpoints_of_a_run_are_measured(run_dir, tmp_path):
    path = tmp_path / "found.json"
    options = ["--sink_tokens", "16", "--documents", "6", "--modes", "bos", "--json", str(path), "--out", str(tmp_path)]
    assert main(["probe", str(run_dir), "--checkpoints", *options]) == 0
    found = json.loads(path.read_text())
    points = found["checkpoints"]["points"]
    assert [p["step"] for p in points] == sorted(p["step"] for p in points) and len(points) > 2
    assert [p["tokens"] for p in points] == [p["step"] * 4 * 48 for p in points]
    last, whole = points[-1]["modes"]["bos"], found["sinks"]["natural"]["bos"]["0"]
    assert points[-1]["step"] == 10 and last["val/loss/bos"] == whole["loss"]
    assert points[0]["modes"]["bos"]["val/loss/bos"] > last["val/loss/bos"]
    reached = [p["tokens"] for p in points if p["modes"]["bos"]["sink/rate_eps0.3/bos"] >= 10]
    assert found["checkpoints"]["onset_tokens"] == (reached[0] if reached else None)


def test_the_checkpoints_of_a_fork_with_other_batches_have_the_tokens_that_it_read(run_dir, tiny_store, tmp_path):
    config = write_run_config(tmp_path / "run.yaml", tiny_store)
    parent = run_dir / "checkpoints" / "step-0000010.ckpt"
    forked = ["--fork", str(parent), "--data.batch_size", "8", "--trainer.max_steps", "12", "--wandb.mode", "disabled"]
    assert main(["fit", "--config", str(config), *forked]) == 0
    path = tmp_path / "found.json"
    options = ["--sink_tokens", "16", "--documents", "2", "--modes", "bos", "--json", str(path)]
    assert main(["probe", str(tmp_path / "run"), "--checkpoints", *options]) == 0
    points = json.loads(path.read_text())["checkpoints"]["points"]
    assert (points[-1]["step"], points[-1]["tokens"]) == (12, (10 * 4 + 2 * 8) * 48)


def rows_of(segments, count):
    """History rows of W&B's files, once its own process has written as many as are expected, or half a minute late."""
    from sinkbed.train.run.wandb_files import read_wandb_file

    deadline = time.monotonic() + 30
    while True:
        rows = [row for segment in segments for row in read_wandb_file(segment)]
        if len(rows) >= count or time.monotonic() > deadline:
            return rows
        time.sleep(0.1)


@pytest.mark.slow
def test_a_probe_is_one_more_point_of_the_runs_wandb_history(tiny_store, tmp_path, capsys):
    config = write_run_config(tmp_path / "run.yaml", tiny_store)
    options = ["--wandb.mode", "offline"]
    assert main(["fit", "--config", str(config), *options, "--trainer.max_steps", "6"]) == 0
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text()
    probing = ["probe", str(tmp_path / "run"), *ALL, "--modes", "bos", "text", "--wandb"]
    assert main(probing) == 0
    printed = capsys.readouterr().out
    assert "States by layer: BOS + text" in printed and "With a cache of keys" in printed
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == metrics, "the record of training is left alone"
    segments = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(segments) == 2
    (row,) = rows_of(segments[1:], 1)
    assert row["probe/step"] == 6 and "trainer/global_step" not in row
    assert row["_step"] == len(metrics.splitlines()) and row["train/tokens"] == 6 * 4 * 48
    assert row["probe/natural/bos/loss"] > 0 and row["probe/bos/jacobian/others"] > 0
    assert row["probe/figure/mixing/_type"] == "image-file" and row["probe/table/sinks/_type"] == "table-file"


@pytest.mark.parametrize("killed", [False, True])
def test_probes_of_any_checkpoint_leave_the_count_of_a_resumed_run_alone(killed, tiny_store, tmp_path):
    """Two probes, one of an old checkpoint, of a run that is finished or was killed; then every point is sent once."""
    from tests.support.runs import killed_at, write_run_config

    config = write_run_config(tmp_path / "run.yaml", tiny_store)
    folder = tmp_path / "run"
    if killed:
        with killed_at(7):
            main(["fit", "--config", str(config), "--wandb.mode", "offline"])
    else:
        assert main(["fit", "--config", str(config), "--wandb.mode", "offline"]) == 0
    few = ["--sink_tokens", "16", "--documents", "3", "--modes", "bos", "--wandb"]
    for checkpoint in ("step-0000001.ckpt", "last.ckpt"):
        assert main(["probe", str(folder / "checkpoints" / checkpoint), *few]) == 0
    directory.note(folder, finished=False)
    again = ["--ckpt_path", str(folder / "checkpoints" / "step-0000003.ckpt")]
    assert main(["fit", "--config", str(folder / "config.yaml"), *again]) == 0
    points = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    segments = sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(segments) == 4
    rows = rows_of(segments, len(points) + 2)
    assert [row["_step"] for row in rows] == list(range(len(points) + 2))
    training = [row["trainer/global_step"] for row in rows if "trainer/global_step" in row]
    assert training == [point["step"] for point in points], "no point is sent twice, none left out"
    beside = [row["_step"] for row in rows if "probe/step" in row]
    assert json.loads((folder / "run.json").read_text())["beside"] == beside and len(beside) == 2


@pytest.mark.slow
def test_a_report_is_whole_in_a_browser_without_a_network(run_dir, tmp_path):
    import shutil
    import subprocess

    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium here")
    _, out = everything(tmp_path, run_dir, "--modes", "bos", "text")
    for width in (1280, 400):
        shot = tmp_path / f"{width}.png"
        done = subprocess.run(
            [browser, "--headless", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND",
             "--enable-logging=stderr", f"--window-size={width},2000", f"--screenshot={shot}", f"file://{out}/index.html"],
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert shot.is_file() and shot.stat().st_size > 20_000
        assert "CONSOLE" not in done.stderr, done.stderr


def test_a_tokenizer_without_bos_is_measured_on_text_alone(exported, tiny_store, tmp_path, capsys):
    import shutil

    shutil.copytree(exported, tmp_path / "no_bos")
    settings = tmp_path / "no_bos" / "tokenizer_config.json"
    found = json.loads(settings.read_text())
    del found["bos_token"]
    settings.write_text(json.dumps(found))
    (tmp_path / "no_bos" / "checksums.json").unlink()
    found = probe(tmp_path, tmp_path / "no_bos", "--store", tiny_store)["natural"]
    assert list(found) == ["text", "first_key_masked"]
    assert "the mode bos is left out: its tokenizer has no BOS" in capsys.readouterr().out
    options = ["--store", str(tiny_store), "--sink_tokens", "16", "--modes", "bos", "text"]
    assert main(["probe", str(tmp_path / "no_bos"), *options]) == 1
    assert "its tokenizer has no BOS" in capsys.readouterr().err
    text = probe(tmp_path, tmp_path / "no_bos", "--store", tiny_store, "--modes", "text")["natural"]["text"]["0"]
    named = probe(tmp_path, tmp_path / "no_bos", "--store", tiny_store, "--bos", "<bos>")["natural"]
    assert named["text"]["0"] == text and named["bos"]["0"]["loss"] != text["loss"]


def test_a_folder_that_is_no_model_is_named(tmp_path, capsys):
    assert main(["probe", str(tmp_path)]) == 1
    assert "expected a run directory (with config.yaml), a checkpoint inside one, a Hugging Face" in (
        capsys.readouterr().err
    )


def test_a_path_that_is_not_there_is_not_looked_for_on_the_hub(tmp_path, capsys):
    (tmp_path / "nine").mkdir()
    assert main(["probe", str(tmp_path / "none")]) == 1
    said = capsys.readouterr().err
    assert f"{tmp_path / 'none'}: expected a run directory, a checkpoint or a" in said
    assert f"did you mean {tmp_path / 'nine'}?" in said


def test_a_name_that_only_the_hub_could_know_waits_for_no_download(tmp_path, monkeypatch, capsys):
    import requests

    asked = []

    def head(url, timeout):
        asked.append(timeout)
        raise requests.ConnectTimeout

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(requests, "head", head)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert main(["probe", "rums/mine"]) == 1
    said = capsys.readouterr().err
    assert "rums/mine: expected a run directory" in said and "did you mean runs?" in said
    assert "the hub does not answer (ConnectTimeout)" in said and asked == [5]


@pytest.mark.parametrize("options", [["--length", "4096"], ["--prompts", "nowhere.txt"], ["--bos", "<none>"]])
def test_what_cannot_work_is_refused_before_weights_are_read(options, exported, tiny_store, tmp_path, capsys):
    folder = tmp_path / "no_weights"
    shutil.copytree(exported, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    assert main(["probe", str(folder), "--store", str(tiny_store), *options]) == 1
    assert options[0] in capsys.readouterr().err


def test_the_run_under_test_is_loaded_from_its_newest_checkpoint(run_dir):
    checkpoint, folder = open_run(run_dir)
    assert folder == run_dir and checkpoint["global_step"] == 10
    assert load_decoder(checkpoint)[1].first_token == "bos"


def test_a_key_of_a_prefix_lm_is_refused(tmp_path, tiny_store, capsys):
    from tests.support.runs import write_run_config

    config = write_run_config(tmp_path / "run.yaml", tiny_store)
    fit = ["fit", "--config", str(config), "--wandb.mode", "disabled", "--data.strategy.prefix_lm", "4"]
    assert main(fit) == 0
    assert probe(tmp_path, tmp_path / "run", "--modes", "text")["natural"]["text"]["0"]["placed_key"] == 0
    capsys.readouterr()
    assert main(["probe", str(tmp_path / "run"), "--sink_tokens", "16", "--keys", "0", "3"]) == 1
    captured = capsys.readouterr()
    assert "--keys: expected 0 for a prefix LM (strategy.prefix_lm=4)" in captured.err and not captured.out


SHORT = ("--measure", "sinks", "states", "rank", "--sink_tokens", "16", "--documents", "4", "--mixing_documents", "2")


def test_a_probe_that_is_interrupted_keeps_what_it_measured(run_dir, tmp_path, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    rank = dataclasses.replace(MEASURES["rank"], measure=interrupt)
    monkeypatch.setitem(MEASURES._variants, "rank", rank)
    out = tmp_path / "report"
    assert main(["probe", str(run_dir), *SHORT, "--out", str(out)]) == 130
    kept = json.loads((out / "probe.json").read_text())
    assert kept["incomplete"] == "interrupted" and set(kept["states"]) == {"bos", "text", "first_key_masked"}
    assert "sinks" in kept and "rank" not in kept
    assert "(incomplete: interrupted)</h1>" in (out / "index.html").read_text()
    said = capsys.readouterr().err
    assert "what was measured before is kept" in said
    assert "measuring states, mode bos (4 of 9, about " in said, "how far, and how long"


@pytest.mark.slow
def test_a_probe_that_is_interrupted_while_it_draws_has_its_numbers(run_dir, tmp_path, monkeypatch):
    from sinkbed.train.report import model as probe_report

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(probe_report, "draw", interrupt)
    out = tmp_path / "report"
    assert main(["probe", str(run_dir), *SHORT, "--out", str(out)]) == 130
    assert {"sinks", "states", "rank"} <= json.loads((out / "probe.json").read_text()).keys()
    monkeypatch.undo()
    assert main(["probe", str(run_dir), *SHORT, "--out", str(out)]) == 0, "what is there is no report yet"


def test_a_figure_that_is_not_finite_ends_a_probe_with_what_came_before(run_dir, tmp_path, monkeypatch, capsys):
    from sinkbed.train.measure.finite import finite

    broken = dataclasses.replace(MEASURES["states"], measure=lambda *_: finite(float("nan"), "states"))
    monkeypatch.setitem(MEASURES._variants, "states", broken)
    out = tmp_path / "found.json"
    assert main(["probe", str(run_dir), *SHORT, "--json", str(out)]) == 1
    assert "measuring states: expected finite numbers, got nan" in capsys.readouterr().err
    assert "sinks" in json.loads(out.read_text())


def test_a_report_whose_writer_was_killed_can_be_made_again_and_is_never_of_two_probes(run_dir, tmp_path, monkeypatch):

    class Killed(BaseException):
        pass

    arguments = ["probe", str(run_dir), "--sink_tokens", "16", "--documents", "4", "--out", str(tmp_path / "report")]
    assert main(arguments) == 0
    whole = {path.name for path in (tmp_path / "report").iterdir()}
    write, calls = files.write_atomic, []

    def killed(path, content):
        calls.append(path)
        if len(calls) == 3:
            (path.parent / f".{path.name}.abcdefgh.partial").write_text("half")
            raise Killed
        write(path, content)

    monkeypatch.setattr(files, "write_atomic", killed)
    with pytest.raises(Killed):
        main([*arguments, "--force", "--documents", "2"])
    left = {path.name for path in (tmp_path / "report").iterdir()}
    assert "index.html" not in left, "the page of the probe before is gone with its figures"
    monkeypatch.undo()
    assert main(arguments) == 0, "without --force: what is there is no report"
    assert {path.name for path in (tmp_path / "report").iterdir()} == whole
