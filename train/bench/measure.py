"""`sinkbed bench measure`: what it costs to measure a model, and how true the sampled Jacobian is.

`eager`: sink masses of a Llama of transformers by our operator, against the common way, eager attention that returns
every T×T matrix, of which column 0 is taken. Their masses are compared. Each turn runs in a new process; memory is the
peak of the forward pass above what the loaded model takes, without logits, which sinks do not need, and with them.
`modes`: the probe set in three inference modes, for that Llama and for a decoder of a run config.
`jacobian`: norms from random directions against the exact ones, over several draws.
"""

import statistics
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sinkbed.data.pack.strategy import Strategy
from sinkbed.data.store.token_store import TokenStore
from sinkbed.model import Decoder
from sinkbed.train.bench.timing import in_new_process, interleave, peak_bytes, take_turns
from sinkbed.train.bench.training import decoder_config, read_config
from sinkbed.train.loop.cpu import use_cpu
from sinkbed.train.measure.config import MeasureConfig
from sinkbed.train.measure.excerpts import Excerpts
from sinkbed.train.measure.heldout import Probe
from sinkbed.train.measure.measures.jacobian import measure_jacobian
from sinkbed.train.measure.model import of_run
from sinkbed.train.measure.modes import InferenceMode
from sinkbed.train.measure.sinks import measure

MODES: tuple[InferenceMode, ...] = ("bos", "text", "first_key_masked")
WAYS = ("Sinkbed", "eager attention")
_ALIKE = 1e-5
_WARM_TOKENS = 16


def llama(arguments: Any, attention: str) -> Any:
    """A `LlamaForCausalLM` in float32 with the attention of that name, the same random weights each time."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=arguments.vocab_size,
        hidden_size=arguments.hidden,
        intermediate_size=arguments.ffn,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.heads,
        num_key_value_heads=arguments.kv_heads,
        max_position_embeddings=1 << 20,
        tie_word_embeddings=True,
        # Wide enough for heads to differ; at the default every mass is that of uniform attention.
        initializer_range=0.05,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


class Turn(NamedTuple):
    """One forward pass in a process of its own."""

    seconds: float
    peak_bytes: int
    """Above what the process held before; 0 where the system does not tell."""
    masses: Tensor
    """[L, H, T] mass of each query on key 0."""


@torch.no_grad()
def _turn(way: str, arguments: Any, logits: bool) -> Turn:
    from sinkbed.model.hf import adapter as hf
    from sinkbed.model.hf import attention as hf_attention

    use_cpu(arguments.threads)
    hf_attention.register()
    tokens = torch.randint(arguments.vocab_size, (1, arguments.length), generator=torch.Generator().manual_seed(1))
    model = llama(arguments, hf_attention.ATTENTION if way == WAYS[0] else "eager")
    ours = hf.HFModel(model)
    if not logits:
        model.lm_head = torch.nn.Identity()

    def work(given: Tensor) -> Tensor:
        if way == WAYS[0]:
            output = ours(given, statistics=True)
            return torch.stack([s.first_key_mass[0] for s in output.statistics])
        output = model(given, output_attentions=True, use_cache=False)
        return torch.stack([matrix[0, ..., 0] for matrix in output.attentions])

    work(tokens[:, :_WARM_TOKENS])
    before = _forget_peak()
    began = time.perf_counter()
    masses = work(tokens)
    seconds = time.perf_counter() - began
    return Turn(seconds, peak_bytes() - before if before else 0, masses)


def _forget_peak() -> int:
    """Set this process's peak back to what it holds now, which is returned; 0 where the system cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return 0
    return peak_bytes()


def eager(arguments: Any) -> None:
    """Seconds and memory of both ways, in turns, without and with logits.

    Raises ValueError where their masses differ.
    """
    print(f"\nsink masses, T {arguments.length:,}; {arguments.repeats} turns each, medians and the highest peak")
    print(f"{'':34}{'seconds':>9}{'ratio':>8}{'MB above the model':>20}{'ratio':>8}")
    for logits in (False, True):
        ways = {way: partial(in_new_process, _turn, way, arguments, logits) for way in WAYS}
        turns = take_turns(ways, arguments.repeats)
        error = masses_differ(turns)
        seconds = {way: statistics.median(turn.seconds for turn in of_way) for way, of_way in turns.items()}
        peaks = {way: max(turn.peak_bytes for turn in of_way) for way, of_way in turns.items()}
        base, least = seconds[WAYS[0]], peaks[WAYS[0]]
        for way in WAYS:
            memory = f"{peaks[way] / 1e6:20,.0f}{peaks[way] / least:8.2f}" if least else f"{'unknown':>20}"
            name = f"{way}, {'logits too' if logits else 'no logits'}"
            print(f"{name:34}{seconds[way]:9.3f}{seconds[way] / base:8.2f}{memory}")
        print(f"the masses of both differ by {error:.0e} at most", flush=True)


def masses_differ(turns: dict[str, list[Turn]]) -> float:
    """Largest difference between the ways' masses. Raises ValueError where it is more than rounding."""
    pairs = zip(turns[WAYS[0]], turns[WAYS[1]], strict=True)
    error = max(float((a.masses - b.masses).abs().max()) for a, b in pairs)
    if not error <= _ALIKE:
        raise ValueError(f"bench measure: expected the masses of both ways within {_ALIKE:.0e}, got {error:.1e}")
    return error


