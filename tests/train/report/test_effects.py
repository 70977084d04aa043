"""Expected effects against results made up for the purpose, and the tables that say what became of them."""

import csv
import dataclasses
import io

import pyarrow.parquet as pq
import pytest
from matplotlib.figure import Figure

from sinkbed.data.pack.strategy import Strategy
from sinkbed.data.prepare.recipe import texts_digest
from sinkbed.plain_text import csv_of
from sinkbed.train.report.effects import check, counts, explanation, figure
from sinkbed.train.report.pictures import pictures
from sinkbed.train.report.result import Result
from sinkbed.train.report.study import apart
from sinkbed.train.report.tables import answer, by_mode, caption, parquet, rows_of, sections, summary
from sinkbed.train.study.file import Effect


def result(arm, seed, rate, loss, *, gap=1.0, onset=None, first_token="bos", documents="same", placed=None, texts=None):
    """A run with one layer of one head."""

    def mode(rate, loss):
        maps = {eps: [[rate]] for eps in ("0.2", "0.3", "0.5", "0.8")}
        return {
            "rate": maps, "rate_full": maps, "mass": [[rate / 100]], "alpha": [[rate / 100]], "loss": loss,
            "bits_per_byte": loss, "documents": 10, "tokens": 500,
            "rate_placed": None if placed is None else {"0.3": [[placed]]},
        }  # fmt: skip

    points = [{"step": s, "train/tokens": 10**s, "sink/rate_eps0.3/bos": rate * s / 3} for s in range(4)]
    final = {
        "modes": {"bos": mode(rate, loss), "text": mode(rate / 10, loss + gap)},
        "onset_tokens": onset, "tokens": 1000, "parameters": 7, "sink_tokens": 64,
    }  # fmt: skip
    strategy = {**dataclasses.asdict(Strategy()), "first_token": first_token}
    return Result(arm, seed, strategy, 128, points, final, documents, texts or documents)


def study(seeds=(0, 1, 2), documents="same"):
    """`fixed` has 20 points more than `none` under every seed, which shift both by tens."""
    fixed = [result("fixed", s, 30 + 15 * s + 0.1 * s, 3.0 + s, gap=1.5, onset=200 + s) for s in seeds]
    none = [result("none", s, 10 + 15 * s, 3.0 + s, gap=0.01, first_token="none", documents=documents) for s in seeds]
    return fixed + none


def effect(**keys):
    return Effect(
        **{"name": "E", "metric": "sink_rate_0.3", "arm": "fixed", "against": "none", "expected": "up", "source": "S"}
        | keys
    )


@pytest.mark.parametrize(
    ("keys", "verdict"),
    [
        ({}, "reproduced"),
        ({"expected": "down"}, "not reproduced"),
        ({"metric": "loss", "expected": "none", "tolerance": 0.01}, "reproduced"),
        ({"metric": "loss_gap", "mode": "text"}, "reproduced"),
        ({"against": None, "against_mode": "text", "metric": "loss", "expected": "down"}, "reproduced"),
        ({"metric": "onset_tokens", "expected": "down"}, "not reached by all"),
        ({"mode": "as_trained"}, "not measured"),
        ({"metric": "sink_rate_area"}, "reproduced"),
        ({"metric": "sink_rate_peak"}, "reproduced"),
        ({"metric": "sink_rate_deep"}, "not measured"),
    ],
)
def test_effects_are_judged_by_differences_of_the_same_seeds(keys, verdict):
    [outcome] = check(study(), [effect(**keys)], {})
    assert outcome.verdict == verdict


def test_rates_of_a_curve_and_of_deep_layers():
    run = result("fixed", 0, 30.0, 3.0)
    assert figure(run, "sink_rate_peak", "bos") == 30.0 and figure(run, "sink_rate_peak", "text") is None
    run.points.extend({"train/tokens": rate, "sink/rate_deep_eps0.3/bos": rate} for rate in (4.0, 12.0, 7.0))
    assert figure(run, "sink_rate_deep_peak", "bos") == 12.0
    run.final["modes"]["bos"]["rate"]["0.3"] = [[100.0, 100.0], [100.0, 100.0], [10.0, 20.0], [30.0, 0.0]]
    assert figure(run, "sink_rate_deep", "bos") == 15.0


