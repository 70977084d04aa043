"""What `sinkbed probe` measures, each a step that puts its figures into one result as soon as they are known."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sinkbed.plain_text import visible
from sinkbed.progress import Steps
from sinkbed.train.measure import jacobian, mixing, perplexity, states
from sinkbed.train.measure.config import MeasureConfig
from sinkbed.train.measure.heldout import Probe
from sinkbed.train.measure.model import Subject, artificial, changed_prompt
from sinkbed.train.measure.modes import InferenceMode
from sinkbed.train.measure.sinks import ModeResult, measure
from sinkbed.train.run import directory

if TYPE_CHECKING:
    from collections.abc import Callable


class Measurement:
    """The steps of one probe and their result."""

    def __init__(
        self,
        subject: Subject,
        natural: Probe,
        modes: Sequence[InferenceMode],
        config: MeasureConfig,
        arguments: Any,
    ) -> None:
        self.subject, self.natural, self.modes, self.config, self.arguments = subject, natural, modes, config, arguments
        self.result: dict[str, Any] = {}
        """measure -> mode -> its figures. `sinks`: input -> mode -> key; `by_length`: length -> measure -> mode."""
        self.steps = Steps()

    def plan(self, measures: set[str]) -> None:
        """Add the steps of these measures."""
        if "sinks" in measures:
            self._sinks()
        self._states(measures)
        self._mixing(measures, self.arguments.sink_tokens, self.result)
        for length in sorted(set(self.arguments.lengths)):
            of_length: dict[str, Any] = {}
            self._mixing(measures, length, of_length, ("by_length", str(length)))
        if self.arguments.change is not None:
            self._changed_word()
        self._perplexities(measures)
        if self.arguments.checkpoints:
            self._along()

    def _sinks(self) -> None:
        header = f"{'input':10}{'mode':20}{'key':>5}{'sink rate %':>13}{'sink mass':>11}{'loss':>9}{'bits/byte':>11}"
        for kind in self.arguments.inputs:
            probe = self.natural if kind == "natural" else artificial(self.natural, kind)
            for mode in self.modes:
                for key in self.arguments.keys:

                    def step(
                        kind: str = kind, mode: InferenceMode = mode, key: int = key, probe: Probe = probe
                    ) -> None:
                        from tqdm import tqdm

                        subject = self.subject
                        measured = measure(subject.model, probe, mode, subject.strategy, self.config, key=key)
                        if "sinks" not in self.result:
                            tqdm.write(header)
                        of_kind = self.result.setdefault("sinks", {}).setdefault(kind, {})
                        of_kind.setdefault(mode, {})[str(key)] = dataclasses.asdict(measured)
                        tqdm.write(_line(kind, mode, key, measured))

                    of_key = f", key {key}" if key else ""
                    self.steps.add(f"sinks, {kind} input, mode {mode}{of_key}", len(probe.documents), step)

    def _excerpts(self, mode: InferenceMode, tokens: int, documents: int) -> states.Excerpts:
        return states.Excerpts.of(self.natural, mode, self.subject.strategy, tokens, documents)

    def _states(self, measures: set[str]) -> None:
        size = self.arguments.batch_tokens
        for mode in self.modes:
            excerpts = self._excerpts(mode, self.arguments.sink_tokens, self.arguments.mixing_documents)

            def of_states(mode: InferenceMode = mode, excerpts: states.Excerpts = excerpts) -> None:
                self._keep("states", mode, states.measure_states(self.subject.model, excerpts, size))
                first = next(iter(self.result.get("map", {}).values()), None)  # the head of the first mode
                head = None if first is None else (first["layer"], first["head"])
                self._keep("map", mode, states.strongest_head(self.subject.model, excerpts, head=head))
                self._name_tokens(mode)

            def of_gradients(mode: InferenceMode = mode, excerpts: states.Excerpts = excerpts) -> None:
                self._keep("gradients", mode, states.measure_gradients(self.subject.model, excerpts, size))

            for name, step in (("states", of_states), ("gradients", of_gradients)):
                if name in measures:
                    self.steps.add(f"{name}, mode {mode}", len(excerpts.rows), step)

    def _keep(self, name: str, mode: str, value: Any) -> None:
        self.result.setdefault(name, {})[mode] = _plain(value)

    def _name_tokens(self, mode: str) -> None:
        """Put the text of token ids beside them."""
        measured, strongest = self.result["states"][mode], self.result["map"][mode]
        for line in (*measured["strongest_token"], *measured["massive"]):
            line["text"] = self._text(line["token"])
        strongest["text"] = [self._text(token) for token in strongest["tokens"]]

    def _text(self, token: int) -> str:
        subject = self.subject
        special = {subject.bos_id: "⟨bos⟩", subject.eos_id: "⟨eos⟩"} if subject.bos_id != subject.eos_id else {}
        return special.get(token) or visible(subject.decode([token]))

    def _mixing(
        self, measures: set[str], tokens: int, into: dict[str, Any], place: tuple[str, str] | None = None
    ) -> None:
        """Put the mixing at so many tokens into a result, and that in `place` once it holds something."""
        a, model, size = self.arguments, lambda: self.subject.model, self.arguments.batch_tokens
        directions = None if a.directions == "exact" else int(a.directions)
        calls: dict[str, Callable[[states.Excerpts], Any]] = {
            "perturbation": lambda e: mixing.measure_perturbation(model(), e, size),
            "rank": lambda e: mixing.measure_rank(model(), e, size),
            "paths": lambda e: mixing.measure_paths(model(), e, size),
            "jacobian": lambda e: jacobian.measure_jacobian(model(), e, size, directions=directions),
        }
        for mode in self.modes:
            for name, call in calls.items():
                if name not in measures:
                    continue
                few = a.jacobian_documents if name == "jacobian" else a.mixing_documents
                excerpts = self._excerpts(mode, tokens, few)

                def step(
                    name: str = name,
                    mode: str = mode,
                    call: Callable[[states.Excerpts], Any] = call,
                    excerpts: states.Excerpts = excerpts,
                ) -> None:
                    into.setdefault(name, {})[mode] = _plain(call(excerpts))
                    if place is not None:
                        self.result.setdefault(place[0], {})[place[1]] = into

                self.steps.add(f"{name}, mode {mode}, {tokens} tokens", len(excerpts.rows), step)

    def _changed_word(self) -> None:
        """The perturbation of the paper's Figure 2: one word of the first prompt in place of another."""
        import torch

        before, after = changed_prompt(self.subject, self.arguments)
        old, new = self.arguments.change
        probe = dataclasses.replace(self.natural, documents=(torch.tensor(before),))
        changed = {"old": old, "new": new, "tokens": before, "text": [self._text(token) for token in before]}
        for mode in self.modes:

            def step(mode: InferenceMode = mode) -> None:
                excerpts = states.Excerpts.of(probe, mode, self.subject.strategy, len(before), 1)
                perturbation = mixing.measure_perturbation(
                    self.subject.model, excerpts, self.arguments.batch_tokens, changed=torch.tensor([after])
                )
                self.result.setdefault("change", {**changed, "modes": {}})["modes"][mode] = _plain(perturbation)

            self.steps.add(f"a changed word, mode {mode}", 1, step)

    def _perplexities(self, measures: set[str]) -> None:
        subject, natural, size = self.subject, self.natural, self.arguments.batch_tokens
        cache = cache_size(self.arguments, subject, natural)
        for mode in self.modes:

            def by_position(mode: InferenceMode = mode) -> None:
                spans = perplexity.by_position(subject.model, natural, mode, subject.strategy, size)
                self._keep("positions", mode, spans)

            def streaming(mode: InferenceMode = mode) -> None:
                lines = perplexity.streaming(
                    subject.model, natural, mode, subject.strategy, size, cache=cache, kept=self.arguments.kept
                )
                self._keep("streaming", mode, lines)

            documents = len(natural.documents)
            if "positions" in measures:
                self.steps.add(f"loss by position, mode {mode}", documents, by_position)
            if "streaming" in measures and mode != "first_key_masked":  # hides what is to be kept
                passes = 1 + len(self.arguments.kept)
                self.steps.add(f"streaming, mode {mode}", passes * documents, streaming)

    def _along(self) -> None:
        """Sinks and norms at every checkpoint of the run, oldest first, and the onset."""
        assert self.subject.run_dir is not None
        points: list[dict[str, Any]] = []
        for path in directory.checkpoints(self.subject.run_dir):

            def step(path: Any = path) -> None:
                points.append(self._of_checkpoint(path))
                reached = [i for i, p in enumerate(points) if p["step"] and self._rate(p) >= self.config.onset_rate]
                self.result["checkpoints"] = {
                    "points": points,
                    "onset_tokens": points[reached[0]]["tokens"] if reached else None,
                    "onset_after": points[reached[0] - 1]["tokens"] if reached and reached[0] else 0,
                    "onset_rate": self.config.onset_rate,
                    "onset_mode": self.modes[0],
                }

            self.steps.add(f"{path.stem}", 2 * len(self.modes) * len(self.natural.documents), step)

    def _of_checkpoint(self, path: Any) -> dict[str, Any]:
        from sinkbed.train.run.checkpoint import load_checkpoint
        from sinkbed.train.run.load import load_decoder

        checkpoint = load_checkpoint(path, option="the path")
        decoder, strategy = load_decoder(checkpoint)
        identity, step = checkpoint["sinkbed"], checkpoint["global_step"]
        tokens = step * identity["batch_size"] * identity["context_length"]
        point: dict[str, Any] = {"step": step, "tokens": tokens, "modes": {}}
        for mode in self.modes:
            c = self.config
            excerpts = states.Excerpts.of(self.natural, mode, strategy, c.sink_tokens, c.documents)
            measured = states.measure_states(decoder, excerpts, c.batch_tokens)
            sinks = measure(decoder, self.natural, mode, strategy, c)
            point["modes"][mode] = sinks.metrics(mode) | measured.metrics(mode)
        return point

    def _rate(self, point: dict[str, Any]) -> float:
        mode = self.modes[0]
        return float(point["modes"][mode][f"sink/rate_eps0.3/{mode}"])


def cache_size(arguments: Any, subject: Subject, probe: Probe) -> int:
    """Keys of the cache that streaming is measured with."""
    if arguments.cache is not None:
        return int(arguments.cache)
    return min(max(map(len, probe.documents)) // 4, subject.strategy.window or 10**9)


def _plain(value: Any) -> Any:
    """A result as JSON has it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, dict):
        return {key: _plain(inside) for key, inside in value.items()}
    return [_plain(inside) for inside in value] if isinstance(value, list) else value


def _line(kind: str, mode: str, key: int, result: ModeResult) -> str:
    rate, mass = (result.rate, result.mass) if not key else (result.rate_placed, result.mass_placed)
    assert rate is not None and mass is not None
    heads = [value for row in rate["0.3"] for value in row]
    masses = [value for row in mass for value in row]
    return (
        f"{kind:10}{mode:20}{key:5}{sum(heads) / len(heads):13.2f}{sum(masses) / len(masses):11.3f}"
        f"{result.loss:9.3f}{result.bits_per_byte:11.3f}"
    )
