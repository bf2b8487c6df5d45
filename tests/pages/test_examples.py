"""Every example, run as a user runs it on tiny settings, its numbers compared with what they should be."""

import gzip
import json
import re
import runpy
import sys
import sysconfig
import warnings
from pathlib import Path

import datasets
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from peft_longlora import memory
from peft_longlora.data import read_records, tokenize_records
from peft_longlora.memory import checkpoint_blocks
from peft_longlora.memory.advice import state_of
from tests.helpers.paths import EMBEDDED, EXAMPLES
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny_base import prose, save_base


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Run an example in this process; returns what it printed. A dependency's deprecation on the screen is an error."""
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def run(script: str, *args) -> str:
        monkeypatch.setattr(sys, "argv", [script, *map(str, args)])
        capsys.readouterr()
        with warnings.catch_warnings(record=True) as shown:
            warnings.simplefilter("default")
            runpy.run_path(str(EXAMPLES / script), run_name="__main__")
        assert not [str(w.message) for w in shown if issubclass(w.category, FutureWarning)]
        return capsys.readouterr().out

    return run


def number_after(text: str, output: str) -> float:
    return float(re.search(re.escape(text) + r"\D*?: (\d+\.\d+)", output)[1])


def load(base: Path, adapter: Path) -> PeftModel:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, adapter).eval()


@torch.no_grad()
def mean_loss(model, rows: list[list[int]], labels: list[list[int]] | None = None) -> float:
    """The mean over rows of each row's mean loss, which is what an evaluation with batches of one row reports."""
    losses = []
    for ids, targets in zip(rows, labels or rows, strict=True):
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(targets[1:])).item())
    return sum(losses) / len(losses)


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for seed in range(3):
        (folder / f"{seed}.txt.gz").write_bytes(gzip.compress(prose(500, seed).encode()))
    (folder / "more.jsonl").write_text("".join(json.dumps({"text": prose(200, s)}) + "\n" for s in (3, 4)))
    return folder


EXTEND = ("--context-length", 256, "--accumulation", 1, "--learning-rate", 1e-2, "--warmup-steps", 1)


@pytest.mark.slow
def test_extend_context_then_merge_and_generate(run, base, text_folder, tmp_path):
    held_out = tmp_path / "held_out.txt"
    held_out.write_text(prose(600, 9))
    adapter = tmp_path / "adapter"
    output = run(
        "extend_context.py", "--model", base, "--data", text_folder, "--eval-data", held_out, "--eval-windows", 2,
        "--max-steps", 6, "--output", adapter, *EXTEND,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = tokenizer(held_out.read_text())["input_ids"]
    model = load(base, adapter)
    assert model.peft_config["default"].context_length == 256
    after = number_after("Loss after", output)
    assert after == pytest.approx(mean_loss(model, [ids[:256], ids[256:512]]), abs=2e-4)
    assert after < number_after("Loss before", output) - 0.1

    merged = tmp_path / "merged"
    prompt = prose(150, 5)  # longer than the base's window
    output = run(
        "merge_and_generate.py", "--adapter", adapter, "--output", merged, "--prompt", prompt, "--max-new-tokens", 5
    )
    assert "The same 5 new tokens as with the adapter." in output
    plain = LlamaForCausalLM.from_pretrained(merged).eval()
    inputs = torch.tensor([tokenizer(prompt)["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(plain(inputs).logits, model(inputs).logits, rtol=1e-3, atol=1e-3)
    tokens = inputs
    for _ in range(5):  # greedy, without generate()
        with torch.no_grad():
            tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], 1)
    assert tokenizer.decode(tokens[0], skip_special_tokens=True) in output


def test_extend_context_resumes_where_it_stopped(run, base, text_folder, tmp_path):
    """Two steps, a stop and two more give the adapter of four steps without a stop."""
    common = ("--model", base, "--data", text_folder, "--save-steps", 2, *EXTEND)
    run("extend_context.py", *common, "--max-steps", 4, "--output", tmp_path / "whole")
    run("extend_context.py", *common, "--max-steps", 2, "--output", tmp_path / "parts")
    run("extend_context.py", *common, "--max-steps", 4, "--output", tmp_path / "parts", "--resume")
    whole, parts = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "parts"))
    two = load_file(tmp_path / "parts" / "checkpoint-2" / "adapter_model.safetensors")
    assert whole.keys() == parts.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, rtol=0, atol=1e-6)
    assert any(not torch.allclose(two[name], tensor, atol=1e-4) for name, tensor in whole.items())


