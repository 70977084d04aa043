"""Prepare: documents -> tokenizer -> token store, in one call that is safe to repeat.

One process reads the documents in their order, selects them and cuts them into chunks and batches
(`source.selection`); others encode the batches (`encoding`); each chunk becomes a shard per split and a
record that it is done (`chunks`). Nothing in the store depends on the number of processes, nor on how
often the work was stopped: called again, it goes on after the last chunk that was finished. The tokenizer is
trained on documents of the training split only, once.

A store records what it was made from, down to the sha256 of local files. Called again with the same
config, `prepare` compares every checksum and returns; with another, it refuses rather than mix two corpora.

This module imports neither datasets nor tokenizers until `prepare` is called.
"""

import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sinkbed.data.files import differing
from sinkbed.data.prepare.config import SHARD_BYTES, TRAIN_BYTES, VOCAB_SIZE, PrepareConfig
from sinkbed.data.prepare.recipe import recipe_of
from sinkbed.data.source.documents import Documents
from sinkbed.data.source.selection import batches
from sinkbed.data.store.manifest import MANIFEST_NAME, Manifest
from sinkbed.plain_text import counted
from sinkbed.ranges import check_number

if TYPE_CHECKING:
    from sinkbed.data.prepare.chunks import Chunks
    from sinkbed.data.tokenizer import Tokenizer


def prepare(
    config: PrepareConfig, *, force: bool = False, progress: bool = True, workers: int | None = None
) -> Manifest:
    """Make the token store that `config` describes, unless it is there already; go on where a run was stopped.

    Args:
        force: make it again, replace whatever token store stands at `config.out`, and start over what was
            begun from another config.
        progress: draw progress bars on stderr.
        workers: processes that encode; the store does not depend on it. None: one per core.

    Raises FileNotFoundError for missing sources, FileExistsError where `out` is taken by something that is
    no token store, ValueError for an unfit source or tokenizer and where `out` holds a store made, or begun,
    from another config, `staging.DiskFullError` when there is no space left,
    `encoding.WorkerDiedError`.
    """
    workers = available_cores() if workers is None else workers
    check_number("workers", workers, least=1)
    out = Path(config.out)
    recipe = recipe_of(config)
    standing = (out / MANIFEST_NAME).exists()
    if not force and standing:
        return _up_to_date(out, recipe)

    from sinkbed.data.prepare.chunks import Chunks, begun_recipe
    from sinkbed.data.prepare.staging import StagingFolder

    with StagingFolder(out, replace=force) as staging:
        # A forced run that was stopped is forced again to go on; it starts over where nothing needs the force.
        begun = begun_recipe(staging.folder)
        needless = not standing and not (staging.folder / MANIFEST_NAME).is_file()
        chunks = Chunks(staging, recipe, start_over=force and (needless or begun not in (None, recipe)))
        manifest = chunks.published()
        if manifest is not None:
            return manifest
        try:
            return _fill(config, recipe, chunks, workers, progress)
        except (ValueError, FileNotFoundError):
            # The config has to change: nothing of this one is worth keeping.
            if not chunks.finished:
                staging.discard()
            raise


