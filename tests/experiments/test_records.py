"""A study of records: what is held out, what is trained, and the scores of answers."""

import json
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.helpers.configs import tiny_llama_config

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments"))

import run
from records import answer_losses, measure_records, record_rows, split_records

STUDY = """
title: tiny
data: records
window: 400
seeds: [0]
budgets: [tokens]
reference: trained
config: {r: 4, lora_alpha: 8, context_length: 400, rope_type: yarn, attention_pattern: local, group_size: 64}
training: {steps: 3, accumulation: 2, learning_rate: 2.0e-2, embedding_learning_rate: 5.0e-3, warmup_steps: 1}
cells:
  - {name: trained, config: {dense_every: 4}}
  - {name: cut, window: 200, training: {steps: 0}}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("records")
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_llama_config(max_position_embeddings=128)).save_pretrained(folder / "base")
    words = {chr(code): number for number, code in enumerate([*range(32, 127), 10])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="~").save_pretrained(folder / "base")
    (folder / "data").mkdir()
    for name, count in (("tales", 20), ("meetings", 10)):
        lines = [
            dict(instruction=f"Text {n}: " + "lorem ipsum " * (10 + n) + "What?", input="", output=f"answer {n} {name}")
            for n in range(count)
        ]
        (folder / "data" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "tiny.yaml").write_text(STUDY)
    return folder


@pytest.fixture(scope="module")
def tokenizer(place):
    return PreTrainedTokenizerFast.from_pretrained(place / "base")


def test_a_tenth_of_each_file_is_never_trained_on(place, tokenizer):
    trained, scored = split_records(place / "data")
    assert {name: [one["output"] for one in some] for name, some in scored.items()} == {
        "meetings": ["answer 9 meetings"],
        "tales": ["answer 9 tales", "answer 19 tales"],
    }
    assert len(trained) == 27 and not {one["output"] for one in trained} & {"answer 9 tales", "answer 19 tales"}
    rows = record_rows(trained, tokenizer, 400, 60, seed=0)
    texts = ["".join(tokenizer.convert_ids_to_tokens(row["input_ids"])) for row in rows]
    assert len(set(texts[:27])) == len(set(texts[27:54])) == 27 and texts[:27] != texts[27:54]  # whole passes
    assert (
        rows[:5] == record_rows(trained, tokenizer, 400, 5, seed=0) != record_rows(trained, tokenizer, 400, 5, seed=1)
    )


@torch.no_grad()
def test_losses_are_the_models_own_on_the_answer(place, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(place / "base", dtype=torch.float32)
    row = record_rows(split_records(place / "data")[0], tokenizer, 400, 1, seed=0)[0]
    row = {name: torch.tensor([value]) for name, value in row.items()}
    losses = answer_losses(model, row)
    assert losses.mean() == pytest.approx(model(**row).loss.item(), rel=1e-4)
    answer = row["labels"][0] != -100
    assert len(losses) == answer.sum() and tokenizer.decode(row["labels"][0, answer]).endswith("~")


def test_a_model_that_writes_the_answer_has_full_marks(place, tokenizer):
    """It continues every prompt as the record does; another writes nothing right."""
    pytest.importorskip("rouge_score")
    model = AutoModelForCausalLM.from_pretrained(place / "base", attn_implementation="s2_attn", dtype=torch.float32)
    _, scored = split_records(place / "data")
    meetings = {"meetings": scored["meetings"]}
    writer = _Writer(model, tokenizer, "answer 9 meetings~")
    right = measure_records(writer, tokenizer, meetings, 400)["records"]["meetings"]
    wrong = measure_records(model, tokenizer, meetings, 400)["records"]["meetings"]
    assert right["f1"] == right["rougeL"] == [1.0] and wrong["f1"][0] < 0.5
    assert wrong["tokens"] == right["tokens"] == [len(" answer 9 meetings~")]


class _Writer(torch.nn.Module):
    """A model whose `generate` writes a given text."""

    def __init__(self, model, tokenizer, text):
        super().__init__()
        self.model, self.config, self.device = model, model.config, model.device
        self.ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])

    def generate(self, input_ids, **options):
        return torch.cat([input_ids, self.ids], dim=1)

    def forward(self, **inputs):
        return self.model(**inputs)

    def get_input_embeddings(self):
        return self.model.get_input_embeddings()

    def get_output_embeddings(self):
        return self.model.get_output_embeddings()


def test_a_study_of_records_from_its_yaml_to_its_lines(place):
    pytest.importorskip("rouge_score")
    command = [str(place / "tiny.yaml"), "--model", str(place / "base"), "--records", str(place / "data")]
    assert run.main([*command, "--device", "cpu", "--results", str(place)]) == 0
    trained, cut = (json.loads(line) for line in (place / "tiny.jsonl").read_text().splitlines())
    assert trained["steps"] == 3 and len(trained["loss"]) == 6 and len(trained["step_seconds"]) == 3
    assert trained["settings"]["data"] == "records" and cut["settings"]["window"] == 200
    assert trained["attention_share"] < 1 and "attention_share" not in cut
    figures = trained["metrics"]["records"]
    assert {name: len(one["loss"]) for name, one in figures.items()} == {"meetings": 1, "tales": 2}
    before = cut["metrics"]["records"]["tales"]
    assert sum(figures["tales"]["loss"]) < sum(before["loss"])  # it has learned how answers are written
    assert "answer" not in json.dumps(trained["metrics"])  # figures, no text of the data
