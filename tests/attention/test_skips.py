"""Positions that skip: a sparse training forward is its groups alone with these positions; no other forward skips."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from torch.distributed.device_mesh import init_device_mesh
from transformers import Trainer, TrainingArguments, default_data_collator

from peft_longlora import LongLoraConfig, configure_attention, scale_rope, use_attention
from peft_longlora.architecture import find_rotary_modules
from peft_longlora.attention.mask import S2Mask
from peft_longlora.attention.settings import settings_on
from peft_longlora.attention.skips import draw
from peft_longlora.sequence import parallelize_sequence, shard_batch
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import extend, logits, make, snapshot

GENERATOR = torch.Generator().manual_seed(5)
ROWS = [torch.randint(3, 97, (1, 96), generator=GENERATOR) for _ in range(8)]
TWO = torch.cat(ROWS[:2])
WINDOW, GROUP = 128, 16


def adapted(base=None, **fields):
    """With an adapter that changes what the base computes, and positions that skip."""
    settings = dict(attention_pattern="local", group_size=GROUP, skip_positions=True, init_lora_weights=False)
    return extend(make() if base is None else base, **{**settings, **fields}).train()


def configured(base, **settings):
    configure_attention(base, **{"pattern": "local", "group_size": GROUP, "skip_positions": True, **settings})
    return base.train()


class Heard:
    """The positions that RoPE was given in each call, behind the hooks that are there."""

    def __init__(self, model):
        self.found = []
        for module in find_rotary_modules(model):
            module.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module, args, kwargs):
        self.found.append(kwargs.get("position_ids", args[-1]).clone())


def step(model, ids, **inputs):
    """Loss and gradients of one forward and backward."""
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids, use_cache=False, **inputs).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found, expected):
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=2e-3, atol=1e-4 * gradient.abs().max().item())


def cut(tokens: list[int]) -> list[list[int]]:
    """A document's tokens in groups."""
    return [tokens[start : start + GROUP] for start in range(0, len(tokens), GROUP)]


# -- a sparse forward ------------------------------------------------------------------------------------------------

