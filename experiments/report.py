"""The tables and plots of docs/results.md, and the choices of docs/recipe.md, from the lines of experiments/results.

    python experiments/report.py            # writes them between the page's marker comments, and the plots
    python experiments/report.py --check    # says whether the page holds what the lines say

Prose around the markers stays. A test compares page and lines.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from pathlib import Path
from typing import Any

from cells import Cell, Study, line_of, read_lines, read_study
from choices import MARK, choice_table
from figures import answer_loss, answers, differences, found_at, lines_by_row, metric, positions, short
from yaml import YAMLError

from peft_longlora.cli.arguments import Parser

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "results.md"
RECIPE = ROOT / "docs" / "recipe.md"
NOTHING = "No cell of this study has been run yet."


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def spread(values: list[float | None], digits: int = 2) -> str:
    """Mean and sample standard deviation. Example: [22.5, 22.7] -> "22.60 ± 0.14"; one value has no spread."""
    if any(value is None for value in values):
        return ""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def quality_table(study: Study, found: dict[tuple[str, str], list[dict[str, Any]]]) -> list[str]:
    """Perplexity and keys of each cell: means over seeds."""
    lengths = list(map(str, study.passkey_lengths))
    head = ["training attention", "budget", "seeds", "perplexity", *map(short, positions(study)), "native window"]
    rows = []
    for name, budget, label in study.rows:
        if not (mine := found.get((name, budget))):
            continue
        figures = [spread([metric(line, one) for line in mine]) for one in ("perplexity", *positions(study))]
        native = spread([metric(line, "perplexity_native") for line in mine])
        keys = [statistics.fmean(line["metrics"]["passkey"][length]["right"] for line in mine) for length in lengths]
        row = [label, budget, str(len(mine)), *figures, native, *(f"{key:.3g}" for key in keys)]
        rows.append(
            [*row, *(spread([line["metrics"]["passkey"][last]["loss"] for line in mine]) for last in lengths[-1:])]
        )
    head += [*(f"keys {short(length)}" for length in lengths), *(f"nats a key {short(last)}" for last in lengths[-1:])]
    return table(head, rows)


def answer_table(study: Study, found: dict[tuple[str, str], list[dict[str, Any]]]) -> list[str]:
    """Scores of each cell's answers with their standard errors over records, and losses of the written answers."""
    files = list(next(iter(found.values()))[0]["metrics"]["records"])
    kinds = {name: ("rougeL", "ROUGE-L") if name.startswith("qmsum") else ("f1", "F1") for name in files}
    head, rows = ["training attention", "seeds"], []
    for name in files:
        head += [f"{name.removesuffix('_train')} {kinds[name][1]}, %", "nats a token"]
    for row, _, label in study.rows:
        if not (mine := found.get((row, "tokens"))):
            continue
        cells = [label, str(len(mine))]
        for name in files:
            scores = [100 * score for score in answers(mine, name, kinds[name][0])]
            error = statistics.stdev(scores) / len(scores) ** 0.5
            cells += [f"{statistics.fmean(scores):.1f} ± {error:.1f}", f"{answer_loss(mine, name):.3f}"]
        rows.append(cells)
    return table(head, rows)


def recited_table(study: Study, found: dict[tuple[str, str], list[dict[str, Any]]]) -> list[str]:
    """Passages that continue word for word, of the training text and of unseen text; none if nobody measured them."""
    head, rows = [], []
    for name, budget, label in study.rows:
        for text, prefixes in _recited(found.get((name, budget), [])).items():
            for variant in ("base", "adapter"):
                cells = {prefix: each[variant] for prefix, each in prefixes.items()}
                head = ["", "text", "model", *(f"verbatim after {prefix}" for prefix in cells)]
                shown = [f"{cell['verbatim']} of {cell['of']} ({cell['tokens']:.1f})" for cell in cells.values()]
                rows.append([label, text, variant, *shown])
    return table(head, rows) if rows else []


def _recited(lines: list[dict[str, Any]]) -> dict[str, Any]:
    return lines[0]["metrics"].get("memorised", {}) if lines else {}


def ruler_table(study: Study, found: dict[tuple[str, str], list[dict[str, Any]]]) -> list[str]:
    """RULER's scores: the mean of the tasks at each length, then each task's at these lengths; none if not measured."""
    head, rows = [], []
    for name, budget, label in study.rows:
        mine = [line["metrics"]["ruler"] for line in found.get((name, budget), []) if "ruler" in line["metrics"]]
        if not mine:
            continue
        lengths, tasks = list(next(iter(mine[0].values()))), list(mine[0])
        scores = {
            task: [statistics.fmean(one[task][length]["score"] for one in mine) for length in lengths] for task in tasks
        }
        means = [f"{mean:.1f}" for mean in found_at(found[name, budget])[1].values()]
        head = ["RULER, %", "budget", *(f"mean {short(length)}" for length in lengths)]
        head += [f"{task.removeprefix('niah_')} {' / '.join(map(short, lengths))}" for task in tasks]
        rows.append([label, budget, *means, *(" / ".join(f"{score:.0f}" for score in scores[task]) for task in tasks)])
    return table(head, rows) if rows else []


