"""How often intervals hold the truth, of models whose truth is known. Few documents are what a person has."""

import numpy as np
import pytest

from peft_longlora.eval.report.statistics import FEWEST, FEWEST_SCORES, Ratios, difference

DRAWS = 300
# Below these, three standard deviations of DRAWS draws under what is claimed. Above 95% nothing is wrong.
LEAST = {0.95: 0.912, 0.90: 0.848}


def share(held):
    return sum(held) / len(held)


def sizes(rng, n):
    """Tokens of documents: the middle two thirds differ by a factor of two and a half."""
    return rng.lognormal(6, 0.5, n).round()


def normal(rng, n):
    return rng.normal(2.0, 0.3, n)


def skewed(rng, n):
    """Most documents are easy, and a few are much harder."""
    return 1.4 + rng.gamma(2, 0.3, n)


@pytest.mark.parametrize("n", [FEWEST, 5, 8, 40])
@pytest.mark.parametrize(("losses", "claimed"), [(normal, 0.95), (skewed, 0.90)])
def test_perplexities_of_few_documents(n, losses, claimed):
    """What is called 95% is so for losses of a normal distribution, and at least 90% for skewed ones."""
    rng, held = np.random.default_rng(n), []
    while len(held) < DRAWS:
        tokens = sizes(rng, n)
        ratios = Ratios(np.stack([losses(rng, n) * tokens, tokens], 1), exponential=True)
        low, high = ratios.interval(0.95)
        if low is not None:  # else these documents are too unequal for their number
            held.append(low < np.exp(2.0) < high)
    assert share(held) >= LEAST[claimed]


@pytest.mark.parametrize("n", [FEWEST_SCORES, 20])
def test_scores_of_few_questions(n):
    """F1 of questions that are mostly right or mostly wrong, 40% in the mean."""
    rng = np.random.default_rng(n)
    held = []
    for _ in range(DRAWS):
        low, high = Ratios(np.stack([rng.beta(0.4, 0.6, n), np.ones(n)], 1), is_score=True).interval(0.95)
        held.append(low < 0.4 < high)
    assert share(held) >= LEAST[0.90]


@pytest.mark.parametrize("is_paired", [True, False])
@pytest.mark.parametrize("n", [FEWEST, 5, 20])
def test_differences_of_perplexities(n, is_paired):
    """An adapter that is 0.1 nats better in the mean, and as often not by as much again; and one that is no better."""
    rng = np.random.default_rng(n)
    for gain in (0.1, 0.0):
        held = []
        while len(held) < DRAWS:
            tokens, before = sizes(rng, n), normal(rng, n)
            after = (before if is_paired else normal(rng, n)) - rng.normal(gain, 0.1, n)
            first, second = (Ratios(np.stack([x * tokens, tokens], 1), exponential=True) for x in (before, after))
            _, low, high = difference(first, second, is_paired, 0.95)
            if low is not None:
                held.append(low < np.exp(2.0 - gain) - np.exp(2.0) < high)
        # The exponential of normal losses is what a perplexity estimates, whatever the number of documents.
        assert share(held) >= LEAST[0.90 if n < 5 else 0.95] - 0.01


@pytest.mark.parametrize("n", [4, 20, 60])
def test_differences_of_shares_of_the_same_prompts(n):
    """Passkeys: some prompts are easy for both models."""
    rng, held = np.random.default_rng(n), []
    for _ in range(2 * DRAWS):
        is_easy = rng.random(n) < 0.5
        pair = [np.where(is_easy, high, low) > rng.random(n) for low, high in ((0.3, 0.85), (0.5, 0.9))]
        first, second = (Ratios(np.stack([x, np.ones(n)], 1), is_score=True) for x in pair)
        _, low, high = difference(first, second, True, 0.95)
        held.append(low <= 0.7 - 0.575 <= high)
    assert share(held) >= LEAST[0.95]
