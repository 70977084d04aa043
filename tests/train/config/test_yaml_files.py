"""YAML files: nothing is lost, nothing is taken for something else."""

import pytest

from sinkbed.train.config.yaml_files import key_lines, read_mapping, read_yaml


@pytest.fixture
def file(tmp_path):
    def write(text: str | bytes):
        path = tmp_path / "file.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def test_a_key_is_the_text_that_stands_there(file):
    assert read_yaml(file("on: 1\noff: {1e-3: 2}\n010: no\n")) == {"on": 1, "off": {"1e-3": 2}, "010": False}


def test_aliases_and_merges_are_read(file):
    path = file("a: &a {b: 1}\nc: {<<: *a, d: 2}\ne: *a\n")
    assert read_yaml(path) == {"a": {"b": 1}, "c": {"b": 1, "d": 2}, "e": {"b": 1}}
    assert key_lines(path) == {"a": 1, "a.b": 1, "c": 2, "c.b": 1, "c.d": 2, "e": 3, "e.b": 1}


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "line 3: expected each key once, got 'a' here and in line 1"),
        ("a: {b: 1}\nc: {d: {e: 1, e: 2}}\n", "line 2: expected each key once, got 'e'"),
        ("seed: 010\n", "line 1: expected a decimal number, got 010, which YAML reads as 8"),
        ("seed: 1:30\n", "got 1:30, which YAML reads as 90"),
        ("lr: 1:30.5\n", "got 1:30.5, which YAML reads as 90.5"),
        ("a: &a [*a]\n", "expected at most 1,000,000 values"),
        (BOMB, "line 6: expected at most 1,000,000 values"),
        ("[" * 50_000, "file.yaml: expected YAML of plain values"),
        ("? [1, 2]\n: 3\n", "line 1: expected a name as the key"),
        ("a: !!python/object/apply:os.getcwd []\n", "line 1: expected YAML of plain values"),
        (b"a: \xff\n", "file.yaml: expected YAML of plain values"),
    ],
)
def test_what_would_surprise_is_refused_with_its_line(file, text, message):
    with pytest.raises(ValueError, match=r"file\.yaml") as caught:
        read_yaml(file(text))
    assert message in str(caught.value)


@pytest.mark.parametrize("text", ["[1, 2]", "", "words"])
def test_a_config_is_a_mapping(file, text):
    with pytest.raises(ValueError, match=r"file.yaml: expected YAML with keys"):
        read_mapping(file(text))
