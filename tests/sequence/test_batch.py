"""A rank's stretch of a batch: the stretches put together are the batch."""

import pytest
import torch

from peft_longlora.data.records import IGNORED
from peft_longlora.sequence.batch import shard_batch
from tests.helpers.batches import KINDS, batch_of


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("kind", KINDS)
def test_stretches_put_together_are_the_batch(kind, ranks):
    batch = batch_of(kind)
    tokens = batch["input_ids"].numel()
    stretches = [shard_batch(batch, rank, ranks, pad_token_id=96) for rank in range(ranks)]
    assert {x.shape for stretch in stretches for x in stretch.values()} == {(1, -(-tokens // ranks))}
    whole = {name: torch.cat([s[name] for s in stretches], dim=1)[0] for name in stretches[0]}
    padding = {name: x[tokens:].unique().tolist() for name, x in whole.items() if len(x) > tokens}
    if padding:
        expected = dict(input_ids=[96], labels=[IGNORED], shift_labels=[IGNORED], attention_mask=[0], position_ids=[0])
        assert padding == expected
    assert torch.equal(whole["input_ids"][:tokens], batch["input_ids"].flatten())
    assert torch.equal(whole["labels"][:tokens], batch["labels"].flatten())
    rows = batch["labels"].shape[0]
    shifted = torch.cat([batch["labels"][:, 1:], torch.full((rows, 1), IGNORED)], dim=1)
    assert torch.equal(whole["shift_labels"][:tokens], shifted.flatten())
    positions = batch.get("position_ids", torch.arange(53).repeat(2) if tokens > 5 else torch.arange(5))
    assert torch.equal(whole["position_ids"][:tokens], positions.flatten())


def test_what_cannot_be_cut_is_refused():
    batch = {**batch_of("plain"), "pixel_values": torch.zeros(2, 3, 8, 8), "name": "x"}
    with pytest.raises(ValueError, match=r"\['pixel_values', 'name'\] of the batch cannot be cut"):
        shard_batch(batch, 0, 2)


def test_what_collators_say_of_documents_is_dropped():
    batch = {**batch_of("packed"), "cu_seq_lens_q": torch.tensor([0, 41, 46, 106]), "max_length_q": 60}
    assert set(shard_batch(batch, 0, 2)) == {"input_ids", "position_ids", "labels", "shift_labels", "attention_mask"}
