"""The journal: one run at a time, nothing lost that is intact, and damage is named with file and line."""

import json
import logging

import pytest

from peft_longlora.eval.journal import Journal
from peft_longlora.eval.lock import FolderLock
from tests.helpers.killed import another_process

RUN = {"model": {"a": 1}}
LINE = b'{"key": "a"}\n'


def opened(folder, identity=RUN, **options) -> Journal:
    journal = Journal(folder)
    journal.lock()
    journal.open(identity, **options)
    return journal


# -- two runs ------------------------------------------------------------------------------------------------------


def test_a_second_run_is_refused_and_the_first_loses_nothing(tmp_path):
    first = opened(tmp_path)
    first.write({"key": "1"})
    for ask in (Journal.lock, Journal.check):
        with pytest.raises(ValueError, match=r"Another run writes into output='.*' \(process \d+ on "):
            ask(Journal(tmp_path))
    first.write({"key": "2"})
    first.close()
    first.merge()
    first.release()
    third = opened(tmp_path)
    assert third.done() == {"1", "2"}


def test_two_runs_that_no_lock_kept_apart_lose_no_sample(tmp_path):
    """Some network file systems have no locks."""
    first, second = Journal(tmp_path), Journal(tmp_path)
    first.open({**RUN, "passkey": {}})
    second.open({**RUN, "passkey": {}, "perplexity": {}})
    for number in range(3):
        first.write({"key": f"passkey/{number}"})
        second.write({"key": f"perplexity/{number}"})
    first.close()
    first.merge()
    second.write({"key": "perplexity/3"})
    second.write({"key": "perplexity/4"})
    second.close()
    second.merge()
    wanted = {f"passkey/{n}" for n in range(3)} | {f"perplexity/{n}" for n in range(5)}
    assert Journal(tmp_path).done() == wanted and sorted(p.name for p in tmp_path.glob("samples*")) == ["samples.jsonl"]
    assert len((tmp_path / "samples.jsonl").read_bytes().splitlines()) == len(wanted)


def test_a_crash_in_the_middle_of_a_merge_loses_no_sample(tmp_path, monkeypatch):
    first = opened(tmp_path)
    first.write({"key": "1"})
    first.close()
    monkeypatch.setattr(Journal, "records", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        first.merge()
    monkeypatch.undo()
    first.release()
    again = opened(tmp_path)
    assert again.done() == {"1"}
    again.write({"key": "2"})
    again.close()
    again.merge()
    assert again.done() == {"1", "2"} and [p.name for p in tmp_path.glob("samples*")] == ["samples.jsonl"]


# -- another run in the folder -------------------------------------------------------------------------------------


def ended(folder, identity, key: str) -> None:
    journal = opened(folder, identity)
    journal.write({"key": key})
    journal.close()
    journal.merge()
    for name in ("results.json", "results.md", "passkey.png"):
        (folder / name).write_text(key)
    journal.release()


def test_a_run_that_has_ended_makes_room_for_another(tmp_path, caplog):
    (tmp_path / "notes.png").write_text("a person's")
    (tmp_path / "digests.json").write_text("{}")
    for number in range(3):
        with caplog.at_level(logging.WARNING, "peft_longlora"):
            logging.getLogger("peft_longlora").propagate = True
            ended(tmp_path, {"model": {"tokenizer": number}}, str(number))
    assert "in its model, tokenizer was 1 and is now 2. Its files are in" in caplog.text
    for place, key in ((tmp_path / "earlier-1", "0"), (tmp_path / "earlier-2", "1"), (tmp_path, "2")):
        assert Journal(place).done() == {key}
        assert {(place / name).read_text() for name in ("results.json", "results.md", "passkey.png")} == {key}
        assert json.loads((place / "run.json").read_text()) == {"model": {"tokenizer": int(key)}}
    assert (tmp_path / "notes.png").exists() and (tmp_path / "digests.json").exists()


@pytest.mark.parametrize("state", ["without results", "with a task that was being added"])
def test_a_run_that_has_not_ended_is_not_moved(tmp_path, state):
    if state != "without results":
        ended(tmp_path, RUN, "1")
    journal = opened(tmp_path)
    journal.write({"key": "2"})
    journal.close()
    journal.release()
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(
        ValueError, match=r"holds another run: in its model, a was 1 and is now 2. That run has not ended"
    ):
        opened(tmp_path, {"model": {"a": 2}})
    assert {path: path.read_bytes() for path in before} == before and not list(tmp_path.glob("earlier*"))


# -- folders that cannot be written --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["run.json", "samples.jsonl", "samples-0.jsonl", "results.json", "results.md", "digests.json", "passkey.png"],
)
def test_a_folder_in_the_place_of_a_file_is_named_before_anything_is_measured(tmp_path, name):
    (tmp_path / name).mkdir()
    for ask in (Journal.check, Journal.lock):
        with pytest.raises(ValueError, match=rf"{name} is a folder, but a file of this name is written there. Move it"):
            ask(Journal(tmp_path))


