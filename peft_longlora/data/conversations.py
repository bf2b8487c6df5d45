"""A conversation of several turns: read from a record, and made into one row with a loss on every answer.

`documents` reads with `read_turns`, `records` makes rows with `tokenize_turns`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label that transformers' losses leave out
LLAMA_2_PROMPT = "[INST] {} [/INST]"
MARK = "[[the answer]]"  # stands in the place of a text, to find where the chat template writes it
CURE = "Give the tokenizer another one: tokenizer.chat_template = ..., or None for Llama 2's [INST]."
SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
# ShareGPT's names of the roles.
ROLES = {"human": USER, "gpt": ASSISTANT, "chatgpt": ASSISTANT}
# What changes a conversation, or which of its answers are trained. A record that has it is refused.
UNREAD = ("tool_calls", "function_call", "tools", "functions", "reasoning_content", "reasoning", "thinking", "images")

Turn = dict[str, str]


def read_turns(name: str, row: dict[str, Any], key: str, text_of: Callable[[str, Any, str], str]) -> list[Turn]:
    """The turns of a record, each as {"role", "content"}: (system,) user, assistant, user, assistant, ...

    Args:
        name: the record's place, for errors.
        row: {"messages": [{"role", "content"}, ...]}, or ShareGPT's {"conversations": [{"from", "value"}, ...]}.
        key: "messages" or "conversations".
        text_of: (place, turn, field) -> its text; refuses a field that is missing or no text.

    Raises: ValueError: other roles, an empty turn, or parts that are not read, such as calls of tools.
    """
    turns = row[key]
    if not isinstance(turns, list):
        raise ValueError(f"{name}: {key!r} is a {type(turns).__name__} ({str(turns)[:40]!r}), not a list.")
    places = [f"{name}: {key!r}[{number}]" for number in range(len(turns))]
    for place, holder in [(name, row), *zip(places, turns, strict=True)]:
        found = [field for field in UNREAD if isinstance(holder, dict) and holder.get(field)]
        if found:
            raise ValueError(f"{place}: holds {found[0]!r}, which is not read. Remove it, or the record.")
        if isinstance(holder, dict) and (holder.get("weight") == 0 or holder.get("train") is False):
            raise ValueError(
                f"{place}: is marked as not to be trained, and every answer is. Remove the turns from it on."
            )
    said, text = ("role", "content") if key == "messages" else ("from", "value")
    roles = [turn.get(said) if isinstance(turn, dict) else None for turn in turns]
    roles = [ROLES.get(role, role) if isinstance(role, str) else None for role in roles]
    talk = roles[1:] if roles[:1] == [SYSTEM] else roles
    if not talk or len(talk) % 2 or talk != [USER, ASSISTANT] * (len(talk) // 2):
        raise ValueError(
            f"{name}: {key!r} has the roles {roles}. Questions and their answers are read: (system,) user, assistant, "
            f"user, assistant, ... Tools are not read. Remove the other turns, or the record."
        )
    texts = [text_of(place, turn, text) for place, turn in zip(places, turns, strict=True)]
    for place, one in zip(places, texts, strict=True):
        if not one.strip():
            raise ValueError(f"{place}: {text!r} is empty. Fill it in, or remove the turn.")
    return [{"role": role, "content": one} for role, one in zip(roles, texts, strict=True)]


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
