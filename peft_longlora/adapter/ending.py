"""How adapters are switched off, merged and removed.

`model.LongLoraModel` builds on `EndingLoraModel`. However an adapter ends, the base is restored bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from typing import Any

from peft.tuners.lora import LoraConfig, LoraModel
from torch import nn
from transformers.utils import logging

from peft_longlora.adapter import copies, merged, mixed, precision
from peft_longlora.adapter.probe import Probe
from peft_longlora.adapter.state import AdapterState
from peft_longlora.rope import scale as rope
from peft_longlora.rope.learned import settle

logger = logging.get_logger(__name__)
# Options of LoRA with which its product is more than scaling * B A. aLoRA's is that behind its tokens.
_VARIANTS = {
    "use_rslora",
    "lora_bias",
    *(each.name for each in fields(LoraConfig) if "is_lora_variant" in each.metadata),
}
_VARIANTS -= {"alora_invocation_tokens", "velora_config"}


def beyond_lora(config: LoraConfig) -> str:
    """What an adapter has besides the product of plain LoRA, in words; empty if it has nothing."""
    found = [f"{name}={value!r}" for name in sorted(_VARIANTS) if (value := getattr(config, name))]
    found += [f"modules_to_save={config.modules_to_save!r}"] * bool(config.modules_to_save)
    if config.trainable_token_indices is not None:
        found.append(f"trainable_token_indices={config.trainable_token_indices!r}")
    return ", ".join(found)


class EndingLoraModel(LoraModel):
    """LoRA whose adapters also have RoPE and attention, which are switched on and off with them."""

    @property
    def _state(self) -> AdapterState | None:
        return AdapterState.on(self.model)

    def disable_adapter_layers(self) -> None:
        """Switch all adapters off: weights, RoPE and attention are the base's, bit for bit."""
        self.unmerge_adapter()
        super().disable_adapter_layers()
        self._switch(False)

    def enable_adapter_layers(self) -> None:
        """Switch the adapters on again."""
        super().enable_adapter_layers()
        self._switch(True)

    def _switch(self, enabled: bool) -> None:
        if self._state is not None:
            self._state.switch(enabled)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names, beams = kwargs.get("adapter_names"), kwargs.get("num_beams")
        with ExitStack() as stack:
            if names is not None:
                mixed.check_mixed(self.model, names)
                repeats = beams if isinstance(beams, int) else 1
                stack.enter_context(mixed.base_rows(self.model, names, repeats))
            stack.enter_context(super()._enable_peft_forward_hooks(*args, **kwargs))
            yield

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make adapters active. Merged ones are unmerged first, as in PEFT, but bit for bit."""
        if merged.is_merged(self.model):
            logger.warning("The model was merged: its adapters are unmerged before another one becomes active.")
            self.unmerge_adapter()
        super().set_adapter(adapter_name, inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove one adapter; with the last one goes everything that adapters changed."""
        self.unmerge_adapter()
        super().delete_adapter(adapter_name)
        if not self.peft_config:
            self._restore()

    def unload(self) -> nn.Module:
        """The base model without any adapter, bit for bit, also after `merge_adapter`."""
        self.unmerge_adapter()
        copies.drop(self.model)
        model = super().unload()
        self._restore()
        return model

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters into copies of the base's weights, which `unmerge_adapter` puts back.

        Args: as PEFT's.

        Only the weights that change are copied. If the model is on a GPU, the base's own wait in the host's memory.

        Raises:
            ValueError: an adapter does not exist, or has other copies of embeddings and norms than the active ones.
        """
        self._check_merge_allowed()
        if adapter_names and not isinstance(adapter_names, str):  # PEFT refuses a string
            self._check_names(adapter_names)
            copies.check_active(self.model, adapter_names)
        if self._state is not None:
            names = [adapter_names] if isinstance(adapter_names, str) else adapter_names or self.active_adapters
            self._state.set_aside += merged.set_aside(self.model, names, self._state.set_aside)
        super().merge_adapter(adapter_names, safe_merge)

    def unmerge_adapter(self) -> None:
        """Put the base's own weights back, bit for bit."""
        if merged.is_merged(self.model):
            super().unmerge_adapter()
        if self._state is not None:
            self._state.put_weights_back()

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        check: bool = True,
    ) -> nn.Module:
        """The base model with the adapter in its weights and the RoPE scaling in its config.

        Args:
            progressbar, safe_merge: as PEFT's.
            adapter_names: adapters to merge, active or not; only one of them may have copies of embeddings and norms.
            check: compare the merged model with the adapter on a few tokens.

        Raises:
            ValueError: an adapter does not exist, two adapters have copies of one module, or the merged model computes
                something else than the adapter did.
        """
        if adapter_names is not None:
            self._check_merge_allowed()
            self._check_names(adapter_names)
            copies.activate(self.model, adapter_names)
        self._switch(True)
        is_as_used = adapter_names is None and not any(each.disable_adapters for each in merged.layers_of(self.model))
        probe = Probe.of(self.model) if check and is_as_used else None
        merged.untie(self.model)
        learned = copies.learned_rotary(self.model)
        model = super().merge_and_unload(progressbar, safe_merge, adapter_names)
        merged.tie_if_equal(model)
        for module in model.modules():
            precision.round_to_half(module)
        if learned is not None:
            settle(model, learned)
        rope.keep_rope(model)
        if self._state is not None:
            self._state.set_aside.clear()
        self._restore()
        if probe is not None:
            probe.compare(model, "The merged model")
        return model

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, **options: Any
    ) -> None:
        """Make an adapter of the weighted LoRA of others.

        Args: as PEFT's.

        Raises: ValueError: one of them has more than plain LoRA, which PEFT would leave out or scale otherwise.
        """
        self._check_names(adapters)
        for name in adapters:
            if more := beyond_lora(self.peft_config[name]):
                raise ValueError(
                    f"Adapter {name!r} is more than plain LoRA ({more}), so a weighted sum of LoRA's matrices does not "
                    f"compute the weighted sum of the adapters. Merge {name!r} alone, or train with "
                    f"train_embeddings=False, train_norms=False and plain LoRA."
                )
        if len({str(self.peft_config[name].alora_invocation_tokens) for name in adapters}) > 1:
            raise ValueError(
                f"Adapters {adapters} have different alora_invocation_tokens, and a sum of them would have those of "
                f"{adapters[0]!r}. Add up adapters that begin at the same tokens."
            )
        super().add_weighted_adapter(adapters, weights, adapter_name, **options)

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        for name, config in self.peft_config.items():
            if config.layer_replication:
                raise ValueError(
                    f"Adapter {name!r} has layer_replication={config.layer_replication!r}: replicated layers share "
                    f"their weights, so different changes cannot be merged into them. Serve it unmerged."
                )
        if shared := merged.shared_layers(self.model):
            raise ValueError(
                f"{' and '.join(shared)} share a weight in this model and have changes of their own, which cannot be "
                f"merged into one. Serve the adapter unmerged."
            )

    def _check_names(self, adapter_names: list[str]) -> None:
        if unknown := [name for name in adapter_names if name not in self.peft_config]:
            raise ValueError(
                f"adapter_names={adapter_names} names {unknown}, which this model does not have. Use names of its "
                f"adapters: {sorted(self.peft_config)}."
            )

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """False: PEFT's conversion knows neither RoPE nor trained copies. `export_lora` makes a plain adapter."""
        return False

    def _restore(self) -> None:
        if self._state is not None:
            self._state.end()

    def _undo(self, adapter_name: str, before: AdapterState | None) -> None:
        """Take back a half-added adapter."""
        if before is None:  # other adapters stay
            super().delete_adapter(adapter_name)
            return
        copies.drop(self.model)
        self._unload_and_optionally_merge(merge=False)
        before.end()
