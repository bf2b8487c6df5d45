"""The model and tokenizer under evaluation. They give two things: losses of tokens, and answers to prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from peft_longlora.architecture import find_attention_modules, same_modes
from peft_longlora.attention.configure import configure_attention
from peft_longlora.attention.mode import use_attention
from peft_longlora.attention.settings import S2_ATTN, settings_of
from peft_longlora.data.encoding import encode_all
from peft_longlora.eval.identity import (
    Digests,
    fingerprint,
    model_digest,
    template_digest,
    tokenizer_digest,
    weights_digest,
)
from peft_longlora.eval.losses import TokenLosses
from peft_longlora.hub.generation import decoding
from peft_longlora.hub.loading import check_tokenizer, find_device, load_model
from peft_longlora.rope.parameters import base_rope, window_of
from peft_longlora.rope.scale import switch_rope
from peft_longlora.rope.state import STATES

logger = logging.get_logger(__name__)


@dataclass
class Subject:
    """A model under evaluation.

    Attributes:
        model: in evaluation mode.
        tokenizer: its tokenizer.
        variant: "base", "adapter" or "rescaled"; the label of its rows in the results.
        native_window: tokens, before extension.
        window: tokens, after extension.
        description: the "model" entry of results.json.
        notes: warnings for readers of the results.
        attention: "dense", or "sparse" to measure a pattern by itself.
        sources: the base's and the adapter's folder or id, if the model was loaded from there; None if it was in
            memory.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    variant: str
    native_window: int
    window: int
    description: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    attention: str = "dense"
    sources: tuple[str, str | None] | None = None
    _losses: TokenLosses | None = None

    @classmethod
    def of(cls, model: nn.Module, tokenizer: PreTrainedTokenizerBase, attention: str = "dense") -> Subject:
        """Make a subject from a model in memory.

        Raises: ValueError: the tokenizer has more tokens than the model has embeddings.
        """
        config = model.config.get_text_config()
        window, native = window_of(config), window_of(config)
        states = getattr(model.get_base_model() if isinstance(model, PeftModel) else model, STATES, None)
        if states:
            native = states[0].window
        variant = "adapter" if isinstance(model, PeftModel) else "rescaled" if states else "base"
        check_tokenizer(model, tokenizer)
        description = {
            "name": _shown(getattr(model.config, "_name_or_path", "")) or type(model).__name__,
            "fingerprint": None,
            "adapter": model.active_adapter if variant == "adapter" else None,
            "adapter_sha256": None,
            "weights_sha256": None,
            "tokenizer": _shown(tokenizer.name_or_path),
            "dtype": str(getattr(model, "dtype", None)).removeprefix("torch."),
            "attention": attention if attention == "dense" else f"sparse ({_pattern(model)})",
            "attn_implementation": _dense_attention(model),
            "rope_parameters": base_rope(config),
            "native_window": native,
            "window": window,
        }
        return cls(model, tokenizer, variant, native, window, description, attention=attention)

    def identify(self, digests: Digests) -> None:
        """Add digests and commits to the description, which identify this model and tokenizer.

        One process calls it once a run. It reads all bytes of the weights, unless `digests` remembers the files.
        """
        if self.sources is None:
            found, elsewhere = model_digest(self.model)
            if elsewhere:
                self.notes.append(
                    f"{len(elsewhere)} of the model's tensors are not in memory ({elsewhere[0]}, ...), so its "
                    f"fingerprint does not cover them."
                )
            self.description["fingerprint"] = found
        else:
            model, adapter = self.sources
            commit = getattr(self.model.config, "_commit_hash", None)
            self.description["fingerprint"] = fingerprint(model, digests, commit)
            self.description["adapter_sha256"] = fingerprint(adapter, digests) if adapter else None
            self.description["weights_sha256"] = weights_digest(adapter, digests) if adapter else None
        self.description["tokenizer_sha256"] = tokenizer_digest(self.tokenizer)
        self.description["chat_template_sha256"] = template_digest(self.tokenizer)

    def start_losses(self, inputs: torch.Tensor, targets: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Start to compute token losses; returns a function that waits for them. See `TokenLosses.start`."""
        return self._token_losses().start(inputs, targets)

    def likeliest(self, inputs: torch.Tensor, count: int) -> torch.Tensor:
        """The most likely tokens after the last `count` inputs, on the CPU. See `TokenLosses.likeliest`."""
        return self._token_losses().likeliest(inputs, count).cpu()

    def _token_losses(self) -> TokenLosses:
        if self._losses is None:
            self._losses = TokenLosses(self.model)
        return self._losses

    @torch.no_grad()
    def answer(self, ids: list[int], max_new_tokens: int) -> str:
        """The model's greedy answer to a prompt, without special tokens."""
        inputs = torch.tensor([ids], device=self.model.device)
        config = decoding(max_new_tokens, pad_token_id=self.tokenizer.pad_token_id)
        out = self.model.generate(input_ids=inputs, attention_mask=torch.ones_like(inputs), generation_config=config)
        return self.tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)

    @torch.no_grad()
    def warm_up(self) -> None:
        """Run one short forward, so that no measured forward includes the set-up of the device."""
        self.model(input_ids=torch.zeros(1, 16, dtype=torch.long, device=self.model.device), use_cache=False)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with the special tokens that the tokenizer adds."""
        return self.tokenizer(text, verbose=False)["input_ids"]

    def encode_all(self, texts: list[str]) -> list[torch.Tensor]:
        """`encode` for several texts of any length; (n,) int32 each."""
        return encode_all(self.tokenizer, texts)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Within the block: evaluation mode and the chosen attention. Afterwards the model is as before."""
        attention = use_attention(self.model, "sparse") if self.attention == "sparse" else nullcontext()
        with same_modes(self.model), attention:
            self.model.eval()
            yield

    def base(self) -> Subject:
        """The base as a subject. It is the base only within `as_base`."""
        return Subject(self.model, self.tokenizer, "base", self.native_window, self.native_window)

    @contextmanager
    def as_base(self) -> Iterator[Subject]:
        """Within the block: the base as a subject, without adapter and with its own RoPE."""
        base = self.base()
        if isinstance(self.model, PeftModel):
            with self.model.disable_adapter():
                yield base
        elif self.variant == "rescaled":
            switch_rope(self.model, scaled=False)
            try:
                yield base
            finally:
                switch_rope(self.model, scaled=True)
        else:
            yield base

    @contextmanager
    def as_variant(self, variant: str) -> Iterator[Subject]:
        """Within the block: the subject itself, or its base (`as_base`) if the variant is "base"."""
        if variant == "base" and self.variant != "base":
            with self.as_base() as base:
                yield base
        else:
            yield self


