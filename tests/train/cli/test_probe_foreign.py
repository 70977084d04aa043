"""`sinkbed probe` of what other trainers leave: nanoGPT's ckpt.pt, litgpt's folders."""

import json
import pickle
from types import SimpleNamespace

import numpy
import pytest
import torch
import yaml

from sinkbed.train.cli.main import main
from sinkbed.train.measure.model import load
from tests.support.trainers import save_litgpt, save_nanogpt
from tests.train.cli.test_probe_tokenizers import backend_of

transformers = pytest.importorskip("transformers")
TEXT = "sink bos row token mask head layer first key to the end. " * 8
LETTERS = sorted(set(TEXT))


@pytest.fixture
def nanogpt(tmp_path, monkeypatch):
    """A checkout of nanoGPT after training on characters; its model."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data" / "letters"
    folder.mkdir(parents=True)
    ids = {letter: index for index, letter in enumerate(LETTERS)}
    (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": len(ids), "stoi": ids, "itos": dict(enumerate(ids))}))
    numpy.array([ids[letter] for letter in TEXT], dtype=numpy.uint16).tofile(folder / "val.bin")
    return save_nanogpt(tmp_path / "out" / "ckpt.pt", vocab_size=len(LETTERS))


@pytest.fixture
def litgpt(tmp_path):
    """A folder of pretraining, with a tokenizer that has a BOS; its model."""
    folder = tmp_path / "out" / "pretrain" / "tiny" / "final"
    model = save_litgpt(folder, pretraining=True, settings=dict(vocab_size=290, padded_vocab_size=320))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend_of("byte-level"), bos_token="<s>", eos_token="</s>"
    )
    tokenizer.save_pretrained(folder)
    (tmp_path / "prompts.txt").write_text(f"{TEXT[:170]}\n{TEXT[20:200]}\n")
    return folder, model, tokenizer


def probe(tmp_path, *arguments):
    path = tmp_path / "probe.json"
    assert main(["probe", *map(str, arguments), "--sink_tokens", "16", "--json", str(path)]) == 0
    return {mode: keys["0"] for mode, keys in json.loads(path.read_text())["sinks"]["natural"].items()}


def loss(model, documents, bos=()):
    """Mean cross-entropy of the tokens after the first of each document, with BOS before it or without."""
    losses = []
    with torch.no_grad():
        for ids in documents:
            logits = model(torch.cat([torch.tensor(bos, dtype=torch.int64), ids])[None])[0, len(bos) : -1]
            losses.append(torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none"))
    return torch.cat(losses).mean().item()


def test_a_nanogpt_of_characters_needs_no_option(nanogpt, tmp_path, capsys):
    found = probe(tmp_path, "out/ckpt.pt")
    assert "out/ckpt.pt: the mode bos is left out: its tokenizer has no BOS" in capsys.readouterr().out
    assert list(found) == ["text", "first_key_masked"]
    ids = torch.tensor([LETTERS.index(letter) for letter in TEXT])
    documents = [part[:63] for part in ids.split(64) if len(part) >= 16]
    assert len(documents) > 5 and found["text"]["documents"] == len(documents)
    assert found["text"]["loss"] == pytest.approx(loss(nanogpt, documents), rel=1e-5)


def test_a_folder_of_nanogpt_is_its_checkpoint_and_a_letter_may_be_its_bos(nanogpt, tmp_path):
    (tmp_path / "prompts.txt").write_text(TEXT[:60] + "\n")
    found = probe(tmp_path, "out", "--prompts", "prompts.txt", "--bos", "s", "--modes", "bos", "text")
    ids = torch.tensor([LETTERS.index(letter) for letter in TEXT[:60]])
    assert found["bos"]["loss"] == pytest.approx(loss(nanogpt, [ids], [LETTERS.index("s")]), rel=1e-5)
    assert found["text"]["loss"] == pytest.approx(loss(nanogpt, [ids]), rel=1e-5)


def test_a_folder_of_litgpt_is_measured_with_its_tokenizer(litgpt, tmp_path):
    folder, model, tokenizer = litgpt
    found = probe(tmp_path, folder, "--prompts", tmp_path / "prompts.txt")
    assert list(found) == ["bos", "text", "first_key_masked"]
    texts = (tmp_path / "prompts.txt").read_text().splitlines()
    documents = [torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])[:63] for text in texts]
    assert found["text"]["loss"] == pytest.approx(loss(model, documents), rel=1e-5)
    assert found["bos"]["loss"] == pytest.approx(loss(model, documents, [tokenizer.bos_token_id]), rel=1e-5)


def test_documents_end_where_the_tokenizer_has_an_end(litgpt, tmp_path, monkeypatch):
    folder, _, tokenizer = litgpt
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "letters").mkdir(parents=True)
    texts = [TEXT[:150], TEXT[30:110], TEXT[:3]]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    ended = [i for document in ids for i in [*document, tokenizer.eos_token_id]]
    numpy.array(ended, dtype=numpy.uint16).tofile(tmp_path / "data" / "letters" / "val.bin")
    save_nanogpt(tmp_path / "gpt2" / "ckpt.pt", vocab_size=320)
    found = probe(tmp_path, "gpt2/ckpt.pt", "--tokenizer", folder, "--sink_tokens", "8", "--modes", "text")
    counted = [min(len(document), 63) - 1 for document in ids[:2]]
    assert found["text"]["documents"] == 2 and found["text"]["tokens"] == sum(counted)


def refused(capsys, *arguments):
    assert main(["probe", *map(str, arguments)]) == 1
    captured = capsys.readouterr()
    assert not captured.out and captured.err.count("\n") == 1, "one message, and nothing was measured"
    return captured.err


def test_a_tokenizer_that_is_missing_or_another_models_is_named(nanogpt, litgpt, tmp_path, capsys):
    folder, _, _ = litgpt
    assert "nothing at nowhere" in refused(capsys, "out/ckpt.pt", "--tokenizer", "nowhere")
    meta = tmp_path / "data" / "letters" / "meta.pkl"
    (tmp_path / "other.pkl").write_bytes(meta.read_bytes())
    meta.write_bytes(pickle.dumps({"stoi": {"a": 0, "b": 1}}))
    message = refused(capsys, "out/ckpt.pt")
    assert f"meta.pkl: expected {len(LETTERS)} characters, as many as the model has embeddings, got 2" in message
    meta.unlink()
    message = refused(capsys, "out/ckpt.pt")
    assert "got none (no meta.pkl of its dataset, 'letters'); give --tokenizer" in message
    assert "GPT-2's: hf download openai-community/gpt2" in message
    assert "text" in probe(tmp_path, "out/ckpt.pt", "--tokenizer", "other.pkl")
    capsys.readouterr()
    message = refused(capsys, "out/ckpt.pt", "--tokenizer", folder)
    assert f"expected at most {len(LETTERS)} tokens, as many as the model has embeddings, got" in message
    message = refused(capsys, "out/ckpt.pt", "--tokenizer", tmp_path / "prompts.txt")
    assert "prompts.txt: expected a tokenizer of the `tokenizers` library" in message
    (folder / "tokenizer.json").unlink()
    message = refused(capsys, folder, "--prompts", tmp_path / "prompts.txt")
    assert "tokenizer.json: expected a tokenizer, got none; give a tokenizer.json with --tokenizer" in message


@pytest.mark.parametrize("name", ["out/ckpt.pt", "out/pretrain/tiny/final"])
def test_a_damaged_file_is_named(name, nanogpt, litgpt, tmp_path, capsys):
    path = tmp_path / name
    path = path if path.is_file() else path / "lit_model.pth"
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"text"):
        path.write_bytes(damaged)
        assert f"{path.name}: expected a file that torch.save wrote, got one that is cut off" in refused(capsys, name)
    path.write_bytes(content.replace(b"transformer", b"\xff\xff\xffnsformer"))
    assert f"{path.name}: expected what torch.save writes, got:" in refused(capsys, name)


def test_a_checkpoint_that_its_trainer_overwrites_is_read_when_its_turn_comes(nanogpt, litgpt, tmp_path):
    """Mapped since it was checked, a file that gets shorter was a bus error, one with other tensors their bytes."""
    options = dict(store=None, bos=None, tokenizer=None, revision=None, gguf=None, dtype="auto", device_map=None)
    names = ["out/ckpt.pt", str(litgpt[0])]
    subjects = [load(SimpleNamespace(model=name, **options)) for name in [*names, names[0]]]
    save_nanogpt(tmp_path / "out" / "ckpt.pt", vocab_size=len(LETTERS), compiled=False)
    assert torch.equal(subjects[0].model.model.lm_head.weight, nanogpt.lm_head.weight)
    (litgpt[0] / "lit_model.pth").write_bytes(b"")
    with pytest.raises(ValueError, match="cut off, damaged or of another kind"):
        _ = subjects[1].model
    save_nanogpt(
        tmp_path / "out" / "ckpt.pt",
        vocab_size=len(LETTERS),
        bias=True,
        model_args=dict(n_layer=1, n_head=4, n_embd=32, block_size=64, vocab_size=len(LETTERS)),
    )
    with pytest.raises(ValueError, match="expected the model that was checked, got another that was written there"):
        _ = subjects[2].model


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "got 0 bytes"),
        (bytes(401), "got 401 bytes"),
        (b"\x00\xff" * 99, f"expected ids below {len(LETTERS)}, the tokens of the tokenizer, got 65280"),
    ],
)
def test_text_of_another_tokenizer_or_cut_off_is_named(content, message, nanogpt, tmp_path, capsys):
    (tmp_path / "data" / "letters" / "val.bin").write_bytes(content)
    refusal = refused(capsys, "out/ckpt.pt", "--sink_tokens", 16)
    assert "letters/val.bin: expected" in refusal and message in refusal


def test_what_is_no_character_or_no_id_is_named(nanogpt, tmp_path, capsys):
    ids = {letter: index for index, letter in enumerate(LETTERS[1:], 1)}
    every = ({"ab": 0}, {b"a": 0}, {"\ud800": 0}, {"a": 0.0}, {"a": True})
    for entry in every:
        (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"stoi": ids | entry}))
        refusal = refused(capsys, "out/ckpt.pt", "--tokenizer", "meta.pkl")
        assert "meta.pkl: expected the meta.pkl of a nanoGPT dataset" in refusal, entry


def test_values_of_another_kind_are_named(nanogpt, litgpt, tmp_path, capsys):
    folder, _, _ = litgpt
    config = folder / "model_config.yaml"
    settings = yaml.safe_load(config.read_text())
    for name in ("mlp_class_name", "gelu_approximate"):
        config.write_text(yaml.dump({**settings, name: ["a"]}))
        assert f"model_config.yaml: {name}: expected" in refused(capsys, folder)
    config.write_text("[" * 2000)
    assert "model_config.yaml: expected YAML, got" in refused(capsys, folder)
    save_nanogpt(tmp_path / "list" / "ckpt.pt", config=["letters"])
    assert "expected a tokenizer, got none" in refused(capsys, "list")
    save_nanogpt(tmp_path / "list" / "ckpt.pt", model={1: torch.ones(2)})
    assert "expected the tensors of a model by name" in refused(capsys, "list")


def test_what_is_no_checkpoint_of_theirs_is_named(nanogpt, litgpt, tmp_path, capsys):
    folder, _, _ = litgpt
    torch.save({"weights": torch.ones(3)}, "other.pt")
    assert "expected a checkpoint of nanoGPT, with model and model_args, got weights" in refused(capsys, "other.pt")
    assert "--revision, --gguf: expected a Hugging Face model, got out" in refused(capsys, "out", "--revision", "main")
    (folder / "model_config.yaml").write_text("- a list")
    assert "model_config.yaml: expected the settings of a litgpt model, got list" in refused(capsys, folder)
    (folder / "model_config.yaml").write_text("a: [")
    assert "model_config.yaml: expected YAML, got" in refused(capsys, folder)
    (folder / "model_config.yaml").unlink()
    assert "lit_model.pth: expected litgpt's model_config.yaml beside it" in refused(capsys, folder)
    (folder / "lit_model.pth").unlink()
    (folder / "lit_model.pth").mkdir()
    assert "expected one file, got a folder of shards" in refused(capsys, folder)
    assert "nanoGPT (ckpt.pt) or litgpt (lit_model.pth), got none of these" in refused(capsys, tmp_path / "data")


def test_a_run_has_its_own_tokenizer(run_dir, tmp_path, capsys):
    assert "--tokenizer: expected none for a run" in refused(capsys, run_dir, "--tokenizer", tmp_path)


def test_a_hugging_face_model_may_have_a_tokenizer_from_elsewhere(exported, tiny_store, tmp_path):
    given = probe(tmp_path, exported, "--store", tiny_store, "--tokenizer", exported / "tokenizer.json")
    own = probe(tmp_path, exported, "--store", tiny_store)
    assert given == own