@pytest.fixture
def mixed():
    """A run of two layers whose mixing was measured at 20 and 30 tokens, its sink at 30 and 40."""
    run = result("fixed", 0, 30.0, 3.0)
    run.final["modes"]["bos"]["mass"] = [[0.1], [0.2]]
    run.points.extend(
        {
            "train/tokens": tokens, "mixing/perturbation/bos": tokens / 10,
            "mixing/effective_rank/layer0/bos": 7.0, "mixing/effective_rank/layer1/bos": tokens,
        }
        for tokens in (20, 30)
    )  # fmt: skip
    run.points.extend({"train/tokens": tokens, "sink/mass/bos": tokens / 100} for tokens in (30, 40))
    return run


def test_figures_of_mixing_are_the_last_ones_of_the_last_layer(mixed):
    assert figure(mixed, "perturbation", "bos") == 3.0 and figure(mixed, "perturbation", "text") is None
    assert figure(mixed, "effective_rank", "bos") == 30 and figure(mixed, "jacobian", "bos") is None


def test_mixing_is_drawn_against_the_sink_of_the_same_point(mixed):
    [picture] = [p for p in pictures([mixed], [mixed]) if p.name == "mixing_sink"]
    assert [panel.title for panel in picture.panels] == ["perturbation spread", "effective rank"]
    axis = Figure().subplots()
    picture.panels[0].draw(axis)
    legend, marks = axis.lines
    assert legend.get_label() == "fixed" and not len(legend.get_xdata())
    assert [*zip(*marks.get_data(), strict=True)] == [(0.3, 3.0)]


def test_the_excess_is_over_the_mass_of_random_weights():
    run = result("fixed", 0, 30.0, 3.0)
    masses = [{"train/tokens": tokens, "sink/mass/bos": mass} for tokens, mass in ((0, 0.06), (9, 0.5), (18, 0.36))]
    run.points[:] = masses
    assert figure(run, "sink_mass_excess", "bos") == pytest.approx(0.30)
    run.points[:] = masses[1:]
    assert figure(run, "sink_mass_excess", "bos") is None, "a fork begins later"


def test_an_interval_may_be_wider_than_it_should_be():
    narrow, wide, absent = check(
        study(), [effect(half_width=0.3), effect(half_width=0.1), effect(half_width=9, mode="as_trained")], {}
    )
    assert (narrow.too_wide, wide.too_wide) == (False, True)
    assert not absent.too_wide, "no number of seeds would make it narrower"


def test_arms_by_themselves_would_not_have_shown_it():
    [outcome] = check(study(), [effect()], {})
    assert outcome.arm.low < outcome.against.mean < outcome.arm.high, "the arms' own intervals overlap"
    assert outcome.difference.mean == pytest.approx(20.1) and outcome.difference.exceeds_noise()


def test_other_documents_are_no_pairs():
    [outcome] = check(study(documents="others"), [effect()], {})
    assert outcome.difference is None and outcome.verdict == "not measured"
    assert "Differences of arms" in [s.title for s in sections(study(), [])]
    assert all(not s.rows for s in sections(study(documents="others"), []) if s.title == "Differences of arms")


def test_another_tokenizer_of_the_same_texts_has_other_losses_and_comparable_sinks():
    runs = [
        *(result("large", s, 30 + s, 3.0, documents="4,096", texts="same") for s in range(3)),
        *(result("small", s, 10 + s, 2.0, documents="512", texts="same") for s in range(3)),
    ]
    effects = [effect(arm="large", against="small", metric=metric) for metric in ("sink_rate_0.3", "loss")]
    rate, loss = check(runs, effects, {})
    assert rate.difference.mean == pytest.approx(20) and loss.difference is None


