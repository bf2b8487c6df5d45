"""The base's weights while adapters are merged into them: set aside, so that they come back bit for bit.

PEFT adds an adapter to the base's weights in place and subtracts it later, which rounds. Here the adapter is added to a
copy. Weights that an output layer shares with the embeddings are copied for the same reason: a change of one layer must
not reach the other.
"""

from __future__ import annotations

import torch
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

Weights = list[tuple[nn.Module, str, nn.Parameter, torch.device]]


def layers_of(model: nn.Module) -> list[BaseTunerLayer]:
    """The layers that adapters can be merged into."""
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def is_merged(model: nn.Module) -> bool:
    """Whether an adapter is merged into the base's weights now."""
    return any(layer.merged for layer in layers_of(model))


def shared_layers(model: nn.Module) -> list[str]:
    """Names of two layers with adapters, or with trained copies, that share one weight of the base; or nothing.

    Embeddings and an output layer that is tied to them have one change, which `tie_if_equal` keeps in both.
    """
    ends = {
        id(inner)  # with what PEFT's wrappers hold, such as the rows of `trainable_token_indices`
        for end in (model.get_input_embeddings(), model.get_output_embeddings())
        if end is not None
        for inner in end.modules()
    }
    owners: dict[int, tuple[str, nn.Module]] = {}
    for name, module in model.named_modules():
        if id(module) in ends:
            continue
        if isinstance(module, BaseTunerLayer):
            base = module.get_base_layer()
        elif isinstance(module, ModulesToSaveWrapper):
            base = module.original_module
        else:
            continue
        for parameter in base.parameters(recurse=False):
            owner, other = owners.setdefault(id(parameter), (name, base))
            if other is not base:
                return [owner, name]
    return []


def set_aside(model: nn.Module, adapter_names: list[str], already: Weights = ()) -> Weights:
    """Put copies in place of the weights that merging is about to change.

    Args:
        adapter_names: the adapters that will be merged. already: weights that an earlier merge set aside.

    Returns: (module, name of its parameter, the base's own parameter, its device). On a GPU the base's own wait in the
    host's memory, unless another layer shares them. Weights on the meta device (offloaded ones) are left alone.
    """
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    weights: Weights = []
    done = {(module, name) for module, name, *_ in already}
    for layer in layers_of(model):
        module = layer.get_base_layer()
        for name in _changed_by(layer, adapter_names):
            parameter = module._parameters[name]
            if parameter is None or parameter.is_meta or (module, name) in done:
                continue
            done.add((module, name))
            weights.append((module, name, parameter, parameter.device))
            if not parameter.is_floating_point():  # quantised: merging replaces the parameter itself
                continue
            module._parameters[name] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
            if owners[id(parameter)] == 1 and parameter.is_cuda:
                parameter.data = parameter.data.cpu()
    return weights


def _changed_by(layer: BaseTunerLayer, adapter_names: list[str]) -> list[str]:
    """The names of the base layer's parameters that merging these adapters changes."""
    names = [name for name in adapter_names if name in layer._all_available_adapter_names()]
    parameters = layer.get_base_layer()._parameters
    if not names:
        return []
    if isinstance(layer, ParamWrapper):
        return [layer.parameter_name]
    has_bias = any(getattr(layer, "lora_bias", {}).get(name) for name in names)
    changed = ["weight", "bias"] if has_bias else ["weight"]
    return [name for name in changed if name in parameters] or list(parameters)


def put_back(weights: Weights) -> None:
    """Put the base's own weights back, with the device and the precision that the model was moved to meanwhile."""
    for module, name, parameter, device in weights:
        now = module._parameters[name]
        is_float = parameter.is_floating_point() and now.is_floating_point()
        parameter.data = parameter.data.to(device if now.is_meta else now.device, now.dtype if is_float else None)
        module._parameters[name] = parameter


def untie(model: PreTrainedModel) -> None:
    """Give embeddings and output layer a weight each if they share one and LoRA is on one of them."""
    pair = [_base_of(module) for module in (model.get_input_embeddings(), model.get_output_embeddings())]
    shared = [getattr(base, "weight", None) for base, _ in pair]
    if None in shared or shared[0] is not shared[1] or not any(is_adapted for _, is_adapted in pair):
        return
    pair[1][0].weight = nn.Parameter(shared[1].detach().clone(), shared[1].requires_grad)


def tie_if_equal(model: PreTrainedModel) -> None:
    """After a merge: let embeddings and output layer share a weight again if both came out equal, or say otherwise."""
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    configs = [c for c in (model.config, model.config.get_text_config()) if getattr(c, "tie_word_embeddings", False)]
    if not configs or head is None:
        return
    if embeddings.weight.shape == head.weight.shape and torch.equal(embeddings.weight, head.weight):
        head.weight = embeddings.weight
    else:
        for config in configs:
            config.tie_word_embeddings = False


def _base_of(module: nn.Module | None) -> tuple[nn.Module | None, bool]:
    is_adapted = isinstance(module, BaseTunerLayer)
    return (module.get_base_layer() if is_adapted else module), is_adapted
