"""A crash leaves the old file, whatever moment it comes at."""

import pytest

from peft_longlora.hub.writing import write_whole, writing
from tests.helpers.killed import another_process


def test_text_and_bytes_are_written(tmp_path):
    write_whole(tmp_path / "a.md", "größer\n")
    write_whole(tmp_path / "a.png", b"\x89PNG")
    assert (tmp_path / "a.md").read_bytes() == "größer\n".encode()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.md", "a.png"]


def test_after_an_error_the_old_file_stands_alone(tmp_path):
    write_whole(tmp_path / "a.json", "old")
    with pytest.raises(OSError, match="full"), writing(tmp_path / "a.json") as file:
        file.write(b"ne")
        raise OSError("the disk is full")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"] and (tmp_path / "a.json").read_text() == "old"


def test_a_killed_process_leaves_the_old_file(tmp_path):
    write_whole(tmp_path / "a.json", "old")

    def write(tell) -> None:
        with writing(tmp_path / "a.json") as file:
            file.write(b"half of the new")
            file.flush()
            tell()

    with another_process(write) as (_, kill):
        assert (tmp_path / "a.json").read_text() == "old"
        kill()
    assert (tmp_path / "a.json").read_text() == "old"
