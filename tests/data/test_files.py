"""Files that are written whole or not at all."""

import json

import pytest

from sinkbed.data.files import load_json, remove_temporaries, replacing, write_json


def test_half_a_character_is_written_and_read_back(tmp_path):
    """In a path or an argument that is no UTF-8 there may be one."""
    fields = {"a": "\ud800", "b": "ü"}
    write_json(tmp_path / "sealed.json", fields)
    write_json(tmp_path / "plain.json", fields, seal=False)
    assert load_json(tmp_path / "sealed.json") == json.loads((tmp_path / "plain.json").read_text()) == fields


def test_an_error_names_the_file_that_it_is_of(tmp_path):
    """Of another file that is read meanwhile, that one; the old content stays and nothing else."""
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(OSError, match=str(tmp_path / "other")), replacing(path):
        (tmp_path / "other").read_bytes()
    with pytest.raises(OSError, match=f"No space.*{path}"), replacing(path):
        raise OSError(28, "No space left on device")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_of_what_a_kill_left_only_files_are_removed(tmp_path):
    (tmp_path / ".a.0123.partial").write_text("half")
    (tmp_path / ".export.7.partial").mkdir()
    remove_temporaries(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".export.7.partial"]
