"""Tokenizers of models of `transformers`: reading them, and which of their ids no text contains."""

import json
import re
from pathlib import Path
from typing import Any

_BYTE = re.compile("<0x[0-9A-F]{2}>")


def read_tokenizer(path: Path, size: int) -> Any:
    """A tokenizer.json, or the one in a folder; BOS and EOS are those that a tokenizer_config.json beside it names.

    Raises FileNotFoundError where there is none, and ValueError for a damaged one or ids past `size` embeddings.
    """
    import transformers

    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"{file}: expected a tokenizer, got none; give a tokenizer.json with --tokenizer")
    settings = file.with_name("tokenizer_config.json")
    try:
        named = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
        tokens = {name: named.get(name) for name in ("bos_token", "eos_token")}
        plain = {name: token["content"] if isinstance(token, dict) else token for name, token in tokens.items()}
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(file), **plain)
    except Exception as error:  # `tokenizers` raises plain exceptions
        problem = " ".join(str(error).split())[:200]
        raise ValueError(f"{file}: expected a tokenizer of the `tokenizers` library, got: {problem}") from error
    ids = max(tokenizer.get_vocab().values(), default=-1) + 1
    if ids > size:
        raise ValueError(
            f"{file}: expected at most {size} tokens, as many as the model has embeddings, got {ids}; give the "
            "tokenizer that it was trained with with --tokenizer"
        )
    return tokenizer


def special_ids(tokenizer: Any, size: int) -> frozenset[int]:
    """Ids below `size` that no text contains: control tokens, the reserved ones too, and ids without a token."""
    # Some vocabularies list the single bytes that text falls back to as special tokens.
    added = {
        index
        for index, token in tokenizer.added_tokens_decoder.items()
        if token.special and not _BYTE.fullmatch(token.content)
    }
    ordinary = set(tokenizer.get_vocab().values()) - added - set(tokenizer.all_special_ids)
    return frozenset(range(size)) - ordinary
