"""Values and intervals of ratios over independent units (documents, prompts). Needs only numpy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

# The most numbers in a block of bootstrap weights. It bounds the memory for any number of documents.
BLOCK = 4_000_000


class Ratios:
    """A ratio sum(numerators) / sum(denominators) over units, or its exponential (a perplexity)."""

    def __init__(self, units: Sequence[Sequence[float]], exponential: bool = False):
        self.sums = np.asarray(units, dtype=np.float64).reshape(-1, 2)
        self.exponential = exponential

    def value(self) -> float:
        """The ratio over all units."""
        return float(self._ratio(self.sums[:, 0].sum(), self.sums[:, 1].sum()))

    def interval(self, seed: int, replicates: int, confidence: float) -> tuple[float | None, float | None]:
        """Wilson's interval for successes out of trials; otherwise the bootstrap's percentiles over units.

        With fewer than two units it is (None, None), because their spread is not known.
        """
        if len(self.sums) < 2:
            return None, None
        numerators, denominators = self.sums.T
        is_count = np.all(denominators == 1) and np.all(np.isin(numerators, (0.0, 1.0)))
        if not self.exponential and (is_count or self.is_extreme):
            return wilson(round(self.value() * len(self.sums)), len(self.sums), confidence)
        return percentiles(self.replicates(seed, replicates), confidence)

    @property
    def is_extreme(self) -> bool:
        """Whether nothing is right or nothing is wrong. A bootstrap would then be certain, which one sample cannot
        show."""
        numerators, denominators = self.sums.T
        return not self.exponential and bool(np.all(numerators == 0) or np.all(numerators == denominators))

    def replicates(self, seed: int, replicates: int) -> np.ndarray:
        """(R,) ratios of units drawn with replacement. With one seed, all ratios of n units use the same draws."""
        n = len(self.sums)
        rng = np.random.default_rng(seed)
        values = []
        for start in range(0, replicates, block := max(1, BLOCK // n)):
            weights = rng.multinomial(n, np.full(n, 1 / n), size=min(block, replicates - start))
            values.append(self._ratio(*(weights @ self.sums).T))
        return np.concatenate(values)

    def _ratio(self, numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            ratio = np.divide(numerator, denominator)
            return np.exp(ratio) if self.exponential else ratio


def percentiles(replicates: np.ndarray, confidence: float) -> tuple[float | None, float | None]:
    """The central interval of bootstrap replicates; replicates without a counted unit are left out."""
    replicates = replicates[np.isfinite(replicates)]
    if not len(replicates):
        return None, None
    tail = (1 - confidence) / 2
    low, high = np.quantile(replicates, [tail, 1 - tail])
    return float(low), float(high)


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


def difference(
    first: Ratios, second: Ratios, paired: bool, seed: int, replicates: int, confidence: float
) -> tuple[float, float | None, float | None]:
    """second - first with its bootstrap interval; paired: row i of both is the same document or prompt.

    If one of the two has nothing right or nothing wrong, it is Newcombe's interval (Statistics in Medicine 17, 1998,
    method 10 of both papers), which is then the same for pairs.
    """
    value = second.value() - first.value()
    if min(len(first.sums), len(second.sums)) < 2:
        return value, None, None
    if first.is_extreme or second.is_extreme:
        return value, *newcombe(*((r.value(), *r.interval(seed, replicates, confidence)) for r in (first, second)))
    ours, theirs = (r.replicates(seed if paired else seed + i, replicates) for i, r in enumerate((first, second)))
    return value, *percentiles(theirs - ours, confidence)
