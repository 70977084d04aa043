"""What the report of a study holds."""

import csv
import json
import re
import shutil
from html.parser import HTMLParser

import pyarrow.parquet as pq
import pytest
import yaml

from sinkbed.data.files import write_json
from sinkbed.train.cli.main import main
from sinkbed.train.report.effects import figure
from sinkbed.train.report.result import load_result
from sinkbed.train.report.tables import rows_of
from sinkbed.train.run import directory
from tests.support.studies import table


class Links(HTMLParser):
    """Everything a page would fetch."""

    def __init__(self):
        super().__init__()
        self.targets = []

    def handle_starttag(self, tag, attributes):
        self.targets += [v for k, v in attributes if k in ("src", "href") and v]


def test_the_page_needs_no_network_and_escapes_what_users_wrote(finished):
    page = (finished.parent / "out" / "report" / "index.html").read_text()
    links = Links()
    links.feed(page)
    assert links.targets == []
    assert "A study &lt;of&gt; two arms" in page and "<of>" not in page
    assert page.count("<svg") == page.count("</svg>") >= 9
    assert len(re.findall(r"<tr><td", page)) == 2 + 4 * 2 + 2 * 3 + 6, (
        "arms, by input, onsets by input, every measurement"
    )
    assert page.index('class="answer"') < page.index("<svg") < page.index("<table")


def test_the_table_has_no_column_for_what_nobody_published(finished):
    text = finished.read_text()
    finished.write_text(text[: text.index("published:")])
    assert main(["report", str(finished)]) == 0
    report = finished.parent / "out" / "report"
    for name in ("table.md", "index.html"):
        assert "ublished" not in (report / name).read_text()


def test_a_number_is_never_minus_zero():
    from sinkbed.train.report.result import fixed, spread

    assert [fixed(x, 3) for x in (-0.0004, 0.0004, -0.0006, 2.0)] == ["0.000", "0.000", "−0.001", "2.000"]
    assert spread([-0.0001, 0.0002], 2) == "0.00 ± 0.00"


def test_a_mean_has_an_interval_but_of_one_run():
    from sinkbed.train.report.result import spread

    assert spread([0.5], 2) == "0.50"
    assert spread([1.0, 2.0, 3.0], 2) == "2.00 ± 2.48", "t at 2 degrees of freedom is 4.303"
    assert spread([], 2) == ""


def test_runs_and_folders_of_runs_can_be_reported(finished, fit, capsys, tmp_path):
    out = finished.parent / "out"
    before = (out / "report" / "table.md").read_text()
    assert main(["report", str(out)]) == 1
    assert "expected the study's file, which has its expected effects" in capsys.readouterr().err
    assert (out / "report" / "table.md").read_text() == before
    assert main(["report", str(out), "--out", str(tmp_path / "again")]) == 0
    again, before = ((f / "report" / "table.csv").read_text() for f in (tmp_path / "again", out))
    assert sorted(again.splitlines()) == sorted(before.splitlines())
    _, folder = fit(run_dir="alone")
    assert main(["report", str(folder)]) == 0
    with (folder / "report" / "table.csv").open() as file:
        assert {row["arm"] for row in csv.DictReader(file)} == {"alone"}
    assert main(["report", str(out), str(folder), "--out", str(tmp_path / "both")]) == 0
    with (tmp_path / "both" / "report" / "table.csv").open() as file:
        assert {row["arm"] for row in csv.DictReader(file)} == {"fixed", "absent", "alone"}
    for option in (["--seeds", "0"], ["--size", "demo"], ["--arms", "a"]):
        assert main(["report", str(out), *option]) == 1
        assert f"{option[0]}: expected study files, of which it chooses" in capsys.readouterr().err
    assert main(["report", str(out), str(folder)]) == 1
    assert "expected --out" in capsys.readouterr().err
    copy = shutil.copytree(out, tmp_path / "copy")
    assert main(["report", str(out), str(copy), "--out", str(tmp_path / "twice")]) == 1
    assert "got arm absent, seed 0 in both" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["report", str(tmp_path / "empty")]) == 1
    assert "expected at least one run that was measured, got none" in capsys.readouterr().err


