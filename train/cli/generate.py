"""`sinkbed generate`: a look at what a model writes: a run, a checkpoint, or any model that `sinkbed probe` takes.

The whole context is read again for every token; there is no cache of keys. Good for a look, not for serving.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sinkbed.plain_text import visible
from sinkbed.progress import loading
from sinkbed.ranges import check_number
from sinkbed.train.config.arguments import PlainParser
from sinkbed.train.measure.finite import finite
from sinkbed.train.measure.model import Subject, load
from sinkbed.train.measure.modes import InferenceMode, check_modes, placed_positions


def run(command: str, argv: Sequence[str]) -> int:
    """Parse, write."""
    parser = PlainParser(prog=f"sinkbed {command}", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", help="run directory, checkpoint, Hugging Face folder or hub name")
    parser.add_argument("--prompt", default="", help="text to go on from (default: none)")
    parser.add_argument("--tokens", type=int, default=100, help="tokens to write at most; it ends before with EOS")
    parser.add_argument("--temperature", type=float, default=1.0, help="0: always the likeliest token")
    parser.add_argument("--top_k", type=int, help="draw among so many of the likeliest tokens only")
    parser.add_argument("--seed", type=int, default=0)
    modes = ("as_trained", "bos", "text")
    parser.add_argument("--mode", default="as_trained", choices=modes, help="what stands before the text")
    parser.add_argument("--store", type=Path, help="token store with the run's tokenizer (default: the run's)")
    parser.add_argument("--bos", help="token that serves as BOS (default: the tokenizer's)")
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.json, its folder, or a meta.pkl (default: its own)")
    parser.set_defaults(revision=None, gguf=None, dtype="auto", device_map=None)
    arguments = parser.parse_args(list(argv))

    check_number("--tokens", arguments.tokens, least=1)
    check_number("--temperature", arguments.temperature, least=0)
    check_number("--seed", arguments.seed, least=0, below=2**63)
    if arguments.top_k is not None:
        check_number("--top_k", arguments.top_k, least=1)
    [mode] = check_modes([arguments.mode])
    with loading("torch and the model"):
        subject = load(arguments)
    ids = subject.encode(arguments.prompt)
    for _ in continuation(subject, ids, mode, arguments):
        if sys.stderr.isatty():
            print(f"\r{len(ids)} tokens", end="", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print("\r", end="", file=sys.stderr)
    print("\n".join(visible(line) for line in subject.decode(ids).split("\n")))
    return 0


def continuation(subject: Subject, ids: list[int], mode: InferenceMode, arguments: Any) -> Iterator[int]:
    """Token after token, each appended to `ids`, until EOS or enough of them. Raises ValueError for logits that are not
    finite, and for a model that has to be given a text and is not."""
    import torch

    from sinkbed.model.observe import evaluating, input_device
    from sinkbed.train.measure.inputs import arrange

    subject.check_bos([mode])
    probe = subject.probe()
    generator = torch.Generator().manual_seed(arguments.seed)
    placed = len(placed_positions(mode, subject.strategy))
    room = (subject.context_length or sys.maxsize) - max(1, placed)
    with evaluating(subject.model), torch.no_grad():
        for _ in range(arguments.tokens):
            text = torch.tensor([ids[-room:]], dtype=torch.int64)
            lengths = torch.tensor([text.shape[1]])
            device = input_device(subject.model)
            row = arrange(probe, mode, subject.strategy, [0], text, lengths, device=device)
            if row.tokens.shape[1] == 0:
                raise ValueError("--prompt: expected text for a model with no first token of its own, got none")
            logits = subject.model(row.tokens, mask=row.mask).logits[0, -1].float().cpu()
            finite(float(logits.sum()), "logits")
            if arguments.temperature == 0:
                token = int(logits.argmax())
            else:
                values, tokens = logits.topk(min(arguments.top_k or len(logits), len(logits)))
                weights = ((values - values[0]).double() / arguments.temperature).softmax(0)  # also near 0
                token = int(tokens[weights.multinomial(1, generator=generator)])
            if token == subject.eos_id:
                return
            ids.append(token)
            yield token
