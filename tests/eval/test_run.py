"""Whole runs: results, resumption, sharing, the command line and its refusals, cards and comparisons."""

import json
import math
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer

from peft_longlora.cli import compare as compare_command
from peft_longlora.cli import main as cli
from peft_longlora.eval import Corpus, Passkey, Perplexity, Processes, Results, Topics, compare, evaluate
from peft_longlora.eval.subject import Subject, load_subject
from tests.helpers.answering_models import Bigrams, letter_tokenizer, read_passkey, scripted_subject
from tests.helpers.evaluated import save_adapter, save_base, save_texts
from tests.helpers.tiny import extend, make

P = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.1, 0.1], [0.25, 0.25, 0.25, 0.25], [0.05, 0.05, 0.45, 0.45]])


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return save_base(tmp_path_factory.mktemp("model") / "base")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, base) -> str:
    return save_adapter(tmp_path_factory.mktemp("adapter"), base)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    return save_texts(tmp_path_factory.mktemp("text") / "modules")


def scored(path) -> list:
    results = Results.load(path)
    return results.results + results.details


def letters(tmp_path) -> Corpus:
    folder = tmp_path / "letters"
    folder.mkdir(exist_ok=True)
    for i in range(5):
        (folder / f"{i}.txt").write_text("abdcadbbcda" * (i + 3))
    return Corpus(folder)


# -- running -------------------------------------------------------------------------------------------------------


def tasks_of(tmp_path) -> list:
    return [Perplexity(letters(tmp_path), [8, 32]), Perplexity(letters(tmp_path), [8], "longlora", stride=4)]


def test_a_killed_run_goes_on_where_it_stopped(tmp_path, monkeypatch):
    """Every window is measured once over both runs, and the result is that of a run in one go."""
    whole = evaluate(Subject.of(Bigrams(P), letter_tokenizer()), tasks_of(tmp_path), tmp_path / "whole")
    measured = []
    plain = Perplexity._finish

    def dies(self, subject, key, *arguments):
        if len(measured) == 20:
            raise KeyboardInterrupt
        measured.append(key)
        return plain(self, subject, key, *arguments)

    monkeypatch.setattr(Perplexity, "_finish", dies)
    subject = Subject.of(Bigrams(P), letter_tokenizer())
    with pytest.raises(KeyboardInterrupt):
        evaluate(subject, tasks_of(tmp_path), tmp_path / "out")
    assert not (tmp_path / "out" / "results.json").exists()
    with (tmp_path / "out" / "samples-0.jsonl").open("a") as file:
        file.write('{"key": "perplexity/docum')  # the kill came while a line was written
    measured.insert(0, None)  # so that the next run passes the twentieth
    again = evaluate(subject, tasks_of(tmp_path), tmp_path / "out")
    assert (
        len(measured) - 1 == len(set(measured) - {None}) == len((tmp_path / "out" / "samples.jsonl").open().readlines())
    )
    assert again.results == whole.results and again.details == whole.details
    finished = evaluate(subject, tasks_of(tmp_path), tmp_path / "out")
    assert finished.results == whole.results and len(measured) - 1 == len(set(measured) - {None})


def test_a_window_is_started_before_the_one_before_it_is_finished(tmp_path, monkeypatch):
    """But never across lengths or tasks, whose clocks and settings differ."""
    order = []
    for step in ("_start", "_finish"):
        plain = getattr(Perplexity, step)

        def note(self, subject, key, *arguments, plain=plain, step=step):
            order.append((step, key))
            return plain(self, subject, key, *arguments)

        monkeypatch.setattr(Perplexity, step, note)
    (tmp_path / "a.txt").write_text("abcd" * 6)
    task = Perplexity(Corpus(tmp_path / "a.txt"), [8, 16], stride=0)
    evaluate(Subject.of(Bigrams(P), letter_tokenizer()), [task], tmp_path / "out")
    shown = [f"{step[1]}{key.split('/')[2]}.{int(key[-1])}" for step, key in order]
    assert shown == ["s8.0", "s8.1", "f8.0", "s8.2", "f8.1", "f8.2", "s16.0", "s16.1", "f16.0", "f16.1"]