MASK = torch.ones(2, 96, dtype=torch.long)
RIGHT, LEFT, HOLE = MASK.clone(), MASK.clone(), MASK.clone()
RIGHT[1, 70:], LEFT[0, :21], HOLE[1, 30:37] = 0, 0, 0
PACKED = torch.cat([torch.arange(50), torch.arange(46)])[None]
ENDS = torch.tensor([0, 40, 96, 130, 192], dtype=torch.int32)
ALL = list(range(96))
CASES = {  # arguments, and the documents of each row
    "whole rows": ({}, [[ALL], [ALL]]),
    "padding on the right": (dict(attention_mask=RIGHT), [[ALL], [ALL[:70]]]),
    "padding on the left": (dict(attention_mask=LEFT), [[ALL[21:]], [ALL]]),
    "padding inside": (dict(attention_mask=HOLE), [[ALL], [ALL[:30] + ALL[37:]]]),
    "packed by positions": (dict(position_ids=PACKED), [[ALL[:50], ALL[50:]]] * 2),
    "packed and padded": (
        dict(position_ids=PACKED, attention_mask=RIGHT),
        [[ALL[:50], ALL[50:]], [ALL[:50], ALL[50:70]]],
    ),
    "packed by lengths": (
        dict(cu_seq_lens_q=ENDS, cu_seq_lens_k=ENDS, max_length_q=62, max_length_k=62),
        [[ALL[:40], ALL[40:]], [ALL[:34], ALL[34:]]],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_sparse_forward_is_its_groups_alone(case):
    inputs, documents = CASES[case]
    base = make()
    scale_rope(base, WINDOW)
    model = configured(copy.deepcopy(base))
    heard = Heard(model)
    for _ in range(2):
        found = model(input_ids=TWO, use_cache=False, **inputs).logits
        positions = heard.found[-1]
        assert positions.shape == TWO.shape
        seen = set()
        for row, group in [(number, group) for number in (0, 1) for one in documents[number] for group in cut(one)]:
            where = positions[row, group]
            steps = where.diff()
            assert where[0] < WINDOW - GROUP + 1 and where[-1] < WINDOW and (steps >= 1).all()
            assert (steps > 1).sum() + (where[0] > 0) <= 1  # it skips once, maybe at its first token
            seen.add(tuple(where.tolist()))
            # Without a mask transformers would take a skip for a new document.
            alone = base(input_ids=TWO[row, group][None], position_ids=where[None], attention_mask=MASK[:1, group])
            torch.testing.assert_close(found[row, group], alone.logits[0], rtol=1e-4, atol=1e-4)
        assert len(seen) > 6  # groups draw by themselves
    assert not torch.equal(*heard.found)  # and forwards


def test_what_is_drawn():
    """All skips and all places, about as often each; others in each forward, row and group."""
    group, window, ids = 4, 16, torch.ones(2, 12, dtype=torch.long)
    positions = torch.stack([draw(ids, group, window, number)[0] for number in range(4000)])
    groups = positions.view(-1, group)
    skips = groups[:, -1] - group + 1
    places = (groups - torch.arange(group) > 0).sum(1)  # tokens behind the skip
    assert groups.min() == 0 and groups.max() == window - 1
    counts = skips.bincount(minlength=window - group + 1)
    assert len(counts) == 13 and counts.min() > 0.9 * len(groups) / 13 and counts.max() < 1.1 * len(groups) / 13
    counts = places[skips > 0].bincount(minlength=group + 1)
    assert counts[0] == 0 and counts[1:].min() > 0.95 * counts.sum() / 4 and counts[1:].max() < 1.05 * counts.sum() / 4
    apart = groups.view(4000, 6, group)
    alike = [(apart[:, a] == apart[:, b]).all(1).float().mean() for a in range(6) for b in range(a)]
    alike += [(apart[1:] == apart[:-1]).all(2).float().mean()]
    assert max(alike) < 0.08  # one pair in 24 is, by chance


def test_nothing_waits_for_the_device():
    """Tensors of the meta device have no numbers to read."""
    arguments = dict(batch_size=2, q_length=96, kv_length=96, device=torch.device("meta"))
    mask = S2Mask({**arguments, "attention_mask": RIGHT.to("meta")})
    found = draw(mask.segment_ids(PACKED.to("meta")), GROUP, WINDOW, 3)
    assert [(x.shape, x.is_meta) for x in found] == [((2, 96), True)] * 2


def test_positions_of_several_axes_move_together():
    """Qwen2.5-VL, on rows where an image's tokens share a time: each group alone in the same model."""
    from tests.whole.test_many_axes import make as make_axes

    base = make_axes("qwen2_5_vl", "sdpa").eval()
    text = base.model.language_model
    ids = ROWS[0][:, :48]
    time = torch.cat([torch.arange(10), torch.full((12,), 10), torch.arange(14, 40)])
    height, width = time.clone(), time.clone()
    height[10:22] += torch.arange(12) // 4
    width[10:22] += torch.arange(12) % 4
    own = torch.stack([time, height, width])[:, None]
    model = copy.deepcopy(base)
    configured(model)
    heard = Heard(model)
    found = model.model.language_model(input_ids=ids, position_ids=own, use_cache=False).last_hidden_state
    moved = heard.found[0] - own
    assert (moved == moved[:1]).all() and (moved[..., GROUP:] < moved[..., :1]).any() and moved.max() > 0
    for group in cut(list(range(48))):
        alone = text(input_ids=ids[:, group], position_ids=heard.found[0][..., group], use_cache=False)
        torch.testing.assert_close(found[:, group], alone.last_hidden_state, rtol=1e-4, atol=1e-4)


def test_a_rope_that_learns_skips_too():
    model, yarn = adapted(rope_type="learned"), adapted()
    for ids in ROWS[:2]:
        found, expected = step(model, ids), step(yarn, ids)
        assert found[1].pop("base_model.model.model.rotary_emb.modules_to_save.default.stretch").abs().max() > 0
        assert_same(found, expected)


# -- other forwards --------------------------------------------------------------------------------------------------


def test_dense_forwards_are_plain_and_the_others_skip():
    model, plain = adapted(dense_every=3), adapted(skip_positions=False)
    for number, ids in enumerate(ROWS[:6], 1):
        found = step(model, ids)
        with use_attention(plain, "dense"):
            dense = step(plain, ids)
        if number % 3 == 0:
            assert_same(found, dense)
        else:
            assert all((found[0] - loss).abs() > 1e-3 for loss in (dense[0], step(plain, ids)[0]))


def test_nothing_else_skips():
    model, plain = adapted(), adapted(skip_positions=False)
    step(model, ROWS[0])
    heard, ids = Heard(model), ROWS[1]
    with torch.no_grad():  # as the reference logits of online RL
        assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)
    with use_attention(model, "dense"), use_attention(plain, "dense"):
        assert_same(step(model, ids), step(plain, ids))
    with model.disable_adapter(), plain.disable_adapter():
        assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)
    model.eval(), plain.eval()
    assert torch.equal(logits(model, ids), logits(plain, ids))
    with use_attention(model, "sparse"), use_attention(plain, "sparse"):
        assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)
    sampled = [one.generate(ids[:, :20], max_new_tokens=5, do_sample=False) for one in (model, plain)]
    assert torch.equal(*sampled)
    merged = copy.deepcopy(model).merge_and_unload().train()
    assert_same(step(merged, ids), step(copy.deepcopy(plain).merge_and_unload().train(), ids))
    assert all((x.diff() == 1).all() for x in heard.found)
    heard.found.clear()
    step(model.train(), ids)
    assert not (heard.found[0].diff() == 1).all()


