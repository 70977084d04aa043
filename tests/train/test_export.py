"""`sinkbed export`: the folder gives our logits through `transformers`, from the text on."""

import json

import pytest
import torch

from data.store import TokenStore
from data.strategy import Strategy
from tests.train.conftest import write_run_config
from train.cli import main
from train.export import first_id, write_tokenizer
from train.validate import load_decoder, open_run

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
    assert "puts '<bos>' before a text" in capsys.readouterr().out
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
    decoder, _ = load_decoder(open_run(run_dir)[0])
    text = "sink bos row: 12"
    ids = tokenizer(text)["input_ids"]
    ours = TokenStore.open(open_run(run_dir)[0]["sinkbed"]["store"]).tokenizer()
    assert ids == [ours.bos_id, *ours.encode(text)]
    with torch.no_grad():
        expected, found = decoder(torch.tensor([ids])).logits, theirs(torch.tensor([ids])).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (ours.bos_id, ours.eos_id)
    assert theirs.config.max_position_embeddings == 48 and theirs.generation_config.eos_token_id == ours.eos_id


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
        ({"window": 8}, "data.strategy.window: found 8"),
        ({"prefix_lm": 4}, "data.strategy.prefix_lm: found 4"),
        ({"first_token": ["none", "bos"]}, "data.strategy.first_token: found .* past position 0"),
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


def test_the_exported_files_are_plain_data(run_dir, tmp_path):
    assert main(["export", str(run_dir), "--out", str(tmp_path / "hf")]) == 0
    names = {p.name for p in (tmp_path / "hf").iterdir()}
    assert names == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert "auto_map" not in config, "no remote code"
