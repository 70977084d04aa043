"""`sinkbed probe` of several models: each as alone, side by side on one page."""

import gc
import json
import re
import shutil
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest

from sinkbed.model import Decoder
from sinkbed.train.cli import probe
from sinkbed.train.cli.main import main
from sinkbed.train.measure.config import MeasureConfig
from sinkbed.train.measure.models import shared_texts, short_names
from sinkbed.train.report import model as report
from sinkbed.train.report.models import answer, results_of

pytest.importorskip("transformers")
FEW = ("--sink_tokens", "16", "--documents", "5", "--modes", "bos", "text")


@pytest.fixture
def copy(exported, tmp_path):
    """Make a copy of the Hugging Face folder, perhaps without its weights."""

    def call(name, weights=True):
        ignored = () if weights else ("*.safetensors",)
        return str(shutil.copytree(exported, tmp_path / name, ignore=shutil.ignore_patterns(*ignored)))

    return call


@pytest.fixture
def prompts(tmp_path):
    """A file of two texts."""
    (tmp_path / "texts.txt").write_text("sink bos row token mask head layer first key. sink bos row token mask\n" * 2)
    return str(tmp_path / "texts.txt")


@pytest.fixture
def plain_pages(monkeypatch):
    """Leave out figures, which take most of the time."""

    def call(makers=("sinkbed.train.report.model.pictures", "sinkbed.train.report.models._pictures")):
        for maker in makers:
            monkeypatch.setattr(maker, lambda _: [])

    return call


def test_each_model_is_measured_as_alone_and_put_side_by_side(
    run_dir, exported, tiny_store, tmp_path, capsys, plain_pages
):
    models, out = [str(run_dir), str(exported)], tmp_path / "out"
    options = [*FEW, "--store", str(tiny_store)]
    plain_pages(["sinkbed.train.report.model.pictures"])
    assert main(["probe", *models, *options, "--out", str(out), "--json", str(tmp_path / "all.json")]) == 0
    printed = capsys.readouterr().out
    record = json.loads((out / "probe.json").read_text())
    assert record["models"] == json.loads((tmp_path / "all.json").read_text())["models"] and record["missing"] == {}
    assert record["folders"] == {"run": "1-run", "model": "2-model"}
    page = (out / "index.html").read_text()
    links = re.findall(r'<a href="([^"]*)">', page)
    assert links == ["1-run/index.html", "2-model/index.html"] and all((out / link).is_file() for link in links)
    for name, model in zip(record["models"], models, strict=True):
        assert main(["probe", model, *options, "--json", str(tmp_path / "one.json")]) == 0
        expected = json.loads((tmp_path / "one.json").read_text())
        below = json.loads((out / record["folders"][name] / "probe.json").read_text())
        for part in ("model", "documents", "versions", "sinks"):
            assert record["models"][name][part] == expected[part] == below[part]
        loss, bits = (expected["sinks"]["natural"]["text"]["0"][key] for key in ("loss", "bits_per_byte"))
        assert re.search(rf"(?m)^ +text +{name} .* {loss:.3f} +{bits:.3f}", printed)
    results = results_of(record["models"])
    rates = {(r.arm, mode): r.value(mode, "0.3") for r in results for mode in ("bos", "text")}
    said = answer(results)
    assert said in page and all(f"{rate:.1f}\N{NO-BREAK SPACE}% in {name}" in said for (name, _), rate in rates.items())
    for part in ("BOS + text", "Sink rate by relative depth", "compare across tokenizers", "same length of text"):
        assert part in page


def test_a_model_that_fails_loses_nothing_of_the_others(run_dir, copy, tiny_store, tmp_path, capsys, plain_pages):
    plain_pages()
    out = tmp_path / "out"
    models = [copy("first"), copy("broken", weights=False), str(run_dir)]
    probing = ["probe", *models, *FEW, "--store", str(tiny_store), "--out", str(out)]
    assert main(probing) == 1
    captured = capsys.readouterr()
    assert "sinkbed probe: broken: " in captured.err and "Traceback" not in captured.err
    record = json.loads((out / "probe.json").read_text())
    assert list(record["models"]) == ["first", "run"] and list(record["missing"]) == ["broken"]
    page = (out / "index.html").read_text()
    assert "Nothing of broken: " in page and record["missing"]["broken"][:40] in page
    (out / "mine.txt").write_text("kept")
    assert main(probing) == 1 and "--force" in capsys.readouterr().err
    assert main(["probe", *models[::2], *FEW, "--store", str(tiny_store), "--out", str(out), "--force"]) == 0
    assert {path.name for path in out.rglob("*") if path.suffix == ".html"} == {"index.html"}
    reports = sorted(str(path.parent.relative_to(out)) for path in out.rglob("probe.json"))
    assert reports == [".", "1-first", "2-run"] and (out / "mine.txt").is_file()
    assert main(["probe", models[0], *FEW, "--store", str(tiny_store), "--out", str(out), "--force"]) == 0
    assert [path.parent for path in out.rglob("probe.json")] == [out], "a single one leaves no reports of others"