class Small(Bigrams):
    """A model whose device has no room for windows of more than 16 tokens."""

    has_room = False

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> SimpleNamespace:
        if input_ids.shape[1] > 16 and not self.has_room:
            torch.empty(2**56)  # the allocator's own error
        return super().forward(input_ids, use_cache)


def test_a_length_that_runs_out_of_memory_is_left_out_and_the_rest_goes_on(tmp_path, monkeypatch, capsys):
    """Whatever comes after it is measured; the same command goes on with it, and is complete without it."""
    model, corpus = Small(P), letters(tmp_path)
    (tmp_path / "letters" / "0.txt").write_text("abca")  # fits whatever the window is: half of a length is no result
    monkeypatch.setattr("peft_longlora.eval.load_subject", lambda *_, **__: Subject.of(model, letter_tokenizer()))

    def run(lengths: str) -> tuple[int, Results, str]:
        command = ["eval", "--model", "small", "--tasks", "perplexity", "--data", tmp_path / "letters"]
        command += ["--protocol", "both", "--stride", 4, "--lengths", lengths, "--output", tmp_path / "out"]
        code = longlora(*command)
        return code, Results.load(tmp_path / "out"), capsys.readouterr().err.splitlines()[-1]

    code, results, said = run("8,17,16,24")
    names = [f"perplexity {n} ({protocol})" for protocol in ("longlora", "documents") for n in (17, 24)]
    assert code == 3 and results.unmeasured == names and all(name in said for name in names)
    assert [(row.protocol, row.length) for row in results.results] == [
        (protocol, length) for protocol in ("documents", "longlora") for length in (8, 16)
    ]
    assert {row.length for row in results.details} == {8, 16}
    assert f"Out of memory, and so not measured: {', '.join(names)}." in results.notes
    finished = (tmp_path / "out" / "samples.jsonl").read_text()
    assert '"perplexity/documents/24/base/000000/000000"' in finished, "what did fit is kept"
    code, shorter, _ = run("8,16")
    assert code == 0 and shorter.results == results.results and not shorter.unmeasured
    assert (tmp_path / "out" / "samples.jsonl").read_text() == finished, "nothing is measured twice, nothing lost"
    model.has_room = True
    code, whole, _ = run("8,16,17,24")
    assert code == 0 and len(whole.results) == 8 and not whole.unmeasured
    assert (tmp_path / "out" / "samples.jsonl").read_text().startswith(finished)
    tasks = [Perplexity(corpus, [8, 16, 17, 24], p, stride=4) for p in ("longlora", "documents")]
    plain = evaluate(Subject.of(Bigrams(P), letter_tokenizer()), tasks, tmp_path / "plain")
    assert whole.results == plain.results and whole.details == plain.details


