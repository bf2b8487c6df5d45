"""The tasks that can be measured. A task gives items in a fixed order; each item measures one window or prompt.

Read `task.py`, then `perplexity.py` (windows of documents), `memorised.py` (passages of a text) or `prompts.py`. Two
groups build on `prompts.py`: `passkey.py` and `ruler.py` make their texts (with `haystack.py` and `words.py`);
`records.py` with `topics.py`, `multidoc.py` and `longqa.py` use given texts. `metrics.py` scores answers,
`beside_base.py` measures a task on the base too, `cost.py` measures time and memory, and `harness.py` calls lm-eval.
"""

from peft_longlora.eval.tasks.cost import Cost
from peft_longlora.eval.tasks.harness import Harness
from peft_longlora.eval.tasks.haystack import Books
from peft_longlora.eval.tasks.longqa import LongQA
from peft_longlora.eval.tasks.memorised import Memorised
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
    "Memorised",
    "MultiDoc",
    "Passkey",
    "Perplexity",
    "Ruler",
    "Task",
    "Topics",
]
