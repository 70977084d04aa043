"""`sinkbed prepare` says what it made, what it would make, and whether a store is intact."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sinkbed.data.prepare.chunks import Chunks, Gathered
from sinkbed.data.prepare.staging import DiskFullError
from sinkbed.data.store.manifest import Manifest
from sinkbed.train.cli.main import main
from tests.support import ROOT


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    lines = [json.dumps({"text": f"document {i} with a few words"}) for i in range(300)]
    (tmp_path / "corpus.jsonl").write_text("\n".join([*lines, "{broken"]))
    (tmp_path / "config.yaml").write_text(
        f"source: {{kind: jsonl, files: '{tmp_path}/corpus.jsonl', streaming: true}}\n"
        f"tokenizer: {{vocab_size: 270}}\nvalidation_share: 0.1\nout: {tmp_path}/store\n"
    )
    return ["prepare", "--config", str(tmp_path / "config.yaml")]


def test_the_last_line_tells_what_was_left_out(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--workers", "1"]) == 1
    assert "corpus.jsonl, line 301: expected JSON" in capsys.readouterr().err
    assert main([*command, "--workers", "1", "--on_error", "skip"]) == 0
    printed = capsys.readouterr()
    assert "left out: 1 malformed" in printed.out and "MB/s" in printed.err and "tokens/s" in printed.err


def test_a_dry_run_prints_the_size_and_time_and_writes_nothing(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert main([*command, "--dry_run", "--on_error", "skip", "--workers", "1"]) == 0
    printed = capsys.readouterr().out
    for part in ("documents        300 (known)", "bytes per token", "disk", "time left", "1 malformed"):
        assert part in printed
    assert sorted(tmp_path.rglob("*")) == before


def test_a_store_is_checked_by_its_path_alone(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--on_error", "skip", "--quiet", "--workers", "1"]) == 0
    check = ["prepare", "--check", str(tmp_path / "store")]
    assert main(check) == 0
    assert "2 shards, every checksum as written" in capsys.readouterr().out
    manifest = tmp_path / "store" / "manifest.json"
    content = manifest.read_text()
    manifest.write_text(content.replace('"bos_id": 0', '"bos_id": 1'))
    assert main(check) == 1
    assert "manifest.json: expected an intact manifest" in capsys.readouterr().err
    manifest.write_text(content)
    shard = tmp_path / "store" / "validation" / "00000.arrow"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert main(check) == 1
    assert "validation/00000.arrow is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("split", "documents"),
    [(["--source.split", "line"], 6), (["--source.split", "blank_line"], 3), ([], 3), (["--source.split", "file"], 1)],
)
def test_a_text_file_of_many_documents_is_three_lines(
    split: list[str], documents: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.txt").write_text("one one\nmore\n\ntwo two\nmore\n\nthree\nmore\n")
    (tmp_path / "config.yaml").write_text(
        'source: {kind: text, files: ~/mine.txt, streaming: true, split: {separator: "\\n\\n"}}\n'
        "tokenizer: {vocab_size: 260}\nvalidation_share: 0\nout: ~/store\n"
    )
    arguments = ["prepare", "--config", str(tmp_path / "config.yaml"), "--workers", "1", "--quiet", *split]
    assert main(arguments) == 0
    assert main(["prepare", "--check", "~/store"]) == main(["prepare", "--check=~/store"]) == 0
    assert Manifest.read(tmp_path / "store").splits["train"].documents == documents


def test_a_wrong_key_is_answered_before_anything_heavy_is_imported() -> None:
    heavy = ("torch", "lightning", "datasets", "pyarrow")
    script = f"""
import sys
from sinkbed.train.cli.main import main
try:
    main(["prepare", "--config", "configs/data/demo.yaml", "--tokenizer.vocab_sise", "3"])
except SystemExit as ended:
    print(ended.code, [name for name in {heavy} if name in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "did you mean tokenizer.vocab_size?" in result.stderr
    assert result.stdout.strip() == "2 []"


def test_a_full_disk_is_told_in_the_words_of_preparing(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "sinkbed.data.prepare.prepare.prepare", lambda *_, **__: (_ for _ in ()).throw(DiskFullError(28, "kept in x"))
    )
    assert main(command) == 1
    assert capsys.readouterr().err.strip().endswith("sinkbed prepare: kept in x")


@pytest.mark.parametrize("end", ["parquet", "jsonl"])
def test_the_advice_for_files_given_as_text_works(
    end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Regression: to set source.kind, as was advised, led into a refusal of source.split; JSONL became documents."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.chdir(ROOT)
    texts = [f"document {i} with a few words" for i in range(60)]
    if end == "parquet":
        pq.write_table(pa.table({"text": texts}), tmp_path / "a mine.parquet")
    else:
        (tmp_path / "a mine.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    options = ["--out", str(tmp_path / "store"), "--validation_share", "0", "--workers", "1", "--quiet"]
    wrong = ["prepare", "--config", "configs/data/local_text.yaml", "--source.files", str(tmp_path / "*"), *options]
    for dry_run in ([], ["--dry_run"]):
        assert main([*wrong, *dry_run]) == 1
        [advice] = re.findall("use `sinkbed (.*)`", capsys.readouterr().err)
    assert main([*shlex.split(advice), *options]) == 0
    assert Manifest.read(tmp_path / "store").splits["train"].documents == 60


def test_few_held_out_documents_are_told_when_a_store_is_made(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Regression: a run found out in its midst that there was nothing to measure on."""
    command += ["--on_error", "skip", "--workers", "1"]
    for dry_run, number in ((["--dry_run"], "30"), ([], "0")):  # the dry run does not know which are long enough
        assert main([*command, *dry_run]) == 0
        out = capsys.readouterr().out
        assert f"100 held-out documents of at least 64 tokens, got {number}; raise validation_share (now 0.1)" in out
    lines = [json.dumps({"text": f"document {i} " + "with a few words " * 20}) for i in range(300)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines))
    assert main([*command, "--validation_share", "0.5", "--force"]) == 0
    assert "held-out" not in capsys.readouterr().out


def test_the_beginning_of_a_key_is_no_key(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Regression: argparse took --source.file for --source.files."""
    for option, meant in (("--source.file", "source.files"), ("--tokenizer.vocab", "tokenizer.vocab_size")):
        with pytest.raises(SystemExit):
            main([*command, option, "3"])
        assert f"{option}: expected a known key, got none of that name; did you mean {meant}?" in (
            capsys.readouterr().err
        )


def test_a_misspelt_key_of_a_file_is_named_with_its_group_and_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("source:\n  kind: jsonl\n  file: [x]\nout: s\n")
    with pytest.raises(SystemExit):
        main(["prepare", "--config", str(config)])
    assert f"{config}, line 3: source.file: expected a known key" in capsys.readouterr().err


def test_an_interrupted_preparation_says_what_is_kept(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = Chunks.finish

    def finish(chunks: Chunks, number: int, gathered: Gathered) -> None:
        if number == 1:
            raise KeyboardInterrupt
        real(chunks, number, gathered)

    monkeypatch.setattr(Chunks, "finish", finish)
    command += ["--on_error", "skip", "--workers", "1", "--shard_bytes", "4000", "--quiet"]
    assert main(command) == 130
    kept = f"interrupted; 1 finished chunk kept in {tmp_path}/.store.partial: run it again to go on"
    assert kept in capsys.readouterr().err
    monkeypatch.undo()
    assert main(command) == 0


def test_workers_below_one_are_refused(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--workers", "0"]) == 1
    assert "--workers: expected at least 1, got 0" in capsys.readouterr().err
