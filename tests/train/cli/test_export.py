"""`sinkbed export`: the folder gives our logits through `transformers`, from the text on."""

import json
import os

import pytest
import torch

from sinkbed.data.pack.strategy import Strategy
from sinkbed.data.store.token_store import TokenStore
from sinkbed.kernels import interval_mask
from sinkbed.train.cli.export import first_id, lm_eval_arguments, write_tokenizer
from sinkbed.train.cli.main import main
from sinkbed.train.run.load import load_decoder, open_run
from tests.support.runs import write_run_config

transformers = pytest.importorskip("transformers")
TEXT = "sink bos <bos> row: été 12"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, tiny_store):
    """A finished run of a few steps, with BOS fixed."""
    folder = tmp_path_factory.mktemp("export")
    config = write_run_config(folder / "run.yaml", tiny_store)
    assert main(["fit", "--config", str(config), "--wandb.mode", "disabled", "--trainer.max_steps", "3"]) == 0
    return folder / "run"


def test_text_to_logits_equal_ours(run_dir, tmp_path, capsys):
    out = tmp_path / "hf"
    assert main(["export", str(run_dir), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "puts '<bos>' before a text" in said and f"pretrained={out},add_bos_token=True --tasks" in said
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
    decoder, _ = load_decoder(open_run(run_dir)[0])
    text = TEXT
    ids = tokenizer(text)["input_ids"]
    ours = TokenStore.open(open_run(run_dir)[0]["sinkbed"]["store"]).tokenizer()
    assert ids == [ours.bos_id, *ours.encode(text)]
    with torch.no_grad():
        expected, found = decoder(torch.tensor([ids])).logits, theirs(torch.tensor([ids])).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (ours.bos_id, ours.eos_id)
    assert theirs.config.max_position_embeddings == 48 and theirs.generation_config.eos_token_id == ours.eos_id


def test_a_window_makes_it_a_mistral(tiny_store, tmp_path):
    config = write_run_config(tmp_path / "run.yaml", tiny_store)
    options = ["--wandb.mode", "disabled", "--trainer.max_steps", "2", "--data.strategy.window", "5"]
    assert main(["fit", "--config", str(config), *options]) == 0
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "hf")]) == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert type(theirs).__name__ == "MistralForCausalLM"
    decoder, _ = load_decoder(open_run(tmp_path / "run")[0])
    tokens = torch.randint(2, 300, (2, 20))
    with torch.no_grad():
        ours, found = decoder(tokens, mask=interval_mask(2, 20, window=5)).logits, theirs(tokens).logits
        without = decoder(tokens).logits
    torch.testing.assert_close(found, ours, atol=1e-5, rtol=1e-5)
    assert (found - without).abs().max() > 1e-3, "the window is under test"


def test_the_parts_of_the_decoder_say_which_model_it_is(tiny_store, tmp_path, capsys):
    config = write_run_config(tmp_path / "run.yaml", tiny_store)
    parts = ["--model.decoder.position", "{learned: {length: 64}}", "--model.decoder.norm", "layer"]
    options = ["--wandb.mode", "disabled", "--trainer.max_steps", "2", *parts]
    for name, feed_forward in (("gpt2", "gelu"), ("none", "swiglu")):
        run, out = tmp_path / name, tmp_path / f"{name}-hf"
        arguments = ["fit", "--config", str(config), "--run_dir", str(run), *options]
        assert main([*arguments, "--model.decoder.feed_forward", feed_forward]) == 0
        assert main(["export", str(run), "--out", str(out)]) == (feed_forward == "swiglu")
    said = capsys.readouterr()
    assert "parameters, as GPT2LMHeadModel; its tokenizer puts" in said.out
    assert "model.decoder.feed_forward: expected gelu or relu" in said.err and not out.exists()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "gpt2-hf")
    decoder, _ = load_decoder(open_run(tmp_path / "gpt2")[0])
    tokens = torch.randint(2, 300, (2, 20))
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, decoder(tokens).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("axes", "bos", "expected"),
    [
        ({"first_token": "bos"}, "as_trained", "bos"),
        ({"first_token": "bos"}, "never", None),
        ({}, "as_trained", None),
        ({}, "always", "bos"),
        ({"document_start": "bos"}, "as_trained", "bos"),
        ({"document_start": "eos"}, "as_trained", "eos"),
        ({"first_token": 77}, "as_trained", 77),
        *(({"first_token": token}, "as_trained", token) for token in (5, 27)),  # "$" and ":"
        ({"first_token": "random"}, "as_trained", None),
        ({"first_token": "random", "document_start": "bos"}, "as_trained", None),
    ],
)
def test_the_tokenizer_puts_what_the_strategy_put_before_a_text(axes, bos, expected, tiny_store, tmp_path):
    ours = TokenStore.open(tiny_store).tokenizer()
    assert {ours.decode([5]), ours.decode([27])} == {"$", ":"}, "tokens that the library's short form reads otherwise"
    first = first_id(Strategy(**axes), ours, bos)
    assert first == {"bos": ours.bos_id, "eos": ours.eos_id}.get(expected, expected)
    write_tokenizer(tmp_path, ours, first, 32)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = ours.encode("sink row")
    assert theirs("sink row")["input_ids"] == ([] if first is None else [first]) + text
    assert theirs("sink row", add_special_tokens=False)["input_ids"] == text


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"window": 8, "shared_prefix": 1}, "data.strategy.shared_prefix: got 1 beside window 8"),
        ({"prefix_lm": 4}, "data.strategy.prefix_lm: got 4"),
        ({"first_token": ["none", "bos"]}, "data.strategy.first_token: got .* past position 0"),
    ],
)
def test_what_llama_cannot_express_is_refused(axes, message, tiny_store):
    with pytest.raises(ValueError, match=message):
        first_id(Strategy(**axes), TokenStore.open(tiny_store).tokenizer(), "as_trained")


