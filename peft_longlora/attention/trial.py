"""A few tokens through a model when S2-Attn is put on it: does it compute what it computed, and is it causal?

A model that nobody has tried is tried here, so it is refused before training and not believed. Each kind of model is
tried once in a process. `configure` calls it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedModel

from peft_longlora.architecture import is_causal_layer
from peft_longlora.attention.caution import MASK, ROPE
from peft_longlora.attention.layer import LayerCall
from peft_longlora.attention.settings import S2_ATTN, AttentionSettings
from peft_longlora.few_tokens import (
    TOKENS,
    at_rest,
    can_run,
    distance,
    key_of,
    outputs,
    sample_rows,
    short,
    tolerance_of,
)

LENGTHS = (13, 11)  # tokens of the documents of a packed row
# Arguments with numbers for tokens or heads that the kernels of S2-Attn know or need not know.
KNOWN = {"s_aux", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}
# For each kind that was tried, why it takes no packed rows, or None.
_tried: dict[str, str | None] = {}


def try_out(model: PreTrainedModel, settings: AttentionSettings, use: Callable[[str], None]) -> None:
    """Run a few tokens through a model with its own attention and with that of `settings`, and compare.

    Args:
        model: with S2-Attn on it.
        settings: of its layers.
        use: gives the model the attention of a name.

    Nothing is run if the model cannot run now (`few_tokens.can_run`), if ranks share its sequences, or if a model of
    the same class and config was tried before.

    Raises:
        NotImplementedError: the model fails, computes something else, lets a token see a later one, or gives its
            attention a mask of its own or something that the kernels do not know.

    If a document of a packed row differs from itself alone, `settings.refuses_packed` says so, and layers refuse such
    rows.
    """
    key = key_of(model, settings.dense_attention)
    if key in _tried:
        settings.refuses_packed = _tried[key]
        return
    if settings.sharing is not None or not can_run(model, settings.dense_attention):
        return
    kind = f"{model.config.model_type} ({type(model).__name__})"
    ids, most = sample_rows(model), tolerance_of(model)
    with at_rest(model):
        use(settings.dense_attention)
        try:
            own = _own(model, ids, kind)
        finally:
            use(S2_ATTN)
        dense = _through_layers(model, settings, ids, kind)
        settings.refuses_packed = None
        if own.isfinite().all():
            _compare(own, dense, most, kind)
            settings.refuses_packed = _try_packed(model, settings, ids[0], dense[0], most, kind)
    _tried[key] = settings.refuses_packed


def _own(model: PreTrainedModel, ids: torch.Tensor, kind: str) -> torch.Tensor:
    """What a model computes with its own attention.

    Raises: NotImplementedError: it fails.
    """
    try:
        return outputs(model, ids)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise NotImplementedError(
            f"{kind} cannot be run on token ids alone, so S2-Attn cannot be tried on it: {type(error).__name__}: "
            f"{short(error)} Use a model that reads plain text, or its language model alone."
        ) from error


def _through_layers(model: PreTrainedModel, settings: AttentionSettings, ids: torch.Tensor, kind: str) -> torch.Tensor:
    """What a model computes with dense attention in the layers of S2-Attn.

    Raises:
        NotImplementedError: it fails, it calls no such layer, or it gives one what the kernels do not know or cannot
            cut.
    """
    called: list[nn.Module] = []
    unknown: set[str] = set()
    masks: set[str] = set()

    def see(call: LayerCall) -> None:
        called.append(call.module)
        if isinstance(call.mask, torch.Tensor) and is_causal_layer(call.module) and not call.is_local:
            masks.add(f"{tuple(call.mask.shape)} in {type(call.module).__name__}")
        unknown.update(name for name in call.more if name not in KNOWN and _counts(call.more[name]))

    settings.probe, probe = see, settings.probe
    settings.mode, mode = "dense", settings.mode
    try:
        found = outputs(model, ids)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise NotImplementedError(
            f"{kind} does not run with S2-Attn's mask in place of its own: {type(error).__name__}: {short(error)} "
            f"Use an architecture that leaves the mask to its attention (llama, qwen3, mistral, gemma3, ...)."
        ) from error
    finally:
        settings.probe, settings.mode = probe, mode
    if not any(map(is_causal_layer, called)):
        raise NotImplementedError(
            f"{kind} calls none of its attention layers on plain text, so S2-Attn would never run. Use another model."
        )
    if masks:
        raise NotImplementedError(
            f"{kind} gives its attention a mask of its own ({', '.join(sorted(masks))}), which cannot be cut into "
            f"groups. Use an architecture that leaves the mask to transformers (llama, qwen3, mistral, gemma3, ...)."
        )
    if unknown:
        raise NotImplementedError(
            f"{kind} gives its attention {', '.join(sorted(unknown))}, which the kernels of S2-Attn do not know: they "
            f"would leave it out. Use an architecture whose attention is decided by queries, keys, values and a mask."
        )
    return found


def _compare(own: torch.Tensor, dense: torch.Tensor, most: float, kind: str) -> None:
    """Refuse a model that computes something else in the layers of S2-Attn, or is not causal.

    Raises: NotImplementedError.
    """
    error = distance(dense, own)
    if not error <= most:
        raise NotImplementedError(
            f"{kind} computes something else if its attention has another name: {error:.1%} of the size of its "
            f"outputs on {TOKENS} tokens. S2-Attn would train another model. Use another architecture."
        )
    half = TOKENS // 2
    # The two rows differ only behind their first half.
    if dense.dim() == 3 and not distance(dense[0, :half], dense[1, :half]) <= most:
        raise NotImplementedError(
            f"{kind} lets tokens see later ones, which groups cannot express. Use a causal language model."
        )


def _try_packed(
    model: PreTrainedModel, settings: AttentionSettings, ids: torch.Tensor, dense: torch.Tensor, most: float, kind: str
) -> str | None:
    """Run a packed row in dense and in sparse mode, and compare each document with itself alone.

    Args:
        ids, dense: a row of tokens, and what it gave. Its beginnings are the documents: a causal model gives them what
            it gives them alone. In groups longer than the row, so does a sparse one.
        most: how far outputs may be apart.

    Returns: why packed rows must be refused; None if they are right, or if they already raise an error.
    """
    if dense.dim() != 2:
        return None
    row = torch.cat([ids[:length] for length in LENGTHS])[None]
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None].to(ids.device)
    wanted = torch.cat([dense[:length] for length in LENGTHS])
    before = settings.mode, settings.given_size, settings.backend, settings.warned
    for mode in ("dense", "sparse"):
        settings.mode, settings.given_size, settings.backend = mode, 2 * TOKENS, "sdpa"
        settings.warned = {MASK, ROPE}  # these rows are not the user's
        try:
            error = distance(outputs(model, row, position_ids=positions)[0], wanted)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # as it does in training
            continue
        finally:
            settings.mode, settings.given_size, settings.backend, settings.warned = before
        if not error <= most:
            return (
                f"{kind} does not keep the documents of a packed row apart: in {mode} mode they differ from each alone "
                f"by {error:.1%} of the size of their outputs. Something else than its attention reads earlier tokens, "
                f"or counts them. Give each document a row of its own (packing=False), without padding before it."
            )
    return None


def _counts(x: object) -> bool:
    """Whether an argument of attention may change scores: numbers for tokens or heads."""
    return isinstance(x, torch.Tensor) and x.dim() > 0
