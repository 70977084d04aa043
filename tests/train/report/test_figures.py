"""Figures: what a page makes of a drawing, curves of few and of many seeds, maps of arms that differ."""

import numpy as np
import pytest

from sinkbed.train.report.figures import Panel, Picture, draw, embedded, heat, line, look, mass_scale, stacked
from sinkbed.train.report.pictures import _curve_panels, _over_time, _series, pictures
from tests.train.report.test_effects import result


def drawn(results, key="sink/rate_eps0.3/{mode}"):
    """The axis of the curves of the first mode."""
    from matplotlib.figure import Figure

    axis = Figure().subplots()
    _curve_panels(results, "a title", key, ["bos"])[0].draw(axis)
    return axis


def test_few_seeds_are_lines_and_many_an_interval():
    few, many, one = (drawn([result("a", s, 30 + s, 3) for s in range(n)]) for n in (3, 4, 1))
    assert [len(axis.lines) for axis in (few, many, one)] == [3 + 1, 1, 1]
    assert [len(axis.collections) for axis in (few, many, one)] == [0, 1, 0]
    np.testing.assert_allclose(few.lines[-1].get_ydata(), [31 * s / 3 for s in range(4)])
    assert few.get_xscale() == "symlog" and few.lines[-1].get_marker() == "o"


def test_a_mean_is_over_layers_and_at_the_tokens_that_every_seed_has():
    first, second = result("a", 0, 30, 3), result("a", 1, 60, 3)
    del second.points[1]
    np.testing.assert_allclose(drawn([first, second]).lines[-1].get_ydata(), [0, 30, 45])
    first.final["modes"]["bos"]["mass"] = [[0.1], [0.2]]
    first.points[0] |= {"state/x/layer0/bos": 1.0, "state/x/layer1/bos": 4.0}
    assert _series([first], "state/x/layer{layer}/{mode}", "bos") == {"a": [{1: 2.5}]}


def test_a_page_names_and_hides_series_and_takes_its_own_colours():
    def lines(axis):
        line(axis, [1, 2], [3, 4], "a <b> $1", look(0))
        line(axis, [1, 2], [4, 4], "ink", look(7))

    drawing = draw(Picture("name", "A picture", "", [Panel("a panel", lines), Panel("another", lambda _: None)]))
    svg, other = embedded(drawing)
    series = drawing.series
    assert "another" in other and 'class="series"' not in other, "each panel has its own parts alone"
    assert svg.startswith('<svg role="img" aria-label="A picture: a panel"') and "<metadata" not in svg
    assert 'data-series="a &lt;b&gt; $1"><title>a &lt;b&gt; $1</title>' in svg
    assert list(series) == ["a <b> $1", "ink"] and series["a <b> $1"] == ("#0072B2", "●")
    assert "currentColor" in svg and "#1b1f24" not in svg and 'id="figure' not in svg


def test_figures_are_files_of_the_same_bytes_each_time():
    picture = Picture("name", "", "", [Panel("a panel", lambda axis: axis.plot([1, 2])), Panel("b", lambda _: None)])
    both = [draw(picture, ("svg", "pdf", "png")).files for _ in range(2)]
    assert both[0] == both[1] and list(both[0]) == ["name.svg", "name.pdf", "name.png"]
    assert both[0]["name.pdf"][:5] == b"%PDF-" and both[0]["name.png"][1:4] == b"PNG"


def test_sixty_four_series_look_different():
    assert len({look(n) for n in range(64)}) == 64


def test_maps_of_other_shapes_stand_under_each_other():
    values, middles = stacked({"wide": [[1, 2, 3]], "deep": [[4], [5]]})
    np.testing.assert_array_equal(values, [[1, 2, 3], [np.nan] * 3, [4, np.nan, np.nan], [5, np.nan, np.nan]])
    assert middles == [0, 2.5]
    assert [mass_scale([[[x]]]) for x in (0.0, 0.3, 0.31, 1.2)] == pytest.approx([0.1, 0.3, 0.4, 1.0])


def test_a_map_is_of_the_arms_that_were_measured_in_its_mode():
    from matplotlib.figure import Figure

    both, text = result("both", 0, 30, 3), result("text alone", 0, 30, 3)
    del text.final["modes"]["bos"]
    [maps] = [picture for picture in pictures([both, text], [both, text]) if picture.name == "heatmaps"]
    rows = []
    for panel in maps.panels:
        axis = Figure().subplots()
        panel.draw(axis)
        rows.append([label.get_text() for label in axis.get_yticklabels()])
    assert rows == [["both"], ["both", "text alone"]]


def test_a_map_over_time_holds_the_last_measurement_before():
    maps = {0: [[0.0, 0.2]], 100: [[0.4, 0.6]], 200: [[0.8, 1.0]]}
    np.testing.assert_allclose(_over_time(maps, np.array([50, 100, 150, 400])), [[0.1, 0.5, 0.5, 0.9]])


def test_maps_have_axes_and_a_scale():
    from matplotlib.figure import Figure

    figure = Figure()
    heat(figure.subplots(), [[0.5]], "sink mass", 1.0)
    assert [axis.get_ylabel() for axis in figure.axes] == ["", "sink mass"]


def test_a_run_that_has_just_begun_is_a_line_of_its_own_beside_the_mean_of_the_others():
    begun = result("a", 4, 60, 3)
    del begun.points[1:]
    axis = drawn([*(result("a", s, 30 + s, 3) for s in range(4)), begun])
    assert [len(line.get_ydata()) for line in axis.lines] == [1, 4] and len(axis.collections) == 1
    np.testing.assert_allclose(axis.lines[-1].get_ydata(), [31.5 * s / 3 for s in range(4)])
