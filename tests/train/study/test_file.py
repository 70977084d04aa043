"""Study files: sizes, grids, inline settings, expected effects; the studies that are shipped."""

import pytest
import yaml

from sinkbed.data.pack.strategy import Strategy
from sinkbed.kernels.triton.tiles import HEAD_DIMS
from sinkbed.model import Decoder, DecoderConfig
from sinkbed.train.cli.main import main
from sinkbed.train.cli.study import build_parser, chosen
from sinkbed.train.loop.optim import OptimizerConfig
from sinkbed.train.study.arms import check_configs, plan
from sinkbed.train.study.cost import cost
from sinkbed.train.study.file import METRICS, load_study
from tests.support import ROOT

SHIPPED = sorted((ROOT / "configs" / "study").glob("*.yaml"))
SIZES = ("demo", "small", "paper")
EVERY = [(path, size) for path in SHIPPED for size in yaml.safe_load(path.read_text())["sizes"]]


@pytest.fixture
def write(tmp_path):
    """Write a study file from a dict; settings overlays everywhere, so that it needs no other file."""

    def call(**keys):
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump({"title": "T", "base": [{"trainer": {"max_steps": 3}}], **keys}))
        return path

    return call


def test_settings_in_the_file_lie_over_the_base_and_files_beside_them(write, tmp_path):
    (tmp_path / "wide.yaml").write_text("model: {decoder: {d_model: 64, n_heads: 4}}\n")
    arms = {"a": ["wide.yaml", {"model": {"decoder": {"n_heads": 2}}}], "b": {"trainer": {"max_steps": 5}}}
    a, b = plan(load_study(write(arms=arms)))
    ours = {"trainer": {"max_steps": 3}, "model": {"decoder": {"d_model": 64, "n_heads": 2}}}
    assert a.config == {**ours, "threads": 1}, "as many as an arm has cores"
    assert b.config == {"trainer": {"max_steps": 5}, "threads": 1}


def test_a_grid_is_the_product_of_its_axes_after_the_arms(write):
    grid = {"lr": {"1e-3": {"x": 1}, "2e-3": {"x": 2}}, "mask": {"causal": {"y": 1}, "document": [{"y": 2}, {"z": 3}]}}
    runs = plan(load_study(write(arms={"plain": []}, grid=grid)))
    names = ["plain", "lr-1e-3-causal", "lr-1e-3-document", "lr-2e-3-causal", "lr-2e-3-document"]
    assert [r.arm for r in runs] == names
    assert {k: v for k, v in runs[4].config.items() if k in "xyz"} == {"x": 2, "y": 2, "z": 3}
    with pytest.raises(ValueError, match="a name of its own for each arm, got 'axis-1' twice"):
        load_study(write(grid={"axis": {1: {}, "axis-1": {}}}))


def test_some_arms_keep_the_effects_between_them(write, capsys):
    differs = {"metric": "loss", "expected": "up", "arm": "b"}
    effects = [
        {**differs, "name": "of two", "against": "a", "half_width": 0.1},
        {**differs, "name": "of one", "mode": "text", "against_mode": "bos"},
    ]
    path = write(arms={"a": [], "b": [], "c": []}, effects=effects, most_seeds=9)

    def of(*arms):
        study = chosen(build_parser("study").parse_args([str(path), "--arms", *arms]))
        return list(study.arms), [effect.name for effect in study.effects], study.most_seeds

    assert of("b", "a") == (["a", "b"], ["of two", "of one"], 9)
    assert of("b", "c") == (["b", "c"], ["of one"], None)
    assert main(["study", str(path), "--arms", "a", "d"]) == 1
    assert "--arms: expected some of a, b, c; got d" in capsys.readouterr().err


