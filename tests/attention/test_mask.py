"""What one forward knows of documents and padding, asked the way transformers asks and checked against plain lists."""

import pytest
import torch
from transformers import DynamicCache, LlamaForCausalLM, StaticCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask, sdpa_mask

from peft_longlora import configure_attention, use_attention
from peft_longlora.attention.mask import S2Mask, s2_mask
from peft_longlora.kernels.groups import plan_from_segment_ids
from peft_longlora.kernels.patterns import PATTERNS
from tests.helpers.configs import tiny_llama_config
from tests.helpers.largest import Largest
from tests.helpers.releases import CACHE, checkpoint_activations


def config_of(implementation="s2_attn", **changes):
    config = tiny_llama_config(**changes)
    config._attn_implementation = implementation
    return config


def mask_for(batch, length, attention_mask=None, position_ids=None, cache=None, implementation="s2_attn", **kwargs):
    """The mask as a model makes it: transformers' own `create_causal_mask`."""
    return create_causal_mask(
        config=config_of(implementation),
        inputs_embeds=torch.zeros(batch, length, 8),
        attention_mask=attention_mask,
        **{CACHE: cache},
        position_ids=position_ids,
        **kwargs,
    )


def positions(*lengths: int) -> list[int]:
    return [p for length in lengths for p in range(length)]


def ids(*lengths: int) -> list[int]:
    return [n + 1 for n, length in enumerate(lengths) for _ in range(length)]


# name: (2-D mask, position_ids, segment ids that the mask must amount to)
ROWS = {
    "nothing given": (None, None, [ids(9), ids(9)]),
    "plain positions": (None, [positions(9)] * 2, [ids(9)] * 2),
    "plain positions of one row for all": (None, [positions(9)], [ids(9)] * 2),
    "all-ones mask": ([[1] * 9] * 2, None, [ids(9)] * 2),
    "left padded": ([[0] * 3 + [1] * 6, [1] * 9], None, [[0] * 3 + ids(6), ids(9)]),
    "left padded, positions counted": (
        [[0] * 3 + [1] * 6, [1] * 9],
        [[1] * 3 + positions(6), positions(9)],
        [[0] * 3 + ids(6), ids(9)],
    ),
    "left padded, positions 0 in padding": ([[0] * 3 + [1] * 6], [[0] * 3 + positions(6)], [[0] * 3 + ids(6)]),
    "right padded": ([[1] * 7 + [0] * 2, [1] + [0] * 8], None, [ids(7) + [0] * 2, [1] + [0] * 8]),
    "padded on both sides": ([[0] + [1] * 6 + [0] * 2], None, [[0] + ids(6) + [0] * 2]),
    "a row of padding": ([[0] * 9, [1] * 9], None, [[0] * 9, ids(9)]),
    "packed": (None, [positions(4, 1, 4)], [ids(4, 1, 4)]),
    "packed, documents of one token": (None, [positions(1, 1, 1, 6)], [ids(1, 1, 1, 6)]),
    "packed, with an all-ones mask": ([[1] * 9], [positions(4, 1, 4)], [ids(4, 1, 4)]),
    "two packings": (None, [positions(4, 5), positions(1, 2, 6)], [ids(4, 5), ids(1, 2, 6)]),
    "one packed row and one plain": (None, [positions(4, 5), positions(9)], [ids(4, 5), ids(9)]),
    "packed and right padded": (
        [[1] * 7 + [0] * 2, [1] * 9],
        [positions(3, 4, 2), positions(6, 3)],
        [ids(3, 4) + [0] * 2, ids(6, 3)],
    ),
    "packed and left padded": ([[0] * 2 + [1] * 7], [[0, 0, *positions(3, 4)]], [[0, 0, *ids(3, 4)]]),
    "packed, positions going on in padding": ([[1] * 7 + [0] * 2], [positions(3, 6)], [ids(3, 4) + [0] * 2]),
    "a split document that starts later": (None, [[5, 6, 7, 8, 0, 1, 2, 9, 10]], [ids(4, 3, 2)]),
    "padding between documents": (
        [[1] * 3 + [0] * 2 + [1] * 4],
        [[*positions(3), 0, 0, *positions(4)]],
        [[1] * 3 + [0] * 2 + [2] * 4],
    ),
    "rows laid end to end, the first padded right and the second left": (
        [[1] * 3 + [0] * 2 + [0] * 3 + [1] * 2],
        [[*positions(5), *positions(5)]],
        [[1] * 3 + [0] * 5 + [2] * 2],
    ),
}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("with_cache", [False, True], ids=["", "use_cache"])
def test_documents_and_padding_are_found(name, with_cache):
    """With a cache or a 2-D mask transformers drops the packing; it must be found from the positions all the same."""
    attention_mask, position_ids, expected = ROWS[name]
    expected = torch.tensor(expected)
    attention_mask, position_ids = (None if x is None else torch.tensor(x) for x in (attention_mask, position_ids))
    cache = DynamicCache(config=config_of()) if with_cache else None
    mask = mask_for(*expected.shape, attention_mask, position_ids, cache)
    assert isinstance(mask, S2Mask)
    for pattern in PATTERNS:
        groups = mask.groups(4, pattern, position_ids)
        truth = plan_from_segment_ids(expected, 4, pattern)
        assert (groups.straight, groups.shifted) == (truth.straight, truth.shifted)
        assert groups.padding_starts == truth.padding_starts
        assert (groups.padding is None) == (truth.padding is None)
        assert groups.padding is None or torch.equal(groups.padding, expected == 0)