def test_a_model_without_room_ends_with_code_2(tmp_path, monkeypatch, capsys):
    def load(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("peft_longlora.eval.load_subject", load)
    assert longlora("eval", "--model", "large", "--tasks", "cost", "--output", tmp_path / "out") == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("longlora eval: error: The model does not fit into memory (CUDA out of memory.")


@pytest.mark.parametrize("count", [2, 3])
def test_shares_add_up_to_the_whole(tmp_path, count, monkeypatch):
    """Processes are threads here, which meet at a barrier; the test marked slow has real ones."""
    plain, measured = Perplexity._finish, []
    monkeypatch.setattr(Perplexity, "_finish", lambda self, *args: measured.append(args[1]) or plain(self, *args))
    whole = evaluate(Subject.of(Bigrams(P), letter_tokenizer()), tasks_of(tmp_path), tmp_path / "whole")
    together = SimpleNamespace(wait_for_everyone=threading.Barrier(count, timeout=30).wait)

    def share(rank: int, tasks: list):
        subject, processes = Subject.of(Bigrams(P), letter_tokenizer()), Processes(rank, count, state=together)
        return evaluate(subject, tasks, tmp_path / "out", processes=processes, show_progress=False)

    with ThreadPoolExecutor(count) as pool:
        results, *others = pool.map(share, range(count), [tasks_of(tmp_path) for _ in range(count)])
    assert others == [None] * (count - 1)
    assert results.results == whole.results and results.details == whole.details
    keys = [json.loads(line)["key"] for line in (tmp_path / "out" / "samples.jsonl").open()]
    assert sorted(measured) == sorted(keys * 2), "once for the whole, once for the shares"


def test_where_one_process_has_no_room_the_length_is_left_out(tmp_path):
    """The process that writes the results has room, and finds that others' samples are missing."""
    together = SimpleNamespace(wait_for_everyone=threading.Barrier(2, timeout=30).wait)

    def share(rank: int, tasks: list):
        model = Small(P) if rank else Bigrams(P)
        subject, processes = Subject.of(model, letter_tokenizer()), Processes(rank, 2, state=together)
        return evaluate(subject, tasks, tmp_path / "out", processes=processes, show_progress=False)

    with ThreadPoolExecutor(2) as pool:
        results, _ = pool.map(share, range(2), [tasks_of(tmp_path) for _ in range(2)])
    assert results.unmeasured == ["perplexity 32 (documents)"]
    whole = evaluate(Subject.of(Bigrams(P), letter_tokenizer()), tasks_of(tmp_path), tmp_path / "whole")
    assert results.results == [row for row in whole.results if row.length == 8] and len(results.results) == 2


def test_a_folder_holds_one_run(tmp_path):
    subject, corpus = Subject.of(Bigrams(P), letter_tokenizer()), letters(tmp_path)
    out = tmp_path / "out"
    evaluate(subject, [Perplexity(corpus, [8], stride=4)], out)
    with pytest.raises(ValueError, match=r"holds another run.*stride=4, now 8"):
        evaluate(subject, [Perplexity(corpus, [8], stride=8)], out)
    more = evaluate(subject, [Perplexity(corpus, [8, 16], stride=4)], out)
    assert [row.length for row in more.results] == [8, 16], "lengths may be added"
    (tmp_path / "0.txt").write_text("abab" * 9)
    with pytest.raises(ValueError, match="another run"):
        evaluate(subject, [Perplexity(Corpus(tmp_path / "0.txt"), [8], stride=4)], out)
    evaluate(subject, [Perplexity(corpus, [8], stride=8)], out, overwrite=True)


def test_results_are_what_the_schema_says(tmp_path):
    subject = scripted_subject(read_passkey)
    results = evaluate(subject, [Passkey(lengths=[1000, 2000], depths=[0, 1], seeds=3)], tmp_path)
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["schema_version"] == 1
    assert [row["value"] for row in written["results"]] == [1.0, 1.0]
    assert {row["group"] for row in written["details"]} == {"depth 0%", "depth 100%"}
    assert written["results"][0]["units"] == 6 and written["details"][0]["units"] == 3
    low = written["results"][0]["low"]
    z = 1.959964
    assert low == pytest.approx(1 / (1 + z * z / 6), rel=1e-5), "Wilson's lower end for 6 of 6"
    assert Results.load(tmp_path) == results
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in (tmp_path / "results.md").open()]
    shown = ["passkey", "longlora", "generated", "base", "1000", "accuracy", "100.0%", "[61.0%, 100.0%]", "6"]
    assert shown in lines
    assert (tmp_path / "passkey.png").read_bytes()[:4] == b"\x89PNG"


def test_prompts_of_records_above_the_window_are_counted(tmp_path):
    """Their rows have no length to name: the note says how many of the prompts it were."""
    rows = [{"prompt": "word " * n + "Topics: art. The first?", "topics": ["art"]} for n in (1, 1, 300)]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    subject = scripted_subject(lambda prompt: "art", window=200)
    results = evaluate(subject, [Topics(source=str(tmp_path / "talks.jsonl"))], tmp_path / "out")
    assert any(
        "topics talks: 1 of 3 prompts, with their answers, were above the window of 200" in n for n in results.notes
    )
    assert "| † " in (tmp_path / "out" / "results.md").read_text()