@pytest.mark.slow
def test_several_studies_make_one_page_of_the_seeds_that_are_finished(finished, capsys, tmp_path):
    effect = "name: BOS helps, note: a word, metric: loss, arm: fixed, against: absent, expected: none, tolerance: 9"
    other, empty = finished.with_name("other.yaml"), finished.with_name("empty.yaml")
    other.write_text(finished.read_text() + f"effects: [{{{effect}}}]\n")
    empty.write_text(finished.read_text().replace(str(finished.parent / "out"), str(tmp_path / "none")))
    assert main(["study", str(finished), "--quiet", "--seeds", "1"]) == 0
    files, page = [str(finished), str(other), str(empty)], tmp_path / "page"
    capsys.readouterr()
    assert main(["report", *files, "--out", str(page)]) == 0
    assert f"not on the page: {empty} (no run in {tmp_path / 'none'})" in capsys.readouterr().out
    text = (page / "README.md").read_text()
    assert set(directory.read_json(page / "studies.json")) == {"other", "study"}
    assert re.findall("^## (.*)", text, re.M) == ["other", "study"]
    assert "| [other](#other) | A study &lt;of&gt; two arms | 1 as expected |" in text
    line = r"\| BOS helps \(a word\) \| as expected \| fixed − absent \| loss \| [+−]?\d\.\d{3} ± \d\.\d{3}"
    assert re.search(line + r" \| same within 9 \|", text)
    assert f"`sinkbed study {other.name} --seeds 0 1`: 4 runs" in text and "Made by sinkbed" in text
    assert "In all: 1 as expected." in text
    assert all((page / f"{name}.png").is_file() for name in ("study", "other"))
    # A line of the page is what the report of the study has.
    assert main(["report", str(other), "--seeds", "0", "1"]) == 0
    report = (finished.parent / "out" / "report" / "table.md").read_text().split("## ")[0]
    [line] = re.findall(r"^\| fixed \| (.*) \|$", text.split("## other")[1].split("## study")[0], re.M)
    assert line in report
    # One seed of a study that has more.
    assert main(["report", *files, "--out", str(page), "--seeds", "1"]) == 0
    one = (page / "README.md").read_text().split("## study")[1]
    assert (
        one.count("one run an arm") == 1
        and "±" not in one
        and f"`sinkbed study {finished.name} --seeds 1`" in one
        and str(tmp_path) not in one
    )
    # A study that is not named stays on the page as it was; of one whose settings changed, it is said.
    (finished.parent / "none.yaml").write_text("data: {strategy: {first_token: random}}\n")
    capsys.readouterr()
    assert main(["report", str(finished), str(empty), "--out", str(page), "--seeds", "0"]) == 0
    assert "not on the page: absent-seed0 (of other settings: data.strategy.first_token was" in capsys.readouterr().out
    again = (page / "README.md").read_text()
    assert re.findall("^## (.*)", again, re.M) == ["other", "study"] and "| absent |" not in again.split("## study")[1]
    assert "| absent |" in again.split("## study")[0] and again.count("| [other](#other) |") == 1
    (finished.parent / "out" / "runs" / "fixed-seed1" / directory.MEASUREMENT).unlink()
    assert main(["report", *files, "--out", str(page), "--seeds", "0", "1"]) == 0
    assert "not on the page: fixed, seed 1 (not finished: step 10 of 10)" in capsys.readouterr().out
    assert main(["report", *files]) == 1
    assert "expected --out" in capsys.readouterr().err
    # Nothing that somebody else wrote is replaced.
    for name in ("README.md", "other.png", "studies.json"):
        mine = tmp_path / name / name
        mine.parent.mkdir()
        mine.write_text('"mine"\n')
        assert main(["report", *files, "--out", str(mine.parent)]) == 1
        assert "got another file" in capsys.readouterr().err
        assert mine.read_text() == '"mine"\n' and list(mine.parent.iterdir()) == [mine]
    assert main(["report", *files, "--out", str(page), "--arms", "a"]) == 1
    assert "--arms: expected one study file, got" in capsys.readouterr().err
    assert main(["report", str(other), str(other), "--out", str(page)]) == 1
    assert "got two that are called other" in capsys.readouterr().err
    assert main(["report", str(empty), str(empty), "--out", str(page)]) == 1
    assert "expected a study with a finished run, got none" in capsys.readouterr().err


def test_the_report_can_be_made_again_from_what_is_finished(finished):
    report = finished.parent / "out" / "report"
    before = (report / "table.csv").read_text()
    (report / "table.csv").unlink()
    assert main(["report", str(finished)]) == 0
    assert (report / "table.csv").read_text() == before


def test_folders_with_other_runs_under_the_name_of_an_arm_are_no_more_seeds_of_it(finished, tmp_path, capsys):
    runs, more = finished.parent / "out" / "runs", tmp_path / "more"
    shutil.copytree(runs / "fixed-seed0", more / "fixed")
    (more / "fixed" / "arm.json").unlink()
    config = yaml.safe_load((more / "fixed" / directory.CONFIG).read_text())

    def report(changes):
        (more / "fixed" / directory.CONFIG).write_text(yaml.safe_dump(config | changes))
        status = main(["report", str(runs), str(more), "--out", str(tmp_path / "both")])
        return status, capsys.readouterr()

    status, said = report({})
    assert status == 1 and "got arm fixed, seed 0 in both" in said.err
    status, said = report({"seed_everything": 5, "trainer": config["trainer"] | {"max_steps": 9}})
    assert status == 1 and "differ in their seed alone, got trainer.max_steps: expected 10, got 9" in said.err
    status, said = report({"seed_everything": 5, "data": config["data"] | {"seed": 5, "workers": 1}})
    assert status == 0 and not said.err


@pytest.mark.slow
def test_arms_measured_in_different_modes_make_a_report(study):
    (study.parent / "none.yaml").write_text(
        "data: {strategy: {first_token: none}}\nmeasure: {modes: [text], live_modes: [as_trained]}\n"
    )
    assert main(["study", str(study), "--quiet"]) == 0
    assert [(r["arm"], r["mode"]) for r in table(study)][-1] == ("absent", "text")


