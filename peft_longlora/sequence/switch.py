"""`parallelize_sequence` and `unshared`: whether the ranks of a mesh share each sequence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from peft_longlora.architecture import find_attention_modules, find_rotary_modules, find_state_layers
from peft_longlora.attention.settings import S2_ATTN, settings_of
from peft_longlora.sequence.layer import SharedSequence, refuse_blocks


def parallelize_sequence(model: nn.Module, mesh: DeviceMesh | None) -> None:
    """Make the ranks of a mesh share each sequence in a model's attention, in the order of the mesh.

    Call it on every rank, after the adapter was added. S2-Attn exchanges a halo of at most 3/2 groups for half of the
    heads. If attention is dense (evaluation, `dense_layers`, pattern "full"), the whole sequence of each head is
    gathered on one rank. Layers with a sliding window exchange its tokens. DDP or FSDP over all ranks handles the
    weights and their gradients.

    Args:
        model: a model with S2-Attn, bare or PEFT.
        mesh: a one-dimensional DeviceMesh; None switches sequence parallelism off.

    Raises:
        ValueError: a mesh of several dimensions, or a model without S2-Attn.
        NotImplementedError: RoPE that depends on the length of a forward, or layers with a state along the sequence.
    """
    layers = find_attention_modules(model).values()
    if not layers or any(module.config._attn_implementation != S2_ATTN for module in layers):
        raise ValueError(
            "This model does not use S2-Attn, so each rank would attend only to its own stretch. Add a "
            "LongLoraConfig adapter or call configure_attention first."
        )
    if mesh is not None:
        if mesh.ndim != 1:
            raise ValueError(f"mesh has {mesh.ndim} dimensions {mesh.mesh_dim_names}: give only the sequence's.")
        _check_model(model, layers)
    for settings in map(settings_of, layers):
        settings.sharing = None if mesh is None else SharedSequence(mesh)


@contextmanager
def unshared(model: nn.Module) -> Iterator[None]:
    """Within the block each rank attends to its own whole sequences, to generate or to measure.

    Args:
        model: a model whose ranks share each sequence (`parallelize_sequence`), or any other.
    """
    layers = find_attention_modules(model).values()
    found = [settings_of(module) for module in layers if module.config._attn_implementation == S2_ATTN]
    before = [(settings, settings.sharing) for settings in found]
    try:
        for settings, _ in before:
            settings.sharing = None
        yield
    finally:
        for settings, sharing in before:
            settings.sharing = sharing


def _check_model(model: nn.Module, layers: Any) -> None:
    if found := sorted({type(layer).__name__ for layer in find_state_layers(model).values()}):
        raise NotImplementedError(
            f"This model has layers with a recurrent state or a convolution ({', '.join(found)}), which would start "
            f"again at the border of a rank. Use a model whose layers all attend, or train it on one rank a sequence."
        )
    for settings in map(settings_of, layers):
        refuse_blocks(settings.pattern)
    for module in find_rotary_modules(model):
        kinds = module.rope_type if isinstance(module.rope_type, dict) else {"": module.rope_type}
        if lengthy := sorted({"dynamic", "longrope"} & set(kinds.values())):
            raise NotImplementedError(
                f"rope_type={lengthy[0]!r} chooses its frequencies by the longest position of a forward, which differs "
                f"between the ranks of a sequence. Use 'yarn', 'linear', 'ntk' or 'llama3'."
            )
