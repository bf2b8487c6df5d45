"""Intervals: against published values, textbooks and closed forms."""

import numpy as np
import pytest

from peft_longlora.eval.report.statistics import Ratios, difference, newcombe, student, wilson


def test_wilson_is_the_published_formula():
    # Wilson 1927; the values are those of R's binom::binom.confint(method = "wilson")
    assert wilson(0, 10, 0.95) == pytest.approx((0.0, 0.2775328), abs=1e-6)
    assert all(wilson(0, n, 0.95)[0] == 0 and wilson(n, n, 0.95)[1] == 1 for n in range(1, 200))
    assert wilson(10, 10, 0.95) == pytest.approx((0.7224672, 1.0), abs=1e-6)
    assert wilson(8, 10, 0.95) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)


def test_successes_get_wilsons_interval_and_other_scores_students():
    successes = Ratios([(1, 1)] * 8 + [(0, 1)] * 2)
    assert successes.value() == 0.8
    assert successes.interval(0.95) == pytest.approx(wilson(8, 10, 0.95))
    assert Ratios([(1, 1), (0, 1)], is_score=True).interval(0.95) == pytest.approx(wilson(1, 2, 0.95))
    scores = Ratios([(0.5, 1), (0.25, 1), (1, 1)])
    assert scores.interval(0.95) != pytest.approx(wilson(1, 3, 0.95))


def test_partial_scores_that_are_all_nothing_or_all_full_are_not_certain():
    assert Ratios([(0, 5)] * 10).interval(0.95) == pytest.approx(wilson(0, 10, 0.95))
    assert Ratios([(5, 5)] * 10).interval(0.95) == pytest.approx(wilson(10, 10, 0.95))


def test_students_t_is_that_of_tables():
    """Two-sided 95%: Fisher and Yates, Statistical Tables, table III; 99% with 10: 3.169."""
    table = {2: 4.303, 3: 3.182, 4: 2.776, 10: 2.228, 30: 2.042, 120: 1.980, 10**6: 1.960}
    assert {n: round(student(0.95, n), 3) for n in table} == table
    assert round(student(0.99, 10), 3) == 3.169
    # With two degrees of freedom the distribution has a closed form.
    assert student(0.8, 2) == pytest.approx(0.8 * np.sqrt(2 / (1 - 0.8**2)))
    assert student(0.95, 1.5) == pytest.approx(6.016663, rel=1e-5)  # scipy 1.17: t.ppf(0.975, 1.5)


def test_documents_of_one_size_get_the_interval_of_textbooks():
    """Student 1908: the additional hours of sleep of ten patients; R's t.test gives 0.8976775 to 3.7623225."""
    hours = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    ratios = Ratios([(100 * x, 100) for x in hours])
    assert ratios.interval(0.95) == pytest.approx((0.8976775, 3.7623225), abs=1e-6)
    logarithm = Ratios([(100 * x, 100) for x in hours], exponential=True)
    assert np.log(logarithm.interval(0.95)) == pytest.approx((0.8976775, 3.7623225), abs=1e-6)


def test_differences_of_one_size_get_the_intervals_of_textbooks():
    """The same data with the other drug: R's t.test(paired = TRUE) and t.test (Welch), drug 2 less drug 1."""
    first = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    second = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    ours, theirs = (Ratios([(x, 1) for x in hours]) for hours in (first, second))
    assert difference(ours, theirs, True, 0.95) == pytest.approx((1.58, 0.7001142, 2.4598858), abs=1e-6)
    assert difference(ours, theirs, False, 0.95) == pytest.approx((1.58, -0.2054832, 3.3654832), abs=1e-6)


def test_perplexity_weighs_documents_by_their_tokens():
    ratios = Ratios([(30.0, 10), (200.0, 100)], exponential=True)
    assert ratios.value() == pytest.approx(np.exp(230 / 110))


