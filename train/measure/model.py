"""What `sinkbed probe` measures: a model and its tokenizer.

The model is a run or checkpoint of ours, or a Hugging Face model (folder, hub name, GGUF, or made from a checkpoint of
another trainer, `model.hf.foreign`), whose attention goes through our operator (`model.hf.adapter`).
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from sinkbed.data.files import NoRecord
from sinkbed.data.pack.strategy import Strategy
from sinkbed.data.tokenizer import token_bytes
from sinkbed.model.hf.foreign import foreign_at
from sinkbed.model.hf.tokenizer import read_tokenizer, special_ids
from sinkbed.train.measure.heldout import Probe, delimiters_of
from sinkbed.train.run import directory
from sinkbed.train.run.load import find_run, load_decoder, open_run, run_tokenizer

_SECONDS_TO_ANSWER = 5


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model to measure, with what its text is made of."""

    name: str
    load_model: Callable[[], Any]
    strategy: Strategy
    bos_id: int | None
    eos_id: int
    special_ids: frozenset[int]
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    token_bytes: Any
    """[V] UTF-8 bytes of text that each id stands for."""
    context_length: int | None
    longest: int | None
    """Tokens that the model reads at most. None: no limit."""
    store: Path | None
    """Where its own validation text is."""
    own_texts: Iterator[str] | None = None
    """Or that text itself."""
    run_dir: Path | None = None
    """Of a run of ours."""
    step: int = 0
    """Of its checkpoint."""

    @functools.cached_property
    def model(self) -> Any:
        """Called as our decoder is. Its weights are read here, after all else was found to fit."""
        return self.load_model()

    def check_bos(self, modes: Sequence[str]) -> None:
        """Raise ValueError where a mode needs a BOS and the tokenizer has none."""
        if self.bos_id is None and "bos" in modes:
            raise ValueError(
                f"{self.name}: its tokenizer has no BOS, which the mode bos puts first; name a token with --bos, or "
                "choose another mode"
            )

    def probe(self, documents: Sequence[Any] = ()) -> Probe:
        """Token ids [n] of some documents, as the model is measured on them."""
        import torch

        token_bytes = torch.as_tensor(self.token_bytes, dtype=torch.int64)
        bos = self.eos_id if self.bos_id is None else self.bos_id
        delimiters = delimiters_of(documents, self.decode)
        return Probe(tuple(documents), token_bytes, bos, self.eos_id, self.special_ids, delimiters)


def check_model(arguments: Any) -> bool:
    """Whether `arguments.model` names a run of ours; loads nothing.

    Raises FileNotFoundError or ValueError for a name that can be no model.
    """
    path = Path(arguments.model)
    if (path / directory.CONFIG).is_file() or path.name.endswith(".ckpt"):
        if arguments.tokenizer is not None:
            raise ValueError(f"--tokenizer: expected none for a run, got {arguments.tokenizer}; leave it out")
        find_run(path)
        return True
    if arguments.tokenizer is not None and not arguments.tokenizer.exists():
        raise FileNotFoundError(f"--tokenizer: expected a tokenizer.json, got nothing at {arguments.tokenizer}")
    if foreign_at(path) is not None:
        if arguments.revision or arguments.gguf:
            raise ValueError(f"--revision, --gguf: expected a Hugging Face model, got {path}; leave them out")
        return False
    name, gguf = _gguf_of(arguments)
    path = Path(name)
    if path.exists() and not (path / "config.json").is_file() and gguf is None:
        raise ValueError(
            f"{path}: expected a run directory (with {directory.CONFIG}), a checkpoint inside one, a Hugging Face "
            "folder (with config.json), or one of nanoGPT (ckpt.pt) or litgpt (lit_model.pth), got none of these"
        )
    if not path.exists():
        _check_hub_name(path, name)
    return False


def has_own_text(arguments: Any) -> bool:
    """Whether a model may come with a text: a run, or another trainer's checkpoint. Raises as `check_model`."""
    return check_model(arguments) or foreign_at(Path(arguments.model)) is not None


def load(arguments: Any) -> Subject:
    """The model that `arguments.model` names; the weights of a run are read now, those of others when needed. Raises as
    `check_model`, and ValueError for files that are damaged or no causal language model."""
    if check_model(arguments):
        return of_run(Path(arguments.model), arguments.store, arguments.bos)
    return _hugging_face(arguments)


def _gguf_of(arguments: Any) -> tuple[str, str | None]:
    """The folder or hub name of a model and its GGUF file, if it is read from one."""
    path = Path(arguments.model)
    if path.is_file() and path.suffix == ".gguf" and arguments.gguf is None:
        return str(path.parent), path.name
    return arguments.model, arguments.gguf