def test_a_tokenizer_of_another_model_is_named(tmp_path, base):
    """One that knows too many tokens is refused; one that knows few of the model's is a note beside the numbers."""
    letter_tokenizer().save_pretrained(tmp_path)
    assert load_subject(base).notes == []
    [note] = load_subject(base, tokenizer=str(tmp_path)).notes
    assert f"knows {len(letter_tokenizer())} tokens and the model has 4096 embeddings" in note


def test_the_model_is_left_as_it_was(tmp_path, base):
    subject = load_subject(base)
    subject.model.train()
    before = subject.model.config._attn_implementation
    evaluate(subject, [Passkey(lengths=[128], depths=[0], seeds=1)], tmp_path / "out")
    assert subject.model.training and subject.model.config._attn_implementation == before


# -- the command line ----------------------------------------------------------------------------------------------


def longlora(*arguments) -> int:
    return cli.main([str(argument) for argument in arguments])


def test_adapter_and_base_from_the_command_line(tmp_path, base, adapter, text, capsys):
    """Perplexity equals the plain computation with transformers and peft; a card shows it; compare finds the base."""
    common = ["--data", text, "--lengths", "128,512", "--stride", 128, "--dtype", "float32", "--device", "cpu"]
    command = ["eval", "--model", base, "--tasks", "perplexity,native,passkey", "--seeds", 1, "--depths", "0,100"]
    assert longlora(*command, *common, "--adapter", adapter, "--output", tmp_path / "tuned", "--card") == 0
    rows = {(r.task, r.variant, r.length): r for r in Results.load(tmp_path / "tuned").results}

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

    assert longlora(*command, *common, "--output", tmp_path / "plain") == 0
    out = capsys.readouterr().out
    assert "documents are shorter than the window and were scored whole" in out
    assert longlora("compare", tmp_path / "plain", tmp_path / "tuned", "--output", tmp_path / "pair") == 0
    found, _ = compare(tmp_path / "plain", tmp_path / "tuned" / "results.json")
    headline = next(
        d for d in found if d.first.task == "perplexity" and d.first.group is None and d.first.length == 128
    )
    assert headline.is_paired and headline.first.variant == "base" and headline.second.variant == "adapter"
    # rows are rounded to six digits, of perplexities above 1000 to the second place
    assert headline.value == pytest.approx(headline.second.value - headline.first.value, abs=0.011)
    assert headline.low <= headline.value <= headline.high
    assert f"{headline.value:+.5g}" in capsys.readouterr().out
    assert (tmp_path / "pair" / "compare.png").stat().st_size > 10_000


def test_a_run_compared_with_itself_differs_in_nothing(tmp_path):
    evaluate(Subject.of(Bigrams(P), letter_tokenizer()), tasks_of(tmp_path), tmp_path / "out")
    found, notes = compare(tmp_path / "out", tmp_path / "out")
    assert found and all((d.value, d.low, d.high) == (0, 0, 0) and d.is_paired for d in found) and not notes


def test_samples_that_are_not_in_the_results_are_not_in_their_comparison(tmp_path):
    """A folder keeps the prompts of all its runs; results.json is of the last one."""
    subject = scripted_subject(lambda prompt: read_passkey(prompt) if prompt.count("grass") % 2 else "no")
    for depths in ([0, 0.13, 0.29, 0.5, 0.71, 1], [0.29, 0.71]):
        evaluate(subject, [Passkey(lengths=[1000], depths=depths, seeds=3)], tmp_path / "a")
    evaluate(scripted_subject(read_passkey), [Passkey(lengths=[1000], depths=[0.29, 0.71], seeds=3)], tmp_path / "b")
    row = next(r for r in Results.load(tmp_path / "a").results if r.group is None)
    found, notes = compare(tmp_path / "a", tmp_path / "b")
    assert found[0].value == pytest.approx(1 - row.value) and found[0].low is None
    assert found[1].low is not None, "rows of one depth are of the same prompts"
    assert [note for note in notes if "holds prompts that its results.json is not made of" in note]


