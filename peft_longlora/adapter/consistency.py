"""Fields of a `LongLoraConfig` that do not go together: they exclude each other, or make each other idle.

`rules` checks each field by itself; this file checks them together, and `filled_in` those that the package fills in. A
config that was filled in (read from a file) is not refused for idle fields, because older versions wrote such files.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from peft_longlora.attention.effect import check_effect

if TYPE_CHECKING:
    from peft_longlora.adapter.config import LongLoraConfig


def check_together(config: LongLoraConfig) -> None:
    """Refuse fields that exclude each other or make each other idle.

    Raises: ValueError.
    """
    _check_layers_and_weights(config)
    if config.base_context_length is not None:
        return
    check_effect(
        config.attention_pattern,
        group_size=config.group_size,
        group_size_ratio=config.group_size_ratio,
        chosen_blocks=config.chosen_blocks,
        dense_layers=config.dense_layers,
        dense_every=config.dense_every,
        skip_positions=config.skip_positions,
        name="attention_pattern",
    )
    for field, value in {"lora_alpha": config.lora_alpha, **config.alpha_pattern}.items():
        if value == 0:
            pattern = "" if field == "lora_alpha" else "alpha_pattern: "
            raise ValueError(
                f"{pattern}{field}={value!r} multiplies what LoRA learns by 0, so it has no effect. Give another "
                f"number, or leave the modules out of target_modules."
            )
    # `fit` says more about "learned", which no window below the base's can begin.
    if config.rope_type not in ("yarn", "learned") and config.rope_parameters is None and config.context_length is None:
        raise ValueError(
            f"rope_type={config.rope_type!r} has no effect without context_length: RoPE would not be changed. Give the "
            f"window to extend to, or leave rope_type out."
        )


def _check_layers_and_weights(config: LongLoraConfig) -> None:
    if config.layer_replication and config.dense_layers:
        raise ValueError(
            f"dense_layers={config.dense_layers!r} and layer_replication={config.layer_replication!r} cannot be used "
            f"together: replication changes the numbers of layers. Leave one of them out."
        )
    if config.bias != "none" and config.train_norms:
        raise ValueError(
            f"bias={config.bias!r} and train_norms=True would train the biases of norms twice. Use bias='none', or "
            f"train_norms=False."
        )
    if config.trainable_token_indices is not None and config.train_embeddings:
        raise ValueError(
            "trainable_token_indices trains some rows of the embeddings, but train_embeddings=True trains all. Set "
            "train_embeddings=False, or leave trainable_token_indices out."
        )