def _check_hub_name(path: Path, name: str) -> None:
    """Refuse a name that is none of the hub's, or that only a hub that does not answer could know."""
    there = next(folder for folder in path.parents if folder.is_dir())
    missing = f"{path}: expected a run directory, a checkpoint or a Hugging Face folder, got nothing there"
    missing += directory.did_you_mean(path)
    if there != Path() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise FileNotFoundError(missing)
    try:
        import requests
        from huggingface_hub import constants, try_to_load_from_cache
    except ImportError:
        return  # said by `HFModel`
    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return
    try:
        if constants.HF_HUB_OFFLINE:
            raise requests.ConnectionError("HF_HUB_OFFLINE is set")
        requests.head(constants.ENDPOINT, timeout=_SECONDS_TO_ANSWER)
    except requests.RequestException as error:
        raise FileNotFoundError(
            f"{missing}. As a name of the hub: the hub does not answer ({type(error).__name__}), and no copy of it "
            "is in the cache"
        ) from None


def of_run(path: Path, store: Path | None, bos: str | None = None) -> Subject:
    """A run of ours, or one of its checkpoints.

    Args:
        store: where its text is; None: the token store that it was trained on.
        bos: token that serves as BOS; None: the tokenizer's.
    """
    checkpoint, run_dir = open_run(path)
    decoder, strategy = load_decoder(checkpoint)
    identity = checkpoint["sinkbed"]
    tokenizer = run_tokenizer(identity, store)
    return Subject(
        name=f"{path}, step {checkpoint['global_step']}",
        load_model=lambda: decoder,
        strategy=strategy,
        bos_id=tokenizer.bos_id if bos is None else _token_id(tokenizer.backend.token_to_id(bos), bos, path),
        eos_id=tokenizer.eos_id,
        special_ids=frozenset(tokenizer.special_ids),
        encode=tokenizer.encode,
        decode=tokenizer.decode,
        token_bytes=tokenizer.token_bytes,
        context_length=identity["context_length"],
        longest=None,
        store=store or Path(identity["store"]),
        run_dir=run_dir,
        step=checkpoint["global_step"],
    )


def _check_export(folder: Path, suffix: str) -> None:
    """Compare files of a folder that `sinkbed export` wrote with their checksums; a folder of others has none."""
    if (folder / directory.CHECKSUMS).is_file():
        try:
            sums = directory.read_json(folder / directory.CHECKSUMS)
        except NoRecord:  # a file of somebody else's
            return
        left = f"`sinkbed export` left it ({directory.CHECKSUMS} has its sha256)"
        remedy = f"export the run again, or remove {directory.CHECKSUMS} where the change is meant"
        directory.check_files(folder, {n: digest for n, digest in sums.items() if n.endswith(suffix)}, left, remedy)


def _hugging_face(arguments: Any) -> Subject:
    from sinkbed.model.hf.adapter import HFModel

    (name, gguf), foreign = _gguf_of(arguments), foreign_at(Path(arguments.model))
    where = {"revision": arguments.revision, "gguf": gguf}
    _check_export(Path(name), ".json")
    config = HFModel.checked_config(name, **where, foreign=foreign)
    size, context_length = config.vocab_size, getattr(config, "max_position_embeddings", None)
    if foreign is not None:
        tokenizer = foreign.tokenizer(arguments.tokenizer)
    elif arguments.tokenizer is not None:
        tokenizer = read_tokenizer(arguments.tokenizer, size)
    else:
        tokenizer = HFModel.tokenizer(name, **where)
    bos = tokenizer.bos_token_id
    if arguments.bos is not None:
        token = tokenizer.convert_tokens_to_ids(arguments.bos)
        bos = _token_id(None if token == tokenizer.unk_token_id else token, arguments.bos, name)

    special = special_ids(tokenizer, size)

    def load_model() -> HFModel:
        _check_export(Path(name), ".safetensors")
        now = foreign and foreign.read_again()
        return HFModel.load(name, **where, foreign=now, dtype=arguments.dtype, device_map=arguments.device_map)

    return Subject(
        name=name if gguf is None else f"{name}/{gguf}",
        load_model=load_model,
        strategy=Strategy() if bos is None else Strategy(first_token="bos"),
        bos_id=bos,
        eos_id=next(i for i in (tokenizer.eos_token_id, bos, 0) if i is not None),
        special_ids=special,
        encode=lambda text: tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"],
        decode=lambda ids: tokenizer.decode(ids, clean_up_tokenization_spaces=False),
        token_bytes=token_bytes(tokenizer.backend_tokenizer, special, size),
        context_length=context_length,
        longest=context_length,
        store=arguments.store,
        own_texts=None if foreign is None else foreign.texts(tokenizer),
    )


def _token_id(token_id: int | None, token: str, where: object) -> int:
    if token_id is None:
        raise ValueError(f"--bos: expected a token of the vocabulary of {where}, got {token!r}")
    return token_id