def test_sparse_attention_and_rescaled_rope_are_measured_as_told(tmp_path, base, text):
    rows = {}
    for name, options in {
        "dense": [],
        "sparse": ["--attention", "sparse"],
        "yarn": ["--context-length", 256],
        "linear": ["--context-length", 256, "--rope-type", "linear"],
    }.items():
        out = tmp_path / name
        command = ["eval", "--model", base, "--tasks", "perplexity", "--data", text, "--lengths", 64, "--output", out]
        assert longlora(*command, "--dtype", "float32", *options) == 0
        rows[name] = Results.load(out)
    values = {name: results.results[0].value for name, results in rows.items()}
    assert len(set(values.values())) == 4
    assert rows["sparse"].model["attention"] == "sparse (s2, groups of 16)"
    assert rows["linear"].results[0].variant == "rescaled" and rows["linear"].model["window"] == 256


BAD = {
    "no such file": ["--data", "{tmp}/none.txt"],
    "empty.jsonl: nothing in it": ["--data", "{tmp}/empty.jsonl"],
    "holds no .txt": ["--data", "{tmp}/folder"],
    "not JSON": ["--data", "{tmp}/broken.jsonl"],
    "give no window of 4096 tokens": ["--data", "{text}", "--lengths", "4096", "--protocol", "longlora"],
    "needs --data": ["--tasks", "needle"],
    "needs --multidoc": ["--tasks", "multidoc"],
    "neither one of this package's nor one of lm-eval's": ["--tasks", "perplexitty", "--data", "{text}"],
    "no list of numbers": ["--lengths", "4096,big"],
    "holds a percentage outside 0 to 100": ["--depths", "0,120"],
    "--model {tmp}/none: no such folder": ["--model", "{tmp}/none", "--data", "{text}"],
    "--model {tmp}/other is an adapter": ["--model", "{tmp}/other", "--data", "{text}"],
    "--adapter {tmp}/folder: no adapter_config.json": ["--adapter", "{tmp}/folder", "--data", "{text}"],
    "The tokenizer ({tmp}/big) knows token 4103, but the model has 4096": [
        "--tokenizer",
        "{tmp}/big",
        "--data",
        "{text}",
    ],
    "--output {tmp}/empty.jsonl: {tmp}/empty.jsonl is a file": ["--output", "{tmp}/empty.jsonl", "--data", "{text}"],
    "{tmp}/empty.jsonl is a file. Give a folder": ["--output", "{tmp}/empty.jsonl/out", "--data", "{text}"],
    "buckets=[512, 64] must be edges in rising order": ["--buckets", "512,64", "--data", "{text}"],
    "the prompt alone has": ["--tasks", "passkey", "--lengths", "16"],
    "--card needs an adapter": ["--tasks", "passkey", "--lengths", "128", "--seeds", "1", "--depths", "0", "--card"],
    "--card is for LongLoRA's adapters; {tmp}/plain is one of type LORA": [
        "--adapter",
        "{tmp}/plain",
        "--card",
        "--data",
        "{text}",
    ],
    "made for a vocabulary of 97 tokens, this model has 4096": ["--adapter", "{tmp}/other", "--data", "{text}"],
    "the following arguments are required": None,
    "--device mps: ": ["--device", "mps", "--data", "{text}"],
    "--device abacus: ": ["--device", "abacus", "--data", "{text}"],
    "--device meta holds no numbers": ["--device", "meta", "--data", "{text}"],
    "rope_type='nonsense' is unknown": ["--rope-type", "nonsense", "--data", "{text}"],
    "--rope-type linear does nothing without": ["--rope-type", "linear", "--data", "{text}"],
    "an adapter brings its own scaling": ["--rope-type", "ntk", "--adapter", "{tmp}/other", "--data", "{text}"],
    "--context-length 32 is not above the model's own window of 64": ["--context-length", "32", "--data", "{text}"],
}


