"""docs/results.md holds what the lines of experiments/results say, and the report's arithmetic is right."""

import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "experiments"))

import report  # noqa: E402
from cells import line_of, read_study  # noqa: E402

STUDIES = sorted((ROOT / "experiments").glob("*.yaml"))
TEXT = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("file", STUDIES, ids=lambda file: file.stem)
def test_the_page_holds_what_the_lines_say(file):
    study = read_study(file)
    lines = report.read_lines(file.parent / "results" / f"{file.stem}.jsonl")
    first, last = report.markers(study.name)
    between = TEXT.split(first)[1].split(last)[0]
    assert between.strip("\n").split("\n") == report.block(study, lines), "run python experiments/report.py"
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", between):
        assert (ROOT / "docs" / picture).is_file()


@pytest.mark.parametrize("file", STUDIES, ids=lambda file: file.stem)
def test_lines_are_of_the_studies_cells_and_say_where_they_ran(file):
    study = read_study(file)
    lines = report.read_lines(file.parent / "results" / f"{file.stem}.jsonl")
    assert not report.strangers(study, lines)
    keys = [(line["cell"], line["budget"], line["seed"]) for line in lines]
    assert len(set(keys)) == len(keys)
    for cell in study.cells:
        line = line_of(cell, lines)  # raises where the settings differ
        if line is not None:
            assert {"torch", "transformers", "peft", "peft_longlora"} <= line["versions"].keys()
            assert line["hardware"]["device"] and line["commit"] and line["date"]
            assert line["budget"] == "time" or line["steps"] == cell.training["steps"]
            assert len(line.get("loss", [])) == line["steps"] * (cell.training["accumulation"] or 1)


def test_the_readme_repeats_rows_of_the_page():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme.split("## Better than full attention in the same time")[1].split("\n## ")[0]
    rows = [row for row in section.splitlines() if row.startswith("| ")]
    first, last = report.markers("long")
    assert len(rows) > 4 and set(rows) <= set(TEXT.split(first)[1].split(last)[0].splitlines())


def test_the_recipe_holds_what_the_lines_say():
    text = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
    assert report.fill_choices(text, report.read_all()) == text, "run python experiments/report.py"
    with pytest.raises(ValueError, match="has no place for its choices"):
        report.fill_choices("no markers", [])


def test_a_report_that_cannot_be_made_says_why_in_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "results").mkdir()
    (tmp_path / "mine.yaml").write_text(SMALL)
    read_all = report.read_all
    monkeypatch.setattr(report, "read_all", lambda: read_all(tmp_path))
    monkeypatch.setattr(sys, "argv", ["report.py", "--check"])
    for text, reason in (("", "The page has no place for mine"), ("{\n", "mine.jsonl, line 1 is not JSON")):
        (tmp_path / "results" / "mine.jsonl").write_text(text)
        with pytest.raises(SystemExit) as stop:
            report.main()
        assert stop.value.code == 2 and reason in capsys.readouterr().err


def test_choices_by_hand(small, monkeypatch):
    """Of the seed that both have: 20.0 is 5.70% below 21.21; 12 keys beside 20."""
    import choices

    study, lines = small
    for one in lines:
        one["metrics"]["passkey"]["32768"] = one["metrics"]["passkey"]["2048"]
    wanted = choices.Choice("attention", "full", "local", "small/full/tokens", "small/local/tokens")
    later = choices.Choice("later", "full", "local", "small/full/tokens", "small/local/time")
    monkeypatch.setattr(choices, "CHOICES", [wanted, later])
    text = "\n".join(["before", *choices.MARK, "after"])
    rows = report.fill_choices(text, [(study, lines)]).splitlines()
    assert rows[5] == (
        "| attention | full | local | 20.00 | 21.21 | -5.70% | 12 / 20 | 1 | "
        "`small/full/tokens`, `small/local/tokens` |"
    )
    assert not any("later" in row for row in rows) and rows[0] == "before" and rows[-1] == "after"


def test_every_choice_names_cells_of_the_studies():
    import choices

    known = {(study.name, name, budget) for study, _ in report.read_all() for name, budget, _ in study.rows}
    wrong = {
        one for choice in choices.CHOICES for one in (choice.mine, choice.theirs) if tuple(one.split("/")) not in known
    }
    assert not wrong


def test_the_page_names_no_study_that_is_not_there():
    assert set(re.findall(r"<!-- end of (\w+) -->", TEXT)) == {file.stem for file in STUDIES}


