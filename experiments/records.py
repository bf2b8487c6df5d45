"""Questions about long texts with written answers: the rows to train on, and the scores of held-out records.

Files are LongAlpaca's records (instruction, output), one JSON object a line. Of each file the 10th, the 20th, ...
record are kept for scoring and never trained on. Called by `run`.
"""

from __future__ import annotations

import json
import random
import tempfile
from pathlib import Path
from typing import Any

import torch
from losses import hidden_states, token_losses
from torch import nn
from transformers import PreTrainedTokenizerBase

from peft_longlora.data import read_records, tokenize_records
from peft_longlora.data.records import IGNORED
from peft_longlora.eval import LongQA, Subject
from peft_longlora.eval.tasks.metrics import rouge_l

KEPT = 10  # one record in ten is scored
# Tokens that an answer may have: those of one question are a few words, a summary is a paragraph.
ANSWERS = {"qmsum": 128}
ANSWER = 32


def split_records(folder: str | Path) -> tuple[list[dict[str, str]], dict[str, list[dict[str, str]]]]:
    """Records to train on, and those to score by the name of their file.

    Raises: FileNotFoundError, ValueError: no file, or a record without question or answer.
    """
    files = sorted(path for path in Path(folder).iterdir() if path.name.endswith((".jsonl", ".jsonl.gz")))
    trained, scored = [], {}
    for path in files:
        records = list(read_records([str(path)]))
        trained += [record for number, record in enumerate(records, 1) if number % KEPT]
        scored[path.name.split(".")[0]] = records[KEPT - 1 :: KEPT]
    if not trained:
        raise FileNotFoundError(f"{folder}: no .jsonl or .jsonl.gz file with records in it.")
    return trained, scored


def record_rows(
    records: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, window: int, count: int, seed: int
) -> list[dict[str, list[int]]]:
    """`count` rows {"input_ids", "labels"}: all records in random order, then all in another order, and so on.

    A record longer than the window loses the middle of its text.
    """
    rows = list(tokenize_records(records, tokenizer, window))
    rng, order = random.Random(1 + seed), []
    while len(order) < count:
        order += rng.sample(range(len(rows)), len(rows))
    return [rows[number] for number in order[:count]]


def check_scores() -> None:
    """Refuse to train if the answers could not be scored. Raises: ImportError: rouge-score is not installed."""
    rouge_l("yes", ["yes"])


def answer_losses(model: nn.Module, row: dict[str, torch.Tensor]) -> torch.Tensor:
    """Cross entropy of the tokens of a row's answer, (n,) float32. The answer ends the row.

    Args:
        row: "input_ids" and "labels", (1, S); labels are -100 before the answer.
    """
    ids, first = row["input_ids"], int((row["labels"][0] != IGNORED).nonzero()[0, 0])
    return token_losses(model, ids[:, first - 1 :], hidden_states(model, ids)[:, first - 1 :])


@torch.no_grad()
def measure_records(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, scored: dict[str, list[dict[str, str]]], window: int
) -> dict[str, Any]:
    """Losses of the written answers, and scores of the model's own, through dense attention.

    The adapter is merged for the latter, as for serving: the model is not usable afterwards.

    Args:
        window: tokens of prompt and answer, at most; a longer prompt loses its middle.

    Returns: for each file "loss" and "tokens" (of each answer, with its end), "f1" and "rougeL", a list each.
    """
    model.eval()
    device = next(model.parameters()).device
    losses = {}
    for name, records in scored.items():
        rows = tokenize_records(records, tokenizer, window)
        tensors = ({key: torch.tensor([value], device=device) for key, value in row.items()} for row in rows)
        losses[name] = [answer_losses(model, row) for row in tensors]
    found, subject = (
        {},
        Subject.of(model.merge_and_unload() if hasattr(model, "merge_and_unload") else model, tokenizer),
    )
    with tempfile.TemporaryDirectory() as folder:
        for name, records in scored.items():
            lines = [json.dumps({**record, "input": record["input"] or ""}) for record in records]
            file = Path(folder, f"{name}.jsonl")
            file.write_text("\n".join(lines), encoding="utf-8")
            most = ANSWERS.get(name.removesuffix("_train"), ANSWER)
            task = LongQA(source=str(file), max_length=window, max_new_tokens=most)
            samples = [item.measure() for item in task.items(subject)]
            scores = [{metric: round(value, 4) for metric, _, value, _ in one["measures"]} for one in samples]
            found[name] = dict(
                loss=[round(one.mean().item(), 4) for one in losses[name]],
                tokens=[len(one) for one in losses[name]],
                **{metric: [score[metric] for score in scores] for metric in ("f1", "rougeL")},
            )
    return {"records": found}
