"""Values and intervals of ratios over independent units (documents, prompts). Needs only numpy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np

# The fewest units of an interval; with fewer, none is given. From here on Student's holds the truth nearly as often as
# it says (tests/eval/report/test_coverage.py). Scores that are mostly nothing or everything need more.
FEWEST, FEWEST_SCORES = 3, 8

Interval = tuple[float | None, float | None]


class Ratios:
    """A ratio sum(numerators) / sum(denominators) over units, or its exponential (a perplexity).

    Args:
        units: a numerator and a denominator for each unit.
        exponential: whether the ratio is a loss in nats.
        is_score: whether each unit is between nothing and everything right.
        most: everything, if a unit counts what is right (tokens of 50): its values are a score times this.
    """

    def __init__(
        self,
        units: Sequence[Sequence[float]],
        exponential: bool = False,
        is_score: bool = False,
        most: float | None = None,
    ):
        self.sums = np.asarray(units, dtype=np.float64).reshape(-1, 2)
        self.exponential, self.is_score, self.most = exponential, is_score, most

    def value(self) -> float:
        """The ratio over all units."""
        ratio = self._ratio()
        return float(np.exp(ratio) if self.exponential else ratio)

    def interval(self, confidence: float) -> Interval:
        """Wilson's interval for successes out of trials; otherwise Student's t over units, for a perplexity over its
        logarithm.

        It is (None, None) where there are too few units.
        """
        if self.most is not None:
            return times(self.most, self.as_score().interval(confidence))
        if self.are_counts or (self.is_extreme and len(self.sums) > 1):
            return wilson(round(self.value() * len(self.sums)), len(self.sums), confidence)
        if self.are_too_few:
            return None, None
        spread = Spread.of(self.without_each(), self.effective)
        low, high = spread.around(float(self._ratio()), confidence)
        if self.exponential:
            with np.errstate(over="ignore"):
                return float(np.exp(low)), float(np.exp(high))
        if np.all(self.sums >= 0):  # no value of these can be less than 0, and no score more than 1
            low, high = max(low, 0.0), min(high, 1.0) if self.is_score else high
        return low, high

    def as_score(self) -> Ratios:
        """The same as parts of everything."""
        return Ratios(self.sums / [self.most or 1.0, 1.0], is_score=True)

    @property
    def are_counts(self) -> bool:
        """Whether every unit is right or wrong, and there are at least two."""
        numerators, denominators = self.sums.T
        is_count = np.all(denominators == 1) and np.all(np.isin(numerators, (0.0, 1.0)))
        return len(self.sums) > 1 and not self.exponential and bool(is_count)

    @property
    def is_extreme(self) -> bool:
        """Whether nothing is right or nothing is wrong. The units then have no spread, which does not make the value
        certain."""
        numerators, denominators = self.sums.T
        return not self.exponential and bool(np.all(numerators == 0) or np.all(numerators == denominators))

    @property
    def effective(self) -> float:
        """How many units of equal size have the spread of these (Kish); less than their number if some are large."""
        sizes = self.sums[:, 1]
        return float(sizes.sum() ** 2 / (sizes**2).sum()) if sizes.any() else 0.0

    @property
    def are_too_few(self) -> bool:
        """Whether Student's interval would not be what it says."""
        return round(self.effective) < (FEWEST_SCORES if self.is_score else FEWEST)

    def without_each(self) -> np.ndarray:
        """(n,) the ratio, or the loss, of all units but one."""
        numerators, denominators = (self.sums.sum(0) - self.sums).T
        return numerators / denominators

    def _ratio(self) -> np.floating:
        numerator, denominator = self.sums.sum(0)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.divide(numerator, denominator)


@dataclass(frozen=True)
class Spread:
    """The variance of an estimate, and the degrees of freedom of that variance."""

    variance: float
    freedom: float

    @classmethod
    def of(cls, without_each: np.ndarray, effective: float) -> Spread:
        """By the jackknife; of a mean over units of equal size it is the variance of textbooks."""
        n = len(without_each)
        return cls(float((n - 1) ** 2 / n * np.var(without_each, ddof=1)), effective - 1)

    def __add__(self, other: Spread) -> Spread:
        """Of a sum of two independent estimates (Welch and Satterthwaite)."""
        variance = self.variance + other.variance
        squares = self.variance**2 / self.freedom + other.variance**2 / other.freedom
        return Spread(variance, variance**2 / squares if squares else min(self.freedom, other.freedom))

    def around(self, value: float, confidence: float) -> tuple[float, float]:
        """Student's interval around a value."""
        half = student(confidence, self.freedom) * math.sqrt(self.variance)
        return value - half, value + half


