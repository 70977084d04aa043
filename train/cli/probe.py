"""`sinkbed probe`: sinks, states and mixing of any causal language model, with the code that measures during training.

What is measured is chosen by --measure; `sinks` alone is the default, as the others take more passes over the text.
Several models are measured one after the other and put side by side.
"""

import argparse
import gc
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from sinkbed.data.files import write_json
from sinkbed.plain_text import counted
from sinkbed.progress import loading
from sinkbed.ranges import check_number
from sinkbed.train.config.arguments import PlainParser
from sinkbed.train.measure.config import MeasureConfig
from sinkbed.train.measure.heldout import Probe
from sinkbed.train.measure.measures import MEASURES, measures
from sinkbed.train.measure.model import Subject, has_own_text, load
from sinkbed.train.measure.models import lazy, shared_texts, short_names
from sinkbed.train.measure.modes import MODE_LABELS, InferenceMode, check_modes
from sinkbed.train.measure.texts import changed_prompt, check_text, probe_of, texts

Input = Literal["natural", "random", "repeated"]
OTHERS = ("sinks", "positions", "streaming")
"""What is measured of a whole model; the measures of its layers are `MEASURES`."""


def run(command: str, argv: Sequence[str]) -> int:
    """Parse, measure, print tables, write what was asked for."""
    parser = PlainParser(prog=f"sinkbed {command}", description=(__doc__ or "").split("\n")[0])
    model = "run, checkpoint (nanoGPT's, litgpt's too), Hugging Face folder or hub name"
    parser.add_argument("model", nargs="+", help=model)
    text = parser.add_argument_group("text")
    text.add_argument("--prompts", type=Path, help="a JSONL file (column text), or a document a line")
    text.add_argument("--store", type=Path, help="validation split of this token store (default: a run's own)")
    text.add_argument("--documents", type=int, default=100)
    text.add_argument("--length", type=int, help="tokens of a document at most (default: the context, 512 at most)")
    text.add_argument("--inputs", nargs="+", choices=get_args(Input), default=["natural"], help="what is read (sinks)")
    inputs = list(MODE_LABELS)
    text.add_argument("--modes", nargs="+", choices=inputs, help="inference modes (default: the first three)")
    text.add_argument("--bos", help="token that serves as BOS (default: the tokenizer's)")
    what = parser.add_argument_group("what is measured")
    what.add_argument("--measure", nargs="+", choices=[*OTHERS, *MEASURES.names, "all"], default=["sinks"])
    what.add_argument("--sink_tokens", type=int, default=64, help="T of the sink rate, tokens of states and mixing")
    what.add_argument("--keys", type=int, nargs="+", default=[0], help="row positions k whose sink rate is wanted")
    what.add_argument("--mixing_documents", type=int, default=16, help="documents of states and mixing")
    what.add_argument("--lengths", type=int, nargs="+", default=[], help="mixing at these numbers of tokens too")
    what.add_argument("--change", nargs=2, metavar=("OLD", "NEW"), help="perturbation: this word in the first prompt")
    what.add_argument("--directions", type=_directions, default=16, help="jacobian: directions a document, or exact")
    what.add_argument("--jacobian_documents", type=int, default=8, help="documents of the jacobian")
    what.add_argument("--vocabulary", type=int, default=512, help="vocabulary: tokens that are put at position 0")
    what.add_argument("--cache", type=int, help="streaming: keys (default: a quarter of the longest document)")
    what.add_argument("--kept", type=int, nargs="+", default=[0, 1, 2, 4], help="streaming: first keys kept")
    what.add_argument("--checkpoints", action="store_true", help="also along all checkpoints of a run")
    hub = parser.add_argument_group("Hugging Face models")
    hub.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    hub.add_argument("--device_map", help="such as auto: layers over several devices, or partly on disk")
    hub.add_argument("--revision", help="commit, tag or branch")
    hub.add_argument("--gguf", help="weights in this GGUF file of the folder or repository")
    hub.add_argument("--tokenizer", type=Path, help="a tokenizer.json, its folder, or a meta.pkl (default: its own)")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--batch_tokens", type=int, default=2_048, help="tokens of a forward pass, padding included")
    parser.add_argument("--json", type=Path, help="write every figure, per layer and head, to this file")
    parser.add_argument("--out", type=Path, help="write a report to this folder: HTML page, figures, CSV, JSON")
    parser.add_argument("--force", action="store_true", help="replace the report of an earlier probe in --out")
    parser.add_argument("--wandb", action="store_true", help="log figures and numbers to the run's W&B page")
    arguments = parser.parse_args(list(argv))

    labels = short_names(arguments.model)
    models = [argparse.Namespace(**{**vars(arguments), "model": model}) for model in arguments.model]
    _check_options(arguments)
    # First: a path that is none is answered before torch is imported. A list, so that every model is checked.
    check_text(arguments, own=any([has_own_text(each) for each in models]))
    with loading("torch"):
        from sinkbed.train.loop.cpu import use_cpu
        from sinkbed.train.report import model as probe_report

    if arguments.out is not None:
        probe_report.check_out(arguments.out, arguments.force)
    if arguments.json is not None:
        if arguments.json.is_dir():
            raise ValueError(f"--json {arguments.json}: expected a file, got a folder")
        probe_report.check_writable("--json", arguments.json)
    use_cpu(arguments.threads)
    modes = check_modes(arguments.modes or inputs[:3])
    names = {*OTHERS, *MEASURES.names} if "all" in arguments.measure else set(arguments.measure)
    config = MeasureConfig(
        documents=arguments.documents,
        live_documents=1,
        sink_tokens=arguments.sink_tokens,
        batch_tokens=arguments.batch_tokens,
    )
    _check_arguments(arguments, names)
    if len(models) > 1:
        names.add("sinks")  # by which they are compared
    jobs = dict(zip(labels, _jobs(models, modes, names, config), strict=True))
    with probe_report.claimed(arguments.out, arguments.force):
        if len(jobs) > 1:
            return _side_by_side(jobs)
        [job] = jobs.values()
        _measure(job, partial(_write, out=arguments.out, path=arguments.json))
    return 0