def test_texts_are_told_by_their_source_and_by_what_each_split_holds():
    def manifest(vocab_size, documents, **source):
        recipe = {"source": {"kind": "text", **source}, "identity": {}, "tokenizer": {"vocab_size": vocab_size}}
        return {"recipe": recipe, "splits": {"train": {"documents": documents, "bytes": 10, "shards": []}}}

    assert texts_digest(manifest(512, 3)) == texts_digest(manifest(4096, 3))
    assert len({texts_digest(each) for each in (manifest(5, 3), manifest(5, 4), manifest(5, 3, column="b"))}) == 3
    for damaged in ([], {"recipe": None}, {"recipe": {"identity": None}}, {"recipe": "text", "splits": {}}):
        with pytest.raises(ValueError, match="expected a manifest of a token store"):
            texts_digest(damaged)


def test_the_published_figures_stand_beside_ours_with_their_difference():
    published = {"fixed": {"bos": [90.84, 2.69]}, "none": {"bos": [65.1, None]}}
    rate, loss = check(study(), [effect(), effect(metric="loss", expected="none", tolerance=1)], published)
    assert rate.columns()["published"] == "90.84 against 65.10 (+25.74)"
    assert loss.published is None, "a paper may give one of the two figures only"
    assert rate.columns()["difference"] == "+20.1 ± 0.2"
    rows = summary(study(), published).rows
    assert [row[-1] for row in rows] == ["90.84 / 2.69", "65.10 / –"]


def test_that_there_is_one_run_is_said_beside_its_verdict():
    once = study(seeds=(4,))
    [outcome] = check(once, [effect()], {})
    assert (outcome.verdict, outcome.finding) == ("one run: as expected", "as expected")
    assert outcome.columns()["difference"] == "+20.4" and outcome.columns()["verdict"] == "one run: as expected"
    assert (
        explanation(counts([outcome])) == "One run an arm: the side that each difference lies on, which is no verdict."
    )
    assert "Comparisons made: 1;" in explanation(counts([outcome, *check(study(), [effect()], {})]))
    tables = [summary(once, {}), *by_mode(once), *sections(once, [outcome])]
    assert not any("±" in cell for table in tables for row in table.rows for cell in row)
    assert "no interval" in caption(once) and answer(once, []).count("One run an arm") == 1
    assert caption(once, "A paper").endswith(". Published: A paper."), "sentences end, also those of a study file"
    assert [table.title for table in sections(once, [outcome])] == ["Expected effects", "When the sink forms"]
    assert "figures without ±" not in caption(study())
    assert "figures without ± are of one run" in caption([*study(), result("once", 0, 1, 1)])


def test_the_answer_names_the_extremes_and_whether_they_differ():
    outcomes = check(study(), [effect(), effect(expected="down")], {})
    assert answer(study(), outcomes) == (
        "With BOS + text as input, the sink rate goes from 25.0 ± 37.3 % (none) to 45.1 ± 37.5 % (fixed), a difference "
        "of 20.1 ± 0.2. On the text alone it is 4.5 ± 3.8 % in fixed, which has most. In fixed, where it costs most, "
        "reading the text alone changes the loss by +1.500 ± 0.000 nats per token. 2 expected effects: 1 reproduced, 1 "
        "not reproduced."
    )
    more = [*study(), *(result("third", seed, 30 + 15 * seed, 3.0) for seed in range(3))]
    assert "± 0.2 (the extremes of 3 arms, so chosen)" in answer(more, [])
    same = [result(arm, seed, 30 + (seed if arm == "a" else -seed), 3.0) for arm in "ab" for seed in (-1, 0, 2)]
    assert "within the noise of 3 seeds" in answer(same, [])
    alone = answer([result("a", 0, 30, 3.0)], [])
    assert alone.startswith("With BOS + text as input, the sink rate is 30.0 %. On the text alone it is 3.0 %. Reading")


