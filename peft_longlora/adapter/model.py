"""`LongLoraModel`: what an adapter changes on a model, in the order in which PEFT calls it, and how it is undone.

An adapter consists of LoRA weights, copies of embeddings and norms, a RoPE scaling and S2-Attn. PEFT handles the first
two; this file finds the modules for them. RoPE and S2-Attn must follow when an adapter is added, switched off, merged
or removed; this file does that.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, ClassVar

from peft import PeftType
from peft.tuners.lora import LoraModel
from peft.utils import get_peft_model_state_dict
from peft.utils.transformers_weight_conversion import (
    convert_peft_config_for_transformers,
    get_model_conversion_mapping,
)
from torch import nn

from peft_longlora.adapter import called, copies, count, fit, lowrank, precision, trainable
from peft_longlora.adapter.base import layout_of
from peft_longlora.adapter.config import LongLoraConfig, refuse_other_tuner
from peft_longlora.adapter.ending import EndingLoraModel
from peft_longlora.adapter.files import check_gathered, check_numbers
from peft_longlora.adapter.names import check_names
from peft_longlora.adapter.state import AdapterState, check_free, check_name
from peft_longlora.adapter.wishes import wanted_attention
from peft_longlora.architecture import rows_of
from peft_longlora.attention.configure import check_model, configure_attention
from peft_longlora.attention.settings import AttentionState, settings_on
from peft_longlora.rope import scale as rope
from peft_longlora.rope import state as rotary


class LongLoraModel(EndingLoraModel):
    """LoRA with trainable embeddings and norms, scaled RoPE and S2-Attn (LongLoRA, arXiv:2309.12307).

    Made by `get_peft_model(model, LongLoraConfig(...))`, `PeftModel.from_pretrained` or `model.add_adapter`.

    Raises:
        ValueError, NotImplementedError: the model, the config and the adapter's file do not fit together. The base
            model is not changed then.
    """

    on_made: ClassVar[Callable[[LongLoraModel], Callable[[], None] | None]] = lambda tuner: None
    """Called when a tuner was made. It may return a function to call when a `PeftModel` has taken the tuner. `register`
    sets it."""
    _on_taken: Callable[[], None] | None = None
    _is_converting = False  # while the adapter is converted to a plain LoRA

    # -- adding an adapter ---------------------------------------------------------------------------------------

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        check_name(adapter_name)
        check_free(model, adapter_name)  # before PEFT forgets the first adapter's config
        check_model(model)
        super().__init__(model, peft_config, adapter_name, *args, **kwargs)
        self._on_taken = self.on_made()

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter. If that fails or is interrupted (a notebook's cell), restore the model and raise."""
        config = self.peft_config[adapter_name]
        check_name(adapter_name)
        for name, other in self.peft_config.items():
            if not isinstance(other, LongLoraConfig):
                del self.peft_config[adapter_name]
                raise ValueError(
                    f"This model has an adapter {name!r} of type {other.peft_type.value}, which cannot be mixed with "
                    f"LONGLORA. Delete it first, or load each adapter on its own model."
                )
        is_first = AdapterState.on(model) is None
        if is_first and hasattr(model, rotary.STATES):
            raise ValueError(
                "RoPE of this model was rescaled by scale_rope, but an adapter rescales it itself. Call "
                "restore_rope(model) first, and give the adapter the context_length or the rope_parameters."
            )
        trainable_before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        before = AdapterState(model, AttentionState.of(model)) if is_first else None
        try:
            self._resolve(config, model)
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            if config.rope_type == "learned":
                copies.learn_rope(model, adapter_name, is_trained=not config.inference_mode)
            settings_on(model).skips.follow(model)  # PEFT and `learn_rope` may have made other rotary modules
            fit.check_after(config, model, self.shapes_of(adapter_name))
            copies.state_tied_sizes(model, adapter_name)
        except BaseException:
            self._undo(adapter_name, before)
            for parameter, requires_grad in trainable_before:
                parameter.requires_grad = requires_grad
            raise
        if before is not None:
            before.follow()

    @staticmethod
    def _create_new_module(config: LongLoraConfig, adapter_name: str, target: nn.Module, **options: Any) -> nn.Module:
        others = config._custom_modules
        config._custom_modules = {kind: make for kind, make in others.items() if make is not refuse_other_tuner} or None
        try:
            layer = LoraModel._create_new_module(config, adapter_name, target, **options)
        finally:
            config._custom_modules = others
        lowrank.compute_in_half(layer)
        called.watch(layer, options["target_name"])
        return layer

    def _resolve(self, config: LongLoraConfig, model: nn.Module) -> None:
        """Replace the config's defaults by the modules of this architecture, before PEFT looks for ties."""
        tied = self._tied_names()
        fit.check_before(config, model, self.peft_config, tied, is_for_conversion=self._is_converting)
        if config.target_modules is None and not config.target_parameters:
            config.target_modules = set(trainable.find_projections(model))
        self._rename_experts(config, model)
        if config.file is None and config.resolved_for is None:
            check_names(config, model)
        config.made_at = time.time()
        names = list(config.modules_to_save or ())
        if config.train_embeddings:
            names += trainable.find_embeddings(model)
            config.vocab_size = rows_of(model.get_input_embeddings())
            config.ensure_weight_tying = config.ensure_weight_tying or bool(tied)
        if config.train_norms:
            names += trainable.find_norms(model)
        if config.rope_type == "learned":
            names += trainable.find_rotary(model)
        config.modules_to_save = list(dict.fromkeys(names)) or None
        config.resolved_for = model.config.model_type

    @staticmethod
    def _rename_experts(config: LongLoraConfig, model: nn.Module) -> None:
        """Rename targets that transformers stores in one parameter of all experts, as PEFT does for LORA only."""
        own = set()  # attention's, which may have the name of an expert's part
        if isinstance(config.target_modules, set):
            own = config.target_modules & set(trainable.find_projections(model))
            config.target_modules -= own
        config.peft_type = PeftType.LORA
        try:
            convert_peft_config_for_transformers(config, model=model, conversions=get_model_conversion_mapping(model))
        finally:
            config.peft_type = PeftType.LONGLORA
            if own:
                config.target_modules |= own

    def _check_tied_modules(self, model: nn.Module, peft_config: LongLoraConfig) -> None:
        tied = self._tied_names()
        if peft_config.train_embeddings and peft_config.ensure_weight_tying and tied:
            # PEFT recognises embeddings by two names; the embeddings trained here may have another.
            self._add_modules_to_save_to_tie(peft_config, tied)
        else:
            super()._check_tied_modules(model, peft_config)

    def _tied_names(self) -> list[str]:
        """Names of the modules that share the embeddings' weight."""
        if copies.are_both_of_one_weight(self.model):  # PEFT does not see the tie once both are in its wrappers
            return [name for name, _ in trainable.find_module(self.model, self.model.get_output_embeddings())]
        return self._get_module_names_tied_with_embedding()

    def _get_module_names_tied_with_embedding(self) -> list[str]:
        # PEFT goes by the names that a class may tie, also where this model does not tie them.
        modules = dict(trainable.named_modules(self.model))
        shared = [module.weight for _, module in trainable.find_module(self.model, self.model.get_input_embeddings())]
        named = super()._get_module_names_tied_with_embedding()
        # A name that leads into a wrapper of PEFT's own (TrainableTokens) is one that PEFT has made, so it is tied.
        return [n for n in named if n not in modules or any(modules[n].weight is weight for weight in shared)]

    def _prepare_model(self, peft_config: LongLoraConfig, model: nn.Module) -> None:
        super()._prepare_model(peft_config, model)
        text_config = model.config.get_text_config()
        if peft_config.layer_replication:  # replicas are deep copies with their own configs; a model has one config
            for module in model.modules():
                if isinstance(getattr(module, "config", None), type(text_config)):
                    module.config = text_config
        if AdapterState.on(model) is None:
            wanted = peft_config.applied_rope_parameters
            applied = rope.scale_rope(
                model,
                peft_config.context_length,
                rope_type="yarn" if wanted or peft_config.rope_type == "learned" else peft_config.rope_type,
                rope_parameters=wanted or peft_config.rope_parameters,
            )
        else:  # a second adapter; `fit` has checked that it wants the same
            others = (c.applied_rope_parameters for c in self.peft_config.values() if c is not peft_config)
            applied = next(others, peft_config.applied_rope_parameters)  # one config may serve both (DPO's reference)
        settings = configure_attention(model, **wanted_attention(peft_config, model))
        peft_config.applied_rope_parameters = applied
        peft_config.applied_group_size = settings.group_size
        window = rotary.rope_of(model, scaled=True).window
        # RoPE may leave room beyond the requested length, but nothing is trained there.
        peft_config.applied_context_length = min(window, peft_config.context_length or window) if applied else window
        base = rotary.rope_of(model, scaled=False)
        peft_config.base_context_length, peft_config.base_rope_parameters = base.window, base.rope_parameters
        peft_config.base_layout = layout_of(model)
        model.add_model_tags(["longlora"])
        peft_config.model_tags = model.model_tags

    def shapes_of(self, adapter_name: str) -> dict[str, tuple[int, ...]]:
        """The names in the file, and the shapes, of an adapter's tensors."""
        state = get_peft_model_state_dict(self, adapter_name=adapter_name, save_embedding_layers=False)
        return {f"base_model.{name}": tuple(tensor.shape) for name, tensor in count.without_count(state).items()}

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """PEFT makes LoRA's weights float32 for the optimiser; do the same for embeddings and norms."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if (state := AdapterState.on(self.model)) is not None:
            state.is_in_peft_model = True  # only a PeftModel calls this method
        if self._on_taken is not None:
            self._on_taken()
            self._on_taken = None
        if autocast_adapter_dtype:
            precision.keep_in_float32(copies.of(self.model, adapter_name))
            precision.read_rounded(copies.wrappers_of(self.model))

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """Tie embeddings and output layer again, in the base and in the trained copies.

        accelerate calls it, because its memory-saving start of FSDP2 unties them. The base's own method does not find
        the modules inside PEFT's wrappers.
        """
        if not copies.has_both(self.model):
            self.model.tie_weights(*args, **kwargs)
        elif any(config.ensure_weight_tying for config in self.peft_config.values()):
            copies.tie(self.model)

    @classmethod
    def _get_adapter_state_dict(cls, *, adapter_name: str, state_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        check_gathered(state_dict, adapter_name)
        state = super()._get_adapter_state_dict(adapter_name=adapter_name, state_dict=state_dict, **kwargs)
        count.add_count(state, kwargs["model"])
        return state

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model: nn.Module, state_dict: dict[str, Any], **kwargs: Any) -> Any:
        count.take_count(state_dict, model, kwargs["config"])
        check_numbers(state_dict.items(), "The adapter's weights")
        return super()._remap_adapter_state_dict_for_load(model=model, state_dict=state_dict, **kwargs)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """A tensor's name in the file. A trained copy has only one name.

        PEFT saves embeddings a second time, under their name in the model, if the vocabulary was resized or if it is
        told to.
        """
        return super()._remove_adapter_name_from_key(
            key.replace(f".modules_to_save.{adapter_name}.", "."), adapter_name
        )

    @classmethod
    def _convert_state_dict_for_initial_model(
        cls, peft_model: nn.Module, peft_config: LongLoraConfig, path: str, state: dict[str, Any], kwargs: Any
    ) -> dict[str, Any]:
        """PEFT's `path_initial_model_for_weight_conversion`, which would keep only LoRA's weights."""
        tuner = peft_model.base_model
        tuner._is_converting = True
        try:  # PEFT loads the initial adapter beside this one, subtracts it and deletes it
            lora = super()._convert_state_dict_for_initial_model(peft_model, peft_config, path, dict(state), kwargs)
        finally:
            tuner._is_converting = False
        return {**{name: tensor for name, tensor in state.items() if "lora_" not in name}, **lora}
