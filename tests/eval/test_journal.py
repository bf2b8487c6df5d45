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
    journal.open(identity, **options)
    return journal


# -- two runs ------------------------------------------------------------------------------------------------------


def test_a_second_run_is_refused_and_the_first_loses_nothing(tmp_path):
    first = opened(tmp_path)
    first.write({"key": "1"})
    second = Journal(tmp_path)
    with pytest.raises(ValueError, match=r"Another run writes into output='.*' \(process \d+ on "):
        second.open({**RUN, "perplexity": {}}, overwrite=True)
    first.write({"key": "2"})
    first.close()
    first.merge()
    first.release()
    third = opened(tmp_path)
    assert third.done() == {"1", "2"}


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
