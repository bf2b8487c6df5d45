"""The numbers in the pages are those that the benchmarks wrote."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import scaling_model  # noqa: E402
from tables import tables, together  # noqa: E402

PAGES = {
    "docs/attention.md": [("attention_h200", "attention"), ("attention_h200", "growth"), ("variants_h200", "variants")],
    "docs/performance.md": [
        ("training_32k_h100", "training"),
        ("training_8b_h100 training_8b_262k_h100 training_8b_524k_h100", "training"),
        ("training_8b_h200 training_8b_524k_h200 training_8b_1m_h200", "training"),
        ("training_8b_same_means_h200 training_8b_same_means_kept_h200", "training"),
        ("training_8b_again_h100 training_8b_again_h200", "training"),
        ("training_1b_h100 training_1b_12gib_h100", "training"),
        ("training_8b_24gib_h100 training_8b_24gib_h200", "training"),
        ("training_70b_h100", "training"),
        ("training_7b_others_h100", "training"),
        ("training_7b_float8_h100", "training"),
        ("training_7b_float8_losses_h100", "losses"),
    ],
    "README.md": [("attention_h200", "short"), ("training_7b_full_32k_h100 training_7b_full_64k_h100", "full")],
}


@pytest.mark.parametrize("page", PAGES)
def test_tables_hold_the_measured_numbers(page):
    text = (ROOT / page).read_text()
    for files, kind in PAGES[page]:
        results = [json.loads((ROOT / f"benchmarks/results/{file}.json").read_text()) for file in files.split()]
        lines = tables(results[0] if len(results) == 1 else together(results))[kind]
        assert len(lines) > 2 and "\n".join(lines) in text, f"{kind} of {files}: run benchmarks/tables.py"


def test_flex_and_evaluation_rows_hold_the_measured_numbers():
    text = (ROOT / "docs/attention.md").read_text()
    flex = json.loads((ROOT / "benchmarks/results/attention_flex_h200.json").read_text())
    assert all(line in text for line in tables(flex)["attention"] if "flex |" in line)
    rows = json.loads((ROOT / "benchmarks/results/dense_forward_h200.json").read_text())["results"]
    assert len(rows) == 3
    for row in rows:
        assert f"{row['seconds']:.3f}" in text and f"{row['tokens_per_second']:,.0f}" in text


def test_scaling_holds_the_measured_numbers():
    rows = scaling_model.read(sorted(map(str, (ROOT / "benchmarks/results").glob("scaling_2xh200*.json"))))
    text = (ROOT / "docs/scaling.md").read_text()
    others = scaling_model.read(sorted(map(str, (ROOT / "benchmarks/results").glob("scaling_[48]xh200*.json"))))
    four = [row for row in others if not row["sharded"] and row["gpus"] <= 4]
    cut = [row for row in others if row["sharded"] and row["attention"] == "s2"]
    model = scaling_model.fit(rows)
    beside = scaling_model.beside_table(model, four)
    sharded = scaling_model.sharded_table(model, scaling_model.NAMES, cut)
    for table in (scaling_model.shared_table(rows), scaling_model.dense_table(rows), beside, sharded):
        assert len(table) > 4 and "\n".join(table) in text, "run benchmarks/scaling_model.py"


@pytest.mark.parametrize(
    "file", ["attention_h200", "attention_flex_h200", "variants_h200", "dense_forward_h200", "training_32k_h100"]
)
def test_numbers_come_with_their_machine_and_their_command(file):
    result = json.loads((ROOT / f"benchmarks/results/{file}.json").read_text())
    assert {"command", "torch", "transformers", "device"} <= set(result.get("about", result))


def test_the_places_found_are_those_that_were_counted():
    text = (ROOT / "docs/serving.md").read_text()
    books = json.loads((ROOT / "benchmarks/results/passages.json").read_text())["rows"]
    said = {
        "question and answer": "the question and the right answer",
        "half of the answer": "the question and every second word of the answer",
        "question alone": "the question alone",
        "wrong answer": "the question and the answer to another one",
    }
    heads = [book["title"].removeprefix("The ") for book in books]
    assert f"| the ranking is given | {' | '.join(heads)} |" in text and all(book["questions"] == 10 for book in books)
    for way, words in said.items():
        assert f"| {words} | {' | '.join(str(sum(book[way])) for book in books)} |" in text
