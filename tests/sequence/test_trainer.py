"""Whole models and trainers whose ranks share each sequence, against the same in one process."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from datasets import Dataset
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from peft_longlora import configure_attention
from peft_longlora.architecture import find_attention_modules
from peft_longlora.attention.settings import settings_of
from peft_longlora.data.records import IGNORED
from peft_longlora.eval import LongContextEvalCallback
from peft_longlora.sequence.batch import SequenceCollator, shard_batch
from peft_longlora.sequence.switch import parallelize_sequence, unshared
from peft_longlora.sequence.trainer import SequenceParallelMixin
from tests.helpers.batches import KINDS, batch_of
from tests.helpers.ranks import Traffic, run_ranks
from tests.helpers.releases import checkpoint_activations
from tests.helpers.tiny import extend, make

# -- models --------------------------------------------------------------------------------------------------------

MODELS = {
    "s2": dict(group_size=16),
    "one KV head": dict(group_size=16, num_key_value_heads=1),
    "local": dict(group_size=16, attention_pattern="local"),
    "a dense layer": dict(group_size=16, dense_layers=[0]),
    "full": dict(attention_pattern="full"),
}


def loss_and_gradients(model, batch, labels: int):
    model.zero_grad()
    loss = model(**batch, num_items_in_batch=labels, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def difference(model, batch, mesh, truth=None) -> tuple[float, float]:
    """Of the loss, and of the gradients relative to the largest of each weight, to the unshared model's."""
    labels = (batch["labels"][:, 1:] != IGNORED).sum()
    loss, grads = truth or loss_and_gradients(model, batch, labels)
    grads = {name: grad.clone() for name, grad in grads.items()}
    parallelize_sequence(model, mesh)
    mine = shard_batch(batch, mesh.get_local_rank(), mesh.size())
    shared_loss, shared = loss_and_gradients(model, mine, labels)
    parallelize_sequence(model, None)
    dist.all_reduce(shared_loss)
    assert shared.keys() == grads.keys() and all(grad.any() for grad in grads.values())
    for grad in shared.values():
        dist.all_reduce(grad)
    errors = [((shared[n] - g).abs().max() / g.abs().max().clamp(min=1e-6)).item() for n, g in grads.items()]
    return abs(loss - shared_loss).item(), max(errors)


def models(ranks: int) -> dict:
    mesh = init_device_mesh("cpu", (ranks,))
    found = {}
    for name in MODELS if ranks == 2 else ("s2", "a dense layer"):
        changes = dict(MODELS[name])
        kv_heads = changes.pop("num_key_value_heads", 2)
        model = extend(make(num_key_value_heads=kv_heads), init_lora_weights=False, **changes).train()
        for kind in KINDS if name == "s2" else KINDS[2:4]:
            found[name, kind] = difference(model, batch_of(kind), mesh)
        if name == "s2":
            found["evaluation", "packed"] = difference(model.eval(), batch_of("packed"), mesh)
            model.train()
            for reentrant in (False, True):
                model.enable_input_require_grads()
                checkpoint_activations(model, reentrant)
                found[f"checkpointing {reentrant}", "packed"] = difference(model, batch_of("packed"), mesh)
    return found


@pytest.mark.parametrize("ranks", [3, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 4, 8))])
def test_loss_and_gradients_are_those_of_one_process(ranks):
    for found in run_ranks(ranks, models, ranks):
        assert len(found) == len(KINDS) + 2 * (len(MODELS) - 1 if ranks == 2 else 1) + 3
        assert not {key: errors for key, errors in found.items() if not (errors[0] < 1e-5 and errors[1] < 2e-5)}


class Block(torch.nn.Module):
    """Layers that are recomputed together, each of which is recomputed by itself too."""

    def __init__(self, layers):
        super().__init__()
        self.layers = layers

    def forward(self, hidden, **kwargs):
        def run(hidden):
            for layer in self.layers:
                hidden = layer(hidden, **kwargs)
            return hidden

        return checkpoint(run, hidden, use_reentrant=False)