def test_a_size_replaces_keys_of_the_file(write):
    path = write(
        arms={"a": [], "b": []},
        seeds=[7],
        sizes={"small": {"seeds": [1, 2], "gpus": 0.5}, "demo": {"arms": {"c": []}}, "paper": {"out": "elsewhere"}},
    )
    demo, small, paper = load_study(path), load_study(path, "small"), load_study(path, "paper")
    assert (list(demo.arms), demo.seeds, str(demo.out)) == (["c"], [7], "runs/study-demo")
    assert (list(small.arms), small.seeds, small.gpus, str(small.out)) == (["a", "b"], [1, 2], 0.5, "runs/study-small")
    assert str(paper.out) == "elsewhere"
    with pytest.raises(ValueError, match="--size huge: expected one of demo, paper, small"):
        load_study(path, "huge")
    with pytest.raises(ValueError, match="--size demo: expected one of none"):
        load_study(write(arms={"a": []}), "demo")


def test_a_tilde_is_the_home_folder(write, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "overlay.yaml").write_text("threads: 1\n")
    study = load_study(write(out="~/study", arms={"a": ["~/overlay.yaml", {"data": {"store": "~/store"}}]}))
    assert study.out == tmp_path / "study"
    [run] = plan(study)
    assert run.setting("threads") == 1 and run.setting("data.store") == str(tmp_path / "store")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"grid": {"lr": 3}}, "grid.lr: expected a mapping"),
        ({"grid": {"a": {"x/y": {}}}}, "arm 'x/y': expected letters"),
        ({"arms": {"a": [3]}}, "arm a: expected overlays, each a path or settings; got 3"),
        ({"arms": {"a": []}, "sizes": {"demo": {"titel": 1}}}, "unknown key 'titel'"),
        ({"arms": {"a": []}, "gpus": 1.5}, "gpus: expected 0, a share below 1 or a whole number"),
        ({"arms": {"a": []}, "gpus": "all"}, "gpus: expected at least 0, got 'all'"),
        ({"arms": {"a": []}, "gpus": float("nan")}, "gpus: expected at least 0, got nan"),
        ({"arms": {"a": []}, "title": True}, "title: expected text, got True; put it in quotes"),
        ({"arms": {"a": []}, "published": {"a": {"bos": [float("inf"), 1]}}}, "published.a"),
        (
            {"grid": {x: {str(i): {} for i in range(47)} for x in "abc"}},
            "grid: expected at most 1,000 arms, got 103,823",
        ),
        ({"arms": {"a": []}, "effects": [{"name": "E", "arm": "a"}]}, "effect 'E': expected the key 'metric'"),
        ({"arms": {"a": []}, "published": {"a": {"bos": ["x", 1]}}}, "published.a"),
        ({"arms": {"a": []}, "published": {"a": {"boss": [1, 2]}}}, "published.a: expected \\[sink metric, loss"),
        ({"arms": {"a": []}, "published": {"a": [1, 2]}}, "published.a: expected \\[sink metric, loss"),
        ({"arms": {"a": []}, "effects": 5}, "effects: expected a list, got 5"),
    ],
)
def test_a_wrong_key_is_named(write, keys, message):
    with pytest.raises(ValueError, match=message):
        load_study(write(**keys))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metric": "sinks"}, "metric: expected one of sink_rate_0.2"),
        ({"expected": "more"}, "expected: expected one of up, down, none, got 'more'"),
        ({"expected": "none"}, "tolerance: expected more than 0 with expected: none"),
        ({"expected": "none", "tolerance": float("inf")}, "tolerance: expected a finite number, at least 0, got inf"),
        ({"tolerance": "x"}, "tolerance: expected at least 0, got 'x'"),
        ({"tolerance": 1}, "tolerance: expected more than 0 with expected: none, and 0 otherwise"),
        ({"against": "c"}, "expected one of a, b; got 'c'"),
        ({"against": "a"}, "expected another arm or another mode to compare with"),
        ({"agianst": "b"}, "unknown key 'agianst'"),
    ],
)
def test_a_wrong_effect_is_named(write, change, message):
    effect = {"name": "E", "metric": "loss", "arm": "a", "against": "b", "expected": "up"}
    load_study(write(arms={"a": [], "b": []}, effects=[effect]))
    with pytest.raises(ValueError, match=message):
        load_study(write(arms={"a": [], "b": []}, effects=[effect | change]))


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (5, "expected a path, got 5"),
        (False, "expected a path, got False"),
        ([["a.yaml"]], r"expected a path, got \['a.yaml'\]"),
        ("none.yaml", "there is no file"),
        ("unnamed.yaml", r"unnamed.yaml: out: expected a folder, got None"),
        (["a.yaml", "b.yaml"], "expected a token store for each config, got .*b twice"),
    ],
)
def test_what_prepares_no_store_of_its_own_is_refused(write, tmp_path, prepare, message):
    (tmp_path / "a.yaml").write_text("out: stores/b\n")
    (tmp_path / "b.yaml").write_text("out: ./stores/b\n")
    (tmp_path / "unnamed.yaml").write_text("{}\n")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_study(write(arms={"a": [], "b": []}, prepare=prepare))


