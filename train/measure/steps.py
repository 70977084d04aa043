"""What `sinkbed probe` measures, each a step that puts its figures into one result as soon as they are known."""

import dataclasses
from collections.abc import Sequence
from typing import Any, get_args

from sinkbed.plain_text import visible
from sinkbed.progress import Steps
from sinkbed.train.measure import perplexity
from sinkbed.train.measure.config import MeasureConfig
from sinkbed.train.measure.excerpts import Excerpts
from sinkbed.train.measure.heldout import Probe
from sinkbed.train.measure.measures import MEASURES, Group, Measure, measures, plain
from sinkbed.train.measure.measures.perturbation import measure_perturbation
from sinkbed.train.measure.measures.states import strongest_head
from sinkbed.train.measure.model import Subject
from sinkbed.train.measure.modes import InferenceMode
from sinkbed.train.measure.sinks import ModeResult, mean
from sinkbed.train.measure.sinks import measure as measure_sinks
from sinkbed.train.measure.texts import artificial, changed_prompt
from sinkbed.train.run import directory


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

    def plan(self, names: set[str]) -> None:
        """Add the steps of these measures."""
        if "sinks" in names:
            self._sinks()
        for group in get_args(Group):
            self._layers(names, group, self.arguments.sink_tokens, self.result)
        for length in sorted(set(self.arguments.lengths)):
            self._layers(names, "mixing", length, {}, str(length))
        if self.arguments.change is not None:
            self._changed_word()
        self._perplexities(names)
        if self.arguments.checkpoints:
            self._along({"states": MEASURES["states"]} | {n: m for n, m in measures("states").items() if n in names})

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
                        measured = measure_sinks(subject.model, probe, mode, subject.strategy, self.config, key=key)
                        if "sinks" not in self.result:
                            tqdm.write(header)
                        of_kind = self.result.setdefault("sinks", {}).setdefault(kind, {})
                        of_kind.setdefault(mode, {})[str(key)] = dataclasses.asdict(measured)
                        tqdm.write(_line(kind, mode, key, measured))

                    of_key = f", key {key}" if key else ""
                    self.steps.add(f"sinks, {kind} input, mode {mode}{of_key}", len(probe.documents), step)

    def _layers(self, names: set[str], group: Group, tokens: int, into: dict[str, Any], length: str = "") -> None:
        """Measure layer by layer at so many tokens; a result of a `length` of its own is in `by_length`."""
        chosen = {name: measure for name, measure in measures(group).items() if name in names}
        for mode in self.modes:
            for name, measure in chosen.items():
                documents = getattr(self.arguments, measure.documents)
                excerpts = Excerpts.of(self.natural, mode, self.subject.strategy, tokens, documents)

                def step(
                    name: str = name, mode: str = mode, measure: Measure = measure, excerpts: Excerpts = excerpts
                ) -> None:
                    result = self._measured(measure, self.subject.model, excerpts)
                    into.setdefault(name, {})[mode] = plain(result)
                    if length:
                        self.result.setdefault("by_length", {})[length] = into
                    if name == "states":
                        self._strongest(mode, excerpts)

                at = f", {length} tokens" if length else ""
                self.steps.add(f"{name}, mode {mode}{at}", len(excerpts.rows), step)

    def _measured(self, measure: Measure, model: Any, excerpts: Excerpts) -> Any:
        options = {option: getattr(self.arguments, option) for option in measure.options}
        return measure.measure(model, excerpts, self.arguments.batch_tokens, **options)

    def _strongest(self, mode: str, excerpts: Excerpts) -> None:
        """Draw the strongest head, the same one in every mode, and put the text of token ids beside them."""
        first = next(iter(self.result.get("map", {}).values()), None)
        head = None if first is None else (first["layer"], first["head"])
        strongest, measured = strongest_head(self.subject.model, excerpts, head=head), self.result["states"][mode]
        for line in (*measured["strongest_token"], *measured["massive"]):
            line["text"] = self._text(line["token"])
        self._keep("map", mode, {**strongest, "text": [self._text(token) for token in strongest["tokens"]]})

    def _keep(self, name: str, mode: str, value: Any) -> None:
        self.result.setdefault(name, {})[mode] = plain(value)

    def _text(self, token: int) -> str:
        subject = self.subject
        special = {subject.bos_id: "⟨bos⟩", subject.eos_id: "⟨eos⟩"} if subject.bos_id != subject.eos_id else {}
        return special.get(token) or visible(subject.decode([token]))

    def _changed_word(self) -> None:
        """The perturbation of the paper's Figure 2: one word of the first prompt in place of another."""
        import torch

        before, after = changed_prompt(self.subject, self.arguments)
        old, new = self.arguments.change
        probe = dataclasses.replace(self.natural, documents=(torch.tensor(before),))
        changed = {"old": old, "new": new, "tokens": before, "text": [self._text(token) for token in before]}
        for mode in self.modes:

            def step(mode: InferenceMode = mode) -> None:
                excerpts = Excerpts.of(probe, mode, self.subject.strategy, len(before), 1)
                perturbation = measure_perturbation(
                    self.subject.model, excerpts, self.arguments.batch_tokens, changed=torch.tensor([after])
                )
                self.result.setdefault("change", {**changed, "modes": {}})["modes"][mode] = plain(perturbation)

            self.steps.add(f"a changed word, mode {mode}", 1, step)

    def _perplexities(self, names: set[str]) -> None:
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
            if "positions" in names:
                self.steps.add(f"loss by position, mode {mode}", documents, by_position)
            if "streaming" in names and mode != "first_key_masked":  # hides what is to be kept
                passes = 1 + len(self.arguments.kept)
                self.steps.add(f"streaming, mode {mode}", passes * documents, streaming)

    def _along(self, followed: dict[str, Measure]) -> None:
        """Sinks, and the figures of some measures, at every checkpoint of the run, oldest first, and the onset."""
        assert self.subject.run_dir is not None
        points: list[dict[str, Any]] = []
        for path in directory.checkpoints(self.subject.run_dir):

            def step(path: Any = path) -> None:
                points.append(self._of_checkpoint(path, followed))
                reached = [i for i, p in enumerate(points) if p["step"] and self._rate(p) >= self.config.onset_rate]
                self.result["checkpoints"] = {
                    "points": points,
                    "onset_tokens": points[reached[0]]["tokens"] if reached else None,
                    "onset_after": points[reached[0] - 1]["tokens"] if reached and reached[0] else None,
                    "onset_rate": self.config.onset_rate,
                    "onset_mode": self.modes[0],
                }

            self.steps.add(f"{path.stem}", 2 * len(self.modes) * len(self.natural.documents), step)

    def _of_checkpoint(self, path: Any, followed: dict[str, Measure]) -> dict[str, Any]:
        from sinkbed.train.run.checkpoint import load_checkpoint
        from sinkbed.train.run.load import load_decoder

        checkpoint = load_checkpoint(path, option="the path")
        decoder, strategy = load_decoder(checkpoint)
        step = checkpoint["global_step"]
        point: dict[str, Any] = {"step": step, "tokens": checkpoint["TokenData"]["tokens"], "modes": {}}
        for mode in self.modes:
            c = self.config
            figures = measure_sinks(decoder, self.natural, mode, strategy, c).metrics(mode)
            for measure in followed.values():
                documents = getattr(self.arguments, measure.documents)
                excerpts = Excerpts.of(self.natural, mode, strategy, c.sink_tokens, documents)
                figures |= measure.metrics(self._measured(measure, decoder, excerpts), mode)
            point["modes"][mode] = figures
        return point

    def _rate(self, point: dict[str, Any]) -> float:
        mode = self.modes[0]
        return float(point["modes"][mode][f"sink/rate_eps0.3/{mode}"])


def cache_size(arguments: Any, subject: Subject, probe: Probe) -> int:
    """Keys of the cache that streaming is measured with."""
    if arguments.cache is not None:
        return int(arguments.cache)
    return min(max(map(len, probe.documents)) // 4, subject.strategy.window or 10**9)


def _line(kind: str, mode: str, key: int, result: ModeResult) -> str:
    rate, mass = (result.rate, result.mass) if not key else (result.rate_placed, result.mass_placed)
    assert rate is not None and mass is not None
    figures = f"{mean(rate['0.3']):13.2f}{mean(mass):11.3f}{result.loss:9.3f}{result.bits_per_byte:11.3f}"
    return f"{kind:10}{mode:20}{key:5}{figures}"
