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


def contains(answer: str, reference: str) -> bool:
    """Whether the answer contains a reference, both normalised.

    Every answer contains a reference that normalises to nothing ("The A", "?!"): see `_is_said`.
    """
    wanted = normalize_answer(reference)
    return wanted in normalize_answer(answer) if wanted else _is_said(answer, reference)


def _is_said(answer: str, reference: str) -> bool:
    """Whether an answer is a reference of which a metric keeps no word: the same text, case and outer spaces aside.

    A full stop or quotation marks around it are allowed unless it has none but such signs itself.
    """
    said, wanted = (" ".join(text.lower().split()) for text in (answer, reference))
    signs = string.punctuation + string.whitespace
    return said == wanted or (bool(wanted.strip(signs)) and said.strip(signs) == wanted.strip(signs))


def token_f1(answer: str, references: list[str]) -> float:
    """The best F1, over references, between normalised words as multisets. Source: LongBench's qa_f1_score.

    A reference that normalises to nothing gives 0, as there.
    """
    return max((_f1(normalize_answer(answer).split(), normalize_answer(r).split()) for r in references), default=0.0)


def _f1(answer: list[str], reference: list[str]) -> float:
    common = sum((Counter(answer) & Counter(reference)).values())
    return 2 * common / (len(answer) + len(reference)) if common else 0.0


def contains_any(answer: str, references: list[str]) -> float:
    """1 if the first line of the answer contains a reference, both normalised.

    Source: best_subspan_em of nelson-liu/lost-in-the-middle, and its cut at the line's end.
    """
    line = answer.strip().split("\n")[0]
    return float(any(contains(line, reference) for reference in references))


def contains_all(answer: str, references: list[str]) -> float:
    """The share of the references that the answer contains, ignoring case. Source: RULER's string_match_all."""
    found = sum(bool(r.strip()) and r.strip().lower() in answer.lower() for r in references)
    return found / len(references) if references else 0.0


def rouge_l(answer: str, references: list[str]) -> float:
    """The best ROUGE-L F-measure over references, by rouge-score, without stemming.

    Raises: ImportError: rouge-score is not installed.
    """
    scorer = _rouge_scorer()
    return max((scorer.score(reference, answer)["rougeL"].fmeasure for reference in references), default=0.0)


def check_rouge(references: list[str]) -> None:
    """Refuse references without a to z and digits: rouge-score reads nothing else and would score 0.

    Raises: ValueError.
    """
    for reference in references:
        if any(sign.isalnum() for sign in reference) and not re.search("[a-z0-9]", reference.lower()):
            raise ValueError(f"ROUGE-L reads only words of a to z and digits, and {reference[:40]!r} has none.")


@lru_cache(maxsize=1)
def _rouge_scorer() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ImportError("ROUGE-L needs rouge-score: pip install 'peft-longlora[eval]'") from error
    return RougeScorer(["rougeL"], use_stemmer=False)
