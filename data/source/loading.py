"""A source as a data set of the `datasets` library: which reader, which files, which shuffle.

Every data set made here has a column `text`, and may have `problem` and `at` (see `records.Record`).
Only built-in readers and ours are used: no loading script and no remote code is ever run.

To add a kind: a function from its `SingleSource` to a `datasets` data set with a column `text`, in `_OPEN`.

Traded away: without `streaming`, `datasets` keeps an Arrow copy of the corpus in its cache, the price of
a full shuffle; with it, nothing is copied and the shuffle is that of a buffer.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from json import JSONDecodeError
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.data_files import DataFilesDict, DataFilesList
from datasets.exceptions import DatasetGenerationError, DatasetsError
from datasets.packaged_modules.json.json import Json
from datasets.packaged_modules.parquet.parquet import Parquet
from tqdm import tqdm

from sinkbed.data.files import sha256_file
from sinkbed.data.source.config import Separator, SingleSource, Source, describe
from sinkbed.data.source.demo import demo_texts
from sinkbed.data.source.local_files import local_files
from sinkbed.data.source.records import FEATURES, Records
from sinkbed.data.source.synthetic import synthetic_documents


def load(source: Source) -> Any:
    """The source as a (possibly streaming) data set, shuffled if asked, or the mixture of its parts.

    Raises FileNotFoundError for missing files, ValueError for a missing column, a data set that brings its
    own code, or a source without a single record.
    """
    datasets.disable_progress_bars()  # ours says how far it is
    if source.kind != "mixture":
        return _load_single(source)
    streams = [_stream(_load_single(part)) for part in source.sources]
    total = sum(source.weights)
    return datasets.interleave_datasets(
        streams,
        probabilities=[weight / total for weight in source.weights],
        seed=source.shuffle_seed,
        stopping_strategy=source.stopping_strategy or "first_exhausted",
    )


def _stream(dataset: Any) -> Any:
    """A part of a mixture: all parts need the same columns."""
    stream = dataset.to_iterable_dataset() if isinstance(dataset, datasets.Dataset) else dataset
    if stream.features is not None and set(stream.features) == set(FEATURES):
        return stream
    return stream.map(_as_records, batched=True, batch_size=256, features=FEATURES)


def _as_records(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    nothing = [None] * len(batch["text"])
    return {"text": batch["text"], "problem": nothing, "at": nothing}


def known_records(source: SingleSource) -> int | None:
    """Records in a source, as far as that is known without reading it."""
    if source.kind == "demo":
        return len(demo_texts(source.parts))
    if source.kind == "parquet":
        return sum(map(_parquet_rows, local_files(source)))
    if source.kind == "hub" and source.name is not None:
        builder = datasets.load_dataset_builder(source.name, source.config, revision=source.revision)
        split = (builder.info.splits or {}).get(str(source.split or "train"))
        return (split.num_examples or None) if split is not None else None
    return None


@contextmanager
def unreadable_named(source: SingleSource) -> Iterator[None]:
    """Name the source when a reader of `datasets` gives up on one of its files."""
    try:
        yield
    except (pa.ArrowException, JSONDecodeError, UnicodeDecodeError, DatasetGenerationError) as error:
        if isinstance(error.__cause__, OSError) and error.__cause__.errno is not None:
            raise error.__cause__ from None  # the cache's disk is full, say: no fault of the source
        raise ValueError(
            f"{describe(source)}: could not be read as {source.kind} ({error.__cause__ or error}); check source.kind "
            "and the files"
        ) from error
    except (ConnectionError, DatasetsError) as error:
        raise ValueError(
            f"{describe(source)}: expected a data set that the hub or its cache gives, got {type(error).__name__} "
            f"({error}); check source.name, config and revision, the network and HF_HUB_OFFLINE, or give source.name a "
            "local folder laid out like it"
        ) from error


def _load_single(source: SingleSource) -> Any:
    with unreadable_named(source):
        dataset = _OPEN[source.kind](source)
    if source.shuffle_seed is None:
        return dataset
    if source.streaming:
        return dataset.shuffle(seed=source.shuffle_seed, buffer_size=source.shuffle_buffer or 10_000)
    return dataset.shuffle(seed=source.shuffle_seed)


def _synthetic(source: SingleSource) -> Any:
    assert source.synthetic is not None
    task = source.synthetic
    if not source.streaming:
        return datasets.Dataset.from_dict({"text": list(synthetic_documents(task))})
    return datasets.IterableDataset.from_generator(
        lambda: ({"text": text} for text in synthetic_documents(task)),
        features=datasets.Features({"text": datasets.Value("string")}),
    )


def _local(source: SingleSource) -> Any:
    files = local_files(source)
    # What the cache's name is made of: contents, as in the recipe; a size and a time may be those of another text. What
    # is streamed has no cache.
    paths = [os.path.abspath(file) for file in files]
    states = [("" if source.streaming else sha256_file(Path(path)), path) for path in paths]
    return _records(source, DataFilesDict({"train": DataFilesList(paths, states)}), "train", source.kind)


def _records(source: SingleSource, files: DataFilesDict, split: str, format: str) -> Any:
    text = source.split if format == "text" else None
    builder = Records(
        data_files=files,
        format=format,
        column=source.column or "text",
        split=text.separator if isinstance(text, Separator) else text or "file",
    )
    try:
        return _opened(builder, source, split)
    except ValueError as error:  # a corpus without a record, read into the cache
        if "corresponds to no data" in str(error):
            raise _no_document(source) from None
        raise


def _no_document(source: SingleSource) -> ValueError:
    """The error for a source without a single record."""
    return ValueError(f"the source holds no document: look at {describe(source)}")


def _parquet_rows(file: str) -> int:
    """Records of a Parquet file. Raises ValueError that names one that cannot be read."""
    try:
        with open(file, "rb") as opened:
            return pq.read_metadata(opened).num_rows
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{file}: could not be read as parquet ({error}); check source.kind, or copy the file again"
        ) from error


def _hub(source: SingleSource) -> Any:
    assert source.name is not None and not isinstance(source.split, Separator)
    split = source.split or "train"
    arguments: dict[str, Any] = {"path": source.name, "name": source.config, "revision": source.revision}
    try:
        builder = datasets.load_dataset_builder(**arguments)
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
        raise ValueError(
            f"{describe(source)}: expected data files, got a data set that brings code of its own, which is "
            f"never run ({error}); use a revision with Parquet files"
        ) from None
    files = builder.config.data_files
    if files and split not in files:
        raise ValueError(
            f"{describe(source)}: expected a split {split!r}, got {', '.join(map(str, files))}; set source.split"
        )
    format = "parquet" if isinstance(builder, Parquet) else "jsonl"
    if isinstance(builder, Parquet) or (isinstance(builder, Json) and builder.config.field is None):
        return _records(source, DataFilesDict({split: files[split]}), split, format)
    return _columnar(source, builder, split)


def _columnar(source: SingleSource, builder: Any, split: str) -> Any:
    """A data set of one of the library's other readers, reduced to the column of the text, which becomes `text`."""
    column = source.column or "text"
    dataset = _opened(builder, source, split)
    columns = dataset.column_names
    if columns is None:  # a stream without declared features: its first record tells
        columns = list(next(iter(dataset), {}))
    if not columns:
        raise _no_document(source)
    if column not in columns:
        raise ValueError(
            f"{describe(source)}: expected a column {column!r}, got {', '.join(map(repr, columns))}; name the one that "
            "holds the text with source.column"
        )
    dataset = dataset.select_columns([column])
    kind = (dataset.features or {}).get(column)
    if kind is not None and getattr(kind, "dtype", None) not in ("string", "large_string", "null"):
        raise ValueError(
            f"{describe(source)}: column {column!r}: expected text, got values of type "
            f"{getattr(kind, 'dtype', kind)}; name another column with source.column"
        )
    return dataset if column == "text" else dataset.rename_column(column, "text")


def _opened(builder: Any, source: SingleSource, split: str) -> Any:
    if source.streaming:
        return builder.as_streaming_dataset(split=split)
    if not os.path.exists(builder.cache_dir):
        tqdm.write(
            f"copying {describe(source)} to {builder.cache_dir}, where `datasets` keeps it; HF_DATASETS_CACHE puts it "
            "elsewhere, source.streaming: true makes no copy",
            file=sys.stderr,
        )
    builder.download_and_prepare()
    return builder.as_dataset(split=split)


_OPEN: dict[str, Callable[[SingleSource], Any]] = {
    "demo": lambda source: datasets.Dataset.from_dict({"text": demo_texts(source.parts)}),
    "synthetic": _synthetic,
    "jsonl": _local,
    "text": _local,
    "parquet": _local,
    "hub": _hub,
}
