"""Intervals: against published values, closed forms, and how often they hold the truth."""

import numpy as np
import pytest

from peft_longlora.eval.report.statistics import Ratios, difference, newcombe, wilson


def test_wilson_is_the_published_formula():
    # Wilson 1927; the values are those of R's binom::binom.confint(method = "wilson")
    assert wilson(0, 10, 0.95) == pytest.approx((0.0, 0.2775328), abs=1e-6)
    assert all(wilson(0, n, 0.95)[0] == 0 and wilson(n, n, 0.95)[1] == 1 for n in range(1, 200))
    assert wilson(10, 10, 0.95) == pytest.approx((0.7224672, 1.0), abs=1e-6)
    assert wilson(8, 10, 0.95) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)


def test_successes_get_wilsons_interval_and_other_scores_a_bootstrap():
    successes = Ratios([(1, 1)] * 8 + [(0, 1)] * 2)
    assert successes.value() == 0.8
    assert successes.interval(0, 100, 0.95) == pytest.approx(wilson(8, 10, 0.95))
    scores = Ratios([(0.5, 1), (0.25, 1), (1, 1)])
    assert scores.interval(0, 1000, 0.95) != pytest.approx(wilson(1, 3, 0.95))


def test_partial_scores_that_are_all_nothing_or_all_full_are_not_certain():
    assert Ratios([(0, 5)] * 10).interval(0, 100, 0.95) == pytest.approx(wilson(0, 10, 0.95))
    assert Ratios([(5, 5)] * 10).interval(0, 100, 0.95) == pytest.approx(wilson(10, 10, 0.95))


def test_bootstrap_of_a_mean_has_the_spread_that_theory_says():
    values = np.random.default_rng(1).normal(5, 2, 400)
    draws = Ratios(np.stack([values, np.ones(400)], 1)).replicates(0, 4000)
    assert draws.mean() == pytest.approx(values.mean(), abs=0.01)
    assert draws.std() == pytest.approx(values.std() / np.sqrt(400), rel=0.05)


def test_perplexity_weighs_documents_by_their_tokens():
    ratios = Ratios([(30.0, 10), (200.0, 100)], exponential=True)
    assert ratios.value() == pytest.approx(np.exp(230 / 110))
    low, high = ratios.interval(0, 1000, 0.95)
    # with two documents a replicate is one of three: twice the one, twice the other, or both
    assert (low, high) == pytest.approx((np.exp(2), np.exp(3)))


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(0)
    held = 0
    for i in range(200):
        counts = rng.integers(50, 150, 40)
        sums = counts * rng.normal(2.0, 0.3, 40)
        low, high = Ratios(np.stack([sums, counts], 1), exponential=True).interval(i, 400, 0.9)
        held += low < np.exp(2) < high
    assert 165 <= held <= 195  # 90% of 200, and three standard deviations


def test_one_unit_has_no_interval():
    assert Ratios([(3, 2)]).interval(0, 100, 0.95) == (None, None)


def test_pairing_takes_out_what_documents_have_in_common():
    """All documents 0.1 nats better: certain when paired, drowned by the spread between documents when not."""
    losses = np.random.default_rng(0).normal(3, 1, 30)
    first, second = (Ratios(np.stack([100 * x, np.full(30, 100)], 1), exponential=True) for x in (losses, losses - 0.1))
    value, low, high = difference(first, second, True, 0, 1000, 0.95)
    assert low < value < high < 0
    _, low, high = difference(first, second, False, 0, 1000, 0.95)
    assert low < 0 < high


def test_a_difference_of_all_right_and_all_wrong_is_not_certain():
    """Newcombe 1998, Statistics in Medicine 17:873, table II, method 10."""
    published = {
        (48, 80, 56, 70): (0.0524, 0.3339),
        (3, 10, 9, 10): (0.1705, 0.8090),
        (0, 29, 5, 56): (-0.0381, 0.1926),
    }
    for (x, m, y, n), interval in published.items():
        pair = [(k / size, *wilson(k, size, 0.95)) for k, size in ((x, m), (y, n))]
        assert newcombe(*pair) == pytest.approx(interval, abs=1e-4)
    wrong, right = Ratios([(0, 1)] * 20), Ratios([(1, 1)] * 10)
    assert difference(wrong, right, False, 0, 100, 0.95) == pytest.approx((1, 0.6791, 1), abs=1e-4)
    assert difference(right, wrong, False, 0, 100, 0.95) == pytest.approx((-1, -1, -0.6791), abs=1e-4)
    value, low, high = difference(right, right, True, 0, 100, 0.95)
    assert value == 0 and low == -high < -0.2, "ten of ten twice may still be different"
    mixed = Ratios([(1, 1)] * 5 + [(0, 1)] * 15)
    value, low, high = difference(wrong, mixed, True, 0, 100, 0.95)
    assert low < value == 0.25 < high


def test_large_numbers_of_documents_are_drawn_in_blocks(monkeypatch):
    from peft_longlora.eval.report import statistics

    ratios = Ratios(np.random.default_rng(0).random((50, 2)))
    whole = ratios.replicates(0, 40)
    monkeypatch.setattr(statistics, "BLOCK", 500)
    assert np.allclose(ratios.replicates(0, 40), whole)
