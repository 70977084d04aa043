"""`sinkbed export`: a checkpoint as a Hugging Face folder, whose logits equal ours."""

import errno
import fcntl
import json
import os
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from sinkbed.data.files import sha256_file, sync_folder, write_json
from sinkbed.data.pack.strategy import Strategy
from sinkbed.data.tokenizer import Tokenizer as OurTokenizer
from sinkbed.train.config.arguments import PlainParser
from sinkbed.train.run.directory import CHECKSUMS
from sinkbed.train.run.load import load_decoder, open_run, run_tokenizer


def run(command: str, argv: Sequence[str]) -> int:
    """Parse and export."""
    parser = PlainParser(prog=f"sinkbed {command}", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run", type=Path, help="run directory, or a checkpoint inside one")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; it must not hold anything yet")
    parser.add_argument("--store", type=Path, help="token store with the run's tokenizer (default: the run's)")
    parser.add_argument(
        "--bos",
        choices=("as_trained", "always", "never"),
        default="as_trained",
        help="whether the exported tokenizer puts a token before each text; as_trained: what the strategy put there",
    )
    arguments = parser.parse_args(list(argv))
    if arguments.out.exists() and (not arguments.out.is_dir() or any(arguments.out.iterdir())):
        raise FileExistsError(f"--out {arguments.out}: expected a folder that holds nothing; choose another name")

    checkpoint, _ = open_run(arguments.run)  # first: a path that is none is answered before torch is imported
    from sinkbed.model.hf.export import CONFIG, WEIGHTS, export

    decoder, strategy = load_decoder(checkpoint)
    identity = checkpoint["sinkbed"]
    tokenizer = run_tokenizer(identity, arguments.store)
    first = first_id(strategy, tokenizer, arguments.bos)
    config, weights = export(
        decoder,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        context_length=identity["context_length"],
        window=strategy.window,
    )
    from safetensors.torch import save_file

    out = Path(os.path.realpath(arguments.out))
    partial = out.parent / f".{out.name}.export"
    partial.mkdir(parents=True, exist_ok=True)
    lock = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        message = f"--out {out}: another process exports to it; wait or choose another name"
        raise BlockingIOError(errno.EWOULDBLOCK, message) from None
    try:
        for left in partial.iterdir():  # by an export that was killed
            left.unlink()
        save_file(weights, partial / WEIGHTS, metadata={"format": "pt"})
        write_tokenizer(partial, tokenizer, first, identity["context_length"])
        write_json(partial / CONFIG, config, seal=False)
        generation = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
        write_json(partial / "generation_config.json", generation, seal=False)
        write_json(partial / CHECKSUMS, {path.name: sha256_file(path) for path in sorted(partial.iterdir())})
        mode = (partial / CONFIG).stat().st_mode  # by the user's umask; safetensors has one of its own
        for path in partial.iterdir():
            path.chmod(mode)
            with path.open("rb") as file:
                os.fsync(file.fileno())
        os.replace(partial, out)  # an empty folder of that name gives way
        sync_folder(out.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        os.close(lock)
    token = "no token" if first is None else repr(tokenizer.backend.id_to_token(first))
    print(
        f"{arguments.out}: step {checkpoint['global_step']}, {decoder.parameter_count():,} parameters, as "
        f"{config['architectures'][0]}; its tokenizer puts {token} before a text"
    )
    told = lm_eval_arguments(arguments.out, first, tokenizer.bos_id)
    print(f"lm_eval --model hf --model_args {shlex.quote(told)} --tasks ...")
    return 0


def lm_eval_arguments(folder: Path, first: int | None, bos_id: int) -> str:
    """What lm_eval has to be told so that its texts begin as the exported tokenizer's do.

    Before an empty context it puts a token itself, BOS unless told otherwise. Its add_bos_token=True would put BOS in
    place of another first token.
    """
    if first is None or first == bos_id:
        return f"pretrained={folder},add_bos_token={first is not None}"
    return f"pretrained={folder},prefix_token_id={first}"


def first_id(strategy: Strategy, tokenizer: OurTokenizer, bos: str) -> int | None:
    """The token before each text; None for none.

    Raises ValueError for a strategy under which the model is more than Hugging Face's and its tokenizer can be told.
    """
    for name in ("prefix_lm", *(("shared_prefix",) if strategy.window is not None else ())):
        if getattr(strategy, name):
            beside = f" beside window {strategy.window}" if name == "shared_prefix" else ""
            raise ValueError(
                f"data.strategy.{name}: got {getattr(strategy, name)}{beside}, which no model of Hugging Face's can "
                "express"
            )
    if any(what != "none" for what in strategy.first_tokens[1:]):
        raise ValueError(
            f"data.strategy.first_token: got {strategy.first_token}, whose tokens past position 0 no tokenizer "
            "places; only a first token can be exported"
        )
    if bos != "as_trained":
        return tokenizer.bos_id if bos == "always" else None
    what = strategy.first_of_row if strategy.first_tokens else strategy.document_start
    if isinstance(what, int):
        return what
    return {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id}.get(what)


def write_tokenizer(folder: Path, tokenizer: OurTokenizer, first: int | None, context_length: int) -> None:
    """tokenizer.json, with a template that puts `first` before a text, and tokenizer_config.json."""
    definition = json.loads(tokenizer.backend.to_str())
    definition["post_processor"] = None  # an own tokenizer's may put BOS before a text
    if first is not None:
        # As JSON: the library's own short form gives "$" and ":" in a token a meaning.
        token, text = {"SpecialToken": {"id": "first", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
        definition["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [token, text],
            "pair": [token, text, token, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {
                "first": {"id": "first", "ids": [first], "tokens": [tokenizer.backend.id_to_token(first)]}
            },
        }
    Tokenizer.from_str(json.dumps(definition)).save(str(folder / "tokenizer.json"))
    bos, eos = (tokenizer.backend.id_to_token(index) for index in (tokenizer.bos_id, tokenizer.eos_id))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "add_bos_token": first == tokenizer.bos_id,
        "model_max_length": context_length,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # `<bos>` in a text is five characters, as in training
    }
    write_json(folder / "tokenizer_config.json", settings, seal=False)