SMALL = """
title: by hand
window: 4096
seeds: [0, 1]
budgets: [tokens, time]
reference: full
config: {context_length: 4096}
evaluation: {native_window: 1024, edges: [0, 1024, 4096], passkey_lengths: [2048], passkeys: 20}
cells:
  - {name: full, label: full attention, budgets: [tokens], config: {attention_pattern: full}}
  - {name: local, config: {attention_pattern: local, group_size: 1024}}
"""


def line(cell, perplexity, early, late, keys, seconds, share):
    return dict(
        study="small", cell=cell.name, budget=cell.budget, seed=cell.seed, steps=150, fingerprint=cell.fingerprint,
        settings=cell.settings, attention_share=share, median_step_seconds=seconds, mean_step_seconds=seconds + 0.01,
        training_seconds=150 * seconds, peak_gib=12.34, hardware=dict(device="a GPU"),
        metrics=dict(
            perplexity=perplexity, perplexity_native=21.0,
            perplexity_by_position={"0-1024": early, "1024-4096": late},
            passkey={"2048": dict(right=keys, of=20, loss=0.1)},
        ),
    )  # fmt: skip


@pytest.fixture
def small(tmp_path):
    (tmp_path / "small.yaml").write_text(SMALL)
    study = read_study(tmp_path / "small.yaml")
    cells = {cell.key: cell for cell in study.cells}
    lines = [
        line(cells["full", "tokens", 0], 20.0, 30.0, 18.0, 12, 0.5, 1.0),
        line(cells["full", "tokens", 1], 20.4, 30.0, 18.0, 13, 0.5, 1.0),
        line(cells["local", "tokens", 0], 21.21, 30.3, 18.9, 20, 0.3, 0.25),
    ]
    return study, lines


def test_tables_by_hand(small):
    study, lines = small
    # Mean of 20.0 and 20.4: 20.2, deviation 0.4 / sqrt(2) = 0.2828; of seed 0, which both have: 21.21 / 20 = 1.0605.
    assert report.block(study, lines) == [
        "| training attention | budget | seeds | perplexity | 0-1k | 1k-4k | native window | keys 2k | nats a key 2k |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        "| full attention | tokens | 2 | 20.20 ± 0.28 | 30.00 ± 0.00 | 18.00 ± 0.00 | 21.00 ± 0.00 | 12.5 | "
        "0.10 ± 0.00 |",
        "| local | tokens | 1 | 21.21 | 30.30 | 18.90 | 21.00 | 20 | 0.10 |",
        "",
        "| % above full attention, same seeds | budget | all | 0-1k | 1k-4k |",
        "| --- | --- | --- | --- | --- |",
        "| local | tokens | +6.05 | +1.00 | +5.00 |",
        "",
        "| training attention | budget | steps | share of attention work | median s/step | mean s/step | training, s | "
        "peak GiB | device |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        "| full attention | tokens | 150 | 1.000 | 0.500 ± 0.000 | 0.510 ± 0.000 | 75 ± 0 | 12.3 | a GPU |",
        "| local | tokens | 150 | 0.250 | 0.300 | 0.310 | 45 | 12.3 | a GPU |",
        "",
        "![by hand](images/results_small.png)",
    ]
    assert report.block(study, []) == [report.NOTHING]
    assert [cell.key for cell in report.missing(study, lines)] == [
        ("local", "time", 0), ("local", "tokens", 1), ("local", "time", 1)
    ]  # fmt: skip


def test_prose_stays_and_a_changed_figure_shows(small):
    study, lines = small
    first, last = report.markers("small")
    page = f"before\n{first}\nold\n{last}\nafter\n"
    filled = report.fill(page, [(study, lines)])
    assert filled.startswith(f"before\n{first}\n") and filled.endswith(f"{last}\nafter\n") and "old" not in filled
    assert report.fill(filled, [(study, lines)]) == filled
    changed = json.loads(json.dumps(lines))
    changed[0]["metrics"]["perplexity"] = 20.02
    assert report.fill(filled, [(study, changed)]) != filled
    with pytest.raises(ValueError, match="no place for small"):
        report.fill("no markers", [(study, lines)])


def test_lines_of_another_study_are_found_out(small):
    study, lines = small
    assert report.strangers(study, [{**lines[0], "cell": "other"}]) == [("other", "tokens", 0)]
    with pytest.raises(ValueError, match="its line in the results holds"):
        report.block(study, [{**lines[0], "fingerprint": "0"}])