def load_subject(
    model: str,
    adapter: str | None = None,
    *,
    attention: str = "dense",
    attn_implementation: str | None = None,
    **options: Any,
) -> Subject:
    """Load a base, and an adapter on it, for evaluation.

    Args:
        model: a folder or an id on the Hub.
        adapter: the same, of any PEFT type.
        attn_implementation: transformers' name for the implementation of dense attention.
        options: of `peft_longlora.hub.load_model`; but on a CPU dtype "auto" is float32, as in `longlora train`, so
            that what both measure can be compared.
        attention: "dense", or "sparse" for the adapter's pattern (without one: S2 with a quarter of the window).

    Raises:
        ValueError: a part does not exist or does not fit.
    """
    if options.get("dtype", "auto") == "auto" and find_device(options.get("device")).type == "cpu":
        options["dtype"] = "float32"
    loaded = load_model(model, adapter, attn_implementation=attn_implementation, **options)
    base, native = loaded.model, loaded.native_window
    if attention == "sparse" and not adapter:
        configure_attention(base)
    subject = Subject.of(base, loaded.tokenizer, attention)
    subject.native_window, subject.notes, subject.sources = native, loaded.notes, (model, adapter)
    subject.description |= {
        "name": _shown(model),
        "adapter": _shown(adapter) if adapter else None,
        "tokenizer": _shown(options.get("tokenizer") or model),
        "attn_implementation": attn_implementation or "default",
        "native_window": native,
    }
    return subject


def _shown(name: str) -> str:
    """A Hub id, or a folder's name without its path, so that results contain no path of this machine."""
    return Path(name).resolve().name if name and Path(name).is_dir() else name


def _pattern(model: nn.Module) -> str:
    settings = settings_of(next(iter(find_attention_modules(model).values())))
    said = f"{settings.pattern}, groups of {settings.group_size}"
    if settings.chosen_blocks is not None:
        said += f", {settings.chosen_blocks} chosen blocks"
    if settings.dense_layers:
        said += f", layers {', '.join(map(str, sorted(settings.dense_layers)))} dense"
    return said


def _dense_attention(model: nn.Module) -> str:
    """transformers' name of the attention that runs where S2-Attn does not."""
    name = getattr(model.config.get_text_config(), "_attn_implementation", None) or "default"
    layers = find_attention_modules(model).values() if name == S2_ATTN else ()
    return next((settings_of(layer).dense_attention for layer in layers), name)
