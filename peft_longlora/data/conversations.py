"""A conversation of several turns: read from a record, and made into one row with a loss on every answer.

`shapes` reads with `read_turns`, `records` makes rows with `tokenize_turns`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from peft_longlora.data.counts import Counts
from peft_longlora.data.fields import is_given, text_of

IGNORED = -100  # the label that transformers' losses leave out
LLAMA_2_PROMPT = "[INST] {} [/INST]"
MARK = "[[the answer]]"  # stands in the place of a text, to find where the chat template writes it
CURE = "Give the tokenizer another one: tokenizer.chat_template = ..., or None for Llama 2's [INST]."
SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
# ShareGPT's names of the roles.
ROLES = {"human": USER, "gpt": ASSISTANT, "chatgpt": ASSISTANT}
# What changes a conversation. A record that has it is refused.
UNREAD = ("tool_calls", "function_call", "tools", "functions", "reasoning_content", "reasoning", "thinking")
UNREAD += ("image", "images", "video", "videos", "audio", "audios")
MARKS = ("weight", "train", "training", "loss")  # of an answer: whether it is trained

Turn = dict[str, str]


def read_turns(name: str, key: str, turns: list[Any], counts: Counts | None = None) -> list[Turn]:
    """The turns of a record, each as {"role", "content"}: (system,) user, assistant, user, assistant, ...

    Args:
        name: the record's place, for errors.
        key: the field that holds the turns, for errors.
        turns: [{"role", "content"}, ...], or ShareGPT's [{"from", "value"}, ...].
        counts: counts the fields of turns that are not read.

    Raises: ValueError: other roles, an empty turn, or parts that are not read, such as calls of tools.
    """
    places = [f"{name}: {key}[{number}]" for number in range(len(turns))]
    for place, turn in zip(places, turns, strict=True):
        found = [field for field in UNREAD if isinstance(turn, dict) and is_given(turn.get(field))]
        if found:
            raise ValueError(f"{place}: holds {found[0]!r}, which is not read. Remove it, or the record.")
    is_shared = any(isinstance(turn, dict) and "from" in turn for turn in turns)
    said, text = ("from", "value") if is_shared else ("role", "content")
    roles = [turn.get(said) if isinstance(turn, dict) else None for turn in turns]
    roles = [ROLES.get(role, role) if isinstance(role, str) else None for role in roles]
    for place, role, turn in zip(places, roles, turns, strict=True):
        if role == ASSISTANT and any(turn.get(mark) not in (None, 1) for mark in MARKS):
            raise ValueError(
                f"{place}: is marked as not to be trained, and every answer is. Remove the turns from it on."
            )
    talk = roles[1:] if roles[:1] == [SYSTEM] else roles
    if not talk or len(talk) % 2 or talk != [USER, ASSISTANT] * (len(talk) // 2):
        raise ValueError(
            f"{name}: {key} has the roles {roles}. Questions and their answers are read: (system,) user, assistant, "
            f"user, assistant, ... Tools are not read. Remove the other turns, or the record."
        )
    texts = [
        text_of(place, turn, text, "Fill it in, or remove the turn.") for place, turn in zip(places, turns, strict=True)
    ]
    for place, one in zip(places, texts, strict=True):
        if not one.strip():
            raise ValueError(f"{place}: {text!r} is empty. Fill it in, or remove the turn.")
    for turn in turns if counts is not None else ():
        for field in turn.keys() - {said, text, *UNREAD, *MARKS}:
            if is_given(turn[field]):
                counts.add_unread(f"{field} of turns")
    return [{"role": role, "content": one} for role, one in zip(roles, texts, strict=True)]


def turns_of(record: dict[str, Any]) -> list[Turn]:
    """The turns of a record as `documents.read_records` yields it."""
    if "messages" in record:
        return record["messages"]
    user = f"{record['instruction']}\n{record['input']}" if record.get("input") else record["instruction"]
    return [{"role": USER, "content": user}, {"role": ASSISTANT, "content": record["output"]}]


def tokenize_turns(turns: list[Turn], tokenizer: PreTrainedTokenizerBase, source: str) -> dict[str, list[int]]:
    """A conversation as {"input_ids", "labels"}: every answer is trained up to the end of its turn, nothing else is.

    The row is what the chat template writes for the whole conversation.

    Args:
        turns: as `begin_turns` gives them.
        tokenizer: the model's, with a chat template.
        source: the record's place, for errors.

    Raises:
        ValueError: the template fails; it writes an answer otherwise than the model would be asked for it; it leaves
            out or cuts a turn.
    """
    whole = fill(tokenizer, source, turns)
    ids = encode(tokenizer, whole)
    labels = [IGNORED] * len(ids)
    answers = [number for number, turn in enumerate(turns) if turn["role"] == ASSISTANT]
    prompts = {number: fill(tokenizer, source, turns[:number]) for number in answers}
    if any(not whole.startswith(prompt) for prompt in prompts.values()):
        raise ValueError(
            f"{source}: the tokenizer's chat template writes earlier turns otherwise than when the model is asked for "
            f"an answer. Make each question a record of its own. Or: {CURE}"
        )
    rests = [_behind(tokenizer, source, turns, number, whole) for number in range(len(turns))]
    for number, prompt in prompts.items():
        end = len(whole) - len(rests[number]) + shared(rests[number], rests[-1])
        first, last = (shared(encode(tokenizer, part), ids) for part in (prompt, whole[:end]))
        labels[first:last] = ids[first:last]
    return {"input_ids": ids, "labels": labels}


def begin_turns(tokenizer: PreTrainedTokenizerBase, turns: list[Turn]) -> list[Turn]:
    """The turns; the system message stands before the first question if the template has no place for it."""
    if turns[0]["role"] != SYSTEM or _has_place(tokenizer, turns):
        return turns
    system, user, *others = turns
    return [{"role": USER, "content": f"{system['content']}\n\n{user['content']}"}, *others]


def fill(tokenizer: PreTrainedTokenizerBase, source: str, turns: list[Turn]) -> str:
    """What the chat template writes; after a question also the beginning of its answer.

    Raises: ValueError: the template fails.
    """
    try:
        begins = turns[-1]["role"] != ASSISTANT
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=begins)
    except (TemplateError, TypeError, ValueError, KeyError, IndexError) as error:
        raise ValueError(f"{source}: the tokenizer's chat template fails ({error}). {CURE}") from error


def squeezed(text: str) -> str:
    """A text without its white space, which chat templates lay out as they like."""
    return "".join(text.split())


def _has_place(tokenizer: PreTrainedTokenizerBase, turns: list[Turn]) -> bool:
    """Whether the template writes a system message."""
    if tokenizer.chat_template is None:
        return False
    try:
        text = fill(tokenizer, "", [{**turns[0], "content": MARK}, *turns[1:]])
    except ValueError:
        return False
    return MARK in text


def _behind(tokenizer: PreTrainedTokenizerBase, source: str, turns: list[Turn], number: int, whole: str) -> str:
    """What the template writes behind one turn.

    Raises: ValueError: it leaves the turn out, or cuts it.
    """
    marked = [*turns[:number], {**turns[number], "content": MARK}, *turns[number + 1 :]]
    head, mark, rest = fill(tokenizer, source, marked).partition(MARK)
    if number == len(turns) - 1:  # what the template writes around thoughts is trained with them
        head = fill(tokenizer, source, turns[:number])
    said, wanted = squeezed(whole[len(head) : len(whole) - len(rest)]), squeezed(turns[number]["content"])
    is_there = mark and whole.startswith(head) and whole.endswith(rest)
    if not is_there or not (said.endswith(wanted) if number == len(turns) - 1 else said == wanted):
        raise ValueError(
            f"{source}: the tokenizer's chat template cuts or changes turn {number} ({turns[number]['role']}), as "
            f"templates of reasoning models cut thoughts before </think>. Take these out, or make each question a "
            f"record of its own. Or: {CURE}"
        )
    return rest


def without_template(turns: list[Turn], tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    """Llama 2's format: each question and its answer are a piece with the special tokens of a text."""
    ids, labels = [], []
    for user, answer in zip(turns[::2], turns[1::2], strict=True):
        text = LLAMA_2_PROMPT.format(user["content"])
        prompt = tokenizer(text, verbose=False)["input_ids"]
        piece = tokenizer(f"{text} {answer['content']}{tokenizer.eos_token or ''}", verbose=False)["input_ids"]
        first = shared(prompt, piece)
        ids += piece
        labels += [IGNORED] * first + piece[first:]
    return {"input_ids": ids, "labels": labels}


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a text in which the chat template wrote the special ones."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def shared(some: Sequence[Any], others: Sequence[Any]) -> int:
    """How many tokens two rows, or characters two texts, share at their beginning."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(some, others, strict=False)))
