"""The results of examining every model type, and the pages made of them.

`python -m tests.helpers.every_page` examines all model types, each in a process of its own, and writes
every_results.json, docs/architectures.md and README's table. `--pages` writes the pages from the stored results; names
of model types examine only these again.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections import defaultdict
from pathlib import Path

import transformers

from tests.helpers.paths import ROOT

RESULTS = Path(__file__).with_name("every_results.json")
PAGE, README = ROOT / "docs" / "architectures.md", ROOT / "README.md"
KINDS = {"causal": "causal language models", "image": "image-text models, on text"}
ORDER = ("supported", "conditional", "refused", "crashed", "wrong", "not built")
LIMIT = 120  # seconds for a model type

HEADER = """# Architectures

`python -m tests.helpers.every_page` makes this page, and `tests/whole/test_every_architecture.py` compares it with what
it finds. It holds every model type of transformers {version} that `AutoModelForCausalLM` or
`AutoModelForImageTextToText` knows; the latter are used on text alone. Each model is built tiny from its config class,
with random weights, on a CPU, in float32 where nothing else is said. No model type has a rule of its own in this
package: each of these results follows from what the model's parts are and do, and so does the result of a model type
that a newer transformers adds.

"Supported" means that all of this holds:

- S2-Attn runs in every layer with plain causal attention, and the logits in training equal those of plain transformers
  with the dense-mask definition of S2-Attn as attention. Layers with a window or a state keep them.
- The gradient of early outputs with respect to later tokens is exactly 0.
- Documents that are packed into a row or padded give the logits that they give alone, in training and in evaluation.
  Two limits hold for every type: beside a 2-D `attention_mask`, positions that restart keep documents apart in training
  only; and with `rope_type` `dynamic` or `longrope`, frequencies follow the longest position of the forward.
  Where a condition below says that a layer counts the tokens of a row, padding before a document is refused in training
  too, and warned of in evaluation: pad on the right.
- LoRA, embeddings and norms of the language model are trained, and nothing else is.
- In bfloat16 a new adapter gives the base's logits, bit for bit, and trains.
- With the adapter switched off or unloaded, logits and config are the base's, bit for bit.
- The saved adapter loads with equal logits. Plain transformers reads the merged folder with equal logits.
- Generation with a cache gives the tokens of generation without. So does the cache of `longlora chat`, which is filled
  in chunks and taken back, and the losses of `longlora eval` are those of the whole row's logits.
- RoPE keeps every entry that is not a scaling, such as the sections of several axes.

A model with a condition is supported if you do what the condition says. A refused model raises `NotImplementedError` or
`ValueError` when the adapter is made, says why, and stays as it was. In the column "S2 layers" stands in how many of
the tiny model's attention layers S2-Attn runs; the others have a window of their own.

"""


def types() -> list[tuple[str, str]]:
    """(kind, model type) of everything that is examined."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    names = {"causal": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "image": MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}
    return [(kind, name) for kind, mapping in names.items() for name in sorted(mapping)]


def stored() -> dict:
    """The stored results: the version of transformers, and a row for each kind and model type."""
    return json.loads(RESULTS.read_text(encoding="utf-8"))


def counts(rows: list[dict]) -> str:
    """The table of counts."""
    lines = ["| | " + " | ".join(KINDS.values()) + " |", "|---|" + "---|" * len(KINDS)]
    for result in ORDER:
        numbers = [sum(row["result"] == result and row["kind"] == kind for row in rows) for kind in KINDS]
        lines.append(f"| {result} | {' | '.join(map(str, numbers))} |")
    return "\n".join(lines)


def cell(text: str) -> str:
    """Text for a cell of a table."""
    return text.replace("|", "\\|").replace("<", "&lt;")


def page(results: dict) -> str:
    """docs/architectures.md."""
    rows = results["results"]
    parts = [HEADER.format(version=results["transformers"]) + counts(rows)]
    for kind, title in KINDS.items():
        lines = [
            f"## {title[0].upper()}{title[1:]}",
            "",
            "| model type | result | S2 layers | why, or on which condition |",
        ]
        lines.append("|---|---|---|---|")
        for row in (row for row in rows if row["kind"] == kind):
            layers = f"{row['layers'][0]} of {row['layers'][1]}" if row["layers"] else ""
            lines.append(
                f"| {row['type']} | {row['result']} | {layers} | {cell(' '.join(map(sentence, row['why'])))} |"
            )
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def sentence(text: str) -> str:
    """A reason as a sentence."""
    return text if text.endswith(".") else f"{text}."


