"""What is measured of a trained model, always with dense attention: perplexity by position, and hidden keys.

The protocols are those of the figures that the study is compared with: validation books cut into whole windows from
their beginning, and five-digit keys hidden at even depths of a validation book. Called by `run`.
"""

from __future__ import annotations

import math
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from books import Books
from losses import hidden_states, output_layer, token_losses
from ruler import check_ruler, measure_ruler
from torch import nn
from transformers import PreTrainedTokenizerBase

from peft_longlora import use_attention
from peft_longlora.eval import Corpus, Memorised, Subject

BEFORE = "There is a pass key hidden in the book below. Find it and memorize it.\n\n"
NEEDLE = "\n\nThe pass key is {key}. Remember it. {key} is the pass key.\n\n"
QUESTION = "\n\nWhat is the pass key? The pass key is "
SPARE = 2  # tokens of a length that no prompt uses


def check_measures(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    books: Books,
    window: int,
    evaluation: dict[str, Any],
    trained: list[list[int]],
) -> None:
    """Refuse to train if `measure` could not measure with the same arguments afterwards.

    Raises: ValueError: the validation books are too short, the model's window is, or a length of prompts is.
    """
    longest, lengths = max(map(len, books), default=0), evaluation["passkey_lengths"]
    if too_long := [size for size in (window, evaluation["native_window"], *lengths) if size >= longest]:
        raise ValueError(
            f"The longest validation book has {longest} tokens, which must be more than window, native_window and "
            f"passkey_lengths, and {max(too_long)} is among them."
        )
    around = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in _texts("10000"))
    if lengths and min(lengths) <= around + SPARE:
        raise ValueError(f"passkey_lengths={lengths}: key and question alone have {around} tokens. Take longer ones.")
    if count := evaluation["memorised"]:
        with memorised_task(tokenizer, trained, [book[:window].tolist() for book in books], count) as task:
            task.check(Subject.of(model, tokenizer))
    if count := evaluation["ruler"]:
        check_ruler(tokenizer, books, lengths, count)


@torch.no_grad()
def measure(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    books: Books,
    window: int,
    evaluation: dict[str, Any],
    trained: list[list[int]],
) -> dict[str, Any]:
    """All metrics of a cell, through the fastest dense attention there is.

    RULER comes last and merges the adapter: the model is not usable afterwards.

    Args:
        books: for validation. window: tokens of a row.
        evaluation: `edges` of the positions reported apart, `native_window`, `passkey_lengths`, `passkeys` a length,
            `memorised` passages, `ruler` prompts a task and length.
        trained: the rows that the model was trained on, each once.
    """
    model.eval()
    with use_attention(model, "dense", dense_attention="fastest"):
        whole = perplexity(model, books, window, evaluation["edges"])
        native = evaluation["native_window"]
        metrics: dict[str, Any] = dict(
            perplexity=whole["all"],
            perplexity_by_position={name: value for name, value in whole.items() if name != "all"},
            perplexity_native=perplexity(model, books, native, [0, native])["all"],
        )
        rng, metrics["passkey"] = random.Random(0), {}
        for length in evaluation["passkey_lengths"]:
            found = passkeys(model, tokenizer, books, length, evaluation["passkeys"], rng)
            metrics["passkey"][str(length)] = found
    if count := evaluation["memorised"]:
        unseen = [book[:window].tolist() for book in books]
        metrics["memorised"] = recited(model, tokenizer, trained, unseen, count)
    if count := evaluation["ruler"]:
        metrics["ruler"] = measure_ruler(model, tokenizer, books, evaluation["passkey_lengths"], count)
    return metrics


@contextmanager
def memorised_task(
    tokenizer: PreTrainedTokenizerBase, trained: list[list[int]], unseen: list[list[int]], count: int
) -> Iterator[Memorised]:
    """The task, with the rows as documents, which lie in a folder as long as it is open."""
    with tempfile.TemporaryDirectory() as folder:
        for name, rows in (("trained", trained), ("unseen", unseen)):
            Path(folder, name).mkdir()
            for number, row in enumerate(rows):
                Path(folder, name, f"{number:04d}.txt").write_text(tokenizer.decode(row), encoding="utf-8")
        yield Memorised(Corpus(Path(folder, "trained")), Corpus(Path(folder, "unseen")), passages=count)


