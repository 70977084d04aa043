"""How far a measurement is: a bar with the time left on a terminal, a line a step in a log."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_LISTENER: ContextVar[Callable[[int], object]] = ContextVar("listener", default=lambda documents: None)


def documents_read(count: int) -> None:
    """Tell whoever watches that so many more documents were read."""
    _LISTENER.get()(count)


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Say on a terminal what is being loaded, for as long as it takes."""
    line = f"loading {what} …" if sys.stderr.isatty() else ""
    print(line, end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        print(f"\r{' ' * len(line)}\r" if line else "", end="", file=sys.stderr, flush=True)


class Steps:
    """Things to measure, one after the other."""

    def __init__(self) -> None:
        self._steps: list[tuple[str, int, Callable[[], None]]] = []

    def add(self, name: str, documents: int, call: Callable[[], None]) -> None:
        """A step that reads so many documents, by which the time left is told."""
        self._steps.append((name, documents, call))

    def run(self) -> None:
        """Take all steps."""
        from tqdm import tqdm

        total, done, began = sum(documents for _, documents, _ in self._steps), 0, time.monotonic()
        with tqdm(total=total, unit=" documents", leave=False, disable=not sys.stderr.isatty()) as bar:
            token = _LISTENER.set(bar.update)
            try:
                for number, (name, documents, call) in enumerate(self._steps, 1):
                    bar.set_description(name)
                    if bar.disable:
                        left = (time.monotonic() - began) * (total - done) / done if done else None
                        rest = "" if left is None else f", about {left:.0f} s left"
                        print(f"measuring {name} ({number} of {len(self._steps)}{rest})", file=sys.stderr, flush=True)
                    call()
                    done += documents
                    bar.n = done
                    bar.refresh()
            finally:
                _LISTENER.reset(token)
