"""Tokenizer: lossless BPE through `tokenizers`, trained here or loaded from its JSON file or folder.

Only tokenizers that lose nothing are accepted: every document decodes to itself, or to a canonical equivalent
of it (Unicode NFC, say), and each id stands for a known number of UTF-8 bytes, so losses can be given in
bits per byte and compared across vocabularies. What the normaliser makes of a text is the document: its bytes
are those that count. Two kinds do: byte-level ones (GPT-2, Llama 3), and those that write a space as `▁` and
fall back on bytes (Gemma).
Traded away: tokenizers that add a space of their own (Llama 2).
Control tokens are never made from text: `<bos>` written in a document is encoded as five characters, by us and
by whoever loads the tokenizer.json of a token store.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from sinkbed.data.files import sha256_json

BOS = "<bos>"
EOS = "<eos>"

# Texts that a tokenizer which is not lossless changes: a leading space, runs of white space, a decomposed
# accent, scripts without spaces, a character of four bytes, a control character, a trailing space; no space.
_PROBES = (f" a  b\r\n\te\u0301 \u00e9 \u6f22\u5b57 \U0001f600 \x00 12345 it's {BOS} ", "A")

_SPACE = "\u2581"
"""What stands for a space in a vocabulary that is not byte-level."""
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_CANONICAL = normalizers.NFC()

_LONGEST_WORD = 2**13  # training takes a time quadratic in it
_RUN = re.compile(r"[^\W\d_]+|\d+|\s+|(?:[^\w\s]|_)+")  # about what the pre-tokenizer makes a word of


class Tokenizer:
    """A lossless BPE with a BOS and an EOS token, which may be the same.

    Raises ValueError where `bos` or `eos` is no token of the vocabulary, or the tokenizer loses text.
    """

    def __init__(self, backend: tokenizers.Tokenizer, *, bos: str = BOS, eos: str = EOS) -> None:
        self.backend = backend
        # Not part of the JSON: without it `<bos>` in a document would become the control token.
        backend.encode_special_tokens = True
        backend.no_padding()
        backend.no_truncation()
        self.bos_id = self._require("bos", bos)
        self.eos_id = self._require("eos", eos)
        added = backend.get_added_tokens_decoder()
        self.special_ids = tuple(
            sorted({self.bos_id, self.eos_id} | {index for index, token in added.items() if token.special})
        )
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        """One more than the largest id."""
        if getattr(backend.model, "dropout", None):
            raise ValueError(
                "tokenizer: expected no BPE dropout, which encodes a text in another way each time, got "
                f"{backend.model.dropout}; remove it from the tokenizer.json"
            )
        self._is_byte_level = _is_byte_level(backend)
        self._check_lossless()
        if not isinstance(backend.model, models.BPE):
            raise ValueError(f"tokenizer: expected a BPE, got a {type(backend.model).__name__}; use another one")

    @classmethod
    def train(cls, texts: Iterable[str], *, vocab_size: int) -> "Tokenizer":
        """Train a byte-level BPE of at most `vocab_size` tokens, `<bos>`, `<eos>` and 256 bytes included.

        The same texts in the same order give the same tokenizer. Raises ValueError below 258 tokens.
        """
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        if vocab_size < len(alphabet) + 2:
            raise ValueError(
                f"vocab_size: expected at least {len(alphabet) + 2} (256 bytes, {BOS} and {EOS}), got {vocab_size}"
            )
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[BOS, EOS],
            initial_alphabet=sorted(alphabet),
            show_progress=False,
        )
        backend.train_from_iterator((part for text in texts for part in _short_words(text)), trainer)
        return cls(backend)

    @classmethod
    def load(cls, path: Path | str, *, bos: str | None = None, eos: str | None = None) -> Self:
        """Load a `tokenizer.json`, or a folder of `transformers` that holds one.

        Args:
            bos, eos: None: what the folder's configuration names, else `<bos>` and `<eos>`.

        Raises FileNotFoundError, or ValueError for a file that is none.
        """
        file, named_bos, named_eos = tokenizer_file(path)
        return cls(_read(file), bos=bos or named_bos or BOS, eos=eos or named_eos or EOS)

    @classmethod
    def load_trained(cls, path: Path | str) -> Self:
        """Load what `train` gave and `save` wrote, listed or not. Raises as `load`."""
        backend = _read(Path(path))
        backend.add_special_tokens([BOS, EOS])
        return cls(backend)

    @classmethod
    def from_str(cls, definition: str, *, bos_id: int, eos_id: int) -> Self:
        """The tokenizer of a JSON text, as `backend.to_str()` gives it, with BOS and EOS by id."""
        backend = tokenizers.Tokenizer.from_str(definition)
        bos, eos = (backend.id_to_token(index) for index in (bos_id, eos_id))
        if bos is None or eos is None:
            raise ValueError(f"tokenizer: it lacks id {bos_id} (bos) or {eos_id} (eos); it is of another vocabulary")
        return cls(backend, bos=bos, eos=eos)

    def to_json(self, *, list_control: bool = True) -> str:
        """The tokenizer as `tokenizers` and `transformers` read it.

        Args:
            list_control: False: control tokens stand in the vocabulary alone, so that nobody who loads the file
                makes one of them from text. `store.token_store.read_definition` puts `control_tokens` back.
        """
        definition = json.loads(self.backend.to_str())
        if not list_control:
            definition["model"]["vocab"] |= {token["content"]: token["id"] for token in self.control_tokens}
            definition["added_tokens"] = [t for t in definition["added_tokens"] if t["id"] not in self.special_ids]
        return json.dumps(definition, ensure_ascii=False, indent=2)

    def save(self, path: Path | str) -> None:
        """Write the tokenizer as JSON."""
        Path(path).write_text(self.to_json(), encoding="utf-8")

    @cached_property
    def control_tokens(self) -> tuple[dict[str, Any], ...]:
        """Control tokens as the JSON lists them; with `in_vocab`, whether the model's own vocabulary has them too."""
        definition = json.loads(self.backend.to_str())
        return tuple(
            {**token, "in_vocab": token["content"] in definition["model"]["vocab"]}
            for token in definition["added_tokens"]
            if token["id"] in self.special_ids
        )

    def encode(self, text: str) -> list[int]:
        """Ids of a text; no control token is added or recognised."""
        with _panic_named():
            return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, on all cores (`RAYON_NUM_THREADS` limits them)."""
        with _panic_named():  # the fast variant leaves out the offsets, which nothing here reads
            return [e.ids for e in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    @property
    def may_change_text(self) -> bool:
        """Whether `normalize` may return another text, or raise."""
        return self.backend.normalizer is not None or not self._is_byte_level

    def normalize(self, text: str) -> str:
        """The document that a text becomes: what its tokens decode to.

        Raises ValueError where that is not canonically equivalent to the text.
        """
        with _panic_named():
            kept = text if self.backend.normalizer is None else self.backend.normalizer.normalize_str(text)
        if not self._is_byte_level:
            kept = kept.replace(_SPACE, " ")
        if kept != text and not equivalent(kept, text):
            a, b = (_CANONICAL.normalize_str(t) for t in (text, kept))
            place = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
            raise ValueError(
                f"tokenizer: expected one that keeps the text, got {a[place : place + 20]!r} turned into "
                f"{b[place : place + 20]!r}; use another tokenizer"
            )
        return kept

    def decode(self, ids: Sequence[int] | NDArray[Any]) -> str:
        """Text of some ids; control tokens are written out. Inverse of `encode`, up to the normaliser."""
        return self.backend.decode([int(index) for index in ids], skip_special_tokens=False)

    @cached_property
    def sha256(self) -> str:
        """sha256 of the canonical JSON: blind to the layout of the file."""
        return sha256_json(json.loads(self.backend.to_str()))

    @cached_property
    def token_bytes(self) -> NDArray[np.int32]:
        """[vocab_size] UTF-8 bytes of text that each id stands for; 0 for control tokens.

        Exact: the sum over the ids of a text is the number of its UTF-8 bytes, once normalised.
        """
        return token_bytes(self.backend, self.special_ids, self.vocab_size)

    def word_starts(self, text: str) -> set[int]:
        """Where in a text, normalised before, the words of the pre-tokenizer begin; empty where there is none."""
        pre_tokenizer, normalizer = self.backend.pre_tokenizer, self.backend.normalizer
        with _panic_named():
            seen = text if normalizer is None else normalizer.normalize_str(text)
            if pre_tokenizer is None or len(seen) != len(text):
                return set()
            return {begin for _, (begin, _) in pre_tokenizer.pre_tokenize_str(seen)}

    @cached_property
    def pairs(self) -> frozenset[tuple[str, str]] | None:
        """Characters of a text that stand side by side in a token; None for a byte-level vocabulary."""
        if self._is_byte_level:
            return None
        tokens = (token.replace(_SPACE, " ") for token in self.backend.get_vocab() if not _BYTE.fullmatch(token))
        return frozenset(pair for token in tokens for pair in pairwise(token))

    def _require(self, role: str, token: str) -> int:
        index = self.backend.token_to_id(token)
        if index is None:
            raise ValueError(
                f"tokenizer: expected a token {token!r} for {role}, got none; name the token this vocabulary uses with "
                f"tokenizer.{role} (such as '<|endoftext|>')"
            )
        return index

    def _check_lossless(self) -> None:
        for probe in _PROBES:
            ids = self.encode(probe)
            try:
                kept = self.normalize(probe)
                # A normaliser that adds a space adds another when it is applied to its own result.
                lossless = self.decode(ids) == kept == self.normalize(kept)
            except ValueError:
                lossless = False
            if not lossless or int(self.token_bytes[ids].sum()) != len(kept.encode()):
                raise ValueError(
                    f"tokenizer: expected one that keeps every text, got {probe!r} turned into {self.decode(ids)!r}; "
                    "use a lossless one, such as those of GPT-2, GPT-NeoX, Llama 3 or Gemma, or one trained here"
                )


@contextmanager
def _panic_named() -> Iterator[None]:
    """Turn a panic of the library into one message."""
    try:
        yield
    except BaseException as error:  # pyo3's PanicException, which is no Exception and has no name to import
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(
            f"tokenizer: expected one that gets through every text, got that it gave up ({error}); a pattern in its "
            "tokenizer.json takes too long: use another tokenizer"
        ) from None


def equivalent(text: str, other: str) -> bool:
    """Whether two texts are the same but for how Unicode composes their characters."""
    return _CANONICAL.normalize_str(text) == _CANONICAL.normalize_str(other)


def _is_byte_level(backend: tokenizers.Tokenizer) -> bool:
    """Whether each character of the vocabulary stands for a byte."""
    decoder = json.loads(backend.to_str())["decoder"]
    return '"type":"ByteLevel"' in json.dumps(decoder, separators=(",", ":"))


def _marked_bytes(token: str) -> int:
    """UTF-8 bytes of text that a token stands for where a space is marked and bytes have tokens of their own."""
    return 1 if _BYTE.fullmatch(token) else len(token.replace(_SPACE, " ").encode())


def token_bytes(backend: tokenizers.Tokenizer, special_ids: Iterable[int], size: int) -> NDArray[np.int32]:
    """[size] UTF-8 bytes of text that each id stands for; 0 for control tokens and ids without a token.

    Args:
        backend: a byte-level vocabulary, or one with ▁ for a space and <0x0A> for a byte; of others the figures are
            wrong.
    """
    byte_level = _is_byte_level(backend)
    sizes = {index: len(t) if byte_level else _marked_bytes(t) for t, index in backend.get_vocab(False).items()}
    for index, added in backend.get_added_tokens_decoder().items():  # plain text in a byte-level vocabulary too
        sizes[index] = len(added.content.encode()) if byte_level else _marked_bytes(added.content)
    sizes |= dict.fromkeys(special_ids, 0)
    return np.array([sizes.get(index, 0) for index in range(size)], dtype=np.int32)


def _short_words(text: str) -> Iterator[str]:
    """A text in parts without a longer word than training can bear."""
    begin = 0
    if len(text) > _LONGEST_WORD:
        for run in _RUN.finditer(text):
            for end in range(run.start() + _LONGEST_WORD, run.end(), _LONGEST_WORD):
                yield text[begin:end]
                begin = end
    yield text[begin:]


def tokenizer_file(path: Path | str) -> tuple[Path, str | None, str | None]:
    """(tokenizer.json, bos, eos) of a file or of a folder of `transformers`, whose configuration names both.

    Raises FileNotFoundError where there is none, ValueError for a configuration that is no JSON.
    """
    path = Path(path)
    if not path.is_dir():
        return path, None, None
    file = path / "tokenizer.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"tokenizer: {path} holds no tokenizer.json; save it with transformers' `AutoTokenizer` (use_fast=True), "
            "which writes one, or give another folder"
        )
    named: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (path / name).is_file():
            try:
                fields = json.loads((path / name).read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"tokenizer: {path / name} is no JSON ({error}); copy it again") from error
            if not isinstance(fields, dict):
                raise ValueError(f"tokenizer: {path / name} is no JSON object; copy it again")
            named |= {role: fields[f"{role}_token"] for role in ("bos", "eos") if fields.get(f"{role}_token")}
    texts = {role: token.get("content") if isinstance(token, dict) else token for role, token in named.items()}
    return file, texts.get("bos"), texts.get("eos")


def _read(path: Path) -> tokenizers.Tokenizer:
    if not path.is_file():
        raise FileNotFoundError(f"tokenizer: no file at {path}; give the path of a tokenizer.json")
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for whatever it cannot parse
        raise ValueError(
            f"tokenizer: {path} is no tokenizer of the `tokenizers` library ({error}); give a tokenizer.json"
        ) from error