def recited(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, trained: list[list[int]], unseen: list[list[int]], count: int
) -> dict[str, Any]:
    """Passages that a model and its base continue word for word, by `longlora eval`'s task "memorised".

    Args:
        trained, unseen: rows that were trained on, and others. count: passages of each.

    Returns: {"trained" or "unseen": {"50", "200" or "window": {"base" or "adapter": {"verbatim": passages, "of",
        "tokens": the mean number before the first other one}}}}.
    """
    found: dict[str, Any] = {}
    dense, subject = use_attention(model, "dense", dense_attention="fastest"), Subject.of(model, tokenizer)
    with memorised_task(tokenizer, trained, unseen, count) as task, dense:
        task.check(subject)
        for item in task.items(subject):
            sample = item.measure()
            prefix = {100: "50", 250: "200"}.get(sample["length"], "window")
            cell = (
                found.setdefault(sample["dataset"], {})
                .setdefault(prefix, {})
                .setdefault(sample["variant"], dict(verbatim=0, of=0, tokens=0.0))
            )
            (_, _, is_whole, _), (_, _, tokens, _) = sample["measures"]
            cell["verbatim"] += int(is_whole)
            cell["of"] += 1
            cell["tokens"] += (tokens - cell["tokens"]) / cell["of"]
    return found


def perplexity(model: nn.Module, books: Books, window: int, edges: list[int]) -> dict[str, float]:
    """Perplexity of whole windows, of all tokens and of those predicted from positions between two edges.

    Returns: "all" and "start-end" of each pair of edges.

    Raises: ValueError: no book is longer than a window.
    """
    sums, counts = [0.0] * (len(edges) - 1), [0] * (len(edges) - 1)
    for book in books:
        for start in range(0, len(book) - window, window):
            losses = token_losses(model, _to_ids(model, book[start : start + window].astype("int64").tolist()))
            for i, (first, last) in enumerate(pairwise(edges)):
                sums[i] += losses[first:last].double().sum().item()
                counts[i] += losses[first:last].numel()
    if not all(counts):
        raise ValueError(f"window={window}, edges={edges}: the validation books give {counts} tokens; all must be > 0.")
    return {
        "all": math.exp(sum(sums) / sum(counts)),
        **{
            f"{first}-{last}": math.exp(total / count)
            for (first, last), total, count in zip(pairwise(edges), sums, counts, strict=True)
        },
    }


def passkeys(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, books: Books, length: int, count: int, rng: random.Random
) -> dict[str, Any]:
    """Hide `count` keys at even depths of `length` tokens; right means that argmax gives every token of the key.

    Returns: "right", "of", and "loss": mean sum of the losses of a key's tokens, nats.
    """
    long = [book for book in books if len(book) > length]
    head, right, loss = output_layer(model), 0, 0.0
    for number in range(count):
        key = str(rng.randint(10000, 99999))
        before, needle, question, answer = (
            tokenizer(text, add_special_tokens=False)["input_ids"] for text in _texts(key)
        )
        book = long[rng.randrange(len(long))]
        body = length - sum(map(len, (before, needle, question, answer))) - SPARE
        start, depth = rng.randrange(0, len(book) - body), int(body * (number + 0.5) / count)
        hay = book[start : start + body].astype("int64").tolist()
        ids = _to_ids(model, before + hay[:depth] + needle + hay[depth:] + question + answer)
        states = hidden_states(model, ids)[:, -len(answer) - 1 : -1]
        logits = head(states)[0].float()
        targets = ids[0, -len(answer) :]
        right += int((logits.argmax(-1) == targets).all())
        loss += nn.functional.cross_entropy(logits, targets, reduction="sum").item()
    return dict(right=right, of=count, loss=loss / count)


def _texts(key: str) -> tuple[str, str, str, str]:
    """What stands around the book's text: before it, within, behind, and the answer."""
    return BEFORE, NEEDLE.format(key=key), QUESTION, key


def _to_ids(model: nn.Module, tokens: list[int]) -> torch.Tensor:
    return torch.tensor([tokens], device=next(model.parameters()).device)
