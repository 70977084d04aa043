"""Tokenizer: byte-level BPE through `tokenizers`, trained here or loaded from its JSON file or folder.

Only byte-level tokenizers are accepted: every document decodes to itself, or to what the tokenizer's
normaliser (Unicode NFC, say) makes of it, and each id stands for a known number of UTF-8 bytes, so losses
can be given in bits per byte and compared across vocabularies. With a normaliser the normalised text is
the document: its bytes are those that count.
Traded away: tokenizers that mark words with a space of their own (SentencePiece).
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

from data.manifest import sha256_json, token_type

BOS = "<bos>"
EOS = "<eos>"

# Text that a tokenizer which is not lossless changes: a leading space, runs of white space, a decomposed
# accent, scripts without spaces, a character of four bytes, a control character, a trailing space.
_PROBE = " a  b\r\n\te\u0301 \u00e9 \u6f22\u5b57 \U0001f600 \x00 12345 it's "


class Tokenizer:
    """A byte-level BPE with a BOS and an EOS token, which may be the same.

    Raises ValueError where `bos` or `eos` is no token of the vocabulary, or the tokenizer changes text in
    another way than by a normaliser.
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
                f"tokenizer: found BPE dropout ({backend.model.dropout}), which encodes a text in another way each "
                "time, expected none; remove it from the tokenizer.json"
            )
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
    def load(cls, path: Path | str, *, bos: str | None = None, eos: str | None = None) -> Self:
        """Load a `tokenizer.json`, or a folder of `transformers` that holds one.

        Args:
            bos, eos: None: what the folder's configuration names, else `<bos>` and `<eos>`.

        Raises FileNotFoundError, or ValueError for a file that is none.
        """
        file, named_bos, named_eos = tokenizer_file(path)
        return cls(_read(file), bos=bos or named_bos or BOS, eos=eos or named_eos or EOS)

    @classmethod
    def load_by_ids(cls, path: Path | str, *, bos_id: int, eos_id: int) -> Self:
        """Load a `tokenizer.json` whose BOS and EOS are known by id, as in a manifest. Raises as `load`."""
        return cls._by_ids(_read(Path(path)), str(path), bos_id, eos_id)

    @classmethod
    def from_str(cls, definition: str, *, bos_id: int, eos_id: int) -> Self:
        """The tokenizer of a JSON text, as `backend.to_str()` gives it."""
        return cls._by_ids(tokenizers.Tokenizer.from_str(definition), "it", bos_id, eos_id)

    @classmethod
    def _by_ids(cls, backend: tokenizers.Tokenizer, shown: str, bos_id: int, eos_id: int) -> Self:
        bos, eos = (backend.id_to_token(index) for index in (bos_id, eos_id))
        if bos is None or eos is None:
            raise ValueError(
                f"tokenizer: {shown} lacks id {bos_id} (bos) or {eos_id} (eos); it is of another vocabulary"
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

    def normalize(self, text: str) -> str:
        """What the tokenizer's normaliser makes of a text; the text itself where it has none."""
        return text if self.backend.normalizer is None else self.backend.normalizer.normalize_str(text)

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

        Exact: the sum over the ids of a text is the number of its UTF-8 bytes, once normalised. Ids that the vocabulary
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
        kept = self.normalize(probe)
        # A normaliser that adds a space adds another when it is applied to its own result.
        if (
            self.decode(ids) != kept
            or self.normalize(kept) != kept
            or int(self.token_bytes[ids].sum()) != len(kept.encode())
        ):
            raise ValueError(
                "tokenizer: found one that changes text (an added space, or no byte-level alphabet, as those of "
                "SentencePiece); expected a lossless byte-level BPE, such as those of GPT-2, GPT-NeoX or Llama 3, or "
                "one trained here"
            )


def token_dtype(tokenizer: Tokenizer) -> np.dtype[Any]:
    """Type of a token in the store: 16 bits as long as the vocabulary fits."""
    return np.dtype(token_type(tokenizer.vocab_size))


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
            named |= {role: fields[f"{role}_token"] for role in ("bos", "eos") if fields.get(f"{role}_token")}
    texts = {role: token["content"] if isinstance(token, dict) else token for role, token in named.items()}
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


def read_definition(path: Path) -> dict[str, Any]:
    """The JSON of a tokenizer file, without building it; its `sha256_json` is `Tokenizer.sha256`."""
    try:
        definition = json.loads(path.read_text(encoding="utf-8"))
        ids_of(definition)
        return definition
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"tokenizer: {path} is damaged ({error}); prepare the token store again with --force"
        ) from error


def ids_of(definition: dict[str, Any]) -> dict[str, int]:
    """Token -> id, control tokens included, as the JSON of a tokenizer has them."""
    return {**definition["model"]["vocab"], **{token["content"]: token["id"] for token in definition["added_tokens"]}}
