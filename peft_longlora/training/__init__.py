"""A run without code: a recipe names model, data, adapter and trainer, and `train` does the rest; `longlora train`.

Read `recipe` (a file becomes settings: `loader` reads YAML, `options` are the keys that are this room's own, `values`
gives words their types), then `run` (what happens in which order) and what it calls: `places` (where it may write),
`held_out` (never what is trained), `identity` (its rows and its base), `arguments`, `machine` (what is installed),
`model` and `names` (modules), `outlook` (how long), `learning_rates` (of embeddings and norms), `meter` and `tokens`
(the log), `stopping` (Ctrl-C), `checkpoints` and `damage` (going on), `finish` (evaluation, card, push) and
`completed` (nothing is left to train).
"""

from peft_longlora.training.checkpoints import last_checkpoint
from peft_longlora.training.finish import leave
from peft_longlora.training.learning_rates import LearningRatesMixin
from peft_longlora.training.meter import Meter, MeteredMixin
from peft_longlora.training.recipe import Recipe, read_recipe
from peft_longlora.training.run import fused_loss, train

__all__ = [
    "LearningRatesMixin",
    "Meter",
    "MeteredMixin",
    "Recipe",
    "fused_loss",
    "last_checkpoint",
    "leave",
    "read_recipe",
    "train",
]
