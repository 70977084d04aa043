"""Synthetic tasks: documents of one-byte symbols whose predictable part is known, for sinks in seconds.

A document is a pure function of (task, seed, number): each symbol is drawn by hashing the document's
number and the position, so any document can be made alone, in any order, the same on every machine.
Symbols are ASCII letters, digits and a few marks, so a tokenizer without merges (vocab_size 258) makes
one token of each, and a synthetic corpus is a corpus of text like any other.

    bigram_backcopy      k q Q ? Q c e ! e      after a trigger comes the symbol before it
    trigger_averaging    c g ? E a a ? C        after `?` comes the mean of the values (a=0, b=1, ...) so far
    uniform              x 7 B k 0              nothing to predict
    repeated             a R a R a R            a random phrase, over and over

Traded away: the bigram is drawn at random, not counted in a text as in the paper it comes from.

Shapes: N documents, T positions, S ordinary symbols, K triggers.
"""

import math
import string
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sinkbed.data.order import hash_words
from sinkbed.ranges import check_choice, check_number

Task = Literal["bigram_backcopy", "trigger_averaging", "uniform", "repeated"]

SYMBOLS = string.ascii_letters + string.digits
"""Ordinary symbols; of `trigger_averaging` the values are the lower case and their means the upper case."""
TRIGGERS = "?!#%&*+=@~"

GENERATOR_VERSION = 1
"""Raise it with any change of what a task generates: token stores are told apart by it."""

_LETTERS = len(string.ascii_lowercase)
_USED_BY: dict[str, tuple[Task, ...]] = {
    "triggers": ("bigram_backcopy",),
    "trigger_probability": ("bigram_backcopy", "trigger_averaging"),
    "phrase": ("repeated",),
}
# Keys that keep the draws of different things apart.
_BIGRAM_KEY, _LENGTH_KEY, _SYMBOL_KEY, _TRIGGER_KEY = 0xB16, 0x1E6, 0x5E3, 0x761
_BLOCK_TOKENS = 2**18  # made at a time: enough to amortise NumPy's calls, little enough for the cache


@dataclass(frozen=True, kw_only=True)
class Synthetic:
    """A synthetic corpus. Raises ValueError for values out of range, or that the task would ignore."""

    task: Task
    """`bigram_backcopy` (arXiv 2410.13835, section 2): a bigram, but after a trigger the symbol before it is
    copied. `trigger_averaging` (after arXiv 2603.11487, as next-token prediction): uniform values; after a trigger
    the rounded mean of the values so far. `uniform`: random symbols. `repeated`: a random phrase, repeated."""
    documents: int
    """Number of documents."""
    length: int | tuple[int, int]
    """Tokens a document, or the least and the most, drawn uniformly."""
    symbols: int | None = None
    """Ordinary symbols. None: 61 in bigram_backcopy (with 3 triggers the 64 of the paper), 26 values in
    trigger_averaging, else 62."""
    triggers: int | None = None
    """bigram_backcopy: symbols that trigger a copy. None: 3."""
    trigger_probability: float | None = None
    """bigram_backcopy, trigger_averaging: chance of a trigger wherever a symbol is drawn. None: 0.1."""
    phrase: int | None = None
    """repeated: tokens of the phrase. None: 1."""
    seed: int = 0
    """Another seed, other documents of the same task; the bigram is the same for every seed."""

    def __post_init__(self) -> None:
        check_choice("source.synthetic.task", self.task, get_args(Task))
        for name, tasks in _USED_BY.items():
            if getattr(self, name) is not None and self.task not in tasks:
                raise ValueError(
                    f"source.synthetic.{name}: expected none with task {self.task}, which ignores it, got "
                    f"{getattr(self, name)!r}; it belongs to {' and '.join(tasks)}"
                )
        if not isinstance(self.length, int) and len(self.length) != 2:
            raise ValueError(f"source.synthetic.length: expected a number or two, least and most, got {self.length!r}")
        least, most = self.lengths
        values = _LETTERS if self.task == "trigger_averaging" else len(SYMBOLS)
        for name, value, low, high in (
            ("documents", self.documents, 1, math.inf),
            ("seed", self.seed, 0, 2**63 - 1),
            ("length", least, 2, math.inf),
            ("length", most, least, math.inf),
            ("symbols", self.symbol_count, 2, values),
            ("triggers", self.triggers, 1, len(TRIGGERS)),
            ("phrase", self.phrase, 1, least),
        ):
            if value is not None:
                check_number(f"source.synthetic.{name}", value, least=low, most=high, integer=True)
        check_number("source.synthetic.trigger_probability", self.chance, above=0, below=1)

    @property
    def lengths(self) -> tuple[int, int]:
        """Least and most tokens a document."""
        return (self.length, self.length) if isinstance(self.length, int) else self.length

    @property
    def symbol_count(self) -> int:
        """S, resolved."""
        default = {"bigram_backcopy": 61, "trigger_averaging": _LETTERS}.get(self.task, len(SYMBOLS))
        return default if self.symbols is None else self.symbols

    @property
    def trigger_count(self) -> int:
        """K, resolved."""
        if self.task == "bigram_backcopy":
            return 3 if self.triggers is None else self.triggers
        return int(self.task == "trigger_averaging")

    @property
    def chance(self) -> float:
        """Chance of a trigger where a symbol is drawn, resolved."""
        return 0.1 if self.trigger_probability is None else self.trigger_probability