@lru_cache(1000)
def student(confidence: float, freedom: float) -> float:
    """Where Student's t with so many degrees of freedom, whole or not, has this probability between -t and t.

    Example: student(0.95, 4) is 2.776. With sqrt(freedom) * tan(angle) for t, the density is a power of a cosine.
    """
    if freedom > 10_000:
        return NormalDist().inv_cdf(0.5 + confidence / 2)
    angles = np.linspace(0, np.pi / 2, 20_001)
    density = np.cos(angles[:-1] + angles[1] / 2) ** (freedom - 1)  # in the middle of each step
    share = np.concatenate([[0], np.cumsum(density)]) / density.sum()
    return math.sqrt(freedom) * math.tan(np.interp(confidence, share, angles))


def times(factor: float, interval: Interval) -> Interval:
    """An interval of a value that is so many times as large."""
    low, high = interval
    return None if low is None else factor * low, None if high is None else factor * high


def around(value: float, standard_error: float, confidence: float) -> tuple[float, float]:
    """The normal interval of a value with a known standard error."""
    half = NormalDist().inv_cdf(0.5 + confidence / 2) * standard_error
    return value - half, value + half


def wilson(successes: int, trials: int, confidence: float) -> tuple[float, float]:
    """Wilson's score interval, which is also right at 0% and 100%.

    Example: wilson(0, 10, 0.95) is (0, 0.2775).
    """
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    p, scale = successes / trials, 1 + z * z / trials
    centre = (p + z * z / (2 * trials)) / scale
    half = z / scale * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    # Both ends are exact there, and rounding would show 2.8e-17.
    return 0.0 if successes == 0 else centre - half, 1.0 if successes == trials else centre + half


def newcombe(first: tuple[float, float, float], second: tuple[float, float, float]) -> tuple[float, float]:
    """The interval of a difference, second - first, of two (value, low, high).

    Example: of (0, 0, 0.1611) and (1, 0.7225, 1), 0 of 20 and 10 of 10 right, it is (0.6791, 1).
    """
    (p, p_low, p_high), (q, q_low, q_high) = first, second
    return q - p - math.hypot(q - q_low, p_high - p), q - p + math.hypot(q_high - q, p - p_low)


def paired_newcombe(first: np.ndarray, second: np.ndarray, confidence: float) -> tuple[float, float]:
    """The interval of a difference of shares, if the same questions were right (1) or wrong (0) twice.

    Newcombe, Statistics in Medicine 17:2635, 1998, method 10: `newcombe`'s, less what the pairs have in common.
    Example: of 40 questions 20 right twice, 12 only the first time, 2 only the second: (-0.4086, -0.0707).
    """
    n, (p, q) = len(first), (first.mean(), second.mean())
    (p_low, p_high), (q_low, q_high) = (wilson(round(x.sum()), n, confidence) for x in (first, second))
    both, one, other = first @ second, first @ (1 - second), (1 - first) @ second
    product = both * (n - both - one - other) - one * other
    if product > 0:
        product = max(product - n / 2, 0.0)
    margins = n**4 * p * (1 - p) * q * (1 - q)
    phi = product / math.sqrt(margins) if margins else 0.0

    def half(below: float, above: float) -> float:
        return math.sqrt(max(below**2 - 2 * phi * below * above + above**2, 0.0))

    value = float(q - p)
    return value - half(q - q_low, p_high - p), value + half(q_high - q, p - p_low)


def difference(
    first: Ratios, second: Ratios, paired: bool, confidence: float
) -> tuple[float, float | None, float | None]:
    """second - first with its interval; paired: row i of both is the same document or prompt.

    Shares of questions that are right or wrong get Newcombe's interval (Statistics in Medicine 17, 1998, method 10 of
    both papers). So does a pair of which one has nothing right or nothing wrong. Others get Student's.
    """
    value = second.value() - first.value()
    if first.most is not None:
        _, *ends = difference(first.as_score(), second.as_score(), paired, confidence)
        return value, *times(first.most, (ends[0], ends[1]))
    if first.are_counts and second.are_counts and paired:
        return value, *paired_newcombe(first.sums[:, 0], second.sums[:, 0], confidence)
    is_share = first.are_counts and second.are_counts
    if is_share or first.is_extreme or second.is_extreme:
        ends = [ratios.interval(confidence) for ratios in (first, second)]
        if any(None in pair for pair in ends):
            return value, None, None
        return value, *newcombe(*((r.value(), *pair) for r, pair in zip((first, second), ends, strict=True)))
    if first.are_too_few or second.are_too_few:
        return value, None, None
    ours, theirs = (np.exp(r.without_each()) if r.exponential else r.without_each() for r in (first, second))
    if paired:
        spread = Spread.of(theirs - ours, min(first.effective, second.effective))
    else:
        spread = Spread.of(ours, first.effective) + Spread.of(theirs, second.effective)
    return value, *spread.around(value, confidence)
