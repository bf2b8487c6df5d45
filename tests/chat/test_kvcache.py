"""KV caches filled in chunks and taken back: the same keys, values and tokens as one forward over the whole row."""

import pytest
import torch
from transformers import DynamicCache

from peft_longlora.chat.kvcache import KVCache, check_cache, shared_prefix
from tests.helpers.chat_models import a_model
from tests.helpers.releases import CACHE

IDS = torch.randint(3, 250, (300,), generator=torch.Generator().manual_seed(7)).tolist()
OTHER = [*IDS[:200], 9, 8, 7, 6, 5]
SLIDING = dict(sliding_window=32, layer_types=["sliding_attention", "full_attention"])
MODELS = {
    "llama": dict(),
    "llama, no adapter": dict(adapter=False),
    "qwen3": dict(model_type="qwen3", head_dim=8),
    "gemma3_text, sliding": dict(model_type="gemma3_text", head_dim=8, **SLIDING),
    "gpt_neox": dict(model_type="gpt_neox"),
    "longrope": dict(
        adapter=False,
        rope_parameters=dict(
            rope_type="longrope",
            rope_theta=1e4,
            short_factor=[1.0] * 4,
            long_factor=[4.0] * 4,
            original_max_position_embeddings=64,
        ),
    ),
    "dynamic RoPE": dict(adapter=False, rope_parameters=dict(rope_type="dynamic", factor=8.0, rope_theta=1e4)),
}


@torch.no_grad()
def whole(model, ids) -> DynamicCache:
    cache = DynamicCache()
    model(input_ids=torch.tensor([ids]), **{CACHE: cache}, use_cache=True)
    return cache


def assert_holds(kv: KVCache, model, ids: list[int]):
    assert kv.ids == ids and kv.cache.get_seq_length() == len(ids)
    for held, want in zip(kv.cache.layers, whole(model, ids).layers, strict=True):
        torch.testing.assert_close(held.keys, want.keys, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(held.values, want.values, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_chunks_and_going_back_give_what_one_forward_gives(name):
    model = a_model(**MODELS[name])
    kv, seen = KVCache(model, chunk_size=64), []
    for ids in (IDS[:100], IDS, OTHER, IDS[:40], IDS[:40], OTHER[::-1]):
        kv.fill(ids, lambda done, total: seen.append((done, total)))
        assert_holds(kv, model, ids)
    assert seen[-1] == (len(OTHER), len(OTHER)) and all(done <= total for done, total in seen)


@pytest.mark.parametrize("kind", ["dense", "quantised"])
def test_only_what_is_new_is_forwarded(kind):
    if kind == "quantised":
        pytest.importorskip("hqq")
    model = a_model(head_dim=32)
    kv, sizes = KVCache(model, kind, chunk_size=64), []
    model.get_input_embeddings().register_forward_hook(lambda m, args, out: sizes.append(args[0].shape[1]))
    kv.fill(IDS[:200])
    kv.keep()
    assert sizes == [64, 64, 64, 8]
    for ids in (IDS[:230], [*IDS[:200], 1, 2, 3], IDS[:200] + [4] * 150, IDS[:201]):
        sizes.clear()
        kv.fill(ids)
        assert sum(sizes) == len(ids) - 200 and max(sizes) <= 64 and kv.ids == ids


def test_quantised_caches_go_back_to_what_was_kept():
    """After going back, a row gives the very tokens that it gives on a cache of its own."""
    pytest.importorskip("hqq")
    model = a_model(head_dim=32)

    def generate(kv, ids):
        kv.fill(ids[:-1])
        inputs = torch.tensor([ids])
        out = model.generate(inputs, attention_mask=torch.ones_like(inputs), **kv.as_argument, max_new_tokens=40)
        kv.sync(out[0].tolist())
        assert kv.ids == out[0, : kv.cache.get_seq_length()].tolist()
        return out[0, len(ids) :].tolist()

    used = KVCache(model, "quantised", chunk_size=64)
    used.fill(IDS[:200])
    used.keep()
    rows = [IDS[:200] + [n] * 3 for n in (5, 6)]
    found = [generate(used, row) for row in (*rows, rows[0])]
    fresh = []
    for row in rows:
        kv = KVCache(model, "quantised", chunk_size=64)
        kv.fill(IDS[:200])
        fresh.append(generate(kv, row))
    assert found == [*fresh, fresh[0]] and fresh[0] != fresh[1]


@pytest.mark.parametrize("backend", ["hqq", pytest.param("quanto", marks=pytest.mark.slow)])
def test_quantised_keys_are_near_and_do_not_drift(backend):
    """Quantising anew every 128 tokens must not add up: the last error is within the first one's range."""
    pytest.importorskip({"hqq": "hqq", "quanto": "optimum.quanto"}[backend])
    model = a_model(head_dim=32, max_position_embeddings=4096, context_length=8192)
    ids = (IDS * 8)[:2048]
    want = whole(model, ids[:128])
    kv, errors = KVCache(model, "quantised", chunk_size=128, backend=backend), []
    assert kv.label == f"quantised ({backend}, 4 bits)"
    for n in (128, 256, 2048):
        kv.fill(ids[:n])
        keys = kv.cache.layers[0]._dequantize(kv.cache.layers[0]._quantized_keys)[:, :, :128]
        errors.append(((keys - want.layers[0].keys).norm() / want.layers[0].keys.norm()).item())
    assert 0 < errors[0] < 0.1 and errors[-1] < 1.5 * errors[0]


def test_bytes_are_those_of_the_formula():
    """2 x layers x KV heads x tokens x head dim x bytes a number; 4 bits with a scale and a zero for 32 numbers."""
    model = a_model(head_dim=32)
    kv = KVCache(model, chunk_size=64)
    kv.fill(IDS)
    assert kv.nbytes() == 2 * 2 * 2 * len(IDS) * 32 * 4
    pytest.importorskip("hqq")
    small = KVCache(model, "quantised", chunk_size=512)
    small.fill(IDS)
    numbers = 2 * 2 * 2 * len(IDS) * 32
    assert small.nbytes() == numbers // 2 + numbers // 32 * 2 * 4


def test_a_forward_that_fails_leaves_nothing_half_filled():
    model = a_model()
    kv = KVCache(model, chunk_size=64)
    kv.fill(IDS[:100])
    layer = model.get_base_model().model.layers[1]

    def fail(module, args):
        raise RuntimeError("out of memory")

    hook = layer.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        kv.fill(IDS)
    hook.remove()
    assert kv.ids == []
    kv.fill(IDS)
    assert_holds(kv, model, IDS)


def test_what_does_not_work_is_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"cache='static' is unknown\. Use one of 'dense', 'quantised', 'offloaded'"):
        KVCache(a_model(), "static")
    with pytest.raises(ValueError, match="cache='offloaded' keeps keys and values of a GPU"):
        check_cache("offloaded", "cpu")
    monkeypatch.setattr("peft_longlora.chat.kvcache.QUANTISERS", {"quanto": "no_such_package.inside"})
    with pytest.raises(ImportError, match=r"pip install hqq \(or optimum-quanto\)"):
        check_cache("quantised", "cpu")


@pytest.mark.parametrize(
    "first, second, n", [([], [1], 0), ([1, 2], [1, 2, 3], 2), ([1, 2, 3], [1, 9, 3], 1), ([5], [6], 0), ([4], [4], 1)]
)
def test_shared_prefix(first, second, n):
    assert shared_prefix(first, second) == shared_prefix(second, first) == n
