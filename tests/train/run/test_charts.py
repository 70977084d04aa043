"""What W&B is sent of a point: few charts whatever the depth, everything where that is asked for."""

from collections import Counter

import pytest

from sinkbed.train.measure.measures import measures
from sinkbed.train.measure.sinks import ModeResult
from sinkbed.train.run.charts import Charts, Map
from sinkbed.train.run.wandb import heatmap_image

MODES = ("bos", "text", "first_key_masked")


def points(layers, tokens=1024, modes=MODES):
    """One point of each kind, as callbacks log them, of a model of so many layers with two heads."""
    x = {"step": tokens // 1024, "train/tokens": tokens}
    maps = {eps: [[10.0 * layer, 30.0] for layer in range(layers)] for eps in ("0.2", "0.3", "0.5", "0.8")}
    mass = [[0.1, 0.01 * layer] for layer in range(layers)]
    fields = {"rate": maps, "rate_full": maps, "mass": mass, "mass_full": mass, "alpha": mass}
    result = ModeResult(
        **{name: None for name in ModeResult.__dataclass_fields__} | fields | {"loss": 2.0, "bits_per_byte": 1.0}
    )
    sinks = {k: v for mode in modes for k, v in result.metrics(mode).items()}
    sinks |= {"sink/packed_document_mass": 0.1, "sink/packed_first_key_mass": 0.2}
    states = {
        column.log.format(layer=layer, mode=mode): float(layer)
        for measure in measures("states", "mixing").values()
        for column in measure.columns
        for mode in modes
        for layer in range(layers)
        if column.log and measure.while_training
    }
    names = ("loss", "lr", "accumulated_decay", "grad_norm", "tokens_per_second")
    heat = {f"sink/heatmap/{mode}": mass for mode in modes}
    return [x | sinks | heat, x | states, x | {f"train/{name}": 1.0 for name in names}]


def keys(detail, layers):
    charts = Charts(detail)
    return [key for point in points(layers) for key in charts.row(point)]


@pytest.mark.parametrize("layers", [3, 12, 32])
def test_the_number_of_charts_does_not_grow_with_depth(layers):
    charts = set(keys("layers", layers))
    assert len(charts) == len(set(keys("layers", 3))) <= 60
    sections = Counter(key.split("/")[0] for key in charts)
    assert sections["sink"] == 12 and min(sections) == "sink", "the sink's section is the first"
    assert len(set(keys("headline", layers))) < 30 and not any("maps" in key for key in keys("headline", layers))
    every = {key for point in points(layers) for key, value in point.items() if not isinstance(value, list)}
    assert {key.replace("mixing/", "state/mixing/") for key in every - {"step"}} <= set(keys("all", layers))


def test_the_section_of_the_sink_holds_what_one_looks_for():
    assert {key for key in keys("layers", 3) if key.startswith("sink/")} == {
        *(f"sink/{name}/{mode}" for mode in MODES[:2] for name in ("rate_eps0.3", "mass", "rate_deep_eps0.3")),
        *(f"sink/{name}/{mode}" for mode in MODES[:2] for name in ("strongest_head", "val_loss")),
        *("sink/packed_document_mass", "sink/packed_first_key_mass"),
    }
    row = Charts("layers").row(points(4)[0])
    assert row["sink/rate_deep_eps0.3/bos"] == (20 + 30 + 30 + 30) / 4 and row["sink/strongest_head/bos"] == 0.1
    assert row["sink/val_loss/text"] == row["val/loss/text"] == 2.0
    assert "sink/rate_deep_eps0.3/bos" not in Charts("layers").row(points(2)[0])


def test_a_map_of_layers_grows_by_each_measurement():
    charts = Charts("layers")
    first, second = (charts.row(points(3, tokens)[0])["sink_maps/mass/bos"] for tokens in (1024, 2048))
    assert [len(line) for line in first.values] == [1] * 3 and [len(line) for line in second.values] == [2] * 3
    assert second.values[2] == [pytest.approx(0.06)] * 2 and second.top == pytest.approx(0.06)
    assert "up to 2,048 tokens" in second.caption
    heads = charts.row(points(3)[0])["sink_maps/heads/text"]
    assert isinstance(heads, Map) and heads.values[2] == [0.1, 0.02] and heads.top == 1
    assert "sink_maps/heads/first_key_masked" not in charts.row(points(3)[0])


def test_colours_go_up_to_the_top_of_a_map():
    image = heatmap_image([[0.0, 5.0]], 5.0)
    cell = image.shape[1] // 2
    assert image[0, 0].tolist() == [13, 8, 60] and image[0, cell].tolist() == [252, 255, 164]
    assert (heatmap_image([[0.0]], 0.0) == [13, 8, 60]).all()


def test_a_map_has_a_figure_that_is_not_finite_in_its_own_layer():
    charts = Charts("layers")
    charts.row(
        {"step": 1, "train/tokens": 1, "state/x/layer0/bos": 0.1, "state/x/layer1/bos": None, "state/x/layer2/bos": 0.9}
    )
    row = charts.row({"step": 2, "train/tokens": 2, "state/x/layer0/bos": 0.2, "state/x/layer1/bos": 0.3})
    drawn = row["state/x/bos"] if "state/x/bos" in row else next(v for k, v in row.items() if isinstance(v, Map))
    assert [[None if x != x else x for x in line] for line in drawn.values] == [[0.1, 0.2], [None, 0.3], [0.9, None]]
    assert heatmap_image(drawn.values, drawn.top) is not None