HOLE = [1, 1, 0, 1, 1, 1, 0, 0, 1]
HOLES = {
    "mask alone": (HOLE, None, [1, 1, 0, 1, 1, 1, 0, 0, 1]),
    "positions count padding": (HOLE, positions(9), [1, 1, 0, 1, 1, 1, 0, 0, 1]),
    "positions leave padding out": (HOLE, [0, 1, 1, 2, 3, 4, 4, 4, 5], [1, 1, 0, 1, 1, 1, 0, 0, 1]),
    "the same, 1 at padding": (HOLE, [0, 1, 1, 2, 3, 4, 1, 1, 5], [1, 1, 0, 1, 1, 1, 0, 0, 1]),
    "a document begins behind the second": (HOLE, [0, 1, 2, 3, 4, 5, 6, 7, 0], [1, 1, 0, 1, 1, 1, 0, 0, 2]),
}


@pytest.mark.parametrize("name", HOLES)
def test_padding_inside_a_document_does_not_end_it(name):
    padding_mask, position_ids, expected = (None if x is None else torch.tensor([x]) for x in HOLES[name])
    mask = mask_for(1, 9, padding_mask, position_ids)
    order = mask.order(position_ids)
    assert order.tolist() == [[0, 1, 3, 4, 5, 8, 2, 6, 7]]
    groups = mask.groups(4, "s2", position_ids)
    truth = plan_from_segment_ids(expected.gather(1, order), 4, "s2")
    assert (groups.straight, groups.shifted) == (truth.straight, truth.shifted)
    assert groups.padding.tolist() == [[False] * 6 + [True] * 3]


@pytest.mark.parametrize("name", ROWS)
def test_padding_at_the_ends_of_documents_changes_no_order(name):
    attention_mask, position_ids, expected = (None if x is None else torch.tensor(x) for x in ROWS[name])
    assert mask_for(*expected.shape, attention_mask, position_ids).order(position_ids) is None


@pytest.mark.parametrize("name", ["packed", "two packings", "one packed row and one plain"])
def test_layers_that_get_no_positions_still_separate_documents(name):
    """Some architectures keep position_ids from their layers; then the model's own mask rule tells."""
    _, position_ids, expected = ROWS[name]
    mask = mask_for(*torch.tensor(expected).shape, None, torch.tensor(position_ids))
    assert mask.groups(4, "s2").straight == plan_from_segment_ids(torch.tensor(expected), 4).straight