def cost_table(study: Study, found: dict[tuple[str, str], list[dict[str, Any]]]) -> list[str]:
    """What each cell cost."""
    rows = []
    for name, budget, label in study.rows:
        mine = [line for line in found.get((name, budget), []) if line["steps"]]
        if not mine:
            continue
        share, peak = mine[0]["attention_share"], max(line["peak_gib"] or 0 for line in mine)
        seconds = [spread([line[key] for line in mine], 3) for key in ("median_step_seconds", "mean_step_seconds")]
        whole = spread([line["training_seconds"] for line in mine], 0)
        device = ", ".join(sorted({line["hardware"]["device"] for line in mine}))
        cells = [str(mine[0]["steps"]), f"{share:.3f}" if share is not None else "", *seconds, whole]
        rows.append([label, budget, *cells, f"{peak:.1f}" if peak else "", device])
    head = ["training attention", "budget", "steps", "share of attention work", "median s/step", "mean s/step"]
    return table([*head, "training, s", "peak GiB", "device"], rows)


def difference_table(study: Study, found: dict[tuple[str, str], list[dict[str, Any]]]) -> list[str]:
    """`differences` as a table; none without the reference."""
    percents = differences(study, found)
    rows = [
        [label, budget, *(f"{percent:+.2f}" for percent in percents[name, budget])]
        for name, budget, label in study.rows
        if (name, budget) in percents
    ]
    reference = next(label for name, _, label in study.rows if name == study.reference)
    head = [f"% above {reference}, same seeds", "budget", "all", *map(short, positions(study))]
    return table(head, rows) if rows else []


def block(study: Study, lines: list[dict[str, Any]]) -> list[str]:
    """What stands between a study's markers."""
    found = lines_by_row(study, lines)
    if not found:
        return [NOTHING]
    if study.data == "records":
        parts = [answer_table(study, found), cost_table(study, found)]
    else:
        quality = [quality_table(study, found), difference_table(study, found)]
        parts = [*quality, recited_table(study, found), ruler_table(study, found), cost_table(study, found)]
    if study.data == "books" and len(found) > 1 and differences(study, found):
        parts.append([f"![{study.title}](images/results_{study.name}.png)"])
    return [line for part in parts if part for line in (*part, "")][:-1]


def markers(name: str) -> tuple[str, str]:
    """The comments around a study's tables."""
    return f"<!-- results of {name}: python experiments/report.py -->", f"<!-- end of {name} -->"


def fill(text: str, studies: list[tuple[Study, list[dict[str, Any]]]]) -> str:
    """The page with each study's block between its markers.

    Raises: ValueError: a study without markers.
    """
    for study, lines in studies:
        first, last = markers(study.name)
        pattern = re.compile(f"{re.escape(first)}\n.*?{re.escape(last)}", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"The page has no place for {study.name}: put the lines {first!r} and {last!r} in it.")
        whole = "\n".join((first, "", *block(study, lines), "", last))
        text = pattern.sub(lambda match, whole=whole: whole, text)
    return text


def fill_choices(text: str, studies: list[tuple[Study, list[dict[str, Any]]]]) -> str:
    """The page of the recipe with the table of choices between its markers.

    Raises: ValueError: the page has no markers.
    """
    found = {(study.name, *row): mine for study, lines in studies for row, mine in lines_by_row(study, lines).items()}
    before, first, rest = text.partition(MARK[0])
    _, last, after = rest.partition(MARK[1])
    if not last:
        raise ValueError(f"The recipe has no place for its choices: put the lines {MARK[0]!r} and {MARK[1]!r} in it.")
    return "\n".join((before + first, "", *choice_table(found), "", last + after))


def read_all(folder: Path = ROOT / "experiments") -> list[tuple[Study, list[dict[str, Any]]]]:
    """Every study of a folder with its lines."""
    studies = map(read_study, sorted(folder.glob("*.yaml")))
    return [(study, read_lines(folder / "results" / f"{study.name}.jsonl")) for study in studies]


def strangers(study: Study, lines: list[dict[str, Any]]) -> list[tuple[str, str, int]]:
    """Keys of lines that no cell of the study stands behind."""
    known = {cell.key for cell in study.cells}
    return [key for line in lines if (key := (line["cell"], line["budget"], line["seed"])) not in known]


def missing(study: Study, lines: list[dict[str, Any]]) -> list[Cell]:
    """Cells that have no line yet."""
    return [cell for cell in study.cells if line_of(cell, lines) is None]


def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if the page is out of date")
    args = parser.parse_args()
    text, recipe = (page.read_text(encoding="utf-8") for page in (PAGE, RECIPE))
    try:
        studies = read_all()
        new, chosen = fill(text, studies), fill_choices(recipe, studies)
    except (ValueError, YAMLError) as error:
        parser.error(" ".join(str(error).split()))
    for study, lines in studies:
        print(f"{study.name}: {len(lines)} lines, {len(missing(study, lines))} cells to run", flush=True)
    if args.check:
        return int((new, chosen) != (text, recipe))
    PAGE.write_text(new, encoding="utf-8")
    RECIPE.write_text(chosen, encoding="utf-8")
    for study, lines in studies:
        if any(line.startswith("![") for line in block(study, lines)):
            from plots import plot  # matplotlib

            plot(study, lines_by_row(study, lines), PAGE.parent / "images" / f"results_{study.name}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
