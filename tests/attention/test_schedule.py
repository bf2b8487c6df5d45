"""`dense_every`: a model with it trains as one whose forwards are switched by hand, and goes on where it stopped."""

import copy
import gc
import pickle

import pytest
import torch
import transformers
from datasets import Dataset
from packaging.version import Version
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, TrainingArguments, default_data_collator

from peft_longlora import LongLoraConfig, configure_attention, export_lora, use_attention
from peft_longlora.adapter.count import without_count
from peft_longlora.adapter.model import LongLoraModel
from peft_longlora.architecture import find_attention_modules
from peft_longlora.attention.settings import settings_of, settings_on
from peft_longlora.sequence import parallelize_sequence, shard_batch
from tests.helpers.plain_kernel import PlainKernel, install
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import extend, make

GENERATOR = torch.Generator().manual_seed(5)
ROWS = [torch.randint(3, 97, (1, 96), generator=GENERATOR) for _ in range(8)]
PACKED = torch.cat([torch.arange(50), torch.arange(46)])[None]
EVERY = 3


def step(model, ids, **inputs):
    """Loss and gradients of one forward and backward."""
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids, use_cache=False, **inputs).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def by_hand(model, number: int, ids, **inputs):
    with use_attention(model, "dense" if number % EVERY == 0 else "auto"):
        return step(model, ids, **inputs)


def assert_same(found, expected):
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=2e-3, atol=1e-4 * gradient.abs().max().item())


def of_kind(kind: str):
    """A model with the schedule, and the same without it."""
    if kind == "adapter":
        settings = dict(group_size=16, init_lora_weights=False)
        return extend(make(), dense_every=EVERY, **settings).train(), extend(make(), **settings).train()
    models = make(), make()
    for model, every in zip(models, (EVERY, None), strict=True):
        configure_attention(model, group_size=16, dense_every=every)
        model.train()
    return models


# -- which forwards are dense ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["adapter", "whole model"])
def test_losses_and_gradients_are_those_of_forwards_switched_by_hand(kind, packed):
    model, plain = of_kind(kind)
    inputs = dict(position_ids=PACKED) if packed else {}
    for number, ids in enumerate(ROWS, 1):
        expected = by_hand(plain, number, ids, **inputs)
        assert_same(step(model, ids, **inputs), expected)
        if number % EVERY == 0:
            assert abs(step(plain, ids, **inputs)[0] - expected[0]) > 1e-3


def test_a_layer_with_a_window_of_its_own_keeps_it():
    model = make("gemma3_text", head_dim=8, sliding_window=16, num_hidden_layers=6)
    plain = copy.deepcopy(model)
    configure_attention(model, group_size=16, dense_every=1)
    assert_same(step(model.train(), ROWS[0]), step(plain.train(), ROWS[0]))


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_recomputed_forward_runs_as_it_ran(reentrant):
    """Also when others were made meanwhile: each of three losses has its own kind of forward."""
    model, plain = of_kind("adapter")
    for one in (model, plain):
        one.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    for number, ids in enumerate(ROWS[:4], 1):
        assert_same(step(model, ids), by_hand(plain, number, ids))
    expected = [by_hand(plain, number, ids) for number, ids in enumerate(ROWS[4:], 5)]
    losses = [model(input_ids=ids, labels=ids, use_cache=False).loss for ids in ROWS[4:]]
    for loss, truth in zip(losses, expected, strict=True):
        model.zero_grad()
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        assert_same((loss.detach(), gradients), truth)


def test_evaluation_and_sampling_are_not_counted():
    model, plain = of_kind("adapter")
    for number, ids in enumerate(ROWS, 1):
        assert_same(step(model, ids), by_hand(plain, number, ids))
        model.eval()(input_ids=ids, labels=ids).loss.backward()
        model.train()
        later = ids.flip(1)
        with torch.no_grad():  # as the reference logits of online RL
            torch.testing.assert_close(model(input_ids=later).logits, plain(input_ids=later).logits)
        model.generate(ids[:, :8], max_new_tokens=2)
    assert settings_of(next(iter(find_attention_modules(model).values()))).training_forwards == len(ROWS)