def test_a_base_gets_its_rotary_modules_back():
    base = make()
    before = snapshot(base)
    model = adapted(base)
    step(model, ROWS[0])
    after = snapshot(model.unload().eval())
    assert after["hooks"] == before["hooks"] and torch.equal(after["logits"], before["logits"])


# -- again -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_recomputed_forward_skips_as_it_did(reentrant):
    model, plain = adapted(dense_every=3), adapted(dense_every=3)
    for one in (model, plain):
        one.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    for ids in ROWS[:3]:
        assert_same(step(model, ids), step(plain, ids))
    losses = [model(input_ids=ids, labels=ids, use_cache=False).loss for ids in ROWS[3:6]]
    expected = [step(plain, ids) for ids in ROWS[3:6]]
    for loss, truth in zip(losses, expected, strict=True):
        model.zero_grad()
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        assert_same((loss.detach(), gradients), truth)


def test_a_copied_model_draws_by_itself():
    model = adapted()
    step(model, ROWS[0])
    copied = copy.deepcopy(model)
    assert_same(step(copied, ROWS[1]), step(model, ROWS[1]))
    assert settings_on(copied.get_base_model()) is not settings_on(model.get_base_model())
    step(model, ROWS[2])
    assert settings_on(copied.get_base_model()).training_forwards == 2


