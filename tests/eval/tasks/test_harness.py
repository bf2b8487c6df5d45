"""lm-eval: LongLoRA models load there by one line, and its tasks run from here, base beside adapter."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer

from peft_longlora.cli import main as cli
from peft_longlora.eval import Results
from peft_longlora.eval.subject import load_subject
from tests.helpers.paths import EMBEDDED
from tests.helpers.tiny import extend, make

CHOICES = [[" + b", " import", " while"], ["(10)", " class", "]"]]
QUESTIONS = [("def add(a, b): return a", CHOICES[0]), ("for i in range", CHOICES[1])] * 3


@pytest.fixture(scope="module", params=[False, pytest.param(True, marks=pytest.mark.slow)], ids=["untied", "tied"])
def base(request, tmp_path_factory) -> str:
    """A small model with a real tokenizer; lm-eval ties the output embeddings of each model it is given."""
    folder = tmp_path_factory.mktemp("model") / "base"
    make(vocab_size=4096, tie_word_embeddings=request.param).save_pretrained(folder)
    AutoTokenizer.from_pretrained(EMBEDDED).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, base) -> str:
    """Random LoRA weights and trained embeddings that are not the base's."""
    folder = tmp_path_factory.mktemp("adapter")
    model = extend(load_subject(base).model, context_length=256)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "embed_tokens.modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def task(tmp_path) -> str:
    """A multiple-choice task on local data, as a user of lm-eval writes one."""
    rows = [{"q": q, "choices": choices, "gold": i % 3} for i, (q, choices) in enumerate(QUESTIONS)]
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tiny_code.yaml").write_text(f"""
task: tiny_code
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
target_delimiter: ""
metric_list:
  - metric: acc
""")
    return str(tmp_path)


def accuracy(subject) -> float:
    """The choice with the largest log-likelihood, worked out with the model alone."""
    right = 0
    for i, (question, choices) in enumerate(QUESTIONS):
        scores = []
        for choice in choices:
            ids = torch.tensor([subject.tokenizer(question + choice)["input_ids"]])
            start = len(subject.tokenizer(question)["input_ids"])
            with torch.no_grad():
                logs = subject.model(ids).logits[0].log_softmax(-1)
            scores.append(sum(logs[j - 1, ids[0, j]].item() for j in range(start, ids.shape[1])))
        right += scores.index(max(scores)) == i % 3
    return right / len(QUESTIONS)


@pytest.fixture
def expected(base, adapter) -> dict[str, float]:
    subject = load_subject(base, adapter, dtype="float32", device="cpu")
    with subject.as_base() as plain:
        return {"adapter": None, "base": accuracy(plain)} | {"adapter": accuracy(load_subject(base, adapter))}


def test_the_documented_line(task, base, adapter, expected):
    """docs/evaluation.md: import peft_longlora, then lm-eval's own peft= argument."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    import peft_longlora  # noqa: F401

    found = lm_eval.simple_evaluate(
        model="hf",
        model_args=f"pretrained={base},peft={adapter},dtype=float32",
        tasks=["tiny_code"],
        task_manager=TaskManager(include_path=task, include_defaults=False),
        device="cpu",
        batch_size=1,
        bootstrap_iters=0,
    )
    assert found["results"]["tiny_code"]["acc,none"] == pytest.approx(expected["adapter"])


def test_tasks_are_handed_on(tmp_path, task, base, adapter, expected):
    command = ["eval", "--model", base, "--adapter", adapter, "--tasks", "tiny_code", "--include-path", task]
    assert cli.main([*command, "--dtype", "float32", "--device", "cpu", "--output", str(tmp_path / "out")]) == 0
    rows = {row.variant: row for row in Results.load(tmp_path / "out").results}
    assert {variant: row.value for variant, row in rows.items()} == pytest.approx(expected, rel=1e-5)
    row = rows["adapter"]
    assert (row.task, row.dataset, row.metric) == ("lm-eval tiny_code", "tiny_code", "acc")
    assert row.protocol == "lm-eval, 0-shot"
    n = len(QUESTIONS)
    stderr = (row.value * (1 - row.value) / (n - 1)) ** 0.5
    interval = (row.value - 1.959964 * stderr, row.value + 1.959964 * stderr)
    assert (row.low, row.high) == pytest.approx(interval, rel=1e-4)


def test_perplexities_of_lm_eval_are_its_own_and_the_lower_the_better(tmp_path):
    """Its "perplexity" (lambada's, say) is no loss; which way is better, and of how many questions, it says."""
    from peft_longlora.eval.report.cells import collect_cells
    from peft_longlora.eval.tasks.harness import Harness

    found = {
        "results": {"lambada": {"alias": "lambada", "sample_len": 90, "perplexity,none": 26.5, "acc,none": 0.4}},
        "higher_is_better": {"lambada": {"perplexity": False, "acc": True, "word_perplexity": False}},
        "n-shot": {"lambada": 0},
        "n-samples": {"lambada": {"original": 100, "effective": 90}},
    }
    found["results"]["lambada"] |= {
        "perplexity_stderr,none": 1.0,
        "acc_stderr,none": 0.05,
        "word_perplexity,none": 40.0,
    }
    record = Harness.record(SimpleNamespace(task="lambada", name="lm-eval lambada", confidence=0.95), found, "base")
    rows = {cell.name[3]: cell.row(0.95) for cell in collect_cells([record]).values()}
    assert {name: row.value for name, row in rows.items()} == {"perplexity": 26.5, "acc": 0.4, "word_perplexity": 40.0}
    assert rows["perplexity"].low == pytest.approx(26.5 - 1.959964, rel=1e-5)
    assert {name for name, row in rows.items() if row.higher_is_better} == {"acc"}
    assert {row.units for row in rows.values()} == {90}
    assert record["measures"][0][2] == math.log(26.5)
