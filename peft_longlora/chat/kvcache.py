"""transformers' KV caches, filled in chunks. They know which tokens they hold, and keep what two prompts share.

Called by conversation.py and benchmarks/generation.py.
"""

from __future__ import annotations

import copy
import importlib.util
import math
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel, QuantizedCache

from peft_longlora.architecture import cache_name, takes
from peft_longlora.hub.generation import cache_bytes
from peft_longlora.rope.parameters import base_rope

PLAIN_LAYERS = ("DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer")
CACHES = ("dense", "quantised", "offloaded")
# hqq comes first because quanto compiles kernels when it is first used: minutes, and nvcc for those of a GPU.
QUANTISERS = {"hqq": "hqq", "quanto": "optimum.quanto"}


class OffloadedCache(DynamicCache):
    """transformers' `DynamicCache(offloading=True)`, but a layer is fetched only after it has arrived on the CPU.

    transformers copies layers to the CPU on the stream of the model, and fetches them on another stream. Before 5.24
    this stream does not wait (`Cache.update` in cache_utils.py). If the CPU is far ahead of the GPU, as with long rows,
    a layer is then fetched before it has arrived, and attention sees old memory.
    """

    def __init__(self) -> None:
        super().__init__(offloading=True)

    def prefetch(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers, but after everything that the model was given to do so far."""
        self.prefetch_stream.wait_stream(torch.cuda.current_stream(self.prefetch_stream.device))
        super().prefetch(*args, **kwargs)


class KVCache:
    """The keys and values of one row of tokens.

    Attributes:
        ids: the tokens whose keys and values are held.
        reread: how many tokens the last `fill` read again although they were held, because this cache cannot drop those
            behind them.
        cache: transformers' cache.
        as_argument: the same for `generate(**kv.as_argument)`; call `sync` afterwards.
    """

    def __init__(
        self, model: PreTrainedModel, kind: str = "dense", chunk_size: int = 2048, backend: str | None = None
    ) -> None:
        """Make an empty cache.

        Args:
            model: in evaluation mode, with or without an adapter.
            kind: "dense"; "quantised" (4 bits, by hqq or optimum-quanto); "offloaded" (in the CPU's
                memory, one layer at a time on the GPU).
            chunk_size: tokens of one forward while the cache is filled.
            backend: for "quantised": "hqq" or "quanto"; None: the first that is installed.

        Raises: ValueError, ImportError: this kind does not work here.
        """
        self.model, self.kind, self.chunk_size = model, kind, chunk_size
        self.backend = check_cache(kind, model.device, backend)
        self.has_states = has_states(model.config.get_text_config())
        self.is_read_anew = is_read_anew(model)
        if (self.has_states or self.is_read_anew) and kind != "dense":
            raise ValueError(
                f"cache={kind!r} holds keys and values, and some layers of this model ({model.config.model_type}) hold "
                f"states instead. Use cache='dense'."
            )
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.ids: list[int] = []
        self.reread = 0
        self.cache = self._make()
        self._kept: tuple[list[int], Cache] | None = None

    def _make(self) -> Cache | None:
        if not takes_dynamic_cache(self.model):
            return None  # the model makes its own in the first forward
        if self.kind == "quantised":
            config = self.model.config.get_text_config()
            return QuantizedCache(self.backend, config, **quantiser_options(self.backend, config))
        if self.has_states:
            return DynamicCache(config=self.model.config.get_text_config())
        # No config is given, because layers that drop what left their sliding window could not go back to a prefix.
        return OffloadedCache() if self.kind == "offloaded" else DynamicCache()

    @property
    def as_argument(self) -> dict[str, Cache | None]:
        """The cache under the name of the model's argument for it."""
        return {cache_name(self.model): self.cache}

    @property
    def label(self) -> str:
        """The kind of cache; for a quantised one also its package and bits."""
        return f"quantised ({self.backend}, 4 bits)" if self.backend else self.kind

    def fill(self, ids: list[int], on_progress: Callable[[int, int], Any] | None = None) -> None:
        """Hold exactly these tokens. The prefix shared with the held tokens stays; the rest is forwarded in chunks.

        Args:
            ids: the whole row.
            on_progress: called with the tokens held and the tokens asked for, after each chunk.
        """
        chunk_size = self.chunk_size
        if self._frequencies(len(ids)) != self._frequencies(len(self.ids)):
            self.clear()
        if self._frequencies(len(ids)) or self.has_states or self.is_read_anew:
            chunk_size = len(ids)
        held = shared_prefix(self.ids, ids)
        if self.is_read_anew and self.ids != ids:
            self.clear()
        self._go_back(min(held, len(self.ids)))
        self.reread = held - len(self.ids)
        self.append(ids[len(self.ids) :], chunk_size, on_progress)

    @torch.no_grad()
    def append(self, ids: list[int], chunk_size: int, on_progress: Callable[[int, int], Any] | None = None) -> None:
        """Forward tokens behind the held ones; see `fill`."""
        total = len(self.ids) + len(ids)
        if (self.has_states or self.is_read_anew) and self.ids:
            chunk_size = 1  # behind a state, transformers' layers take one token at a time
        while len(self.ids) < total:
            chunk, ids = ids[:chunk_size], ids[chunk_size:]
            inputs = torch.tensor([chunk], device=self.model.device)
            more: dict[str, Any] = {}
            if self.has_states and takes(self.model, "position_ids"):  # some count only what their first layer holds
                more["position_ids"] = torch.arange(len(self.ids), len(self.ids) + len(chunk), device=inputs.device)[
                    None
                ]
            try:
                out = self.model(input_ids=inputs, **self.as_argument, **more, use_cache=True, logits_to_keep=1)
                self.cache = getattr(out, cache_name(self.model)) if self.cache is None else self.cache
            except BaseException:
                self.clear()  # some layers may hold the chunk already, and others not
                raise
            self.ids = self.ids + chunk
            if on_progress:
                on_progress(len(self.ids), total)

    def keep(self) -> None:
        """Remember the tokens held now as the prefix of later rows.

        A quantised cache cannot drop tokens, so it keeps a copy of this prefix. The copy needs memory only after 128
        more tokens have come.
        """
        if self.kind == "quantised" or self.has_states:
            self._kept = (self.ids, _copied(self.cache))

    def sync(self, ids: list[int]) -> None:
        """Record what `generate` left in the cache: a prefix of `ids`, which are the prompt and the answer."""
        is_counted = not (self.has_states or self.is_read_anew)
        self.ids = ids[: self.cache.get_seq_length()] if is_counted else ids[:-1]

    def nbytes(self) -> int:
        """Bytes of the held keys and values, on any device; a kept copy is not counted."""
        return cache_bytes(self.cache)

    def _go_back(self, length: int) -> None:
        if length == len(self.ids):
            return
        if self.kind == "quantised" or self.has_states:
            if self._kept is None or len(self._kept[0]) > length:
                self.clear()
            else:
                self.ids, self.cache = self._kept[0], _copied(self._kept[1])
        elif length == 0:
            self.clear()
        else:
            self.cache.crop(length - len(self.ids))
            self.ids = self.ids[:length]

    def _frequencies(self, length: int) -> int:
        """A number that identifies the RoPE frequencies of a row of this length; 0 for the pretrained frequencies.

        Beyond the pretrained window "longrope" has other frequencies, and "dynamic" has others at every length. There
        the keys of a chunk differ from those of the whole row, so the row must be forwarded at once.
        """
        config = self.model.config.get_text_config()
        rope = base_rope(config)
        native = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        if length <= native:
            return 0
        return {"longrope": 1, "dynamic": length}.get(rope.get("rope_type"), 0)


def takes_dynamic_cache(model: PreTrainedModel) -> bool:
    """Whether a model computes with transformers' `DynamicCache`, and not only with a class of its own."""
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    return getattr(model, "_supports_default_dynamic_cache", lambda: True)()


def is_read_anew(model: PreTrainedModel) -> bool:
    """Whether a row must be read at once: the cache is the model's own, or has layers that are neither keys and values
    of all tokens or of a window, nor states."""
    others = _other_layers(model.config.get_text_config())
    return not takes_dynamic_cache(model) or not all(hasattr(layer, "conv_states") for layer in others)


def _other_layers(config: PreTrainedConfig) -> list[Any]:
    """The layers of a model's cache that hold something else than keys and values."""
    try:
        return [layer for layer in DynamicCache(config=config).layers if type(layer).__name__ not in PLAIN_LAYERS]
    except (AttributeError, KeyError, TypeError, ValueError):  # a config that says nothing about caches
        return []


def has_states(config: PreTrainedConfig) -> bool:
    """Whether some layers hold a state, such as that of a linear attention, which cannot go back to a shorter row."""
    return bool(_other_layers(config))


def check_cache(kind: str, device: torch.device | str, backend: str | None = None) -> str | None:
    """Check that a kind of cache works here. Returns the package that quantises, or None.

    Raises:
        ValueError: an unknown kind, or "offloaded" without a GPU.
        ImportError: "quantised" without a package for it.
    """
    if kind not in CACHES:
        raise ValueError(f"cache={kind!r} is unknown. Use one of {', '.join(map(repr, CACHES))}.")
    if kind == "offloaded" and torch.device(device).type == "cpu":
        raise ValueError(
            "cache='offloaded' keeps keys and values of a GPU in the CPU's memory, and the model is on the CPU. Use "
            "cache='dense'."
        )
    if kind != "quantised":
        return None
    for name in [backend] if backend else QUANTISERS:
        package = QUANTISERS[name]
        if importlib.util.find_spec(package.partition(".")[0]) and importlib.util.find_spec(package):
            return name
    raise ImportError("cache='quantised' needs a package that quantises: pip install hqq (or optimum-quanto)")


def quantiser_options(backend: str, config: PreTrainedConfig) -> dict[str, Any]:
    """Options of transformers' QuantizedCache: 4 bits, in groups of 64 numbers that lie inside one token's head.

    After every 128 more tokens transformers dequantises everything and quantises it again. If the groups stay the same,
    this loses almost nothing. hqq's axis 0, or larger groups, would regroup all tokens each time.
    """
    layers = config.per_layer_config if getattr(config, "is_heterogeneous", False) else [config]
    sizes = [getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads for layer in layers]
    axis = {"quanto": 0, "hqq": 1}[backend]
    return dict(nbits=4, q_group_size=math.gcd(64, *sizes), axis_key=axis, axis_value=axis)


def _copied(cache: Cache) -> Cache:
    """An independent copy of a cache. The tensors are shared, because quantised layers replace tensors and never change
    them."""
    other = copy.copy(cache)
    other.layers = [copy.deepcopy(x) if hasattr(x, "conv_states") else copy.copy(x) for x in cache.layers]
    return other


def shared_prefix(first: list[int], second: list[int]) -> int:
    """The number of tokens that both rows begin with."""
    n = min(len(first), len(second))
    if first[:n] == second[:n]:
        return n
    return next(i for i in range(n) if first[i] != second[i])
