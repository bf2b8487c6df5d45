"""Every field of a record that changes what is trained is trained, or refused by name; the others are named."""

import json

import pytest

from peft_longlora.data import Counts, read_records, tokenize_record
from tests.data.test_conversations import PLAIN, masked

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who is it?"},
    {"role": "assistant", "content": "Ann."},
    {"role": "user", "content": "Since when?\nLook it up."},
    {"role": "assistant", "content": "May."},
]
ALPACA = {"instruction": "Since when?", "input": "Look it up.", "output": "May."}
HISTORY = {"history": [["Who is it?", "Ann."]]}
PAIR = {"prompt": "Who is it?", "completion": "Ann."}


def read(tmp_path, *rows, counts=None):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return list(read_records(path, counts=counts))


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        # LLaMA-Factory's data/README.md: system is the system prompt, history are pairs of turns before, all trained.
        ({**ALPACA, **HISTORY, "system": "Be brief."}, CHAT),
        ({**ALPACA, **HISTORY, "system": ""}, CHAT[1:]),
        ({**ALPACA, "history": [], "system": "Be brief."}, [CHAT[0], *CHAT[3:]]),
        ({**ALPACA, "history": None, "system": None, "tools": "[]", "context": ""}, CHAT[3:]),
        ({**PAIR, "system": "Be brief."}, CHAT[:3]),
        ({"messages": CHAT[1:], "system": "Be brief."}, CHAT),
        ({"messages": CHAT, "system": "Be brief."}, CHAT),
        ({"conversations": CHAT}, CHAT),
        # TRL's conversational prompt and completion.
        ({"prompt": CHAT[:2], "completion": CHAT[2:3]}, CHAT[:3]),
        ({"prompt": CHAT[1:2], "completion": CHAT[2:3]}, CHAT[1:3]),
        # As in SlimOrca: what the user says is marked, too, and is trained nowhere.
        ({"conversations": [{**CHAT[1], "weight": 0.0}, {**CHAT[2], "weight": 1.0}]}, CHAT[1:3]),
        # H4's data sets hold the first question a second time.
        ({"messages": CHAT, "prompt": "Who is it?", "prompt_id": "7"}, CHAT),
        ({"messages": CHAT[1:3], **PAIR}, CHAT[1:3]),
        ({"messages": None, "conversations": None, **PAIR}, CHAT[1:3]),
    ],
)
def test_what_a_record_says_is_in_its_row(tmp_path, tokenizer, row, turns):
    tokenizer.chat_template = PLAIN
    (record,) = read(tmp_path, row)
    made = tokenize_record(record, tokenizer)
    assert made["input_ids"] == tokenizer.apply_chat_template(turns)["input_ids"]
    assert made["labels"] == masked(tokenizer, turns)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**ALPACA, "context": "A long text."}, "holds 'context', which is not read .*Put its text into the question"),
        ({**ALPACA, "system_prompt": "S"}, "holds 'system_prompt'.*Rename it to 'system'"),
        ({**ALPACA, "history": "Who?"}, "'history' is not a list of pairs"),
        ({**ALPACA, "history": [["Who?", "Ann", "x"]]}, "'history' is not a list of pairs"),
        ({**ALPACA, "history": [["Who?", None]]}, r"'history'\[0\]: 'assistant' is null"),
        ({**ALPACA, "tools": [{"name": "f"}]}, "holds 'tools', which is not read"),
        ({**ALPACA, **PAIR}, "holds 'instruction', which is not read beside 'completion', 'prompt'"),
        ({**PAIR, "messages": CHAT[1:2] + CHAT[4:]}, "holds 'completion'"),
        ({"prompt": "Rendered: Who is it?", "messages": CHAT}, "holds 'prompt'"),
        ({**PAIR, "history": [["a", "b"]]}, "holds 'history'"),
        ({**PAIR, "reasoning_content": "Hm."}, "holds 'reasoning_content'"),
        ({**PAIR, "label": False}, "is marked as not to be trained"),
        ({"messages": CHAT, "system": "Be long."}, "holds 'system'"),
        ({"messages": CHAT, "tools": '[{"name": "f"}]'}, "holds 'tools'"),
        ({"messages": CHAT, "images": ["a.png"]}, "holds 'images'"),
        ({"messages": CHAT, "conversations": CHAT[1:3]}, "holds 'conversations'"),
        ({"messages": [CHAT[1], {**CHAT[2], "loss": False}]}, r"'messages'\[1\]: is marked as not to be trained"),
        ({"messages": [CHAT[1], {**CHAT[2], "tool_calls": [{}]}]}, r"'messages'\[1\]: holds 'tool_calls'"),
        ({"prompt": CHAT[:4], "completion": CHAT[4:]}, "'prompt' holds an answer, and here every answer is trained"),
        ({"prompt": CHAT[:2], "completion": "Ann."}, "'completion' is a str .'Ann.'., not a list"),
        ({"prompt": "p", "response": "c"}, r"the fields are \['prompt', 'response'\]\. Records are \{\"instruction\""),
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, "the fields are .*Records are .*Rename the fields"),
    ],
)
def test_what_is_not_read_is_refused_by_place_field_and_cure(tmp_path, row, message):
    with pytest.raises(ValueError, match=rf"a\.jsonl:2: .*({message})"):
        read(tmp_path, ALPACA, row)


def test_other_fields_are_counted_and_named_in_the_line(tmp_path, tokenizer):
    counts = Counts()
    turns = [{**CHAT[1], "name": "Bob"}, CHAT[2]]
    read(
        tmp_path, {**ALPACA, "id": 0, "source": "x"}, {**PAIR, "id": 1, "meta": {}}, {"messages": turns}, counts=counts
    )
    assert counts.unread == {"id": 2, "source": 1, "name of turns": 1}
    assert str(counts).endswith("; fields not read: id (2), name of turns (1), source (1)")
    many = Counts(unread={f"f{number:02}": 1 for number in range(20)})
    assert str(many).endswith("f11 (1), and 8 other fields")


def test_the_fields_are_logged_if_nobody_counts(tmp_path, log):
    read(tmp_path, {**ALPACA, "file": "a.pdf"})
    assert "a.jsonl: fields not read: file (1)." in log.text