def synthetic_documents(task: Synthetic) -> Iterator[str]:
    """The documents of a task, made some thousand at a time."""
    block = max(1, _BLOCK_TOKENS // task.lengths[1])
    for first in range(0, task.documents, block):
        numbers = np.arange(first, min(first + block, task.documents))
        least, most = task.lengths
        lengths = least + (_uniform(_LENGTH_KEY, task.seed, numbers) * (most - least + 1)).astype(np.int64)
        symbols = _GENERATORS[task.task](task, numbers, int(lengths.max()))
        for row, length in zip(symbols, lengths.tolist(), strict=True):
            yield row[:length].tobytes().decode("ascii")


def bigram(symbols: int, triggers: int, trigger_probability: float) -> NDArray[np.float64]:
    """[S, S + K] chances of the next symbol after each ordinary one; the last K are the triggers.

    Skewed as the bigram of a text is (cubed exponential weights: entropy about 2.6 nats at S = 61).
    """
    rows, columns = np.arange(symbols)[:, None], np.arange(symbols + triggers)
    weights = (-np.log1p(-_uniform(_BIGRAM_KEY, rows, columns))) ** 3
    ordinary, special = weights[:, :symbols], weights[:, symbols:]
    return np.hstack(
        [
            (1 - trigger_probability) * ordinary / ordinary.sum(1, keepdims=True),
            trigger_probability * special / special.sum(1, keepdims=True),
        ]
    )


def _bigram_backcopy(task: Synthetic, numbers: NDArray[np.int64], length: int) -> NDArray[np.uint8]:
    """[N, T] ASCII codes of whole documents, as in every generator here."""
    S = task.symbol_count
    cumulative = bigram(S, task.trigger_count, task.chance).cumsum(1)
    cumulative[:, -1] = 1.0  # the sum may round to less
    drawn = _draws(_SYMBOL_KEY, task, numbers, length)
    out = np.empty(drawn.shape, dtype=np.int64)
    # Never a trigger: it would have nothing to copy, and two in a row would alternate for ever.
    out[:, 0] = drawn[:, 0] * S
    for t in range(1, length):
        last = out[:, t - 1]
        after = np.minimum(last, S - 1)  # any row will do for a trigger: the copy replaces what is drawn
        fresh = (drawn[:, t, None] >= cumulative[after]).sum(1)
        out[:, t] = np.where(last >= S, out[:, max(t - 2, 0)], fresh)
    return _codes(SYMBOLS[:S] + TRIGGERS[: task.trigger_count])[out]


def _trigger_averaging(task: Synthetic, numbers: NDArray[np.int64], length: int) -> NDArray[np.uint8]:
    S = task.symbol_count
    values = (_draws(_SYMBOL_KEY, task, numbers, length) * S).astype(np.int64)
    triggered = _draws(_TRIGGER_KEY, task, numbers, length) < task.chance
    triggered[:, 0] = False  # there is no mean yet
    for t in range(1, length):
        triggered[:, t] &= ~triggered[:, t - 1]
    answer = np.zeros_like(triggered)
    answer[:, 1:] = triggered[:, :-1]
    counted = ~(triggered | answer)
    total, count = np.cumsum(values * counted, axis=1), np.cumsum(counted, axis=1)
    mean = (2 * total + count) // (2 * count)  # to the nearest, halves up
    out = np.where(answer, _LETTERS + mean, np.where(triggered, len(SYMBOLS), values))
    return _codes(SYMBOLS + TRIGGERS[:1])[out]


def _uniform_symbols(task: Synthetic, numbers: NDArray[np.int64], length: int) -> NDArray[np.uint8]:
    S = task.symbol_count
    return _codes(SYMBOLS[:S])[(_draws(_SYMBOL_KEY, task, numbers, length) * S).astype(np.int64)]


def _repeated(task: Synthetic, numbers: NDArray[np.int64], length: int) -> NDArray[np.uint8]:
    phrase = _uniform_symbols(task, numbers, task.phrase or 1)
    return phrase[:, np.arange(length) % phrase.shape[1]]


_GENERATORS = {
    "bigram_backcopy": _bigram_backcopy,
    "trigger_averaging": _trigger_averaging,
    "uniform": _uniform_symbols,
    "repeated": _repeated,
}


def _draws(key: int, task: Synthetic, numbers: NDArray[np.int64], length: int) -> NDArray[np.float64]:
    """[N, T] uniform numbers in [0, 1), a function of (key, seed, document's number, position)."""
    return _uniform(hash_words(key, task.seed, numbers)[:, None], np.arange(length))


def _uniform(*words: ArrayLike) -> NDArray[np.float64]:
    return (hash_words(*words) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _codes(alphabet: str) -> NDArray[np.uint8]:
    return np.frombuffer(alphabet.encode("ascii"), dtype=np.uint8)
