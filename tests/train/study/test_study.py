"""A study of tiny arms through the real command line: what runs, what does not, what the report holds."""

import contextlib
import csv
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser

import pytest

from sinkbed.train.cli import study as study_command
from sinkbed.train.cli.main import main
from sinkbed.train.run import directory
from sinkbed.train.study import local as runner
from sinkbed.train.study.arms import LOG, RECORD, begin, environment, hold, plan
from sinkbed.train.study.file import load_study
from tests.support import ROOT
from tests.support.runs import write_run_config


def write_study(folder, store):
    """A study file of two arms, fixed BOS and none, with its configs beside it."""
    write_run_config(folder / "run.yaml", store)
    (folder / "none.yaml").write_text("data: {strategy: {first_token: none}}\n")
    (folder / "bos.yaml").write_text("data: {strategy: {first_token: bos}}\n")
    path = folder / "study.yaml"
    path.write_text(
        f"""
title: A study <of> two arms
question: Which?
out: {folder / "out"}
base: [run.yaml]
workers: 2
arms:
  fixed: [bos.yaml]
  absent: [none.yaml]
published:
  fixed: {{bos: [90.84, 2.69]}}
"""
    )
    return path


@pytest.fixture
def study(tiny_store, tmp_path):
    """A study that has not run."""
    return write_study(tmp_path, tiny_store)


@pytest.fixture(scope="module")
def _run_once(tiny_store, tmp_path_factory):
    path = write_study(tmp_path_factory.mktemp("study"), tiny_store)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main(["study", str(path), "--quiet"]) == 0
    return path, printed.getvalue()


@pytest.fixture
def finished(_run_once, study):
    """The same study, run; each test has its own copy."""
    shutil.copytree(_run_once[0].parent / "out", study.parent / "out")
    # Its configs name this copy's folders; contents decide what an arm is, so they must be those of the run.
    shutil.copy(_run_once[0].parent / "run.yaml", study.parent / "run.yaml")
    return study