@pytest.mark.parametrize("fields", [dict(dense_every=3), dict(skip_positions=True, attention_pattern="local")], ids=str)
def test_replicas_that_run_at_once_are_refused(fields):
    """nn.DataParallel's own copies, which share the settings of the model they are copied from."""
    model, plain = (extend(make(), group_size=16, **given).train() for given in (fields, {}))
    replica, other = (one.get_base_model()._replicate_for_data_parallel() for one in (model, plain))
    with pytest.raises(ValueError, match=r"nn\.DataParallel.* accelerate launch or torchrun, or give it one GPU"):
        replica(input_ids=ROWS[0])
    assert torch.equal(replica.eval()(input_ids=ROWS[0]).logits, other.eval()(input_ids=ROWS[0]).logits)
    step(model.train(), ROWS[0])
    assert settings_on(model.get_base_model()).training_forwards == 1


def test_a_backbone_called_by_itself_is_counted_once():
    model, plain = of_kind("whole model")
    found = [one.model(input_ids=ROWS[0]).last_hidden_state for one in [model] * 6 + [plain]]
    with use_attention(plain, "dense"):
        dense = plain.model(input_ids=ROWS[0]).last_hidden_state
    assert [torch.allclose(x, dense, atol=1e-5) for x in found] == [False, False, True, False, False, True, False]


class Interrupt:
    """A hook that ends a forward once, in the layer that has it."""

    def __init__(self, error):
        self.error = error

    def __call__(self, *_):
        if self.error is not None:
            error, self.error = self.error, None
            raise error


@pytest.mark.parametrize("kind", ["adapter", "whole model"])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), KeyboardInterrupt()], ids=repr)
def test_a_forward_that_does_not_return_is_not_counted(kind, error):
    """As a loop that skips a batch which does not fit, or a notebook whose cell is stopped and run again."""
    model, plain = of_kind(kind)
    for number, ids in enumerate(ROWS, 1):
        for _ in range(2):
            handle = list(find_attention_modules(model).values())[-1].register_forward_hook(Interrupt(error))
            with pytest.raises(type(error)):
                model(input_ids=ROWS[0], labels=ROWS[0], use_cache=False)
            handle.remove()
        assert_same(step(model, ids), by_hand(plain, number, ids))
    assert settings_of(next(iter(find_attention_modules(model).values()))).training_forwards == len(ROWS)


@pytest.mark.parametrize(
    "wrong",
    [
        dict(attention_mask=torch.ones(1, 1, 96, 96).tril()),  # in the first layer that is sparse
        dict(attention_mask=torch.tensor([[1] * 50 + [2] * 46])),  # before the model
        dict(labels=ROWS[0][:, :5]),  # in the loss
    ],
    ids=["a mask", "numbers of documents", "labels"],
)
def test_a_refused_forward_is_not_counted(wrong):
    model, plain = of_kind("adapter")
    for number, ids in enumerate(ROWS[:4], 1):
        for _ in range(2):
            with pytest.raises(ValueError):
                model(**{"input_ids": ROWS[0], "labels": ROWS[0], "use_cache": False, **wrong})
        assert_same(step(model, ids), by_hand(plain, number, ids))


def test_a_second_adapter_keeps_the_count():
    model, _ = of_kind("adapter")
    for ids in ROWS[:2]:
        step(model, ids)
    model.add_adapter("second", LongLoraConfig(r=4, context_length=128, group_size=16, dense_every=EVERY))
    model.set_adapter("second")
    with use_attention(model, "dense"):
        dense = model(input_ids=ROWS[2]).logits
    settings = settings_of(next(iter(find_attention_modules(model).values())))
    assert settings.training_forwards == 3
    settings.training_forwards = 2
    torch.testing.assert_close(model(input_ids=ROWS[2]).logits, dense)


