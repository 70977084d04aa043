"""`sinkbed probe`: sinks, states and mixing of any causal language model, with the code that measures during training.

What is measured is chosen by --measure; `sinks` alone is the default, as the others take more passes over the text.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from train import rundir
from train.plain_text import visible

if TYPE_CHECKING:
    from train.measure import InferenceMode, MeasureConfig, ModeResult, Probe
    from train.subject import Subject

Input = Literal["natural", "random", "repeated"]
Measure = Literal["sinks", "states", "gradients", "perturbation", "rank", "paths", "jacobian", "positions", "streaming"]


def run(command: str, argv: Sequence[str]) -> int:
    """Parse, measure, print tables, write what was asked for."""
    import argparse

    parser = argparse.ArgumentParser(prog=f"sinkbed {command}", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", help="run directory, checkpoint, Hugging Face folder or hub name")
    text = parser.add_argument_group("text")
    text.add_argument("--prompts", type=Path, help="a JSONL file (column text), or a document a line")
    text.add_argument("--store", type=Path, help="validation split of this token store (default: a run's own)")
    text.add_argument("--documents", type=int, default=100)
    text.add_argument("--length", type=int, help="tokens of a document at most (default: the context, 512 at most)")
    text.add_argument("--inputs", nargs="+", choices=get_args(Input), default=["natural"], help="what is read (sinks)")
    text.add_argument("--modes", nargs="+", default=["bos", "text", "first_key_masked"], help="inference modes")
    text.add_argument("--bos", help="token that serves as BOS (default: the tokenizer's)")
    what = parser.add_argument_group("what is measured")
    what.add_argument("--measure", nargs="+", choices=[*get_args(Measure), "all"], default=["sinks"])
    what.add_argument("--sink_tokens", type=int, default=64, help="T of the sink rate, tokens of states and mixing")
    what.add_argument("--keys", type=int, nargs="+", default=[0], help="row positions k whose sink rate is wanted")
    what.add_argument("--mixing_documents", type=int, default=16, help="documents of states and mixing")
    what.add_argument("--lengths", type=int, nargs="+", default=[], help="mixing at these numbers of tokens too")
    what.add_argument("--change", nargs=2, metavar=("OLD", "NEW"), help="perturbation: this word in the first prompt")
    what.add_argument("--directions", default="16", help="jacobian: directions a document, or exact")
    what.add_argument("--jacobian_documents", type=int, default=8, help="documents of the jacobian")
    what.add_argument("--cache", type=int, help="streaming: keys (default: a quarter of the longest document)")
    what.add_argument("--kept", type=int, nargs="+", default=[0, 1, 2, 4], help="streaming: first keys kept")
    what.add_argument("--checkpoints", action="store_true", help="also along all checkpoints of a run")
    hub = parser.add_argument_group("Hugging Face models")
    hub.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    hub.add_argument("--device_map", help="such as auto: layers over several devices, or partly on disk")
    hub.add_argument("--revision", help="commit, tag or branch")
    hub.add_argument("--gguf", help="weights in this GGUF file of the folder or repository")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--batch_tokens", type=int, default=2_048, help="tokens of a forward pass, padding included")
    parser.add_argument("--json", type=Path, help="write every figure, per layer and head, to this file")
    parser.add_argument("--out", type=Path, help="write a report to this folder: HTML page, figures, CSV, JSON")
    parser.add_argument("--force", action="store_true", help="replace the report of an earlier probe in --out")
    parser.add_argument("--wandb", action="store_true", help="log figures and numbers to the run's W&B page")
    arguments = parser.parse_args(list(argv))

    import torch

    from train import probe_report, probe_tables
    from train.measure import MeasureConfig, check_modes
    from train.subject import load, probe_of, texts

    if arguments.threads is not None and arguments.threads < 1:
        raise ValueError(f"--threads: found {arguments.threads}, expected at least 1")
    if arguments.out is not None:
        probe_report.check_out(arguments.out, arguments.force)
    if arguments.json is not None:
        if arguments.json.is_dir():
            raise ValueError(f"--json {arguments.json}: expected a file, found a folder")
        probe_report.check_writable("--json", arguments.json)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    modes = check_modes(arguments.modes)
    measures = set(get_args(Measure)) if "all" in arguments.measure else set(arguments.measure)
    config = MeasureConfig(
        documents=arguments.documents,
        live_documents=1,
        sink_tokens=arguments.sink_tokens,
        batch_tokens=arguments.batch_tokens,
    )
    _check_arguments(arguments, measures)
    subject = load(arguments)
    _check_subject(subject, arguments)
    limit = arguments.length or min(512, subject.context_length or 512)
    natural = probe_of(subject, texts(arguments, subject), limit, config)
    _check_bos(subject, modes)
    _check_lengths(subject, natural, limit, modes, measures, arguments)
    count = len(natural.documents)
    print(f"{subject.name}: {count} document{'s' * (count != 1)}, T = {config.sink_tokens}, eps 0.3")
    longest = max([limit, *(n + 1 for n in arguments.lengths)])
    if subject.context_length is not None and longest > subject.context_length:
        print(f"tokens past the context of {subject.context_length} that it was trained with are read, too")
    found: dict[str, Any] = {
        "model": subject.name,
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(arguments).items()},
        "documents": len(natural.documents),
        "versions": {name: metadata.version(name) for name in ("sinkbed", "torch")},
    }
    if "sinks" in measures:
        found["sinks"] = _sinks(subject, natural, modes, arguments, config)
    found |= _states_and_mixing(subject, natural, modes, measures, arguments)
    found |= _perplexities(subject, natural, modes, measures, arguments)
    if arguments.checkpoints:
        found["checkpoints"] = _along(subject, natural, modes, config)
    _name_tokens(found, subject)
    if arguments.json is not None:
        rundir.write_json(arguments.json, found)
    if arguments.out is not None:
        page = probe_report.write(found, arguments.out)
    probe_tables.print_tables(found)
    if arguments.out is not None:
        print(f"report: {page} (also probe.json, *.csv, *.png and *.svg beside it)")
    if arguments.wandb:
        assert subject.run_dir is not None
        print(probe_report.log_to_wandb(found, subject.run_dir, subject.step))
    return 0


def _sinks(
    subject: Subject, natural: Probe, modes: Sequence[InferenceMode], arguments: Any, config: MeasureConfig
) -> dict[str, Any]:
    """input -> mode -> key -> `ModeResult`; a line is printed as soon as it is known."""
    from train.measure import measure
    from train.subject import artificial

    results: dict[str, dict[str, dict[str, Any]]] = {}
    print(f"{'input':10}{'mode':20}{'key':>5}{'sink rate %':>13}{'sink mass':>11}{'loss':>9}{'bits/byte':>11}")
    for kind in arguments.inputs:
        probe = natural if kind == "natural" else artificial(natural, kind)
        for mode in modes:
            for key in arguments.keys:
                result = measure(subject.model, probe, mode, subject.strategy, config, key=key)
                results.setdefault(kind, {}).setdefault(mode, {})[str(key)] = dataclasses.asdict(result)
                print(_line(kind, mode, key, result), flush=True)
    return results


def _states_and_mixing(
    subject: Subject, probe: Probe, modes: Sequence[InferenceMode], measures: set[str], arguments: Any
) -> dict[str, Any]:
    """measure -> mode -> its figures; `by_length`: the mixing ones again at other numbers of tokens."""
    from train import jacobian, mixing, states

    model, size = subject.model, arguments.batch_tokens
    found: dict[str, Any] = {}

    def mixed(tokens: int) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for mode in modes:
            excerpts = states.Excerpts.of(probe, mode, subject.strategy, tokens, arguments.mixing_documents)
            few = states.Excerpts.of(probe, mode, subject.strategy, tokens, arguments.jacobian_documents)
            directions = None if arguments.directions == "exact" else int(arguments.directions)
            for name, call in (
                ("perturbation", lambda e=excerpts: mixing.measure_perturbation(model, e, size)),
                ("rank", lambda e=excerpts: mixing.measure_rank(model, e, size)),
                ("paths", lambda e=excerpts: mixing.measure_paths(model, e, size)),
                ("jacobian", lambda e=few, d=directions: jacobian.measure_jacobian(model, e, size, directions=d)),
            ):
                if name in measures:
                    _say(f"{name}, mode {mode}, {tokens} tokens")
                    value: Any = call()
                    whole = isinstance(value, dict)
                    out.setdefault(name, {})[mode] = (
                        {k: dataclasses.asdict(v) for k, v in value.items()} if whole else dataclasses.asdict(value)
                    )
        return out

    head = None
    for mode in modes:
        excerpts = states.Excerpts.of(probe, mode, subject.strategy, arguments.sink_tokens, arguments.mixing_documents)
        if "states" in measures:
            _say(f"states, mode {mode}")
            measured = dataclasses.asdict(states.measure_states(model, excerpts, size))
            found.setdefault("states", {})[mode] = measured
            shown = found.setdefault("map", {})[mode] = states.strongest_head(model, excerpts, head=head)
            head = (shown["layer"], shown["head"])  # of the first mode, in the others as well
        if "gradients" in measures:
            _say(f"gradients, mode {mode}")
            gradients = states.measure_gradients(model, excerpts, size)
            found.setdefault("gradients", {})[mode] = dataclasses.asdict(gradients)
    found |= mixed(arguments.sink_tokens)
    if arguments.lengths:
        found["by_length"] = {str(length): mixed(length) for length in sorted(set(arguments.lengths))}
    if arguments.change is not None:
        found["change"] = _changed_word(subject, modes, arguments)
    return found


def _changed_word(subject: Subject, modes: Sequence[InferenceMode], arguments: Any) -> dict[str, Any]:
    """The perturbation of the paper's Figure 2: one word of the first prompt in place of another."""
    import torch

    from train import mixing, states
    from train.measure import Probe

    before, after = _changed_prompt(subject, arguments)
    old, new = arguments.change
    eos, bytes_ = subject.eos_id, torch.as_tensor(subject.token_bytes, dtype=torch.int64)
    bos = eos if subject.bos_id is None else subject.bos_id
    probe = Probe((torch.tensor(before),), bytes_, bos, eos, subject.special_ids)
    found: dict[str, Any] = {"old": old, "new": new, "tokens": before}
    for mode in modes:
        excerpts = states.Excerpts.of(probe, mode, subject.strategy, len(before), 1)
        changed = mixing.measure_perturbation(
            subject.model, excerpts, arguments.batch_tokens, changed=torch.tensor([after])
        )
        found.setdefault("modes", {})[mode] = dataclasses.asdict(changed)
    return found


