"""Rows of prompt and answer: as trl makes them, cut as asked, and with the whole answer to train on."""

import datasets
import pytest
from transformers import LlamaForCausalLM

from peft_longlora.data import Counts, tokenize_record, tokenize_records
from tests.helpers.configs import tiny_llama_config

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
RECORD = {"instruction": "What is the colour?", "input": "", "output": "Blue."}


@pytest.mark.parametrize("chat_template", [None, CHAT_TEMPLATE], ids=["llama-2", "chat"])
@pytest.mark.parametrize("text_input", ["", "Sky over the sea."])
def test_tokens_and_labels_are_those_of_trl(tmp_path, tokenizer, chat_template, text_input):
    """SFTTrainer, given the same prompt and answer as columns, prepares the same row."""
    from trl import SFTConfig, SFTTrainer

    tokenizer.chat_template = chat_template
    record = {**RECORD, "input": text_input}
    user = f"{RECORD['instruction']}\n{text_input}" if text_input else RECORD["instruction"]
    if chat_template:
        row = {"prompt": [{"role": "user", "content": user}]}
        row["completion"] = [{"role": "assistant", "content": "Blue."}]
    else:
        row = {"prompt": f"[INST] {user} [/INST]", "completion": " Blue."}
    trainer = SFTTrainer(
        LlamaForCausalLM(tiny_llama_config(vocab_size=len(tokenizer))),
        SFTConfig(output_dir=tmp_path, max_length=None, report_to="none", bf16=False, completion_only_loss=True),
        train_dataset=datasets.Dataset.from_list([row]),
        processing_class=tokenizer,
    )
    expected = trainer.train_dataset[0]
    ours = tokenize_record(record, tokenizer)
    assert ours == {"input_ids": expected["input_ids"], "labels": expected["labels"]}
    answer = [label for label in ours["labels"] if label != -100]
    assert tokenizer.decode(answer, skip_special_tokens=True).strip() == "Blue."


def long_records():
    question = " What is the answer?"
    return [
        {**RECORD, "source": "r:1"},
        {"instruction": "Start. " + "filler " * 300 + question, "output": "Forty-two.", "source": "r:2"},
        {"instruction": "Start. " + "filler " * 100 + question, "output": "Forty-three.", "source": "r:3"},
    ]


def test_truncation_keeps_both_ends_and_is_counted(tokenizer, log):
    counts = Counts()
    rows = list(tokenize_records(long_records(), tokenizer, 64, counts=counts))
    whole = [tokenize_record(record, tokenizer) for record in long_records()]
    assert rows[0] == whole[0]
    for row, full, record in zip(rows[1:], whole[1:], long_records()[1:], strict=True):
        assert len(row["input_ids"]) == len(row["labels"]) == 64
        text = tokenizer.decode(row["input_ids"])
        assert "Start." in text and text.endswith(f"What is the answer? [/INST] {record['output']}<eos>")
        assert [x for x in row["labels"] if x != -100] == [x for x in full["labels"] if x != -100]
    lengths = [len(row["input_ids"]) for row in whole]
    assert (counts.documents, counts.rows, counts.tokens, counts.longer) == (3, 3, sum(lengths), 2)
    assert (counts.cut_tokens, counts.dropped, counts.names) == (sum(lengths[1:]) - 128, 0, ["r:2", "r:3"])
    assert f"2 longer than the window (r:2, r:3); left out: {counts.cut_tokens} tokens in the middle" in log.text


def test_dropping_is_counted(tokenizer, log):
    counts = Counts()
    rows = list(tokenize_records(long_records(), tokenizer, 64, too_long="drop", counts=counts))
    lengths = [len(tokenize_record(record, tokenizer)["input_ids"]) for record in long_records()]
    assert len(rows) == counts.rows == 1
    assert (counts.dropped, counts.dropped_tokens, counts.cut_tokens) == (2, sum(lengths[1:]), 0)
    assert f"(r:2, r:3); left out: 2 long records ({sum(lengths[1:])} tokens)" in log.text


def test_too_long_refusals(tokenizer):
    with pytest.raises(
        ValueError, match=r"r:2: \d+ tokens, of which \d+ must stay \(answers, .*\), do not fit in max_length=64"
    ):
        list(tokenize_records(long_records(), tokenizer, 64, too_long="error"))
    long_answer = {**RECORD, "output": "word " * 100, "source": "r:9"}
    with pytest.raises(ValueError, match=r"r:9: .* do not fit in max_length=64"):
        list(tokenize_records([long_answer], tokenizer, 64))
    with pytest.raises(ValueError, match="too_long='cut' is unknown"):
        list(tokenize_records([], tokenizer, 64, too_long="cut"))


# -- chat templates that rewrite or leave out what they are given ----------------------------------------------------

