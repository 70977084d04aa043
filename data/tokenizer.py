"""Tokenizer: byte-level BPE through `tokenizers`, trained here or loaded from its JSON file.

Only lossless tokenizers are accepted: every document decodes to itself, and each id stands for a known
number of its UTF-8 bytes, so losses can be given in bits per byte and compared across vocabularies.
Traded away: tokenizers that normalise text or mark words with a space of their own.
Control tokens are never made from text: `<bos>` written in a document is encoded as five characters.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import decoders, models, pre_tokenizers, trainers

from data.manifest import sha256_json

BOS = "<bos>"
EOS = "<eos>"

# Text that a tokenizer which is not lossless changes: a leading space, runs of white space, a decomposed
# accent, scripts without spaces, a character of four bytes, a control character, a trailing space.
_PROBE = " a  b\r\n\te\u0301 \u00e9 \u6f22\u5b57 \U0001f600 \x00 12345 it's "


class Tokenizer:
    """A lossless byte-level BPE with a BOS and an EOS token, which may be the same.

    Raises ValueError where `bos` or `eos` is no token of the vocabulary, or the tokenizer is not lossless.
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
        self._check_lossless()

    @classmethod
    def train(cls, texts: Iterable[str], *, vocab_size: int) -> Tokenizer:
        """Train a byte-level BPE of at most `vocab_size` tokens, `<bos>`, `<eos>` and 256 bytes included.

        The same texts in the same order give the same tokenizer. Raises ValueError below 258 tokens.
        """
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        if vocab_size < len(alphabet) + 2:
            raise ValueError(
                f"vocab_size: found {vocab_size}, expected at least {len(alphabet) + 2} (256 bytes, {BOS} and {EOS})"
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
        backend.train_from_iterator(texts, trainer)
        return cls(backend)

    @classmethod
    def load(cls, path: Path | str, *, bos: str = BOS, eos: str = EOS) -> Self:
        """Load a `tokenizer.json`. Raises FileNotFoundError, or ValueError for a file that is none."""
        return cls(_read(Path(path)), bos=bos, eos=eos)

    @classmethod
    def load_by_ids(cls, path: Path | str, *, bos_id: int, eos_id: int) -> Self:
        """Load a `tokenizer.json` whose BOS and EOS are known by id, as in a manifest. Raises as `load`."""
        backend = _read(Path(path))
        bos, eos = (backend.id_to_token(index) for index in (bos_id, eos_id))
        if bos is None or eos is None:
            raise ValueError(
                f"tokenizer: {path} lacks id {bos_id} (bos) or {eos_id} (eos); it is of another vocabulary"
            )
        return cls(backend, bos=bos, eos=eos)

    def save(self, path: Path | str) -> None:
        """Write the tokenizer as JSON, readable by `tokenizers` and `transformers`."""
        Path(path).write_text(self.backend.to_str(pretty=True), encoding="utf-8")

    def encode(self, text: str) -> list[int]:
        """Ids of a text; no control token is added or recognised."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, on all cores (`RAYON_NUM_THREADS` limits them)."""
        # The fast variant leaves out the offsets, which nothing here reads; older releases lack it.
        encode = getattr(self.backend, "encode_batch_fast", self.backend.encode_batch)
        return [encoding.ids for encoding in encode(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int] | NDArray[Any]) -> str:
        """Text of some ids; control tokens are written out. Inverse of `encode`."""
        return self.backend.decode([int(index) for index in ids], skip_special_tokens=False)

    @cached_property
    def sha256(self) -> str:
        """sha256 of the canonical JSON: blind to the layout of the file."""
        return sha256_json(json.loads(self.backend.to_str()))

    @cached_property
    def token_bytes(self) -> NDArray[np.int32]:
        """[vocab_size] UTF-8 bytes of text that each id stands for; 0 for control tokens.

        Exact: the sum over the ids of a text is the number of its UTF-8 bytes. Ids that the vocabulary
        leaves out are 0.
        """
        table = np.zeros(self.vocab_size, dtype=np.int32)
        # In a byte-level vocabulary each character stands for one byte; added tokens are plain text.
        for token, index in self.backend.get_vocab(with_added_tokens=False).items():
            table[index] = len(token)
        for index, added in self.backend.get_added_tokens_decoder().items():
            table[index] = len(added.content.encode())
        table[list(self.special_ids)] = 0
        return table

    def _require(self, role: str, token: str) -> int:
        index = self.backend.token_to_id(token)
        if index is None:
            raise ValueError(
                f"tokenizer: found no token {token!r} for {role}; name the token this vocabulary uses with "
                f"tokenizer.{role} (such as '<|endoftext|>')"
            )
        return index

    def _check_lossless(self) -> None:
        probe = f"{_PROBE}{BOS}"
        ids = self.encode(probe)
        if self.decode(ids) != probe or int(self.token_bytes[ids].sum()) != len(probe.encode()):
            raise ValueError(
                "tokenizer: found one that changes text (a normaliser, an added space, or no byte-level "
                "alphabet); expected a lossless byte-level BPE, such as those of GPT-2 or Llama 3, or one trained here"
            )


def _read(path: Path) -> tokenizers.Tokenizer:
    if not path.is_file():
        raise FileNotFoundError(f"tokenizer: no file at {path}; give the path of a tokenizer.json")
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for whatever it cannot parse
        raise ValueError(
            f"tokenizer: {path} is no tokenizer of the `tokenizers` library ({error}); give a tokenizer.json"
        ) from error


def tokenizer_file_sha256(path: Path) -> str:
    """The hash that `Tokenizer.sha256` gives for a saved tokenizer, without building it."""
    try:
        return sha256_json(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ValueError(
            f"tokenizer: {path} is damaged ({error}); prepare the token store again with --force"
        ) from error
