"""Evaluation of long context, with the protocols of the field: `longlora eval`, and the same from Python.

    subject.py      a model, its tokenizer (encoding.py), and what is asked of them: losses (losses.py) and answers
    tasks.py        what a task is: items, each one window or prompt, each giving one sample
      corpus.py     documents and windows      -> perplexity.py
      prompts.py    prompts that fill a length -> passkey.py, ruler.py (haystack.py, words.py), records.py -> longqa.py
      cost.py       time and memory              harness.py   lm-eval's tasks      metrics.py   scores of answers
    run.py          items shared among processes (processes.py), journalled (journal.py), gathered
    results.py      rows with intervals (statistics.py), results.json's schema
    report.py       results.md (units.py); plots.py draws; comparison.py sets two runs side by side
    callback.py     the same during training

Example:
    >>> subject = load_subject("base", "adapter")
    >>> evaluate(subject, [Perplexity(Corpus("books/"), lengths=[8192, 32768])], "out/")
"""

from peft_longlora.eval.callback import LongContextEvalCallback
from peft_longlora.eval.corpus import Corpus
from peft_longlora.eval.processes import Processes
from peft_longlora.eval.report.comparison import compare
from peft_longlora.eval.run import Settings, evaluate
from peft_longlora.eval.subject import Subject, load_subject
from peft_longlora.eval.tasks.cost import Cost
from peft_longlora.eval.tasks.harness import Harness
from peft_longlora.eval.tasks.haystack import Books
from peft_longlora.eval.tasks.longqa import LongQA
from peft_longlora.eval.tasks.multidoc import MultiDoc
from peft_longlora.eval.tasks.passkey import Passkey
from peft_longlora.eval.tasks.perplexity import Perplexity
from peft_longlora.eval.tasks.ruler import Ruler
from peft_longlora.eval.tasks.topics import Topics
from peft_longlora.hub.results import Results

__all__ = [
    "Books",
    "Corpus",
    "Cost",
    "Harness",
    "LongContextEvalCallback",
    "LongQA",
    "MultiDoc",
    "Passkey",
    "Perplexity",
    "Processes",
    "Results",
    "Ruler",
    "Settings",
    "Subject",
    "Topics",
    "compare",
    "evaluate",
    "load_subject",
]
