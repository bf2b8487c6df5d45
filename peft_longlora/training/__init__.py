"""A run without code: a recipe names model, data, adapter and trainer, and `train` does the rest; `longlora train`.

Read `recipe` (which keys there are, and how they are checked), `run` (what happens in which order), then what it calls:
`arguments`, `model`, `meter` (the log), `stopping` (Ctrl-C), `checkpoints` (going on), `finish` (evaluation, card,
push).
"""

from peft_longlora.training.checkpoints import last_checkpoint
from peft_longlora.training.meter import Meter, MeteredMixin
from peft_longlora.training.recipe import Recipe, read_recipe
from peft_longlora.training.run import train

__all__ = ["Meter", "MeteredMixin", "Recipe", "last_checkpoint", "read_recipe", "train"]
