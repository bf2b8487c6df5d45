"""The trainers of transformers and trl as users call them: all fillings, sparse steps, dense evaluation, resuming."""

import copy
import math

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from peft_longlora import LongLoraConfig
from peft_longlora.attention import forward as attention_module
from peft_longlora.attention.trial import TOKENS
from tests.helpers.architectures import GROUP, Truth
from tests.helpers.tiny import extend, logits, make, train

CONTEXT = 128
CONFIG = dict(r=4, context_length=CONTEXT, group_size=GROUP, lora_dropout=0.0)


@pytest.fixture(scope="module")
def tokenizer():
    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(94))]
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0"))
    backend.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="w0"
    )
    tokenizer.model_max_length = 1024
    return tokenizer


def rows(count: int = 12, shortest: int = 5, longest: int = 100) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    lengths = torch.linspace(shortest, longest, count).int().tolist()
    return [torch.randint(3, 97, (n,), generator=generator).tolist() for n in lengths]


def options(folder, **changes) -> dict:
    values = dict(
        output_dir=str(folder), per_device_train_batch_size=2, per_device_eval_batch_size=2, max_steps=2,
        learning_rate=5e-3, logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
        bf16=False, seed=0,
    )  # fmt: skip
    return {**values, **changes}


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture
def seen(monkeypatch):
    """Every call of attention: (sparse or dense, batch, tokens). The trial of a model on a few tokens is left out."""
    calls = []
    sparse, dense = attention_module.attend, attention_module.dense.attend

    def note(kind, query):
        if query.shape[2] != TOKENS:
            calls.append((kind, *query.shape[::2]))

    def attend(query, *args, **kwargs):
        note("sparse", query)
        return sparse(query, *args, **kwargs)

    def attend_densely(call):
        note("dense", call.query)
        return dense(call)

    monkeypatch.setattr(attention_module, "attend", attend)
    monkeypatch.setattr(attention_module.dense, "attend", attend_densely)
    return calls


def recording(trainer_class):
    """A trainer that keeps every batch and its loss: (training, inputs, loss)."""

    class Recording(trainer_class):
        def compute_loss(self, model, inputs, *args, **kwargs):
            kept = {k: v.clone() for k, v in inputs.items() if k in ("input_ids", "attention_mask", "position_ids")}
            kept["labels"] = inputs["labels"].clone()
            result = super().compute_loss(model, inputs, *args, **kwargs)
            loss = result[0] if isinstance(result, tuple) else result
            self.__dict__.setdefault("batches", []).append((model.training, kept, loss.item()))
            return result

    return Recording


def plain(model, folder, attention: str):
    """What a model computes, in plain transformers."""
    copy.deepcopy(model).merge_and_unload(check=False).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention)


def loss_of(model, inputs) -> float:
    """The loss of one batch, told what it holds from its positions and padding by another rule than the package's."""
    ids = inputs["input_ids"]
    segment_ids = torch.ones_like(ids)
    if "position_ids" in inputs:
        segment_ids = (inputs["position_ids"] == 0).cumsum(1)
    if "attention_mask" in inputs:
        segment_ids = segment_ids * inputs["attention_mask"]
    Truth.local, Truth.segment_ids = (), segment_ids
    inputs = {name: value for name, value in inputs.items() if name != "attention_mask" or (value == 0).any()}
    with torch.no_grad():
        return model.float()(**inputs, use_cache=False).loss.item()


# -- Trainer -------------------------------------------------------------------------------------------------------


