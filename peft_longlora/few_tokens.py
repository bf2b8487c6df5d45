"""A few tokens through a model as it stands, to see what it does: nothing of it is changed.

What a model is can be read from its layers (`architecture`); what it does, only from its forward.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from peft_longlora.architecture import has_liger_kernels, rows_of, same_modes

TOKENS = 24
# How far outputs may be apart, as a part of their size, by the precision of the weights: sums in another order.
TOLERANCE, OF_HALF = {torch.float64: 1e-3, torch.float32: 1e-3}, 0.1


def key_of(model: PreTrainedModel, *more: str) -> str:
    """What decides how a model is computed, its RoPE left out; equal for two models of the same class and config."""
    config = {
        k: v for k, v in model.config.to_dict().items() if k not in ("rope_parameters", "max_position_embeddings")
    }
    said = json.dumps([config, *more], sort_keys=True, default=str)
    return f"{type(model).__module__}.{type(model).__qualname__} {hashlib.sha256(said.encode()).hexdigest()}"


def is_elsewhere(model: PreTrainedModel) -> bool:
    """Whether weights of a model are not whole in memory: on the meta device, DeepSpeed ZeRO-3, sharded."""
    return any(p.is_meta or hasattr(p, "ds_id") or hasattr(p, "placements") for p in model.parameters())


def can_run(model: PreTrainedModel, attention: str) -> bool:
    """Whether a model can run here and now.

    Not if its weights are elsewhere, if it waits on the CPU for a GPU that it needs (quantised, a flash kernel, Liger's
    kernels), or if it is compiled.

    Args:
        attention: the transformers attention with which it would run.
    """
    needs_gpu = getattr(model, "is_quantized", False) or "flash" in attention or has_liger_kernels(model)
    waits = needs_gpu and next(model.parameters()).device.type == "cpu"
    return not is_elsewhere(model) and not waits and model._compiled_call_impl is None


def tolerance_of(model: PreTrainedModel) -> float:
    """How far the outputs of a model may be apart, as a part of their size."""
    return max(TOLERANCE.get(parameter.dtype, OF_HALF) for parameter in model.parameters())


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """The distance of two tensors, as a part of the size of `b`."""
    a, b = a.float(), b.float()
    return ((a - b).norm() / b.norm().clamp(min=1e-6)).item()


def sample_rows(model: PreTrainedModel) -> torch.Tensor:
    """(2, TOKENS) token ids that mean text; the rows are equal in their first half."""
    special = set(_special_ids(model.config))
    most = min(rows_of(model.get_input_embeddings()), getattr(model.config.get_text_config(), "vocab_size", 2**30))
    plain = [i for i in range(min(most, 8 * TOKENS)) if i not in special] or [0]
    generator = torch.Generator().manual_seed(0)
    ids = torch.tensor(plain)[torch.randint(0, len(plain), (2, TOKENS), generator=generator)]
    ids[1, : TOKENS // 2] = ids[0, : TOKENS // 2]
    return ids.to(model.get_input_embeddings().weight.device)


def _special_ids(config: PreTrainedConfig) -> Iterator[int]:
    """Ids that a config gives a meaning: the places of images, the ends of rows ..."""
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            yield from _special_ids(value)
        elif name.endswith(("token_id", "token_index", "token_ids")):
            yield from value if isinstance(value, list | tuple) else (value,)


@torch.no_grad()
def outputs(model: PreTrainedModel, ids: torch.Tensor, **more: torch.Tensor) -> torch.Tensor:
    """(B, S, vocabulary) logits; without an output layer, the hidden states."""
    called = model if model.get_output_embeddings() is not None else model.base_model
    out = called(input_ids=ids, use_cache=False, **more)
    return out.logits if getattr(out, "logits", None) is not None else out[0]


@contextmanager
def at_rest(model: PreTrainedModel) -> Iterator[None]:
    """The model in evaluation, with random numbers as they were."""
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with same_modes(model), torch.random.fork_rng(devices=list(devices)):
        model.eval()
        yield


def short(error: BaseException) -> str:
    """An error's message in a line."""
    return " ".join(str(error).split())[:300]