def test_a_table_by_input_has_a_row_an_arm():
    rate, *_, gap = by_mode(study())
    assert (rate.title, rate.header) == ("Sink rate %", ("arm", "BOS + text", "text"))
    assert [row[0] for row in rate.rows] == ["fixed", "none"] and rate.rows[1][2] == "2.5 ± 3.7"
    assert gap.header == ("arm", "text"), "the reference has no gap"


def test_the_caption_spans_the_runs():
    long = result("long", 0, 1.0, 3.0)
    long.final["modes"]["bos"]["tokens"] = 700
    assert "the same targets in every mode, 500 to 700 of them depending on the arm" in caption([*study(), long])


def test_what_keeps_runs_from_being_compared_is_said():
    longer, other = result("longer", 0, 1.0, 3.0), result("other", 0, 1.0, 3.0, texts="others")
    longer.final["sink_tokens"] = 32
    assert apart(study()) == []
    [lengths] = apart([*study(), longer])
    assert lengths.endswith("which differ, so they do not compare: 32 in longer; 64 in fixed, none.")
    [texts] = apart([*study(), other])
    assert texts == "Runs are of different texts, so losses and sinks do not compare: fixed, none against other."


def test_onsets_are_of_the_runs_that_reached_one():
    late = [result("late", s, 1.0, 3.0, onset=None if s else 5000) for s in range(3)]
    [arms] = [s for s in sections([*study(), *late], []) if s.title == "When the sink forms"]
    by_arm = {row[0]: row for row in arms.rows}
    assert by_arm["late"][-2:] == ("5", "1 of 3")
    assert by_arm["none"][-2:] == ("not seen", "0 of 3")
    assert by_arm["fixed"][-1] == "3 of 3"


def test_an_onset_is_said_of_the_first_live_mode():
    run = result("a", 0, 30.0, 3.0, onset=500)
    run.points[:] = [{"train/tokens": 9, "sink/rate_eps0.3/text": 1.0, "sink/rate_eps0.3/bos": 2.0}]
    [arms] = [s for s in sections([run], []) if s.title == "When the sink forms"]
    assert [(row[1], row[-1]) for row in arms.rows] == [("text", "1 of 1"), ("BOS + text", "")]


def test_a_token_placed_at_position_0_is_measured_at_key_0():
    assert figure(result("a", 0, 30, 3, placed=70), "sink_rate_placed", "bos") == 70
    assert figure(result("a", 0, 30, 3), "sink_rate_placed", "bos") == 30
    for other in ("none", "random", ["none", "bos"], ["bos", "bos"]):
        assert figure(result("a", 0, 30, 3, first_token=other), "sink_rate_placed", "bos") is None
    assert figure(result("a", 0, 30, 3), "sink_rate_placed", "text") is None, "the text places none"


def test_losses_over_other_targets_are_not_compared():
    results = study()
    for r in results:
        r.final["modes"]["bos"]["tokens"] += r.arm == "none"
    metrics = ("loss", "bits_per_byte", "sink_rate_0.3")
    outcomes = check(results, [effect(metric=metric) for metric in metrics], {})
    assert [item.verdict for item in outcomes] == ["not measured", "not measured", "reproduced"]
    [pairs] = [s for s in sections(results, []) if s.title == "Differences of arms"]
    [cells] = pairs.rows
    assert dict(zip(pairs.header, cells, strict=True))["loss, BOS + text"] == "" and "other targets" in pairs.note
    assert "*" in cells[2]


def test_sinks_over_other_queries_and_gaps_against_another_mode_are_not_compared():
    runs = study()
    for run in runs[:3]:
        run.final["sink_tokens"] = 8
    assert check(runs, [effect(), effect(metric="loss", mode="text")], {})[0].difference is None
    runs = study()
    for run in runs[:3]:
        run.final["modes"]["as_trained"] = run.final["modes"].pop("bos")
    assert check(runs, [effect(metric="loss_gap", mode="text")], {})[0].difference is None
    assert check(study(), [effect(metric="loss_gap", mode="text")], {})[0].difference is not None


