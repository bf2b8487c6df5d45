"""Which card trainers of transformers and TRL push, with and without `use_longlora_card`."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from peft_longlora import LongLoraConfig
from peft_longlora.hub.push import push_card
from peft_longlora.hub.trainers import use_longlora_card
from tests.helpers.adapters_on_hub import CODE, TOKENS, is_ours, logits, new_adapter, run_card
from tests.helpers.hub_process import Failure
from tests.helpers.releases import own_adapters


def train(repo_id, kind, with_card, strategy="every_save", name=None):
    """Train for two steps and push: what stood in the README of each folder when the Trainer pushed is on the hub."""
    folder = Path(tempfile.mkdtemp()) / (name or repo_id.split("/")[1])
    settings = {
        **{"max_steps": 2, "save_steps": 1, "per_device_train_batch_size": 1, "report_to": [], "use_cpu": True},
        **{"push_to_hub": True, "hub_strategy": strategy, "hub_always_push": True},
        **{"output_dir": str(folder), "disable_tqdm": True, "hub_model_id": repo_id},
    }
    from datasets import Dataset

    rows = Dataset.from_dict({"input_ids": TOKENS.tolist(), "labels": TOKENS.tolist()})
    if kind == "add_adapter":
        model = LlamaForCausalLM.from_pretrained("me/base", attn_implementation="s2_attn")
        model.add_adapter(LongLoraConfig(r=2, context_length=256, init_lora_weights=False))
    else:
        model = new_adapter()
    if kind == "sft":
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedTokenizerFast
        from trl import SFTConfig, SFTTrainer

        words = Tokenizer(models.WordLevel({str(i): i for i in range(97)}, unk_token="0"))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="2", pad_token="0")
        args = SFTConfig(**settings, bf16=False, packing=True, max_length=32)
        trainer = SFTTrainer(model, args=args, train_dataset=rows.remove_columns("labels"), processing_class=tokenizer)
    else:
        trainer = Trainer(model, TrainingArguments(**settings), train_dataset=rows)
    if with_card:
        use_longlora_card(trainer, license="mit", datasets=["me/books"])
    trainer.add_callback(WaitForPush(trainer))
    trainer.train()
    trainer.push_to_hub(commit_message="The end")
    if kind == "sft" and not with_card:
        model.push_to_hub(repo_id, commit_message="Once more")
    return str(folder), logits(model)


class WaitForPush(TrainerCallback):
    """Steps this short would overwrite the files of the push before, which runs in the background."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def on_save(self, *args, **kwargs) -> None:
        if self.trainer.push_in_progress:
            self.trainer.push_in_progress.wait_until_done()


@pytest.mark.parametrize("kind", [pytest.param("trainer", marks=pytest.mark.slow), "sft"])
def test_trainers_push_our_card_at_every_save(hub, pusher, kind):
    failure = pusher(train, f"me/{kind}", kind, with_card=True)
    assert not isinstance(failure, Failure), failure
    repo = hub.repos["model", f"me/{kind}"]
    assert repo.messages[1:] == ["Training in progress, step 1", "Training in progress, step 2", "The end"]
    for commit in list(repo.commits.values())[1:]:
        card = ModelCard(commit["README.md"].decode())
        assert is_ours(commit["README.md"])
        assert (card.data.license, card.data.datasets) == ("mit", ["me/books"])
        assert f'adapter = "me/{kind}"' in CODE.search(card.text)[1]
    assert kind != "sft" or "trl" in card.data.tags


@pytest.mark.parametrize(
    ("kind", "strategy"),
    [
        pytest.param("trainer", "every_save", marks=pytest.mark.slow),
        pytest.param("trainer", "checkpoint", marks=pytest.mark.slow),
        ("trainer", "end"),
        pytest.param("add_adapter", "every_save", marks=own_adapters),
        pytest.param("trainer", "all_checkpoints", marks=pytest.mark.slow),
        pytest.param("add_adapter", "checkpoint", marks=(pytest.mark.slow, own_adapters)),
        pytest.param("add_adapter", "end", marks=(pytest.mark.slow, own_adapters)),
    ],
)
def test_a_plain_trainer_needs_nothing_said(hub, pusher, puller, kind, strategy):
    repo_id = f"me/silent-{kind}-{strategy}"
    answer = pusher(train, repo_id, kind, with_card=False, strategy=strategy)
    assert not isinstance(answer, Failure), answer
    folder, trained = answer
    repo = hub.repos["model", repo_id]
    steps = [m for m in repo.messages if m.startswith("Training in progress")]
    assert len(steps) == {"every_save": 2, "end": 0}.get(strategy, 4)
    cards = [(p, f) for c in list(repo.commits.values())[1:] for p, f in c.items() if p.endswith("README.md")]
    assert cards and all(is_ours(content) for _, content in cards), [path for path, _ in cards]
    assert all("README.md" in commit for commit in list(repo.commits.values())[1:] if "adapter_config.json" in commit)
    last = ModelCard(repo.files()["README.md"].decode())
    assert "generated_from_trainer" in last.data.tags and last.data.license == "llama2"
    assert "model-index" not in last.data.to_dict(), "nothing was evaluated"
    code, pulled = puller(run_card, repo_id)
    # Nobody tells the card for which repository it is, and it does not ask the Hub: see `use_longlora_card`.
    assert code.startswith("import peft_longlora") and f'adapter = "{folder}' in code
    assert pulled == trained


def test_trl_drafts_last_and_is_mended(hub, pusher):
    """If this fails because TRL's trainers keep our card by now: simplify hub/trainers.py and the README."""
    answer = pusher(train, "me/trl", "sft", with_card=False)
    assert not isinstance(answer, Failure), answer
    repo = hub.repos["model", "me/trl"]
    by_message = dict(zip(repo.messages, repo.commits.values(), strict=True))
    assert is_ours(by_message["Training in progress, step 2"]["README.md"])
    assert not is_ours(by_message["The end"]["README.md"])
    assert is_ours(by_message["Once more"]["README.md"])
    hub.put("me/trl", by_message["The end"])
    pusher(push_card, "me/trl", license="mit")
    assert is_ours(hub.files("me/trl")["README.md"])
