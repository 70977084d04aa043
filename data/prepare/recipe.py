"""The recipe of a token store: all that decides its bytes, as JSON to compare. Its manifest holds it."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from sinkbed.data.files import sha256_file, sha256_json
from sinkbed.data.prepare.config import SHARD_BYTES, TRAIN_BYTES, VOCAB_SIZE, PrepareConfig
from sinkbed.data.source.config import SingleSource, Source
from sinkbed.data.source.demo import demo_versions
from sinkbed.data.source.local_files import local_files
from sinkbed.data.source.synthetic import GENERATOR_VERSION
from sinkbed.data.store.manifest import FORMAT


def recipe_of(config: PrepareConfig) -> dict[str, Any]:
    """What decides the bytes of the store, as JSON types: the config without `out`, and what it points to."""
    source = json.loads(json.dumps(dataclasses.asdict(config.source)))
    # The identity holds names and contents of files, so that a moved corpus stays the same.
    for part in (source, *source["sources"]):
        del part["files"]
    chosen = config.tokenizer
    if chosen.path:
        from sinkbed.data.tokenizer import BOS, EOS, tokenizer_file

        file, bos, eos = tokenizer_file(chosen.path)
        if not file.is_file():
            raise FileNotFoundError(
                f"tokenizer.path: no file at {chosen.path}; give the path of a tokenizer.json or of a folder with one"
            )
        tokenizer: dict[str, Any] = {
            "sha256": sha256_file(file),
            "bos": chosen.bos or bos or BOS,
            "eos": chosen.eos or eos or EOS,
        }
    else:
        tokenizer = {
            "vocab_size": chosen.vocab_size or VOCAB_SIZE,
            "train_bytes": chosen.train_bytes or TRAIN_BYTES,
            "train_documents": chosen.train_documents,
        }
    return {
        "format": FORMAT,
        "source": source,
        "identity": source_identity(config.source),
        "tokenizer": tokenizer,
        "validation_share": config.validation_share,
        "on_error": config.on_error,
        "min_bytes": config.min_bytes,
        "max_bytes": config.max_bytes,
        "deduplicate": config.deduplicate,
        "shard_bytes": config.shard_bytes or SHARD_BYTES,
    }


def texts_digest(manifest: dict[str, Any]) -> str:
    """sha256 of what a manifest says of its texts, whatever made tokens of them: source, and how many documents and
    bytes each split has. Raises ValueError for one that does not say."""
    try:
        recipe = manifest["recipe"]
        sizes = {name: (split["documents"], split["bytes"]) for name, split in manifest["splits"].items()}
        return sha256_json([recipe["source"], recipe["identity"], sizes])
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"expected a manifest of a token store, got {type(error).__name__}: {error}") from None


def source_identity(source: SingleSource) -> dict[str, Any]:
    """What tells one state of a source from another: a digest of its files, or package versions.

    A hub data set is identified by what the config says of it; only a pinned revision makes that exact. A local folder
    laid out like one is its files. A synthetic task is what its parameters say under one version of the generator.
    Raises FileNotFoundError for missing files or packages.
    """
    if isinstance(source, Source) and source.kind == "mixture":
        return {"sources": [source_identity(part) for part in source.sources]}
    if source.kind == "demo":
        return {"packages": demo_versions(source.parts)}
    folder = Path(str(source.name))
    if source.kind == "hub" and not folder.is_dir():
        return {"name": source.name, "revision": source.revision}
    if source.kind == "synthetic":
        return {"generator": GENERATOR_VERSION}
    if source.kind == "hub":
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
    else:
        paths = [Path(path) for path in local_files(source)]
    files = [{"name": path.name, "size": path.stat().st_size, "sha256": sha256_file(path)} for path in paths]
    return {"files": digest_of(files)}


def digest_of(files: list[dict[str, Any]]) -> dict[str, Any]:
    """Files in short, however many: count, bytes, and one sha256 over the names, sizes and sha256 of all."""
    size = sum(file["size"] for file in files)
    names = [{**file, "name": os.fsencode(file["name"]).decode("latin-1")} for file in files]  # names need be no UTF-8
    return {"count": len(files), "size": size, "sha256": sha256_json(names)}
