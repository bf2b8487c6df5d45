"""What layers learn of a call: where documents start, from positions or cumulative lengths; and that nothing is read
from the device where nothing was said."""

import pytest
import torch
from torch.overrides import TorchFunctionMode
from transformers import DataCollatorWithFlattening

from peft_longlora import configure_attention
from peft_longlora.architecture import find_attention_modules
from peft_longlora.attention.settings import settings_of
from peft_longlora.kernels.groups import positions_in_documents
from peft_longlora.sequence.batch import shard_batch
from tests.helpers.tiny import IDS, make

LENGTHS = (30, 41, 25)
ROW = IDS[:1]
ARCHITECTURES = ("llama", "gpt_neox", "persimmon")


def configured(name="llama", **changes):
    model = make(name, **changes).train()
    configure_attention(model, group_size=8, backend="sdpa")
    return model


@torch.no_grad()
def by_document(model) -> torch.Tensor:
    """Every document in a forward of its own."""
    return torch.cat([model(input_ids=part, use_cache=False).logits for part in ROW.split(LENGTHS, dim=1)], dim=1)


# -- cumulative lengths -----------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("with_positions", [False, True])
@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_documents_of_a_flattening_collator_do_not_see_each_other(name, use_cache, with_positions):
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_position_ids=with_positions)
    batch = collator([dict(input_ids=part[0].tolist()) for part in ROW.split(LENGTHS, dim=1)])
    assert ("position_ids" in batch) == with_positions and batch["cu_seq_lens_q"].tolist() == [0, 30, 71, 96]
    model = configured(name)
    wanted = by_document(model)
    batch.pop("labels")
    found = model(**batch, use_cache=use_cache).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    whole = model(input_ids=ROW, use_cache=use_cache).logits  # and the next call knows nothing of it
    assert (whole - wanted).abs().max() > 0.1


def test_positions_of_documents_over_two_rows():
    found = positions_in_documents(torch.tensor([0, 3, 5]), 2, 4)  # what comes after the last is one more
    assert found.tolist() == [[0, 1, 2, 0], [1, 0, 1, 2]]


def test_ranks_that_share_a_sequence_get_the_documents_too():
    ends = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32)
    stretches = [shard_batch(dict(input_ids=ROW, cu_seq_lens_q=ends), rank, 2) for rank in range(2)]
    positions = torch.cat([stretch["position_ids"] for stretch in stretches], dim=1)
    assert positions[0].tolist() == [i for length in LENGTHS for i in range(length)]


# -- positions -------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("called", ["by name", "in their place", "backbone alone", "by hand, backbone in its place"])
@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("use_cache", [False, True])
def test_positions_count_however_the_model_is_called(called, with_mask, use_cache):
    model = configured()
    wanted = by_document(model)
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    mask = torch.ones_like(ROW) if with_mask else None
    model(input_ids=ROW)  # a call without positions comes before
    if called == "by name":
        found = model(input_ids=ROW, attention_mask=mask, position_ids=positions, use_cache=use_cache).logits
    elif called == "in their place":
        found = model(ROW, mask, positions, use_cache=use_cache).logits
    elif called == "backbone alone":
        hidden = model.model(input_ids=ROW, attention_mask=mask, position_ids=positions, use_cache=use_cache)
        found = model.lm_head(hidden.last_hidden_state)
    else:
        found = model.lm_head(model.model(ROW, mask, positions, use_cache=use_cache).last_hidden_state)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_positions_in_their_place_are_found_in_a_class_that_is_made_later():
    """FSDP2 gives each module that it shards a class of its own, below the module's, when the adapter is there."""
    model = configured()
    wanted = by_document(model)
    model.model.__class__ = type(f"FSDP{type(model.model).__name__}", (type(model.model),), {})
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    found = model.lm_head(model.model(ROW, None, positions).last_hidden_state)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_positions_in_their_place_are_found_in_a_class_with_another_forward(monkeypatch):
    """Liger's functions for a model type give its classes another forward, for models that are there too."""
    model = configured()
    wanted, kind = by_document(model), type(model.model)
    forward = kind.forward

    def another(self, input_ids=None, attention_mask=None, position_ids=None, **more):
        return forward(self, input_ids, attention_mask, position_ids, **more)

    monkeypatch.setattr(kind, "forward", another)
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    found = model.lm_head(model.model(ROW, None, positions).last_hidden_state)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_a_call_that_failed_leaves_nothing_behind():
    model = configured()
    wanted = by_document(model)
    with pytest.raises(RuntimeError):
        model(input_ids=ROW, position_ids=torch.zeros(3, 5, 7, 9), use_cache=False)
    assert settings_of(find_attention_modules(model).popitem()[1]).inputs.caller is None
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    with torch.no_grad():
        found = model(input_ids=ROW, position_ids=positions, use_cache=True).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


# -- synchronisation -------------------------------------------------------------------------------------------------


class Reads(TorchFunctionMode):
    """Counts what has to wait for a device: reading a number, or copying to the CPU."""

    NAMES = ("cpu", "item", "tolist", "numpy", "nonzero", "__bool__", "__int__", "__index__", "__float__")

    def __init__(self):
        self.found = []
        super().__init__()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in self.NAMES or (name == "to" and "cpu" in str(args[1:])):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def reads(model, **inputs) -> int:
    with Reads() as counter:
        model(input_ids=IDS, **inputs).logits.sum().backward()
    return len(counter.found)


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "mistral", "olmo2"])
def test_plain_rows_are_grouped_without_a_look_at_the_device(name):
    changes = dict(sliding_window=None) if name == "mistral" else {}
    stock, model = make(name, **changes).train(), configured(name, **changes)
    for use_cache in (True, False):  # without a cache transformers looks itself whether positions restart
        assert reads(model, use_cache=use_cache) == reads(stock, use_cache=use_cache)
    plain = reads(stock, use_cache=True)
    assert plain == 0 or name == "olmo2"  # transformers 5.17 moves its frequencies to where they are
    assert reads(model, attention_mask=torch.ones_like(IDS)) > plain
    assert reads(model, position_ids=torch.arange(96)[None]) > plain


@pytest.mark.parametrize("kind", ["sliding layers", "a dense layer"])
def test_packed_rows_are_looked_at_once_a_forward(kind):
    """Where layers of two kinds must know the documents, no more is read than where there is one kind.

    Layers with a window read twice more in a forward, however many there are: what the rule is, and its documents.
    """
    packed = dict(position_ids=torch.cat([torch.arange(length) for length in LENGTHS])[None], use_cache=True)

    def extra(name, dense_layers=None, **changes):
        found = []
        for is_ours in (True, False):
            model = make(name, **changes).train()
            if is_ours:
                configure_attention(model, group_size=8, backend="sdpa", dense_layers=dense_layers)
            with Reads() as counter:
                model(input_ids=IDS, **packed).logits.sum().backward()
            found.append(
                sum(read != "to" for read in counter.found)
            )  # to the device of the layer, which is the CPU here
        return found[0] - found[1]

    once = extra("llama")
    assert once > 0
    if kind == "sliding layers":
        few, many = (extra("gemma3_text", head_dim=8, sliding_window=16, num_hidden_layers=n) for n in (6, 12))
        assert few == many <= 3 * once
    else:
        assert extra("llama", dense_layers=[0]) == once