def test_extend_context_names_a_bad_document(run, base, tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": prose(300, 0)}) + "\n" + json.dumps({"text": ""}) + "\n")
    with pytest.raises(SystemExit):
        run("extend_context.py", "--model", base, "--data", path, "--output", tmp_path / "out", *EXTEND)
    assert "a.jsonl:2: 'text' is empty" in capsys.readouterr().err


DATA = ("--data", "{data}")
BAD_OPTIONS = {  # what is said, and the command line that brings it about
    "extend_context.py": [
        ("--context-length: '0' is not a number of 1 or more", ["--model", "{base}", *DATA, "--context-length", 0]),
        ("none.txt: no such file or folder", ["--model", "{base}", "--data", "none.txt"]),
        ("no/such/model", ["--model", "no/such/model", *DATA]),
        ("group_size=31 ", ["--model", "{base}", *DATA, "--group-size", 31]),
        ("rope_type='cubic' ", ["--model", "{base}", *DATA, "--rope-type", "cubic"]),
        ("is a file. Give a folder", ["--model", "{base}", *DATA, "--output", "{data}"]),
        ("there is no whole checkpoint in {out}", ["--model", "{base}", *DATA, "--output", "{out}", "--resume"]),
        ("argument --rope-parameters: invalid loads value", ["--model", "{base}", *DATA, "--rope-parameters", "{"]),
    ],
    "sft_longalpaca.py": [
        ("a.txt: records come as .jsonl, .json or .parquet", ["--model", "{base}", *DATA]),
        ("--learning-rate: '-1' is not a number above 0", ["--model", "{base}", *DATA, "--learning-rate=-1"]),
        ("--eval-records 9 of 2 rows", ["--model", "{base}", "--data", "{records}", "--eval-records", 9]),
    ],
    "long_sequence.py": [
        (
            "--sequence-parallel: 'two' is",
            ["--model", "{base}", *DATA, "--context-length", 64, "--sequence-parallel", "two"],
        ),
        ("--eval-rows 99 of 4 rows", ["--model", "{base}", *DATA, "--context-length", 64, "--eval-rows", 99]),
    ],
    "merge_and_generate.py": [
        ("no/adapter", ["--adapter", "no/adapter"]),
        ("none.txt", ["--adapter", "{base}", "--prompt-file", "none.txt"]),
        ("invalid choice: 'float8'", ["--adapter", "{base}", "--dtype", "float8"]),
    ],
    "quickstart.py": [
        ("--max-steps: '1.5' is not a number", ["--max-steps", 1.5]),
        ("{out}", ["--evaluate", "--output", "{out}"]),
    ],
    "pretrain_tiny.py": [
        ("under {out}: pass the folder of a complete standard library", ["--stdlib", "{out}"]),
        ("--vocab-size 9: ", ["--vocab-size", 9]),
    ],
}


@pytest.mark.parametrize("script, said, args", [(s, *case) for s, cases in BAD_OPTIONS.items() for case in cases])
def test_bad_options_end_with_one_line_and_code_2_before_a_model_is_there(
    run, monkeypatch, capsys, base, tmp_path, script, said, args
):
    (tmp_path / "a.txt").write_text(prose(200, 0))
    records = [{"instruction": prose(9, n), "output": prose(6, 1)} for n in range(2)]
    (tmp_path / "a.json").write_text(json.dumps(records))
    names = {"base": base, "data": tmp_path / "a.txt", "records": tmp_path / "a.json", "out": tmp_path / "out"}

    def fill(text) -> str:
        return re.sub(r"\{(\w+)\}", lambda found: str(names[found[1]]), str(text))

    def no_model(*args, **kwargs):
        raise AssertionError("a model was made")

    for name in ("from_pretrained", "_from_config", "__init__"):
        monkeypatch.setattr(LlamaForCausalLM, name, no_model)
    with pytest.raises(SystemExit) as end:
        run(script, *map(fill, args))
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == 2
    assert fill(said) in lines[-1] and lines[-1].startswith(f"{script}: error: ")
    assert not [line for line in lines if "Traceback" in line or "usage:" in line]


@pytest.mark.parametrize(("packing", "chat"), [(True, True), (False, False)], ids=["packed, chat", "llama-2"])
def test_sft_longalpaca(run, base, tmp_path, packing, chat):
    if chat:
        tokenizer = AutoTokenizer.from_pretrained(base)
        tokenizer.chat_template = (
            "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>{% endif %}"
        )
        tokenizer.save_pretrained(tmp_path / "tokenizer")
        AutoModelForCausalLM.from_pretrained(base).save_pretrained(tmp_path / "tokenizer")
        base = tmp_path / "tokenizer"
    lengths = [20, 60, 100, 150, 200, 30, 400, 50]  # the seventh is longer than the window
    records = [{"instruction": prose(n, n), "input": "", "output": prose(6, 1)} for n in lengths]
    if packing:
        data = tmp_path / "records.jsonl.gz"
        data.write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in records).encode()))
    else:
        data = tmp_path / "records.json"
        data.write_text(json.dumps(records, indent=1))
    adapter = tmp_path / "adapter"
    output = run(
        "sft_longalpaca.py", "--model", base, "--data", data, "--eval-records", 2, "--max-length", 256, "--max-steps",
        4,
        "--learning-rate", 1e-2, "--accumulation", 1, "--batch-size", 2, "--warmup-steps", 1, "--output", adapter,
        *(() if packing else ("--no-packing",)),
    )  # fmt: skip
    assert "8 read, " in output and "6 rows to train on, 2 held out" in output
    rows = list(tokenize_records(read_records(data), AutoTokenizer.from_pretrained(base), 256))[-2:]
    assert [len(row["input_ids"]) == 256 for row in rows] == [True, False]
    expected = mean_loss(load(base, adapter), [r["input_ids"] for r in rows], [r["labels"] for r in rows])
    after = number_after("Loss of held-out answers after", output)
    assert after == pytest.approx(expected, abs=2e-4)
    assert after < number_after("Loss of held-out answers before", output) - 0.1


