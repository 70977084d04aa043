"""Opening a run on disk: which checkpoint a path names, its decoder, and the tokenizer it was trained with."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sinkbed.data.pack.strategy import Strategy
from sinkbed.data.store.token_store import TokenStore
from sinkbed.data.tokenizer import Tokenizer
from sinkbed.train.run import directory

if TYPE_CHECKING:
    from sinkbed.model import Decoder


def load_decoder(checkpoint: dict[str, Any]) -> "tuple[Decoder, Strategy]":
    """The decoder of a checkpoint, and the strategy it was trained under.

    Raises ValueError for a checkpoint that sinkbed did not write.
    """
    from sinkbed.model import Decoder, DecoderConfig

    identity = checkpoint.get("sinkbed")
    if identity is None:
        raise ValueError("the checkpoint: expected one written by sinkbed fit, got no `sinkbed` entry")
    decoder = Decoder(DecoderConfig(**identity["decoder"]), identity["vocab_size"])
    prefix = "decoder."
    weights = {k.removeprefix(prefix): v for k, v in checkpoint["state_dict"].items() if k.startswith(prefix)}
    decoder.load_state_dict(weights)
    return decoder, Strategy(**identity["strategy"])


def find_run(path: Path) -> tuple[Path, Path]:
    """The checkpoint that a path names, or the newest of a run directory, and the run directory; loads nothing.

    Raises FileNotFoundError for a path that is neither, ValueError for a finished run whose files are damaged.
    """
    chosen = path.name.endswith(".ckpt")  # a sharded checkpoint is a folder too
    folder = path.parent.parent if chosen else path
    if not (folder / directory.CONFIG).is_file():
        raise FileNotFoundError(
            f"{path}: expected a run directory or a checkpoint inside one, got no {folder / directory.CONFIG}"
            + directory.did_you_mean(folder)
        )
    directory.check_finished(folder)
    newest = path if chosen else directory.newest_checkpoint(folder)
    if newest is None:
        raise FileNotFoundError(f"{path}: expected a run with a checkpoint, got one that has none yet")
    return newest, folder


def open_run(path: Path) -> tuple[dict[str, Any], Path]:
    """What the checkpoint of `find_run` holds, and the run directory. Raises ValueError where it does not load."""
    checkpoint, folder = find_run(path)
    from sinkbed.train.run.checkpoint import load_checkpoint

    return load_checkpoint(checkpoint, option="the path"), folder


def run_tokenizer(identity: dict[str, Any], store: Path | None) -> Tokenizer:
    """The tokenizer a checkpoint was trained with, from its token store or another one that has it.

    Raises ValueError for a store with another tokenizer.
    """
    opened = TokenStore.open(store or Path(identity["store"]), "train")
    if opened.manifest.tokenizer_sha256 != identity["tokenizer"]:
        raise ValueError(
            f"{opened.path}: expected the tokenizer that the checkpoint was trained with "
            f"({identity['tokenizer'][:12]}), got {opened.manifest.tokenizer_sha256[:12]}; give its --store"
        )
    return opened.tokenizer()
