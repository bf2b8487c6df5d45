"""The parts of an examination: each notes what does not hold, and the next goes on."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel

import peft_longlora
from peft_longlora import LongLoraConfig, use_attention
from peft_longlora.architecture import find_attention_modules
from peft_longlora.attention.settings import settings_of
from peft_longlora.chat import KVCache
from peft_longlora.eval.losses import TokenLosses
from tests.helpers.every_config import NUMBERS, WINDOW, tiny_model, with_inputs
from tests.helpers.every_truth import (
    DOCUMENTS,
    GROUP,
    LENGTH,
    TRUTH,
    Truth,
    alone,
    far,
    logits,
    sees,
    together,
    tokens,
)

# Shares of the logits' size. Sums in another order and merged weights differ by 1e-6 to 5e-4; a wrong mask by 0.1.
ROUNDING = 3e-3
REFUSALS = (NotImplementedError, ValueError)
HOME = peft_longlora.__path__[0]


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def origin(error: BaseException) -> str:
    """An error and the file that raised it."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} in {last.filename.split('/')[-1]}: {one_line(error)[:300]}"


class Parts:
    """One model type, and what was noted of it.

    Attributes:
        wrong: what does not hold. crashed: errors that are no refusals. late: refusals in use, not at creation.
        conditions: what must be so for it to work.
        layers: numbers of attention layers that S2-Attn computed, and of all the attention layers.
        trains_embeddings: whether the adapter trains them; a model may have none that can be trained.
    """

    trains_embeddings = True

    def __init__(self, model_type: str, kind: str, **changes: Any):
        self.model_type, self.kind, self.changes = model_type, kind, changes
        self.wrong: list[str] = []
        self.crashed: list[str] = []
        self.conditions: list[str] = []
        self.late: list[str] = []
        self.ids = tokens(2, LENGTH)
        self.layers: tuple[int, int] | None = None
        if asked := NUMBERS.get(model_type, {}).get("inputs"):
            self.conditions.append(f"give it {', '.join(asked)} in training, as its processor does")

    def build(self, attention: str | None = None) -> PreTrainedModel:
        return tiny_model(self.model_type, self.kind, attention, self.changes)

    def load(self, folder: str, *, sparse: bool = False) -> PreTrainedModel:
        """The merged folder in plain transformers; or with the truth as the attention of its language model."""
        model = with_inputs(self.kind_of_model.from_pretrained(folder).eval(), self.model_type)
        if sparse:
            model.config.get_text_config(decoder=True)._attn_implementation = TRUTH
        return model

    def check(self, what: str, holds: bool, figure: Any = "") -> None:
        if not holds:
            self.wrong.append(f"{what} {figure}".strip())

    def attempt(self, what: str, run: Callable[[], Any]) -> Any:
        """Run a part; an error is noted, and the examination goes on."""
        try:
            return run()
        except Exception as error:
            is_refusal = isinstance(error, REFUSALS) and self._is_ours(error)
            (self.late if is_refusal else self.crashed).append(
                f"{what}: {one_line(error) if is_refusal else origin(error)}"
            )
            return None

    @staticmethod
    def _is_ours(error: BaseException) -> bool:
        return traceback.extract_tb(error.__traceback__)[-1].filename.startswith(HOME)

    def _sight(self, model: PeftModel) -> None:
        half = LENGTH // 2
        seen = sees(model, self.ids[:1], slice(0, half))
        self.check("early tokens see later ones:", not seen[half:].any(), int(seen[half:].sum()))
        self.check("early tokens see themselves", bool(seen[:half].all()), f"{int(seen[:half].sum())} of {half}")

    def _disabled(self, model: PeftModel, short: torch.Tensor, of_base: torch.Tensor) -> None:
        with model.disable_adapter():
            out = logits(model, short)
        self.check("disabled adapter is not the base:", torch.equal(out, of_base), far(out, of_base))

    def _loading(self, model: PeftModel, folder: str) -> None:
        model.save_pretrained(f"{folder}/adapter")
        loaded = PeftModel.from_pretrained(self.build(), f"{folder}/adapter")
        for training in (False, True):
            a, b = (logits(m, self.ids, training=training) for m in (loaded, model))
            self.check("loaded adapter differs:", torch.equal(a, b), far(a, b))
        self.loaded = loaded

    def _merging(self, model: PeftModel, folder: str) -> bool:
        self.loaded.eval().merge_and_unload().save_pretrained(f"{folder}/merged")
        plain = self.load(f"{folder}/merged")
        ours, theirs = logits(model, self.ids), logits(plain, self.ids)
        if far(ours, theirs) > ROUNDING and not self._reads_back(f"{folder}/stock"):
            self.conditions.append("transformers reads back other weights than it saved")
            return False
        self.check("merged differs in plain transformers:", far(ours, theirs) < ROUNDING, far(ours, theirs))
        texts = (m.config.get_text_config(decoder=True) for m in (model, plain))
        rope, merged = (getattr(text, "rope_parameters", None) for text in texts)
        self.check("merged config's RoPE:", rope == merged, merged)
        return True

    def _reads_back(self, folder: str) -> bool:
        """Whether transformers itself loads what it saved."""
        stock = self.build()
        stock.save_pretrained(folder)
        return far(logits(self.kind_of_model.from_pretrained(folder), self.ids), logits(stock, self.ids)) < ROUNDING

    def _copy(self, folder: str, *, sparse: bool = False) -> PeftModel:
        """Where no folder can be merged: the adapter on a model with transformers' own attention, or the truth's."""
        model = PeftModel.from_pretrained(self.build(), folder).eval()
        config = model.config.get_text_config(decoder=True)
        model.get_base_model().set_attn_implementation("sdpa")
        if sparse:
            config._attn_implementation = TRUTH
        return model

    def _dense(self, model: PeftModel, load: Callable[..., Any]) -> None:
        plain = load()
        for kind in ("packed", "padded"):
            out = self.attempt(
                f"evaluation of {kind} documents", lambda k=kind: together(model, self.ids, k, training=False)
            )
            if out is not None:
                error = far(out, alone(plain, self.ids, kind))
                self.check(f"evaluation of {kind} documents differs from them alone:", error < ROUNDING, error)

    def _sparse(self, model: PeftModel, load: Callable[..., Any]) -> None:
        truth = load(sparse=True)
        Truth.is_sparse = False
        dense = logits(truth, self.ids)
        error = far(dense, logits(load(), self.ids))
        self.check("the truth is not the model:", error < ROUNDING, error)
        Truth.is_sparse, Truth.count = True, 0
        wanted, count = logits(truth, self.ids), Truth.count
        calls: list[bool] = []
        attentions = find_attention_modules(model)
        settings = {id(s): s for s in map(settings_of, attentions.values())}.values()
        for one in settings:
            one.probe = lambda call: calls.append(
                call.is_sparse and not call.is_local and call.is_causal and call.cached == 0
            )
        out = logits(model, self.ids, training=True)
        for one in settings:
            one.probe = None
        self.layers = (sum(calls), max(len(calls), len(attentions)))
        if not any(calls):
            self.conditions.append("S2-Attn changes no layer")
            Truth.is_sparse, wanted, count = False, dense, 0
        self.check("S2-Attn's layers:", sum(calls) == count, f"{sum(calls)}, of {count} with plain causal attention")
        self.check("sparse differs from the reference:", far(out, wanted) < ROUNDING, far(out, wanted))
        with use_attention(model, "sparse"):
            inside = logits(model, self.ids)
        self.check("use_attention(sparse) differs:", far(inside, wanted) < ROUNDING, far(inside, wanted))
        with use_attention(model, "dense"):
            inside = logits(model, self.ids, training=True)
        self.check("use_attention(dense) differs:", far(inside, dense) < ROUNDING, far(inside, dense))
        if count:
            self.check("sparse has no effect:", far(wanted, dense) > 10 * ROUNDING, far(wanted, dense))
        for kind in ("packed", "padded"):
            out = self.attempt(
                f"training on {kind} documents", lambda k=kind: together(model, self.ids, k, training=True)
            )
            if out is not None:
                error = far(out, alone(truth, self.ids, kind))
                self.check(f"training on {kind} documents differs from them alone:", error < ROUNDING, error)
                if kind == "packed":
                    self._sight_of_documents(model)

    def _sight_of_documents(self, model: PeftModel) -> None:
        positions = torch.cat([torch.arange(length) for length in DOCUMENTS])[None]
        inside = slice(DOCUMENTS[0], DOCUMENTS[0] + DOCUMENTS[1])
        seen = sees(model, self.ids[:1], inside, position_ids=positions)
        others = int(seen.sum() - seen[inside].sum())
        self.check("a packed document sees others:", others == 0, others)

    def _half(self) -> None:
        """In bfloat16, with norms and embeddings kept in float32: a new adapter is the base, and it trains."""
        base, ids = self.build().bfloat16(), self.ids[:, : WINDOW - 4]
        try:
            wanted = logits(base, ids)
        except Exception:  # stock cannot compute in bfloat16 where a part of it is kept in float32
            return
        config = LongLoraConfig(r=4, group_size=GROUP, train_embeddings=self.trains_embeddings)
        model = get_peft_model(base, config)
        out = logits(model, ids)
        self.check("a new adapter in bfloat16 is not the base:", torch.equal(out, wanted), far(out, wanted))
        model.train()(input_ids=self.ids, use_cache=False).logits.float().logsumexp(-1).sum().backward()
        trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        lost = [name for name, grad in trained.items() if grad is None or not grad.isfinite().all()]
        self.check("no gradient in bfloat16:", not lost, f"{len(lost)} of {len(trained)}, {lost[:2]}")

    def _generation(self, model: PeftModel) -> None:
        def generate(m: Any, use_cache: bool) -> torch.Tensor:
            m.eval()
            return m.generate(
                input_ids=self.ids[:1, :40], max_new_tokens=6, min_new_tokens=6, do_sample=False, use_cache=use_cache
            )

        def fault(m: Any) -> str:
            try:
                with_cache = generate(m, True)
            except Exception as error:
                return f"fails ({origin(error)})"
            return "" if torch.equal(with_cache, generate(m, False)) else "differs from generation without"

        if not (found := fault(model)):
            self.attempt("chat", lambda: self._chat(model))
        elif fault(self.build()):
            self.conditions.append("generation with a cache " + found.split(" (")[0] + ", in transformers too")
        else:
            self.check("generation with a cache " + found, False)

    def _chat(self, model: PeftModel) -> None:
        """The cache of `longlora chat`: filled in chunks, taken back to a prefix, and filled again."""
        model.eval()
        row = self.ids[0, :50].tolist()
        kv = KVCache(model, chunk_size=16)
        kv.fill(row[:30])
        kv.keep()
        kv.fill(row[:35] + self.ids[1, :10].tolist())
        kv.fill(row)
        found: list[torch.Tensor] = []
        handle = model.get_base_model().register_forward_hook(lambda _m, _a, out: found.append(out.logits[:, -1]))
        kv.append(self.ids[1, :1].tolist(), 1)
        handle.remove()
        whole = logits(model, torch.cat([self.ids[:1, :50], self.ids[1:, :1]], 1))[:, -1]
        error = far(found[0], whole)
        self.check("the cache of chat differs from the whole row:", error < ROUNDING, error)

    def _scores(self, model: PeftModel) -> None:
        """The losses of `longlora eval`, whose output layer gets the hidden states in chunks."""
        row = self.ids[0]
        losses = TokenLosses(model.eval(), chunk_size=32)(row[:-1], row[1:])
        whole = torch.nn.functional.cross_entropy(logits(model, row[None, :-1])[0], row[1:], reduction="none")
        error = (losses - whole).abs().max().item()
        self.check("the losses of evaluation differ from the logits':", error < ROUNDING, error)

    def _unloading(self, model: PeftModel, short: torch.Tensor, of_base: torch.Tensor, before: dict) -> None:
        base = model.unload()
        out = logits(base, short)
        self.check("unloaded is not the base:", torch.equal(out, of_base), far(out, of_base))
        after = base.config.to_dict()
        changed = [k for k in before if before[k] != after.get(k)]
        self.check("unloaded config differs:", not changed, [(k, before[k], after.get(k)) for k in changed][:1])