TURN = "{% for m in messages %}{% if m.role == 'user' %}<U>{{ m.content }}<A>{% else %}"
END = "{{ eos_token }}{% endif %}{% endfor %}"
TEMPLATES = {
    "keeps": TURN + "{{ m.content }}" + END,
    "trims": TURN + "\n\n{{ m.content | trim }}" + END,
    "no thoughts": TURN + "{{ m.content.split('</think>')[-1] }}" + END,
    "begins a thought": "{% for m in messages %}{% if m.role == 'user' %}<U>{{ m.content }}<A>{% else %}"
    "{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<think>\n{% endif %}",
    "thoughts of its own": TURN + "<think>\n\n</think>\n\n{{ m.content.split('</think>')[-1] }}" + END,
    "user alone": TURN + END,
    "other roles": "{% for m in messages %}{% if m.role == 'human' %}{{ m.content }}{% endif %}{% endfor %}",
    "answers alone": "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}{% endif %}{% endfor %}",
    "broken": "{{ messages[0]['content'] + 1 }}",
    "last turn alone": "{% set m = messages[-1] %}<{{ m.role }}>{{ m.content }}{{ eos_token }}",
    "backwards": "{% for m in messages | reverse %}<{{ m.role }}>{{ m.content }}{% endfor %}{{ eos_token }}",
    "small letters": TURN.replace("m.content", "m.content | lower") + "{{ m.content }}" + END,
    "first lines": TURN.replace("m.content", "m.content.split('\\n')[0]") + "{{ m.content }}" + END,
}
OUTPUTS = {
    "thoughts": "<think>\nLong wavelengths pass.\n</think>\n\nRayleigh scattering.",
    "a word about them": "The tag </think> ends thoughts.",
    "plain": "  Blue.\n",
}


def trained(tokenizer, row) -> str:
    return tokenizer.decode([label for label in row["labels"] if label != -100])


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("name", ["keeps", "trims", "no thoughts", "begins a thought"])
def test_no_template_takes_any_of_the_answer(tokenizer, log, name, output):
    tokenizer.chat_template = TEMPLATES[name]
    counts, record = Counts(), {"instruction": "Why?", "output": OUTPUTS[output], "source": "a.jsonl:7"}
    row = next(tokenize_records([record], tokenizer, 512, counts=counts))
    text = tokenizer.decode(row["input_ids"])
    answer = OUTPUTS[output].strip()
    assert text.count(answer) == 1 and "<U>Why?<A>" in text and text.endswith("<eos>")
    # What the prompt ends with is given and not trained, be it the beginning of a thought.
    given = answer.removeprefix("<think>\n") if name == "begins a thought" else answer
    assert given in trained(tokenizer, row) and "Why?" not in trained(tokenizer, row)
    is_cut = "</think>" in answer and name in ("no thoughts", "begins a thought")
    assert (counts.restored, counts.restored_names) == ((1, ["a.jsonl:7"]) if is_cut else (0, []))
    counts.report()
    assert ("1 answers that the chat template would have cut" in log.text) == is_cut
    assert ("a.jsonl:7" in log.text) == is_cut


@pytest.mark.parametrize(
    "name, output, message",
    [
        ("user alone", "plain", "leaves the answer out"),
        ("other roles", "plain", "leaves the answer out"),
        ("answers alone", "plain", "leaves out what the user says"),
        ("broken", "plain", r"fails \(.*\)"),
        ("last turn alone", "plain", "does not begin the answered conversation with what the user says"),
        ("backwards", "plain", "does not begin the answered conversation with what the user says"),
        ("thoughts of its own", "thoughts", "cuts the thoughts before </think> and writes others in their place"),
    ],
)
def test_a_template_that_leaves_a_side_out_is_refused_by_name(tokenizer, name, output, message):
    tokenizer.chat_template = TEMPLATES[name]
    record = {"instruction": "Why?", "output": OUTPUTS[output], "source": "a.jsonl:7"}
    with pytest.raises(ValueError, match=rf"a\.jsonl:7: the tokenizer's chat template {message}.*chat_template = "):
        list(tokenize_records([record], tokenizer, 512))


@pytest.mark.parametrize("name", ["small letters", "first lines", "keeps"])
def test_a_question_that_is_written_otherwise_is_said(tokenizer, log, name):
    tokenizer.chat_template = TEMPLATES[name]
    record = {"instruction": "Why?", "input": "A long text.", "output": "Blue.", "source": "a.jsonl:7"}
    counts = Counts()
    row = next(tokenize_records([record], tokenizer, 512, counts=counts))
    assert trained(tokenizer, row) == "Blue.<eos>"
    assert ("A long text." in tokenizer.decode(row["input_ids"])) == (name == "keeps")
    counts.report()
    said = "1 questions that the chat template writes otherwise, or cuts (a.jsonl:7)"
    assert (said in log.text) == (name != "keeps")


def test_an_answer_that_the_question_spells_out_is_no_answer(tokenizer):
    """What stands in the question alone is not taken for the answer."""
    tokenizer.chat_template = TEMPLATES["user alone"]
    with pytest.raises(ValueError, match="leaves the answer out"):
        tokenize_record({"instruction": "Is it blue?", "output": "blue"}, tokenizer)
    tokenizer.chat_template = TEMPLATES["no thoughts"]
    said = "So </think> and more"
    row = tokenize_record({"instruction": f"Repeat: {said}", "output": said}, tokenizer)
    assert said in trained(tokenizer, row)


@pytest.mark.parametrize("chat_template", [None, TEMPLATES["keeps"]])
def test_a_row_without_a_label_is_refused(tokenizer, chat_template):
    tokenizer.chat_template, tokenizer.eos_token = chat_template, ""
    with pytest.raises(ValueError, match="no token of the answer is left to train on"):
        tokenize_record({"instruction": "Why?", "output": ""}, tokenizer)
