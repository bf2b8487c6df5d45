"""`generate` on a model with a LongLoRA adapter: transformers' caches, chunks and streamers work as on any model.

Two truths: the adapter's own tokens with the dense cache, and the merged model with the same cache, which transformers
runs without anything of this package.
"""

import copy

import pytest
import torch
from transformers import DynamicCache, TextIteratorStreamer

from peft_longlora.chat.kvcache import KVCache, OffloadedCache, quantiser_options
from tests.helpers.answering_models import byte_tokenizer
from tests.helpers.chat_models import a_model
from tests.helpers.releases import CACHE

IDS = torch.randint(3, 250, (1, 150), generator=torch.Generator().manual_seed(11))
BATCH = torch.randint(3, 250, (2, 150), generator=torch.Generator().manual_seed(12))


@pytest.fixture(scope="module")
def adapted():
    return a_model(head_dim=32)


@pytest.fixture(scope="module")
def merged(adapted):
    model = copy.deepcopy(adapted).merge_and_unload()
    model.set_attn_implementation("sdpa")
    return model


def tokens(model, ids=IDS, **options) -> list[list[int]]:
    options = {"max_new_tokens": 40, "do_sample": False, "attention_mask": torch.ones_like(ids), **options}
    out = model.generate(
        ids.to(model.device), **{k: v.to(model.device) if k == "attention_mask" else v for k, v in options.items()}
    )
    return out[:, ids.shape[1] :].tolist()


@pytest.mark.parametrize(
    "options",
    [
        dict(cache_implementation="static"),
        dict(prefill_chunk_size=32),
        dict(cache_implementation="static", prefill_chunk_size=32),
        dict(use_cache=False, max_new_tokens=12),
    ],
    ids=str,
)
def test_caches_of_the_same_maths_give_the_same_tokens(adapted, merged, options):
    for ids in (IDS, BATCH):
        mask = torch.ones_like(ids)
        mask[-1, : 20 if len(ids) > 1 else 0] = 0  # padding on the left
        n = options.get("max_new_tokens", 40)
        want = [row[:n] for row in tokens(adapted, ids, attention_mask=mask)]
        assert tokens(adapted, ids, attention_mask=mask, **options) == want
        assert tokens(merged, ids, attention_mask=mask, **options) == want
    assert len({tuple(row) for row in want}) == 2 and len(set(want[0])) > 5


@pytest.mark.parametrize("backend", ["hqq", pytest.param("quanto", marks=pytest.mark.slow)])
def test_a_quantised_cache_gives_the_tokens_it_gives_the_merged_model(adapted, merged, backend):
    pytest.importorskip({"hqq": "hqq", "quanto": "optimum.quanto"}[backend])

    def quantised(model):  # transformers 5.17 takes the backend out of the dict that it is given
        config = dict(backend=backend, **quantiser_options(backend, adapted.config))
        return tokens(model, cache_implementation="quantized", cache_config=config)

    found = quantised(adapted)
    assert found == quantised(merged)
    assert found[0][0] == tokens(adapted)[0][0]  # the first token comes before anything is read back


def test_streamed_pieces_are_the_answer(adapted):
    tokenizer = byte_tokenizer()
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    out = tokens(adapted, streamer=streamer)
    pieces = list(streamer)
    assert "".join(pieces) == tokenizer.decode(out[0]) and len(pieces) > 1


def test_keys_and_values_serve_a_second_prompt(adapted, merged):
    """Computed once, cropped to what two rows share, gone on with."""
    cache = DynamicCache()
    with torch.no_grad():
        adapted(IDS[:, :100], **{CACHE: cache}, use_cache=True)
    for tail in (IDS[:, 100:], IDS[:, :20], IDS[:, 100:]):
        ids = torch.cat([IDS[:, :100], tail], dim=1)
        assert tokens(adapted, ids, **{CACHE: cache}) == tokens(merged, ids)
        cache.crop(100 - cache.get_seq_length())


SINKS = '''
"""Sink-style streaming (arXiv:2309.17453): the first tokens and the last ones, at the positions they had."""

import torch
from transformers import DynamicCache

from peft_longlora.architecture import cache_name


@torch.no_grad()
def generate(model, inputs, window_length=256, num_sink_tokens=4, max_new_tokens=16, **kwargs):
    cache, input_ids = DynamicCache(), inputs
    for step in range(input_ids.shape[1] + max_new_tokens - 1):
        position = torch.tensor([[step]], device=input_ids.device)
        out = model(input_ids[:, step : step + 1], position_ids=position, use_cache=True, **{cache_name(model): cache})
        if step >= input_ids.shape[1] - 1:
            input_ids = torch.cat([input_ids, out.logits[:, -1:].argmax(-1)], dim=1)
        for layer in cache.layers if cache.get_seq_length() == window_length else []:
            first, last = slice(num_sink_tokens), slice(num_sink_tokens + 1, None)
            layer.keys = torch.cat([layer.keys[:, :, first], layer.keys[:, :, last]], dim=2)
            layer.values = torch.cat([layer.values[:, :, first], layer.values[:, :, last]], dim=2)
    assert cache.get_seq_length() < window_length
    return input_ids
'''