@pytest.mark.parametrize("script", ["extend_context.py", "sft_longalpaca.py"])
def test_on_a_gpu_fit_memory_chooses_what_is_computed_again(run, base, text_folder, tmp_path, monkeypatch, script):
    """And not the Trainer. Without a GPU to measure on, the choice is made here."""
    import command_line

    asked = []

    def choose(model, length, *, loss=None, accumulates=False):
        ids = torch.arange(3, 9)[None]
        own = model(input_ids=ids, labels=ids).loss
        torch.testing.assert_close(own if loss is None else loss(model, ids), own)
        assert not model.get_base_model().is_gradient_checkpointing
        checkpoint_blocks(model, free=1)
        asked.append((length, loss is not None, accumulates, state_of(model)["free"]))
        return "the plan"

    monkeypatch.setattr(command_line, "is_fitted", lambda tokens: tokens > 256)
    monkeypatch.setattr(memory, "fit_memory", choose)
    data = tmp_path / "records.json"
    data.write_text(json.dumps([{"instruction": prose(9, n), "output": prose(6, 1)} for n in range(9)]))
    is_sft = script.startswith("sft")
    window = ("--max-length", 256, "--data", data) if is_sft else ("--context-length", 256, "--data", text_folder)
    common = ("--model", base, "--max-steps", 1, "--batch-size", 2, "--output", tmp_path / "adapter", *window)
    output = run(script, *common, "--accumulation", 1 + is_sft)
    assert "the plan\n" in output and asked == [(512, is_sft, is_sft, 1)]


