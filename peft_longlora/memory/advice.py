"""If a step runs out of memory all the same: the switch that would have made it fit. Called by users."""

from __future__ import annotations

from contextlib import AbstractContextManager, ContextDecorator
from traceback import format_tb
from typing import Any

import torch
from torch import nn
from transformers.utils import is_liger_kernel_available

from peft_longlora.memory.blocks import find_blocks, unwrapped
from peft_longlora.memory.keep import keep_attention, keep_in_host
from peft_longlora.memory.liger import kernels_of
from peft_longlora.memory.offload import Offload
from peft_longlora.memory.plan import TILE
from peft_longlora.memory.tile import Tiled, find_feed_forwards

CALL = "peft_longlora.memory.checkpoint_blocks(model"
OTHERWISE = "use shorter rows, a 4-bit base, or more GPUs that share a row (peft_longlora.sequence)"


def explain_out_of_memory(model: nn.Module) -> AbstractContextManager[None]:
    """Within this context, an error for lack of GPU memory names the switch that would have made the step fit.

    Weights and optimiser stay as they were before the step: its gradients and other tensors are dropped, and the same
    model can go on with a shorter row or other switches, also in a notebook, which keeps the last error.

    Args:
        model: the model that is trained, bare or PEFT; it may be wrapped by DDP.

    Returns: the context; put `trainer.train()`, or a loop of steps, inside.

    Raises:
        torch.OutOfMemoryError: in place of PyTorch's, which it holds as its cause, with its traceback as a note: the
            traceback itself would keep the step's tensors.
    """
    return _Explaining(model)


class _Explaining(AbstractContextManager[None], ContextDecorator):
    """The context. Not a generator: contextlib's own frame would keep the traceback."""

    def __init__(self, model: nn.Module):
        self.model = model

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if not isinstance(error, torch.OutOfMemoryError):
            return
        where = format_tb(traceback)
        _drop_tracebacks(error)
        _drop_step(self.model)
        text = f"The step does not fit into the GPU's memory. {_next_switch(self.model)}\n{error}"
        error.__notes__ = [*getattr(error, "__notes__", ()), "".join(where)]  # printed by Python 3.11 and later
        del self, traceback  # a kept error holds this frame, and would hold the model and the step's tensors
        raise torch.OutOfMemoryError(text) from error


def _drop_step(model: nn.Module) -> None:
    """What a step that ended with an error has left in the model."""
    for block in find_blocks(model):
        if isinstance(function := block.__dict__.get("_gradient_checkpointing_func"), Offload):
            function.forget()
    model.zero_grad(set_to_none=True)


def _drop_tracebacks(error: BaseException | None) -> None:
    """Of an error, of its cause, and of what was handled when it came: frames hold the step's tensors."""
    seen: list[BaseException] = []
    waiting = [error]
    while waiting:
        one = waiting.pop()
        if one is not None and one not in seen:
            seen.append(one)
            one.__traceback__ = None
            waiting += [one.__cause__, one.__context__]


def state_of(model: nn.Module) -> dict[str, Any]:
    """The switches of `checkpoint_blocks` that are on.

    Args:
        model: as above.

    Returns:
        `checkpointed`: whether any block is; `free`, `keep` (on the GPU), `keep_in_host`, `offload` (0 or n) and
        `tile_tokens`; `whole`: how many feed-forward layers of checkpointed blocks compute whole rows. A mixture of
        experts has no tiles.
    """
    blocks = find_blocks(model)
    checkpointed = [block for block in blocks if block.gradient_checkpointing]
    functions = [block._gradient_checkpointing_func for block in checkpointed]
    offloads = [function for function in functions if isinstance(function, Offload)]
    inner = [function.checkpoint if isinstance(function, Offload) else function for function in functions]
    kept = [getattr(function, "keywords", {}).get("context_fn") for function in inner]
    tiles = [module.tile_tokens for module in model.modules() if isinstance(module, Tiled)]
    return dict(
        checkpointed=bool(functions),
        free=len(blocks) - len(functions),
        keep=kept.count(keep_attention),
        keep_in_host=sum(getattr(function, "func", None) is keep_in_host for function in kept),
        offload=_every(offloads),
        tile_tokens=min(tiles, default=None),
        whole=sum(not isinstance(module, Tiled) for block in checkpointed for module in find_feed_forwards(block)),
    )


def _every(offloads: list[Offload]) -> int:
    """n, if the input of every n-th block waits in the host's memory; 0 if none does."""
    return -(-len(offloads) // sum(one.before is None for one in offloads)) if offloads else 0


def _next_switch(model: nn.Module) -> str:
    """The cheapest switch that is still off."""
    if not find_blocks(model):
        return f"transformers cannot checkpoint the blocks of {type(unwrapped(model)).__name__}: {OTHERWISE}."
    on = state_of(model)
    if not on["checkpointed"]:
        return f"No block is checkpointed: call {CALL}), or fit_memory(model, length), which chooses."
    if on["free"]:
        return f"{on['free']} blocks keep everything: call {_call(on, free=0)}, or fit_memory(model, length)."
    if on["whole"]:
        return f"Feed-forward layers compute whole rows: call {_call(on, tile_tokens=TILE)}."
    if not kernels_of(model) and not is_liger_kernel_available():
        return "Norms and loss make float32 copies of the row: install liger-kernel, and call fit_memory again."
    if not on["offload"]:
        return f"The inputs of all blocks stay on the GPU: call {_call(on, offload=True)}."
    if on["keep"]:
        return f"{on['keep']} blocks keep attention on the GPU: call {_call(on, keep=False)}."
    return f"Every switch is on: {OTHERWISE}."


def _call(on: dict[str, Any], **changes: Any) -> str:
    """The call that makes these changes, and leaves every other switch as it is: the defaults may need more memory."""
    names = "free", "keep", "keep_in_host", "offload", "tile_tokens"
    others = {name: on[name] for name in names if name not in changes and (on[name] or name == "keep")}
    return f"{CALL}, {', '.join(f'{name}={value}' for name, value in {**changes, **others}.items())})"