def _changed_prompt(subject: Subject, arguments: Any) -> tuple[list[int], list[int]]:
    """Token ids of the first prompt before and after, as many.

    Raises ValueError where the word is not there, or the texts differ in their number of tokens.
    """
    from train.subject import texts

    old, new = arguments.change
    prompt = next(texts(arguments, subject))
    if old not in prompt:
        raise ValueError(f"--change: found no {old!r} in the first prompt, {prompt[:60]!r} …; expected a word of it")
    before, after = subject.encode(prompt), subject.encode(prompt.replace(old, new, 1))
    if len(before) != len(after):
        raise ValueError(
            f"--change: found {len(before)} tokens with {old!r} and {len(after)} with {new!r}, expected as many; "
            "choose a word of as many tokens"
        )
    before, after = before[: arguments.sink_tokens], after[: arguments.sink_tokens]
    if before == after:
        raise ValueError(
            f"--change: found {old!r} past the first {arguments.sink_tokens} tokens of the prompt, expected it among "
            "them; raise --sink_tokens"
        )
    return before, after


def _perplexities(
    subject: Subject, probe: Probe, modes: Sequence[InferenceMode], measures: set[str], arguments: Any
) -> dict[str, Any]:
    from train import perplexity

    model, size = subject.model, arguments.batch_tokens
    found: dict[str, Any] = {}
    if "positions" in measures:
        found["positions"] = {
            mode: [dataclasses.asdict(s) for s in perplexity.by_position(model, probe, mode, subject.strategy, size)]
            for mode in modes
        }
    if "streaming" in measures:
        cache = _cache(arguments, subject, probe)
        found["streaming"] = {
            mode: [
                dataclasses.asdict(line)
                for line in perplexity.streaming(
                    model, probe, mode, subject.strategy, size, cache=cache, kept=arguments.kept
                )
            ]
            for mode in modes
            if mode != "first_key_masked"  # hides what is to be kept
        }
    return found


