"""What preparing a config would give and take, from a bounded sample (`sampling`); nothing is written.

Local files are sampled all over, and what is inferred from the sample comes with a range. Of Parquet and the demo
corpus the number of records is known, of a hub data set where its card tells. A mixture that ends with the
source that runs out first, and a hub data set that tells nothing, can be sampled but not added up.
"""

import dataclasses
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from sinkbed.data.prepare.config import TRAIN_BYTES, PrepareConfig
from sinkbed.data.prepare.prepare import available_cores, make_tokenizer, no_documents
from sinkbed.data.prepare.recipe import recipe_of
from sinkbed.data.prepare.sampling import Sample, Stretch, streamed
from sinkbed.data.source.config import Source
from sinkbed.data.source.documents import Documents
from sinkbed.data.source.selection import batches
from sinkbed.data.store.manifest import token_type

SAMPLE_BYTES = 8_000_000
_DOCUMENT_BYTES = 16  # an offset and a length in the token store


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Sizes of the token store to be, and how long it takes. None: cannot be told from a sample."""

    documents: int | None
    known: bool
    """Whether `documents` is the source's own count of its records rather than inferred from the sample."""
    bytes: int | None
    """UTF-8 bytes of the documents' text."""
    bytes_per_token: float
    tokens: int | None
    spread: float | None
    """Half the width of the range in which `tokens` lies with 95 % probability, as a share of it. None: unknown."""
    disk: int | None
    """Bytes of the token store."""
    seconds: float | None
    """Time left to encode, at `rate`, without the training of a tokenizer."""
    rate: float
    """Bytes of text a second: one process's times the workers that have a core, at most what is read a second."""
    finished_bytes: int
    """Bytes of text in shards that a stopped run has finished."""
    sample_documents: int
    sample_bytes: int
    trained_on_sample: bool
    """Whether the tokenizer was trained on the sample, the real one being trained on more."""
    left_out: dict[str, int]
    """Records of the sample that give no document, by reason."""


def estimate(config: PrepareConfig, *, workers: int | None = None, sample_bytes: int = SAMPLE_BYTES) -> Estimate:
    """Read up to `sample_bytes` of text, encode it with `workers` processes, and add up. Raises as `prepare`."""
    from sinkbed.data.prepare.encoding import Encoder

    began = time.perf_counter()
    sample = Sample(config, sample_bytes)
    read_seconds = time.perf_counter() - began
    reading = _Stretches(config.source, sample.stretches)
    chosen = config.select(reading)
    # A selection takes one text after the other: the stretch that is read is that of the document it gives.
    documents, owners = [], []
    for document in chosen:
        documents.append(document)
        owners.append(reading.at)
    left_out = sample.left_out + chosen.left_out
    if not documents:
        raise no_documents("in the sample", left_out)
    tokenizer = make_tokenizer(*_training(config, sample, sample_bytes), progress=False)
    # One process is timed, as many as there are cores for are assumed to do as much each, and none can be faster than
    # the one that reads: timing all of them on a sample would time how they start and stop.
    start = time.perf_counter()
    with Encoder(tokenizer, 1) as encoder:
        counts = np.concatenate([e.counts for _, e in encoder.map(batches(documents, 2**62)) if e is not None])
    sizes = np.array([document.size for document in documents])
    size, tokens = int(sizes.sum()), int(counts.sum())
    rate = size / (time.perf_counter() - start) * min(workers or available_cores(), available_cores())
    if read_seconds:
        rate = min(rate, size / read_seconds)
    finished = _finished_bytes(config)
    token_bytes = np.dtype(token_type(tokenizer.vocab_size)).itemsize
    shares = np.array([stretch.share for stretch in sample.stretches])[owners]
    documents_total, _ = _total(sample, shares, owners, known=not left_out)
    bytes_total, _ = _total(sample, sizes, owners)
    tokens_total, spread = _total(sample, counts, owners)
    return Estimate(
        documents=None if documents_total is None else round(documents_total),
        known=sample.whole or (not left_out and all(part.whole or bool(part.records) for part in sample.parts)),
        bytes=None if bytes_total is None else round(bytes_total),
        bytes_per_token=size / max(1, tokens),
        tokens=None if tokens_total is None else round(tokens_total),
        spread=spread,
        disk=None
        if tokens_total is None or documents_total is None
        else round(tokens_total * token_bytes + documents_total * _DOCUMENT_BYTES),
        seconds=None if bytes_total is None else max(0, round(bytes_total) - finished) / rate,
        rate=rate,
        finished_bytes=finished,
        sample_documents=len(documents),
        sample_bytes=size,
        trained_on_sample=config.tokenizer.path is None and not sample.whole,
        left_out=dict(sorted(left_out.items())),
    )


def _total(
    sample: Sample, amounts: np.ndarray, owners: list[int], known: bool = False
) -> tuple[float | None, float | None]:
    """What all parts hold together of what each document has so much of, and the half width of its range as a share.

    `known`: documents are added up, and where a part tells how many records it has, that is how many there are.
    """
    per_stretch = np.bincount(owners, amounts, minlength=len(sample.stretches))
    total = variance = 0.0
    for part in sample.parts:
        if part.size is None:
            return None, None
        here, per_stretch = per_stretch[: len(part.stretches)], per_stretch[len(part.stretches) :]
        added, its_variance = part.total(here)
        total += part.records if known and part.records else added
        variance += its_variance
    spread = 2 * math.sqrt(variance) / max(total, 1.0) if variance == variance else None
    return total, spread


def _training(config: PrepareConfig, sample: Sample, budget: int) -> tuple[PrepareConfig, Documents]:
    """What to train the tokenizer on: the sample, in no order, or the documents that come first if order is kept."""
    texts = [text for stretch in sample.stretches for text in stretch.texts]
    if sample.whole or config.tokenizer.path or config.source.shuffle_seed is not None:
        if not sample.whole:
            random.Random(0).shuffle(texts)
        return config, _Stretches(config.source, [Stretch(0, texts)])
    limit = min(budget, config.tokenizer.train_bytes or TRAIN_BYTES)
    short = dataclasses.replace(config, tokenizer=dataclasses.replace(config.tokenizer, train_bytes=limit))
    return short, Documents(streamed(config.source), on_error=config.on_error)


class _Stretches(Documents):
    """The texts of stretches, and at which of them the reading is."""

    def __init__(self, source: Source, stretches: list[Stretch]) -> None:
        super().__init__(source)
        self._stretches = stretches
        self.at = 0

    def __iter__(self) -> Iterator[str]:
        for number, stretch in enumerate(self._stretches):
            self.at = number
            yield from stretch.texts


def _finished_bytes(config: PrepareConfig) -> int:
    """Bytes of text that a stopped run of this config has encoded."""
    from sinkbed.data.prepare.chunks import CHUNKS_NAME, begun_recipe, read_chunk
    from sinkbed.data.prepare.staging import partial_of

    folder = partial_of(config.out)
    begun = begun_recipe(folder)
    if begun is None or begun != recipe_of(config):  # which reads every local file
        return 0
    chunks = filter(None, map(read_chunk, (folder / CHUNKS_NAME).glob("*.json")))
    return sum(shard.bytes for chunk in chunks for shard in chunk.shards.values())
