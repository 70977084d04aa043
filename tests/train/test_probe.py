"""`sinkbed probe`: the figures of `validate` for our runs, and the same through Hugging Face."""

import json

import pytest

from train.cli import main
from train.validate import load_decoder, open_run

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, tiny_store):
    from tests.train.conftest import write_run_config

    folder = tmp_path_factory.mktemp("probe")
    config = write_run_config(folder / "run.yaml", tiny_store)
    assert main(["fit", "--config", str(config), "--wandb.mode", "disabled"]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def exported(run_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("hf") / "model"
    assert main(["export", str(run_dir), "--out", str(out)]) == 0
    return out


def probe(tmp_path, *arguments):
    path = tmp_path / "found.json"
    assert main(["probe", *map(str, arguments), "--sink_tokens", "16", "--documents", "6", "--json", str(path)]) == 0
    return json.loads(path.read_text())["results"]


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "expected text to read, found none: give --prompts FILE, or --store"),
        (["--prompts", "nowhere.txt"], "--prompts: no file at nowhere.txt"),
        (["--store", "STORE", "--sink_tokens", "400"], "found 47 in the longest, cropped to --length 48"),
        (["--store", "STORE", "--bos", "<none>"], "found '<none>', which is no token of"),
        (["--store", "STORE", "--modes", "bso"], "inference mode: expected one of"),
    ],
)
def test_what_is_missing_is_named(options, message, exported, tiny_store, capsys):
    options = [str(tiny_store) if option == "STORE" else option for option in options]
    assert main(["probe", str(exported), *options]) == 1
    assert message in capsys.readouterr().err


def test_a_tokenizer_without_bos_is_measured_on_text_alone(exported, tiny_store, tmp_path, capsys):
    import shutil

    shutil.copytree(exported, tmp_path / "no_bos")
    settings = tmp_path / "no_bos" / "tokenizer_config.json"
    found = json.loads(settings.read_text())
    del found["bos_token"]
    settings.write_text(json.dumps(found))
    assert main(["probe", str(tmp_path / "no_bos"), "--store", str(tiny_store), "--sink_tokens", "16"]) == 1
    assert "its tokenizer has no BOS" in capsys.readouterr().err
    text = probe(tmp_path, tmp_path / "no_bos", "--store", tiny_store, "--modes", "text")["natural"]["text"]["0"]
    named = probe(tmp_path, tmp_path / "no_bos", "--store", tiny_store, "--bos", "<bos>")["natural"]
    assert named["text"]["0"] == text and named["bos"]["0"]["loss"] != text["loss"]


def test_a_folder_that_is_no_model_is_named(tmp_path, capsys):
    assert main(["probe", str(tmp_path)]) == 1
    assert "expected a run directory (with config.yaml), a checkpoint inside one, or a Hugging Face" in (
        capsys.readouterr().err
    )


def test_the_run_under_test_is_loaded_from_its_newest_checkpoint(run_dir):
    checkpoint, folder = open_run(run_dir)
    assert folder == run_dir and checkpoint["global_step"] == 10
    assert load_decoder(checkpoint)[1].first_token == "bos"
