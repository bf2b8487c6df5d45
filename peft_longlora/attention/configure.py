"""`configure_attention` says how the layers of a model attend, and puts S2-Attn on it."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from peft_longlora.architecture import (
    check_architecture,
    check_masks,
    find_attention_modules,
    find_text_model,
    is_local_layer,
)
from peft_longlora.attention.effect import RATIO, check_effect
from peft_longlora.attention.schedule import Schedule, check_dense_every
from peft_longlora.attention.settings import (
    FASTEST,
    S2_ATTN,
    AttentionSettings,
    AttentionState,
    replace_settings,
    settings_on,
)
from peft_longlora.attention.skips import check_skips
from peft_longlora.attention.trial import try_out
from peft_longlora.kernels.backends import check_backend
from peft_longlora.kernels.patterns import check_blocks, check_layers, check_pattern, group_size_of
from peft_longlora.rope.absent import check_positions
from peft_longlora.rope.parameters import window_of
from peft_longlora.rope.state import OWNER

logger = logging.get_logger(__name__)


def configure_attention(
    model: PreTrainedModel,
    *,
    group_size: int | None = None,
    group_size_ratio: float | None = None,
    pattern: str | None = None,
    chosen_blocks: int | None = None,
    dense_layers: list[int] | None = None,
    dense_every: int | None = None,
    skip_positions: bool | None = None,
    dense_attention: str | None = None,
    backend: str | None = None,
) -> AttentionSettings:
    """Switch a model to S2-Attn: sparse in training, dense otherwise. No adapter is needed.

    If the model has a LongLoRA adapter, the adapter's config says how layers attend in training. Then only
    dense_attention and backend can be changed here.

    Args:
        model: a rotary causal language model of transformers.
        group_size: G in tokens, even, 2 or more. None: `group_size_ratio` of the model's window.
        group_size_ratio: a fraction in (0, 1] of the model's window, also if `scale_rope` changes the window later;
            None: 0.25.
        pattern: "s2", "local", "full", "window" or "adaptive", as explained in `s2_attention`; None: "s2".
        chosen_blocks: for "adaptive", as in `s2_attention`.
        dense_layers: indices of layers that stay dense in training.
        dense_every: n: one training forward in n (the n-th, the 2n-th, ...) is dense in every layer, on the kernel of
            `backend`. None or 0: no forward is. `AttentionSettings.training_forwards` says what is counted, and how to
            resume training.
        skip_positions: for "local": in sparse training forwards RoPE's positions begin at 0 in each group, and skip
            once, at a random place, by a random number of tokens that the window has room for (PoSE,
            arXiv:2309.10400). So a group sees the distances of the window. None: False. Forwards are counted as for
            dense_every, and the number of a forward decides what is drawn.
        dense_attention: the transformers attention that runs if S2-Attn does not ("sdpa", "flash_attention_2", ...).
            None: the model's current attention, or the one it would have without "s2_attn". "fastest": the fastest
            installed kernel, which rounds differently, for evaluation and prefill; as None if there is a cache, a
            window or a mask that is not causal.
        backend: the kernel of sparse layers, one of `backends.BACKENDS`. None: the backend that was set before, or the
            fastest.

    Returns:
        The settings that are now on every attention layer.

    Raises:
        ValueError: a value outside its rule, without an effect, or other than the adapter's.
        NotImplementedError: an architecture that does not take its attention from transformers' interface, or has no
            rotary embeddings. The model is not changed then.
    """
    check_model(model)
    config, dense_layers = model.config.get_text_config(), check_layers(dense_layers)
    asked = dict(
        group_size=group_size, group_size_ratio=group_size_ratio, pattern=pattern, chosen_blocks=chosen_blocks,
        dense_layers=dense_layers, dense_every=dense_every, skip_positions=skip_positions,
    )  # fmt: skip
    check_effect(**{**asked, "pattern": pattern or "s2"})
    if owned := _of_adapter(model):
        _refuse_other(owned, asked, window_of(config))
        asked = {**_said_by(owned), "group_size": owned.given_size, "group_size_ratio": owned.group_size_ratio}
    known = settings_on(model)
    dense_attention, is_fastest = _dense_attention(model, known, dense_attention)
    settings = AttentionSettings(
        config,
        **_checked(model, training_forwards=known.training_forwards if known else 0, **asked),
        dense_attention=dense_attention,
        is_fastest=is_fastest,
        backend=backend or (known.backend if known else None),
        sharing=known.sharing if known else None,
        is_enabled=known.is_enabled if owned else True,
    )
    _check_backend(config, settings.backend)
    layers = find_attention_modules(model).values()
    if layers and all(is_local_layer(module, config) for module in layers):
        logger.warning(
            f"Every layer of this model has its own window (sliding_window="
            f"{getattr(config, 'sliding_window', None)}) and keeps it, so S2-Attn changes no layer. If the model was "
            f"trained without it, load it with sliding_window=None."
        )
    _put_on(model, settings)
    return settings


def _checked(
    model: PreTrainedModel,
    *,
    training_forwards: int,
    group_size: int | None,
    group_size_ratio: float | None,
    pattern: str | None,
    chosen_blocks: int | None,
    dense_layers: list[int] | None,
    dense_every: int | None,
    skip_positions: bool | None,
) -> dict[str, Any]:
    """What `configure_attention` was asked for as fields of `AttentionSettings`, with the defaults.

    Raises: ValueError.
    """
    ratio = RATIO if group_size_ratio is None else group_size_ratio
    pattern = "s2" if pattern is None else pattern
    indices = {module.layer_idx for module in find_attention_modules(model).values()}
    indices -= {None, -1}  # several layers of Zamba and Zamba2 run the same attention, which has no number
    if dense_layers and not indices:
        raise ValueError(
            f"dense_layers={dense_layers} names layers by number, but the attention layers of "
            f"{model.config.model_type} have none. Leave it out; dense_every makes whole steps dense."
        )
    if unknown := sorted(set(dense_layers or ()) - indices):
        raise ValueError(
            f"dense_layers={dense_layers} names {unknown}, where this model has no attention: its layers of attention "
            f"are {', '.join(map(str, sorted(indices)))}. Give numbers of these."
        )
    group_size = group_size if group_size is None else check_pattern(group_size, pattern)
    size = check_pattern(group_size_of(group_size, ratio, window_of(model.config.get_text_config())), pattern)
    if not isinstance(skip_positions, bool | None):
        raise ValueError(f"skip_positions={skip_positions!r} must be True or False.")
    if skip_positions:
        check_skips(model, size)
    return dict(
        given_size=group_size,
        group_size_ratio=ratio,
        pattern=pattern,
        chosen_blocks=check_blocks(chosen_blocks),
        dense_layers=frozenset(dense_layers or ()),
        schedule=Schedule(check_dense_every(dense_every), training_forwards, skip_positions=bool(skip_positions)),
    )


def _dense_attention(model: PreTrainedModel, known: AttentionSettings | None, asked: str | None) -> tuple[str, bool]:
    """The transformers attention that runs if S2-Attn does not, and whether the fastest kernel runs where it can.

    Args:
        known: the settings that are on the model. asked: as in `configure_attention`.
    """
    text, now = find_text_model(model), model.config.get_text_config()._attn_implementation
    if asked not in (None, FASTEST):
        return text.get_correct_attn_implementation(asked), False
    if now != S2_ATTN:
        return now, asked == FASTEST
    if known is None:
        return text.get_correct_attn_implementation(None), asked == FASTEST
    return known.dense_attention, asked == FASTEST or known.is_fastest


def _put_on(model: PreTrainedModel, settings: AttentionSettings) -> None:
    """Put S2-Attn on a model, and try it on a few tokens. If that fails or is interrupted, restore it and raise."""
    config, before = settings.config, AttentionState.of(model)
    parts = [name for name in model.config.sub_configs if getattr(model.config, name, None) is config]

    def use(name: str) -> None:
        # Encoders of images and sounds keep their attention.
        model.set_attn_implementation({"": name, parts[0]: name} if parts else name)

    try:
        use(S2_ATTN)
        replace_settings(model, dict.fromkeys(find_attention_modules(model), settings))
        try_out(model, settings, use)
    except BaseException:
        before.put_on(model)
        raise


def check_model(model: PreTrainedModel) -> None:
    """Refuse a model that S2-Attn cannot run in, or whose window cannot be extended.

    Raises: NotImplementedError.
    """
    check_architecture(model)
    check_positions(model)
    check_masks(model)


def _of_adapter(model: PreTrainedModel) -> AttentionSettings | None:
    """The settings that a LongLoRA adapter put on a model."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return settings_on(base) if hasattr(base, OWNER) else None


