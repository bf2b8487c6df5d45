"""What holds for one model type: a tiny model is extended, trained, saved, loaded, merged and run, and compared.

Nothing here knows a model type. The truth (every_truth.py) is the merged folder in plain transformers.
"""

from __future__ import annotations

import copy
import tempfile
import traceback
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel

from peft_longlora import LongLoraConfig
from tests.helpers.every_config import WINDOW
from tests.helpers.every_parts import HOME, REFUSALS, Parts, one_line, origin
from tests.helpers.every_truth import (
    GROUP,
    logits,
    lost_entries,
    train,
)

CONTEXT = 128  # tokens


@dataclass
class Finding:
    """What was found for one model type.

    Attributes:
        result: "supported", "conditional", "refused", "crashed", "wrong" or "not built".
        why: the message of the refusal or error, the checks that failed, or the conditions.
        layers: numbers of attention layers that S2-Attn computed, and of all the attention layers.
    """

    result: str
    why: list[str] = field(default_factory=list)
    layers: tuple[int, int] | None = None


class Examination(Parts):
    """One model type through its whole life."""

    def run(self) -> Finding:
        try:
            stock = self.build()
        except Exception as error:
            return Finding("not built", [origin(error)])
        self.kind_of_model = type(stock)
        short = self.ids[:, : WINDOW - 4]
        try:
            of_base, needs_more = logits(stock, short), ""
        except Exception as error:
            of_base, needs_more = None, origin(error)
        try:
            base = self.build("s2_attn")
        except KeyError as error:  # a part of the model looks its class up by the name of the attention
            self.conditions.append(f"load it without attn_implementation='s2_attn' (KeyError: {error})")
            base = stock
        before = copy.deepcopy(base.config.to_dict())
        try:
            model = self._created(base)
        except REFUSALS as error:
            return self._refused(error, short, of_base)
        except Exception as error:
            return Finding("crashed", [f"creation: {origin(error)}"])
        if of_base is None:
            return Finding("crashed", [f"accepted, but the base does not run on text: {needs_more}"])
        self._live(base, model, short, of_base, before)
        return self._finding()

    def _created(self, base: PreTrainedModel) -> PeftModel:
        """The model with an adapter; with another setting if the refusal names one."""
        try:
            return get_peft_model(base, self.config())
        except REFUSALS as error:
            for name, value in (("rope_type", "linear"), ("rope_type", "ntk"), ("train_embeddings", False)):
                if f"{name}={value!r}" in str(error):
                    self.conditions.append(f"{name}={value!r}")
                    self.trains_embeddings = name != "train_embeddings"
                    return get_peft_model(base, self.config(**{name: value}))
            raise

    def config(self, **settings: Any) -> LongLoraConfig:
        return LongLoraConfig(r=4, context_length=CONTEXT, group_size=GROUP, **settings)

    def _refused(self, error: Exception, short: torch.Tensor, of_base: torch.Tensor | None) -> Finding:
        """A refusal is the package's own, says why, and leaves the model as it was."""
        frames = [f.filename for f in traceback.extract_tb(error.__traceback__)]
        if not frames[-1].startswith(HOME):
            return Finding("crashed", [f"creation: {origin(error)}"])
        again = self.build()
        before = copy.deepcopy(again.config.to_dict())
        with suppress(*REFUSALS):
            get_peft_model(again, self.config())
        same = of_base is None or torch.equal(logits(again, short), of_base)
        if not same or again.config.to_dict() != before:
            return Finding("wrong", [f"refused, but the model was changed: {one_line(error)}"])
        return Finding("refused", [one_line(error)])

    def _live(self, base: PreTrainedModel, model: PeftModel, short: Any, of_base: torch.Tensor, before: dict) -> None:
        text = base.config.get_text_config(decoder=True)
        rope_before = _rope_of(before, text)
        losses = self.attempt("training", lambda: train(model, self.ids))
        if losses is None:
            return
        self.check("losses", all(torch.tensor(losses).isfinite()) and losses[-1] < losses[0], losses)
        names = {name: p for name, p in model.named_parameters() if p.requires_grad}
        silent = [n for n, p in names.items() if p.grad is None or not 0 < p.grad.abs().max() < float("inf")]
        self.check("trained without a gradient:", not silent, f"{len(silent)} of {len(names)}, {silent[:2]}")
        self.check("LoRA is trained", any("lora_A" in name for name in names))
        self.check(
            "RoPE entries lost:", not (lost := lost_entries(rope_before, getattr(text, "rope_parameters", None))), lost
        )
        self.attempt("sight", lambda: self._sight(model))
        with tempfile.TemporaryDirectory() as folder:
            self.attempt("disabled", lambda: self._disabled(model, short, of_base))
            self.attempt("loading", lambda: self._loading(model, folder))
            is_merged = self.attempt("merging", lambda: self._merging(model, folder))
            plain = partial(self.load, f"{folder}/merged") if is_merged else partial(self._copy, f"{folder}/adapter")
            self.attempt("dense", lambda: self._dense(model, plain))
            self.attempt("sparse", lambda: self._sparse(model, plain))
        self.attempt("half precision", self._half)
        self.attempt("generation", lambda: self._generation(model))
        self.attempt("evaluation", lambda: self._scores(model))
        self.attempt("unloading", lambda: self._unloading(model, short, of_base, before))

    def _finding(self) -> Finding:
        if self.crashed:
            return Finding("crashed", [*self.crashed, *self.late, *self.wrong], self.layers)
        if self.wrong:
            return Finding("wrong", [*self.wrong, *self.late], self.layers)
        if self.late or self.conditions:
            return Finding("conditional", [*self.conditions, *self.late], self.layers)
        return Finding("supported", [], self.layers)


def _rope_of(config: dict[str, Any], text: Any) -> Any:
    parts = [config, *(v for v in config.values() if isinstance(v, dict))]
    own = [part for part in parts if part.get("model_type") == text.model_type]
    return (own or parts)[0].get("rope_parameters")


# What a model may be loaded with whose every layer has a window, as its config class has it by default.
WITHOUT_WINDOWS = {
    "load it with sliding_window=None; otherwise S2-Attn changes no layer": dict(
        sliding_window=None, use_sliding_window=False
    ),
    "take a model that has full_attention among its layer_types; where all layers slide, as in its config class, "
    "S2-Attn changes no layer": dict(layer_types=["sliding_attention", "full_attention"]),
}


def examine(model_type: str, kind: str) -> Finding:
    """What holds for a model type. If each of its layers has a window, it is examined with other layers too."""
    found = Examination(model_type, kind).run()
    if found.why != ["S2-Attn changes no layer"]:
        return found
    for condition, changes in WITHOUT_WINDOWS.items():
        other = Examination(model_type, kind, **changes).run()
        if other.result == "supported":
            return Finding("conditional", [condition], other.layers)
    return found