def test_no_interval_of_scores_leaves_zero_to_one():
    """f1 of eight questions, most of them right; Student's interval would end above 1."""
    scores = [(1, 1)] * 6 + [(0.9, 1), (0.3, 1)]
    low, high = Ratios(scores, is_score=True).interval(0.95)
    assert 0 < low < 0.9 and high == 1.0
    assert Ratios(scores).interval(0.95)[1] > 1.0, "a number of another kind may be above 1"
    assert Ratios([(1 - x, 1) for x, _ in scores]).interval(0.95)[0] == 0.0, "but not below 0"


def test_a_count_of_at_most_fifty_is_a_score_of_fifty():
    """Tokens that are right of 50: nothing and everything are not certain, and one token of 50 is not everything."""
    counts = [(50, 1)] * 19 + [(10, 1)]
    plain, found = Ratios(counts).interval(0.95), Ratios(counts, most=50).interval(0.95)
    assert plain[1] > 50 and found == pytest.approx((plain[0], 50))
    for right, expected in ((0, wilson(0, 20, 0.95)), (50, wilson(20, 20, 0.95))):
        found = Ratios([(right, 1)] * 20, most=50)
        assert found.value() == right and found.interval(0.95) == pytest.approx([50 * end for end in expected])
    ones = Ratios([(1, 1)] * 4 + [(0, 1)] * 16, most=50)
    half = 2.0930 * np.std([1] * 4 + [0] * 16, ddof=1) / 20**0.5
    assert ones.interval(0.95) == pytest.approx((0.2 - half, 0.2 + half), abs=1e-4)
    assert Ratios([(3, 1)] * 7, most=50).interval(0.95) == (None, None)
    value, low, high = difference(Ratios([(0, 1)] * 20, most=50), Ratios([(50, 1)] * 20, most=50), True, 0.95)
    assert value == high == 50 and 30 < low < 45
    value, low, high = difference(ones, Ratios([(9, 1)] * 10 + [(0, 1)] * 10, most=50), True, 0.95)
    assert value == pytest.approx(4.3) and 0 < low < value < high < 9


def test_too_few_units_have_no_interval():
    """The reported case: two documents, whose bootstrap was from the one to the other."""
    two = Ratios([(200, 100), (310, 150)], exponential=True)
    assert two.interval(0.95) == (None, None)
    value, low, high = difference(two, Ratios([(190, 100), (300, 150)], exponential=True), True, 0.95)
    assert value < 0 and low is high is None
    # One document of a million tokens beside thirty of ten is no sample of documents either.
    heavy = [(2e6, 1e6), *[(20.0, 10)] * 30]
    assert Ratios(heavy, exponential=True).interval(0.95) == (None, None)
    assert Ratios([(0.5, 1)] * 4 + [(0.25, 1)] * 3, is_score=True).interval(0.95) == (None, None)


def test_one_unit_has_no_interval():
    assert Ratios([(3, 2)]).interval(0.95) == (None, None)


def test_pairing_takes_out_what_documents_have_in_common():
    """All documents 0.1 nats better: certain when paired, drowned by the spread between documents when not."""
    losses = np.random.default_rng(0).normal(3, 1, 30)
    first, second = (Ratios(np.stack([100 * x, np.full(30, 100)], 1), exponential=True) for x in (losses, losses - 0.1))
    value, low, high = difference(first, second, True, 0.95)
    assert low < value < high < 0
    _, low, high = difference(first, second, False, 0.95)
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
    assert difference(wrong, right, False, 0.95) == pytest.approx((1, 0.6791, 1), abs=1e-4)
    assert difference(right, wrong, False, 0.95) == pytest.approx((-1, -1, -0.6791), abs=1e-4)
    value, low, high = difference(right, right, True, 0.95)
    assert value == 0 and low == -high < -0.2, "ten of ten twice may still be different"
    mixed = Ratios([(1, 1)] * 5 + [(0, 1)] * 15)
    value, low, high = difference(wrong, mixed, True, 0.95)
    assert low < value == 0.25 < high
    pair = [(1, 1)] * 5 + [(0, 1)] * 15, [(0, 1)] * 5 + [(1, 1)] * 15
    assert difference(*map(Ratios, pair), False, 0.95)[1:] == pytest.approx(
        newcombe((0.25, *wilson(5, 20, 0.95)), (0.75, *wilson(15, 20, 0.95)))
    )
