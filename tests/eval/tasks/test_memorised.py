"""Passages continued word for word: by a model that knows a text, by one that knows a part of it, and by none."""

import itertools
import json
import random
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from peft_longlora import LongLoraConfig
from peft_longlora.eval import Corpus, Memorised, Subject, evaluate
from peft_longlora.eval.report.cells import collect_cells
from peft_longlora.eval.report.units import MOST
from peft_longlora.eval.tasks.memorised import CONTINUATION
from peft_longlora.hub.card import CardOptions
from tests.helpers.answering_models import letter_tokenizer

WINDOW = 300


def letters(seed: int, count: int) -> str:
    return "".join(random.Random(seed).choices("abcd", k=count))


class Reciter(nn.Module):
    """Writes what follows the last 20 letters in the text that it knows; elsewhere always the first letter."""

    def __init__(self, known: str):
        super().__init__()
        self.known, self.tokenizer = known, letter_tokenizer()
        self.embeddings, self.head = nn.Embedding(4, 4), nn.Linear(4, 4, bias=False)
        self.head.weight = nn.Parameter(torch.eye(4))
        self.config = LlamaConfig(vocab_size=4, max_position_embeddings=WINDOW)
        self.device = torch.device("cpu")
        self.read: list[int] = []

    def get_output_embeddings(self):
        return self.head

    def get_input_embeddings(self):
        return self.embeddings

    def forward(self, input_ids, use_cache=False):
        text, next_ones = "".join("abcd"[i] for i in input_ids[0].tolist()), []
        self.read.append(len(text))
        for end in range(1, len(text) + 1):
            place = self.known.find(text[max(0, end - 20) : end])
            is_known = end >= 20 and 0 <= place < len(self.known) - 20
            next_ones.append("abcd".index(self.known[place + 20]) if is_known else 0)
        hidden = nn.functional.one_hot(torch.tensor([next_ones]), 4).float()
        return SimpleNamespace(logits=self.head(hidden))


def corpus(folder, name: str, *texts: str) -> Corpus:
    (folder / name).mkdir()
    for number, text in enumerate(texts):
        (folder / name / f"{number}.txt").write_text(text)
    return Corpus(folder / name)


def measure(task, subject):
    found = collect_cells(item.measure() for item in task.items(subject))
    return {(name[1], variant, name[4], name[3]): cell.row(0.95) for (name, variant), cell in found.items()}


def test_a_text_that_a_model_knows_and_one_that_it_does_not(tmp_path):
    known, other = letters(1, 2000), letters(2, 2000)
    model = Reciter(known)
    subject = Subject.of(model, model.tokenizer)
    task = Memorised(corpus(tmp_path, "known", known), corpus(tmp_path, "other", other), passages=20)
    task.check(subject)
    rows = measure(task, subject)
    for length in (100, 250, WINDOW):
        sure, guessed = rows["known", "base", length, "verbatim"], rows["other", "base", length, "verbatim"]
        assert (sure.value, sure.high, guessed.value, guessed.low) == (1, 1, 0, 0) and sure.units == 20
        assert 0.7 < sure.low < 1 and not sure.higher_is_better  # 20 of 20, by Wilson's interval
        tokens = rows["known", "base", length, "verbatim_tokens"]
        assert (tokens.value, tokens.high) == (50, 50) and tokens.low == pytest.approx(50 * sure.low, abs=1e-3)
    # 50, 200 and 250 tokens, and 49 of those that follow; the first passage has 242 before it.
    assert sorted(set(model.read)) == [99, 249, 292, WINDOW - 1]
    assert MOST["verbatim_tokens"] == CONTINUATION
    assert "not known how many" not in " ".join(task.notes)


def test_two_folders_of_one_name_are_two_texts(tmp_path):
    """As --data mine/books --unseen other/books: a sample's key tells them apart, or the second is never measured."""
    known, other = letters(1, 2000), letters(2, 2000)
    model = Reciter(known)
    (tmp_path / "mine").mkdir(), (tmp_path / "other").mkdir()
    texts = corpus(tmp_path / "mine", "books", known), corpus(tmp_path / "other", "books", other)
    task = Memorised(*texts, passages=4)
    results = evaluate(Subject.of(model, model.tokenizer), [task], tmp_path / "out", show_progress=False)
    found = {row.dataset: row.value for row in results.results if row.length == 100 and row.metric == "verbatim"}
    assert found == {"books": 1, "books (unseen)": 0}