def train_plainly(folder, tokenizer, model=None, resume=None, **changes):
    model = extend(make(), **CONFIG) if model is None else model
    data = Dataset.from_dict({"input_ids": rows()})
    trainer = recording(Trainer)(
        model,
        TrainingArguments(**options(folder, **changes)),
        train_dataset=data,
        eval_dataset=data.select(range(9, 12)),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("side", ["right", "left"])
def test_padded_rows_are_sparse_in_training_and_dense_in_evaluation(side, tmp_path, tokenizer, seen):
    model = extend(make(), **CONFIG)
    truth = plain(model, tmp_path / "start", "truth")
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = side
    trainer = train_plainly(tmp_path, tokenizer, model, eval_strategy="steps", eval_steps=2)
    training, first, loss = trainer.batches[0]
    assert training and (first["attention_mask"] == 0).any()
    assert loss == pytest.approx(loss_of(truth, first), rel=1e-4)
    evaluated = [(batch, loss) for training, batch, loss in trainer.batches if not training]
    assert len(evaluated) == 2
    dense, sparse = (plain(model, tmp_path / "end", name) for name in ("sdpa", "truth"))
    for batch, loss in evaluated:
        assert loss == pytest.approx(loss_of(dense, batch), rel=1e-4)
        assert abs(loss - loss_of(sparse, batch)) > 1e-3
    layers = model.config.num_hidden_layers
    assert [kind for kind, *_ in seen] == ["sparse"] * 2 * layers + ["dense"] * 2 * layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_checkpointing_recomputes_what_was_computed(dtype, tmp_path, tokenizer):
    found = []
    for i, reentrant in enumerate((None, True, False)):
        changes = dict(max_steps=3, bf16=dtype == torch.bfloat16, gradient_checkpointing=reentrant is not None)
        if reentrant is not None:
            changes["gradient_checkpointing_kwargs"] = {"use_reentrant": reentrant}
        model = extend(make(dtype=dtype), **CONFIG)
        trainer = train_plainly(tmp_path / str(i), tokenizer, model, eval_strategy="steps", eval_steps=1, **changes)
        found.append([loss for _, _, loss in trainer.batches])
        assert all(map(math.isfinite, found[-1])) and len(losses(trainer)) == 3
    assert found[0] == pytest.approx(found[1], rel=1e-5) == found[2]


def test_a_resumed_run_has_the_losses_of_an_uninterrupted_one(tmp_path, tokenizer):
    changes = dict(max_steps=4, save_strategy="steps", save_steps=2)
    config = {**CONFIG, "lora_dropout": 0.1}
    whole = train_plainly(tmp_path / "whole", tokenizer, extend(make(), **config), **changes)
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    assert (checkpoint / "adapter_model.safetensors").is_file() and not list(checkpoint.glob("adapter*.bin"))
    rest = train_plainly(tmp_path / "rest", tokenizer, extend(make(), **config), resume=str(checkpoint), **changes)
    assert losses(rest)[-2:] == losses(whole)[-2:]
    assert torch.equal(logits(rest.model.eval()), logits(whole.model.eval()))


def test_the_best_checkpoint_comes_back(tmp_path, tokenizer):
    """The "best" is the largest loss here, which is the first: so it is not the one that lies in memory."""
    trainer = train_plainly(
        tmp_path, tokenizer, max_steps=3, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True,
    )  # fmt: skip
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    best, last = (PeftModel.from_pretrained(make(), tmp_path / f"checkpoint-{step}") for step in (1, 3))
    now = logits(trainer.model.eval())
    assert torch.equal(now, logits(best)) and not torch.equal(now, logits(last))


# -- SFTTrainer ----------------------------------------------------------------------------------------------------

FILLINGS = {
    "padded": dict(max_length=CONTEXT),
    "bfd": dict(packing=True, packing_strategy="bfd", max_length=CONTEXT),
    "bfd_split": dict(packing=True, packing_strategy="bfd_split", max_length=72),
    "wrapped": dict(packing=True, packing_strategy="wrapped", max_length=72),
    "padding_free": dict(padding_free=True, max_length=None),
}


@pytest.mark.parametrize("filling", FILLINGS)
def test_every_way_to_fill_a_batch_with_sft(filling, tmp_path, tokenizer, seen):
    truth = plain(extend(make(), **CONFIG), tmp_path / "start", "truth")
    data = Dataset.from_dict({"text": [" ".join(f"w{i - 3}" for i in row) for row in rows()]})
    args = SFTConfig(**options(tmp_path, eval_strategy="steps", eval_steps=2, **FILLINGS[filling]))
    trainer = recording(SFTTrainer)(
        make(),
        args,
        train_dataset=data,
        eval_dataset=data.select(range(9, 12)),
        processing_class=tokenizer,
        peft_config=LongLoraConfig(**CONFIG),
    )
    trainer.train()
    training, first, loss = trainer.batches[0]
    documents = (first["position_ids"] == 0).sum() if "position_ids" in first else len(first["input_ids"])
    assert training and documents > 1
    assert ("attention_mask" in first) == (filling in ("padded", "wrapped"))
    assert loss == pytest.approx(loss_of(truth, first), rel=1e-4)
    dense = plain(trainer.model, tmp_path / "end", "sdpa")
    evaluated = [(batch, loss) for training, batch, loss in trainer.batches if not training]
    assert evaluated
    for batch, loss in evaluated:
        assert loss == pytest.approx(loss_of(dense, batch), rel=1e-4)
    kinds = [kind for kind, *_ in seen]
    assert set(kinds[: kinds.index("dense")]) == {"sparse"} and set(kinds[kinds.index("dense") :]) == {"dense"}


def test_the_defaults_of_sft_train_in_bf16_with_checkpointing(tmp_path, tokenizer):
    """bf16, gradient checkpointing and max_length=1024 are what trl sets when nobody says anything."""
    make().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    data = Dataset.from_dict({"text": [" ".join(f"w{i - 3}" for i in row) for row in rows()]})
    args = options(
        tmp_path / "run", max_steps=3, model_init_kwargs=dict(dtype="bfloat16", attn_implementation="s2_attn")
    )
    del args["bf16"]
    args = SFTConfig(**args, packing=True)
    assert args.bf16 and args.gradient_checkpointing and args.max_length == 1024
    trainer = recording(SFTTrainer)(
        str(tmp_path / "base"), args, train_dataset=data, peft_config=LongLoraConfig(**CONFIG)
    )
    truth = plain(trainer.model, tmp_path / "start", "truth")
    trainer.train()
    _, first, loss = trainer.batches[0]
    assert loss == pytest.approx(loss_of(truth, first), rel=0.02)
    assert losses(trainer)[-1] < losses(trainer)[0]
    trainer.save_model(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype="bfloat16")
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    trained = logits(trainer.model.eval()).float()  # under the autocast of the trainer
    assert (logits(loaded).float() - trained).abs().mean() < 0.01 * trained.std()


# -- DPOTrainer ----------------------------------------------------------------------------------------------------


def preferences() -> Dataset:
    texts = [" ".join(f"w{i - 3}" for i in row) for row in rows(8, 40, 70)]
    return Dataset.from_dict({"prompt": texts[:4], "chosen": [" " + t for t in texts[4:]], "rejected": texts[1:5]})


def test_the_reference_of_dpo_is_the_base_bit_for_bit(tmp_path, tokenizer):
    """`precompute_ref_log_probs` writes down what the reference says: adapters off here, the stock model there."""
    found = []
    for i, peft_config in enumerate((LongLoraConfig(**CONFIG), None)):
        args = DPOConfig(**options(tmp_path / str(i), precompute_ref_log_probs=True, max_length=CONTEXT))
        trainer = DPOTrainer(
            make(), args=args, train_dataset=preferences(), processing_class=tokenizer, peft_config=peft_config
        )
        trainer.get_train_dataloader()
        columns = {name: trainer.train_dataset[name][:] for name in trainer.train_dataset.column_names if "ref" in name}
        assert len(columns) == 2
        found.append(columns)
    assert found[0] == found[1]


def test_dpo_trains_sparse_against_a_dense_reference(tmp_path, tokenizer, seen):
    args = DPOConfig(**options(tmp_path, max_length=CONTEXT, learning_rate=1e-3))
    trainer = DPOTrainer(
        make(),
        args=args,
        train_dataset=preferences(),
        processing_class=tokenizer,
        peft_config=LongLoraConfig(**CONFIG),
    )
    trainer.train()
    kinds = [kind for kind, *_ in seen]
    layers = trainer.model.config.num_hidden_layers
    # gradient checkpointing is trl's default: forward, reference, and the forward again
    assert kinds == (["sparse"] * layers + ["dense"] * layers + ["sparse"] * layers) * 2
    assert all(map(math.isfinite, losses(trainer)))


@pytest.mark.parametrize("tied", [False, True])
def test_dpo_of_an_adapter_starts_from_the_adapter(tied, tmp_path, tokenizer):
    """A trained PeftModel is its own reference: trl copies the adapter, and the first loss is log 2."""
    model = train(extend(make(tie_word_embeddings=tied), **CONFIG))
    args = DPOConfig(**options(tmp_path, max_length=CONTEXT))
    trainer = DPOTrainer(model, args=args, train_dataset=preferences(), processing_class=tokenizer)
    assert sorted(trainer.model.peft_config) == ["default", "ref"]
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses(trainer)[1] != pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("schedule", [dict(dense_every=2), dict(dense_every=3, skip_positions=True)], ids=str)
def test_dpo_compares_forwards_of_one_kind(schedule, tmp_path, tokenizer):
    """As long as nothing is learned, policy and reference are one model: every loss is log 2, also of dense steps."""
    model = train(extend(make(), attention_pattern="local", **CONFIG, **schedule))
    args = DPOConfig(**options(tmp_path, max_length=CONTEXT, learning_rate=0.0, max_steps=6))
    trainer = DPOTrainer(model, args=args, train_dataset=preferences(), processing_class=tokenizer)
    trainer.train()
    assert losses(trainer) == pytest.approx([math.log(2)] * 6, abs=1e-5)