def test_a_long_name_has_a_folder(copy, prompts, tmp_path, plain_pages):
    plain_pages()
    models, out = [copy("x" * 255), copy("y" * 255)], tmp_path / "out"
    assert main(["probe", *models, *FEW, "--prompts", prompts, "--out", str(out)]) == 0
    folders = json.loads((out / "probe.json").read_text())["folders"]
    assert len(folders) == 2 and all((out / folder / "index.html").is_file() for folder in folders.values())


def test_a_folder_is_one_probes_at_a_time_and_what_is_in_it_is_read_first(copy, prompts, tmp_path, capsys, plain_pages):
    plain_pages()
    out, models = tmp_path / "out", [copy("a"), copy("b")]
    probing = ["probe", *models, *FEW, "--prompts", prompts, "--out", str(out)]
    out.mkdir()
    other = "from sinkbed.train.run import directory; import sys; x = directory.lock(directory.Path(sys.argv[1]))"
    with subprocess.Popen(
        [sys.executable, "-c", f"{other}; print(flush=True); input()", str(out)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout.readline()
        assert main(probing) == 1 and "out: expected a folder that nobody writes to" in capsys.readouterr().err
        process.kill()
    assert [path.name for path in out.iterdir()] == [".lock"]
    assert main(probing) == 0, "a probe that was killed before it wrote does not stand in the way"
    assert ".lock" not in {path.name for path in out.iterdir()}
    capsys.readouterr()
    for content in ("{", "[1]"):
        (out / "probe.json").write_text(content)
        assert main([*probing, "--force"]) == 1
        captured = capsys.readouterr()
        assert "out" in captured.err and "expected" in captured.err and captured.out == "", "nothing was measured"


def test_a_report_that_a_kill_left_in_an_earlier_order_goes(tmp_path, monkeypatch):
    def publish(*names):
        record = {"models": {}, "folders": {name: f"{n}-{name}" for n, name in enumerate(names, 1)}}
        report.publish(record, tmp_path, [], [], lambda _: "")
        for folder in record["folders"].values():
            report.publish({}, tmp_path / folder, [], [], lambda _: "")

    publish("a", "b")
    monkeypatch.setattr(report, "_remove", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        publish("b")
    monkeypatch.undo()
    publish("b")
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["1-b"]


def test_who_reads_what_is_printed_may_leave(copy, prompts, tmp_path, monkeypatch, plain_pages):
    plain_pages()
    measured = []

    def measure(job, keep):
        measured.append(job.subject.name)
        raise BrokenPipeError

    monkeypatch.setattr(probe, "_measure", measure)
    arguments = [copy("a"), copy("b"), *FEW, "--prompts", prompts]
    with pytest.raises(BrokenPipeError):
        probe.run("probe", arguments)
    assert measured == arguments[:1]


def test_models_without_a_text_read_that_of_a_run(run_dir, exported, tmp_path):
    assert main(["probe", str(exported), str(run_dir), *FEW, "--json", str(tmp_path / "measured.json")]) == 0
    of_export, of_run = json.loads((tmp_path / "measured.json").read_text())["models"].values()
    (mode, theirs), ours = next(iter(of_export["sinks"]["natural"].items())), of_run["sinks"]["natural"]
    assert theirs["0"]["loss"] == pytest.approx(ours[mode]["0"]["loss"], rel=1e-5)


def test_one_model_is_in_memory_at_a_time(run_dir, tiny_store, tmp_path, monkeypatch):
    shutil.copytree(run_dir, tmp_path / "other")
    alive, most, make = weakref.WeakSet(), [], Decoder.__init__

    def init(self, *arguments):
        gc.collect()
        most.append(len(alive))
        make(self, *arguments)
        alive.add(self)

    monkeypatch.setattr(Decoder, "__init__", init)
    assert main(["probe", str(run_dir), str(tmp_path / "other"), *FEW]) == 0
    assert most == [0] * 4, "each is read twice: to check it, and when its turn comes"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["RUN", "RUN"], "MODEL: expected different models, got"),
        (["RUN", "nowhere"], "nowhere: expected a run directory"),
        (["EXPORTED", "ANOTHER"], "the text: expected documents to read, got none; give --prompts FILE"),
        (
            ["RUN", "EXPORTED", "--store", "STORE", "--gguf", "x.gguf"],
            "--gguf: expected one model, got 2",
        ),
        (["RUN", "EXPORTED", "--store", "STORE", "--length", "4096"], "--length: expected at most 48"),
        (["RUN", "NO_BOS", "--store", "STORE"], "its tokenizer has no BOS"),
        (["RUN", "EXPORTED", "--store", "STORE", "--sink_tokens", "400"], "--sink_tokens 400: expected documents"),
    ],
)
def test_all_models_are_checked_before_the_first_is_measured(
    options, message, run_dir, exported, copy, tiny_store, capsys
):
    places = {"RUN": run_dir, "EXPORTED": exported, "STORE": tiny_store, "ANOTHER": copy("another")}
    if "NO_BOS" in options:
        places["NO_BOS"] = copy("no_bos", weights=False)
        settings = Path(places["NO_BOS"]) / "tokenizer_config.json"
        kept = {key: value for key, value in json.loads(settings.read_text()).items() if key != "bos_token"}
        settings.write_text(json.dumps(kept))
        (settings.parent / "checksums.json").unlink()
    given = [str(places.get(option, option)) for option in options]
    assert main(["probe", *given, *(FEW if "400" not in options else FEW[2:])]) == 1
    captured = capsys.readouterr()
    assert message in captured.err and captured.out == ""


