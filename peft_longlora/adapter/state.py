"""RoPE and attention, which adapters change on a base model besides its weights, and how these changes are undone.

`model` makes one `AdapterState` with the first adapter, and ends it with the last.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from peft_longlora.adapter import merged
from peft_longlora.adapter.count import CountBuffer
from peft_longlora.architecture import find_attention_modules, follow
from peft_longlora.attention.settings import AttentionState, settings_of
from peft_longlora.rope import scale as rope
from peft_longlora.rope.learned import LearnedRotary, check_checkpoints
from peft_longlora.rope.state import OWNER


@dataclass(eq=False)
class AdapterState:
    """Stored on a base model while it has adapters: its state before, and whether the adapters are switched on.

    `PeftModel` tells the tuner when adapters are switched or removed. `disable_adapters`, `enable_adapters` and
    `delete_adapter` of transformers tell only the layers. So this object is a hook of the model, and looks at a layer
    before every forward.

    Attributes:
        is_in_peft_model: whether a `PeftModel` has these adapters; it adds further adapters itself.
        set_aside: the base's own weights while adapters are merged into copies of them.
        count: the number of training forwards, for a schedule of dense ones.
        learns: whether RoPE's frequencies are trained.
    """

    model: nn.Module
    attention: AttentionState
    layer: BaseTunerLayer | None = None
    is_enabled: bool = True
    is_in_peft_model: bool = False
    handles: list[RemovableHandle] = field(default_factory=list)
    set_aside: merged.Weights = field(default_factory=list)
    count: CountBuffer | None = None
    learns: bool = False

    @classmethod
    def on(cls, model: nn.Module) -> AdapterState | None:
        """What adapters have changed on `model`, or None if it has none of ours."""
        return getattr(model, OWNER, None)

    def follow(self) -> None:
        """Begin to follow the adapters, which are in their places now."""
        self.layer = next((m for m in self.model.modules() if isinstance(m, BaseTunerLayer)), None)
        self.learns = any(isinstance(m, LearnedRotary) for m in self.model.modules())
        self.handles = follow(self.model, self)
        self.count = CountBuffer(self.model)
        self.count.attach()
        setattr(self.model, OWNER, self)

    def __call__(self, *_: Any) -> None:
        """PyTorch calls this before each forward of the model."""
        if not getattr(self.model, "peft_config", None):
            self.end()
            return
        if self.set_aside and self.model.training and torch.is_grad_enabled():
            raise ValueError(
                "The adapter is merged into the base's weights, so its LoRA would not be trained. Call "
                "unmerge_adapter() before training, or model.eval()."
            )
        if self.learns and self.model.training and torch.is_grad_enabled():
            check_checkpoints(self.model)
        if self.layer is not None and self.layer.disable_adapters == self.is_enabled:
            self.switch(not self.is_enabled)
            for module in self.model.modules():  # transformers' enable_adapters forgets these
                if isinstance(module, AuxiliaryTrainingWrapper):
                    module.enable_adapters(self.is_enabled)

    def switch(self, enabled: bool) -> None:
        """Use the adapters' RoPE and attention, or the base's."""
        if not enabled and self.set_aside:
            for layer in merged.layers_of(self.model):
                layer.unmerge()
            self.put_weights_back()
        self.is_enabled = enabled
        rope.switch_rope(self.model, scaled=enabled)
        for module in find_attention_modules(self.model).values():
            settings_of(module).is_enabled = enabled

    def put_weights_back(self) -> None:
        """End a merge."""
        merged.put_back(self.set_aside)
        self.set_aside = []

    def end(self) -> None:
        """Restore the base's attention, and its RoPE unless `rope.keep_rope` was called."""
        for handle in self.handles:
            handle.remove()
        if self.count is not None:
            self.count.detach()
        if hasattr(self.model, OWNER):
            delattr(self.model, OWNER)
        rope.restore_rope(self.model)
        self.attention.put_on(self.model)


def check_name(adapter_name: Any) -> None:
    """Refuse a name that modules cannot have. PyTorch would say so after PEFT has changed a part of the model.

    Raises: ValueError.
    """
    reason = None
    if not isinstance(adapter_name, str) or not adapter_name or "." in adapter_name:
        reason = "must be a text of one character or more without a dot"
    elif hasattr(nn.ModuleDict, adapter_name) or hasattr(nn.ParameterDict, adapter_name):
        reason = "is the name of a method of PyTorch's modules"
    if reason:
        raise ValueError(
            f"adapter_name={adapter_name!r} {reason}, and PEFT makes it the name of modules. Use another name, such as "
            f"'default'."
        )


def check_free(model: nn.Module, adapter_name: str) -> None:
    """Refuse anything but a transformers model, and a base that another model with an adapter uses already.

    Two models on one base would both change its RoPE and attention.

    Raises: ValueError, NotImplementedError.
    """
    if isinstance(model, PeftModel | BaseTuner):
        raise ValueError(
            f"{type(model).__name__} is a model with an adapter already. Give get_peft_model and PeftModel a base, "
            f"such as model.unload(); to add another adapter, call model.add_adapter or model.load_adapter."
        )
    if not isinstance(model, PreTrainedModel):
        raise NotImplementedError(
            f"{type(model).__name__} is not a transformers model, so there is no RoPE to rescale and no attention to "
            f"replace. Load one with AutoModelForCausalLM.from_pretrained, or use peft's LoraConfig."
        )
    state, names = AdapterState.on(model), list(getattr(model, "peft_config", None) or ())
    # transformers' add_adapter and load_adapter, and PEFT's inject_adapter_in_model, make a tuner for each adapter.
    takes_more = state is None or not state.is_in_peft_model or getattr(model, "_hf_peft_config_loaded", False)
    if state is not None and (adapter_name in names or not takes_more):
        raise ValueError(
            f"This model has a LongLoRA adapter {names[0]!r} already, in a PeftModel that was made from it. "
            f"Call that PeftModel's unload() first; to add another adapter, call its add_adapter or load_adapter."
        )
