"""Whole runs: results, resumption, sharing, and what is left out where memory runs out."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from peft_longlora.eval import Corpus, Passkey, Perplexity, Processes, Results, Topics, evaluate
from peft_longlora.eval.subject import Subject
from tests.helpers.answering_models import Bigrams, letter_tokenizer, read_passkey, scripted_subject
from tests.helpers.evaluated import P, Small, letter_subject, letter_tasks, letters


@dataclass
class Killed(Perplexity):
    """A task that is stopped when its n-th window is to be measured; counts those that were."""

    at: int | None = None

    def __post_init__(self):
        super().__post_init__()
        self.measured = []

    def _finish(self, subject, key, *arguments):
        if len(self.measured) == self.at:
            raise KeyboardInterrupt
        self.measured.append(key)
        return super()._finish(subject, key, *arguments)


def test_a_killed_run_goes_on_where_it_stopped(tmp_path):
    """Every window is measured once over both runs, and the result is that of a run in one go."""

    def task(at: int | None = None) -> Killed:
        return Killed(letters(tmp_path), [8, 32], at=at)

    whole = evaluate(letter_subject(), [task()], tmp_path / "whole")
    first, second, third = task(at=20), task(), task()
    with pytest.raises(KeyboardInterrupt):
        evaluate(letter_subject(), [first], tmp_path / "out")
    assert not (tmp_path / "out" / "results.json").exists()
    with (tmp_path / "out" / "samples-0.jsonl").open("a") as file:
        file.write('{"key": "perplexity/docum')  # the kill came while a line was written
    again = evaluate(letter_subject(), [second], tmp_path / "out")
    keys = [json.loads(line)["key"] for line in (tmp_path / "out" / "samples.jsonl").open()]
    assert len(first.measured) == 20 and first.measured + second.measured == keys == list(dict.fromkeys(keys))
    assert again.results == whole.results and again.details == whole.details
    finished = evaluate(letter_subject(), [third], tmp_path / "out")
    assert finished.results == whole.results and not third.measured


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
    evaluate(letter_subject(), [task], tmp_path / "out")
    shown = [f"{step[1]}{key.split('/')[2]}.{int(key[-1])}" for step, key in order]
    assert shown == ["s8.0", "s8.1", "f8.0", "s8.2", "f8.1", "f8.2", "s16.0", "s16.1", "f16.0", "f16.1"]


def test_shares_add_up_to_the_whole(tmp_path, monkeypatch, count=3):
    """Processes are threads here, which meet at a barrier; the test marked slow has real ones."""
    plain, measured = Perplexity._finish, []
    monkeypatch.setattr(Perplexity, "_finish", lambda self, *args: measured.append(args[1]) or plain(self, *args))
    whole = evaluate(letter_subject(), letter_tasks(tmp_path), tmp_path / "whole")
    together = SimpleNamespace(wait_for_everyone=threading.Barrier(count, timeout=30).wait)

    def share(rank: int, tasks: list):
        subject, processes = letter_subject(), Processes(rank, count, state=together)
        return evaluate(subject, tasks, tmp_path / "out", processes=processes, show_progress=False)

    with ThreadPoolExecutor(count) as pool:
        results, *others = pool.map(share, range(count), [letter_tasks(tmp_path) for _ in range(count)])
    assert others == [None] * (count - 1)
    assert results.results == whole.results and results.details == whole.details
    keys = [json.loads(line)["key"] for line in (tmp_path / "out" / "samples.jsonl").open()]
    assert sorted(measured) == sorted(keys * 2), "once for the whole, once for the shares"


def test_where_one_process_has_no_room_the_length_is_left_out(tmp_path):
    """The process that writes the results has room, and finds that others' samples are missing."""
    together = SimpleNamespace(wait_for_everyone=threading.Barrier(2, timeout=30).wait)

    def share(rank: int, tasks: list):
        model = Small(P) if rank else Bigrams(P)
        subject, processes = letter_subject(model), Processes(rank, 2, state=together)
        return evaluate(subject, tasks, tmp_path / "out", processes=processes, show_progress=False)

    with ThreadPoolExecutor(2) as pool:
        results, _ = pool.map(share, range(2), [letter_tasks(tmp_path) for _ in range(2)])
    assert results.unmeasured == ["perplexity 32 (documents)"]
    whole = evaluate(letter_subject(), letter_tasks(tmp_path), tmp_path / "whole")
    assert results.results == [row for row in whole.results if row.length == 8] and len(results.results) == 3