@torch.no_grad()
def tokens_with_mask(model, ids, window, sinks, n) -> list[int]:
    """The same by the definition: one whole forward for each token, dense, with the mask written down."""
    row = ids
    for _ in range(n):
        i = torch.arange(row.shape[1])
        seen = (i[None] <= i[:, None]) & ((i[None] > i[:, None] - (window - sinks)) | (i[None] < sinks))
        logits = model(row, attention_mask=seen[None, None], use_cache=False).logits
        row = torch.cat([row, logits[:, -1:].argmax(-1)], dim=1)
    return row[0, ids.shape[1] :].tolist()


def test_sink_style_streaming_through_transformers_custom_generate(adapted, merged, tmp_path):
    """transformers loads a decoding loop from a repository's custom_generate/generate.py; this one streams with sinks.

    transformers 5 has no sink cache, and the one that was moved to the Hub is made for 4.x (docs/serving.md).
    """
    folder = tmp_path / "sinks" / "custom_generate"
    folder.mkdir(parents=True)
    (folder / "generate.py").write_text(SINKS)
    (folder.parent / "config.json").write_text("{}")
    options = dict(custom_generate=str(folder.parent), trust_remote_code=True)
    ids, n = IDS[:, :80], dict(max_new_tokens=16)
    assert tokens(adapted, ids, window_length=1000, **n, **options) == tokens(adapted, ids, **n)
    short = tokens(adapted, ids, window_length=32, **n, **options)
    assert short[0] == tokens_with_mask(merged, ids, 32, 4, 16) != tokens(adapted, ids, **n)[0]


@pytest.mark.slow
def test_sink_style_streaming_of_kvpress(adapted, merged):
    """Needs kvpress, in an environment of its own (docs/serving.md): its StreamingLLMPress on a LongLoRA model.

    The prompt's cache keeps 4 sinks and the last 28 tokens, and transformers' generate goes on from it. The truth is
    the merged model, dense, with that mask written down, without a cache.
    """
    kvpress = pytest.importorskip("kvpress", reason="needs kvpress, see docs/serving.md")
    ids, sinks, n = IDS[:, :80], 4, 16
    cache, length = DynamicCache(), ids.shape[1]
    with torch.no_grad(), kvpress.StreamingLLMPress(compression_ratio=0.6, n_sink=sinks)(adapted.get_base_model()):
        # kvpress asks for the cache_position that older versions of transformers handed to each layer
        out = adapted(ids, **{CACHE: cache}, use_cache=True, cache_position=torch.tensor([length - 1]))
    kept = cache.get_seq_length()
    assert kept == 32
    first = out.logits[:, -1:].argmax(-1)
    mask, positions = torch.ones(1, kept + 1, dtype=torch.long), torch.tensor([[length]])
    options = dict(attention_mask=mask, position_ids=positions, **{CACHE: cache}, max_new_tokens=n - 1)
    found = first[0].tolist() + tokens(adapted, first, **options)[0]
    row = ids
    for _ in range(n):
        i = torch.arange(row.shape[1])
        dropped = (i[:, None] >= length) & (i[None] >= sinks) & (i[None] < length - (kept - sinks))
        seen = (i[None] <= i[:, None]) & ~dropped
        with torch.no_grad():
            logits = merged(row, attention_mask=seen[None, None], use_cache=False).logits
        row = torch.cat([row, logits[:, -1:].argmax(-1)], dim=1)
    assert found == row[0, length:].tolist() != tokens(adapted, ids, max_new_tokens=n)[0]


@pytest.fixture
def slow_gpu(adapted, merged):
    """The models on a GPU that is far behind the CPU, as with long rows: every layer waits before it begins."""
    models = [copy.deepcopy(model).to("cuda") for model in (adapted, merged)]
    for model in models:
        for name, module in model.named_modules():
            if name.endswith("input_layernorm"):
                module.register_forward_pre_hook(lambda *_: torch.cuda._sleep(10**7))  # cycles, some 5 ms
    return models


@pytest.mark.gpu
def test_an_offloaded_cache_gives_the_same_tokens(slow_gpu):
    want = tokens(slow_gpu[1])
    for model in slow_gpu:
        assert tokens(model, **{CACHE: OffloadedCache()}) == want


@pytest.mark.gpu
def test_an_offloaded_cache_is_filled_in_chunks(slow_gpu):
    model = slow_gpu[0]
    caches = [KVCache(model, kind, chunk_size=16) for kind in ("dense", "offloaded")]
    for kv in caches:
        kv.fill(IDS[0].tolist())
    for dense, offloaded in zip(*(kv.cache.layers for kv in caches), strict=True):
        torch.cuda.synchronize()
        for name in ("keys", "values"):
            torch.testing.assert_close(getattr(offloaded, name).to("cuda"), getattr(dense, name))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["dense", "offloaded", "quantised"])
def test_caches_filled_in_chunks_work_on_a_gpu(adapted, kind):
    if kind == "quantised":
        pytest.importorskip("hqq")
    model = copy.deepcopy(adapted).to("cuda")
    kv = KVCache(model, kind, chunk_size=32)
    for ids in (IDS[0].tolist(), IDS[0, :100].tolist() + [7] * 30):
        kv.fill(ids[:-1])
        found = tokens(model, torch.tensor([ids]), **kv.as_argument)
        kv.sync(ids + found[0])
        if kind != "quantised":
            assert found == tokens(model, torch.tensor([ids]))
    # the first layer is fetched ahead for the next token, the last one is away
    assert kv.cache.layers[-1].keys.device.type == ("cpu" if kind == "offloaded" else "cuda")