SLOW = "neither one of this package's nor one of lm-eval's"  # lm-eval reads all its tasks first


@pytest.mark.parametrize("message", [pytest.param(m, marks=pytest.mark.slow) if m == SLOW else m for m in BAD])
def test_bad_input_ends_with_code_2_and_one_line(message, tmp_path, base, text, capsys):
    if message == "--device mps: " and torch.backends.mps.is_available():
        pytest.skip("this machine has the device")
    options = BAD[message]
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": ')
    if options and "{tmp}/big" in options:
        tokenizer = AutoTokenizer.from_pretrained(base)
        tokenizer.add_tokens([f"new{i}" for i in range(8)])
        tokenizer.save_pretrained(tmp_path / "big")
    if options and "{tmp}/other" in options:
        extend(make()).save_pretrained(tmp_path / "other")
    if options and "{tmp}/plain" in options:
        get_peft_model(load_subject(base).model, LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "plain")
    fill = dict(tmp=tmp_path, text=text)
    defaults = ["--model", base, "--tasks", "perplexity", "--lengths", "64", "--output", str(tmp_path / "out")]
    command = ["eval"] + ([] if options is None else defaults + [option.format(**fill) for option in options])
    try:
        code = longlora(*command)
    except SystemExit as error:
        code = error.code
    lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert code == 2 and len(lines) == 1
    assert message.format(**fill).lower() in lines[0].lower()
    assert not (tmp_path / "out").exists(), "it is said before anything is measured"


def test_only_an_evaluation_goes_on_where_it_was_stopped(tmp_path, monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("peft_longlora.cli.main.run_eval", stop)
    monkeypatch.setattr("peft_longlora.cli.main.run_compare", stop)
    assert longlora("eval", "--model", "a", "--output", tmp_path) == longlora("compare", "a", "b") == 130
    assert capsys.readouterr().err == "Stopped. The same command goes on where this one ended.\nStopped.\n"


def test_compare_refuses_what_it_cannot_compare(tmp_path, capsys):
    evaluate(scripted_subject(read_passkey), [Passkey(lengths=[1000], depths=[0], seeds=1)], tmp_path / "a")
    evaluate(scripted_subject(read_passkey), [Passkey(lengths=[2000], depths=[0], seeds=1)], tmp_path / "b")
    newer = json.loads((tmp_path / "a" / "results.json").read_text())
    (tmp_path / "newer.json").write_text(json.dumps({**newer, "schema_version": 2}))
    (tmp_path / "other.json").write_text('{"x": 1}')
    capsys.readouterr()
    for second, message in {
        "b": "no task, data, protocol and length in common",
        "none": "no such file",
        "newer.json": "schema_version 2 is newer than 1",
        "other.json": "no results.json of `longlora eval`",
    }.items():
        assert longlora("compare", tmp_path / "a", tmp_path / second) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert message in line
    assert longlora("compare", tmp_path / "a", tmp_path / "a", "--output", tmp_path / "newer.json") == 2
    assert "newer.json is a file. Give a folder." in capsys.readouterr().err


def test_a_reader_that_has_seen_enough_of_the_output_is_no_error(tmp_path, monkeypatch, capsys):
    """As with `longlora compare a b | head`: everything is in the files by then."""

    def print_into_a_closed_pipe(*_, **__):
        raise BrokenPipeError

    evaluate(scripted_subject(read_passkey), [Passkey(lengths=[1000], depths=[0], seeds=1)], tmp_path / "a")
    capsys.readouterr()
    with (tmp_path / "pipe").open("w") as pipe:
        monkeypatch.setattr("sys.stdout", pipe)
        monkeypatch.setattr(compare_command, "print", print_into_a_closed_pipe, raising=False)
        assert longlora("compare", tmp_path / "a", tmp_path / "a", "--output", tmp_path / "pair") == 141
    assert sorted(path.name for path in (tmp_path / "pair").iterdir()) == ["compare.md", "compare.png"]
    assert capsys.readouterr().err == ""


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