def recomputed() -> dict:
    """Exchanges of a step of two layers, and its error, for kinds of recomputation."""
    mesh, found = init_device_mesh("cpu", (2,)), {}
    for kind in ("as it is", "reentrant", "in blocks", "one layer, run twice"):
        model = extend(make(), group_size=16, init_lora_weights=False).train()
        model.enable_input_require_grads()
        checkpoint_activations(model, kind == "reentrant")
        backbone = model.get_base_model().model
        if kind == "in blocks":
            backbone.layers = torch.nn.ModuleList([Block(backbone.layers)])
        elif kind == "one layer, run twice":  # as in some architectures
            backbone.layers[1] = backbone.layers[0]
        with Traffic() as traffic:
            errors = difference(model, batch_of("packed"), mesh)
        found[kind] = (len(traffic.sent), *errors)
    return found


def test_recomputation_exchanges_nothing_again():
    """Ranks that wait for each other in every layer, both ways, are slow: forward and backward need one exchange each.

    Of a layer that runs twice it is not known which run is recomputed, so it asks again.
    """
    for found in run_ranks(2, recomputed):
        assert {kind: exchanges for kind, (exchanges, _, _) in found.items()} == {
            "as it is": 4,
            "reentrant": 4,
            "in blocks": 4,
            "one layer, run twice": 6,
        }
        assert not {kind: x for kind, x in found.items() if not (x[1] < 1e-5 and x[2] < 2e-5)}


def sharded(ranks: int) -> float:
    """FSDP2 over the ranks that share the sequence: it averages gradients, so the loss is multiplied by the ranks."""
    model, batch = extend(make(), group_size=16, init_lora_weights=False).train(), batch_of("packed")
    labels = (batch["labels"][:, 1:] != IGNORED).sum()
    _, grads = loss_and_gradients(model, batch, labels)
    grads = {name: grad.clone() for name, grad in grads.items()}
    model.zero_grad(set_to_none=True)
    mesh = init_device_mesh("cpu", (ranks,))
    parallelize_sequence(model, mesh)
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    mine = shard_batch(batch, mesh.get_local_rank(), ranks)
    (model(**mine, num_items_in_batch=labels, use_cache=False).loss * ranks).backward()
    found = {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == grads.keys()
    return max(((found[n] - g).abs().max() / g.abs().max().clamp(min=1e-6)).item() for n, g in grads.items())


def test_gradients_under_fsdp_over_the_same_ranks():
    assert max(run_ranks(2, sharded, 2)) < 2e-5


# -- trainers ------------------------------------------------------------------------------------------------------


def documents(count: int = 6) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(3, 97, (20 + 13 * i,), generator=generator).tolist() for i in range(count)]


def options(folder: str, **changes) -> dict:
    values = dict(
        output_dir=folder, max_steps=2, per_device_train_batch_size=2, per_device_eval_batch_size=2, learning_rate=0.05,
        optim="sgd", gradient_accumulation_steps=2, gradient_checkpointing=True, logging_steps=1, eval_strategy="steps",
        eval_steps=2, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, bf16=False, max_grad_norm=0.5,
    )  # fmt: skip
    return {**values, **changes}


def outcome(trainer, resume: str | None = None) -> dict:
    trainer.train(resume_from_checkpoint=resume)
    names = ("loss", "grad_norm", "entropy", "num_tokens", "eval_loss", "eval_mean_token_accuracy", "eval_entropy")
    names += ("eval_perplexity_64",)
    logged = [(name, entry[name]) for entry in trainer.state.log_history for name in names if name in entry]
    weights = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    return dict(logged=logged, weights=weights)


def plain_trainer(folder: str, size: int | None = None, batch: int = 2, resume: str | None = None, **changes) -> dict:
    class Shared(SequenceParallelMixin, Trainer):
        pass

    data = Dataset.from_dict({"input_ids": documents(), "labels": documents()})
    args = TrainingArguments(**options(folder, per_device_train_batch_size=batch, **changes))
    model = extend(make(), group_size=16)
    tokenizer = fast_tokenizer()
    collator = DataCollatorForSeq2Seq(tokenizer)
    shared = dict(sequence_parallel_size=size, data_collator=collator, processing_class=tokenizer)
    return outcome(Shared(model, args, train_dataset=data, eval_dataset=data.select([1, 3, 5]), **shared), resume)


