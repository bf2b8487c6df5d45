"""What a length costs: forward throughput, time to the first token, decoding speed, peak memory, KV cache."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from peft_longlora.architecture import cache_name
from peft_longlora.eval.identity import content_digest
from peft_longlora.eval.subject import Subject
from peft_longlora.eval.tasks.task import Item
from peft_longlora.hub.generation import cache_bytes, decoding

NEW_TOKENS = 32


@dataclass
class Cost:
    """The task "cost", on random tokens, one row at a time.

    forward_tokens_per_second: a bare forward, all logits made, nothing kept. seconds_to_first_token: a prompt of the
    length read with a cache, and one token written. decode_tokens_per_second: 32 more tokens. peak_memory_bytes: of the
    device's allocator while the prompt is read; on a CPU, of the process so far. kv_cache_bytes: after the prompt.

    Args:
        lengths: tokens.
        repeats: measurements of each length, after a first one that does not count.
    """

    lengths: list[int]
    repeats: int = 3
    name: str = "cost"
    notes: list[str] = field(default_factory=list)
    _warm: set[int] = field(default_factory=set)

    @property
    def parameters(self) -> dict[str, Any]:
        """The settings that time depends on, besides the device."""
        return {"new_tokens": NEW_TOKENS, "threads": torch.get_num_threads()}

    def data(self) -> None:
        """None: random tokens are not data."""
        return None

    def check(self, subject: Subject) -> None:
        """Any length can be tried."""

    def items(self, subject: Subject) -> Iterator[Item]:
        """One item a length and repeat."""
        for length in self.lengths:
            for repeat in range(self.repeats):

                def measure(length: int = length, repeat: int = repeat) -> dict[str, Any]:
                    if length not in self._warm:
                        self._warm.add(length)
                        self._measure(subject, length, repeat)
                    return self._measure(subject, length, repeat)

                key = f"cost/{subject.variant}/{length}/{repeat}"
                yield Item(key, f"cost {length}", (repeat + 1) / self.repeats, measure)

    @torch.no_grad()
    def _measure(self, subject: Subject, length: int, repeat: int) -> dict[str, Any]:
        model, device = subject.model, subject.model.device
        vocabulary = model.get_input_embeddings().weight.shape[0]
        generator = torch.Generator().manual_seed(repeat)
        ids = torch.randint(vocabulary, (1, length), generator=generator).to(device)
        is_cuda = device.type == "cuda"
        forward, _ = _time(device, lambda: model(input_ids=ids, use_cache=False).logits)
        if is_cuda:
            torch.cuda.reset_peak_memory_stats(device)
        first, out = _time(device, lambda: _generate(model, ids, 1))
        peak = torch.cuda.max_memory_allocated(device) if is_cuda else _process_peak()
        kv_cache = cache_bytes(getattr(out, cache_name(model)))
        del out
        total, _ = _time(device, lambda: _generate(model, ids, 1 + NEW_TOKENS))
        measures = [
            ["forward_tokens_per_second", None, length, forward],
            ["seconds_to_first_token", None, first, 1],
            ["decode_tokens_per_second", None, NEW_TOKENS, max(total - first, 1e-9)],
            ["peak_memory_bytes", None, peak, 1],
            ["kv_cache_bytes", None, kv_cache, 1],
        ]
        key = f"cost/{subject.variant}/{length}/{repeat}"
        return {
            "key": key,
            "task": self.name,
            "dataset": "random tokens",
            "protocol": "batch 1" if is_cuda else "batch 1, memory of the process",
            "variant": subject.variant,
            "length": length,
            "unit": key,
            "content": content_digest("random tokens", length, repeat),
            "beyond_window": length > subject.window,
            "measures": measures,
        }


def _generate(model: Any, ids: torch.Tensor, n: int) -> Any:
    config = decoding(n, min_new_tokens=n, return_dict_in_generate=True)
    return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)


def _time(device: torch.device, run: Callable[[], Any]) -> tuple[float, Any]:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    out = run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, out


def _process_peak() -> int:
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