class _Job(NamedTuple):
    """A model that passed the checks, and what to measure of it."""

    arguments: Any
    subject: Subject
    natural: Probe
    limit: int
    modes: Sequence[InferenceMode]
    names: set[str]
    config: MeasureConfig


def _jobs(models: Sequence[Any], modes: Sequence[InferenceMode], names: set[str], config: MeasureConfig) -> list[_Job]:
    """Check all models, and the text that each is to read."""
    subjects = [load(each) if len(models) == 1 else lazy(each) for each in models]
    for subject, arguments in zip(subjects, models, strict=True):
        _check_subject(subject, arguments)
    limit = models[0].length or min(512, *(subject.context_length or 512 for subject in subjects))
    shared = shared_texts(models[0], subjects, config) if len(models) > 1 else None
    jobs = []
    for subject, arguments in zip(subjects, models, strict=True):
        natural = probe_of(subject, texts(arguments, subject) if shared is None else iter(shared), limit, config)
        own = modes
        if arguments.modes is None and subject.bos_id is None:
            print(f"{subject.name}: the mode bos is left out: its tokenizer has no BOS (--bos names a token for it)")
            own = tuple(mode for mode in modes if mode != "bos")
        subject.check_bos(own)
        _check_lengths(subject, natural, limit, own, names, arguments)
        jobs.append(_Job(arguments, subject, natural, limit, own, names, config))
    return jobs


def _measure(job: _Job, keep: Callable[[dict[str, Any]], None]) -> None:
    """Measure a model. `keep` is given the result; where measuring fails, what came before."""
    from sinkbed.train.measure.steps import Measurement
    from sinkbed.train.report.model import log_to_wandb

    arguments, subject, natural, limit, modes, names, config = job
    print(f"{subject.name}: {counted(len(natural.documents), 'document')}, T = {config.sink_tokens}, eps 0.3")
    longest = max([limit, *(n + 1 for n in arguments.lengths)])
    if subject.context_length is not None and longest > subject.context_length:
        print(f"tokens past the context of {subject.context_length} that it was trained with are read, too")
    arguments.modes = list(modes)
    about: dict[str, Any] = {
        "model": subject.name,
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(arguments).items()},
        "documents": len(natural.documents),
        "versions": {name: metadata.version(name) for name in ("sinkbed", "torch")},
    }
    measurement = Measurement(subject, natural, modes, config, arguments)
    measurement.plan(names)
    try:
        measurement.steps.run()
    except (Exception, KeyboardInterrupt) as error:
        if measurement.result:
            why = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error)
            print(f"what was measured before is kept ({why})", file=sys.stderr)
            keep({**about, "incomplete": why, **measurement.result})
        raise
    result = {**about, **measurement.result}
    keep(result)
    if arguments.wandb:
        assert subject.run_dir is not None
        print(log_to_wandb(result, subject.run_dir, subject.step))


def _side_by_side(jobs: dict[str, _Job]) -> int:
    """Measure models one after the other, each taken out of `jobs` with its weights; one that fails leaves the others
    alone, and is named on their page."""
    from sinkbed.train.cli.main import explain, explained
    from sinkbed.train.report import models as report

    arguments, folders = next(iter(jobs.values())).arguments, report.folders(jobs)
    out, path = arguments.out, arguments.json
    results: dict[str, dict[str, Any]] = {}
    missing = dict.fromkeys(jobs, "not measured yet")

    def write() -> None:
        if path is not None:
            write_json(path, {"models": results, "missing": missing}, seal=False)
        if out is not None:
            report.write(results, missing, folders, out)

    def keep(label: str, result: dict[str, Any]) -> None:
        results[label] = result
        if "incomplete" in result:
            missing[label] = result["incomplete"]
        else:
            del missing[label]
        write()
        _write(result, out and out / folders[label])

    for label in folders:
        try:
            _measure(jobs.pop(label), partial(keep, label))
        except BrokenPipeError:  # the reader of our output is gone; the model is not at fault
            raise
        except Exception as error:
            if not explained(error):
                traceback.print_exception(error)
            missing[label] = explain(error)
            print(f"sinkbed probe: {label}: {missing[label]}", file=sys.stderr)
            if results:
                write()
        gc.collect()  # its weights, before those of the next are read
    if results:
        report.table(results).print()
    if results and out is not None:
        print(f"report: {out / 'index.html'}, of {counted(len(results), 'model')}; a folder each beside it")
    return bool(missing)