def test_a_folder_that_holds_something_is_left_alone_and_a_failure_leaves_nothing(
    run_dir, tmp_path, capsys, monkeypatch
):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    assert main(["export", str(run_dir), "--out", str(tmp_path / "full")]) == 1
    assert "expected a folder that holds nothing" in capsys.readouterr().err
    assert main(["export", str(tmp_path), "--out", str(tmp_path / "new")]) == 1
    assert "expected a run directory or a checkpoint inside one" in capsys.readouterr().err

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    assert main(["export", str(run_dir), "--out", str(tmp_path / "new")]) == 1
    assert "disk is full" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full"]


def test_the_exported_files_are_plain_data_with_the_permissions_of_the_user(run_dir, tmp_path):
    before = os.umask(0o027)
    try:
        (tmp_path / ".hf.export").mkdir()
        (tmp_path / ".hf.export" / "model.safetensors").touch()  # of an export that was killed
        (tmp_path / ".hf.v2.partial").mkdir()  # in which a token store of another name grows
        assert main(["export", str(run_dir), "--out", str(tmp_path / "hf")]) == 0
    finally:
        os.umask(before)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hf.v2.partial", "hf"]
    assert (tmp_path / "hf").stat().st_mode & 0o777 == 0o750
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "hf").iterdir()} == {0o640}
    names = {p.name for p in (tmp_path / "hf").iterdir()}
    assert names == {
        "checksums.json",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert "auto_map" not in config, "no remote code"


QUESTIONS = [
    {"question": "12: sink bos row", "choices": [" token mask", " first key", " mass"]},
    {"question": "7: head layer", "choices": [" sink", " row row", " été."]},
    {"question": "", "choices": ["sink row", "key"]},
]


@pytest.fixture
def lm_eval(tmp_path, monkeypatch):
    """Evaluate a folder with lm_eval on a task of two local files; returns the log-likelihood of each choice."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    harness = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    task = tmp_path / "task"
    task.mkdir()
    (task / "questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
    (task / "sinkbed_questions.yaml").write_text(
        f"""
task: sinkbed_questions
dataset_path: json
dataset_kwargs: {{data_files: {{test: {task / "questions.jsonl"}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: 0
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""
    )

    def evaluate(folder, **options):
        found = harness.simple_evaluate(
            model="hf", model_args={"pretrained": str(folder), "dtype": "float32", **options}, device="cpu",
            tasks=["sinkbed_questions"], task_manager=TaskManager(include_path=str(task)), batch_size=2,
            bootstrap_iters=0,
        )  # fmt: skip
        samples = sorted(found["samples"]["sinkbed_questions"], key=lambda sample: sample["doc_id"])
        assert [sample["doc"] for sample in samples] == QUESTIONS
        return [[float(answer[0]) for answer in sample["filtered_resps"]] for sample in samples]

    return evaluate


def likelihood(decoder, first, context, continuation):
    """log p(continuation) after the first token and the context, all ids."""
    ids = [*first, *context, *continuation]
    with torch.no_grad():
        logs = decoder(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(float(logs[at - 1, ids[at]]) for at in range(len(ids) - len(continuation), len(ids)))


@pytest.mark.parametrize("bos", ["as_trained", "never"])
def test_lm_eval_finds_the_likelihoods_of_the_decoder_after_the_token_it_was_trained_with(
    bos, run_dir, tmp_path, lm_eval
):
    out = tmp_path / "hf"
    assert main(["export", str(run_dir), "--out", str(out), "--bos", bos]) == 0
    decoder, _ = load_decoder(open_run(run_dir)[0])
    ours = TokenStore.open(open_run(run_dir)[0]["sinkbed"]["store"]).tokenizer()
    first = [ours.bos_id] if bos == "as_trained" else []
    found = lm_eval(out)
    for question, answers in zip(QUESTIONS, found, strict=True):
        context = ours.encode(question["question"])
        for choice, answer in zip(question["choices"], answers, strict=True):
            whole = ours.encode(question["question"] + choice)
            assert whole[: len(context)] == context, "the seam is between tokens"
            # Before an empty context the harness itself puts BOS.
            expected = likelihood(decoder, first if context else [ours.bos_id], context, whole[len(context) :])
            assert answer == pytest.approx(expected, abs=1e-3), (question, choice)
    told = dict(option.split("=") for option in lm_eval_arguments(out, *first or [None], ours.bos_id).split(","))
    assert told == {"pretrained": str(out), "add_bos_token": str(bos == "as_trained")}
    assert lm_eval(out, add_bos_token=bos == "as_trained") == found, "what it is told is what the folder says"


def test_lm_eval_keeps_a_first_token_that_is_not_bos(run_dir, tmp_path, lm_eval):
    out = tmp_path / "hf"
    assert main(["export", str(run_dir), "--out", str(out)]) == 0
    decoder, _ = load_decoder(open_run(run_dir)[0])
    ours = TokenStore.open(open_run(run_dir)[0]["sinkbed"]["store"]).tokenizer()
    write_tokenizer(out, ours, 5, 48)
    assert lm_eval_arguments(out, 5, ours.bos_id) == f"pretrained={out},prefix_token_id=5"
    for question, answers in zip(QUESTIONS, lm_eval(out, prefix_token_id=5), strict=True):
        context = ours.encode(question["question"])
        for choice, answer in zip(question["choices"], answers, strict=True):
            continuation = ours.encode(question["question"] + choice)[len(context) :]
            assert answer == pytest.approx(likelihood(decoder, [5], context, continuation), abs=1e-3)


def test_lm_eval_counts_no_bos_as_text_where_perplexity_is_told_not_to_put_it_twice(run_dir, tmp_path):
    """Its rolling likelihood puts BOS first by itself, and would count a BOS of the tokenizer's as a target."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    out = tmp_path / "hf"
    assert main(["export", str(run_dir), "--out", str(out)]) == 0
    decoder, _ = load_decoder(open_run(run_dir)[0])
    ours = TokenStore.open(open_run(run_dir)[0]["sinkbed"]["store"]).tokenizer()
    request = Instance("loglikelihood_rolling", {}, ("sink row",), 0)
    [found] = HFLM(pretrained=str(out), device="cpu", dtype="float32", add_bos_token=False).loglikelihood_rolling(
        [request]
    )
    assert found == pytest.approx(likelihood(decoder, [ours.bos_id], [], ours.encode("sink row")), abs=1e-3)


def test_a_tokenizer_that_puts_bos_before_a_text_itself_does_so_only_when_told(tmp_path, tiny_store):
    from tokenizers.processors import TemplateProcessing

    tokenizer = TokenStore.open(tiny_store).tokenizer()
    bos = tokenizer.backend.id_to_token(tokenizer.bos_id)
    tokenizer.backend.post_processor = TemplateProcessing(f"{bos} $A", special_tokens=[(bos, tokenizer.bos_id)])
    for first in (None, tokenizer.bos_id):
        folder = tmp_path / str(first)
        folder.mkdir()
        write_tokenizer(folder, tokenizer, first, 48)
        ids = transformers.AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"]
        assert ids == [*([] if first is None else [first]), *tokenizer.encode(TEXT)]


def test_an_export_that_another_process_makes_is_left_alone(run_dir, tmp_path, capsys):
    import fcntl

    (tmp_path / ".hf.export").mkdir()
    (tmp_path / ".hf.export" / "config.json").write_text("half")
    held = os.open(tmp_path / ".hf.export", os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    try:
        assert main(["export", str(run_dir), "--out", str(tmp_path / "hf")]) == 1
    finally:
        os.close(held)
    assert "another process exports to it" in capsys.readouterr().err
    assert (tmp_path / ".hf.export" / "config.json").read_text() == "half" and not (tmp_path / "hf").exists()