def test_a_check_leaves_nothing_behind(tmp_path):
    Journal(tmp_path / "a" / "b").check()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["/proc/none", "/sys/none/deeper"])
def test_a_place_that_cannot_be_written_is_named(place):
    with pytest.raises(ValueError, match=f"output='{place}' cannot be written"):
        Journal(place).check()


def test_a_killed_process_leaves_no_lock_behind(tmp_path):
    def hold(tell) -> None:
        lock = FolderLock(tmp_path)
        lock.take()
        tell()

    with another_process(hold) as (holder, kill):
        with pytest.raises(ValueError, match=f"process {holder} on "):
            opened(tmp_path)
        kill()
        assert opened(tmp_path).done() == set()


def test_processes_of_one_run_share_the_folder(tmp_path):
    main, other = opened(tmp_path), Journal(tmp_path, rank=1)
    other.open({}, is_main=False)
    main.write({"key": "0"})
    other.write({"key": "1"})
    main.close()
    other.close()
    main.merge()
    assert [json.loads(line)["key"] for line in (tmp_path / "samples.jsonl").open()] == ["0", "1"]


# -- damage --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "damaged",
    [
        b'{"key": "b\n',
        b"\0" * 20 + b"\n",
        b'{"task": 1}\n',
        b"\xff\xfe\n",
        b"[1]\n",
        b"[" * 100_000 + b"\n",
        b'{"key": "b", "measures": [["accuracy", null, NaN, 1]]}\n',
        b'{"key": "b", "measures": [["accuracy", null, "1", 1]]}\n',
        b'{"key": "b", "measures": [["accuracy"]]}\n',
        b'{"key": "b", "n": ' + b"9" * 5000 + b"}\n",
    ],
)
def test_a_damaged_line_is_named_and_all_others_are_kept(tmp_path, damaged, caplog):
    (tmp_path / "run.json").write_text(json.dumps(RUN))
    (tmp_path / "samples-0.jsonl").write_bytes(LINE + damaged + b'{"key": "c"}\n')
    journal = opened(tmp_path)
    with caplog.at_level(logging.WARNING, "peft_longlora"):
        logging.getLogger("peft_longlora").propagate = True
        assert journal.done() == {"a", "c"}
    journal.write({"key": "b"})
    journal.close()
    journal.merge()
    assert journal.done() == {"a", "b", "c"} and len((tmp_path / "samples.jsonl").read_bytes().splitlines()) == 3
    [warning] = [record.getMessage() for record in caplog.records if "damaged" in record.getMessage()]
    assert f"{tmp_path / 'samples-0.jsonl'}, line 2, is damaged" in warning


@pytest.mark.parametrize("content", [b"", b'{"model": ', b"[1]", b"\xff", b"[" * 100_000])
def test_a_damaged_run_is_named_and_its_samples_are_kept(tmp_path, content):
    (tmp_path / "run.json").write_bytes(content)
    (tmp_path / "samples-0.jsonl").write_bytes(LINE)
    with pytest.raises(ValueError, match=r"run\.json is damaged .* or pass overwrite=True"):
        opened(tmp_path)
    assert (tmp_path / "samples-0.jsonl").read_bytes() == LINE
    assert opened(tmp_path, overwrite=True).done() == set()


def test_overwriting_takes_the_old_results_away(tmp_path):
    """They would stand beside the samples of another run until that one has ended."""
    opened(tmp_path).release()
    (tmp_path / "results.json").write_text("{}")
    opened(tmp_path, overwrite=True)
    assert not (tmp_path / "results.json").exists()


def test_drafts_of_a_killed_process_are_cleared_away(tmp_path):
    (tmp_path / "samples.jsonl.4711.draft").write_bytes(LINE)
    (tmp_path / "mine.draft").write_bytes(LINE)
    opened(tmp_path)
    assert [path.name for path in tmp_path.glob("*.draft")] == ["mine.draft"]