@pytest.mark.parametrize(
    ("models", "names"),
    [
        (["runs/a", "runs/b/"], ["a", "b"]),
        (["x/run", "y/run", "z"], ["x/run", "y/run", "z"]),
        (
            ["a/checkpoints/last.ckpt", "b/checkpoints/last.ckpt"],
            ["a/checkpoints/last.ckpt", "b/checkpoints/last.ckpt"],
        ),
        (["meta/llama", "llama"], ["meta/llama", "llama"]),
        (["/x/run", "/y/x/run"], ["/x/run", "y/x/run"]),
        (["w/q4.gguf", "w/q8.gguf"], ["q4.gguf", "q8.gguf"]),
    ],
)
def test_names_are_the_shortest_ends_that_differ(models, names):
    assert short_names(models) == names


def test_of_many_models_the_answer_names_the_extremes():
    def measured(rate):
        keys = {"0": {"rate": {"0.3": [[rate]]}}}
        return {"sinks": {"natural": {"bos": keys, "first_key_masked": keys}}}

    models = {f"m{n}": measured(rate) for n, rate in enumerate((30.0, 80.0, 10.0, 50.0, 20.0))}
    every = answer(results_of(models)).replace("\N{NO-BREAK SPACE}", " ")
    assert every == "With BOS + text as input, the sink rate is between 10.0 % in m2 and 80.0 % in m1."
    two = answer(results_of({name: models[name] for name in ("m0", "m1")})).replace("\N{NO-BREAK SPACE}", " ")
    assert two == "With BOS + text as input, the sink rate is 80.0 % in m1 and 30.0 % in m0."


def test_all_models_read_the_documents_that_each_has_tokens_enough_for(tmp_path):
    texts = ["a b c d", "abcd efgh", "a b c", "aa bb cc dd", "a b c d e"]
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    arguments = SimpleNamespace(prompts=tmp_path / "texts.txt", store=None)
    words, bytes_ = (
        SimpleNamespace(encode=encode, store=None, own_texts=None, name="")
        for encode in (str.split, lambda text: list(text.encode()))
    )
    beside = SimpleNamespace(encode=str.split, store=tmp_path, own_texts=iter(()), name="nanoGPT")
    stored = SimpleNamespace(encode=str.split, store=tmp_path / "x" / "..", own_texts=None, name="run")
    config = MeasureConfig(documents=2, live_documents=1, sink_tokens=4)
    with pytest.raises(FileNotFoundError):  # one store for both, at which there is none
        shared_texts(SimpleNamespace(prompts=None, store=tmp_path), [beside, stored], config)
    assert shared_texts(arguments, [bytes_], config) == texts[:2]
    assert shared_texts(arguments, [bytes_, words], config) == [texts[0], texts[3]]
    with pytest.raises(ValueError, match="under every model's tokenizer, got none"):
        shared_texts(arguments, [words, bytes_], MeasureConfig(documents=2, live_documents=1, sink_tokens=6))