def test_an_adapter_that_is_only_used_leaves_the_count(tmp_path):
    """A reference beside the trained one, and the initial adapter that PEFT loads when it converts at a save."""
    model, _ = of_kind("adapter")
    model.save_pretrained(tmp_path / "initial")
    for ids in ROWS[:4]:
        step(model, ids)

    def count() -> int:
        return settings_on(model.get_base_model()).training_forwards

    model.load_adapter(tmp_path / "initial", "reference")
    assert count() == 4
    model.delete_adapter("reference")
    config = model.peft_config["default"]
    config.init_lora_weights = True  # what PEFT asks of it, and what it was made with changes no base
    model.save_pretrained(tmp_path / "last", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    assert count() == 4
    model.load_adapter(tmp_path / "initial", "second", is_trainable=True)
    assert count() == 0
    tensors = load_file(tmp_path / "last" / "adapter_model.safetensors")
    assert tensors["base_model.model.s2_training_forwards"].tolist() == [4]


@pytest.mark.parametrize("value", [-1, 2.0, True, "3"])
def test_what_is_no_number_of_forwards_is_refused(value):
    for make_one in (lambda: LongLoraConfig(dense_every=value), lambda: configure_attention(make(), dense_every=value)):
        with pytest.raises(ValueError, match="must be a whole number n"):
            make_one()


@pytest.mark.parametrize("none", [None, 0])
def test_no_schedule(none):
    model = extend(make(), dense_every=none).train()
    plain = extend(make()).train()
    for ids in ROWS[:3]:
        assert torch.equal(step(model, ids)[0], step(plain, ids)[0])
    assert not [name for name in saved_names(model) if "forwards" in name]


def saved_names(model) -> list[str]:
    return list(LongLoraModel._get_adapter_state_dict(
        model=model, config=model.peft_config["default"], adapter_name="default", state_dict=model.state_dict(),
        unwanted_adapter_names=[],
    ))  # fmt: skip


# -- compiled --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_compiled_model_has_two_graphs(monkeypatch):
    from torch._dynamo.testing import CompileCounterWithBackend

    install(monkeypatch, PlainKernel(True, True))
    torch._dynamo.reset()
    model, plain = make(), make()
    configure_attention(model, group_size=16, dense_every=EVERY, backend="plain")
    configure_attention(plain, group_size=16, backend="plain")
    counter = CompileCounterWithBackend("eager")
    model.train().compile(backend=counter)
    frames = []
    for number, ids in enumerate([*ROWS, *ROWS], 1):
        assert_same(step(model, ids), by_hand(plain.train(), number, ids))
        frames.append(counter.frame_count)
    assert frames[-1] == frames[5], frames  # nothing is compiled again once both kinds were seen twice


# -- checkpoints -----------------------------------------------------------------------------------------------------


def train(folder, model, resume=None):
    data = Dataset.from_dict(
        {"input_ids": [row[0].tolist() for row in ROWS], "labels": [row[0].tolist() for row in ROWS]}
    )
    args = TrainingArguments(
        output_dir=str(folder), max_steps=6, save_steps=4, save_strategy="steps", per_device_train_batch_size=1,
        gradient_accumulation_steps=2, eval_strategy="steps", eval_steps=1, logging_steps=1, learning_rate=0.01,
        report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(
        model, args, train_dataset=data, eval_dataset=data.select([0]), data_collator=default_data_collator
    )
    trainer.train(resume_from_checkpoint=resume)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_a_resumed_adapter_has_the_losses_of_an_uninterrupted_one(tmp_path):
    whole = train(tmp_path / "whole", of_kind("adapter")[0])
    checkpoint = tmp_path / "whole" / "checkpoint-4"
    rest = train(tmp_path / "rest", of_kind("adapter")[0], resume=str(checkpoint))
    assert rest == whole
    tensors = load_file(checkpoint / "adapter_model.safetensors")
    assert tensors["base_model.model.s2_training_forwards"].tolist() == [8]
    save_file(without_count(tensors), checkpoint / "adapter_model.safetensors")
    anew = train(tmp_path / "anew", of_kind("adapter")[0], resume=str(checkpoint))
    assert anew[:4] == whole[:4] and anew[4:] != whole[4:]


def test_a_resumed_whole_model_has_the_losses_of_an_uninterrupted_one(tmp_path):
    """The user says how many forwards there were, in one line."""
    whole = train(tmp_path / "whole", of_kind("whole model")[0])
    model = make()
    settings = configure_attention(model, group_size=16, dense_every=EVERY)
    settings.training_forwards = 4 * 2  # trainer_state.global_step * gradient_accumulation_steps
    rest = train(tmp_path / "rest", model.train(), resume=str(tmp_path / "whole" / "checkpoint-4"))
    assert rest == whole


def test_the_count_comes_with_the_adapter_and_stays_out_of_exports(tmp_path):
    model, _ = of_kind("adapter")
    for ids in ROWS[:5]:
        step(model, ids)
    model.save_pretrained(tmp_path / "saved")
    again = PeftModel.from_pretrained(make(), tmp_path / "saved", is_trainable=True).train()
    for ids in ROWS[5:]:
        assert torch.equal(step(model, ids)[0], step(again, ids)[0])
    export_lora(model, tmp_path / "exported", fold_into=tmp_path / "base")
    assert all(
        "lora_" in name and "forwards" not in name
        for name in load_file(tmp_path / "exported/adapter_model.safetensors")
    )


def test_transformers_own_loader_goes_on_from_the_count(tmp_path):
    reads_all = Version(transformers.__version__) >= Version("5.18")  # before, it reads no embeddings and norms
    trained = dict(train_embeddings=reads_all, train_norms=reads_all, init_lora_weights=False)
    model = extend(make(), dense_every=EVERY, group_size=16, **trained).train()
    for ids in ROWS[:5]:
        step(model, ids)
    model.save_pretrained(tmp_path)
    base = make()
    base.load_adapter(str(tmp_path), is_trainable=True)
    base.train()
    pickle.dumps(base), copy.deepcopy(base)
    for ids in ROWS[5:]:
        assert torch.equal(step(base, ids)[0], step(model, ids)[0])


def test_the_count_of_an_older_file_is_read_under_its_name(tmp_path):
    model, _ = of_kind("adapter")
    step(model, ROWS[0])
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors["base_model.model.longlora_training_forwards"] = tensors.pop("base_model.model.s2_training_forwards")
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    again = PeftModel.from_pretrained(make(), tmp_path)
    assert settings_on(again.get_base_model()).training_forwards == 1


def test_no_hook_on_all_buffers_is_left():
    """torch holds it for the whole process, so nothing else would remove it."""
    hooks = torch.nn.modules.module._global_buffer_registration_hooks
    gc.collect()
    before = len(hooks)
    model, _ = of_kind("adapter")
    assert len(hooks) == before + 1
    model.unload()
    assert len(hooks) == before
    model, _ = of_kind("adapter")
    del model, _
    gc.collect()
    assert len(hooks) == before


# -- shared sequences ------------------------------------------------------------------------------------------------


def shared() -> list[tuple[float, float]]:
    """Differences of loss and gradients to a model on one rank, forward by forward."""
    mesh = init_device_mesh("cpu", (2,))
    model, plain = of_kind("adapter")
    parallelize_sequence(model, mesh)
    found = []
    for number, ids in enumerate(ROWS[:4], 1):
        batch = dict(input_ids=ids, position_ids=PACKED, labels=ids)
        loss, gradients = by_hand(plain, number, ids, position_ids=PACKED)
        mine = shard_batch(batch, mesh.get_local_rank(), 2)
        model.zero_grad()
        labels = ids.shape[1] - 1
        part = model(**mine, num_items_in_batch=torch.tensor(labels), use_cache=False).loss
        part.backward()
        total = part.detach().clone()
        torch.distributed.all_reduce(total)
        errors = []
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                torch.distributed.all_reduce(parameter.grad)
                scale = gradients[name].abs().max().clamp(min=1e-6)
                errors.append(((parameter.grad - gradients[name]).abs().max() / scale).item())
        found.append((abs(total - loss).item(), max(errors)))
    return found


def apart() -> str:
    mesh = init_device_mesh("cpu", (2,))
    model, _ = of_kind("adapter")
    parallelize_sequence(model, mesh)
    settings_of(next(iter(find_attention_modules(model).values()))).training_forwards = mesh.get_local_rank()
    batch = dict(input_ids=ROWS[0], position_ids=PACKED)
    for _ in range(2):
        try:
            model(**shard_batch(batch, mesh.get_local_rank(), 2))
        except ValueError as error:
            return str(error)
    return ""


def test_ranks_that_share_a_sequence_are_dense_together():
    for found in run_ranks(2, shared):
        assert all(loss < 1e-5 and gradient < 5e-5 for loss, gradient in found), found


def test_ranks_that_count_differently_say_so_on_all_of_them():
    for message in run_ranks(2, apart):
        assert "(16, 's2'), (16, 'full')" in message


def test_a_loader_that_goes_past_peft_finds_the_count():
    """As FSDP2's full state dict and DeepSpeed: they save and load the model's own tensors."""
    model, _ = of_kind("adapter")
    for ids in ROWS[:5]:
        step(model, ids)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert state["base_model.model.s2_training_forwards"].tolist() == [5]
    again, _ = of_kind("adapter")
    again.load_state_dict(state)
    for ids in ROWS[5:]:
        assert torch.equal(step(model, ids)[0], step(again, ids)[0])
    del state["base_model.model.s2_training_forwards"]
    again.load_state_dict(state)  # strict, from a run without a schedule
    assert settings_of(next(iter(find_attention_modules(again).values()))).training_forwards == len(ROWS)
    meta = copy.deepcopy(model).to("meta")
    assert "base_model.model.s2_training_forwards" not in meta.state_dict()


def test_no_count_is_left_on_a_base(tmp_path):
    model, _ = of_kind("adapter")
    step(model, ROWS[0])
    merged = copy.deepcopy(model).eval().merge_and_unload()
    for base in (merged, model.unload()):
        assert not [name for name in base.state_dict() if "forwards" in name]
        assert not base._state_dict_hooks and not base._load_state_dict_pre_hooks
    export_lora(of_kind("adapter")[0], tmp_path / "exported", fold_into=tmp_path / "base")
    assert not [name for name in load_file(tmp_path / "base" / "model.safetensors") if "forwards" in name]


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize(
    "setting", [dict(dense_every=2), dict(attention_pattern="local", skip_positions=True)], ids=str
)
def test_a_checkpoint_around_the_whole_model_is_refused(setting, reentrant):
    """The second forward would be another one than the first, and give its gradients."""
    model, plain = (extend(make(), group_size=16, init_lora_weights=False, **setting).train() for _ in range(2))

    def loss(embeddings):
        return model(inputs_embeds=embeddings, labels=ROWS[0], use_cache=False).loss

    embeddings = model.get_input_embeddings()(ROWS[0])
    with pytest.raises(RuntimeError, match="Checkpoint its blocks instead"):
        checkpoint(loss, embeddings, use_reentrant=reentrant).backward()
    model.zero_grad()
    settings = settings_of(next(iter(find_attention_modules(model).values())))
    settings.training_forwards = 0
    assert_same(step(model, ROWS[1]), step(plain, ROWS[1]))


@pytest.mark.parametrize("wrong", [-1, 2.5, "3", None, True])
def test_a_number_that_is_none_of_forwards_is_refused(wrong):
    model, _ = of_kind("bare")
    settings = settings_of(next(iter(find_attention_modules(model).values())))
    with pytest.raises(ValueError, match=rf"training_forwards={wrong!r} must be a whole number of forwards"):
        settings.training_forwards = wrong
    settings.training_forwards = torch.tensor(4)
    step(model, ROWS[0])
    assert settings.training_forwards == 5