def test_positions_of_several_axes_are_left_alone():
    """Multimodal models hand (3, B, S) positions to their layers; they restart for other reasons."""
    several = torch.tensor([positions(4, 5)]).expand(3, 1, 9)
    assert mask_for(1, 9).groups(4, "full", several).straight == (0, 9)


def test_plans_are_made_once_each():
    mask = mask_for(1, 9)
    assert mask.groups(4, "s2") is mask.groups(4, "s2")
    assert mask.groups(4, "full") is not mask.groups(4, "s2")
    assert mask.groups(4, "full").straight == (0, 9)


@pytest.mark.parametrize("name", ROWS)
def test_dense_mask_is_the_one_stock_sdpa_gets(name):
    attention_mask, position_ids, expected = ROWS[name]
    attention_mask, position_ids = (None if x is None else torch.tensor(x) for x in (attention_mask, position_ids))
    shape = torch.tensor(expected).shape
    mine = mask_for(*shape, attention_mask, position_ids).dense("sdpa", torch.device("cpu"))
    stock = mask_for(*shape, attention_mask, position_ids, implementation="sdpa")
    assert (mine is None) == (stock is None)
    assert mine is None or torch.equal(mine, stock)


def test_sliding_layers_get_their_own_window():
    """The mask of a sliding layer says so, and is stock sdpa's."""
    masks = {}
    for name in ("s2_attn", "sdpa"):
        masks[name] = create_sliding_window_causal_mask(
            config=config_of(name, sliding_window=4),
            inputs_embeds=torch.zeros(1, 9, 8),
            attention_mask=None,
            **{CACHE: None},
            position_ids=torch.arange(9)[None],
        )
    assert masks["s2_attn"].is_local and not mask_for(1, 9).is_local
    assert torch.equal(masks["s2_attn"].dense("sdpa", torch.device("cpu")), masks["sdpa"])


@pytest.mark.parametrize("tokens", [1, 5])
def test_static_cache_gets_a_tensor_of_its_own_length(tokens):
    """`generate` makes these masks outside the model: prefill into an empty cache, and a step of decoding."""
    cache = StaticCache(config=config_of(), max_cache_len=12)
    attention_mask = torch.ones(2, tokens, dtype=torch.long)
    attention_mask[0, 0] = tokens == 1
    mine, stock = (
        mask_for(2, tokens, attention_mask, None, cache, implementation=name) for name in ("s2_attn", "sdpa")
    )
    assert isinstance(mine, torch.Tensor) and mine.shape == (2, 1, tokens, 12)
    assert torch.equal(mine, stock)


def test_prefix_and_bidirectional_masks_are_refused():
    blocks = torch.tensor([[0, 0, 0, -1, -1, -1, -1, -1, -1]])
    prefix = mask_for(1, 9, block_sequence_ids=blocks)
    image = mask_for(1, 9, or_mask_function=lambda b, h, q, k: (q < 3) & (k < 3))
    for mask in (prefix, image):
        with pytest.raises(NotImplementedError, match=r"lets tokens see later ones.*use_attention\(model, 'dense'\)"):
            mask.groups(4, "s2")


def test_a_bidirectional_model_is_refused_and_stays_as_it_was():
    config = config_of("sdpa")
    config.is_causal = False
    model = LlamaForCausalLM(config).train()
    tokens = torch.arange(1, 10)[None]
    stock = model(tokens).logits
    with pytest.raises(NotImplementedError, match="lets tokens see later ones"):
        configure(model)
    assert model.training and model.config._attn_implementation == "sdpa"
    assert torch.equal(model(tokens).logits, stock)


def test_is_causal_false_for_one_forward_is_refused_while_sparse():
    with pytest.raises(NotImplementedError, match="see later ones"):
        configure(LlamaForCausalLM(tiny_llama_config()))(torch.arange(1, 10)[None], is_causal=False)


