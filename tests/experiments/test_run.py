"""A study from its YAML to its lines: a tiny Llama, a few windows, the code that the GPU runs."""

import json
import math
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from peft import get_peft_model
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from peft_longlora import LongLoraConfig
from tests.experiments.conftest import STUDY

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments"))

import run
from books import Books, train_rows
from cells import read_study
from losses import output_layer, token_losses
from metrics import BEFORE, NEEDLE, QUESTION, passkeys, perplexity
from train import make_model, train

WINDOW, NATIVE, KEY_LENGTH, STEPS = 96, 32, 224, 6


@pytest.fixture(scope="module")
def lines(place) -> dict:
    """The lines of a whole run, by cell and budget."""
    command = [str(place / "tiny.yaml"), "--model", str(place / "base"), "--tokens", str(place), "--device", "cpu"]
    assert run.main([*command, "--results", str(place)]) == 1  # one cell is wrong, and said so
    found = [json.loads(line) for line in (place / "tiny.jsonl").read_text().splitlines()]
    assert run.main([*command, "--results", str(place)]) == 1
    assert len((place / "tiny.jsonl").read_text().splitlines()) == len(found)  # nothing is run twice
    return {(line["cell"], line["budget"]): line for line in found}


def test_every_cell_but_the_wrong_one_has_a_line(lines, place):
    assert list(lines) == [("full", "tokens"), ("last", "tokens"), ("untrained", "tokens"), ("last", "time")]
    trained = lines["full", "tokens"]
    assert trained["steps"] == len(trained["loss"]) == len(trained["step_seconds"]) == STEPS
    assert trained["loss"][-1] < trained["loss"][0]
    assert trained["settings"]["config"] == dict(
        r=4, lora_alpha=8, context_length=96, rope_type="yarn", attention_pattern="full"
    )
    last, full = lines["last", "tokens"], lines["full", "tokens"]
    share = 6 * 16 * 17 / (96 * 97)  # pairs in six groups of 16 over those in one of 96
    assert last["attention_share"] == pytest.approx((2 + 4 * share) / 6) and full["attention_share"] == 1
    longer = round(STEPS * full["mean_step_seconds"] / last["mean_step_seconds"])
    assert lines["last", "time"]["steps"] == longer
    assert last["loss"][0] != full["loss"][0] and {"torch", "transformers", "peft"} <= set(last["versions"])
    assert lines["untrained", "tokens"]["metrics"]["perplexity"] == pytest.approx(math.exp(4.57), rel=0.3)


def test_positions_that_skip_are_the_packages(place, tmp_path):
    content = yaml.safe_load(STUDY)
    shape = dict(attention_pattern="local", group_size=16, dense_every=2)
    content["cells"] = [dict(name="full", config=shape, training=dict(skip_positions=True))]
    (tmp_path / "skips.yaml").write_text(yaml.safe_dump(content))
    cell = read_study(tmp_path / "skips.yaml").cells[0]
    rows, losses = train_rows(Books.read(place, "train"), WINDOW, 2, cell.seed), []
    for skips in (True, False):
        cell.training["skip_positions"] = skips
        model = make_model(cell, str(place / "base"), "cpu")
        assert model.peft_config["default"].skip_positions is skips
        losses.append(train(cell, model, rows, "cpu")["loss"])
    assert losses[0][0] != losses[1][0] and losses[0][1] != losses[1][1]  # the first step skips, the second is dense


def test_compiled_blocks_train_as_plain_ones_and_are_not_compiled_when_measured(place, tmp_path, monkeypatch):
    """Steps that skip and dense ones; what is measured is the model's own code, at any length."""
    content, found, graphs = yaml.safe_load(STUDY), {}, {}
    shape = dict(attention_pattern="local", group_size=16, dense_every=3, skip_positions=True)
    content["budgets"] = ["tokens"]
    compile_block = torch.nn.Module.compile  # without a compiler of C++
    monkeypatch.setattr(torch.nn.Module, "compile", lambda block: compile_block(block, backend="aot_eager"))
    rows = train_rows(Books.read(place, "train"), WINDOW, STEPS, 0)
    for is_compiled in (False, True):
        content["cells"] = [dict(name="full", config=shape, training=dict(compile=is_compiled))]
        (tmp_path / "compiled.yaml").write_text(yaml.safe_dump(content))
        cell = read_study(tmp_path / "compiled.yaml").cells[0]
        counters.clear()
        found[is_compiled] = train(cell, make_model(cell, str(place / "base"), "cpu"), rows, "cpu")["loss"]
        graphs[is_compiled] = counters["stats"]["unique_graphs"]
    assert found[True] == pytest.approx(found[False], rel=1e-4)
    assert graphs[False] == 0 < graphs[True]
    counters.clear()
    command = [str(tmp_path / "compiled.yaml"), "--model", str(place / "base"), "--tokens", str(place)]
    assert run.main([*command, "--device", "cpu", "--results", str(tmp_path)]) == 0
    line = json.loads((tmp_path / "compiled.jsonl").read_text())
    assert line["loss"] == pytest.approx(found[False], rel=1e-4)
    assert counters["stats"]["unique_graphs"] == graphs[True]