def train(folder, model, resume=None):
    rows = [row[0].tolist() for row in ROWS]
    args = TrainingArguments(
        output_dir=str(folder), max_steps=6, save_steps=4, save_strategy="steps", per_device_train_batch_size=1,
        gradient_accumulation_steps=2, eval_strategy="steps", eval_steps=1, logging_steps=1, learning_rate=0.01,
        report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    data = Dataset.from_dict({"input_ids": rows, "labels": rows})
    trainer = Trainer(
        model, args, train_dataset=data, eval_dataset=data.select([0]), data_collator=default_data_collator
    )
    trainer.train(resume_from_checkpoint=resume)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_a_resumed_run_has_the_losses_of_an_uninterrupted_one(tmp_path):
    whole = train(tmp_path / "whole", adapted())
    torch.manual_seed(1234)  # another process may have another seed
    model = adapted()
    rest = train(tmp_path / "rest", model, resume=str(tmp_path / "whole" / "checkpoint-4"))
    assert rest == whole
    assert settings_on(model.get_base_model()).training_forwards == 12
    assert train(tmp_path / "plain", adapted(skip_positions=False)) != whole


def test_a_saved_adapter_goes_on(tmp_path):
    model = adapted()
    for ids in ROWS[:3]:
        step(model, ids)
    model.save_pretrained(tmp_path)
    assert LongLoraConfig.from_pretrained(tmp_path).skip_positions is True
    again = PeftModel.from_pretrained(make(), tmp_path, is_trainable=True).train()
    for ids in ROWS[3:]:
        assert torch.equal(step(model, ids)[0], step(again, ids)[0])
    assert torch.equal(logits(model.eval(), TWO), logits(again.eval(), TWO))


@pytest.mark.slow
def test_a_compiled_model_skips_as_one_that_is_not():
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    model, plain = configured(make()), configured(make())
    counter, frames = CompileCounterWithBackend("eager"), []
    model.compile(backend=counter)
    for ids in ROWS:
        assert_same(step(model, ids), step(plain, ids))
        frames.append(counter.frame_count)
    assert frames[0] and frames[-1] == frames[1]  # nothing is compiled again for another number


# -- shared sequences ------------------------------------------------------------------------------------------------


def shared(rows: int, padding: int) -> list[tuple[float, float]]:
    """Differences of loss and gradients to one process, forward by forward."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    model, plain = adapted(dense_every=3), adapted(dense_every=3)
    parallelize_sequence(model, mesh)
    torch.manual_seed(mesh.get_local_rank())
    found, mask = [], MASK[:rows].clone()
    mask[0, : 2 * padding], mask[-1, 96 - padding :] = 0, 0
    documents = torch.cat([torch.arange(44), torch.arange(52)])[None]
    for ids in ROWS[:4]:
        ids = torch.cat([ids, ids.flip(1)])[:rows]
        batch = dict(input_ids=ids, position_ids=documents, attention_mask=mask, labels=ids.where(mask > 0, -100))
        labels = (batch["labels"][:, 1:] >= 0).sum()
        plain.zero_grad()
        whole = plain(**batch, num_items_in_batch=labels, use_cache=False).loss
        whole.backward()
        model.zero_grad()
        mine = shard_batch(batch, mesh.get_local_rank(), mesh.size())
        part = model(**mine, num_items_in_batch=labels, use_cache=False).loss
        part.backward()
        total = part.detach().clone()
        torch.distributed.all_reduce(total)
        errors = []
        for one, other in zip(model.parameters(), plain.parameters(), strict=True):
            if other.grad is not None:
                torch.distributed.all_reduce(one.grad)
                errors.append(((one.grad - other.grad).abs().max() / other.grad.abs().max().clamp(min=1e-6)).item())
        found.append((abs(total - whole).item(), max(errors)))
    return found


@pytest.mark.parametrize(("ranks", "rows", "padding"), [(2, 1, 0), (3, 2, 5)])
def test_ranks_that_share_a_sequence_draw_as_one_process(ranks, rows, padding):
    """Groups lie on two ranks: stretches of 48 and 64 tokens, and each row's second document begins at its token 44."""
    for found in run_ranks(ranks, shared, rows, padding):
        assert all(loss < 1e-5 and gradient < 5e-5 for loss, gradient in found), found


# -- what is refused -------------------------------------------------------------------------------------------------

SLIDING = dict(head_dim=8, sliding_window=16, num_hidden_layers=2)
REFUSED = {
    "s2": ((), dict(pattern="s2"), ValueError, "skip_positions=True goes with pattern='local' alone, not with 's2'"),
    "full": ((), dict(pattern="full", group_size=None), ValueError, "not with 'full'"),
    "window": ((), dict(pattern="window"), ValueError, "not with 'window'"),
    "dense layers": ((), dict(dense_layers=[0]), ValueError, r"dense_layers=\[0\] exclude each other.*dense_every"),
    "no room": ((), dict(group_size=64), ValueError, r"group_size=64 tokens is as long as the window \(64 tokens\)"),
    "no switch": ((), dict(skip_positions=2), ValueError, "skip_positions=2 must be True or False"),
    "a text": ((), dict(skip_positions="no"), ValueError, "skip_positions='no' must be True or False"),
    "layers with windows": (("gemma3_text", SLIDING), {}, NotImplementedError, "gemma3_text has layers with a window"),
    "a window": (("mistral", dict(sliding_window=32)), {}, NotImplementedError, "sliding_window=None"),
    "a count": (
        ("ministral3", dict(head_dim=16)),
        {},
        NotImplementedError,
        "scales its queries by their place in the row",
    ),
    "dynamic": (
        ("llama", dict(rope_parameters=dict(rope_type="dynamic", factor=4.0, rope_theta=1e4))),
        {},
        NotImplementedError,
        "rope_type 'dynamic' and 'longrope' take their frequencies",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_skip_is_refused_and_left_as_it_is(case):
    given, settings, error, message = REFUSED[case]
    model = make(given[0], **given[1]) if given else make()
    with pytest.raises(error, match=message):
        configured(model, **settings)
    assert settings_on(model) is None


def test_a_config_refuses_what_the_model_would():
    for fields, message in (
        (dict(), "skip_positions=True goes with attention_pattern='local' alone, not with 's2'"),
        (dict(attention_pattern="local", dense_layers=[1]), "exclude each other"),
    ):
        with pytest.raises(ValueError, match=message):
            LongLoraConfig(skip_positions=True, **fields)
    with pytest.raises(ValueError, match="skip_positions='false' must be True or False"):
        LongLoraConfig(skip_positions="false", attention_pattern="local")
    with pytest.raises(NotImplementedError, match="'dynamic' and 'longrope'"):
        adapted(rope_type="dynamic")
    model = adapted()
    for other in (dict(skip_positions=False), dict(skip_positions=True, dense_every=2)):
        with pytest.raises(ValueError, match="want different attention"):
            fields = dict(r=4, context_length=WINDOW, group_size=GROUP, attention_pattern="local")
            model.add_adapter("second", LongLoraConfig(**fields, **other))
    with pytest.raises(ValueError, match=r"skip_positions=False, but this model's LongLoRA adapter has.*=True"):
        configure_attention(model.get_base_model(), skip_positions=False)
    assert configure_attention(model.get_base_model(), backend="sdpa").schedule.skip_positions


def test_masks_and_scalings_that_come_later_are_refused():
    model = configured(make())
    with pytest.raises(ValueError, match="attention_mask is Tensor of shape"):
        model(input_ids=ROWS[0], attention_mask=torch.ones(1, 1, 96, 96).tril(), use_cache=False)
    scale_rope(model, WINDOW, rope_type="dynamic")
    with pytest.raises(NotImplementedError, match="'dynamic' and 'longrope'"):
        model(input_ids=ROWS[0], use_cache=False)


@pytest.mark.parametrize("is_compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_layer_that_would_see_positions_go_back_is_refused(is_compiled):
    """Whoever freezes a layer may put it into evaluation mode, in which it attends densely."""
    model, plain = adapted(dense_every=2), adapted(dense_every=2)
    layer = model.get_base_model().model.layers[1]
    if is_compiled:
        torch._dynamo.reset()
        model.compile(backend="eager")
    layer.eval()
    with pytest.raises(ValueError, match=r"layer_idx=1, in evaluation mode\) attends densely.*requires_grad_\(False\)"):
        step(model, ROWS[0])
    layer.train()
    for ids in ROWS[1:3]:  # what was refused does not count
        assert_same(step(model, ids), step(plain, ids))
