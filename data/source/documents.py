"""The documents of a source, one after the other, and what becomes of records that are none.

Nothing here tokenizes. `loading` opens a source as a data set of `datasets`; `records` reads JSONL, text and
Parquet record by record, so that a malformed line is named, or left out and counted, by itself.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from sinkbed.data.source.config import OnError, Source, describe

_READ_BATCH = 32  # documents in memory at a time; larger ones are not read faster


class Documents:
    """The documents of a source. Each pass gives the same ones in the same order.

    Args:
        on_error: what to do about a record that is no document (malformed, not UTF-8, without the column,
            not text) or a file that cannot be read to its end: refuse the source, or leave it out and count it.

    Raises FileNotFoundError for missing files or packages, and ValueError for a missing column, a record
    that is refused, or a corpus without a single document.
    """

    def __init__(self, source: Source, *, on_error: OnError = "refuse") -> None:
        self.source = source
        self.on_error = on_error
        self.left_out: Counter[str] = Counter()
        """Records that the last pass left out so far, by reason: `empty` ones hold nothing but white space."""
        self._dataset: Any = None

    def __iter__(self) -> Iterator[str]:
        left_out = self.left_out = Counter()
        count = 0
        for batch in self._record_batches():
            texts = batch["text"]
            problems = batch.get("problem")
            for index, text in enumerate(texts):
                if problems and problems[index]:
                    if self.on_error == "refuse":
                        raise ValueError(f"{batch['at'][index]}; to leave such records out: --on_error skip")
                    left_out[problems[index]] += 1
                elif text is not None and not isinstance(text, str):
                    raise ValueError(
                        f"{describe(self.source)}: expected text in the column of the text, got a value of type "
                        f"{type(text).__name__}; name another column with source.column"
                    )
                elif not text or text.isspace():
                    left_out["empty"] += 1
                else:
                    count += 1
                    yield text
        if not count:
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(left_out.items())) or "no record"
            raise ValueError(f"the source holds no document: look at {describe(self.source)} (left out: {reasons})")

    def count(self) -> int | None:
        """Records in the source, empty ones included; None where only a full pass would tell."""
        dataset = self._open()
        return len(dataset) if hasattr(dataset, "__len__") else None

    def _open(self) -> Any:
        if self._dataset is None:
            from sinkbed.data.source.loading import load

            self._dataset = load(self.source)
        return self._dataset

    def _record_batches(self) -> Iterator[dict[str, list[Any]]]:
        from sinkbed.data.source.loading import unreadable_named

        files = self.source.kind == "text" and self.source.split in (None, "file")
        batches = self._open().iter(batch_size=1 if files else _READ_BATCH)
        # A stream meets a broken file only when it gets there.
        with unreadable_named(self.source):
            yield from batches
