"""Write the card of the trained adapter in this folder, its results.json and its plots, from the lines of its study.

    python model_cards/trained.py            # no network; the weights are not touched

The weights are those of the cell `skips-1e-3` of experiments/memorised.yaml, kept with `--save`. Its line in
experiments/results says what was trained and what was measured; `untrained` of experiments/schedules.yaml is the same
base with rescaled RoPE alone.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from peft_longlora import LongLoraConfig
from peft_longlora.eval.report.plots import write_plots
from peft_longlora.hub.card import CardOptions, write_card
from peft_longlora.hub.provenance import sha256, write_training
from peft_longlora.hub.results import RESULTS, Results, Row

FOLDER = Path(__file__).parent
NAME = "SmolLM2-135M-Instruct-longlora-32k"
CELL = "skips-1e-3"
LINES = FOLDER.parent / "experiments" / "results"
BOOKS = "7 books held out by author"
NATIVE = 8192
BASE_NOTE = (
    "The base's weights were those of a Q4_1 file of HuggingFaceTB/SmolLM2-135M-Instruct, dequantised to bfloat16. The "
    "original's differ from them by that rounding, so its own numbers will differ a little."
)


def read_line(study: str, cell: str, seed: int = 0) -> dict[str, Any]:
    """The line of a cell."""
    lines = map(json.loads, (LINES / f"{study}.jsonl").read_text().splitlines())
    return next(line for line in lines if (line["cell"], line["seed"]) == (cell, seed))


def rows_of(line: dict[str, Any], variant: str) -> tuple[list[Row], list[Row]]:
    """The main rows and the rows by position of a line."""
    metrics, window = line["metrics"], line["settings"]["window"]

    def row(task: str, metric: str, length: int, value: float, **more: Any) -> Row:
        about = dict(task=task, metric=metric, length=length, value=value, variant=variant)
        return Row.of({**about, "higher_is_better": metric == "accuracy", **more})

    books = dict(dataset=BOOKS, protocol="documents")
    main = [
        row("perplexity", "perplexity", window, metrics["perplexity"], **books),
        row("perplexity", "perplexity", NATIVE, metrics["perplexity_native"], **books),
    ]
    for length, keys in metrics["passkey"].items():
        about = dict(dataset="5 digits in a held-out book", protocol="experiments", units=keys["of"])
        main.append(row("passkey", "accuracy", int(length), keys["right"] / keys["of"], **about))
    for text, prefixes in metrics.get("memorised", {}).items():
        for prefix, found in prefixes.items():
            cells = found[variant]
            name = f"after {prefix} tokens" if prefix.isdigit() else "after a whole window"
            about = dict(dataset=f"{text} text, {name}", protocol="verbatim", units=cells["of"])
            main.append(row("memorised", "share", window, cells["verbatim"] / cells["of"], **about))
    parts = metrics["perplexity_by_position"].items()
    return main, [row("perplexity", "perplexity", window, value, group=name, **books) for name, value in parts]


def make_results(folder: Path) -> Results:
    """What the lines hold, in the form that a card reads."""
    line, before = read_line("memorised", CELL), read_line("schedules", "untrained")
    config = LongLoraConfig.from_pretrained(str(folder))
    found = [rows_of(before, "rescaled"), rows_of(line, "adapter")]
    model = dict(
        name=config.base_model_name_or_path, fingerprint=None, adapter=NAME, adapter_sha256=None,
        weights_sha256=sha256(folder / "adapter_model.safetensors"), tokenizer=config.base_model_name_or_path,
        tokenizer_sha256=None, chat_template_sha256=None, dtype="bfloat16", attention="dense",
        rope_parameters=config.applied_rope_parameters, native_window=NATIVE, window=line["settings"]["window"],
    )  # fmt: skip
    run = "python experiments/run.py experiments/memorised.yaml"
    command = f"{run} --model MODEL --tokens TOKENS --only {CELL} --save FOLDER"
    return Results(
        created=line["date"], versions=line["versions"], hardware={**line["hardware"], "processes": 1}, model=model,
        settings={"seed": line["seed"], "confidence": 0.95, "command": command, "cell": line["settings"]}, data={},
        notes=[f"Measured without intervals. The command: {command}. {BASE_NOTE}",
               "'rescaled' is the base with the same RoPE, not trained. docs/results.md says what raises the keys."],
        results=[row for main, _ in found for row in main], details=[row for _, parts in found for row in parts],
        speed={},
    )  # fmt: skip


def write(folder: Path) -> None:
    """Write README.md, results.json, training.json and the plot beside the weights in `folder`."""
    line, results = read_line("memorised", CELL), make_results(folder)
    results.save(folder / RESULTS)
    write_plots(results, folder)
    training, tokens = line["settings"]["training"], line["steps"] * line["settings"]["window"]
    write_training(
        folder,
        [
            f"{line['steps']} windows of {line['settings']['window']:,} tokens ({tokens / 1e6:.1f} million) at random "
            f"places of 49 English books in the public domain (Project Gutenberg), one pass, seed {line['seed']}",
            f"AdamW at {training['learning_rate']:g} (norms {training['embedding_learning_rate']:g}), one window a "
            f"step, {line['training_seconds']:.0f} seconds on one {line['hardware']['device']}",
        ],
    )
    config = LongLoraConfig.from_pretrained(str(folder))
    config.card = CardOptions(license="apache-2.0", language=["en"], adapter=f"your-name/{NAME}")
    write_card(config, folder)


if __name__ == "__main__":
    write(FOLDER / NAME)
    print(FOLDER / NAME / "README.md", file=sys.stdout)
