"""Records of files: two files are two, whatever they are called."""

import json

from peft_longlora.eval.tasks.topics import Topics


def write(folder, name: str, topic: str) -> None:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"prompt": "What was it?", "topics": [topic]}) + "\n")


def test_files_of_one_name_in_two_folders_are_two_files(tmp_path):
    for folder in ("first", "second"):
        for name in ("5_topics.jsonl", f"only.{folder}.json"):
            write(tmp_path, f"{folder}/{name}", f"art of {folder}")
    task = Topics(source=str(tmp_path), samples=1)
    found = {question.key: question.dataset for question in task.questions()}
    assert list(found.values()) == ["first/5_topics", "only.first", "second/5_topics", "only.second"]
    assert len(found) == 4, "`samples` counts the records of each file"


def test_files_that_differ_in_their_ending_are_two_files(tmp_path):
    write(tmp_path, "a.jsonl", "art")
    write(tmp_path, "a.json", "sport")
    write(tmp_path, "b.jsonl", "music")
    assert [question.dataset for question in Topics(source=str(tmp_path)).questions()] == ["a.json", "a.jsonl", "b"]


def test_one_file_is_called_as_itself(tmp_path):
    write(tmp_path, "nq.v2.jsonl", "art")
    assert [question.dataset for question in Topics(source=str(tmp_path / "nq.v2.jsonl")).questions()] == ["nq.v2"]