def stream_trainer(folder: str) -> dict:
    """Rows from a stream whose last batch is short; a model that the Trainer makes, and makes anew; a callback."""

    class Shared(SequenceParallelMixin, Trainer):
        pass

    data = Dataset.from_dict({"input_ids": documents(5), "labels": documents(5)})
    args = TrainingArguments(**options(folder, per_device_train_batch_size=3))
    more = dict(
        model_init=lambda: extend(make(), group_size=16), data_collator=DataCollatorForSeq2Seq(fast_tokenizer())
    )
    trainer = Shared(args=args, train_dataset=data.to_iterable_dataset(), eval_dataset=data.select([1, 3, 4]), **more)
    measured = Path(folder, f"{trainer.args.process_index}.txt")
    measured.parent.mkdir(exist_ok=True)
    measured.write_text(" ".join(f"w{i % 90}" for i in range(200)))
    more = dict(lengths=[64], passkey_depths=(), tokenizer=fast_tokenizer())
    trainer.add_callback(LongContextEvalCallback(trainer, data=str(measured), **more))
    return outcome(trainer)


def sft_trainer(folder: str, packing: bool) -> dict:
    class Shared(SequenceParallelMixin, SFTTrainer):
        pass

    halves = [(row[: len(row) // 3], row[len(row) // 3 :]) for row in documents()]
    labels = [[IGNORED] * len(prompt) + completion for prompt, completion in halves]
    data = Dataset.from_dict({"input_ids": documents(), "labels": labels})
    more = dict(packing=True, max_length=128, eval_packing=True) if packing else dict(max_length=None)
    batches = dict(per_device_train_batch_size=1, per_device_eval_batch_size=1 if packing else 2)
    args = SFTConfig(**options(folder, **batches), **more)
    model, last_is_short = extend(make(), group_size=16), data.select(range(5))
    more = dict(eval_dataset=data if packing else last_is_short, processing_class=fast_tokenizer())
    return outcome(Shared(model, args, train_dataset=data, **more))


def fast_tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(94))])}
    backend = Tokenizer(WordLevel(words, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="w0")


def trainers(folder: str) -> dict:
    found = {"Trainer": plain_trainer(folder), "a stream": stream_trainer(folder)}
    for packing in (False, True):
        found[f"SFTTrainer, packing={packing}"] = sft_trainer(folder, packing)
    return found


def assert_same(found: dict, truth: dict) -> None:
    assert [name for name, _ in found["logged"]] == [name for name, _ in truth["logged"]]
    for (name, value), (_, expected) in zip(found["logged"], truth["logged"], strict=True):
        assert value == pytest.approx(expected, rel=2e-5), name
    for name, weight in truth["weights"].items():
        assert torch.allclose(found["weights"][name], weight, rtol=1e-4, atol=1e-6), name


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict:
    """What the same trainers do in one process."""
    return run_ranks(1, trainers, str(tmp_path_factory.mktemp("alone")))[0]


def test_trainers_train_and_evaluate_as_in_one_process(alone, tmp_path):
    """With labels that are not spread evenly, accumulation, checkpointing, clipping, a last batch that is short."""
    for found in run_ranks(2, trainers, str(tmp_path)):
        for name, truth in alone.items():
            assert {"loss", "eval_loss"} <= {key for key, _ in truth["logged"]}
            assert_same(found[name], truth)


def test_groups_of_ranks_share_and_the_rest_are_copies(alone, tmp_path):
    """4 processes, 2 a sequence: a row for each of the two groups is the batch of 2 of one process."""
    for found in run_ranks(4, plain_trainer, str(tmp_path), 2, 1):
        truth = alone["Trainer"]
        found["logged"] = [x for x in found["logged"] if x[0] != "eval_loss"]  # batches of 4 rows, not of 2
        assert_same(found, {**truth, "logged": [x for x in truth["logged"] if x[0] != "eval_loss"]})


def saving(folder: str) -> dict:
    return plain_trainer(folder, save_strategy="steps", save_steps=1)


def resuming(folder: str, checkpoint: str) -> dict:
    return plain_trainer(folder, resume=checkpoint)


@pytest.mark.parametrize(("first", "then"), [(2, 1), pytest.param(1, 2, marks=pytest.mark.slow)])
def test_a_checkpoint_goes_on_with_another_number_of_ranks(first, then, alone, tmp_path):
    run_ranks(first, saving, str(tmp_path / "first"))
    for found in run_ranks(then, resuming, str(tmp_path / "then"), str(tmp_path / "first" / "checkpoint-1")):
        assert_same(dict(found, logged=[]), dict(alone["Trainer"], logged=[]))


def refusals(folder: str) -> dict:
    rank = dist.get_rank()

    class Shared(SequenceParallelMixin, Trainer):
        pass

    def trainer(**changes):
        data = Dataset.from_dict({"input_ids": documents(), "labels": documents()})
        data = data.select(range(rank, 4 + rank)) if changes.pop("differs", False) else data
        data = data.select(range(4 + rank)) if changes.pop("is_longer", False) else data
        more = dict(train_dataset=data, data_collator=DataCollatorForSeq2Seq(fast_tokenizer()))
        more["sequence_parallel_size"] = changes.pop("sequence_parallel_size", None)
        for name in ("compute_loss_func", "compute_metrics"):
            more[name] = changes.pop(name, None)
        model = changes.pop("model", None) or extend(make(), group_size=16)
        args = TrainingArguments(**options(folder, eval_strategy="no", **changes))
        return Shared(model, args, **more)

    def another_trainer():
        class SharedDPO(SequenceParallelMixin, DPOTrainer):
            pass

        rows = Dataset.from_list([dict(prompt="w1 w2", chosen="w3 w4", rejected="w5")] * 4)
        args = DPOConfig(**options(folder, eval_strategy="no"))
        SharedDPO(extend(make(), group_size=16), args=args, train_dataset=rows, processing_class=fast_tokenizer())

    def order():
        class Unshared(Trainer, SequenceParallelMixin):
            pass

    def predictions():
        one = trainer()
        one.predict(one.train_dataset)

    def no_positions():
        model = extend(make(), group_size=16).train()
        parallelize_sequence(model, init_device_mesh("cpu", (2,)))
        model(input_ids=batch_of("plain")["input_ids"][:1], use_cache=False)

    def two_rows():
        model = extend(make(), group_size=16).train()
        parallelize_sequence(model, init_device_mesh("cpu", (2,)))
        batch = batch_of("plain")
        model(input_ids=batch["input_ids"], position_ids=torch.arange(53).expand(2, 53), use_cache=False)

    def generates():
        prompt = torch.arange(5, 12)[None]
        model = extend(make(), group_size=16).eval()
        alone = model.generate(prompt, max_new_tokens=3, eos_token_id=None)
        parallelize_sequence(model, init_device_mesh("cpu", (2,)))
        with unshared(model):
            assert torch.equal(model.generate(prompt, max_new_tokens=3, eos_token_id=None), alone)
        if rank == 0:  # the other would be waited for
            model.generate(prompt, max_new_tokens=3)
        raise NotImplementedError(GENERATES)

    def of_model(**changes):
        model = make(**{k: v for k, v in changes.items() if k not in ("rope_type", "configured")})
        if changes.get("configured", True):
            configure_attention(model, group_size=16)
        if "rope_type" in changes:
            model = extend(make(), rope_type=changes["rope_type"])
        parallelize_sequence(model, init_device_mesh("cpu", (2,)))

    def evaluated():
        first = trainer()
        first.evaluate(first.train_dataset)
        first.train()

    tries = dict(
        evaluated=evaluated,
        differs=lambda: trainer(differs=True).train(),
        longer=lambda: trainer(is_longer=True).train(),
        smoothing=lambda: trainer(label_smoothing_factor=0.1),
        loss=lambda: trainer(compute_loss_func=lambda *args, **kwargs: 0),
        average=lambda: trainer(average_tokens_across_devices=False),
        size=lambda: trainer(sequence_parallel_size=3),
        no_size=lambda: trainer(sequence_parallel_size=0),
        metrics=lambda: trainer(compute_metrics=lambda predictions: {}),
        predictions=predictions,
        experts=lambda: trainer(model=extend(make("mixtral", output_router_logits=True, sliding_window=None))),
        another=another_trainer,
        order=order,
        generates=generates,
        positions=no_positions,
        rows=two_rows,
        dynamic=lambda: of_model(rope_type="dynamic"),
        stock=lambda: of_model(configured=False),
        mesh=lambda: parallelize_sequence(extend(make()), init_device_mesh("cpu", (2, 1), mesh_dim_names=("a", "b"))),
    )
    found = {}
    for name, call in tries.items():
        try:
            call()
            found[name] = "nothing"
        except (ValueError, NotImplementedError, TypeError) as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


GENERATES = "The ranks share each sequence, but were called with a cache"
EXPECTED = dict(
    evaluated="ValueError: The model is not wrapped in DistributedDataParallel",
    differs="ValueError: The ranks that share a sequence were given different batches: (rows, tokens a row, checksum)",
    longer="ValueError: The ranks that share a sequence were given datasets of [4, 5] rows",
    smoothing="ValueError: Sequence parallelism cannot be used with label_smoothing_factor",
    loss="ValueError: Sequence parallelism cannot be used with compute_loss_func",
    average="ValueError: Sequence parallelism cannot be used with average_tokens_across_devices=False",
    size="ValueError: sequence_parallel_size=3 does not divide the 2 processes",
    no_size="ValueError: sequence_parallel_size=0 does not divide the 2 processes",
    metrics="ValueError: Sequence parallelism can evaluate only losses",
    predictions="ValueError: Sequence parallelism can evaluate only losses",
    experts="ValueError: Sequence parallelism cannot be used with output_router_logits of the model's config",
    another="ValueError: Sequence parallelism cannot be used with a",
    order="TypeError: Unshared names the Trainer before SequenceParallelMixin",
    generates=f"NotImplementedError: {GENERATES}",
    positions="ValueError: The model was called without position_ids",
    rows="ValueError: A rank got 2 rows",
    dynamic="NotImplementedError: rope_type='dynamic' chooses its frequencies by the longest position",
    stock="ValueError: This model does not use S2-Attn",
    mesh="ValueError: mesh has 2 dimensions ('a', 'b')",
)


def test_what_would_be_wrong_is_refused_on_every_rank(tmp_path):
    for found in run_ranks(2, refusals, str(tmp_path)):
        assert found.keys() == EXPECTED.keys()
        assert not {k: v for k, v in found.items() if not v.startswith(EXPECTED[k])}


def test_another_adapter_does_not_part_the_ranks():
    model, ranks = extend(make(), group_size=16), object()
    for module in find_attention_modules(model).values():
        settings_of(module).sharing = ranks
    configure_attention(model.get_base_model(), backend="sdpa")
    assert {settings_of(module).sharing for module in find_attention_modules(model).values()} == {ranks}


def test_the_collator_adds_a_checksum_that_tells_batches_apart():
    def collate(rows):
        return {"input_ids": torch.tensor(rows)}

    found = [SequenceCollator(collate, rank, 2)(rows) for rank, rows in enumerate([[[1, 2, 3]], [[1, 2, 4]]])]
    assert not torch.equal(found[0]["batch_checksum"], found[1]["batch_checksum"])
    assert found[0]["input_ids"].tolist() == [[1, 2]] and found[1]["input_ids"].tolist() == [[4, 0]]
