"""Which layers attend how: the settings on the attention layers of a model, and the switches that set them.

`configure_attention` puts one `AttentionSettings` on all attention modules of a model, and `attention` reads it there.
Nothing is kept in module globals, so two models in one process do not touch each other.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel
from transformers.utils import logging

from peft_longlora import backends, kernels
from peft_longlora.calls import Call
from peft_longlora.layers import find_attention_modules, is_causal_layer, is_local_layer
from peft_longlora.rotary import find_rotary_modules
from peft_longlora.window import window_of

logger = logging.get_logger(__name__)

S2_ATTN = "s2_attn"
FASTEST = "fastest"
Mode = Literal["auto", "sparse", "dense"]
_SETTINGS = "s2_settings"


@dataclass
class AttentionSettings:
    """How the layers of one model attend; shared by all of them.

    Attributes:
        group_size: G, tokens.
        group_size_ratio: G's fraction of the window, which it follows; None where G itself was given.
        pattern: "s2", "local" or "full".
        dense_layers: indices of layers that stay dense while training.
        dense_attention: the transformers attention that runs wherever S2-Attn does not.
        is_fastest: whether whole causal rows go through the fastest kernel instead.
        backend: the kernel of sparse layers, one of `backends.BACKENDS`, or None for the fastest.
        mode: "auto" (sparse while training), "sparse" or "dense"; set by `use_attention`.
        mesh: the ranks that share each sequence, a one-dimensional DeviceMesh, or None (`parallelize_sequence`).
        is_enabled: False while the adapter that brought these settings is switched off: then all is as without it.
        call: what the model was last called with.
    """

    group_size: int
    pattern: str = "s2"
    dense_layers: frozenset[int] = frozenset()
    dense_attention: str = "sdpa"
    backend: str | None = None
    is_fastest: bool = False
    mode: Mode = "auto"
    group_size_ratio: float | None = None
    mesh: DeviceMesh | None = field(default=None, repr=False, compare=False)
    is_enabled: bool = True
    call: Call = field(default_factory=Call, repr=False, compare=False)

    def pattern_of(self, module: nn.Module) -> str:
        """The pattern of a layer in a sparse forward."""
        return "full" if getattr(module, "layer_idx", None) in self.dense_layers else self.pattern

    def is_sparse(self, training: bool) -> bool:
        """Whether a forward of a module in this mode is sparse."""
        return self.is_enabled and (self.mode == "sparse" or (self.mode == "auto" and training))


@dataclass(frozen=True)
class AttentionState:
    """The attention of a model before an adapter changed it."""

    implementation: str | dict[str, str]
    settings: dict[str, AttentionSettings]

    @classmethod
    def of(cls, model: PreTrainedModel) -> AttentionState:
        """What `model` attends with now."""
        layers = find_attention_modules(model)
        found = {name: getattr(module, _SETTINGS) for name, module in layers.items() if hasattr(module, _SETTINGS)}
        parts = {name: getattr(model.config, name, None) for name in model.config.sub_configs}
        of_parts = {name: part._attn_implementation for name, part in parts.items() if part is not None}
        name = model.config._attn_implementation
        return cls({"": name, **of_parts} if of_parts else name, found)

    def put_on(self, model: PreTrainedModel) -> None:
        """Make `model` attend so again."""
        model.set_attn_implementation(self.implementation)
        _replace_settings(model, self.settings)
        follow_window(model)


def settings_of(module: nn.Module) -> AttentionSettings:
    """The settings of an attention layer; the defaults where `configure_attention` was never called."""
    settings = getattr(module, _SETTINGS, None)
    if settings is None:
        if is_causal_layer(module):
            settings = AttentionSettings(group_size_of(None, 0.25, window_of(module.config)), group_size_ratio=0.25)
        else:  # an image encoder, say, whose config knows of no window
            settings = AttentionSettings(0, "full")
        settings.dense_attention = _default_attention(module)
        setattr(module, _SETTINGS, settings)
    return settings


def _default_attention(module: nn.Module) -> str:
    """What transformers runs where nothing was asked for: sdpa, but for architectures that it would compute wrongly."""
    classes = vars(sys.modules[type(module).__module__]).values()
    models = [c for c in classes if isinstance(c, type) and issubclass(c, PreTrainedModel) and c is not PreTrainedModel]
    return "sdpa" if all(model._supports_sdpa for model in models) else "eager"


def configure_attention(
    model: PreTrainedModel,
    *,
    group_size: int | None = None,
    group_size_ratio: float = 0.25,
    pattern: str = "s2",
    dense_layers: list[int] | None = None,
    dense_attention: str | None = None,
    backend: str | None = None,
) -> AttentionSettings:
    """Switch a model to S2-Attn: sparse while it trains, dense otherwise. No adapter is needed.

    Args:
        model: a rotary causal language model of transformers.
        group_size: G, tokens, even, 2 or more. None: `group_size_ratio` of the model's window.
        group_size_ratio: in (0, 1], of the model's window, also when `scale_rope` changes it later.
        pattern: "s2", "local" or "full".
        dense_layers: indices of layers that stay dense while training.
        dense_attention: the transformers attention wherever S2-Attn does not run ("sdpa", "flash_attention_2", ...).
            None: what the model runs now, or would run had it not been loaded with "s2_attn". "fastest": the same as
            None where there is a cache, a window or a mask that is not causal; elsewhere (evaluation, prefill) the
            fastest kernel there is, whose rounding is its own.
        backend: the kernel of sparse layers, one of `backends.BACKENDS`. None: as before, at first the fastest there
            is.

    Returns:
        The settings now on every attention layer.

    Raises:
        ValueError: a value outside its rule. NotImplementedError: an architecture that does not take its attention
            from transformers' interface, or has no rotary embeddings. The model is left as it was.
    """
    check_architecture(model)
    config = model.config.get_text_config()
    layers = find_attention_modules(model)
    indices = {module.layer_idx for module in layers.values()}
    if unknown := sorted(set(dense_layers or ()) - indices):
        raise ValueError(
            f"dense_layers={dense_layers} names {unknown}, which this model does not have: its layers are "
            f"{min(indices)} to {max(indices)}."
        )
    size = group_size_of(group_size, group_size_ratio, window_of(config))
    kernels.check_pattern(size, pattern)
    previous = config._attn_implementation
    known = next((getattr(m, _SETTINGS) for m in layers.values() if hasattr(m, _SETTINGS)), None)
    if dense_attention in (None, FASTEST):
        is_fastest = dense_attention == FASTEST
        if previous != S2_ATTN:
            dense_attention = previous
        else:
            dense_attention = known.dense_attention if known else model.get_correct_attn_implementation(None)
            is_fastest = is_fastest or (known is not None and known.is_fastest)
    else:
        dense_attention, is_fastest = model.get_correct_attn_implementation(dense_attention), False
    backend = backend or (known.backend if known else None)
    settings = AttentionSettings(size, pattern, frozenset(dense_layers or ()), dense_attention, backend, is_fastest)
    settings.group_size_ratio = group_size_ratio if group_size is None else None
    settings.mesh = known.mesh if known else None
    backends.check_model(config, layers.values(), settings.backend)
    if layers and all(is_local_layer(module, config) for module in layers.values()):
        logger.warning(
            f"Every layer of this model has a window of its own (sliding_window="
            f"{getattr(config, 'sliding_window', None)}) and keeps it, so S2-Attn changes none. If the model was "
            f"trained without it, load it with sliding_window=None."
        )
    parts = [name for name in model.config.sub_configs if getattr(model.config, name, None) is config]
    # Encoders of images and sounds keep theirs.
    model.set_attn_implementation({"": S2_ATTN, parts[0]: S2_ATTN} if parts else S2_ATTN)
    _replace_settings(model, dict.fromkeys(layers, settings))
    return settings


def _replace_settings(model: PreTrainedModel, settings: dict[str, AttentionSettings]) -> None:
    """Put settings on the attention layers by name, in place of what they have."""
    for name, module in find_attention_modules(model).items():
        if hasattr(module, _SETTINGS):
            getattr(module, _SETTINGS).call.leave()
            delattr(module, _SETTINGS)
        if name in settings:
            setattr(module, _SETTINGS, settings[name])
    for one in {id(s): s for s in settings.values()}.values():
        one.call.follow(model)


def check_architecture(model: PreTrainedModel) -> None:
    """Refuse a model that would silently train with something else than S2-Attn.

    Raises: NotImplementedError.
    """
    kind = getattr(model.config, "model_type", type(model).__name__)
    layers = find_attention_modules(model).values()
    if layers and not any(is_causal_layer(module) for module in layers):
        raise NotImplementedError(
            f"{kind} ({type(model).__name__}) is no causal language model: its tokens see later ones, which groups "
            f"cannot express. Use a decoder (llama, qwen3, mistral, gemma3, gpt_neox, ...)."
        )
    if not model._can_set_attn_implementation() or not layers:
        raise NotImplementedError(
            f"{kind} ({type(model).__name__}) does not take its attention from transformers' attention interface, so "
            f"S2-Attn would never run. Use an architecture that does (llama, qwen3, mistral, gemma3, gpt_neox, ...)."
        )
    if not find_rotary_modules(model):
        raise NotImplementedError(
            f"{kind} ({type(model).__name__}) has no rotary position embeddings that could be rescaled, so its window "
            f"cannot be extended. Use a rotary architecture (llama, qwen3, mistral, gemma3, gpt_neox, ...)."
        )


def group_size_of(group_size: int | None, ratio: float, window: int) -> int:
    """G in tokens: the one given, or a fraction of the window, rounded down to an even number.

    Raises: ValueError: a ratio outside (0, 1].
    """
    if group_size is not None:
        return group_size
    if not 0 < ratio <= 1:
        raise ValueError(f"group_size_ratio={ratio} is outside (0, 1]: it is a fraction of the window ({window}).")
    return max(2, int(window * ratio) // 2 * 2)


def follow_window(model: PreTrainedModel) -> None:
    """Set groups anew that are a fraction of the window, after it has changed."""
    window = window_of(model.config.get_text_config())
    for module in find_attention_modules(model).values():
        settings = getattr(module, _SETTINGS, None)
        if settings is not None and settings.group_size_ratio is not None:
            settings.group_size = group_size_of(None, settings.group_size_ratio, window)


@contextmanager
def use_attention(model: nn.Module, mode: Mode, *, dense_attention: str | None = None) -> Iterator[None]:
    """Within the block, attend as `mode` says; works on a bare and on a PEFT model.

    Args:
        model: a model whose attention is "s2_attn".
        mode: "auto" (sparse while `module.training`), "sparse" (in evaluation and prefill too, to measure a pattern
            by itself) or "dense".
        dense_attention: "fastest" as in `configure_attention`, for evaluation; None leaves it as it is.

    Raises:
        ValueError: an unknown mode, a model without S2-Attn, or "sparse" while its adapter is disabled.
    """
    if mode not in ("auto", "sparse", "dense"):
        raise ValueError(f"mode={mode!r} is unknown. Use 'auto', 'sparse' or 'dense'.")
    if dense_attention not in (None, FASTEST):
        raise ValueError(
            f"dense_attention={dense_attention!r} cannot be used for a while. Use None or 'fastest' here, or name a "
            f"transformers attention in configure_attention(model, dense_attention=...)."
        )
    layers = find_attention_modules(model).values()
    if not layers or any(getattr(m.config, "_attn_implementation", S2_ATTN) != S2_ATTN for m in layers):
        raise ValueError(
            "This model does not use S2-Attn. Load it with attn_implementation='s2_attn', call configure_attention, "
            "or add a LongLoraConfig adapter first."
        )
    before = {id(s): (s, s.mode, s.is_fastest) for s in map(settings_of, layers)}
    if mode == "sparse" and not all(settings.is_enabled for settings, *_ in before.values()):
        raise ValueError(
            "The adapter that brought S2-Attn is disabled, so the model is its base, which is dense. Leave "
            "disable_adapter() first, or call configure_attention(model) on the base."
        )
    try:
        for settings, *_ in before.values():
            settings.mode = mode
            settings.is_fastest = settings.is_fastest or dense_attention == FASTEST
        yield
    finally:
        for settings, *previous in before.values():
            settings.mode, settings.is_fastest = previous