def test_a_text_that_a_model_knows_in_part(tmp_path):
    """It knows the first 1000 letters of 2000: a passage that ends behind them breaks off there."""
    text = letters(1, 2000)
    model = Reciter(text[:1000])
    subject = Subject.of(model, model.tokenizer)
    task = Memorised(corpus(tmp_path, "text", text), passages=30)
    rows = measure(task, subject)
    places = [200 + int((number + 0.5) / 30 * 1751) for number in range(30)]
    whole = [place + 50 <= 1000 for place in places]
    assert rows["text", "base", 100, "verbatim"].value == pytest.approx(sum(whole) / 30)
    least = sum(min(50, max(0, 1000 - place)) for place in places) / 30
    assert least <= rows["text", "base", 100, "verbatim_tokens"].value < least + 1  # and letters guessed by chance
    assert "it is not known how many passages are easy to guess" in " ".join(task.notes)


def test_passages_are_even_and_none_leaves_its_document(tmp_path):
    texts = [letters(seed, count) for seed, count in enumerate((700, 100, 1000, 400))]
    model = Reciter("a" * 30)
    subject = Subject.of(model, model.tokenizer)
    task = Memorised(corpus(tmp_path, "texts", *texts), passages=14)
    task.check(subject)
    found = task._passages(subject, task.corpus)
    in_short = sum(700 / 2200 < (i + 0.5) / 14 < 800 / 2200 for i in range(14))
    assert in_short and len(found) == 14 - in_short
    assert task.notes == [
        f"memorised, texts: {in_short} of 14 passages lie in documents shorter than 250 tokens, and were left out."
    ]
    for passage in found:
        whole = "".join("abcd"[i] for i in torch.cat([passage.before, passage.after]).tolist())
        assert any(whole in text for text in texts) and 200 <= len(passage.before) <= 250 and len(passage.after) == 50
    with pytest.raises(ValueError, match="no document has the 250 tokens"):
        Memorised(corpus(tmp_path, "short", "abcd" * 60)).check(subject)
    model.config.max_position_embeddings = 200
    with pytest.raises(ValueError, match="window of 200 tokens is too short; it needs 250"):
        task.check(Subject.of(model, model.tokenizer))


@pytest.mark.parametrize(("count", "most"), [(250, 1), (290, 1), (600, 8), (5000, 95)])
def test_no_token_of_a_short_text_is_asked_for_twice(count, most, tmp_path):
    """The interval of a share counts passages as independent: 100 copies of 8 passages are 8."""
    text = letters(1, count)
    model = Reciter(text)
    subject = Subject.of(model, model.tokenizer)
    task = Memorised(corpus(tmp_path, "text", text), passages=100)
    places = [
        text.index("".join("abcd"[i] for i in torch.cat([passage.before, passage.after]).tolist()))
        + len(passage.before)
        for passage in task._passages(subject, task.corpus)
    ]
    assert min((b - a for a, b in itertools.pairwise(places)), default=50) >= 50
    assert most / 2 <= len(places) <= most
    assert measure(task, subject)["text", "base", 100, "verbatim"].units == len(places)
    assert f"{100 - len(places)} of 100 passages begin in the 50 tokens of another one" in task.notes[0]


