"""`sinkbed prepare`: documents to a token store, from a config; or what that would take; or whether one is intact."""

import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from sinkbed.plain_text import counted
from sinkbed.ranges import check_number
from sinkbed.train.run.directory import MANIFEST

if TYPE_CHECKING:
    from sinkbed.data.prepare.estimate import Estimate
    from sinkbed.data.store.manifest import Manifest


def run(command: str, argv: Sequence[str]) -> int:
    """Parse and prepare, estimate or check."""
    from sinkbed.data.prepare.config import PrepareConfig
    from sinkbed.data.prepare.prepare import prepare
    from sinkbed.train.config.arguments import ShortParser, check_keys, known_keys, refuse_classes, rewritten

    if any(argument.partition("=")[0] == "--check" for argument in argv):
        return _check(command, argv)
    refuse_classes()
    parser = ShortParser(prog=f"sinkbed {command}", description="Documents to a token store.")
    parser.add_argument("--config", action="config", help="YAML file with the keys below")
    parser.add_class_arguments(PrepareConfig, None)
    parser.add_argument(
        "--workers", type=int | None, default=None, help="processes that encode; the store is the same for any number"
    )
    parser.add_argument("--dry_run", action="store_true", help="read a sample, say what the rest would take; no writes")
    parser.add_argument(
        "--force", action="store_true", help="replace a store made from another config, start over one begun from it"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar and no summary")
    parser.add_argument("--check", metavar="STORE", help="read a token store and compare every checksum; no config")
    check_keys(parser.prog, argv, known_keys(parser))
    config = parser.parse_args(list(argv))
    try:
        built = parser.instantiate_classes(config).as_dict()
    except ValueError as error:
        raise ValueError(rewritten(str(error), [])) from None
    force, quiet, workers, dry_run = (built.pop(name) for name in ("force", "quiet", "workers", "dry_run"))
    for name in ("config", "check"):
        built.pop(name, None)
    if workers is not None:
        check_number("--workers", workers, least=1)
    settings = PrepareConfig(**built)
    if dry_run:
        from sinkbed.data.prepare.estimate import estimate

        size = estimate(settings, workers=workers)
        print("\n".join(described(size)))
        if size.documents is not None:
            print(few_held_out(size.documents * settings.validation_share, settings.validation_share), end="")
        return 0
    began = time.perf_counter()
    there = not force and (Path(settings.out) / MANIFEST).exists()
    try:
        manifest = prepare(settings, force=force, progress=not quiet, workers=workers)
    except KeyboardInterrupt:
        from sinkbed.data.prepare.staging import partial_of

        folder = partial_of(settings.out)
        kept = counted(len(list(folder.glob("chunks/*.json"))), "finished chunk")
        print(f"sinkbed {command}: interrupted; {kept} kept in {folder}: run it again to go on", file=sys.stderr)
        return 130
    if not quiet:
        seconds = "up to date" if there else f"{time.perf_counter() - began:.0f} s"
        print(f"{settings.out}: {summary(manifest)}; {seconds}")
        print(few_held_out(_long_documents(settings.out, manifest), settings.validation_share), end="")
    return 0


def few_held_out(documents: float, share: float) -> str:
    """A line on what to change where a run would find fewer held-out documents than it measures; else nothing."""
    from sinkbed.train.measure.config import MeasureConfig

    measure = MeasureConfig()
    if documents >= measure.documents:
        return ""
    return (
        f"validation: a run measures {measure.documents} held-out documents of at least {measure.sink_tokens} tokens, "
        f"got {documents:,.0f}; raise validation_share (now {share}), or lower measure.documents or "
        "measure.sink_tokens of the run\n"
    )


def _long_documents(store: str, manifest: "Manifest") -> int:
    from sinkbed.data.store.token_store import TokenStore
    from sinkbed.train.measure.config import MeasureConfig
    from sinkbed.train.measure.heldout import held_out

    if "validation" not in manifest.splits:
        return 0
    config = MeasureConfig()
    return sum(1 for _ in held_out(TokenStore.open(store, "validation"), config.sink_tokens + 1, config))


def summary(manifest: "Manifest") -> str:
    """What a token store holds, in one line."""
    splits = [
        f"{name} {counted(s.documents, 'document')}, {counted(s.tokens, 'token')}"
        for name, s in manifest.splits.items()
    ]
    train = manifest.splits["train"]
    left_out = f"; left out: {_counted(manifest.left_out)}" if manifest.left_out else ""
    return (
        f"{'; '.join(splits)}; vocabulary {manifest.vocab_size:,}, "
        f"{train.bytes / max(1, train.tokens):.2f} bytes a token{left_out}"
    )


def described(size: "Estimate") -> list[str]:
    """An estimate, a line per quantity."""

    def of(value: float | None, shape: str = "{:,}") -> str:
        return "unknown" if value is None else shape.format(value)

    how = "known" if size.known else "estimated" if size.documents is not None else "the source does not tell"
    all_read = size.documents == size.sample_documents
    width = size.tokens * size.spread if size.tokens and size.spread else 0.0
    span = f" ({size.tokens - width:,.0f} to {size.tokens + width:,.0f})" if size.tokens and width else ""
    left = "unknown" if size.seconds is None else str(timedelta(seconds=max(1, round(size.seconds))))
    trained = ", by a tokenizer trained on the sample" if size.trained_on_sample else ""
    lines = [
        f"sample           {counted(size.sample_documents, 'document')}, {size.sample_bytes:,} bytes",
        f"documents        {of(size.documents)} ({how})",
        f"bytes            {of(size.bytes)}" + ("" if all_read or size.bytes is None else " (from the sample)"),
        f"bytes per token  {size.bytes_per_token:.2f}{trained}",
        f"tokens           {of(size.tokens)}{span}",
        f"disk             {of(None if size.disk is None else size.disk / 1e9, '{:,.3f} GB')}",
        f"time left        {left} at {size.rate / 1e6:.2f} MB/s",
    ]
    if size.finished_bytes:
        lines.append(f"finished         {size.finished_bytes:,} bytes of text by a run that was stopped")
    if size.left_out:
        lines.append(f"left out         {_counted(size.left_out)} (of the sample)")
    return lines


def _counted(reasons: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {reason.replace('_', ' ')}" for reason, count in reasons.items())


def _check(command: str, argv: Sequence[str]) -> int:
    """Open every split of a token store and compare the sha256 of every shard."""
    from sinkbed.train.config.arguments import PlainParser

    parser = PlainParser(prog=f"sinkbed {command}")
    parser.add_argument("--check", metavar="STORE", required=True, help="token store to read")
    store = parser.parse_args(list(argv)).check

    from sinkbed.data.store.manifest import Manifest
    from sinkbed.data.store.token_store import TokenStore

    manifest = Manifest.read(Path(store))
    for split in manifest.splits:
        TokenStore.open(store, split).verify()
    shards = sum(len(info.shards) for info in manifest.splits.values())
    print(f"{store}: {shards} shards, every checksum as written; {summary(manifest)}")
    return 0
