"""What can be measured. A task gives items in a fixed order; each measures one window or prompt and gives one sample.

Read `task.py`, then `perplexity.py` (windows of documents) or `prompts.py`, which `passkey.py` and `ruler.py` (texts
made here, of `haystack.py` and `words.py`) and `records.py` with `topics.py`, `multidoc.py` and `longqa.py` (given
texts) build on. `metrics.py` scores answers, `cost.py` measures time and memory, `harness.py` hands on to lm-eval.
"""

from peft_longlora.eval.tasks.cost import Cost
from peft_longlora.eval.tasks.harness import Harness
from peft_longlora.eval.tasks.haystack import Books
from peft_longlora.eval.tasks.longqa import LongQA
from peft_longlora.eval.tasks.multidoc import MultiDoc
from peft_longlora.eval.tasks.passkey import Passkey
from peft_longlora.eval.tasks.perplexity import Perplexity
from peft_longlora.eval.tasks.ruler import Ruler
from peft_longlora.eval.tasks.task import Item, Task
from peft_longlora.eval.tasks.topics import Topics

__all__ = [
    "Books",
    "Cost",
    "Harness",
    "Item",
    "LongQA",
    "MultiDoc",
    "Passkey",
    "Perplexity",
    "Ruler",
    "Task",
    "Topics",
]
