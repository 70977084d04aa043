"""`sinkbed prepare`: documents to a token store, from a config."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from train.rundir import MANIFEST

if TYPE_CHECKING:
    from data.manifest import Manifest


def run(command: str, argv: Sequence[str]) -> int:
    """Parse and prepare."""
    from data.prepare import PrepareConfig, prepare
    from train.arguments import ShortParser, check_yaml

    check_yaml(argv)
    parser = ShortParser(prog=f"sinkbed {command}", description="Documents to a token store.")
    parser.add_argument("--config", action="config", help="YAML file with the keys below")
    parser.add_class_arguments(PrepareConfig, None)
    parser.add_argument("--force", action="store_true", help="replace a store made from another config")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    config = parser.parse_args(list(argv))
    built = parser.instantiate_classes(config).as_dict()
    force, quiet = built.pop("force"), built.pop("quiet")
    built.pop("config", None)
    began = time.perf_counter()
    wanted = PrepareConfig(**built)
    there = not force and (Path(wanted.out) / MANIFEST).exists()
    manifest = prepare(wanted, force=force, progress=not quiet)
    if not quiet:
        seconds = "up to date" if there else f"{time.perf_counter() - began:.0f} s"
        print(f"{wanted.out}: {summary(manifest)}; {seconds}")
    return 0


def summary(manifest: Manifest) -> str:
    """What a token store holds, in one line."""
    splits = [f"{name} {s.documents:,} documents, {s.tokens:,} tokens" for name, s in manifest.splits.items()]
    train = manifest.splits["train"]
    counts = ", ".join(f"{count:,} {reason.replace('_', ' ')}" for reason, count in manifest.left_out.items())
    left_out = f"; left out: {counts}" if counts else ""
    return (
        f"{'; '.join(splits)}; vocabulary {manifest.vocab_size:,}, "
        f"{train.bytes / max(1, train.tokens):.2f} bytes a token{left_out}"
    )
