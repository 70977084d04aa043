"""The command line as a whole, and the walls between the packages."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from sinkbed.data.store.token_store import TokenStore
from sinkbed.data.tokenizer import Tokenizer
from sinkbed.train.cli.main import COMMANDS, main
from sinkbed.train.config.arguments import rewritten
from sinkbed.train.loop.optim import OptimizerConfig, build_optimizer
from tests.support import ROOT


def test_help_imports_nothing_heavy():
    code = "import sys; from sinkbed.train.cli.main import main\n"
    code += "try: main(['--help'])\nfinally: print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "prepare" in done.stdout and "study" in done.stdout
    for heavy in ("torch", "lightning", "numpy", "wandb", "datasets"):
        assert f"'{heavy}'" not in done.stdout


def test_freed_memory_is_kept_unless_the_environment_has_settings_of_its_own():
    """Eight arrays of 4 MB, made and freed: their pages are faulted in once, or each time."""
    faults = (
        "import resource\n{}for _ in range(40): [bytearray(b'x') * 2**22 for _ in range(8)]\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)"
    )
    keep = "from sinkbed.train.cli.main import _keep_freed_memory as keep; keep()\n"
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    without, kept, as_told = (
        int(subprocess.check_output([sys.executable, "-c", faults.format(first)], text=True, env=env))
        for first, env in (("", plain), (keep, plain), (keep, {**plain, "MALLOC_ARENA_MAX": "1"}))
    )
    assert kept < without / 2 < as_told, (kept, without, as_told)


def test_an_unknown_command_is_refused(capsys):
    assert main(["studdy"]) == 2
    message = capsys.readouterr().err
    assert "got 'studdy'; did you mean study?" in message and "prepare, fit" in message


def test_the_version_is_shown(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("sinkbed 0.")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit", "--model.optimizr.lr", "3"], "--model.optimizr.lr: expected a known key, got none of that name; "
         "did you mean model.optimizer.lr?"),
        (["fit", "--lr", "3"], "did you mean model.optimizer.lr?"),
        (["fit", "--modle.lr", "3"], "did you mean model.optimizer.lr?"),
        (["fit", "--model.optimizer.betas", "3"], "got none of that name; model.optimizer has cooldown_fraction, "),
        (["fit", "--rundir", "x"], "did you mean run_dir?"),
        (["fit", "--model.decoder.n_layers", "three"], "model.decoder.n_layers: expected int, got 'three'"),
        (["fit", "--data.strategy.mask", "docment"], "data.strategy.mask: expected one of 'causal', 'intra_document'"),
        (["fit", "--data.micro_batch_size", "x"], "data.micro_batch_size: expected int or null, got 'x'"),
        (["fit", "--config", "max_grad_nrm.yaml"], "model.max_grad_nrm: expected a known key"),
        (["fit", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["fit", "nonsense"], "nonsense: expected options alone from here on, got a word"),
        (["fit", "--threads"], "--threads: expected one value, got none"),
        (["kernels", "--arch"], "--arch: expected at least one value, got none"),
        (["kernels", "--tiles", "64", "64", "4"], "--tiles: expected 4 values, got fewer"),
        (["fit", "--model.optimizer.lr", "nan"], "model.optimizer.lr: expected a finite number, got 'nan'"),
        (["fit", "--measure.eps", "0.3"], "--measure.eps: expected a known key, got none of that name; measure has"),
        (["fit", "--config", "group.yaml"], "group.yaml, line 1: modle: expected a known key, got none of that name; "
         "did you mean model?"),
        (["fit", "--config", "leaf.yaml"], "leaf.yaml, line 2: decoder: expected a known key, got none of that name; "
         "did you mean model.decoder?"),
        (["fit", "--config", "empty.yaml"], "empty.yaml, line 1: model: expected keys below it, got none"),
        (["fit", "--config", "value.yaml"], "value.yaml, line 3: data.strategy.mask: expected one of 'causal', "
         "'intra_document', got 'documnet'; did you mean intra_document?"),
        (["report", "--sede", "1", "x"], "--sede: expected a known key, got none of that name; did you mean seeds?"),
        (["study", "x", "--sz", "1"], "did you mean size?"),
        (["export", "x", "--ot", "y"], "did you mean out?"),
        (["export", "x"], "expected a value for --out; got none"),
        (["validate", "x", "--document", "3"], "did you mean documents?"),
        (["validate", "x", "--documents", "y"], "--documents: expected int, got 'y'"),
        (["probe", "x", "--measure", "sink"], "'all', got 'sink'; did you mean sinks?"),
        (["generate", "a", "b"], "b: expected options alone from here on"),
        (["generate", "x", "--mode", "random_first"], "--mode: expected one of 'as_trained', 'bos', 'text', got"),
        (["validate", "x", "--modes", "txt"], "got 'txt'; did you mean text?"),
        (["probe", "x", "--modes", "bso"], "got 'bso'; did you mean bos?"),
        (["bench", "trainng"], "got 'trainng'; did you mean training?"),
        (["prepare", "--source.kind", "jsn"], "source.kind: expected one of 'demo', 'jsonl'"),
        (["prepare", "--source.fils", "x"], "did you mean source.files?"),
        (["prepare", "--source.kind", "synthetic", "--source.synthetic.tsk", "x"], "tsk: expected a known key"),
        (["prepare", "--source.synthetic.length", "x"], "source.synthetic.length: expected int or tuple[int or int], "
         "got 'x'"),
        (["prepare", "--source.kind", "synthetic", "--source.synthetic.length", "3", "--out", "s"], "source.synthetic: "
         "expected a value for task, documents; got none"),
        (["prepare", "--source.kind", "synthetic", "--source.synthetic", "{task: unform, documents: 3, length: 3}",
          "--out", "s"], "source.synthetic.task: expected one of 'bigram_backcopy', 'trigger_averaging', 'uniform', "
         "'repeated', got 'unform'; did you mean uniform?"),
        (["prepare"], "expected a value for source.kind, out; got none"),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_one_short_message(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = {
        "max_grad_nrm": "model: {max_grad_nrm: 1.0}\n", "group": "modle: {max_grad_norm: 1.0}\n", "empty": "model:\n",
        "leaf": "threads: 1\ndecoder: {n_layers: 2}\n", "value": "data:\n  strategy:\n    mask: documnet\n",
    }  # fmt: skip
    for name, text in files.items():
        Path(f"{name}.yaml").write_text(text)
    command, *rest = arguments
    start = ["--config", str(ROOT / "configs/run/demo.yaml")] if command == "fit" else []
    with pytest.raises(SystemExit) as stop:
        main([command, *start, *rest])
    assert stop.value.code == 2
    shown = capsys.readouterr().err
    assert message in shown and f"sinkbed {command} --help" in shown
    assert shown.count("\n") == 2, "no usage of a hundred lines"
    assert {p.stem for p in tmp_path.iterdir()} == set(files), "nothing was written"


@pytest.mark.parametrize(
    ("file", "options", "message"),
    [
        ("data:\n  strategy: {masq: document}\n", [], "run.yaml, line 2: data.strategy.masq: expected a known key, "
         "got none of that name; did you mean data.strategy.mask?"),
        ("threads: 1\nthreads: 2\n", [], "run.yaml, line 2: expected each key once, got 'threads'"),
        ("threads: 1\n", ["--trainr.max_steps", "3"], "did you mean trainer.max_steps?"),
        ("model: {decoder: {n_layers: two}}\n", [], "line 1: model.decoder.n_layers: expected int, got 'two'"),
        ("threads: 1\n", ["--config", str(ROOT / "configs/run/demo.yaml"), "--data.store", "nowhere"], "no token store "
         "at nowhere"),
        ("model: {decoder: shape.yaml}\n", [], "line 1: model.decoder: expected keys below it, got 'shape.yaml'"),
        ("threads: 1\n", ["--config", str(ROOT / "configs/run/demo.yaml"), "--fork", "nowhere"], "--fork nowhere: "
         "expected a run or its checkpoint, got nothing there"),
        ("threads: 1\n", [], "expected a value for model.decoder.n_layers"),
        ("threads: 1\n", ["--config", str(ROOT / "configs/run/demo.yaml"), "--model.decoder.position", "rop"],
         "model.decoder.position: expected one of alibi, learned, none, rope, sinusoidal, or"),
        ("threads: 1\n", ["--config", str(ROOT / "configs/run/demo.yaml"), "--model.decoder.normalizer", "sigmod"],
         "got 'sigmod'; did you mean sigmoid?"),
        ("threads: 1\n", ["--config", str(ROOT / "configs/run/demo.yaml"), "--data.strategy.packing", "conct"],
         "got 'conct'; did you mean concat?"),
        ("model: {decoder: {attention_parts: [qk_nrm]}}\n", ["--config", str(ROOT / "configs/run/demo.yaml")],
         "got 'qk_nrm'; did you mean qk_norm?"),
        ("", [], "expected YAML with keys, such as the files in configs/; got an empty file"),
    ],
)  # fmt: skip
def test_a_typo_is_answered_before_anything_heavy_is_imported(file, options, message, tmp_path):
    (tmp_path / "run.yaml").write_text(file)
    argv = ["fit", "--config", str(tmp_path / "run.yaml"), *options]
    code = (
        "import sys; from sinkbed.train.cli.main import main\n"
        f"try: sys.exit(main({argv!r}))\n"
        "finally: print(sorted({'torch', 'lightning'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert message in done.stderr and done.returncode != 0 and done.stdout == "[]\n"


def test_a_class_that_cannot_be_imported_is_named():
    message = (
        'Parser key "trainer.callbacks":\n\n  - Expected a path but [...] either not accessible\n  Subtypes: '
        "[list[Callback]]\n  Errors:\n    - Problem with given class_path 'foo.Bar':\n        No module named 'foo'\n"
        "    - Not a valid subclass of Callback\n  Given value type: <class 'list'>\n  Given value: [{}]"
    )
    named = "trainer.callbacks: expected a class that can be imported, got foo.Bar: No module named 'foo'"
    assert rewritten(message, []) == named


def test_the_keys_that_are_checked_are_those_of_the_parser(monkeypatch, tiny_store):
    from sinkbed.train.config.arguments import known_keys
    from sinkbed.train.config.keys import fit_keys
    from sinkbed.train.loop import trainer as fit

    class Parsed(Exception):
        pass

    def keep(self):
        raise Parsed(known_keys(self.parser))

    monkeypatch.setattr(fit.SinkbedCLI, "before_instantiate_classes", keep)
    with pytest.raises(Parsed) as caught:
        main(["fit", "--config", str(ROOT / "configs/run/demo.yaml"), "--data.store", str(tiny_store)])
    [keys] = caught.value.args
    groups = {key[:at] for key in fit_keys() for at in range(len(key)) if key[at] == "."}
    others = {key for key in keys if not key.endswith(".help")} - groups - set(fit_keys())
    assert others <= {"config", "print_config", "print_shtab", "subcommand"} and set(fit_keys()) <= set(keys)


def test_help_begins_with_our_keys_and_describes_each(capsys):
    from sinkbed.train.loop.trainer import ShortLightningParser

    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    text = capsys.readouterr().out
    assert text.index("--data.strategy.mask") < text.index("--trainer.max_steps")
    assert "Which keys a query sees" in " ".join(text.split()), "a field's docstring"
    assert "rope (theta, share), sinusoidal (scale)" in " ".join(text.split()), "the parts and their options"
    assert "--trainer.benchmark" not in text and "--help=all" in text
    try:
        with pytest.raises(SystemExit):
            main(["fit", "--help=all"])
    finally:
        ShortLightningParser.every_key = False
    assert "--trainer.benchmark" in capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "usage: sinkbed" in shown and len(shown) > 200


def test_a_setting_that_a_synthetic_task_ignores_is_one_short_message(capsys, tmp_path):
    config = ["--config", str(ROOT / "configs/data/repeated.yaml"), "--out", str(tmp_path / "store")]
    assert main(["prepare", *config, "--source.synthetic.triggers", "3"]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith(
        "sinkbed prepare: source.synthetic.triggers: expected none with task repeated, which ignores it, got 3"
    )
    assert shown.count("\n") == 1 and not (tmp_path / "store").exists()


def test_prepare_runs_from_its_config(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("one document " * 20)
    (tmp_path / "b.txt").write_text("another document " * 20)
    config = tmp_path / "data.yaml"
    config.write_text(
        f"source: {{kind: text, files: ['{tmp_path}/*.txt']}}\n"
        f"tokenizer: {{vocab_size: 260}}\nvalidation_share: 0.0\nout: {tmp_path}/store\n"
    )
    assert main(["prepare", "--config", str(config)]) == 0
    assert (tmp_path / "store" / "manifest.json").exists()
    shown = capsys.readouterr().out
    assert f"{tmp_path}/store: train 2 documents" in shown and "vocabulary 260" in shown and " s\n" in shown
    assert main(["prepare", "--config", str(config)]) == 0
    assert "up to date\n" in capsys.readouterr().out
    assert main(["prepare", "--config", str(config), "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    assert main(["prepare", "--config", str(config), "--quiet", "--tokenizer.vocab_size", "261"]) == 1
    assert "--force" in capsys.readouterr().err


RUNS = sorted(ROOT.glob("configs/run/*.yaml"))
OVERLAYS = sorted(p for folder in ("strategy", "model") for p in ROOT.glob(f"configs/{folder}/*.yaml"))
# What an overlay says of the optimizer meets the steps of the run; other overlays meet no key of it.
PAIRS = [*itertools.product(sorted(ROOT.glob("configs/optimizer/*.yaml")), RUNS), *zip(OVERLAYS, itertools.cycle(RUNS))]


@pytest.mark.parametrize(("overlay", "run"), PAIRS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_overlay_fits_a_run_config(overlay, run, capsys):
    assert len(OVERLAYS) > len(RUNS) > 5
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", str(run), "--config", str(overlay), "--print_config"])
    assert stop.value.code == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    assert "run_dir" in printed
    config = yaml.safe_load(printed)
    optimizer = OptimizerConfig(**config["model"]["optimizer"])
    build_optimizer(torch.nn.Linear(2, 2), optimizer, config["trainer"]["max_steps"])


def test_the_example_for_local_text_holds_for_every_format_it_names(tmp_path, monkeypatch, capsys):
    """As its comments say, word for word but for the paths."""
    monkeypatch.chdir(tmp_path)
    texts = [f"document {i} " * 20 for i in range(300)]
    Path("a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    pq.write_table(pa.table({"text": texts}), "a.parquet")
    Path("books").mkdir()
    for i, text in enumerate(texts):
        Path(f"books/{i:03}.txt").write_text(text)
    trained = Tokenizer.train(texts, vocab_size=300)
    trained.backend.save("gpt2.json")
    loaded = ["--tokenizer.vocab_size", "null", "--tokenizer.train_bytes", "null", "--tokenizer.path", "gpt2.json"]
    for out, (kind, *options) in {
        "1": ("jsonl", "*.jsonl"),
        "2": ("parquet", "*.parquet"),
        "3": ("text", "books", "--source.split", "file"),
        "4": ("jsonl", "*.jsonl", *loaded, "--tokenizer.bos", "<bos>", "--tokenizer.eos", "<eos>"),
    }.items():
        config = str(ROOT / f"configs/data/local_{kind}.yaml")
        shares = ["--validation_share", "0.05"]  # of so few documents
        assert (
            main(["prepare", "--config", config, "--quiet", "--out", out, *shares, "--source.files", *options]) == 0
        ), capsys.readouterr().err
        assert TokenStore.open(Path(out), "train").documents > 250


def test_a_glob_that_the_shell_has_expanded_is_told_so(tmp_path, capsys):
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text("{}")
    files = [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl")]
    with pytest.raises(SystemExit):
        main(["prepare", "--config", str(ROOT / "configs/data/local_jsonl.yaml"), "--source.files", *files])
    assert "quote a glob, so that the shell leaves it whole" in capsys.readouterr().err


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path):
    """As in `sinkbed study FILE --dry_run | head -1`."""
    read, write = os.pipe()
    os.close(read)
    command = [
        sys.executable,
        "-m",
        "sinkbed",
        "study",
        "configs/study/packing.yaml",
        "--sweep",
        str(tmp_path / "s.yaml"),
    ]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "") and (tmp_path / "s.yaml").exists()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(5, "Input/output error", "runs/a/metrics.jsonl"), "runs/a/metrics.jsonl: expected a file or folder "
         "that can be read and written, got: Input/output error (errno 5)"),
        (PermissionError(13, "Permission denied", "x"), "x: expected a file or folder that can be"),
        (MemoryError(), "there is not enough memory; what is saved is whole"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to "
                      "allocate 4000 bytes.\nC++ stack"), "tried to allocate 4000 bytes.); what is saved is whole"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "there is not enough memory (CUDA"),
    ],
)  # fmt: skip
def test_what_the_machine_refuses_is_one_message(error, message, monkeypatch, capsys):
    from sinkbed.train.cli import prepare

    def fail(*_):
        raise error

    monkeypatch.setattr(prepare, "run", fail)
    assert main(["prepare"]) == 1
    shown = capsys.readouterr().err
    assert message in shown and shown.count("\n") == 1


def test_a_fault_of_ours_has_its_traceback(monkeypatch):
    from sinkbed.train.cli import prepare

    def fail(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr(prepare, "run", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["prepare"])


def test_an_ascii_locale_changes_nothing(tmp_path):
    """Neither what is read nor what is printed: the program switches to UTF-8."""
    (tmp_path / "läufe ⟨bos⟩").mkdir()
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "sinkbed", "runs", str(tmp_path / "läufe ⟨bos⟩")]
    done = subprocess.run(command, capture_output=True, env=environment, cwd=tmp_path)
    assert "läufe ⟨bos⟩: expected runs, got none" in done.stderr.decode(), done.stderr
