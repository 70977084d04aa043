"""The report's page in a real browser: it loads from disk without errors or network, and its parts work."""

import shutil

import pytest

from sinkbed.train.cli.main import main
from tests.support.runs import write_run_config

playwright = pytest.importorskip("playwright.sync_api")


@pytest.fixture(scope="module")
def page_file(tiny_store, tmp_path_factory):
    """The report of a study of two arms under two seeds, with an expected effect."""
    folder = tmp_path_factory.mktemp("page")
    write_run_config(folder / "run.yaml", tiny_store)
    study = folder / "study.yaml"
    study.write_text(
        f"title: Two arms\nquestion: Which?\nout: {folder / 'out'}\nbase: [run.yaml]\nseeds: [0, 1]\n"
        "arms: {fixed: [], absent: [{data: {strategy: {first_token: none}}}]}\n"
        "effects: [{name: An effect, metric: loss, arm: fixed, against: absent, expected: up, source: nowhere}]\n"
    )
    assert main(["study", str(study), "--quiet"]) == 0
    return folder / "out" / "report" / "index.html"


@pytest.fixture(scope="module")
def browser():
    """Chromium: playwright's own, or the system's."""
    with playwright.sync_playwright() as driver:
        installed = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
        try:
            found = driver.chromium.launch(executable_path=installed, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"no browser: {str(error).splitlines()[0]}")
        yield found
        found.close()


@pytest.fixture(params=[1280, 400], ids=["wide", "narrow"])
def page(request, browser, page_file):
    """The page open in a window of a width, without a network; whatever goes wrong fails the test."""
    found = browser.new_page(viewport={"width": request.param, "height": 900})
    wrong, asked = [], []
    found.on("pageerror", lambda error: wrong.append(str(error)))
    found.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    found.on("request", lambda made: asked.append(made.url))
    found.context.set_offline(True)
    found.goto(page_file.as_uri())
    found.wait_for_function("document.querySelectorAll('.plotly-graph-div .main-svg').length >= 3")
    yield found
    assert wrong == []
    assert [url for url in asked if not url.startswith(("file://", "data:", "blob:"))] == []
    found.close()


def opacity(page, graph):
    """Whether each trace with points is drawn, by arm, in the graph of that number."""
    return page.evaluate(
        "n => Object.fromEntries(document.querySelectorAll('.plotly-graph-div')[n]._fullData.map("
        "(t, i) => [t.name + ' ' + i, t.visible]))",
        graph,
    )


def test_it_fits_the_window_and_can_be_read(page):
    width = page.viewport_size["width"]
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "the page itself does not scroll sideways"
    sizes = page.evaluate(
        "[...document.querySelectorAll('p, td, th, figcaption, h2')].map(e => parseFloat(getComputedStyle(e).fontSize))"
    )
    assert len(sizes) > 50 and min(sizes) >= 12
    hidden = page.evaluate(
        "[...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth + 1 && "
        "getComputedStyle(e).overflowX !== 'auto').length"
    )
    assert hidden == 0, "a table wider than the window scrolls by itself"
    plots = page.evaluate(
        "[...document.querySelectorAll('.plotly-graph-div')].map(e => e.getBoundingClientRect().width)"
    )
    assert len(plots) == 3 and all(0.6 * width <= found <= width for found in plots)


def test_a_legend_entry_hides_and_shows_an_arm_with_its_interval(page):
    before = opacity(page, 0)
    assert len(before) == 6 and set(before.values()) == {True}, "interval, with BOS, text: of two arms"
    entry = page.locator(".plotly-graph-div").nth(0).locator(".legendtoggle").first
    entry.scroll_into_view_if_needed()
    entry.click()
    page.wait_for_timeout(600)  # plotly waits for a second press
    after = opacity(page, 0)
    assert {name.split()[0] for name, shown in after.items() if shown == "legendonly"} == {"fixed"}
    assert sum(shown is True for shown in after.values()) == 3, "the other arm is left as it was"
    entry.click()
    page.wait_for_timeout(600)
    assert opacity(page, 0) == before


def test_the_slider_moves_the_heat_maps_through_training(page):
    maps = "document.querySelectorAll('.plotly-graph-div')[2]"
    last = page.evaluate(f"JSON.stringify([...{maps}._fullData.map(t => t.z)])")
    steps = page.evaluate(f"{maps}._fullLayout.sliders[0].steps.map(s => s.label)")
    assert len(steps) >= 3
    rail = page.locator(".plotly-graph-div").nth(2).locator(".slider-rail-touch-rect")
    rail.scroll_into_view_if_needed()
    box = rail.bounding_box()
    page.mouse.click(box["x"] + 3, box["y"] + box["height"] / 2)
    page.wait_for_function(f"{maps}._fullLayout.sliders[0].active === 0")
    page.wait_for_function(f"last => JSON.stringify([...{maps}._fullData.map(t => t.z)]) !== last", arg=last)


def test_a_press_on_a_header_sorts_its_table(page):
    table = page.locator("table").last
    column = table.locator("th").all_inner_texts().index("loss")
    cells = table.locator(f"tbody tr td:nth-child({column + 1})")
    button = table.locator("th button").nth(column)
    button.scroll_into_view_if_needed()
    button.click()
    down = [float(x) for x in cells.all_inner_texts()]
    assert down == sorted(down, reverse=True) and len(set(down)) > 2
    button.click()
    assert [float(x) for x in cells.all_inner_texts()] == sorted(down)


def test_the_effects_and_differences_are_on_it(page):
    headings = page.locator("h2").all_inner_texts()
    assert headings[:4] == ["Result", "Expected effects", "When the sink forms", "Differences of arms"]
    text = page.locator("main").inner_text()
    assert "An effect" in text and "±" in text and "(1 run)" not in text
