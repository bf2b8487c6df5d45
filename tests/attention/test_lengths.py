"""What a call says of its rows and cannot mean is refused before anything is computed."""

import pytest
import torch

from peft_longlora import configure_attention
from peft_longlora.attention.lengths import check_lengths
from peft_longlora.sequence.batch import shard_batch
from tests.helpers.tiny import IDS, make

WRONG = {
    "does not begin": ([5, 40, 96], None, r"cu_seq_lens_q=\[5, 40, 96\] must begin at 0"),
    "is empty": ([], None, "must begin at 0"),
    "falls": ([0, 60, 40, 96], None, "must not fall"),
    "ends early": ([0, 40, 90], None, "must end at 96, the number of tokens in 1 x 96"),
    "ends late": ([0, 40, 120], None, "must end at 96"),
    "k differs": ([0, 40, 96], [0, 50, 96], r"q=\[0, 40, 96\] and cu_seq_lens_k=\[0, 50, 96\] differ"),
    "k is wrong": ([0, 40, 96], [0, 40, 90], "cu_seq_lens_k=.* must end at 96"),
    "k is alone": (None, [0, 40, 96], "is given without cu_seq_lens_q"),
    "fractions": ([0.0, 40.0, 96.0], None, "must hold integers, not torch.float32"),
    "two dimensions": ([[0, 40, 96]], None, "must be a tensor of one dimension"),
}


@pytest.fixture(scope="module")
def model():
    model = make().train()
    configure_attention(model, group_size=8, backend="sdpa")
    return model


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("is_shared", [False, True], ids=["one rank", "ranks"])
def test_cumulative_lengths_that_no_batch_has_are_refused(case, is_shared, model):
    queries, keys, message = WRONG[case]
    given = {"cu_seq_lens_q": queries, "cu_seq_lens_k": keys}
    given = {
        name: torch.tensor(numbers, dtype=None if numbers else torch.int32)
        for name, numbers in given.items()
        if numbers is not None
    }
    with pytest.raises(ValueError, match=f"{message}.*DataCollatorWithFlattening"):
        if is_shared:
            shard_batch(dict(input_ids=IDS[:1], **given), 0, 2)
        else:
            model(input_ids=IDS[:1], **given)


def test_a_refused_call_leaves_the_next_one_alone(model):
    wanted = model(input_ids=IDS[:1]).logits
    with pytest.raises(ValueError, match="must end at"):
        model(input_ids=IDS[:1], cu_seq_lens_q=torch.tensor([0, 40]))
    assert torch.equal(model(input_ids=IDS[:1]).logits, wanted)


def test_a_document_in_two_rows_is_refused_and_an_empty_one_is_not():
    with pytest.raises(ValueError, match=r"must hold 4, where a row of 4 tokens begins"):
        check_lengths(torch.tensor([0, 3, 5, 8]), None, 2, 4)
    check_lengths(torch.tensor([0, 3, 3, 4, 8], dtype=torch.int32), None, 2, 4)


@pytest.mark.parametrize("shape", [(1, 90), (1, 110), (2, 96)], ids=str)
def test_a_padding_mask_of_another_shape_is_refused(shape, model):
    with pytest.raises(
        ValueError, match=r"attention_mask has shape .* given 1 rows of 96 tokens.*leave attention_mask"
    ):
        model(input_ids=IDS[:1], attention_mask=torch.ones(shape, dtype=torch.long))


# -- documents said in a way that nobody reads -------------------------------------------------------------------------

NUMBERS = torch.tensor([1] * 40 + [2] * 56)[None]  # as multipack collators number documents
RESTARTS = torch.cat([torch.arange(40), torch.arange(56)])[None]


@pytest.mark.parametrize("dtype", [torch.long, torch.int32, torch.float32])
def test_a_mask_that_numbers_documents_is_refused(dtype, model):
    """transformers takes 2 for a token, as 1 is; so would the groups, and documents would see each other."""
    with pytest.raises(ValueError, match=r"other than 0 and 1 \(up to 2\).*position_ids that restart"):
        model(input_ids=IDS[:1], attention_mask=NUMBERS.to(dtype))
    stock = make()
    ones = stock(input_ids=IDS[:1], attention_mask=torch.ones_like(NUMBERS)).logits
    assert torch.equal(stock(input_ids=IDS[:1], attention_mask=NUMBERS.to(dtype)).logits, ones)
    wanted = model(input_ids=IDS[:1], attention_mask=torch.ones_like(NUMBERS)).logits
    for mask in (torch.ones(1, 96), torch.ones(1, 96, dtype=torch.bool)):
        assert torch.equal(model(input_ids=IDS[:1], attention_mask=mask).logits, wanted)


def test_seq_idx_alone_is_refused(model):
    """Beside positions, as transformers' collator gives it, it changes nothing, and documents are apart."""
    with pytest.raises(ValueError, match=r"seq_idx is given without position_ids.*see each other"):
        model(input_ids=IDS[:1], seq_idx=(NUMBERS - 1).int())
    packed = model(input_ids=IDS[:1], seq_idx=(NUMBERS - 1).int(), position_ids=RESTARTS).logits
    alone = model(input_ids=IDS[:1, 40:]).logits
    torch.testing.assert_close(packed[:, 40:], alone, rtol=1e-4, atol=1e-4)


def test_positions_that_contradict_cumulative_lengths_are_refused(model):
    def call(ends, positions):
        return model(
            input_ids=IDS[:1], cu_seq_lens_q=torch.tensor(ends, dtype=torch.int32), position_ids=positions
        ).logits

    with pytest.raises(ValueError, match=r"begin a document at token 40, and cu_seq_lens_q=\[0, 30, 96\] does not"):
        call([0, 30, 96], RESTARTS)
    wanted = call([0, 40, 96], RESTARTS)
    # Positions that go on, and padding whose positions are 0, contradict nothing: RoPE is relative.
    torch.testing.assert_close(call([0, 40, 96], torch.arange(96)[None]), wanted, rtol=1e-3, atol=1e-3)
    padded = torch.where(torch.arange(96) < 90, RESTARTS, 0)
    torch.testing.assert_close(call([0, 40, 96], padded)[:, :90], wanted[:, :90], rtol=1e-4, atol=1e-4)


def test_after_a_refusal_and_in_evaluation_it_is_as_in_transformers(model):
    wanted = model(input_ids=IDS[:1]).logits
    with pytest.raises(ValueError, match="other than 0 and 1"):
        model(input_ids=IDS[:1], attention_mask=NUMBERS)
    assert torch.equal(model(input_ids=IDS[:1]).logits, wanted)
    model.eval()
    try:
        dense = model(input_ids=IDS[:1], attention_mask=NUMBERS).logits
        torch.testing.assert_close(dense, make()(input_ids=IDS[:1], attention_mask=NUMBERS).logits)
    finally:
        model.train()