def run_by_rank(script: str, args: list) -> None:
    sys.argv = [script, *map(str, args)]
    sys.path.insert(0, str(EXAMPLES))
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")


@pytest.mark.slow
def test_long_sequence_trains_the_same_adapter_on_one_process_and_on_two(base, tmp_path):
    (tmp_path / "a.txt").write_text(prose(1200, 0))
    common = (
        "--model", base, "--data", tmp_path / "a.txt", "--context-length", 250, "--group-size", 64, "--max-steps", 2,
        "--learning-rate", 1e-2, "--eval-rows", 2,
    )  # fmt: skip
    for ranks in (1, 2):
        run_ranks(ranks, run_by_rank, "long_sequence.py", [*common, "--output", tmp_path / str(ranks)])
    alone, shared = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("1", "2"))
    assert alone.keys() == shared.keys()
    for name, tensor in alone.items():
        torch.testing.assert_close(shared[name], tensor, rtol=0, atol=2e-4)  # Adam's first steps are signs
    assert any(tensor.abs().max() > 5e-3 for name, tensor in alone.items() if "lora_B" in name)


@pytest.mark.slow
def test_quickstart(run, monkeypatch, tmp_path):
    """On a window of 640 tokens, two steps and little text. It compares its adapter with a fresh process's itself."""
    stdlib_text = __import__("stdlib_text")  # examples/ is on the path while a test uses `run`
    library = Path(sysconfig.get_paths()["stdlib"])
    for name in (*stdlib_text.HELD_OUT, "ast.py", "doctest.py"):
        (tmp_path / name).symlink_to(library / name)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    output = run(
        "quickstart.py", "--context-length", 640, "--max-steps", 2, "--windows", 1, "--output", tmp_path / "out"
    )
    assert (tmp_path / "out" / "perplexity.png").read_bytes().startswith(b"\x89PNG")
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    texts = [(library / name).read_text(encoding="utf-8") for name in stdlib_text.HELD_OUT]
    windows = torch.tensor([tokenizer(text)["input_ids"][:640] for text in texts])
    models = [AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32), load(EMBEDDED, tmp_path / "out")]
    printed = [float(x) for x in re.search(r"512-640 +([\d.]+) +([\d.]+) +([\d.]+)", output).groups()]
    for model, perplexity in zip(models, (printed[0], printed[2]), strict=True):
        labels = windows.clone()
        labels[:, :512] = -100  # the loss of predicting tokens 512 ... 639
        with torch.no_grad():
            assert perplexity == pytest.approx(model(windows, labels=labels).loss.exp().item(), rel=1e-3)
    assert printed[0] > 1.3 * printed[2]  # beyond its window the base does not know where it is


@pytest.mark.slow
def test_pretrain_tiny(run, tmp_path):
    for seed, name in enumerate((*__import__("stdlib_text").HELD_OUT, "train_a.py", "train_b.py")):
        (tmp_path / name).write_text(prose(2700, seed))
    output = run(
        "pretrain_tiny.py", "--stdlib", tmp_path, "--output", tmp_path / "out", "--vocab-size", 300, "--steps", 10,
        "--batch-size", 4, "--warmup-steps", 2, "--device", "cpu",
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    texts = [(tmp_path / name).read_text() for name in __import__("stdlib_text").HELD_OUT]
    windows = torch.tensor([tokenizer(text)["input_ids"][:4096] for text in texts])
    assert len(tokenizer) == 300 and model.config.max_position_embeddings == 512
    with torch.no_grad():
        loss = model(windows[:, :512], labels=windows[:, :512]).loss.item()
    assert loss < 5.0 < torch.tensor(300.0).log().item()  # log 300: what guessing costs
    assert f"{len(windows)} modules held out" in output
