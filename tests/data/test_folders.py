"""Folders with links: what a link leads to is read once, loops end, and what is not read is counted."""

import os

import pytest

from peft_longlora.data import read_documents
from peft_longlora.data.counts import Counts
from peft_longlora.data.folders import AROUND, READ_ANYWAY, walk


@pytest.fixture
def place(tmp_path):
    for name in ("books/a.txt", "books/deep/b.txt", "other/c.txt", "other/.hidden.txt", "third/d.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    return tmp_path


def read(folder, **options) -> tuple[list[str], dict[str, int]]:
    counts = Counts()
    return [document["text"] for document in read_documents(folder, counts=counts, **options)], counts.left_out


def test_a_linked_folder_is_read_as_if_it_were_there(place):
    (place / "books/more").symlink_to("../other")
    (place / "other/further").symlink_to(place / "third")
    texts, left_out = read(place / "books")
    assert texts == ["books/a.txt", "books/deep/b.txt", "other/c.txt", "third/d.txt"]
    assert left_out == {"hidden files": 1}


def test_every_folder_once(place):
    (place / "books/aaa").symlink_to("deep")  # before the folder itself in the order of names
    (place / "books/one").symlink_to("../other")
    (place / "books/two").symlink_to("../other")
    (place / "other/back").symlink_to("../books")
    texts, left_out = read(place / "books")
    assert texts == ["books/a.txt", "books/deep/b.txt", "other/c.txt"]
    assert left_out == {READ_ANYWAY: 3, "hidden files": 1}


def test_a_link_to_a_folder_around_the_data_is_counted(place):
    (place / "books/up").symlink_to("..")
    (place / "books/nowhere").symlink_to("none")
    texts, left_out = read(place / "books")
    assert texts == ["books/a.txt", "books/deep/b.txt"] and left_out == {AROUND: 1, "broken links": 1}


def test_a_link_to_itself_ends(place):
    (place / "books/self").symlink_to(".")
    (place / "books/circle").symlink_to("circle")  # leads nowhere
    assert len(walk(place / "books")[0]) == 3 and len(read(place / "books")[0]) == 2


@pytest.mark.parametrize("has_git", [False, True])
def test_links_in_source_trees_are_counted(place, has_git):
    (place / "books/more").symlink_to("../other")
    if has_git:
        os.makedirs(place / "books/deep/.git")
    texts, left_out = read(place / "books", repositories=True)
    assert len(texts) == 1 and "other/c.txt" not in texts[0] and left_out == {"links": 1}