def table(path):
    with (path.parent / "out" / "report" / "table.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_study_runs_its_arms_and_reports_them(finished, _run_once):
    out = finished.parent / "out"
    rows = table(finished)
    assert [(r["arm"], r["seed"], r["mode"]) for r in rows] == [
        (arm, "0", mode) for arm in ("fixed", "absent") for mode in ("bos", "text", "first_key_masked")
    ]
    assert {"arm", "seed", "mode", "sink_rate_0.3", "sink_mass", "loss", "bits_per_byte"} <= set(rows[0])
    measured = directory.read_json(out / "runs" / "fixed-seed0" / directory.MEASUREMENT)["modes"]["bos"]
    assert float(rows[0]["loss"]) == pytest.approx(measured["loss"], abs=1e-6)
    mass = [x for row in measured["mass"] for x in row]
    assert float(rows[0]["sink_mass"]) == pytest.approx(sum(mass) / len(mass), abs=1e-6)

    for name in ("result.png", "curves.png", "heatmaps.png", "loss.png"):
        assert (out / "report" / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    printed = _run_once[1]
    assert "fixed at position 0" in printed and "90.84 / 2.69" in printed
    assert re.search(r"an arm \d+\.\d s beside training and measuring", printed)
    markdown = (out / "report" / "table.md").read_text()
    assert "90.84 / 2.69" in markdown and "one seed (0)" in markdown
    assert re.search(r"\d\.\d{3} \(1 run\)", markdown)


class Links(HTMLParser):
    """Everything a page would fetch."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attributes):
        self.found += [v for k, v in attributes if k in ("src", "href") and v]


def test_the_page_needs_no_network_and_escapes_what_users_wrote(finished):
    page = (finished.parent / "out" / "report" / "index.html").read_text()
    links = Links()
    links.feed(page)
    assert links.found == []
    assert "A study &lt;of&gt; two arms" in page and "<of>" not in page
    assert page.count("plotly-graph-div") == 4
    assert len(re.findall(r"<tr><td>", page)) == 6 + 2 + 6, "the result, the arms, every measurement"


def test_a_finished_arm_is_not_run_again_and_an_interrupted_one_resumes(finished):
    out = finished.parent / "out" / "runs"
    before = (out / "fixed-seed0" / directory.METRICS).stat().st_mtime_ns
    whole = (out / "absent-seed0" / directory.METRICS).read_text()
    # As a kill after step 3 leaves it: points beyond the checkpoint, no measurement.
    (out / "absent-seed0" / directory.MEASUREMENT).unlink()
    checkpoints = out / "absent-seed0" / "checkpoints"
    (checkpoints / "step-0000010.ckpt").unlink()
    (checkpoints / "last.ckpt").unlink()
    (checkpoints / "last.ckpt").symlink_to("step-0000003.ckpt")
    study_runs = plan(load_study(finished))
    assert [r.status() for r in study_runs] == ["finished", "interrupted"]
    assert main(["study", str(finished), "--quiet"]) == 0
    assert (out / "fixed-seed0" / directory.METRICS).stat().st_mtime_ns == before

    def without_clock(text):
        return re.sub(r', "train/tokens_per_second": [\d.]+', "", text)

    assert without_clock((out / "absent-seed0" / directory.METRICS).read_text()) == without_clock(whole)


def test_an_arm_that_fails_is_reported_and_does_not_stop_the_rest(study, capsys):
    study.write_text(study.read_text().replace("absent: [none.yaml]", "absent: [broken.yaml]"))
    (study.parent / "broken.yaml").write_text("model: {optimizer: {lr: 1.0e+38}}\n")
    assert main(["study", str(study), "--quiet"]) == 1
    error = capsys.readouterr().err
    assert "absent-seed0 failed" in error and "expected finite" in error and "fit.log" in error
    assert {r["arm"] for r in table(study)} == {"fixed"}
    assert "expected finite" in (study.parent / "out" / "report" / "index.html").read_text()
    assert main(["study", str(study), "--dry_run"]) == 0
    assert re.search(r"failed +\S+absent-seed0  \(exit status 1: .*expected finite", capsys.readouterr().out)
    assert main(["report", str(study)]) == 0
    assert "not in the report: absent-seed0 (failed: exit status 1" in capsys.readouterr().out
    (study.parent / "broken.yaml").write_text("model: {optimizer: {lr: 1.0e-3}}\n")
    assert main(["study", str(study), "--quiet"]) == 1, "another configuration now"
    assert "model.optimizer.lr was 1e+38, is 0.001" in capsys.readouterr().err


def test_a_misspelt_key_is_found_before_any_arm_is_started(study, capsys):
    (study.parent / "none.yaml").write_text("data: {strategy: {first_tokn: none}}\n")
    for option in ("--dry_run", "--quiet"):
        assert main(["study", str(study), option]) == 1
        error = capsys.readouterr().err
        assert "none.yaml, line 1: data.strategy.first_tokn: expected a known key" in error and "first_token?" in error
    assert not list((study.parent / "out").glob("runs/*"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("data: {strategy: {window: 48}}", "window: got 48 with context_length 48, which limits nothing"),
        ("model: {optimizer: {warmup_steps: 11}}", "warm-up of 11 and cooldown of 0 steps do not fit"),
        ("model: {max_grad_norm: -1}", "model.max_grad_norm: expected more than 0, got -1"),
        ("data: {micro_batch_size: 3}", "data.batch_size=4: expected a multiple of micro_batch_size=3"),
        ("trainer: {fast_dev_run: true}", "trainer.fast_dev_run: has no effect here"),
        ("model: {decoder: {n_layers: 1000000}}", "n_layers: expected at least 1 and at most 10000"),
        ("model: {decoder: {d_model: 100000000}}", "GB of memory of this machine"),
    ],
)
def test_what_fit_would_refuse_is_refused_before_any_arm_is_started(study, capsys, settings, message):
    (study.parent / "none.yaml").write_text(f"{settings}\n")
    assert main(["study", str(study), "--dry_run"]) == 1
    error = capsys.readouterr().err
    assert "arm absent: " in error and message in error and "none.yaml" in error


@pytest.mark.parametrize("kept", ["digests", "none"])
def test_an_arm_whose_files_are_damaged_does_not_hide_the_others(finished, capsys, kept):
    """Also one of an earlier version, which kept no digests and may hold NaN."""
    folder = finished.parent / "out" / "runs" / "absent-seed0"
    path = folder / directory.MEASUREMENT
    path.write_text(re.sub(r'"loss": [\d.]+', '"loss": NaN', path.read_text()))
    if kept == "none":
        directory.note(folder, finished=True)
    assert main(["report", str(finished)]) == 0
    said = capsys.readouterr().out
    assert "not in the report: absent-seed0 (damaged: " in said and str(path) in said
    assert {row["arm"] for row in table(finished)} == {"fixed"}
    assert "Traceback" not in said and ("NaN, which is no number" in said) == (kept == "none")


def test_the_table_has_no_column_for_what_nobody_published(finished):
    text = finished.read_text()
    finished.write_text(text[: text.index("published:")])
    assert main(["report", str(finished)]) == 0
    report = finished.parent / "out" / "report"
    for name in ("table.md", "index.html"):
        assert "ublished" not in (report / name).read_text().split("</style>")[-1].split("<script>")[0]


def test_a_number_is_never_minus_zero():
    from sinkbed.train.report.result import fixed, spread

    assert [fixed(x, 3) for x in (-0.0004, 0.0004, -0.0006, 2.0)] == ["0.000", "0.000", "−0.001", "2.000"]
    assert spread([-0.0001, 0.0002], 2) == "0.00 ± 0.00"


def test_a_mean_of_one_run_says_so():
    from sinkbed.train.report.result import spread

    assert spread([0.5], 2) == "0.50 (1 run)"
    assert spread([1.0, 2.0, 3.0], 2) == "2.00 ± 2.48", "t at 2 degrees of freedom is 4.303"
    assert spread([], 2) == ""


def test_runs_and_folders_of_runs_can_be_reported(finished, fit, capsys, tmp_path):
    out = finished.parent / "out"
    before = (out / "report" / "table.md").read_text()
    assert main(["report", str(out)]) == 1
    assert "expected a study file, which makes a study's own report" in capsys.readouterr().err
    assert (out / "report" / "table.md").read_text() == before
    assert main(["report", str(out), "--out", str(tmp_path / "again")]) == 0
    ours, theirs = ((f / "report" / "table.csv").read_text() for f in (tmp_path / "again", out))
    assert sorted(ours.splitlines()) == sorted(theirs.splitlines())
    _, folder = fit(run_dir="alone")
    assert main(["report", str(folder)]) == 0
    with (folder / "report" / "table.csv").open() as file:
        assert {row["arm"] for row in csv.DictReader(file)} == {"alone"}
    assert main(["report", str(out), str(folder), "--out", str(tmp_path / "both")]) == 0
    with (tmp_path / "both" / "report" / "table.csv").open() as file:
        assert {row["arm"] for row in csv.DictReader(file)} == {"fixed", "absent", "alone"}
    assert main(["report", str(out), str(folder)]) == 1
    assert "expected --out" in capsys.readouterr().err
    copy = shutil.copytree(out, tmp_path / "copy")
    assert main(["report", str(out), str(copy), "--out", str(tmp_path / "twice")]) == 1
    assert "got arm absent, seed 0 in both" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["report", str(tmp_path / "empty")]) == 1
    assert "expected at least one finished run, got none" in capsys.readouterr().err


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
    assert re.findall("^## (.*)", text, re.M) == ["other", "study"]
    assert "| [other](#other) | A study &lt;of&gt; two arms | 1 as expected |" in text
    line = r"\| BOS helps \(a word\) \| fixed − absent \| loss: [+−]?\d\.\d{3} ± \d\.\d{3}"
    assert re.search(line + r" \| same within 9 \| as expected \|", text)
    assert f"`sinkbed study {other} --seeds 0 1`: 4 runs" in text and "Made by sinkbed" in text
    assert "In all: 1 as expected." in text
    assert all((page / f"{name}.png").is_file() for name in ("study", "other"))
    # A line of the page is what the report of the study has.
    assert main(["report", str(other), "--seeds", "0", "1"]) == 0
    report = (finished.parent / "out" / "report" / "table.md").read_text().split("## ")[0]
    [line] = re.findall(r"^\| fixed \| (.*) \|$", text.split("## other")[1].split("## study")[0], re.M)
    rate, _, mass, loss, gap = line.split(" | ")
    assert f"| BOS + text | {rate} | {mass} | {loss} |" in report and f"| {gap} |" in report
    # One seed of a study that has more.
    assert main(["report", *files, "--out", str(page), "--seeds", "1"]) == 0
    one = (page / "README.md").read_text().split("## study")[1]
    assert "(1 run)" in one and "±" not in one and f"`sinkbed study {finished} --seeds 1`" in one
    # A study that is not named stays on the page as it was; of one whose settings changed, it is said.
    (finished.parent / "none.yaml").write_text("data: {strategy: {first_token: random}}\n")
    capsys.readouterr()
    assert main(["report", str(finished), str(empty), "--out", str(page), "--seeds", "0"]) == 0
    assert (
        "not in the report: absent-seed0 (of other settings: data.strategy.first_token was" in capsys.readouterr().out
    )
    again = (page / "README.md").read_text()
    assert re.findall("^## (.*)", again, re.M) == ["other", "study"] and "| absent |" not in again.split("## study")[1]
    assert "| absent |" in again.split("## study")[0] and again.count("| [other](#other) |") == 1
    assert main(["report", *files]) == 1
    assert "expected --out" in capsys.readouterr().err
    # Nothing that somebody else wrote is replaced.
    for name in ("README.md", "other.png"):
        mine = tmp_path / name / name
        mine.parent.mkdir()
        mine.write_text("mine\n")
        assert main(["report", *files, "--out", str(mine.parent)]) == 1
        assert "got another file" in capsys.readouterr().err
        assert mine.read_text() == "mine\n" and list(mine.parent.iterdir()) == [mine]
    assert main(["report", str(other), str(other), "--out", str(page)]) == 1
    assert "got two that are called other" in capsys.readouterr().err
    assert main(["report", str(empty), str(empty), "--out", str(page)]) == 1
    assert "expected a study with a finished run, got none" in capsys.readouterr().err


def test_an_arm_made_under_another_configuration_is_refused_unless_forced(finished, capsys):
    (finished.parent / "none.yaml").write_text("data: {strategy: {first_token: random}}\n")
    assert main(["study", str(finished), "--quiet"]) == 1
    assert "absent-seed0" in (error := capsys.readouterr().err) and "--force" in error
    assert main(["study", str(finished), "--quiet", "--force"]) == 0
    config = (finished.parent / "out" / "runs" / "absent-seed0" / directory.CONFIG).read_text()
    assert "first_token: random" in config


def test_seeds_give_an_interval_in_the_table(finished):
    main(["study", str(finished), "--quiet", "--seeds", "0", "1"])
    assert {r["seed"] for r in table(finished)} == {"0", "1"}
    markdown = (finished.parent / "out" / "report" / "table.md").read_text()
    assert re.search(r"\d\.\d{3} ± \d\.\d{3}", markdown)
    assert "(1 run)" not in markdown and "Differences of arms" in markdown


def test_the_report_can_be_made_again_from_what_is_finished(finished):
    report = finished.parent / "out" / "report"
    before = (report / "table.csv").read_text()
    (report / "table.csv").unlink()
    assert main(["report", str(finished)]) == 0
    assert (report / "table.csv").read_text() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("workers: 2", "worker: 2"), "unknown key 'worker'"),
        (("base: [run.yaml]", "base: [nowhere.yaml]"), "names nowhere.yaml"),
        (("  fixed: [bos.yaml]", "  ../fixed: [bos.yaml]"), "names a folder"),
        (("title:", "# "), "expected the key 'title'"),
        (("workers: 2", "seeds: 0"), "seeds: expected a list of integers, got 0"),
        (("workers: 2", "seeds: [a]"), "seeds: expected a list of integers, got ['a']"),
        (("workers: 2", "workers: two"), "workers: expected an integer, got 'two'"),
        (("workers: 2", "workers: 0"), "study.workers: expected at least 1"),
        (("workers: 2", "seeds: [1, 1]"), "expected distinct seeds"),
        (("workers: 2", "workers: [}"), "expected YAML"),
        (("  fixed: {bos: [90.84, 2.69]}", "  fixd: {bos: [90.84, 2.69]}"), "published.fixd"),
        (("  fixed: {bos: [90.84, 2.69]}", "  fixed: {bos: [90.84]}"), "published.fixed"),
        (("base: [run.yaml]", "base: run.yaml"), "base: a list of configs"),
        (("  absent: [none.yaml]", "  fixed: [none.yaml]"), "expected each key once, got 'fixed' here and in"),
        (
            (
                "workers: 2",
                "effects: [{name: E, metric: loss, arm: fixed, expected: up, against: absent, mode: nobos}]",
            ),
            "nobos",
        ),
        (
            (
                "workers: 2",
                "effects: [{name: E, metric: loss, arm: fixed, expected: up, against: absent, mode: as_trained}]",
            ),
            "mode that arm fixed is measured in (measure.modes: bos, text, first_key_masked); got as_trained",
        ),
    ],
)
def test_a_wrong_study_file_is_one_message(study, capsys, change, message):
    study.write_text(study.read_text().replace(*change))
    assert main(["study", str(study)]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("content", ["data: [", "- a list", "data: 5"])
def test_an_overlay_that_is_no_config_is_named(study, capsys, content):
    (study.parent / "bos.yaml").write_text(content)
    assert main(["study", str(study)]) == 1
    assert str(study.parent / "bos.yaml") in capsys.readouterr().err


def test_a_comment_in_an_overlay_makes_no_other_arm(finished):
    overlay = finished.parent / "none.yaml"
    overlay.write_text("# a word\n" + overlay.read_text())
    assert [r.status() for r in plan(load_study(finished))] == ["finished", "finished"]


def test_a_study_that_runs_is_not_run_a_second_time(study, capsys):
    with locked(study.parent / "out"):
        assert main(["study", str(study), "--quiet"]) == 1
        assert "got a process that still does" in capsys.readouterr().err


@contextlib.contextmanager
def locked(folder):
    """Another process that holds a folder: a lock of this process would let this process in."""
    code = f"from sinkbed.train.run import directory as d; held = d.lock(d.Path({str(folder)!r})); "
    code += "print('locked', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"locked\n"
        yield


def test_forcing_a_study_that_runs_clears_nothing(finished, capsys):
    (finished.parent / "none.yaml").write_text("data: {strategy: {first_token: random}}\n")
    out = finished.parent / "out"
    with locked(out):
        assert main(["study", str(finished), "--quiet", "--force"]) == 1
    assert "got a process that still does" in capsys.readouterr().err
    assert (out / "runs" / "absent-seed0" / directory.MEASUREMENT).exists()


def test_an_arm_whose_folder_is_in_use_fails_alone_and_is_left_as_it_is(finished, monkeypatch, capsys):
    (finished.parent / "none.yaml").write_text("data: {strategy: {first_token: random}}\n")
    monkeypatch.setattr(runner, "begin", lambda run, group: begin(run, group, 0.1))
    monkeypatch.setattr(study_command, "SECONDS_FOR_THE_DEAD", 0.1)
    folder = finished.parent / "out" / "runs" / "absent-seed0"
    before = (folder / RECORD).read_text()
    with locked(folder):
        assert main(["study", str(finished), "--quiet", "--force"]) == 1
        assert "arm absent-seed0 failed" in (error := capsys.readouterr().err) and "process that still does" in error
        assert main(["study", str(finished), "--arm", "absent", "--force"]) == 1
        assert "process that still does" in capsys.readouterr().err
        assert (folder / RECORD).read_text() == before and (folder / directory.MEASUREMENT).exists()
    assert {r["arm"] for r in table(finished)} == {"fixed"}, "the report is there all the same"


def test_an_arm_that_was_finished_while_its_folder_was_waited_for_is_kept(finished):
    run = plan(load_study(finished))[0]
    assert begin(run, "group") is None and run.status() == "finished"


@pytest.mark.parametrize("forked", [True, False])
def test_a_killed_study_takes_its_arms_along(study, forked):
    config = study.parent / "run.yaml"
    config.write_text(config.read_text().replace("max_steps: 10", "max_steps: 200000"))
    runs = plan(load_study(study))
    code = "import sys; from sinkbed.train.study.arms import ArmRun; from sinkbed.train.cli.main import main; "
    code += "" if forked else "ArmRun.can_be_forked = False; "
    code += f"sys.exit(main(['study', {str(study)!r}, '--quiet']))"
    with subprocess.Popen([sys.executable, "-c", code], env={**os.environ, **environment()}) as process:
        end = time.monotonic() + 120
        while not all(r.resumable() for r in runs) and time.monotonic() < end and process.poll() is None:
            time.sleep(0.05)
        process.kill()
    for run in runs:
        hold(run.folder, 10).close()  # raises where a process is left that writes
    assert [r.status() for r in runs] == ["interrupted", "interrupted"]


@pytest.mark.parametrize(
    ("error", "told"),
    [(OSError(11, "no process can be made"), "[Errno 11] no process can be made"), (EOFError(), "EOFError")],
)
def test_what_hinders_an_arm_outside_its_process_is_that_arms_failure(study, monkeypatch, capsys, error, told):
    class Refused(runner.FitProcess):
        def __init__(self, arguments, log, variables, *, fork):
            if "absent" in str(log):
                raise error
            super().__init__(arguments, log, variables, fork=fork)

    monkeypatch.setattr(runner, "FitProcess", Refused)
    assert main(["study", str(study), "--quiet"]) == 1
    assert f"arm absent-seed0 failed: {told}" in capsys.readouterr().err
    assert {r["arm"] for r in table(study)} == {"fixed"}


def test_arms_measured_in_different_modes_make_a_report(study):
    (study.parent / "none.yaml").write_text(
        "data: {strategy: {first_token: none}}\nmeasure: {modes: [text], live_modes: [as_trained]}\n"
    )
    assert main(["study", str(study), "--quiet"]) == 0
    assert [(r["arm"], r["mode"]) for r in table(study)][-1] == ("absent", "text")


def test_a_missing_study_is_named(capsys):
    assert main(["study", "nowhere.yaml"]) == 1
    assert "nowhere.yaml" in capsys.readouterr().err


def test_the_shipped_studies_name_files_that_exist():

    shipped = list((ROOT / "configs" / "study").glob("*.yaml"))
    assert shipped
    for path in shipped:
        assert plan(load_study(path))


def test_a_terminated_study_has_its_arms_save_and_goes_on_later(study):
    """Also in the background of a shell script, where SIGINT is ignored."""
    config = study.parent / "run.yaml"
    config.write_text(config.read_text().replace("max_steps: 10", "max_steps: 2000"))
    runs = plan(load_study(study))
    command = [sys.executable, "-m", "sinkbed", "study", str(study), "--quiet"]

    def ignore_interrupts():
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    with subprocess.Popen(
        command, preexec_fn=ignore_interrupts, env={**os.environ, **environment()}, stderr=subprocess.PIPE
    ) as process:
        end = time.monotonic() + 120
        while not all(r.resumable() for r in runs) and time.monotonic() < end and process.poll() is None:
            time.sleep(0.05)
        process.terminate()
        assert process.wait(60) == 130
    assert [r.status() for r in runs] == ["interrupted", "interrupted"], "neither failed nor finished"
    for run in runs:
        directory.lock(run.folder).close()  # raises where a process is left that writes
        saved = int(directory.newest_checkpoint(run.folder).stem.removeprefix("step-"))
        assert f"stopped at step {saved}" in (run.folder / LOG).read_text()


def test_an_arm_whose_process_is_killed_fails_alone(study, monkeypatch, capsys):
    class Killed(runner.FitProcess):
        def __init__(self, arguments, log, variables, *, fork):
            super().__init__(arguments, log, variables, fork=fork)
            if "absent" in str(log):
                os.kill(self._forked.pid, signal.SIGKILL)

    monkeypatch.setattr(runner, "FitProcess", Killed)
    assert main(["study", str(study), "--quiet"]) == 1
    assert "arm absent-seed0 failed: exit status -9" in capsys.readouterr().err
    assert [r.status() for r in plan(load_study(study))] == ["finished", "failed"]


def test_an_arm_of_several_devices_is_a_command_of_its_own(study, monkeypatch):
    """Lightning's launcher repeats the command line, which a forked process does not have."""
    (study.parent / "none.yaml").write_text(
        "data: {strategy: {first_token: none}}\ntrainer: {devices: 2, strategy: ddp}\n"
    )
    forked = {}

    class Noted(runner.FitProcess):
        def __init__(self, arguments, log, variables, *, fork):
            forked[log.parent.name] = fork
            super().__init__(arguments, log, variables, fork=fork)

    monkeypatch.setattr(runner, "FitProcess", Noted)
    assert main(["study", str(study), "--quiet"]) == 0
    assert forked == {"fixed-seed0": True, "absent-seed0": False}


def test_settings_that_decide_nothing_make_no_other_arm(finished):
    config = finished.parent / "run.yaml"
    text = config.read_text().replace("checkpoint_every: 4", "checkpoint_every: 7\nwandb: {project: mine}")
    config.write_text(text.replace("  batch_size: 4", "  batch_size: 4\n  workers: 1"))
    runs = plan(load_study(finished))
    assert runs[0].config["data"]["workers"] == 1 and runs[0].config["checkpoint_every"] == 7
    assert [r.status() for r in runs] == ["finished", "finished"]
    config.write_text(text.replace("  batch_size: 4", "  batch_size: 4\n  micro_batch_size: 2"))
    assert [r.status() for r in plan(load_study(finished))] == ["other", "other"], "it rounds otherwise"


def test_a_name_that_yaml_reads_as_something_else_is_a_name(study):
    study.write_text(
        study.read_text().replace("  absent: [none.yaml]", '  "on": []\n  "0.5": []\n  "1e-2": [none.yaml]')
    )
    assert main(["study", str(study), "--quiet"]) == 0
    assert {r["arm"] for r in table(study)} == {"fixed", "on", "0.5", "1e-2"}


def test_an_arm_has_as_many_threads_as_it_is_for_cores(study):
    config = study.parent / "run.yaml"
    config.write_text(re.sub("^threads:.*\n", "", config.read_text(), flags=re.M))
    assert {r.config["threads"] for r in plan(load_study(study))} == {1}
    study.write_text(study.read_text() + "cpus: 3\n")
    assert {r.config["threads"] for r in plan(load_study(study))} == {3}
    config.write_text(config.read_text() + "threads: 2\n")
    assert {r.config["threads"] for r in plan(load_study(study))} == {2}


def test_a_report_keeps_seeds_that_the_file_does_not_name_and_says_what_is_missing(finished, capsys):
    assert main(["study", str(finished), "--quiet", "--seeds", "1"]) == 0
    assert {r["seed"] for r in table(finished)} == {"0", "1"}
    assert main(["report", str(finished)]) == 0
    assert {r["seed"] for r in table(finished)} == {"0", "1"}
    report = finished.parent / "out" / "report"
    assert "Not in it" not in (report / "table.md").read_text() and not (report / "effects.csv").exists()
    (report / "effects.csv").write_text("of effects that the file has no more\n")
    (finished.parent / "out" / "runs" / "absent-seed1" / directory.MEASUREMENT).unlink()
    assert main(["report", str(finished)]) == 0
    for name in ("table.md", "index.html"):
        text = (report / name).read_text()
        assert "Not in it: absent-seed1 (interrupted)." in text and "(of fewer: absent 0)" in text
    assert not (report / "effects.csv").exists()
    assert main(["report", str(finished), "--seeds", "1"]) == 0
    assert {r["seed"] for r in table(finished)} == {"1"}


def test_preparing_is_waited_for_and_never_forced(study, monkeypatch, capsys):
    asked = []

    def prepare(command, argv):
        asked.append(argv)
        if len(asked) < 3:
            raise BlockingIOError(11, "another process is preparing it")
        return 0

    monkeypatch.setattr("sinkbed.train.cli.prepare.run", prepare)
    monkeypatch.setattr(study_command, "SECONDS_BETWEEN_LOOKS", 0.01)
    (study.parent / "data.yaml").write_text("out: unused\n")
    study.write_text(study.read_text() + "prepare: data.yaml\n")
    assert main(["study", str(study), "--quiet", "--force"]) == 0
    assert asked == [["--config", str(study.parent / "data.yaml"), "--quiet"]] * 3
    assert capsys.readouterr().out.count("waiting: another process is preparing it") == 1