def reason(why: list[str]) -> str:
    """The beginning of a refusal, without the name of the model."""
    text = re.sub(r"^\S+ \(\S+\) (does|has|is|chooses|cannot|lets)", r"it \1", why[0])
    text = re.sub(r"^The layers of \S+", "its layers", text)
    text = re.sub(r"^\S+ states", "it states", re.sub(r"^\S+'s attention", "its attention", text))
    text = re.split(r"[.:;(]|, (?:which|so|with)", text.split(" {")[0])[0].strip()
    return text[0].lower() + text[1:]


def title_of(row: dict) -> str:
    """The first cell of README's row for a result."""
    titles = {"refused": lambda: f"refused: {reason(row['why'])}", "conditional": lambda: "supported with a condition"}
    return titles.get(row["result"], lambda: row["result"])()


def readme_table(results: dict) -> str:
    """README's table of support. A type that two classes build with two results is there twice, once as of images."""
    names: dict[str, list[str]] = defaultdict(list)
    first: dict[str, str] = {}
    for row in results["results"]:
        title = title_of(row)
        if first.setdefault(row["type"], title) != title:
            names[title].append(f"`{row['type']}` (with images)")
        elif f"`{row['type']}`" not in names[title]:
            names[title].append(f"`{row['type']}`")
    order = sorted(names, key=lambda title: (not title.startswith("supported"), -len(names[title]), title))
    lines = [f"| {title} ({len(names[title])}) | {', '.join(names[title])} |" for title in order]
    return "\n".join(["| result | model types |", "|---|---|", *lines])


def with_table(text: str, table: str) -> str:
    """README with another table of support."""
    return re.sub(r"\| result \| (model types|architectures) \|\n(\|.*\n)+", lambda _: table + "\n", text)


def examine_apart(kind: str, name: str) -> dict:
    """Examine a model type in a process of its own, which may crash or hang."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        from tests.helpers.every_check import examine

        signal.alarm(LIMIT)
        found = examine(name, kind)
        row = dict(type=name, kind=kind, result=found.result, why=found.why, layers=found.layers)
        with os.fdopen(write, "w", encoding="utf-8") as pipe:
            json.dump(row, pipe)
        os._exit(0)
    os.close(write)
    with os.fdopen(read, encoding="utf-8") as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    if said:
        return json.loads(said)
    return dict(type=name, kind=kind, result="crashed", why=[f"the process ended with status {status}"], layers=None)


def main() -> None:
    if "--pages" not in sys.argv:
        import torch

        from tests.helpers import every_check  # noqa: F401, imported once for all children

        torch.set_num_threads(1)
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        again = sys.argv[1:]
        if unknown := sorted({*again} - {name for _, name in types()}):
            sys.exit(f"transformers {transformers.__version__} has no model type {', '.join(unknown)}. Correct it.")
        old = {(row["kind"], row["type"]): row for row in stored()["results"]} if again else {}
        rows = []
        for kind, name in types():
            is_kept = (kind, name) in old and name not in again
            rows.append(old[kind, name] if is_kept else examine_apart(kind, name))
            if not is_kept:
                print(json.dumps(rows[-1]), flush=True)
        RESULTS.write_text(dumped(dict(transformers=transformers.__version__, results=rows)), encoding="utf-8")
    results = stored()
    PAGE.write_text(page(results), encoding="utf-8")
    README.write_text(with_table(README.read_text(encoding="utf-8"), readme_table(results)), encoding="utf-8")
    print(counts(results["results"]))


def dumped(results: dict) -> str:
    """JSON with a line for each result."""
    lines = ",\n".join("  " + json.dumps(row) for row in results["results"])
    return f'{{"transformers": "{results["transformers"]}", "results": [\n{lines}\n]}}\n'


if __name__ == "__main__":
    main()
