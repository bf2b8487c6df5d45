"""`longlora eval` as a user types it: numbers, cards, what has no room, and several processes."""

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from peft_longlora.eval import Perplexity, Results, compare, evaluate, load_subject
from tests.helpers.evaluated import P, Small, letter_subject, letters, longlora, save_adapter, save_base, save_texts
from tests.helpers.paths import ROOT


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return save_base(tmp_path_factory.mktemp("model") / "base")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, base) -> str:
    return save_adapter(tmp_path_factory.mktemp("adapter"), base)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    return save_texts(tmp_path_factory.mktemp("text") / "modules")


@pytest.mark.usefixtures("no_plots")
def test_a_length_that_runs_out_of_memory_is_left_out_and_the_rest_goes_on(tmp_path, monkeypatch, capsys):
    """Whatever comes after it is measured; the same command goes on with it, and is complete without it."""
    model, corpus = Small(P), letters(tmp_path)
    (tmp_path / "letters" / "0.txt").write_text("abca")  # fits whatever the window is: half of a length is no result
    monkeypatch.setattr("peft_longlora.eval.load_subject", lambda *_, **__: letter_subject(model))

    def run(lengths: str) -> tuple[int, Results, str]:
        command = ["eval", "--model", "small", "--tasks", "perplexity", "--data", tmp_path / "letters"]
        command += ["--protocol", "both", "--stride", 4, "--lengths", lengths, "--output", tmp_path / "out"]
        code = longlora(*command)
        printed = capsys.readouterr()
        assert printed.out.endswith("out: results.json, results.md, samples.jsonl\n"), "there are no plots here"
        return code, Results.load(tmp_path / "out"), printed.err.splitlines()[-1]

    code, results, said = run("8,17,16,24")
    names = [f"perplexity {n} ({protocol})" for protocol in ("longlora", "documents") for n in (17, 24)]
    assert code == 3 and results.unmeasured == names and all(name in said for name in names)
    assert [(row.protocol, row.length) for row in results.results if row.metric == "perplexity"] == [
        (protocol, length) for protocol in ("documents", "longlora") for length in (8, 16)
    ]
    assert {row.length for row in results.details} == {8, 16}
    assert f"Out of memory, and so not measured: {', '.join(names)}." in results.notes
    finished = (tmp_path / "out" / "samples.jsonl").read_text()
    assert '"perplexity/documents/24/base/000000/000000"' in finished, "what did fit is kept"
    code, shorter, _ = run("8,16")
    assert code == 0 and shorter.results == results.results and not shorter.unmeasured
    [note] = [note for note in shorter.notes if "did not ask for" in note]
    assert "perplexity 24 (documents): 1)" in note, "what did fit of it"
    assert (tmp_path / "out" / "samples.jsonl").read_text() == finished, "nothing is measured twice, nothing lost"
    model.has_room = True
    code, whole, _ = run("8,16,17,24")
    assert code == 0 and len(whole.results) == 12 and not whole.unmeasured
    assert (tmp_path / "out" / "samples.jsonl").read_text().startswith(finished)
    tasks = [Perplexity(corpus, [8, 16, 17, 24], p, stride=4) for p in ("longlora", "documents")]
    plain = evaluate(letter_subject(), tasks, tmp_path / "plain")
    assert whole.results == plain.results and whole.details == plain.details


