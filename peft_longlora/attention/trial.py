"""A few tokens through a model when S2-Attn is put on it: does it compute what it computed, and is it causal?

What a model is can be read from its layers (`architecture`); what it does with its attention, only from its forward. A
model that nobody has tried is tried here, so it is refused before training and not believed. Each kind of model is
tried once in a process. `configure` calls it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from peft_longlora.architecture import is_causal_layer, rows_of
from peft_longlora.attention.caution import MASK, ROPE
from peft_longlora.attention.layer import LayerCall
from peft_longlora.attention.settings import AttentionSettings

TOKENS = 24
LENGTHS = (13, 11)  # tokens of the documents of a packed row
# How far outputs may be apart, as a part of their size, by the precision of the weights: sums in another order.
TOLERANCE, OF_HALF = {torch.float64: 1e-3, torch.float32: 1e-3}, 0.1
# Arguments with numbers for tokens or heads that the kernels of S2-Attn know or need not know.
KNOWN = {"s_aux", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}
# For each kind that was tried, why it takes no packed rows, or None.
_tried: dict[str, str | None] = {}


def try_out(
    model: PreTrainedModel, settings: AttentionSettings, put_back: Callable[[], None], put_on: Callable[[], None]
) -> None:
    """Run a few tokens through a model with its own attention and with that of `settings`, and compare.

    Args:
        model: with S2-Attn on it.
        settings: of its layers.
        put_back, put_on: give the model its own attention, and S2-Attn again.

    Nothing is run if the weights are not all here (meta device, DeepSpeed ZeRO-3, sharded), if the model waits on the
    CPU for a GPU that it needs (quantised, a flash kernel), if ranks share its sequences, or if a model of the same
    class and config was tried before.

    Raises:
        NotImplementedError: the model fails, computes something else, lets a token see a later one, or gives its
            attention something that the kernels do not know.

    If a document of a packed row differs from itself alone, `settings.refuses_packed` says so, and layers refuse such
    rows.
    """
    key = _key(model, settings)
    if key in _tried:
        settings.refuses_packed = _tried[key]
        return
    if settings.sharing is not None or not _can_run(model, settings):
        return
    kind = f"{model.config.model_type} ({type(model).__name__})"
    ids = _rows(model)
    with _at_rest(model):
        put_back()
        try:
            own = _outputs(model, ids)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            put_on()
            raise NotImplementedError(
                f"{kind} cannot be run on token ids alone, so S2-Attn cannot be tried on it: "
                f"{type(error).__name__}: {_short(error)} Use a model that reads plain text, or its language model "
                f"alone."
            ) from error
        put_on()
        called: list[nn.Module] = []
        unknown: set[str] = set()

        def see(call: LayerCall) -> None:
            called.append(call.module)
            unknown.update(name for name in call.more if name not in KNOWN and _counts(call.more[name]))

        settings.probe, before = see, settings.probe
        settings.mode, mode = "dense", settings.mode
        try:
            dense = _outputs(model, ids)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise NotImplementedError(
                f"{kind} does not run with S2-Attn's mask in place of its own: {type(error).__name__}: {_short(error)} "
                f"Use an architecture that leaves the mask to its attention (llama, qwen3, mistral, gemma3, ...)."
            ) from error
        finally:
            settings.probe, settings.mode = before, mode
    if not any(map(is_causal_layer, called)):
        raise NotImplementedError(
            f"{kind} calls none of its attention layers on plain text, so S2-Attn would never run. Use another model."
        )
    if unknown:
        raise NotImplementedError(
            f"{kind} gives its attention {', '.join(sorted(unknown))}, which the kernels of S2-Attn do not know: they "
            f"would leave it out. Use an architecture whose attention is decided by queries, keys, values and a mask."
        )
    settings.refuses_packed = None
    if own.isfinite().all():
        tolerance = max(TOLERANCE.get(parameter.dtype, OF_HALF) for parameter in model.parameters())
        error = _far(dense, own)
        if not error <= tolerance:
            raise NotImplementedError(
                f"{kind} computes something else if its attention has another name: {error:.1%} of the size of its "
                f"outputs on {TOKENS} tokens. S2-Attn would train another model. Use another architecture."
            )
        half = TOKENS // 2
        # The two rows differ only behind their first half.
        if dense.dim() == 3 and not _far(dense[0, :half], dense[1, :half]) <= tolerance:
            raise NotImplementedError(
                f"{kind} lets tokens see later ones, which groups cannot express. Use a causal language model."
            )
        with _at_rest(model):
            settings.refuses_packed = _try_packed(model, settings, ids[0], dense[0], tolerance, kind)
    _tried[key] = settings.refuses_packed


def _try_packed(
    model: PreTrainedModel, settings: AttentionSettings, ids: torch.Tensor, dense: torch.Tensor, far: float, kind: str
) -> str | None:
    """Run a packed row in dense and in sparse mode, and compare each document with itself alone.

    Args:
        ids, dense: a row of tokens, and what it gave. Its beginnings are the documents: a causal model gives them what
            it gives them alone. In groups longer than the row, so does a sparse one.
        far: how far outputs may be apart.

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
            error = _far(_outputs(model, row, position_ids=positions)[0], wanted)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # as it does in training
            continue
        finally:
            settings.mode, settings.given_size, settings.backend, settings.warned = before
        if not error <= far:
            return (
                f"{kind} does not keep the documents of a packed row apart: in {mode} mode they differ from each alone "
                f"by {error:.1%} of the size of their outputs. Something else than its attention reads earlier tokens, "
                f"or counts them. Give each document a row of its own (packing=False), without padding before it."
            )
    return None