@pytest.mark.parametrize(("path", "size"), EVERY, ids=[f"{path.stem}-{size}" for path, size in EVERY])
def test_a_shipped_study_has_arms_that_can_be_built(path, size):
    study = load_study(path, size)
    assert len(study.arms) >= 2 and study.effects and study.question and len(study.seeds) >= 3
    for run in plan(study)[: len(study.arms)]:
        decoder = DecoderConfig(**run.setting("model.decoder"))
        assert not study.gpus or decoder.dim in HEAD_DIMS, run.arm
        assert Decoder.parameters_of(decoder, 512) > 0
        OptimizerConfig(**run.setting("model.optimizer"))
        context = run.setting("data.context_length")
        Strategy(**run.setting("data.strategy")).check_context(context)
        assert run.setting("measure.sink_tokens", 64) < context
        modes = run.setting("measure.modes", ["bos", "text", "first_key_masked"])
        for effect in study.effects:
            wanted = {m for arm, m in ((effect.arm, effect.mode), effect.other) if arm == run.arm}
            assert wanted <= set(modes), f"{effect.name}: {wanted} is not among {modes}"
        if size == "paper":
            assert cost(study, run).tokens >= 4.9e9
        assert (study.gpus > 0) == (size in ("small", "paper")) == (run.setting("trainer.accelerator") != "cpu")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
@pytest.mark.slow
def test_the_command_line_takes_a_shipped_study(path):
    study = load_study(path)
    assert check_configs(plan(study)[: len(study.arms)]) == ""


def test_the_shipped_studies_say_what_they_ask_expect_and_cost():
    assert len(SHIPPED) >= 15
    for path in SHIPPED:
        head = path.read_text().split("title:")[0]
        assert all(f"# {word}" in head for word in ("Question", "Source", "Expected", "Cost")), path


def test_the_context_study_holds_the_tokens_of_a_step_constant():
    path = next(p for p in SHIPPED if p.stem == "context")
    for size in SIZES:
        runs = plan(load_study(path, size))
        assert len({r.setting("data.context_length") * r.setting("data.batch_size") for r in runs}) == 1
        assert len({r.setting("data.context_length") for r in runs}) >= 4


def test_the_arms_of_one_width_in_the_heads_study_have_as_many_parameters():
    path = next(p for p in SHIPPED if p.stem == "heads")
    for size in SIZES:
        study = load_study(path, size)
        at_width: dict[int, set[int]] = {}
        for run in plan(study):
            shape = run.setting("model.decoder")
            if shape["n_heads"] * shape["head_dim"] == shape["d_model"]:
                at_width.setdefault(shape["head_dim"], set()).add(cost(study, run).parameters)
        assert len(at_width) >= 3 and len(set.union(*at_width.values())) == 1


def test_every_metric_of_an_effect_has_a_label():
    from sinkbed.train.report.effects import LABELS

    assert set(METRICS) == set(LABELS)