def test_the_picture_is_drawn(small, tmp_path):
    pytest.importorskip("matplotlib")
    from plots import plot

    study, lines = small
    plot(study, report.lines_by_row(study, lines), tmp_path / "images" / "one.png")
    assert (tmp_path / "images" / "one.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_found_in_a_window_by_hand():
    from figures import found_at

    keys = [dict(metrics=dict(passkey={"512": dict(loss=a, right=1, of=2)})) for a in (1.0, 4.0)]
    assert found_at(keys) == ("nats a key", {"512": 2.5})
    tasks = [dict(one={"512": dict(score=a, of=1)}, two={"512": dict(score=b, of=1)}) for a, b in ((10, 20), (60, 30))]
    rulers = [dict(metrics={**line["metrics"], "ruler": ruler}) for line, ruler in zip(keys, tasks, strict=True)]
    assert found_at(rulers) == ("RULER, %", {"512": 30})
    assert found_at([dict(metrics=dict(passkey={}))])[1] == {} == found_at([dict(metrics={})])[1]


def test_what_is_recited_by_hand(small):
    study, lines = small
    cell = dict(verbatim=3, of=100, tokens=4.25), dict(verbatim=60, of=100, tokens=41.0)
    both = dict(zip(("base", "adapter"), cell, strict=True))
    lines[0]["metrics"]["memorised"] = {"trained": {"50": both, "window": both}}
    assert report.recited_table(study, report.lines_by_row(study, lines[:1])) == [
        "|  | text | model | verbatim after 50 | verbatim after window |",
        "| --- | --- | --- | --- | --- |",
        "| full attention | trained | base | 3 of 100 (4.2) | 3 of 100 (4.2) |",
        "| full attention | trained | adapter | 60 of 100 (41.0) | 60 of 100 (41.0) |",
    ]
    assert report.recited_table(study, report.lines_by_row(study, lines[2:])) == []


def test_rulers_scores_by_hand(small):
    """Two seeds of the first cell: (40 + 60) / 2 and (10 + 20) / 2; their mean with vt's 100 and 0 is 75 and 7.5."""
    study, lines = small
    for one, near, far in ((lines[0], 40.0, 10.0), (lines[1], 60.0, 20.0)):
        needle, chain = (
            {"1024": dict(score=first, of=10), "2048": dict(score=last, of=10)}
            for first, last in ((near, far), (100, 0))
        )
        one["metrics"]["ruler"] = {"niah_single_2": needle, "vt": chain}
    wanted = [
        "| RULER, % | budget | mean 1k | mean 2k | single_2 1k / 2k | vt 1k / 2k |",
        "| --- | --- | --- | --- | --- | --- |",
        "| full attention | tokens | 75.0 | 7.5 | 50 / 15 | 100 / 0 |",
    ]
    assert report.ruler_table(study, report.lines_by_row(study, lines)) == wanted
    assert "\n".join(wanted) in "\n".join(report.block(study, lines))
    assert report.ruler_table(study, report.lines_by_row(study, lines[2:])) == []


def test_answers_by_hand(tmp_path):
    """Two seeds of three records: scores 0.1, 0.3, 0.5 on average; losses weigh by the tokens of the answers."""
    head, cells = SMALL.split("cells:")
    (tmp_path / "small.yaml").write_text(f"{head}data: records\ncells:{cells}")
    study = read_study(tmp_path / "small.yaml")
    full = [cell for cell in study.cells if cell.name == "full"]
    lines = []
    for cell, f1 in zip(full, ([0.0, 0.2, 0.5], [0.2, 0.4, 0.5]), strict=True):
        tales = dict(f1=f1, rougeL=[0, 0, 0], loss=[1.0, 2.0, 4.0], tokens=[1, 1, 2])
        lines.append({**line(cell, 1, 1, 1, 1, 0.5, 1.0), "metrics": {"records": {"tales_train": tales}}})
    # Scores 10, 30, 50: standard deviation 20, over the root of three 11.5. (1 + 2 + 2 * 4) / 4 = 2.75 nats.
    assert report.block(study, lines)[:3] == [
        "| training attention | seeds | tales F1, % | nats a token |",
        "| --- | --- | --- | --- |",
        "| full attention | 2 | 30.0 ± 11.5 | 2.750 |",
    ]
    assert not any(row.startswith("![") for row in report.block(study, lines))