def _counts(x: object) -> bool:
    """Whether an argument of attention may change scores: numbers for tokens or heads."""
    return isinstance(x, torch.Tensor) and x.dim() > 0


def _key(model: PreTrainedModel, settings: AttentionSettings) -> str:
    """What decides how a model is computed, its RoPE left out."""
    config = {
        k: v for k, v in model.config.to_dict().items() if k not in ("rope_parameters", "max_position_embeddings")
    }
    said = json.dumps([config, settings.dense_attention], sort_keys=True, default=str)
    return f"{type(model).__module__}.{type(model).__qualname__} {hashlib.sha256(said.encode()).hexdigest()}"


def _can_run(model: PreTrainedModel, settings: AttentionSettings) -> bool:
    is_split = any(p.is_meta or hasattr(p, "ds_id") or hasattr(p, "placements") for p in model.parameters())
    needs_gpu = getattr(model, "is_quantized", False) or "flash" in settings.dense_attention
    waits = needs_gpu and next(model.parameters()).device.type == "cpu"
    return not is_split and not waits and model._compiled_call_impl is None


def _far(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.float(), b.float()
    return ((a - b).norm() / b.norm().clamp(min=1e-6)).item()


def _rows(model: PreTrainedModel) -> torch.Tensor:
    """(2, TOKENS) token ids that mean text; the rows are equal in their first half."""
    special = set(_special_ids(model.config))
    rows = min(rows_of(model.get_input_embeddings()), getattr(model.config.get_text_config(), "vocab_size", 2**30))
    plain = [i for i in range(min(rows, 8 * TOKENS)) if i not in special] or [0]
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
def _outputs(model: PreTrainedModel, ids: torch.Tensor, **more: torch.Tensor) -> torch.Tensor:
    """(2, TOKENS, vocabulary) logits; without an output layer, the hidden states."""
    called = model if model.get_output_embeddings() is not None else model.base_model
    out = called(input_ids=ids, use_cache=False, **more)
    return out.logits if getattr(out, "logits", None) is not None else out[0]


@contextmanager
def _at_rest(model: PreTrainedModel) -> Iterator[None]:
    """The model in evaluation, with random numbers as they were."""
    modes = {module: module.training for module in model.modules()}
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    model.eval()
    try:
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
