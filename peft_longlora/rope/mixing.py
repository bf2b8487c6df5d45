"""A class of ours mixed into the class of one module, so that this object behaves otherwise and no other does.

Nothing of torch, transformers or PEFT is replaced: the module keeps its parameters, hooks and name, and its own methods
are `super()`. Used by rope/learned, memory/tile and, in adapter/, called, lowrank and precision; imports only torch.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import nn


class Mixin:
    """What is mixed into a module's class; a subclass defines the methods that differ.

    Attributes:
        mixin: the subclass of this class. original_class: the module's class without it.
    """

    mixin: type[Mixin]
    original_class: type[nn.Module]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time, so pickle and copy must be told how to make it again. The state comes third,
        # because it may refer to the module (accelerate's hooks do).
        kind, mixins = type(self), []
        while "original_class" in vars(kind):
            mixins.insert(0, kind.mixin)
            kind = kind.original_class
        return _empty, (kind, *mixins), self.__getstate__()


@cache
def mixed(mixin: type[Mixin], kind: type[nn.Module]) -> type[nn.Module]:
    """The class of a module of this kind with the mixin; the same one each time."""
    attributes = {"__module__": kind.__module__, "mixin": mixin, "original_class": kind}
    return type(kind.__name__, (mixin, kind), attributes)


def mix(module: nn.Module, mixin: type[Mixin]) -> None:
    """Mix a class into the class of one module."""
    module.__class__ = mixed(mixin, type(module))


def unmix(module: nn.Module) -> None:
    """Give a module its class without the mixin again."""
    module.__class__ = module.original_class


def _empty(kind: type[nn.Module], *mixins: type[Mixin]) -> nn.Module:
    for mixin in mixins:
        kind = mixed(mixin, kind)
    return kind.__new__(kind)