def _along(subject: Subject, probe: Probe, modes: Sequence[InferenceMode], config: MeasureConfig) -> dict[str, Any]:
    """Sinks and norms at every checkpoint of the run, oldest first, and the onset."""
    from train.checkpoint import load_checkpoint
    from train.measure import measure
    from train.states import Excerpts, measure_states
    from train.validate import load_decoder

    assert subject.run_dir is not None
    points: list[dict[str, Any]] = []
    for path in rundir.checkpoints(subject.run_dir):
        checkpoint = load_checkpoint(path, option="the path")
        decoder, strategy = load_decoder(checkpoint)
        identity = checkpoint["sinkbed"]
        step = checkpoint["global_step"]
        tokens = step * identity["global_batch"] * identity["context_length"]
        point: dict[str, Any] = {"step": step, "tokens": tokens, "modes": {}}
        for mode in modes:
            excerpts = Excerpts.of(probe, mode, strategy, config.sink_tokens, config.documents)
            states = measure_states(decoder, excerpts, config.batch_tokens)
            values = measure(decoder, probe, mode, strategy, config).metrics(mode) | states.metrics(mode)
            point["modes"][mode] = values
        points.append(point)
        print(f"checkpoint of step {step}: {_rate(point, modes[0]):.2f} % in mode {modes[0]}", flush=True)
    reached = [i for i, p in enumerate(points) if p["step"] and _rate(p, modes[0]) >= config.onset_rate]
    onset = points[reached[0]]["tokens"] if reached else None
    before = points[reached[0] - 1]["tokens"] if reached and reached[0] else 0
    return {
        "points": points,
        "onset_tokens": onset,
        "onset_after": before,
        "onset_rate": config.onset_rate,
        "onset_mode": modes[0],
    }


