"""The report's page in a real browser: it loads from disk without errors or network, and its parts work."""

import shutil

import pytest

from sinkbed.train.cli.main import main
from tests.support.runs import write_run_config

playwright = pytest.importorskip("playwright.sync_api")


BEYOND = (
    "[...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll, .wide') && "
    "e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"
)
"""What is cut at the right edge."""


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
            chromium = driver.chromium.launch(executable_path=installed, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"no browser: {str(error).splitlines()[0]}")
        yield chromium
        chromium.close()


@pytest.fixture(params=[1280, 400], ids=["wide", "narrow"])
def page(request, browser, page_file):
    """The page in a window of a width, all of it unfolded, without a network; whatever goes wrong fails the test."""
    opened = browser.new_page(viewport={"width": request.param, "height": 900})
    wrong, requested = [], []
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    opened.on("request", lambda made: requested.append(made.url))
    opened.context.set_offline(True)
    opened.goto(page_file.as_uri())
    opened.evaluate("document.querySelectorAll('details').forEach(part => { part.open = true; })")
    opened.wait_for_function("document.querySelectorAll('svg').length >= 9")
    yield opened
    assert wrong == []
    assert [url for url in requested if not url.startswith(("file://", "data:", "blob:"))] == []
    opened.close()


def test_nothing_is_cut_and_all_of_it_can_be_read(page):
    width = page.viewport_size["width"]
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "the page itself does not scroll sideways"
    assert page.evaluate(BEYOND) == []
    texts = page.evaluate(
        "[...document.querySelectorAll('svg text')].map(text => { const box = text.getBoundingClientRect(), "
        "drawing = text.closest('svg').getBoundingClientRect(); return [text.textContent, box.left - drawing.left, "
        "drawing.right - box.right, box.top - drawing.top, drawing.bottom - box.bottom]; })"
    )
    assert len(texts) > 100 and [text for text in texts if min(text[1:]) < -2] == []
    sizes = page.evaluate(
        "[...document.querySelectorAll('p, td, th, summary, h2')].map(e => parseFloat(getComputedStyle(e).fontSize))"
    )
    assert len(sizes) > 50 and min(sizes) >= 12
    drawings = page.evaluate("[...document.querySelectorAll('svg')].map(e => e.getBoundingClientRect().width)")
    assert all(260 <= drawing <= width for drawing in drawings)


def test_a_table_says_that_it_scrolls(page):
    page.wait_for_function("document.querySelector('.scrolls')")
    wide = page.evaluate(
        "[...document.querySelectorAll('.scroll')].map(e => [e.scrollWidth > e.clientWidth + 1, "
        "getComputedStyle(e, '::before').content.includes('scrolls'), e.tabIndex])"
    )
    assert len(wide) > 5 and any(wider for wider, _, _ in wide)
    assert all(wider == said and at == 0 for wider, said, at in wide)


def visible(page):
    """Series -> whether each part of it is drawn."""
    parts = page.evaluate(
        "[...document.querySelectorAll('.series')].map(e => [e.dataset.series, getComputedStyle(e).display !== 'none'])"
    )
    return {name: [on for other, on in parts if other == name] for name in dict(parts)}


def test_a_legend_hides_and_shows_an_arm_in_every_picture_also_by_keyboard(page):
    before = visible(page)
    assert {"fixed", "absent", "BOS + text"} <= set(before) and all(map(all, before.values()))
    assert len(before["fixed"]) == 7 * 3, "two seeds and their mean, in seven panels"
    chips = page.locator(".chip:has(input[value=fixed])")
    assert chips.count() == 2
    chips.first.click()
    after = visible(page)
    assert not any(after["fixed"]) and after["absent"] == before["absent"]
    assert page.locator("input[value=fixed]:checked").count() == 0, "the other legend follows"
    page.locator("input[value=fixed]").first.focus()
    page.keyboard.press("Space")
    assert visible(page) == before
    page.locator("button[data-all='0']").last.click()
    assert not any(map(any, (visible(page)[name] for name in ("BOS + text", "text"))))


def test_it_is_readable_in_the_dark(page):
    def luminance(colour):
        levels = [int(x) / 255 for x in colour.strip("rgba()").split(",")[:3]]
        return sum(
            w * (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4)
            for w, x in zip((0.2126, 0.7152, 0.0722), levels, strict=True)
        )

    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        ground, *texts = page.evaluate(
            "[getComputedStyle(document.body).backgroundColor, ...['p', '.note', 'svg text', 'summary', "
            "'.effects small', '.good > b, .bad > b, .open > b', 'button.chip']"
            ".map(s => document.querySelector(s)).map(e => "
            "getComputedStyle(e)[e.tagName === 'text' ? 'fill' : 'color'])]"
        )
        assert (luminance(ground) < 0.05) == (scheme == "dark")
        for text in texts:
            light, dark = sorted((luminance(ground), luminance(text)), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (scheme, text)


def test_a_press_on_a_header_sorts_its_table(page):
    table = page.locator("table").last
    column = table.locator("th").all_inner_texts().index("loss")
    cells = table.locator(f"tbody tr td:nth-child({column + 1})")
    button = table.locator("th button").nth(column)
    button.scroll_into_view_if_needed()
    button.click()
    down = [float(x) for x in cells.all_inner_texts()]
    assert down == sorted(down, reverse=True) and len(set(down)) > 2
    assert table.locator("th").nth(column).get_attribute("aria-sort") == "descending"
    button.click()
    assert [float(x) for x in cells.all_inner_texts()] == sorted(down)


def test_the_answer_comes_first_then_the_picture_then_effects_and_curves(page):
    assert page.locator("h2").all_inner_texts() == [
        "Sink rate, and what leaving BOS out costs", "Expected effects", "While training", "Numbers", "More pictures",
    ]  # fmt: skip
    assert "the sink rate goes from" in page.locator(".answer").inner_text()
    assert page.locator(".effects li").inner_text().startswith(("✓", "✗", "≈"))
    assert page.locator("summary").all_inner_texts() == [
        "Every arm", "By input", "Expected effects", "When the sink forms", "Differences of arms", "Every measurement",
        "Losses", "Loss by input", "Where the sink sits",
    ]  # fmt: skip


@pytest.mark.slow
def test_the_page_of_several_models_is_whole_and_leads_to_each(browser, page_file, tmp_path):
    runs = sorted(path.parent for path in page_file.parents[1].rglob("run.json"))[:3]
    assert len(runs) == 3
    probing = ["probe", *map(str, runs), "--sink_tokens", "16", "--documents", "3", "--out", str(tmp_path / "out")]
    assert main(probing) == 0
    for width in (1280, 400):
        opened, wrong = browser.new_page(viewport={"width": width, "height": 900}), []
        opened.on("pageerror", lambda error, wrong=wrong: wrong.append(str(error)))
        opened.context.set_offline(True)
        opened.goto((tmp_path / "out" / "index.html").as_uri())
        assert opened.locator("h2").all_inner_texts() == [
            "Sink rate, and how well the text is predicted", "Sink rate by relative depth", "Numbers", "Each model",
        ]  # fmt: skip
        opened.evaluate("document.querySelectorAll('details').forEach(part => { part.open = true; })")
        assert opened.evaluate("document.documentElement.scrollWidth") <= width and opened.evaluate(BEYOND) == []
        chip = opened.locator(".chip input").last.get_attribute("value")
        assert len(visible(opened)[chip]) == 2, "a line in each mode"
        opened.locator("a").last.click()
        assert opened.locator("h1").inner_text().startswith(f"Probe of {runs[-1]}") and wrong == []
        opened.close()
