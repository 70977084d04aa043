"""`sinkbed validate`: measure a checkpoint of a run on its probe set, with the code that measures live."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sinkbed.data.files import write_json
from sinkbed.plain_text import counted
from sinkbed.train.config.arguments import PlainParser
from sinkbed.train.config.yaml_files import read_mapping
from sinkbed.train.measure.model import of_run
from sinkbed.train.measure.modes import MODE_LABELS, InferenceMode, check_modes
from sinkbed.train.run import directory
from sinkbed.train.run.load import find_run


def run(command: str, argv: Sequence[str]) -> int:
    """Parse, measure, print a table."""
    parser = PlainParser(prog=f"sinkbed {command}", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run", type=Path, help="run directory, or a checkpoint inside one")
    parser.add_argument("--modes", nargs="+", choices=list(MODE_LABELS), help="inference modes (default: the run's)")
    parser.add_argument("--documents", type=int, help="documents of the probe set (default: the run's)")
    parser.add_argument("--store", type=Path, help="token store (default: the run's)")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--json", type=Path, help="also write every figure, per layer and head, to this file")
    arguments = parser.parse_args(list(argv))

    find_run(arguments.run)  # what is none is answered before torch is imported
    from sinkbed.train.loop.cpu import use_cpu

    use_cpu(arguments.threads)
    subject = of_run(arguments.run, arguments.store)
    assert subject.run_dir is not None and subject.store is not None and subject.context_length is not None
    from sinkbed.data.store.token_store import TokenStore
    from sinkbed.progress import Steps
    from sinkbed.train.measure.config import MeasureConfig
    from sinkbed.train.measure.heldout import Probe
    from sinkbed.train.measure.sinks import ModeResult, measure, measurement_table

    config = read_mapping(subject.run_dir / directory.CONFIG)
    settings: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in config["measure"].items()}
    if arguments.documents is not None:
        settings |= {"documents": arguments.documents, "live_documents": 1}
    if arguments.modes is not None:
        settings |= {"modes": check_modes(arguments.modes)}
    measuring = MeasureConfig(**settings)
    store = TokenStore.open(subject.store, "validation")
    store.verify()
    probe = Probe.from_store(store, subject.context_length, measuring)
    results: dict[InferenceMode, ModeResult] = {}
    steps = Steps()
    for mode in measuring.modes:

        def step(mode: InferenceMode = mode) -> None:
            results[mode] = measure(subject.model, probe, mode, subject.strategy, measuring)

        steps.add(f"sinks, mode {mode}", len(probe.documents), step)
    steps.run()
    print(measurement_table(subject.step, results, measuring.sink_tokens))
    if len(probe.documents) < measuring.documents:
        print(
            f"asked for {counted(measuring.documents, 'document')}; the validation split has {len(probe.documents)} of "
            f"at least {measuring.sink_tokens} tokens"
        )
    if arguments.json is not None:
        write_json(arguments.json, {mode: dataclasses.asdict(r) for mode, r in results.items()}, seal=False)
    return 0