def _say(what: str) -> None:
    """What is being measured, to those who watch."""
    print(f"measuring {what}", file=sys.stderr, flush=True)


def _rate(point: dict[str, Any], mode: str) -> float:
    return float(point["modes"][mode][f"sink/rate/0.3/{mode}"])


def _name_tokens(found: dict[str, Any], subject: Subject) -> None:
    """Put the text of token ids beside them."""
    special = {subject.bos_id: "⟨bos⟩", subject.eos_id: "⟨eos⟩"} if subject.bos_id != subject.eos_id else {}

    def text(index: int) -> str:
        return special.get(index) or visible(subject.decode([index]))

    for measured in found.get("states", {}).values():
        for line in measured["strongest_token"]:
            line["text"] = text(line["token"])
        for line in measured["massive"]:
            line["text"] = text(line["token"])
    for shown in found.get("map", {}).values():
        shown["text"] = [text(index) for index in shown["tokens"]]
    if "change" in found:
        found["change"]["text"] = [text(index) for index in found["change"]["tokens"]]


def _check_arguments(arguments: Any, measures: set[str]) -> None:
    for key in arguments.keys:
        if not 0 <= key < arguments.sink_tokens - 1:
            raise ValueError(
                f"--keys: found {key}, expected 0 to {arguments.sink_tokens - 2}, so that a later query among the "
                f"first --sink_tokens {arguments.sink_tokens} can look at it; give another key, or raise --sink_tokens"
            )
    if arguments.directions != "exact" and not (arguments.directions.isdigit() and int(arguments.directions) > 3):
        raise ValueError(f"--directions: found {arguments.directions!r}, expected exact, or a number of at least 4")
    for name in ("mixing_documents", "jacobian_documents", "batch_tokens", "documents"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name}: found {getattr(arguments, name)}, expected at least 1")
    if arguments.length is not None and arguments.length < 2:
        raise ValueError(f"--length: found {arguments.length}, expected at least 2 tokens")
    for length in arguments.lengths:
        if length < 8:
            raise ValueError(f"--lengths: found {length}, expected at least 8 tokens")
    if arguments.cache is not None and arguments.cache < 1:
        raise ValueError(f"--cache: found {arguments.cache}, expected at least 1 key")
    if arguments.lengths and not measures & {"perturbation", "rank", "paths", "jacobian"}:
        raise ValueError(
            "--lengths: expected a --measure that it applies to (perturbation, rank, paths, jacobian), found none"
        )
    if measures - {"sinks", "positions", "streaming"} and arguments.sink_tokens < 8:
        raise ValueError(f"--sink_tokens: found {arguments.sink_tokens}, expected at least 8 for states and mixing")
    if arguments.change is not None and arguments.prompts is None:
        raise ValueError("--change: expected --prompts, whose first text holds the word, found none")


