"""Run by the `fresh_process` fixture: peft without this package, then the package imported, without trl or flash-attn.

Prints one line of JSON with what was seen; the tests judge it.
"""

import copy
import importlib
import importlib.abc
import json
import pickle
import sys
import warnings

import torch

ABSENT = ("trl", "datasets", "flash_attn", "flash_attn_interface", "bitsandbytes", "matplotlib", "gradio")
asked_for, cuda_calls = [], []


class WithoutExtras(importlib.abc.MetaPathFinder):
    """A finder as `inner`, to which the extras of this package are not installed; notes who asks for them."""

    def __init__(self, inner):
        self.inner = inner

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ABSENT:
            asked_for.append(name)
            return None
        return self.inner.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.inner, name)


def error_of(function, *args) -> str | None:
    try:
        function(*args)
    except Exception as error:
        return repr(error)
    return None


seen: dict = {}
folder = sys.argv[1]
sys.meta_path[:] = [WithoutExtras(finder) for finder in sys.meta_path]
torch.cuda._lazy_init = lambda: cuda_calls.append("lazy_init")

import peft  # noqa: E402
import transformers  # noqa: E402
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig, PeftType  # noqa: E402
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING  # noqa: E402

# Made here, so that what transformers imports lazily for a model is not put down to this package.
config = transformers.LlamaConfig(
    hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=8
)
model = transformers.LlamaForCausalLM(config)
members_before = list(PeftType.__members__)
seen["without"] = [
    error_of(PeftConfig.from_pretrained, folder),
    error_of(peft.PeftModel.from_pretrained, model, folder),
    error_of(lambda: transformers.AutoModelForCausalLM.from_config(config, attn_implementation="s2_attn")),
]

asked_before, loaded_before = len(asked_for), set(sys.modules)
forward_before = transformers.LlamaForCausalLM.forward, peft.get_peft_model, dict(vars(peft.LoraConfig))
defaults_before = copy.deepcopy(TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import peft_longlora
seen["warnings"] = [str(w.message) for w in caught]
seen["asked_for"] = asked_for[asked_before:]
seen["cuda_calls"] = cuda_calls
seen["cuda_initialised"] = torch.cuda.is_initialized()
HEAVY = "matplotlib", "datasets", "trl", "torch._inductor", "flash_attn", "flash_attn_interface", "kernels"
seen["heavy_modules"] = sorted(name for name in set(sys.modules) - loaded_before if name in HEAVY)


def registries() -> list:
    from transformers import AttentionInterface, AttentionMaskInterface

    return [
        list(PeftType.__members__),
        {k: id(v) for k, v in PEFT_TYPE_TO_CONFIG_MAPPING.items()},
        {k: id(v) for k, v in peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING.items()},
        {k: id(v) for k, v in AttentionInterface._global_mapping.items()},
        {k: id(v) for k, v in AttentionMaskInterface._global_mapping.items()},
    ]


first = registries()
importlib.import_module("peft_longlora")
peft_longlora.register()
seen["second_time_changes_nothing"] = registries() == first
importlib.reload(peft_longlora)
importlib.reload(sys.modules["peft_longlora.register"]).register()
seen["reload_changes_nothing"] = registries() == first
seen["nothing_patched"] = (
    transformers.LlamaForCausalLM.forward,
    peft.get_peft_model,
    dict(vars(peft.LoraConfig)),
) == forward_before and defaults_before == TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
seen["new_members"] = [name for name in PeftType.__members__ if name not in members_before]
seen["registered"] = [
    PEFT_TYPE_TO_CONFIG_MAPPING["LONGLORA"].__name__,
    peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING["LONGLORA"].__name__,
    peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING["LONGLORA"],
]
loaded = PeftConfig.from_pretrained(folder)
seen["loaded"] = [type(loaded).__name__, loaded.context_length]
member = PeftType.LONGLORA
seen["pickled_elsewhere"] = pickle.dumps(member).hex()
print(json.dumps(seen))
