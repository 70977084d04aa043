"""States and mixing while training: what is logged, when, and that training does not notice."""

import contextlib
import json
import time
from pathlib import Path

import pytest

from sinkbed.data.store.token_store import TokenStore
from sinkbed.train.measure.config import MeasureConfig
from sinkbed.train.measure.excerpts import Excerpts
from sinkbed.train.measure.heldout import Probe
from sinkbed.train.measure.measures import MEASURES
from sinkbed.train.measure.measures.gradients import measure_gradients
from sinkbed.train.measure.measures.jacobian import measure_jacobian
from sinkbed.train.measure.measures.paths import measure_paths
from sinkbed.train.measure.measures.perturbation import measure_perturbation
from sinkbed.train.measure.measures.rank import measure_rank
from sinkbed.train.measure.measures.states import measure_states
from sinkbed.train.run.load import load_decoder, open_run

LIVE = ["--wandb.mode", "disabled", "--measure.state_points", "3", "--measure.mixing_points", "2"]
CONFIG = MeasureConfig(documents=6, live_documents=3, sink_tokens=16, first_step=2, live_points=3)


def points(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_speed(folder):
    return [{k: v for k, v in p.items() if k != "train/tokens_per_second"} for p in points(folder)]


@pytest.fixture
def live(fit):
    status, folder = fit(*LIVE, run_dir="live")
    assert status == 0
    return folder


def test_states_and_mixing_are_logged_at_their_own_steps(live, tiny_store):
    found = points(live)
    states = [p["step"] for p in found if "state/first_token_norm_ratio/layer0/bos" in p]
    mixing = [p["step"] for p in found if "mixing/jacobian/text" in p]
    assert states == CONFIG.steps(10, 3) == [0, 2, 4, 10] and mixing == CONFIG.steps(10, 2) == [0, 2, 10]
    assert all(p["train/tokens"] == p["step"] * 4 * 48 for p in found)
    checkpoint, _ = open_run(live)
    decoder, strategy = load_decoder(checkpoint)
    probe = Probe.from_store(TokenStore.open(tiny_store, "validation"), 48, CONFIG)
    last = [p for p in found if p["step"] == 10 and "mixing/jacobian/bos" in p][-1]
    for mode in ("bos", "text", "first_key_masked"):
        excerpts = Excerpts.of(probe, mode, strategy, 16, 8)
        expected = MEASURES["states"].metrics(measure_states(decoder, excerpts, 4096), mode)
        assert f"state/entropy/layer1/{mode}" in expected
        expected[f"state/gradient_ratio/layer1/{mode}"] = measure_gradients(decoder, excerpts, 4096).ratio[2]
        expected[f"mixing/perturbation/{mode}"] = measure_perturbation(decoder, excerpts, 4096).spread[-1]
        rank = measure_rank(decoder, excerpts, 4096)["rest"]
        expected[f"mixing/rank_distance/layer0/{mode}"] = rank.relative_distance[1]
        expected[f"mixing/paths_from_first_key/{mode}"] = measure_paths(decoder, excerpts, 4096).first[-1]
        few = Excerpts.of(probe, mode, strategy, 16, 2)
        expected[f"mixing/jacobian/{mode}"] = measure_jacobian(decoder, few, 4096, directions=8, most_layers=1).others[
            -1
        ]
        for key, value in expected.items():
            assert last[key] == value, key
    assert last["state/value_norm_ratio/layer1/bos"] > 0


def test_training_does_not_notice(live, fit):
    _, plain = fit("--wandb.mode", "disabled", run_dir="plain")
    measured = [p for p in without_speed(live) if not any(k.startswith(("state/", "mixing/")) for k in p)]
    assert measured == without_speed(plain)


def test_its_time_counts_as_measuring(fit, monkeypatch):
    from sinkbed.train.loop.callbacks import states as state_monitor

    real = state_monitor.StateMonitor._values

    def slow(*arguments):
        time.sleep(0.5)
        return real(*arguments)

    monkeypatch.setattr(state_monitor.StateMonitor, "_values", slow)
    _, folder = fit(*LIVE, "--measure.live_modes", "[bos]", run_dir="slow")
    seconds = json.loads((folder / "measurement.json").read_text())["seconds"]
    assert seconds["measuring_live"] >= 4 * 0.5, "at steps 0, 2, 4 and 10"


def test_a_resumed_run_makes_the_same_points(live, fit):
    whole = without_speed(live)
    step = live / "checkpoints" / "step-0000003.ckpt"
    assert step.is_file()
    (live / "run.json").write_text((live / "run.json").read_text().replace('"finished": true', '"finished": false'))
    status, _ = fit(*LIVE, "--ckpt_path", str(step), run_dir="live")
    assert status == 0 and without_speed(live) == whole


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("state_points", "-1", "measure.state_points: expected at least 0, got -1"),
        ("state_documents", "0", "measure.state_documents: expected at least 1, got 0"),
    ],
)
def test_cadences_without_meaning_are_refused(key, value, message, fit, capsys):
    with contextlib.suppress(SystemExit):
        assert fit(f"--measure.{key}", value)[0] != 0
    assert message in capsys.readouterr().err


def test_the_configs_of_runs_log_them():
    import yaml

    for path in Path("configs/run").glob("*.yaml"):
        assert yaml.safe_load(path.read_text())["measure"]["state_points"] > 0, path