def _said_by(owned: AttentionSettings) -> dict[str, Any]:
    """What an adapter's settings say, as arguments of `configure_attention`."""
    return dict(
        group_size=owned.group_size,
        pattern=owned.pattern,
        chosen_blocks=owned.chosen_blocks,
        dense_layers=sorted(owned.dense_layers),
        dense_every=owned.schedule.dense_every,
        skip_positions=owned.schedule.skip_positions,
    )


def _refuse_other(owned: AttentionSettings, asked: dict[str, Any], window: int) -> None:
    """Refuse settings other than the adapter's, because its config and its card would not say them.

    Raises: ValueError.
    """
    asked = dict(asked)
    if asked["group_size_ratio"] is not None:
        asked["group_size"] = group_size_of(None, asked["group_size_ratio"], window)
    if asked["dense_layers"] is not None:
        asked["dense_layers"] = sorted(set(asked["dense_layers"]))
    for name, has in _said_by(owned).items():
        if asked[name] is not None and asked[name] != has:
            raise ValueError(
                f"{name}={asked[name]!r}, but this model's LongLoRA adapter has {name}={has!r}, and its config and "
                f"card say so. Give it to LongLoraConfig when you make the adapter; here only dense_attention and "
                f"backend can be changed."
            )


def _check_backend(config: PreTrainedConfig, backend: str | None) -> None:
    """Refuse, before anything runs, a model whose attention needs something that the backend cannot do.

    Raises: NotImplementedError. ValueError: an unknown backend.
    """
    check_backend(backend)
    softcap = getattr(config, "attn_logit_softcapping", None)
    if softcap is not None and backend in ("sdpa", "cudnn", "varlen"):
        raise NotImplementedError(
            f"This model's attention has softcap={softcap}, which the backend {backend!r} cannot do. Use None, 'flex' "
            f"or a flash_attention backend, or another model."
        )


def check_device(model: PreTrainedModel) -> None:
    """Refuse to train a model here whose attention no kernel of this machine can train.

    Raises: NotImplementedError.
    """
    softcap = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
    if softcap is not None and next(model.parameters()).device.type == "cpu" and not torch.cuda.is_available():
        raise NotImplementedError(
            f"{model.config.model_type}'s attention has a softcap ({softcap}), which no kernel of S2-Attn can train on "
            f"a CPU. Train it on a GPU; on a CPU, load the trained adapter for inference "
            f"(PeftModel.from_pretrained(model, folder))."
        )
