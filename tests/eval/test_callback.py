"""Numbers during training: in the Trainer's own log, equal to those of an evaluation, and training undisturbed."""

import json

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

from peft_longlora.attention.settings import settings_of
from peft_longlora.data import load_rows
from peft_longlora.eval import Corpus, LongContextEvalCallback, Passkey, Perplexity, Topics, evaluate
from peft_longlora.eval.subject import Subject
from tests.helpers.paths import EMBEDDED
from tests.helpers.tiny import extend, make


@pytest.fixture
def text(tmp_path) -> str:
    (tmp_path / "book.txt").write_text("def read(self, size=-1):\n    return self._buffer.read(size)\n" * 12)
    return str(tmp_path / "book.txt")


def make_trainer(tmp_path, **options) -> Trainer:
    model = extend(make(vocab_size=4096))
    rows = [{"input_ids": torch.arange(i, i + 64), "labels": torch.arange(i, i + 64)} for i in range(8)]
    args = TrainingArguments(
        output_dir=str(tmp_path / "out"),
        max_steps=4,
        per_device_train_batch_size=1,
        report_to=options.pop("report_to", "none"),
        save_strategy=options.pop("save_strategy", "no"),
        logging_steps=1,
        use_cpu=True,
        learning_rate=1e-2,
        **options,
    )
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    return Trainer(model, args, train_dataset=rows, eval_dataset=rows[:1], processing_class=tokenizer)


class Watch(TrainerCallback):
    """What each step trained with."""

    def __init__(self):
        self.modes = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        layer = next(m for m in model.modules() if type(m).__name__ == "LlamaAttention")
        self.modes.append((model.training, settings_of(layer).mode))


def logged(trainer, name) -> dict:
    return {entry["step"]: entry[name] for entry in trainer.state.log_history if name in entry}


def test_numbers_of_an_evaluation_stand_in_the_log(tmp_path, text):
    trainer, watch = make_trainer(tmp_path), Watch()
    callback = LongContextEvalCallback(trainer, data=text, lengths=[128, 192], every_steps=2, passkey_depths=[0.5])
    trainer.add_callback(callback)
    trainer.add_callback(watch)
    trainer.train()
    assert list(logged(trainer, "eval_perplexity_192")) == list(logged(trainer, "eval_passkey_128")) == [2, 4]
    assert watch.modes == [(True, "auto")] * 4, "training goes on as before"
    subject = Subject.of(trainer.model, trainer.processing_class)
    tasks = [
        Perplexity(Corpus(text), [128, 192], max_windows=1),
        Passkey(lengths=[128, 192], depths=[0.5], seeds=1),
    ]
    results = evaluate(subject, tasks, tmp_path / "eval", show_progress=False)
    for row in results.results:
        assert logged(trainer, f"eval_{row.task}_{row.length}")[4] == pytest.approx(row.value, rel=1e-5)
    first, last = logged(trainer, "eval_perplexity_128").values()
    assert first != last