def _write(result: dict[str, Any], out: Path | None, path: Path | None = None) -> None:
    """Write a report to the folder `out`, or print its tables where there is none; and the result as JSON to `path`."""
    from sinkbed.train.report import model as probe_report
    from sinkbed.train.report.model_tables import tables

    if path is not None:
        write_json(path, result, seal=False)
    if out is None:
        for table in tables(result):
            if table.name != "sinks":  # which was printed line by line
                table.print(180)
    else:
        page = probe_report.write(result, out)
        print(f"report: {page}, {counted(len(tables(result)), 'table')} and figures; beside it: probe.json, *.csv, …")


def _check_options(arguments: Any) -> None:
    """Refuse options of one model where there are several."""
    models = len(arguments.model)
    for name in ("gguf", "revision", "tokenizer") if models > 1 else ():
        if getattr(arguments, name) is not None:
            remedy = "name the FILE.gguf itself" if name == "gguf" else "measure that model alone"
            raise ValueError(f"--{name}: expected one model, got {models}; {remedy}")


def _directions(text: str) -> int | str:
    if text == "exact" or (text.isdigit() and int(text) > 3):
        return text if text == "exact" else int(text)
    raise argparse.ArgumentTypeError(f"expected exact, or a number of at least 4, got {text!r}")


def _check_arguments(arguments: Any, names: set[str]) -> None:
    for key in arguments.keys:
        if not 0 <= key < arguments.sink_tokens - 1:
            raise ValueError(
                f"--keys: expected 0 to {arguments.sink_tokens - 2}, got {key}, so that a later query among the first "
                f"--sink_tokens {arguments.sink_tokens} can look at it; give another key, or raise --sink_tokens"
            )
    at_least_one = ("mixing_documents", "jacobian_documents", "batch_tokens", "documents", "vocabulary", "cache")
    for name in (*at_least_one, "length"):
        if getattr(arguments, name) is not None:
            check_number(f"--{name}", getattr(arguments, name), least=2 if name == "length" else 1)
    for length in arguments.lengths:
        check_number("--lengths", length, least=8)
    if arguments.lengths and not names & measures("mixing").keys():
        raise ValueError(
            f"--lengths: expected a --measure that it applies to ({', '.join(measures('mixing'))}), got none"
        )
    if names.difference(OTHERS) and arguments.sink_tokens < 8:
        raise ValueError(f"--sink_tokens: expected at least 8 for states and mixing, got {arguments.sink_tokens}")
    if arguments.change is not None and arguments.prompts is None:
        raise ValueError("--change: expected --prompts, whose first text holds the word, got none")


def _check_subject(subject: Subject, arguments: Any) -> None:
    """Refuse what this model cannot be asked for."""
    prefix = subject.strategy.prefix_lm
    if prefix and any(arguments.keys):
        raise ValueError(
            f"--keys: expected 0 for a prefix LM (strategy.prefix_lm={prefix}), where only the first key is measured, "
            f"got {max(arguments.keys)}; leave --keys out"
        )
    length = max([arguments.length or 0, *(n + 1 for n in arguments.lengths)])
    if subject.longest is not None and length > subject.longest:
        raise ValueError(
            f"--length: expected at most {subject.longest}, the max_position_embeddings of {subject.name}, got "
            f"{length}; lower it, or where the model computes its positions, raise that in a copy of its "
            "config.json"
        )
    for name in ("checkpoints", "wandb"):
        if getattr(arguments, name) and subject.run_dir is None:
            raise ValueError(f"--{name}: expected a run of ours, got {subject.name}; leave --{name} out")


def _check_lengths(
    subject: Subject, probe: Probe, limit: int, modes: Sequence[str], names: set[str], arguments: Any
) -> None:
    """Refuse, before anything is measured, what the documents are too short for."""
    from sinkbed.train.measure.perplexity import check_cache
    from sinkbed.train.measure.steps import cache_size

    longest = max(map(len, probe.documents))
    if arguments.lengths and max(arguments.lengths) > longest:
        raise ValueError(
            f"--lengths: expected at most {longest}, the tokens of the longest document (cropped to --length {limit} "
            f"with room for BOS), got {max(arguments.lengths)}; give longer ones, or lower it"
        )
    if "constancy" in names and min(arguments.mixing_documents, len(probe.documents)) < 2:
        raise ValueError("--measure constancy: expected at least two documents to compare, got one")
    if "streaming" in names:
        if not any(mode != "first_key_masked" for mode in modes):
            raise ValueError("--measure streaming: expected a mode besides first_key_masked, which hides what is kept")
        check_cache(longest, cache_size(arguments, subject, probe), arguments.kept, subject.strategy)
    if arguments.change is not None:
        changed_prompt(subject, arguments)