def test_a_model_without_room_ends_with_code_2(tmp_path, monkeypatch, capsys):
    def load(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("peft_longlora.eval.load_subject", load)
    assert longlora("eval", "--model", "large", "--tasks", "cost", "--output", tmp_path / "out") == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("longlora eval: error: The model does not fit into memory (CUDA out of memory.")


@pytest.mark.usefixtures("no_plots")
def test_one_command_measures_the_base_too(tmp_path, base, adapter, text, capsys):
    """Its numbers are those of a run of the base alone; a run without the base is continued, not repeated."""
    common = ["--data", text, "--lengths", "256,384", "--stride", 0, "--dtype", "float32", "--device", "cpu"]
    common += ["--tasks", "perplexity,passkey", "--seeds", 1, "--depths", "50"]
    command = ["eval", "--model", base, "--adapter", adapter, *common, "--output", tmp_path / "both"]
    assert longlora("eval", "--model", base, *common, "--output", tmp_path / "base") == 0
    assert longlora(*command) == 0
    alone = Results.load(tmp_path / "both")
    assert {row.variant for row in alone.results} == {"adapter"}
    assert longlora(*command, "--with-base") == 0
    out = capsys.readouterr().out
    both, plain = Results.load(tmp_path / "both"), Results.load(tmp_path / "base")
    assert not both.unmeasured and "did not ask for" not in " ".join(both.notes)
    for rows, kind in ((both.results, "results"), (both.details, "details")):
        assert [row for row in rows if row.variant == "adapter"] == getattr(alone, kind)
        assert [row for row in rows if row.variant == "base"] == getattr(plain, kind)
    assert all("passkey" not in label or "base" in label for label in both.speed), "nothing is measured twice"
    table = [
        [part.strip() for part in line.split("|")] for line in out.splitlines() if line.startswith("| perplexity ")
    ]
    values = {row.variant: row for row in both.results if (row.metric, row.length) == ("perplexity", 256)}
    [line] = [line for line in table if line[4:6] == ["256", "perplexity"] and len(line) == 10]
    assert line[6].startswith(f"{values['base'].value:.5g}† [") and line[7].startswith(
        f"{values['adapter'].value:.5g} ["
    )
    native = both.model["native_window"]
    assert f"Above the base's window of {native} tokens: 256, 384 tokens (marked †)." in both.notes
    differences, _ = compare(tmp_path / "base", tmp_path / "both")
    assert differences and all(d.second.variant == "adapter" for d in differences)


@pytest.mark.parametrize("more", [[], ["--adapter", "{adapter}", "--with-base"]])
def test_a_length_too_short_for_a_prompt_is_named_before_the_model_is_loaded(
    tmp_path, base, adapter, monkeypatch, capsys, more
):
    monkeypatch.setattr("peft_longlora.eval.load_subject", lambda *_, **__: pytest.fail("loaded"))
    command = [
        "eval",
        "--model",
        base,
        "--tasks",
        "passkey,ruler_vt",
        "--lengths",
        "300,40k",
        "--output",
        tmp_path / "x",
    ]
    assert longlora(*command, *(word.format(adapter=adapter) for word in more)) == 2
    [line] = capsys.readouterr().err.splitlines()
    room = 300 - 30  # RULER's answers to vt have 30 tokens
    assert re.search(rf"ruler_vt at 300 tokens: The prompt alone has \d+ tokens, but .* room for {room} beside", line)
    assert line.endswith("Use longer --lengths") and not (tmp_path / "x").exists()


def test_a_base_beside_itself_is_refused(tmp_path, base, text, capsys):
    command = ["eval", "--model", base, "--data", text, "--with-base", "--output", tmp_path / "out"]
    assert longlora(*command) == 2
    assert "--with-base needs --adapter or --context-length" in capsys.readouterr().err


def test_adapter_and_base_from_the_command_line(tmp_path, base, adapter, text, capsys):
    """Perplexity equals the plain computation with transformers and peft; a card shows it; compare finds the base."""
    common = ["--data", text, "--lengths", "128,512", "--stride", 128, "--dtype", "float32", "--device", "cpu"]
    command = ["eval", "--model", base, "--tasks", "perplexity,native,passkey", "--seeds", 1, "--depths", "0,100"]
    assert longlora(*command, *common, "--adapter", adapter, "--output", tmp_path / "tuned", "--card") == 0
    found = Results.load(tmp_path / "tuned").results
    rows = {(r.task, r.variant, r.length): r for r in found if r.metric != "bits_per_byte"}

    subject = load_subject(base, adapter, dtype="float32", device="cpu")
    total = n = 0
    for path in sorted(Path(text).iterdir()):
        ids = torch.tensor([subject.tokenizer(path.read_text())["input_ids"]])
        for start in range(0, ids.shape[1] - 1, 128):
            part = ids[:, start : start + 129]
            with torch.no_grad():
                logits = subject.model(part[:, :-1]).logits[0]
            total += torch.nn.functional.cross_entropy(logits, part[0, 1:], reduction="sum").item()
            n += part.shape[1] - 1
    assert rows["perplexity", "adapter", 128].value == pytest.approx(math.exp(total / n), rel=1e-4)
    assert rows["perplexity", "adapter", 128].tokens == n
    assert rows["native", "base", 64].value != rows["native", "adapter", 64].value
    assert [rows["perplexity", "adapter", k].beyond_window for k in (128, 512)] == [False, True]
    assert "512†" in (tmp_path / "tuned" / "results.md").read_text()
    card = ModelCard.load(Path(adapter) / "README.md")
    shown = {(r.task_name, r.metric_type): r.metric_value for r in card.data.eval_results if "128" in r.metric_name}
    assert shown["perplexity", "perplexity"] == rows["perplexity", "adapter", 128].value
    assert "![passkey.png](passkey.png)" in card.text
    page = (ROOT / "docs" / "evaluation.md").read_text()
    files = {path.name for path in (tmp_path / "tuned").iterdir() if path.suffix != ".png"} | {"samples-0.jsonl"}
    assert len(files) > 5 and not {name for name in files if f"| `{name}`" not in page}

    capsys.readouterr()
    command[command.index("--tasks") + 1] = "perplexity"
    fewer = ["--data", text, "--lengths", 128, "--stride", 128, "--device", "cpu", "--adapter", adapter, "--card"]
    assert longlora(*command, *fewer, "--output", tmp_path / "fewer") == 0
    [said] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("No longer on the card")]
    assert "perplexity documents modules 512 adapter" in said and "passkey.png" in said
    assert "modules 128 adapter" not in said and "perplexity_documents.png" not in said
    assert Results.load(tmp_path / "fewer").model["dtype"] == "float32"

    assert longlora(*command, *common, "--output", tmp_path / "plain") == 0
    out = capsys.readouterr().out
    assert "documents are shorter than the window and were scored whole" in out
    assert longlora("compare", tmp_path / "plain", tmp_path / "tuned", "--output", tmp_path / "pair") == 0
    found, _ = compare(tmp_path / "plain", tmp_path / "tuned" / "results.json")
    headline = next(
        d
        for d in found
        if (d.first.task, d.first.metric, d.first.group, d.first.length) == ("perplexity", "perplexity", None, 128)
    )
    assert headline.is_paired and headline.first.variant == "base" and headline.second.variant == "adapter"
    # rows are rounded to six digits, of perplexities above 1000 to the second place
    assert headline.value == pytest.approx(headline.second.value - headline.first.value, abs=0.011)
    assert headline.low <= headline.value <= headline.high
    assert f"{headline.value:+.5g}" in capsys.readouterr().out
    assert (tmp_path / "pair" / "compare.png").stat().st_size > 10_000