def random_probe(vocab_size: int, documents: int, tokens: int) -> Probe:
    """Documents of random tokens, all of one length; the last two ids are BOS and EOS."""
    bos, eos = vocab_size - 2, vocab_size - 1
    drawn = torch.randint(bos, (documents, tokens), generator=torch.Generator().manual_seed(2))
    return Probe(tuple(drawn), torch.ones(vocab_size, dtype=torch.int64), bos, eos, frozenset({bos, eos}))


def modes(arguments: Any) -> None:
    """Seconds to measure the probe set in each inference mode and in all."""
    from sinkbed.model.hf import adapter as hf
    from sinkbed.model.hf import attention as hf_attention

    hf_attention.register()
    decoder = Decoder(decoder_config(read_config(arguments.config)), arguments.decoder_vocab_size).eval()
    models = {
        "Llama": (hf.HFModel(llama(arguments, hf_attention.ATTENTION)), arguments.vocab_size),
        str(arguments.config): (decoder, arguments.decoder_vocab_size),
    }
    config = MeasureConfig(documents=arguments.documents, live_documents=1, sink_tokens=arguments.tokens)
    print(f"\nmeasuring {arguments.documents} documents of {arguments.tokens} tokens, seconds")
    print(f"{'':24}{'parameters':>13}" + "".join(f"{mode:>18}" for mode in MODES) + f"{'all':>8}")
    for name, (model, vocab_size) in models.items():
        probe = random_probe(vocab_size, arguments.documents, arguments.tokens)
        strategy = Strategy(first_token="bos")

        def step(mode: InferenceMode, model: Any = model, probe: Probe = probe, strategy: Strategy = strategy) -> Any:
            return lambda: measure(model, probe, mode, strategy, config)

        timings = interleave({mode: step(mode) for mode in MODES}, arguments.repeats, warmup=0)
        count = sum(parameter.numel() for parameter in model.parameters())
        columns = "".join(f"{timing.median:18.2f}" for timing in timings)
        print(f"{name:24}{count:13,}{columns}{sum(timing.median for timing in timings):8.2f}", flush=True)


def jacobian(arguments: Any) -> None:
    """Deviation of `Jacobian.others` from the exact one at each layer, over draws; seconds of both."""
    model, probe, strategy, name = _subject(arguments)
    excerpts = Excerpts.of(probe, "bos", strategy, arguments.tokens, arguments.jacobian_documents)
    size = MeasureConfig().batch_tokens
    began = time.perf_counter()
    exact = measure_jacobian(model, excerpts, size, directions="exact")
    exact_seconds = time.perf_counter() - began
    errors, predicted, seconds = [], [], []
    for seed in range(arguments.draws):
        began = time.perf_counter()
        sampled = measure_jacobian(model, excerpts, size, directions=arguments.directions, seed=seed)
        seconds.append(time.perf_counter() - began)
        errors.append([abs(a / b - 1) for a, b in zip(sampled.others, exact.others, strict=True)])
        predicted.append([a / b for a, b in zip(sampled.others_error, sampled.others, strict=True)])
    print(
        f"Jacobian of {name}: {len(excerpts.rows)} documents of {arguments.tokens} tokens, {arguments.directions} of "
        f"{exact.directions} directions, {arguments.draws} draws"
    )
    print(f"{'layer':>5}{'exact norm':>13}{'error, median':>15}{'largest':>9}{'stated':>9}")
    for index, layer in enumerate(exact.layers):
        each = [100 * draw[index] for draw in errors]
        stated = 100 * statistics.median(draw[index] for draw in predicted)
        print(f"{layer:5}{exact.others[index]:13.4g}{statistics.median(each):14.1f}%{max(each):8.1f}%{stated:8.1f}%")
    print(f"exact {exact_seconds:.2f} s, sampled {statistics.median(seconds):.2f} s")


def _subject(arguments: Any) -> tuple[Decoder, Probe, Strategy, str]:
    """A trained run with its validation text, or random weights with random tokens."""
    if arguments.run is None:
        torch.manual_seed(0)
        vocab_size = arguments.decoder_vocab_size
        decoder = Decoder(decoder_config(read_config(arguments.config)), vocab_size).eval()
        probe = random_probe(vocab_size, arguments.jacobian_documents, arguments.tokens)
        return decoder, probe, Strategy(first_token="bos"), f"{arguments.config}, random weights"
    subject = of_run(arguments.run, arguments.store)
    config = MeasureConfig(documents=arguments.jacobian_documents, live_documents=1, sink_tokens=arguments.tokens)
    assert subject.store is not None and subject.context_length is not None  # of a run
    probe = Probe.from_store(TokenStore.open(subject.store, "validation"), subject.context_length, config)
    return subject.model.eval(), probe, subject.strategy, subject.name


def run(arguments: Any) -> int:
    """Print a table for each part."""
    if find_spec("transformers") is None:
        raise ValueError("bench measure: the peer is missing; pip install -e '.[bench]'")
    use_cpu(arguments.threads)
    if {"eager", "modes"} & set(arguments.parts):
        print(
            f"Llama: {arguments.layers} layers, hidden {arguments.hidden}, {arguments.heads} heads, "
            f"{arguments.kv_heads} key heads, ffn {arguments.ffn}, vocabulary {arguments.vocab_size:,}; "
            f"{arguments.threads} threads",
            flush=True,
        )
    for name, part in (("eager", eager), ("modes", modes), ("jacobian", jacobian)):
        if name in arguments.parts:
            part(arguments)
    return 0
