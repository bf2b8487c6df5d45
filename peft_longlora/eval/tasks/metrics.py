"""Scores of answers, each by the definition of the benchmark it belongs to."""

from __future__ import annotations

import re
import string
from collections import Counter
from functools import lru_cache
from typing import Any

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Lower case, without ASCII punctuation, the words a, an, the, and superfluous spaces.

    Source: SQuAD's normalisation, which LongBench (metrics.py) and lost-in-the-middle use as well.

    Example: "The cat's  pyjamas!" gives "cats pyjamas".
    """
    text = text.lower().translate(_PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def token_f1(answer: str, references: list[str]) -> float:
    """The best F1, over references, between normalised words as multisets. Source: LongBench's qa_f1_score."""
    return max((_f1(normalize_answer(answer).split(), normalize_answer(r).split()) for r in references), default=0.0)


def _f1(answer: list[str], reference: list[str]) -> float:
    common = sum((Counter(answer) & Counter(reference)).values())
    return 2 * common / (len(answer) + len(reference)) if common else 0.0


def contains_any(answer: str, references: list[str]) -> float:
    """1 if a reference is within the answer, both normalised; the answer ends with its first line.

    Source: best_subspan_em of nelson-liu/lost-in-the-middle, and its cut at the line's end.
    """
    line = normalize_answer(answer.strip().split("\n")[0])
    return float(any(normalize_answer(reference) in line for reference in references))


def contains_all(answer: str, references: list[str]) -> float:
    """The part of the references within the answer, letter case aside. Source: RULER's string_match_all."""
    return sum(reference.lower() in answer.lower() for reference in references) / len(references)


def rouge_l(answer: str, references: list[str]) -> float:
    """The best ROUGE-L F-measure over references, by rouge-score, without stemming.

    Raises: ImportError: rouge-score is not installed.
    """
    return max(_rouge_scorer().score(reference, answer)["rougeL"].fmeasure for reference in references)


@lru_cache(maxsize=1)
def _rouge_scorer() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ImportError("ROUGE-L needs rouge-score: pip install peft-longlora[eval]") from error
    return RougeScorer(["rougeL"], use_stemmer=False)