def test_rows_in_parts_train_as_a_plain_loop_does(place, tmp_path):
    """Two sparse rows in two parts each at half the rate, then a whole dense one, and the same again."""
    shape = dict(attention_pattern="local", group_size=16, dense_every=5)
    training = dict(parts=2, part_rate=0.5, skip_positions=False)
    content = yaml.safe_load(STUDY)
    content["cells"] = [dict(name="full", config=shape, training=training)]
    (tmp_path / "parts.yaml").write_text(yaml.safe_dump(content))
    cell = next(one for one in read_study(tmp_path / "parts.yaml").cells if one.budget == "tokens")
    rows = train_rows(Books.read(place, "train"), WINDOW, STEPS, cell.seed)
    line = train(cell, make_model(cell, str(place / "base"), "cpu"), rows, "cpu")

    model = make_model(cell, str(place / "base"), "cpu").train()
    lora = [one for name, one in model.named_parameters() if one.requires_grad and "lora_" in name]
    other = [one for name, one in model.named_parameters() if one.requires_grad and "lora_" not in name]
    optimizer = torch.optim.AdamW([dict(params=lora), dict(params=other)], betas=(0.9, 0.95), weight_decay=0.0)
    found = []
    for number, row in enumerate(rows):
        ids = torch.tensor([row["input_ids"]])
        is_whole, losses = number in (2, 5), []
        for part, piece in enumerate([ids] if is_whole else ids.split(WINDOW // 2, dim=1)):
            at = number + part / 2  # rows so far: 2 of warm-up, decay over the last 1.2
            rate = min(1, (at + 1) / 2) * min(1, (STEPS - at) / (STEPS * 0.2)) * (1 if is_whole else 0.5)
            for group, each in zip(optimizer.param_groups, (2e-2, 5e-3), strict=True):
                group["lr"] = each * rate
            logits = model(input_ids=piece).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(logits, piece[0, 1:])
            loss.backward()
            torch.nn.utils.clip_grad_norm_([*lora, *other], 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        found.append(sum(losses) / len(losses))
    assert line["loss"] == pytest.approx(found, abs=2e-4)
    assert len(line["step_seconds"]) == STEPS
    assert line["attention_share"] == pytest.approx((2 + 4 * 6 * 16 * 17 / (96 * 97)) / 6)


def test_a_line_of_other_settings_is_not_taken_for_the_cells(lines, place, capsys):
    (place / "other").mkdir()
    changed = STUDY.replace("r: 4", "r: 8").replace("unknown, budgets", "full2, budgets").replace("no_such_field", "r")
    (place / "other" / "tiny.yaml").write_text(changed)
    arguments = [str(place / "other" / "tiny.yaml"), "--model", str(place / "base"), "--tokens", str(place)]
    assert run.main([*arguments, "--results", str(place), "--only", "full", "--device", "cpu"]) == 1
    assert "its line in the results holds" in capsys.readouterr().out


def test_a_run_of_another_study_serves_where_its_settings_are_the_same(lines, place, tmp_path):
    for name in ("other", "tiny"):
        (tmp_path / f"{name}.yaml").write_text(STUDY)
    (tmp_path / "tiny.jsonl").write_text((place / "tiny.jsonl").read_text())
    arguments = ["--model", str(place / "base"), "--tokens", str(place), "--device", "cpu", "--results", str(tmp_path)]
    assert run.main([str(tmp_path / "other.yaml"), *arguments, "--only", "last", "--budgets", "tokens"]) == 0
    copied = json.loads((tmp_path / "other.jsonl").read_text())
    wanted = {**lines["last", "tokens"], "study": "other", "run_in": "tiny"}
    assert copied == wanted


def test_no_cell_is_started_that_will_not_finish(place, tmp_path, capsys):
    command = [str(place / "tiny.yaml"), "--model", str(place / "base"), "--tokens", str(place), "--device", "cpu"]
    assert run.main([*command, "--results", str(tmp_path), "--stop-after", "20"]) == 0
    assert not list(tmp_path.iterdir()) and "no time" in capsys.readouterr().out


def test_the_time_of_a_cell_is_guessed_from_the_lines_of_all_studies(lines, place, tmp_path):
    cells = {cell.name: cell for cell in read_study(place / "tiny.yaml").cells if cell.budget == "tokens"}
    device = lines["full", "tokens"]["hardware"]["device"]
    assert run.guess_seconds(cells["full"], 10, tmp_path, device) == pytest.approx(15 + 1.1 * (10 * 0.7 + 45))
    other = {**lines["last", "tokens"], "study": "other", "mean_step_seconds": 3.0, "measuring_seconds": 2.0}
    slow = {
        **lines["full", "tokens"],
        "study": "other",
        "cell": "x",
        "mean_step_seconds": 5.0,
        "measuring_seconds": 4.0,
    }
    (tmp_path / "other.jsonl").write_text("\n".join(map(json.dumps, (other, slow))))
    assert run.guess_seconds(cells["last"], 10, tmp_path, device) == pytest.approx(15 + 1.1 * (30 + 4))  # its config
    assert run.guess_seconds(cells["unknown"], 10, tmp_path, device) == pytest.approx(
        15 + 1.1 * (50 + 4)
    )  # the slowest
    own = {**lines["last", "tokens"], "mean_step_seconds": 1.0, "measuring_seconds": 1.0}
    (tmp_path / "tiny.jsonl").write_text(json.dumps(own))
    assert run.guess_seconds(cells["last"], 10, tmp_path, device) == pytest.approx(15 + 1.1 * (10 + 1))
    assert run.guess_seconds(cells["last"], 10, tmp_path, "a GPU") == pytest.approx(15 + 1.1 * (10 * 0.7 + 45))


def test_an_unknown_field_is_named(place, tmp_path, capsys):
    command = [str(place / "tiny.yaml"), "--model", str(place / "base"), "--tokens", str(place), "--device", "cpu"]
    assert run.main([*command, "--results", str(tmp_path), "--only", "unknown"]) == 1
    assert "config has ['no_such_field'], which the installed" in capsys.readouterr().out


def adapted(place):
    """A model with an adapter that has trained, so that its copies differ from the base's weights."""
    model = AutoModelForCausalLM.from_pretrained(place / "base", attn_implementation="s2_attn", dtype=torch.float32)
    model = get_peft_model(model, LongLoraConfig(r=4, context_length=96, group_size=16, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_losses_and_gradients_are_the_models_own(place, mode, monkeypatch):
    monkeypatch.setattr("losses.PIECE", 40)  # rows of 96 in three pieces
    model, ids = adapted(place), torch.randint(3, 90, (1, WINDOW))
    getattr(model, mode)()
    wanted = model(input_ids=ids, labels=ids, use_cache=False).loss
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(wanted, trained)
    found = token_losses(model, ids).mean()
    torch.testing.assert_close(found, wanted)
    for one, other in zip(torch.autograd.grad(found, trained), gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_perplexity_and_keys_are_those_of_the_logits(place):
    model, books = adapted(place).eval(), Books.read(place, "validation")
    logs, native = [], []
    for book in (books.tokens[:250], books.tokens[250:]):
        for size, into in ((WINDOW, logs), (NATIVE, native)):
            for start in range(0, len(book) - size, size):
                ids = torch.tensor(book[start : start + size].astype(np.int64))
                scores = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
                into.append(-scores.gather(1, ids[1:, None])[:, 0])
    assert len(logs) == 2 + 4 and len(native) == 7 + 12
    found = perplexity(model, books, WINDOW, [0, 32, 96])
    rows = torch.stack(logs)
    assert found["all"] == pytest.approx(math.exp(rows.mean()), rel=1e-4)
    assert found["0-32"] == pytest.approx(math.exp(rows[:, :32].mean()), rel=1e-4)
    assert found["32-96"] == pytest.approx(math.exp(rows[:, 32:].mean()), rel=1e-4)
    assert perplexity(model, books, NATIVE, [0, 32])["all"] == pytest.approx(math.exp(torch.cat(native).mean()), 1e-4)


@torch.no_grad()
def test_keys_stand_at_even_depths_and_are_right_if_every_digit_is(place):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(place / "base")
    model, books, seen = adapted(place).eval(), Books.read(place, "validation"), []
    model.get_base_model().register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"][0]), with_kwargs=True
    )
    found = passkeys(model, tokenizer, books, KEY_LENGTH, 4, random.Random(0))
    rows, losses = list(seen), []
    assert len(rows) == 4 and found["of"] == 4
    for number, ids in enumerate(rows):
        text = "".join(tokenizer.convert_ids_to_tokens(ids.tolist()))
        key = text[-5:]
        assert len(text) == KEY_LENGTH - 2 and key.isdigit() and text.count(key) == 3
        hay = KEY_LENGTH - 2 - len(BEFORE + NEEDLE.format(key=key) + QUESTION + key)
        assert text.index(NEEDLE.format(key=key)) == len(BEFORE) + int(hay * (number + 0.5) / 4)
        scores = model(input_ids=ids[None]).logits[0, -6:-1].log_softmax(-1)
        losses.append(-scores.gather(1, ids[-5:, None]).sum().item())
    assert found["loss"] == pytest.approx(sum(losses) / 4, rel=1e-4)
    assert found["right"] == 0  # a random model; one that knows four of the five digits, then all of them:
    for known, right in ((4, 0), (5, 4)):
        head = output_layer(model)
        hook = head.register_forward_hook(lambda module, args, out, n=known: _knowing(out, seen[-1][-5:], n))
        assert passkeys(model, tokenizer, books, KEY_LENGTH, 4, random.Random(0))["right"] == right
        hook.remove()


def _knowing(logits, targets, count):
    """Logits (1, 5, V) that give `count` of the targets."""
    if logits.shape[1] == 5:
        logits = logits.clone()
        logits[0, torch.arange(count), targets[:count]] = 1e4
    return logits


def test_rows_are_windows_of_books_and_the_same_for_a_seed(place):
    books = Books.read(place, "train")
    rows = train_rows(books, WINDOW, 20, seed=1)
    assert rows[:5] == train_rows(books, WINDOW, 5, seed=1) != train_rows(books, WINDOW, 5, seed=2)
    whole = books.tokens.tolist()
    for row in rows:  # of the second or the third book, never across their border
        starts = [i for i in range(90, 890 - WINDOW + 1) if whole[i : i + WINDOW] == row["input_ids"]]
        assert any(i + WINDOW <= 390 or i >= 390 for i in starts)
    assert train_rows(books, WINDOW, 5, seed=1, distinct=2) == [*rows[:2], *rows[:2], rows[0]]
    with pytest.raises(ValueError, match="the longest training book has 500"):
        train_rows(books, 500, 1, seed=0)


def test_cells_come_in_the_order_of_importance(place):
    text = STUDY.replace("seeds: [0]", "seeds: [0, 1]")
    (place / "two.yaml").write_text(text)
    keys = [cell.key for cell in read_study(place / "two.yaml").cells]
    assert keys[:5] == [("full", "tokens", 0), ("unknown", "tokens", 0), ("last", "tokens", 0),
                        ("untrained", "tokens", 0), ("last", "time", 0)]  # fmt: skip
    assert [key[2] for key in keys] == [0] * 5 + [1] * 5
    for change, error in (
        ("seeds: [0]\nsed: 1", "which nothing reads"),
        ("seeds: [0]\nreference: none", "must be one of the cells"),
    ):
        (place / "bad.yaml").write_text(STUDY.replace("reference: full\n", "").replace("seeds: [0]", change))
        with pytest.raises(ValueError, match=error):
            read_study(place / "bad.yaml")
    (place / "bad.yaml").write_text(STUDY.replace("2.0e-2", "2e-2"))
    with pytest.raises(ValueError, match="with the dot"):
        read_study(place / "bad.yaml")
