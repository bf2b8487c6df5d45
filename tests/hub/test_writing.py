"""A crash leaves the old file, whatever moment it comes at."""

import signal
import subprocess
import sys

import pytest

from peft_longlora.hub.writing import write_whole, writing
from tests.helpers.paths import ROOT

DIES = """
import os, signal, sys
from peft_longlora.hub.writing import writing
with writing(sys.argv[1]) as file:
    file.write(b"half of the new")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


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
    done = subprocess.run([sys.executable, "-c", DIES, str(tmp_path / "a.json")], cwd=ROOT, timeout=300)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "a.json").read_text() == "old"
