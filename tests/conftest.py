"""Shared by all tests: one thread, no W&B key, no network; a tiny token store."""

import json
import os
from pathlib import Path

os.environ["WANDB_API_KEY"] = ""
os.environ["WANDB_MODE"] = "offline"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Before anything imports triton: without a GPU its kernels run in the interpreter.
if not Path("/dev/nvidiactl").exists() and not Path("/dev/kfd").exists():
    os.environ["TRITON_INTERPRET"] = "1"

import logging

import pytest
import torch

# Lightning's log handler keeps the stream of the first test; writing to it later is pytest's affair, not ours.
logging.raiseExceptions = False

torch.set_num_threads(1)
torch.set_flush_denormal(True)  # as training and measuring do, whichever test comes first


def pytest_addoption(parser: pytest.Parser) -> None:
    """`pytest tests/train/loop/test_faults.py --kills 200` is the long form of the fault tests."""
    parser.addoption("--kills", type=int, default=8, help="random kills of training runs, over all of them")
    parser.addoption("--every_kernel", action="store_true", help="compiled kernels: every setting with every other")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """`pytest -m gpu` imports files with such tests alone: a bare GPU machine lacks what the others need."""
    if config.option.markexpr != "gpu":
        return None
    files = collection_path.rglob("test_*.py") if collection_path.is_dir() else [collection_path]
    return not any("pytest.mark.gpu" in file.read_text() for file in files) or None


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A token store of 400 short generated documents, vocabulary 300."""
    from sinkbed.data.prepare.config import PrepareConfig, TokenizerConfig
    from sinkbed.data.prepare.prepare import prepare
    from sinkbed.data.source.config import Source

    folder = tmp_path_factory.mktemp("tiny")
    words = ["sink", "bos", "row", "token", "mask", "head", "layer", "mass", "first", "key"]
    with (folder / "docs.jsonl").open("w") as file:
        for i in range(400):
            text = " ".join(words[(i * 7 + j * j + j * i) % 10] for j in range(10 + (i * 13) % 60))
            file.write(json.dumps({"text": f"{i}: {text}."}) + "\n")
    prepare(
        PrepareConfig(
            source=Source(kind="jsonl", files=(str(folder / "docs.jsonl"),), column="text"),
            tokenizer=TokenizerConfig(vocab_size=300),
            validation_share=0.1,
            out=str(folder / "store"),
        ),
        progress=False,
    )
    return folder / "store"
