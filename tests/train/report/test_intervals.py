"""Intervals, paired differences, verdicts and areas, against figures known otherwise."""

import itertools
import math

import numpy as np
import pytest

from sinkbed.train.report.intervals import Interval, area, paired, seeds_for, t_quantile, verdict


@pytest.mark.parametrize(
    ("freedom", "expected"),
    [(1, 12.706205), (2, 4.302653), (9, 2.262157), (30, 2.042272), (31, 2.0395134), (35, 2.0301079), (100, 1.9839715)],
)
def test_quantiles_are_those_of_students_t(freedom, expected):
    assert t_quantile(freedom) == pytest.approx(expected, abs=6e-5 if freedom <= 30 else 5e-6)


def test_quantiles_fall_towards_the_normals():
    values = [t_quantile(n) for n in range(1, 200)]
    assert all(a > b for a, b in itertools.pairwise(values)) and 1.959964 < values[-1] < 1.973
    with pytest.raises(ValueError, match="at least 1 degree"):
        t_quantile(0)


def test_the_interval_of_a_mean_holds_it_as_often_as_it_says():
    draws = np.random.default_rng(0).normal(3.0, 2.0, size=(4000, 3))
    intervals = [Interval.of(row.tolist()) for row in draws]
    assert np.mean([i.low <= 3.0 <= i.high for i in intervals]) == pytest.approx(0.95, abs=0.015)


def test_one_run_has_no_interval_and_exceeds_nothing():
    one = Interval.of([5.0])
    assert (one.mean, one.count) == (5.0, 1) and math.isnan(one.half) and not one.exceeds_noise()
    with pytest.raises(ValueError, match="at least one value"):
        Interval.of([])


def test_the_number_of_seeds_that_a_width_takes():
    """Deviation 1: with 4, 10 and 30 seeds the half-widths are 1.591, 0.7154 and 0.3734 (tables of Student's t)."""
    deviation_one = Interval.of([-1.0, 0.0, 1.0])
    for count, half in ((4, 1.5913), (10, 0.71537), (30, 0.37342)):
        assert seeds_for(1.001 * half, deviation_one) == count and seeds_for(0.999 * half, deviation_one) == count + 1
    assert seeds_for(1, Interval.of([2.0, 2.0])) == 2, "what does not vary"
    assert seeds_for(1e-6, deviation_one) == pytest.approx(1.959964e6**2, rel=1e-6), "at once"


def test_pairing_by_seed_sees_through_what_seeds_share():
    """Seeds differ by tens, arms by one: only the differences of the same seeds show it."""
    shared = {0: 10.0, 1: 50.0, 2: 90.0}
    ours = {seed: value + 1 + 0.1 * seed for seed, value in shared.items()}
    difference = paired(ours, shared)
    assert difference.mean == pytest.approx(1.1) and difference.exceeds_noise()
    assert paired({0: 1.0, 7: 5.0}, {0: 0.5, 3: 9.0}) == Interval(0.5, pytest.approx(math.nan, nan_ok=True), 1)
    assert paired({1: 1.0}, {2: 1.0}) is None


@pytest.mark.parametrize(
    ("values", "expected", "tolerance", "name"),
    [
        ([4.0, 5.0, 6.0], "up", 0, "reproduced"),
        ([4.0, 5.0, 6.0], "down", 0, "not reproduced"),
        ([-4.0, -5.0, -6.0], "down", 0, "reproduced"),
        ([-1.0, 5.0, 6.0], "up", 0, "within noise"),
        ([-1.0, 5.0, 6.0], "down", 0, "within noise"),
        ([0.01, -0.01, 0.0], "none", 0.05, "reproduced"),
        ([4.0, 5.0, 6.0], "none", 1.0, "not reproduced"),
        ([4.0, 5.0, 6.0], "none", 4.0, "within noise"),
        ([4.0, 5.0, 6.0], "none", 8.0, "reproduced"),
        ([4.0], "up", 0, "one run: as expected"),
        ([4.0], "down", 0, "one run: not as expected"),
        ([0.0], "up", 0, "one run: not as expected"),
        ([0.04], "none", 0.05, "one run: as expected"),
    ],
)
def test_a_verdict_needs_the_whole_interval(values, expected, tolerance, name):
    assert verdict(Interval.of(values), expected, tolerance) == name


def test_without_a_difference_there_is_no_verdict():
    assert verdict(None, "up") == "not measured"


def test_the_area_is_a_mean_over_log_tokens():
    assert area([(10, 7.0), (1000, 7.0)]) == pytest.approx(7.0)
    assert area([(0, 99.0), (1, 0.0), (10, 10.0), (100, 10.0)]) == pytest.approx(7.5), "0 tokens have no logarithm"
    early, late = area([(1, 0), (10, 10), (1000, 10)]), area([(1, 0), (100, 0), (1000, 10)])
    assert early > late
    assert area([(0, 1.0), (5, 1.0)]) is None and area([]) is None
    assert area([(20, 1.0), (1000, 1.0)]) is None, "nothing is known of the first half of the stretch"


def test_the_area_does_not_depend_on_where_the_first_measurements_were():
    """Of the last hundredfold of tokens, whatever was measured before it."""
    line = [(10.0**k, 10.0 * k) for k in range(-3, 4)]
    assert area(line) == area([(0, 0.0), *line]) == area(line[3:]) == pytest.approx(20.0)
    assert area([(10**0.5, 5.0), *line[4:]]) == pytest.approx(20.0), "where the stretch begins is between two points"
    assert area([(0, 7.0), (100, 7.0), (1000, 7.0)]) == pytest.approx(7.0), "before the first step there is step 0"