def test_each_evaluation_of_the_trainer_brings_them_and_tensorboard_sees_them(tmp_path, text, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    trainer = make_trainer(tmp_path, eval_strategy="steps", eval_steps=2, report_to="tensorboard")
    trainer.add_callback(LongContextEvalCallback(trainer, data=text, lengths=[64], passkey_depths=[]))
    trainer.train()
    values = logged(trainer, "eval_perplexity_64")
    assert list(values) == list(logged(trainer, "eval_loss")) == [2, 4]
    board = EventAccumulator(str(tmp_path / "board")).Reload()
    shown = {event.step: event.value for event in board.Scalars("eval/perplexity_64")}
    assert shown == pytest.approx(values)


def test_the_best_checkpoint_is_the_one_of_the_lowest_perplexity(tmp_path, text):
    """The metrics that `evaluate` returns hold the numbers, so that the Trainer can choose by them."""
    best = dict(metric_for_best_model="eval_perplexity_64", greater_is_better=False, load_best_model_at_end=True)
    trainer = make_trainer(
        tmp_path,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        lr_scheduler_type="constant",
        **best,
    )
    trainer.add_callback(LongContextEvalCallback(trainer, data=text, lengths=[64], passkey_depths=[]))
    trainer.train()
    values = logged(trainer, "eval_perplexity_64")
    assert len(set(values.values())) == 4
    assert trainer.state.best_metric == min(values.values())
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{min(values, key=values.get)}")
    assert trainer.evaluate()["eval_perplexity_64"] == pytest.approx(min(values.values()), rel=1e-5), "it is loaded"


@pytest.mark.parametrize(
    ("options", "every_steps", "message"),
    [(dict(), None, "keeps the worst checkpoint"), (dict(greater_is_better=False), 2, "measures at other times")],
)
def test_numbers_that_would_choose_no_checkpoint_or_the_worst_are_refused(
    tmp_path, text, options, every_steps, message
):
    trainer = make_trainer(
        tmp_path, eval_strategy="steps", eval_steps=2, metric_for_best_model="perplexity_64", **options
    )
    with pytest.raises(ValueError, match=message):
        LongContextEvalCallback(trainer, data=text, lengths=[64], passkey_depths=[], every_steps=every_steps)


def test_it_measures_dense_attention_and_gives_random_numbers_back(tmp_path, text):
    """The same training with and without it ends with the same weights."""
    weights = []
    for with_callback in (False, True):
        torch.manual_seed(0)
        trainer = make_trainer(tmp_path)
        if with_callback:
            trainer.add_callback(LongContextEvalCallback(trainer, data=text, lengths=[128], every_steps=1))
        trainer.train()
        weights.append({n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad})
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_numbers_of_numpy_are_numbers(tmp_path, text):
    """As they come out of np.array or np.linspace; what is measured bears the names that plain numbers give."""
    plain = dict(lengths=[128, 192], passkey_depths=[0.5], every_steps=2)
    numpy = dict(lengths=np.array([128, 192]), passkey_depths=np.linspace(0.5, 0.5, 1), every_steps=np.int64(2))
    trainer = make_trainer(tmp_path)
    found = [LongContextEvalCallback(trainer, data=text, **options).measure() for options in (plain, numpy)]
    assert found[0] == found[1] and "eval_perplexity_128" in found[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(lengths=[128], every_steps=True), "every_steps=True must be 1 or more, or None"),
        (dict(lengths=np.array([64.0]), every_steps=1), r"64.0\)? is not a number"),
        (dict(every_steps=1), "leave nothing to measure"),
        (dict(lengths=[64], every_steps=1), "prompt alone has 8. tokens"),
        (dict(lengths=[64]), "eval_strategy='no' never evaluates"),
        (dict(lengths=[64], every_steps=1, data="none.txt"), "no such file"),
        (dict(lengths=[128], every_steps=0), "every_steps=0 must be 1 or more, or None"),
        (dict(lengths=128, every_steps=1), r"lengths=128 is not a list. Give a list such as \[8192, 32768\]"),
        (dict(lengths="4k", every_steps=1), "lengths='4k' is not a list"),
        (dict(lengths=["4k"], every_steps=1), "'4k' is not a number"),
        (dict(lengths=[128], passkey_depths=0.5, every_steps=1), "passkey_depths=0.5 is not a list"),
    ],
)
def test_refusals_come_before_training(tmp_path, options, message):
    trainer = make_trainer(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        LongContextEvalCallback(trainer, **options)


def test_no_number_takes_the_place_of_another(tmp_path, text):
    """Several data sets and protocols of a task, and the base beside the adapter, all stand in the log."""
    (tmp_path / "talks").mkdir()
    for name in ("5_topics", "10_topics"):
        row = {"prompt": "art, art. The first?", "topics": ["art"]}
        (tmp_path / "talks" / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    corpus, trainer = Corpus(text), make_trainer(tmp_path, eval_strategy="steps")
    tasks = [
        Perplexity(corpus, [64], protocol="longlora", stride=4, max_windows=1),
        Topics(source=str(tmp_path / "talks")),
    ]
    tasks.append(Perplexity(corpus, [64], max_windows=1, with_base=True, name="native"))
    callback = LongContextEvalCallback(trainer, text, [64, 128], passkey_depths=[], tasks=tasks)
    names = {"perplexity_longlora_64", "perplexity_documents_64", "perplexity_128", "native_64", "native_base_64"}
    assert set(callback.measure()) == {f"eval_{n}" for n in (*names, "topics_5_topics", "topics_10_topics")}


def test_documents_that_the_trainer_trains_on_are_refused(tmp_path, text):
    trainer, often = make_trainer(tmp_path), dict(every_steps=1, passkey_depths=[])
    trainer.train_dataset = load_rows(text, trainer.processing_class, 64, pack=True, cache=tmp_path / "cache")
    (tmp_path / "copy.md").write_text((tmp_path / "book.txt").read_text())
    with pytest.raises(ValueError, match=r"data holds '.*copy\.md', which is training data: '.*book\.txt'"):
        LongContextEvalCallback(trainer, data=str(tmp_path / "copy.md"), lengths=[64], **often)
    (tmp_path / "other.md").write_text("x = 1\n" * 90)
    LongContextEvalCallback(trainer, data=str(tmp_path / "other.md"), lengths=[64], **often)
