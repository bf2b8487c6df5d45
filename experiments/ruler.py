"""RULER's tasks on a trained model: prompts and scores of `longlora eval --tasks ruler`, validation books as haystack.

Each prompt is read alone, as `longlora eval` reads it, and all answers of a task and length are written together: a
small model's step of decoding mostly launches kernels, so ten rows cost little more than one. Called by `metrics`.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from books import Books
from torch import nn
from transformers import DynamicCache, PreTrainedTokenizerBase

from peft_longlora import use_attention
from peft_longlora.architecture import cache_name
from peft_longlora.eval import Corpus, Ruler, Subject
from peft_longlora.eval.tasks.haystack import Books as Haystack
from peft_longlora.hub.generation import decoding

# One of each kind. Left out to save time: noise or other needles as the haystack, uuids, and coded words.
TASKS = ("niah_single_2", "niah_multikey_1", "niah_multivalue", "niah_multiquery", "vt", "cwe")


@contextmanager
def ruler_tasks(
    tokenizer: PreTrainedTokenizerBase, books: Books, lengths: list[int], count: int
) -> Iterator[dict[str, Ruler]]:
    """The tasks by their kind, with the books as essays, which lie in a folder as long as it is open."""
    with tempfile.TemporaryDirectory() as folder:
        for number, book in enumerate(books):
            Path(folder, f"{number:04d}.txt").write_text(tokenizer.decode(book.tolist()), encoding="utf-8")
        haystack = Haystack(Corpus(folder), max(lengths))
        yield {kind: Ruler(kind=kind, samples=count, lengths=lengths, books=haystack) for kind in TASKS}


def check_ruler(tokenizer: PreTrainedTokenizerBase, books: Books, lengths: list[int], count: int) -> None:
    """Refuse lengths that are too short for a prompt, before the training. Raises: ValueError."""
    with ruler_tasks(tokenizer, books, lengths, count) as tasks:
        for task in tasks.values():
            task.check_shortest(tokenizer)


@torch.no_grad()
def measure_ruler(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, books: Books, lengths: list[int], count: int
) -> dict[str, dict[str, dict[str, float]]]:
    """Scores of RULER's tasks, through the fastest dense attention there is.

    An adapter is merged, as for serving: a PEFT model is not usable afterwards.

    Args:
        lengths: tokens of prompt and answer together. count: prompts of each task and length.

    Returns: {task: {length: {"score": the mean share of the answers that were found, %, "of": prompts}}}.

    Raises: ValueError: a prompt does not fit into a length.
    """
    found: dict[str, dict[str, dict[str, float]]] = {}
    subject = Subject.of(model.merge_and_unload() if hasattr(model, "merge_and_unload") else model, tokenizer)
    subject.model.eval()
    dense = use_attention(subject.model, "dense", dense_attention="fastest")
    with ruler_tasks(tokenizer, books, lengths, count) as tasks, dense:
        for kind, task in tasks.items():
            for length in lengths:
                prompts = [task.make_prompt(subject, length, number) for number in range(count)]
                rows = [task.prompt_ids(subject, prompt) for prompt in prompts]
                texts = write_answers(subject, rows, task.max_new_tokens)
                shares = [task.score(text, prompt)["recall"] for text, prompt in zip(texts, prompts, strict=True)]
                score = round(100 * statistics.fmean(shares), 2)
                found.setdefault(kind, {})[str(length)] = dict(score=score, of=count)
    return found


@torch.no_grad()
def write_answers(subject: Subject, rows: list[list[int]], max_new_tokens: int) -> list[str]:
    """Greedy answers to several prompts: those of `Subject.answer`, written together.

    Args:
        rows: token ids of each prompt, of any length.
    """
    model, longest = subject.model, max(map(len, rows))
    caches = [_read(model, row[:-1]) for row in rows]
    joined = DynamicCache(config=model.config)
    for number, layers in enumerate(zip(*(cache.layers for cache in caches), strict=True)):
        keys, values = (
            torch.cat([_in_front(getattr(layer, name), longest - 1, dim=2) for layer in layers])
            for name in ("keys", "values")
        )
        joined.update(keys, values, number)
    del caches
    ids, mask = (
        torch.stack([_in_front(torch.tensor(row, device=model.device), longest, dim=0) for row in table])
        for table in (rows, [[1] * len(row) for row in rows])
    )
    words = subject.tokenizer
    padding = words.eos_token_id if words.pad_token_id is None else words.pad_token_id  # both are left out of the text
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        **{cache_name(model): joined},
        generation_config=decoding(max_new_tokens, pad_token_id=padding),
    )
    return [words.decode(row, skip_special_tokens=True) for row in out[:, longest:]]


def _read(model: nn.Module, ids: list[int]) -> DynamicCache:
    """The cache of one row, without padding, so that the fastest kernel reads it."""
    row = torch.tensor([ids], device=model.device)
    return getattr(model(input_ids=row, use_cache=True, logits_to_keep=1), cache_name(model))


def _in_front(tensor: torch.Tensor, size: int, dim: int) -> torch.Tensor:
    """The tensor with zeros in front of one dimension, up to a size."""
    shape = list(tensor.shape)
    shape[dim] = size - shape[dim]
    return torch.cat([tensor.new_zeros(shape), tensor], dim)