def test_a_reader_learns_how_many_comparisons_there_were_and_what_decided_the_seeds():
    outcomes = check(study(), [effect(), effect(expected="down"), effect(mode="as_trained")], {})
    plain, ruled = (sections(study(), outcomes, most)[0].note for most in (None, 8))
    assert "Comparisons made: 2; where nothing differs, one in twenty leaves 0 out by chance." in plain
    assert "Seeds were added" not in plain
    assert (
        ruled
        == f"{plain} Seeds were added one at a time until every interval was as narrow as its half_width, at most 8."
    )


def test_what_has_no_source_is_not_called_reproduced():
    outcomes = check(study(), [effect(source=""), effect(source="", expected="down")], {})
    assert [item.verdict for item in outcomes] == ["as expected", "not as expected"]


def test_the_caption_says_which_arms_have_fewer_seeds():
    assert "over seeds 0, 1, 2." in caption(study())
    assert "over seeds 0, 1, 2 (of fewer: none 0, 1)." in caption(study()[:-1])


def test_differences_beyond_the_noise_are_marked():
    [pairs] = [s for s in sections(study(), []) if s.title == "Differences of arms"]
    [row] = pairs.rows
    by_column = dict(zip(pairs.header, row, strict=True))
    assert by_column["sink rate %, BOS + text"] == "+20.1 ± 0.2 *"
    assert by_column["loss, BOS + text"] == "0.000 ± 0.000"


def test_a_table_that_all_arms_share_a_strategy_in_leaves_it_out():
    header = summary([result("a", 0, 1, 1), result("b", 0, 2, 2)], {}).header
    assert header[:2] == ("arm", "sink rate %, BOS + text")
    assert "All arms: mask causal; BOS fixed at position 0." in caption([result("a", 0, 1, 1), result("b", 0, 2, 2)])
    assert summary(study(), {}).header[:3] == ("arm", "mask in training", "BOS in training")


def test_all_numbers_are_in_files():
    results = study()
    outcomes = check(results, [effect()], {})
    record = outcomes[0].record()
    [row] = csv.DictReader(io.StringIO(csv_of([record], tuple(record))))
    assert (row["verdict"], row["seeds"], float(row["difference_mean"])) == ("reproduced", "3", pytest.approx(20.1))
    rows = rows_of(results)
    files = {name: io.BytesIO(content) for name, content in parquet(results, rows).items()}
    assert pq.read_table(files["table.parquet"]).to_pylist() == rows
    curves = pq.read_table(files["curves.parquet"]).to_pydict()
    assert len(curves["arm"]) == 6 * 4 and curves["sink/rate_eps0.3/bos"][3] == pytest.approx(30)


def test_an_onset_that_some_runs_have_not_is_no_difference():
    """Of the seeds that have one the arm would be earlier, which they were chosen by."""
    often = [result("fixed", s, 30, 3, onset=100 + s if s < 2 else None) for s in range(5)]
    always = [result("none", s, 30, 3, onset=200 + s) for s in range(5)]
    earlier = effect(metric="onset_tokens", expected="down")
    [outcome] = check([*often, *always], [earlier], {})
    assert (outcome.finding, outcome.difference) == ("not reached by all", None)
    assert explanation(counts([outcome])).startswith("Not reached by all"), "and no comparison"
    reached = [result("fixed", s, 30, 3, onset=100 + s) for s in range(5)]
    assert check([*reached, *always], [earlier], {})[0].finding == "reproduced"


def test_a_difference_of_one_seed_is_no_verdict_among_others():
    more = [result("more", 0, 90, 3)]
    outcomes = check([*study(), *more], [effect(), effect(arm="more")], {})
    assert [item.finding for item in outcomes] == ["reproduced", "one run"]
    assert "One run: the arms have one seed in common" in explanation(counts(outcomes))