def test_a_folder_holds_one_run(tmp_path):
    """The last one that was asked for; those that ended before it stay beside it, whole."""
    subject, corpus = letter_subject(), letters(tmp_path)
    out = tmp_path / "out"
    evaluate(subject, [Perplexity(corpus, [8], stride=4)], out)
    more = evaluate(subject, [Perplexity(corpus, [8, 16], stride=4)], out)
    assert [row.length for row in more.results if row.metric == "perplexity"] == [8, 16], "lengths may be added"
    other = evaluate(subject, [Perplexity(corpus, [8], stride=8)], out)
    assert [row.length for row in other.results if row.metric == "perplexity"] == [8]
    assert Results.load(out).results == other.results and Results.load(out / "earlier-1").results == more.results
    (tmp_path / "0.txt").write_text("abab" * 9)
    evaluate(subject, [Perplexity(Corpus(tmp_path / "0.txt"), [8], stride=8)], out)
    assert Results.load(out / "earlier-2").results == other.results
    evaluate(subject, [Perplexity(corpus, [8], stride=8)], out, overwrite=True)
    assert sorted(path.name for path in out.glob("earlier-*")) == ["earlier-1", "earlier-2"]


def test_a_run_that_was_stopped_is_not_given_up_for_another(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        evaluate(letter_subject(), [Killed(letters(tmp_path), [8], at=1)], out)
    with pytest.raises(ValueError, match=r"holds another run.*stride was .* and is now 8.*has not ended"):
        evaluate(letter_subject(), [Killed(letters(tmp_path), [8], stride=8)], out)
    assert evaluate(letter_subject(), [Killed(letters(tmp_path), [8])], out).results


def test_a_run_is_of_one_tokenizer_and_one_model(tmp_path):
    """What changes a number is another run, also where its name is the same. No number of one is shown for another."""

    def run(subject) -> float:
        return evaluate(subject, [Perplexity(letters(tmp_path), [8])], tmp_path / "out").results[0].value

    def moved(number: int) -> dict:
        return json.loads((tmp_path / "out" / f"earlier-{number}" / "run.json").read_text())["model"]

    def with_letters(order: str) -> Subject:
        return Subject.of(Bigrams(P), letter_tokenizer(order))

    first = run(with_letters("abcd"))
    assert run(with_letters("abcd")) == first and not list((tmp_path / "out").glob("earlier-*"))
    second = run(with_letters("badc"))
    third = run(letter_subject(Bigrams(P.flip(0))))
    assert len({first, second, third}) == 3
    templated = with_letters("abcd")
    templated.tokenizer.chat_template = "{{ messages }}"
    assert run(templated) == first
    assert run(with_letters("abcd")) == first
    for number, key in enumerate(["tokenizer_sha256", "fingerprint", "chat_template_sha256"], 1):
        assert moved(number)[key] != moved(number + 1)[key], key


def test_a_run_is_of_the_versions_and_the_device_that_it_began_with(tmp_path, monkeypatch):
    tasks = [Perplexity(letters(tmp_path), [8])]
    evaluate(letter_subject(), tasks, tmp_path / "out")
    began = json.loads((tmp_path / "out" / "run.json").read_text())
    assert began["versions"].keys() >= {"peft_longlora", "transformers", "torch", "peft", "tokenizers"}
    for key, other in {"versions": {**began["versions"], "torch": "1.0"}, "device": "NVIDIA H100"}.items():
        (tmp_path / "out" / "run.json").write_text(json.dumps({**began, key: other}))
        (tmp_path / "out" / "results.json").unlink(missing_ok=True)
        with pytest.raises(ValueError, match=f"another run: in its {key}, .*was ('1.0'|'NVIDIA H100') and is now"):
            evaluate(letter_subject(), tasks, tmp_path / "out")


def test_a_run_is_of_one_length_of_answers(tmp_path):
    """A longer answer may hold what a shorter one does not."""

    def run(task) -> float:
        folder = tmp_path / task.name
        return evaluate(scripted_subject(lambda prompt: " 7 and 12345 and art"), [task], folder).results[0].value

    source = write_topics(tmp_path)
    assert [run(Topics(source=source, max_new_tokens=n)) for n in (2, 50)] == [0.0, 1.0]
    for n in (2, 50):
        run(Passkey(lengths=[1000], depths=[0], seeds=1, max_new_tokens=n))
    assert (tmp_path / "topics" / "earlier-1").is_dir() and (tmp_path / "passkey" / "earlier-1").is_dir()


def test_a_second_run_is_refused_while_the_first_lasts(tmp_path):
    """It comes while the first measures, which loses nothing by it; when the first has ended, it may."""
    task, refused = Perplexity(letters(tmp_path), [8]), []

    class Interrupted(Perplexity):
        def _finish(self, *arguments):
            if not refused:
                with pytest.raises(ValueError, match="Another run writes into output="):
                    evaluate(letter_subject(), [task], tmp_path / "out")
                refused.append(True)
            return super()._finish(*arguments)

    results = evaluate(letter_subject(), [Interrupted(letters(tmp_path), [8])], tmp_path / "out")
    assert refused and evaluate(letter_subject(), [task], tmp_path / "out").results == results.results


def test_two_tasks_of_one_name_that_differ_are_refused(tmp_path):
    """Their samples have the same names: one's would be counted for the other."""
    tasks = [Passkey(lengths=[1000], depths=[0], seeds=1, seed=seed) for seed in (0, 1)]
    with pytest.raises(ValueError, match="Two tasks have the name 'passkey' but differ"):
        evaluate(scripted_subject(read_passkey), tasks, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    twice = [Perplexity(letters(tmp_path), [8, 8]), Perplexity(letters(tmp_path), [8, 16])]
    once = evaluate(letter_subject(), [Perplexity(letters(tmp_path), [8, 16])], tmp_path / "once")
    found = evaluate(letter_subject(), twice, tmp_path / "twice")
    assert found.results == once.results, "a length that is given twice is measured once"
    assert (tmp_path / "twice" / "samples.jsonl").read_bytes() == (tmp_path / "once" / "samples.jsonl").read_bytes()


def test_plots_of_earlier_results_do_not_stay(tmp_path, plots):
    """A folder may be gone on with for other tasks; a card shows all plots that lie there."""
    subject = scripted_subject(lambda prompt: " 7")
    evaluate(subject, [Passkey(lengths=[1000], depths=[0], seeds=1)], tmp_path)
    (tmp_path / "mine.png").write_bytes(b"")
    evaluate(subject, [Topics(source=write_topics(tmp_path))], tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["mine.png", "topics.png"]


def write_topics(folder) -> str:
    (folder / "talks.jsonl").write_text(json.dumps({"prompt": "Topics: art.", "topics": ["art"]}) + "\n")
    return str(folder / "talks.jsonl")


def test_samples_that_a_shorter_command_leaves_out_are_named(tmp_path):
    subject = scripted_subject(read_passkey)

    def run(lengths: list[int]):
        return evaluate(subject, [Passkey(lengths=lengths, depths=[0, 1], seeds=3)], tmp_path)

    whole = run([1000, 2000])
    shorter = run([1000])
    assert [row.length for row in shorter.results] == [1000] and not any("ask for" in note for note in whole.notes)
    [note] = [note for note in shorter.notes if "did not ask for" in note]
    assert "(passkey 2000 (longlora): 6)" in note and note in (tmp_path / "results.md").read_text()
    assert run([1000, 2000]).notes == whole.notes


def test_results_are_what_the_schema_says(tmp_path, plots):
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
