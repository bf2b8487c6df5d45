"""Models whose full attention has no position embeddings (NoPE): nothing is rescaled, their window is only a number.

Jamba, Nemotron-H, Kimi Linear and Granite 4's hybrids are such: their states and convolutions tell tokens apart. A
model without rotary modules may as well have positions of another kind (learned ones, relative biases, a rotation of
its own), which nothing here could extend. No name says which it is, so a few tokens are run and moved.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from peft_longlora.architecture import (
    find_attention_modules,
    find_rotary_modules,
    find_state_layers,
    find_text_model,
    is_local_layer,
)
from peft_longlora.few_tokens import at_rest, can_run, distance, key_of, outputs, sample_rows
from peft_longlora.rope.parameters import full_type, is_nested

# Keys in another order are summed in another order; with positions at least one layer differs by tens of percent.
MOST, MOST_OF_HALF = 1e-3, 2e-2
# For each kind that was tried, whether it has no positions.
_tried: dict[str, bool] = {}


def is_positionless(model: PreTrainedModel) -> bool:
    """Whether full attention has no RoPE, by the model's parts. `check_positions` sees to it that it has no other
    positions either."""
    if not find_rotary_modules(model):
        return True
    parameters = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    return is_nested(parameters) and (kind := full_type(parameters)) is not None and parameters[kind] is None


def check_positions(model: PreTrainedModel) -> None:
    """Refuse a model whose positions are neither RoPE of transformers nor absent, or whose window is unknown.

    Raises: NotImplementedError.
    """
    if not is_positionless(model):
        return
    config = model.config.get_text_config()
    kind = f"{model.config.model_type} ({type(model).__name__})"
    cure = "Use a rotary architecture (llama, qwen3, mistral, gemma3, gpt_neox, ...)."
    attention = find_text_model(model).get_correct_attn_implementation(None)
    if (key := key_of(model)) not in _tried:
        found = _try(model, attention) if can_run(model, attention) else None
        if found is None and _is_decided_elsewhere():
            return
        if found is None:
            raise NotImplementedError(
                f"{kind} has no rotary position embeddings that could be rescaled, and whether it has positions of "
                f"another kind shows only when it runs, which it cannot now: its weights are not all on this device. "
                f"Make the adapter before the model is sharded or moved, or use a rotary architecture."
            )
        _tried[key] = found
    if not _tried[key] or not isinstance(getattr(config, "max_position_embeddings", None), int):
        raise NotImplementedError(
            f"{kind} has no rotary position embeddings that could be rescaled, so its window cannot be extended. {cure}"
        )


def check_nothing_asked(model: PreTrainedModel, rope_type: str, rope_parameters: dict[str, Any] | None) -> None:
    """Refuse a rescaling of a RoPE that is not there.

    Raises: ValueError.
    """
    if rope_parameters is not None or rope_type != "yarn":  # the default, which the user may not have given
        asked = f"{rope_parameters=}" if rope_parameters is not None else f"{rope_type=}"
        raise ValueError(
            f"{asked} has no effect: full attention of {model.config.model_type} has no position embeddings, so there "
            f"is nothing to rescale. Leave it out; context_length alone raises the window."
        )


def _is_decided_elsewhere() -> bool:
    """Whether the first process has the weights and decides for all: FSDP may load them there alone."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_rank() > 0


def _try(model: PreTrainedModel, attention: str) -> bool | None:
    """Whether nothing but masks and states tells a model's tokens apart; None if its weights are empty."""
    config = model.config.get_text_config()
    before = config._attn_implementation
    attending = list(find_attention_modules(model).values())
    full = [module for module in attending if not is_local_layer(module, config)]
    watch, move = _Watch(), _Move()
    try:
        config._attn_implementation = attention
        with at_rest(model):
            for layers, hook in (([*attending, *find_state_layers(model).values()], watch), (full, move)):
                handles = [module.register_forward_hook(hook, with_kwargs=True) for module in layers]
                try:  # one token, repeated, for `watch`; a text for `move`
                    ids = sample_rows(model)[:1]
                    outputs(model, ids[:, :1].expand_as(ids) if hook is watch else ids)
                finally:
                    for handle in handles:
                        handle.remove()
    except torch.OutOfMemoryError:
        raise
    except _EmptyError:
        return None
    except Exception:  # a layer that takes its tokens in another way, so nothing is known of it
        return False
    finally:
        config._attn_implementation = before
    if not watch.errors or not move.errors:  # no layer of a kind that is known
        return False
    is_half = any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters())
    is_watched = watch.errors[0] <= (MOST_OF_HALF if is_half else MOST)
    return is_watched and all(error <= most for error, most in move.errors)


class _EmptyError(Exception):
    """A layer gives nothing, or no numbers: its weights are empty."""


class _Watch:
    """A hook: how far the tokens differ with which a layer begins. In the first layer, only embedded positions tell
    equal tokens apart."""

    def __init__(self) -> None:
        self.errors: list[float] = []

    def __call__(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], __: Any) -> None:
        hidden = _hidden(args, kwargs)
        self.errors.append(distance(hidden, hidden[:, :1].expand_as(hidden)))


class _Move:
    """A hook: how far the last token's output differs if the tokens that it sees stand in the reverse order, and how
    far it may.

    The layer computes in float32 meanwhile: with small weights an order changes less than half precision rounds.
    """

    def __init__(self) -> None:
        self.errors: list[tuple[float, float]] = []
        self._is_moving = False

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> None:
        if self._is_moving:
            return
        self._is_moving = True
        try:
            with _in_float32(module) as is_exact:
                self._move(module, *(_as_float32((args, kwargs)) if is_exact else (args, kwargs)), is_exact)
        finally:
            self._is_moving = False

    def _move(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], is_exact: bool) -> None:
        hidden = _hidden(args, kwargs)
        last, others = hidden[:, -1:], hidden[:, :-1]

        def with_others(new: torch.Tensor) -> torch.Tensor:
            all_ = torch.cat([new, last], 1)
            out = module(
                *(all_ if x is hidden else x for x in args),
                **{k: all_ if x is hidden else x for k, x in kwargs.items()},
            )
            return out[0][:, -1] if isinstance(out, tuple) else out[:, -1]

        before = with_others(others)
        if not before.isfinite().all() or not before.any():
            raise _EmptyError
        # A token that does not see others, because it chose keys, would say nothing.
        sees = distance(with_others(last.expand_as(others)), before) > MOST_OF_HALF
        error = distance(with_others(others.flip(1)), before) if sees else float("inf")
        self.errors.append((error, MOST if is_exact else MOST_OF_HALF))


@contextmanager
def _in_float32(module: nn.Module) -> Iterator[bool]:
    """Within the block a layer holds its weights in float32, unless it is quantised; yields whether it does."""
    held = [(tensor, tensor.data) for tensor in (*module.parameters(), *module.buffers())]
    half = [(tensor, data) for tensor, data in held if data.dtype in (torch.float16, torch.bfloat16)]
    is_plain = all(tensor.is_floating_point() and tensor.element_size() > 1 for tensor in module.parameters())
    try:
        for tensor, data in half * is_plain:
            tensor.data = data.float()
        yield is_plain
    finally:
        for tensor, data in half:
            tensor.data = data


def _as_float32(value: Any) -> Any:
    """Arguments of a layer, with their floating-point tensors in float32."""
    if isinstance(value, torch.Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, tuple | list):
        return type(value)(map(_as_float32, value))
    return {key: _as_float32(each) for key, each in value.items()} if isinstance(value, dict) else value


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """(B, S, hidden) what a layer reads."""
    return args[0] if args else kwargs["hidden_states"]