def no_documents(where: str, left_out: Mapping[str, int]) -> ValueError:
    """That no document is left of a source."""
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(left_out.items()))
    return ValueError(
        f"source: expected documents that the config lets pass, got none{where and f' {where}'} (left out: {reasons}); "
        "look at min_bytes and max_bytes"
    )


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _fill(config: PrepareConfig, recipe: dict[str, Any], chunks: "Chunks", workers: int, progress: bool) -> Manifest:
    """Make the chunks that are missing, then the store."""
    from sinkbed.data.prepare.chunks import FORGOTTEN, Gathered
    from sinkbed.data.prepare.encoding import Encoded, Encoder
    from sinkbed.data.prepare.staging import manifest_of

    documents = Documents(config.source, on_error=config.on_error)
    tokenizer = None if config.tokenizer.path else chunks.kept_tokenizer()
    if tokenizer is None:
        tokenizer = make_tokenizer(config, documents, progress)
        chunks.write_tokenizer(tokenizer)
    selected = config.select(documents, tokenizer)
    gathered = Gathered()
    read = size = tokens = 0
    began = time.perf_counter()
    done = set(chunks.finished)
    cut = batches(selected, config.shard_bytes or SHARD_BYTES)

    def seen(part: Encoded) -> None:
        """Tell how fast, also inside a long document; what was finished before does not count as fast."""
        nonlocal size, tokens
        size, tokens, seconds = size + int(part.sizes.sum()), tokens + len(part.tokens), time.perf_counter() - began
        speed = f"{size / 1e6:,.0f} MB, {size / seconds / 1e6:.1f} MB/s, {tokens / seconds / 1e6:.2f}M tokens/s"
        bar.set_postfix_str(speed, refresh=False)
        bar.update(0)

    with _bar("encoding", progress, total=documents.count()) as bar, Encoder(tokenizer, workers) as encoder:
        for batch, encoded in encoder.map(cut, done, seen):
            gathered.add(batch, encoded)
            bar.update(len(batch.documents))
            if not batch.last:
                continue
            if batch.chunk in done:
                chunks.compare(batch.chunk, gathered)
            else:
                chunks.finish(batch.chunk, gathered)
            gathered = Gathered()
            read = batch.chunk + 1
    unread = [number for number in chunks.finished if number >= read]
    if unread:
        raise ValueError(
            f"{chunks.staging.folder}: the source gives fewer documents than when chunk {unread[0]} was made; pin its "
            "revision or put its files back, or remove that folder to start over"
        )
    shards = chunks.shards()
    written = {split: sum(shard.documents for shard in shards.get(split, ())) for split in ("train", "validation")}
    left_out = documents.left_out + selected.left_out
    if not any(written.values()):
        chunks.staging.discard()
        raise no_documents("", left_out)
    if not written["train"] or (config.validation_share and not written["validation"]):
        chunks.staging.discard()
        raise ValueError(
            f"validation_share: expected a share that leaves documents in both splits, got {config.validation_share}, "
            f"which makes {counted(written['train'], 'training document')} and "
            f"{counted(written['validation'], 'validation document')}; change it, or set it to 0"
        )
    return chunks.staging.publish(manifest_of(recipe, tokenizer, shards, left_out), FORGOTTEN)


def _up_to_date(out: Path, recipe: dict[str, Any]) -> Manifest:
    """The manifest at `out` if its store is whole and was made from `recipe`; else ValueError."""
    from sinkbed.data.prepare.staging import sweep
    from sinkbed.data.store.token_store import TokenStore

    manifest = Manifest.read(out)
    if changed := differing(manifest.recipe, recipe):
        raise ValueError(
            f"{out} holds a token store made from other settings or files ({changed}); choose another --out, or "
            "replace it with `sinkbed prepare --force`"
        )
    for split in manifest.splits:
        TokenStore.open(out, split).verify()
    sweep(out)
    return manifest


def make_tokenizer(config: PrepareConfig, documents: Documents, progress: bool) -> "Tokenizer":
    """Load the tokenizer of a config, or train it on the first documents of the training split."""
    from sinkbed.data.tokenizer import Tokenizer

    chosen = config.tokenizer
    if chosen.path:
        return Tokenizer.load(chosen.path, bos=chosen.bos, eos=chosen.eos)
    with _bar("training the tokenizer", progress, _training_texts(config, documents)) as texts:
        return Tokenizer.train(texts, vocab_size=chosen.vocab_size or VOCAB_SIZE)


def _training_texts(config: PrepareConfig, documents: Documents) -> Iterator[str]:
    """The first selected documents of the training split, up to the limits of the tokenizer's config.

    The last one is given whole, but of no document more than `train_bytes`.
    """
    budget = limit = config.tokenizer.train_bytes or TRAIN_BYTES
    count = 0
    for document in config.select(documents):
        if document.split != "train":
            continue
        fits = document.size <= limit
        yield document.text if fits else document.text[:limit].encode()[:limit].decode(errors="ignore")
        budget -= document.size
        count += 1
        if budget <= 0 or count == config.tokenizer.train_documents:
            return


def _bar(label: str, progress: bool, documents: Iterator[str] | None = None, total: int | None = None) -> Any:
    """A progress bar, around documents or by itself."""
    from tqdm import tqdm

    # disable=None would hide the bar where stderr is no terminal; batch logs should show it, slowly.
    return tqdm(documents, desc=label, total=total, unit=" documents", mininterval=1.0, disable=not progress)
