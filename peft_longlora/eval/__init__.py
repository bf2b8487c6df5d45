"""Measures what a window is worth, with the protocols of the field: `longlora eval`, and the same from Python.

Reading order: `evaluation.py` (evaluate: check, open, measure, gather), `run.py`, then what they call.

    subject.py      a model with its tokenizer; it gives losses (losses.py) and answers
    corpus.py       documents, and the windows that perplexity is measured in
    tasks/          the tasks: each task gives items, each item gives one sample
    share.py        the share of a task that one process measures (processes.py); journal.py keeps its samples
                    (samples.py) under the run's identity.py, and lock.py keeps another run out of the folder
    gather.py       samples become rows and notes
    report/         tables, plots, and two runs side by side
    callback.py     the same while a model trains

Examples:
    >>> subject = load_subject("base", "adapter")
    >>> evaluate(subject, [Perplexity(Corpus("books/"), lengths=[8192, 32768])], "out/")
"""

from peft_longlora.eval.callback import LongContextEvalCallback
from peft_longlora.eval.corpus import Corpus
from peft_longlora.eval.evaluation import evaluate
from peft_longlora.eval.processes import Processes
from peft_longlora.eval.report.comparison import compare
from peft_longlora.eval.run import Settings
from peft_longlora.eval.subject import Subject, load_subject
from peft_longlora.eval.tasks.beside_base import BesideBase
from peft_longlora.eval.tasks.cost import Cost
from peft_longlora.eval.tasks.harness import Harness
from peft_longlora.eval.tasks.haystack import Books
from peft_longlora.eval.tasks.longqa import LongQA
from peft_longlora.eval.tasks.memorised import Memorised
from peft_longlora.eval.tasks.multidoc import MultiDoc
from peft_longlora.eval.tasks.passkey import Passkey
from peft_longlora.eval.tasks.perplexity import Perplexity
from peft_longlora.eval.tasks.ruler import Ruler
from peft_longlora.eval.tasks.topics import Topics
from peft_longlora.hub.results import Results

__all__ = [
    "BesideBase",
    "Books",
    "Corpus",
    "Cost",
    "Harness",
    "LongContextEvalCallback",
    "LongQA",
    "Memorised",
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
