"""The trained copies of embeddings and norms, in PEFT's wrappers: one copy for each adapter; one of them is active."""

from __future__ import annotations

from collections.abc import Iterator

from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from peft_longlora.architecture import find_rotary_modules
from peft_longlora.rope.learned import LearnedRotary, learn


def wrappers_of(model: nn.Module) -> list[ModulesToSaveWrapper]:
    """The wrappers of modules that have trained copies."""
    return [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]


def of(model: nn.Module, adapter_name: str) -> Iterator[nn.Module]:
    """The copies of one adapter."""
    return (w.modules_to_save[adapter_name] for w in wrappers_of(model) if adapter_name in w.modules_to_save)


def activate(model: nn.Module, adapter_names: list[str]) -> None:
    """Make the copies of these adapters active, because PEFT always merges the active copies.

    Raises: ValueError: two adapters have a copy of one module.
    """
    for wrapper, names in _copies_of(model, adapter_names):
        wrapper.set_adapter(names)


def check_active(model: nn.Module, adapter_names: list[str]) -> None:
    """Refuse adapters whose copies are not the active ones, because a model computes with the active copies.

    Raises: ValueError.
    """
    for wrapper, names in _copies_of(model, adapter_names):
        if names != list(wrapper.active_adapters):
            raise ValueError(
                f"adapter_names={adapter_names}: the embeddings and norms of "
                f"{list(wrapper.active_adapters) or 'the base'} are active, and LoRA of one adapter must not be mixed "
                f"with those of another. Call set_adapter({adapter_names[0]!r}) first, then merge_adapter()."
            )


def _copies_of(model: nn.Module, adapter_names: list[str]) -> list[tuple[ModulesToSaveWrapper, list[str]]]:
    """For each wrapper: which of these adapters has a copy in it, at most one."""
    wrappers = wrappers_of(model)
    names = [[name for name in adapter_names if name in wrapper.modules_to_save] for wrapper in wrappers]
    if both := next((some for some in names if len(some) > 1), None):
        raise ValueError(
            f"adapter_names={adapter_names}: {both} have their own embeddings or norms, which cannot be added up as "
            f"LoRA's weights can. Name one adapter, or train them with train_embeddings=False and train_norms=False."
        )
    return list(zip(wrappers, names, strict=True))


def drop(model: nn.Module) -> None:
    """Deactivate all copies, so that PEFT restores the base's own modules when it unloads."""
    for module in model.modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            module.set_adapter([])


def has_both(model: PreTrainedModel) -> bool:
    """Whether both the embeddings and the output layer have copies."""
    return all(
        isinstance(m, ModulesToSaveWrapper) for m in (model.get_input_embeddings(), model.get_output_embeddings())
    )


def are_both_of_one_weight(model: PreTrainedModel) -> bool:
    """Whether both have copies, on a base whose output layer is tied to its embeddings."""
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    return has_both(model) and head.original_module.weight is embeddings.original_module.weight


def tie(model: PreTrainedModel) -> None:
    """Tie embeddings and output layer again, in the base and in the copies."""
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    head.original_module.weight = embeddings.original_module.weight
    for name, copy in head.modules_to_save.items():
        copy.weight = embeddings.modules_to_save[name].weight


def learn_rope(model: PreTrainedModel, adapter_name: str, is_trained: bool) -> None:
    """Put a rotary module that learns in the place of an adapter's copy.

    Raises: NotImplementedError: this model's RoPE cannot be learned.
    """
    for wrapper in wrappers_of(model):
        if adapter_name in wrapper.modules_to_save and wrapper.original_module in find_rotary_modules(model):
            module = learn(model, wrapper.original_module)
            module.requires_grad_(is_trained).train(wrapper.training)
            wrapper.modules_to_save[adapter_name] = module


def learned_rotary(model: nn.Module) -> LearnedRotary | None:
    """The active adapter's rotary module that learns, or None."""
    for wrapper in wrappers_of(model):
        for name in wrapper.active_adapters:
            if name in wrapper.modules_to_save and isinstance(wrapper.modules_to_save[name], LearnedRotary):
                return wrapper.modules_to_save[name]
    return None


def state_tied_sizes(model: nn.Module, adapter_name: str) -> None:
    """Correct the sizes of a tied output layer's copy: PEFT makes it with input and output exchanged."""
    head = model.get_output_embeddings()
    if isinstance(head, ModulesToSaveWrapper) and adapter_name in head.modules_to_save:
        copy = head.modules_to_save[adapter_name]
        if isinstance(copy, nn.Linear):
            copy.out_features, copy.in_features = copy.weight.shape