@pytest.mark.slow
def test_a_report_keeps_seeds_that_the_file_does_not_name_and_says_what_is_missing(finished, capsys):
    assert main(["study", str(finished), "--quiet", "--seeds", "1"]) == 0
    assert {r["seed"] for r in table(finished)} == {"0", "1"}
    assert main(["report", str(finished)]) == 0
    assert {r["seed"] for r in table(finished)} == {"0", "1"}
    report = finished.parent / "out" / "report"
    markdown = (report / "table.md").read_text()
    assert re.search(r"\d\.\d{3} ± \d\.\d{3}", markdown) and "Differences of arms" in markdown
    assert "one run" not in markdown and "Not in the report" not in markdown and not (report / "effects.csv").exists()
    (report / "effects.csv").write_text("of effects that the file has no more\n")
    unfinished = finished.parent / "out" / "runs" / "absent-seed1"
    (unfinished / directory.MEASUREMENT).unlink()
    directory.note(unfinished, finished=False)
    for notice in (
        "Not finished: absent, seed 1 (step 10 of 10), in the curves alone.",
        "Not in the report: absent-seed1 (interrupted).",
    ):
        assert main(["report", str(finished)]) == 0
        for name in ("table.md", "index.html"):
            text = (report / name).read_text()
            assert notice in text and "(of fewer: absent 0)" in text
        curves = pq.read_table(report / "curves.parquet").to_pylist()
        assert (("absent", 1) in {(row["arm"], row["seed"]) for row in curves}) == notice.startswith("Not finished")
        (unfinished / directory.METRICS).unlink(missing_ok=True)
    assert not (report / "effects.csv").exists()
    assert main(["report", str(finished), "--seeds", "1"]) == 0
    assert {r["seed"] for r in table(finished)} == {"1"}


@pytest.mark.parametrize(("option", "names"), [
    (("--model.decoder.normalizer", "elu"), ("sink_mass_raw",)),
    (("--model.decoder.sink", "k_bias"), ("sink_share", "sink_rate_share", "learned_mass")),
])  # fmt: skip
def test_other_readings_of_a_run_that_is_still_going_are_its_own(fit, option, names):
    _, folder = fit(*option)
    (folder / directory.MEASUREMENT).unlink()
    going = load_result(folder, "arm", 0)
    for name in names:
        key = {"sink_rate_share": "rate_share_eps0.3"}.get(name, name.removeprefix("sink_"))
        assert figure(going, name, "text") == pytest.approx(going.points[-1][f"sink/{key}/text"])
        [row] = [row for row in rows_of([going]) if row["mode"] == "text"]
        assert row[name] == pytest.approx(figure(going, name, "text"), abs=1e-6)
    assert figure(going, "sink_mass", "text") != figure(going, names[0], "text")


def test_raw_masses_of_an_earlier_version_are_not_reported_as_others(fit, monkeypatch):
    monkeypatch.setattr(directory, "check_finished", lambda folder: None)  # which knows what the run itself has left
    _, folder = fit()
    measured = directory.read_json(folder / directory.MEASUREMENT)
    measured["modes"]["text"] |= {"share": [[0.1] * 4] * 2, "learned_mass": None}
    write_json(folder / directory.MEASUREMENT, measured)
    with pytest.raises(ValueError, match="got raw ones of an earlier version of Sinkbed; train the run anew"):
        load_result(folder, "arm", 0)


def test_a_run_that_is_still_going_is_reported_as_far_as_it_is(fit, tmp_path, capsys):
    _, folder = fit(run_dir="alone")
    measured = directory.read_json(folder / directory.MEASUREMENT)
    points = (folder / directory.METRICS).read_text().splitlines(keepends=True)
    (folder / directory.MEASUREMENT).unlink()
    half = next(n for n, line in enumerate(points) if '"sink/heatmap' in line and json.loads(line)["step"] >= 4)
    (folder / directory.METRICS).write_text("".join(points[: half + 1]) + points[half + 1][:20])
    last = json.loads(points[half])
    assert main(["report", str(folder)]) == 0
    page = (folder / "report" / "index.html").read_text()
    assert f"Not finished: alone, seed 0 (step {last['step']} of 10), as of its last measurement." in page
    assert page.count("<svg") >= 7
    with (folder / "report" / "table.csv").open() as file:
        rows = {row["mode"]: row for row in csv.DictReader(file)}
    assert float(rows["text"]["loss"]) == pytest.approx(last["val/loss/text"], abs=1e-6)
    assert last["val/loss/text"] > measured["modes"]["text"]["loss"] + 0.1
    assert float(rows["text"]["sink_rate_0.3"]) == pytest.approx(last["sink/rate_eps0.3/text"], abs=1e-4)
    assert int(rows["text"]["tokens"]) == last["train/tokens"]
    (folder / directory.METRICS).write_text("")
    assert main(["report", str(folder)]) == 1
    assert "got none in" in capsys.readouterr().err