def _check_subject(subject: Subject, arguments: Any) -> None:
    """Refuse what this model cannot be asked for."""
    prefix = subject.strategy.prefix_lm
    if prefix and any(arguments.keys):
        raise ValueError(
            f"--keys: found {max(arguments.keys)} for a prefix LM (strategy.prefix_lm={prefix}), where only the first "
            "key is measured; expected 0, or leave --keys out"
        )
    length = max([arguments.length or 0, *(n + 1 for n in arguments.lengths)])
    if subject.longest is not None and length > subject.longest:
        raise ValueError(
            f"--length: found {length}, expected at most {subject.longest}, the max_position_embeddings of "
            f"{subject.name}; lower it, or where the model computes its positions, raise that in a copy of its "
            "config.json"
        )
    for name in ("checkpoints", "wandb"):
        if getattr(arguments, name) and subject.run_dir is None:
            raise ValueError(f"--{name}: expected a run of ours, found {subject.name}, a Hugging Face model")


def _cache(arguments: Any, subject: Subject, probe: Probe) -> int:
    if arguments.cache is not None:
        return int(arguments.cache)
    return min(max(map(len, probe.documents)) // 4, subject.strategy.window or 10**9)


def _check_lengths(
    subject: Subject, probe: Probe, limit: int, modes: Sequence[str], measures: set[str], arguments: Any
) -> None:
    """Refuse, before anything is measured, what the documents are too short for."""
    from train.perplexity import check_cache

    longest = max(map(len, probe.documents))
    if arguments.lengths and max(arguments.lengths) > longest:
        raise ValueError(
            f"--lengths: found {max(arguments.lengths)}, expected at most {longest}, the tokens of the longest "
            f"document (cropped to --length {limit} with room for BOS); give longer ones, or lower it"
        )
    if "streaming" in measures:
        if not any(mode != "first_key_masked" for mode in modes):
            raise ValueError("--measure streaming: expected a mode besides first_key_masked, which hides what is kept")
        check_cache(longest, _cache(arguments, subject, probe), arguments.kept, subject.strategy)
    if arguments.change is not None:
        _changed_prompt(subject, arguments)


def _check_bos(subject: Subject, modes: Sequence[InferenceMode]) -> None:
    if subject.bos_id is None and "bos" in modes:
        raise ValueError(
            f"{subject.name}: its tokenizer has no BOS, which the mode bos puts first; name a token with --bos, or "
            "leave the mode out (--modes text)"
        )


def _line(kind: str, mode: str, key: int, result: ModeResult) -> str:
    rate, mass = (result.rate, result.mass) if not key else (result.rate_placed, result.mass_placed)
    assert rate is not None and mass is not None
    heads = [value for row in rate["0.3"] for value in row]
    masses = [value for row in mass for value in row]
    return (
        f"{kind:10}{mode:20}{key:5}{sum(heads) / len(heads):13.2f}{sum(masses) / len(masses):11.3f}"
        f"{result.loss:9.3f}{result.bits_per_byte:11.3f}"
    )
