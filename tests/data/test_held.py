"""The tokens that a Trainer's rows hold, counted by hand beside TRL's own packing."""

import datasets
import pytest
from transformers import LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from peft_longlora.data import TokensHeldCallback, count_tokens
from tests.helpers.configs import tiny_llama_config

TEXTS = ["word " * n for n in (10, 100, 300, 40)]
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"


@pytest.mark.parametrize(
    "packing", [dict(), dict(packing=True), dict(packing=True, packing_strategy="bfd_split")], ids=str
)
def test_the_rows_tokens_are_said_beside_the_data_sets(tmp_path, tokenizer, log, packing):
    dataset = datasets.Dataset.from_list([{"text": text} for text in TEXTS])
    callback = TokensHeldCallback(dataset)
    trainer = SFTTrainer(
        LlamaForCausalLM(tiny_llama_config(vocab_size=len(tokenizer))),
        SFTConfig(output_dir=tmp_path, max_length=64, max_steps=1, report_to="none", bf16=False, **packing),
        train_dataset=dataset,
        processing_class=tokenizer,
        callbacks=[callback],
    )
    trainer.train()
    lengths = [len(tokenizer(text)["input_ids"]) for text in TEXTS]
    held = sum(len(row["input_ids"]) for row in trainer.train_dataset)
    assert (callback.held, callback.total) == (held, sum(lengths))
    if "packing_strategy" in packing:
        assert held >= sum(lengths) and "is not trained on" not in log.text
        return
    assert held == sum(min(n + 1, 64) for n in lengths)  # with the end-of-sequence token that TRL adds
    share = f"{1 - held / sum(lengths):.1%} of it is not trained on"
    assert f"The rows hold {held:,} tokens, and the data set has {sum(lengths):,}: {share}" in log.text
    assert log.text.count("is not trained on") == 1 and "max_length=64" in log.text


def test_every_form_of_row_is_counted(tokenizer):
    tokenizer.chat_template = TEMPLATE
    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Blue."}]
    chat = len(tokenizer("<user>Why?<eos><assistant>Blue.<eos>", add_special_tokens=False)["input_ids"])
    plain = len(tokenizer("Why? Blue.")["input_ids"])
    for rows, tokens in (
        ([{"input_ids": [1, 2, 3]}] * 2, 6),
        ([{"messages": turns}], chat),
        ([{"prompt": turns[:1], "completion": turns[1:]}], chat),
        ([{"prompt": "Why?", "completion": " Blue."}], plain),
        ([{"text": "Why? Blue."}] * 70, 70 * plain),
    ):
        assert count_tokens(rows, tokenizer) == tokens
    assert count_tokens([{"body": "Why? Blue."}], tokenizer, "body") == plain
    with pytest.raises(ValueError, match=r"columns \['body'\].*text_field="):
        count_tokens([{"body": "Why?"}], tokenizer)