def test_a_prefix_inside_the_padding_is_no_reason_to_refuse():
    blocks = torch.tensor([[0, 0, 0, -1, -1, -1, -1, -1, -1]])
    attention_mask = torch.tensor([[0] * 3 + [1] * 6])
    assert mask_for(1, 9, attention_mask, block_sequence_ids=blocks).groups(4, "s2").straight == (0, 3, 7, 9)


def configure(model):
    configure_attention(model, group_size=16)
    return model.train()


def test_a_4d_mask_is_refused_while_sparse_and_used_while_dense():
    model = configure(LlamaForCausalLM(tiny_llama_config()))
    tokens = torch.arange(1, 10)[None]
    mask = torch.ones(1, 1, 9, 9, dtype=torch.bool).tril()
    with pytest.raises(ValueError, match=r"attention_mask of shape \(1, 1, 9, 9\).*2-D attention_mask.*position_ids"):
        model(tokens, attention_mask=mask)
    with use_attention(model, "dense"):
        torch.testing.assert_close(model(tokens, attention_mask=mask).logits, model(tokens).logits)
    model.eval()
    torch.testing.assert_close(model(tokens, attention_mask=mask).logits, model(tokens).logits)


@pytest.mark.parametrize("name", ["plain", "packed", "packed, with a mask and a cache", "padded", "checkpointed"])
def test_sparse_training_makes_no_quadratic_tensor(name):
    """Forward and backward at S = 512: no tensor as large as S x S; the dense mask of a packed row would be."""
    length = 512
    model = configure(LlamaForCausalLM(tiny_llama_config(num_key_value_heads=1)))
    inputs = dict(input_ids=torch.randint(3, 97, (1, length)), use_cache=False)
    packed = torch.tensor([positions(100, 300, 112)])
    if name == "packed":
        inputs |= dict(position_ids=packed)
    elif name == "padded":
        inputs |= dict(attention_mask=(torch.arange(length) >= 37).long()[None])
    elif "cache" in name:
        inputs |= dict(position_ids=packed, attention_mask=torch.ones(1, length), use_cache=True)
    elif name == "checkpointed":
        checkpoint_activations(model)
        inputs |= dict(position_ids=packed)
    with Largest() as largest:
        model(**inputs).logits.sum().backward()
    assert 0 < largest.numel < length * length


def test_mask_function_returns_an_object_or_what_a_static_cache_expects():
    arguments = dict(
        batch_size=1,
        q_length=5,
        kv_offset=0,
        mask_function=lambda b, h, q, k: k <= q,
        attention_mask=None,
        device=torch.device("cpu"),
    )
    assert isinstance(s2_mask(kv_length=5, q_offset=0, **arguments), S2Mask)
    assert isinstance(s2_mask(kv_length=9, q_offset=4, **arguments), S2Mask)  # decoding with a dynamic cache
    room = dict(arguments, kv_length=9, q_offset=0, allow_is_causal_skip=False)
    assert torch.equal(s2_mask(**room), sdpa_mask(**room))


@pytest.mark.parametrize(
    ("positions", "padding", "is_packed"),
    [
        ([[0, 1, 0, 1], [0, 1, 2, 3]], None, True),
        ([[0, 1, 2, 3], [0, 1, 2, 3]], None, False),
        ([[0, 1, 0, 1], [0, 0, 0, 0]], [[1, 1, 1, 1], [0, 0, 0, 0]], True),  # a row of padding is no document
        ([[0, 1, 2, 3], [0, 1, 2, 0]], [[1, 1, 1, 1], [1, 1, 1, 0]], False),
        ([[0, 1, 2, 3], [0, 1, 2, 3]], [[1, 1, 1, 1], [1, 0, 1, 1]], False),  # a hole ends no document
    ],
)
def test_a_row_is_packed_if_it_holds_several_documents(positions, padding, is_packed):
    positions = torch.tensor(positions)
    padding = None if padding is None else torch.tensor(padding)
    device = torch.device("cpu")
    mask = S2Mask(dict(batch_size=2, q_length=4, kv_length=4, attention_mask=padding, device=device))
    assert mask.is_packed(positions) is is_packed
