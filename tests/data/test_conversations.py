"""Conversations of several turns: a loss on every answer and on nothing else, as the chat template's own mask says."""

import pytest

from peft_longlora.data import Counts, tokenize_record, tokenize_records

TURNS = [
    ("user", "Who is it?"),
    ("assistant", "Ann."),
    ("user", "Since when?"),
    ("assistant", " Since May, I think.\n"),
]
CHAT = [{"role": role, "content": text} for role, text in TURNS]
SYSTEM = [{"role": "system", "content": "Be brief."}]
# {% generation %} is transformers' own mark of what an assistant says: an independent truth about the labels.
ANSWER = "{% generation %}{{ m.content | trim }}{{ eos_token }}\n{% endgeneration %}"
HEAD = "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>\n"
OTHER = "{% else %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endif %}{% endfor %}"
ASKS = "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
PLAIN = HEAD + ANSWER + OTHER + ASKS
# Like that of Qwen3: earlier answers lose their thoughts, the last one gets empty ones.
EMPTY = "{% if loop.last %}<think>\n\n</think>\n\n{% endif %}"
REASONING = (
    HEAD.replace("<|assistant|>\n", "<|assistant|>\n{% set said = m.content.split('</think>')[-1] %}")
    + "{% generation %}{% if loop.last %}<think>\n{{ m.content.split('</think>')[0] | replace('<think>', '') | trim if "
    + "'</think>' in m.content }}\n</think>\n\n{% endif %}{{ said | trim }}{{ eos_token }}\n{% endgeneration %}"
    + OTHER
    + ASKS
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + PLAIN


def masked(tokenizer, turns) -> list[int]:
    """The labels as transformers' mask of the assistant's tokens gives them."""
    found = tokenizer.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = found["input_ids"], found["assistant_masks"]
    return [token if is_said else -100 for token, is_said in zip(ids, mask, strict=True)]


@pytest.mark.parametrize("turns", [CHAT, SYSTEM + CHAT, SYSTEM + CHAT[:2], CHAT * 3], ids=["2", "s2", "s1", "6"])
@pytest.mark.parametrize("template", [PLAIN, REASONING], ids=["plain", "reasoning"])
def test_labels_are_the_answers_of_the_templates_own_mask(tokenizer, template, turns):
    tokenizer.chat_template = template
    row = tokenize_record({"messages": turns}, tokenizer)
    assert row["input_ids"] == tokenizer.apply_chat_template(turns)["input_ids"]
    assert row["labels"] == masked(tokenizer, turns)


def test_one_question_is_the_same_row_as_a_record(tokenizer):
    tokenizer.chat_template = PLAIN
    record = {"instruction": "Who is it?", "output": "Ann."}
    assert tokenize_record({"messages": CHAT[:2]}, tokenizer) == tokenize_record(record, tokenizer)


def test_thoughts_of_the_last_answer_are_trained_and_those_before_are_refused(tokenizer):
    tokenizer.chat_template = REASONING
    thought = {"role": "assistant", "content": "<think>\nA name.\n</think>\n\nAnn."}
    last = [*CHAT[:3], thought]
    row = tokenize_record({"messages": last}, tokenizer)
    assert row["labels"] == masked(tokenizer, last)
    with pytest.raises(ValueError, match=r"a\.jsonl:3: the tokenizer's chat template cuts or changes turn 1 \(assist"):
        tokenize_record({"messages": [CHAT[0], thought, *CHAT[2:]], "source": "a.jsonl:3"}, tokenizer)


@pytest.mark.parametrize(
    "template", [NO_SYSTEM, PLAIN.replace(OTHER, OTHER.replace("{% else %}", "{% elif m.role == 'user' %}"))]
)
def test_a_system_message_without_a_place_goes_before_the_first_question(tokenizer, template):
    tokenizer.chat_template = template
    folded = [{"role": "user", "content": "Be brief.\n\nWho is it?"}, *CHAT[1:]]
    assert tokenize_record({"messages": SYSTEM + CHAT}, tokenizer) == tokenize_record({"messages": folded}, tokenizer)


def test_without_a_template_each_question_is_a_piece_of_llama_2s_format(tokenizer):
    tokenizer.chat_template = None
    row = tokenize_record({"messages": SYSTEM + CHAT}, tokenizer)
    first = tokenize_record({"instruction": "Be brief.\n\nWho is it?", "output": "Ann."}, tokenizer)
    second = tokenize_record({"instruction": "Since when?", "output": " Since May, I think.\n"}, tokenizer)
    assert row == {key: first[key] + second[key] for key in row}


def test_a_template_that_writes_earlier_turns_otherwise_is_refused(tokenizer):
    tokenizer.chat_template = "{{ messages | length }}" + PLAIN
    with pytest.raises(ValueError, match=r"A record: .* writes earlier turns otherwise than when"):
        tokenize_record({"messages": CHAT}, tokenizer)


def test_a_long_conversation_loses_the_middle_of_its_longest_prompt(tokenizer):
    tokenizer.chat_template = PLAIN
    turns = [*CHAT[:2], {"role": "user", "content": "Start. " + "filler " * 300 + "End?"}, CHAT[3], *CHAT]
    whole = tokenize_record({"messages": turns}, tokenizer)
    counts = Counts()
    (row,) = tokenize_records([{"messages": turns, "source": "a"}], tokenizer, 160, counts=counts)
    text = tokenizer.decode(row["input_ids"])
    assert len(row["input_ids"]) == len(row["labels"]) == 160 and "Start." in text and "End?" in text
    said = [[label for label in each["labels"] if label != -100] for each in (row, whole)]
    assert said[0] == said[1]
    assert all(label in (-100, token) for token, label in zip(row["input_ids"], row["labels"], strict=True))
    assert counts.answer_tokens == len(said[0])
    assert f" -> 1 rows with {len(said[0])} tokens of answers, which are trained; 1 longer than" in str(counts)