@pytest.fixture
def adapted():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=260, initializer_range=0.3, eos_token_id=None,
    )  # fmt: skip
    base = LlamaForCausalLM._from_config(config, attn_implementation="s2_attn")
    config = LongLoraConfig(r=2, context_length=320, init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(base, config).eval()


@pytest.mark.slow
def test_it_is_what_greedy_decoding_writes(adapted, tmp_path):
    """Of a real model with an adapter, and of its base: each passage beside `generate`."""
    subject = Subject.of(adapted, letter_tokenizer())
    start = torch.randint(4, (1, 30))
    # A text that the adapter wrote itself: it knows it as soon as it reads it from its beginning.
    own = adapted.generate(
        input_ids=start, attention_mask=torch.ones_like(start), max_new_tokens=290, do_sample=False, pad_token_id=0
    )[0]
    texts = "".join("abcd"[i] for i in own.tolist()), letters(5, 900)
    task = Memorised(corpus(tmp_path, "own", texts[0]), corpus(tmp_path, "other", texts[1]), passages=3)
    samples = {sample["key"]: sample for sample in (item.measure() for item in task.items(subject))}
    assert len(samples) == 2 * 3 * (1 + 3)  # the first text has room for one passage
    for text, name in zip((task.corpus, task.unseen), ("own", "other"), strict=True):
        for passage in task._passages(subject, text):
            for length, room in ((100, 50), (250, 200), (320, 270)):
                for variant in ("base", "adapter"):
                    most = min(room, 210) if variant == "base" else room  # the base's own window is 260
                    ids = passage.before[-most:].long()[None]
                    options = dict(
                        attention_mask=torch.ones_like(ids), max_new_tokens=50, do_sample=False, pad_token_id=0
                    )
                    with adapted.disable_adapter() if variant == "base" else nullcontext():
                        written = adapted.generate(input_ids=ids, **options)
                    is_same = written[0, -50:] == passage.after
                    sample = samples[f"memorised/{name}/{length}/{variant}/{passage.number:06d}"]
                    assert sample["tokens"] == ids.shape[1] and sample["variant"] == variant
                    assert sample["measures"][0][2] == float(is_same.all())
                    assert sample["measures"][1][2] == int(is_same.long().cumprod(0).sum())
    assert samples["memorised/own/320/adapter/000000"]["measures"][0][2] == 1.0


def test_the_command_line_names_both_texts(tmp_path):
    from peft_longlora.cli.main import make_parser
    from peft_longlora.cli.tasks import make_tasks

    def texts(*options):
        common = ["eval", "--model", "x", "--output", "y", "--tasks", "memorised"]
        (task,) = make_tasks(make_parser().parse_args([*common, *options]))
        return task.corpus.sources, task.unseen and task.unseen.sources, task.passages

    assert texts("--data", "a") == (["a"], None, 100)
    assert texts("--data", "a", "--unseen", "b", "--samples", "7") == (["a"], ["b"], 7)
    assert texts("--data", "b", "--trained-on", "a") == (["a"], ["b"], 100)
    assert texts("--data", "c", "--trained-on", "a", "--unseen", "b") == (["a"], ["b"], 100)
    with pytest.raises(ValueError, match="needs --data"):
        texts()


def test_the_card_shows_it(adapted, tmp_path):
    subject = Subject.of(adapted, letter_tokenizer())
    task = Memorised(corpus(tmp_path, "seen", letters(3, 600)), corpus(tmp_path, "unseen", letters(4, 600)), passages=4)
    evaluate(subject, [task], tmp_path / "out", show_progress=False)
    adapted.peft_config["default"].card = CardOptions(results=tmp_path / "out")
    adapted.save_pretrained(tmp_path / "adapter")
    lines = [line for line in (tmp_path / "adapter" / "README.md").read_text().splitlines() if "verbatim" in line]
    for data in ("seen", "unseen"):
        for variant in ("base", "adapter"):
            mine = [
                line for line in lines if f"| {data} |" in line and f"| {variant} |" in line and "tokens |" not in line
            ]
            assert len(mine) >= 3, lines  # after 50, 200 and 270 tokens


def test_text_that_was_trained_on_is_not_unseen(tmp_path):
    (tmp_path / "a.txt").write_text(letters(3, 600))
    (tmp_path / "copy.jsonl").write_text(json.dumps({"text": letters(3, 600)}))
    with pytest.raises(ValueError, match=r"unseen text holds '.*copy\.jsonl:1', which is the same text as '.*a\.txt'"):
        Memorised(Corpus(tmp_path / "a.txt"), Corpus(tmp_path / "copy.jsonl")).data()