@pytest.mark.usefixtures("no_plots")
def test_sparse_attention_and_rescaled_rope_are_measured_as_told(tmp_path, base, text):
    rows = {}
    for name, options in {
        "dense": [],
        "sparse": ["--attention", "sparse"],
        "yarn": ["--context-length", "256"],
        "linear": ["--context-length", "1k", "--rope-type", "linear"],
    }.items():
        out = tmp_path / name
        command = ["eval", "--model", base, "--tasks", "perplexity", "--data", text, "--lengths", 64, "--output", out]
        assert longlora(*command, "--dtype", "float32", *options) == 0
        rows[name] = Results.load(out)
    values = {name: results.results[0].value for name, results in rows.items()}
    assert len(set(values.values())) == 4
    assert rows["sparse"].model["attention"] == "sparse (s2, groups of 16)"
    assert rows["linear"].results[0].variant == "rescaled" and rows["linear"].model["window"] == 1024


@pytest.mark.slow
def test_two_processes_give_the_result_of_one(tmp_path, base, text):
    found = []
    for count in (1, 2):
        out = tmp_path / str(count)
        # "multi_gpu" is accelerate's word for several processes; --device cpu keeps them off any GPU
        launch = ["-m", "accelerate.commands.launch", "--num_processes", str(count), "--num_machines", "1"]
        launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1"]
        launch += ["--multi_gpu", "--main_process_port", "0"] if count > 1 else ["--cpu"]
        command = ["-m", "peft_longlora.cli", "eval", "--model", base, "--data", text, "--dtype", "float32"]
        command += ["--tasks", "perplexity,passkey", "--lengths", "128,192", "--protocol", "both", "--output", str(out)]
        command += ["--device", "cpu", "--max-windows", "5"]
        run = subprocess.run([sys.executable, *launch, *command], capture_output=True, text=True, timeout=300)
        assert run.returncode == 0, run.stderr
        results = Results.load(out)
        assert results.hardware["processes"] == count
        found.append((results.results, results.details))
    assert found[0] == found[1]
