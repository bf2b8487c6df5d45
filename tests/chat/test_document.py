"""Documents: every character is there, its place is the file's, and what cannot be read is refused by name."""

import random

import pytest

from peft_longlora.chat.document import read_document
from tests.helpers.chat_models import make_pdf

pypdf = pytest.importorskip("pypdf")
PAGES = [f"Page {i} begins.\nIt says {i * 111}." for i in (1, 2, 3)]


@pytest.mark.parametrize("suffix", [".txt", ".md", ".TXT"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_of_text_are_those_an_editor_counts(tmp_path, suffix, end):
    lines = ["", "# Title", "", "Žluťoučký kůň", "  indented", "last", ""]
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"\xef\xbb\xbf" + end.join(lines).encode())
    document = read_document(path)
    assert document.text == "\n".join(lines).strip() and document.unit == "line"
    for number, line in enumerate(lines, 1):
        if line:
            start = document.text.index(line.strip())
            assert document.place(start, start + len(line.strip())) == f"line {number}"
    assert document.place(0, len(document.text)) == "lines 2-6"


def test_every_character_has_the_line_that_counting_newlines_gives(tmp_path):
    rng = random.Random(0)
    text = "x" + "".join(rng.choice("ab \n") for _ in range(500)) + "x"
    (tmp_path / "a.txt").write_text(text)
    document = read_document(tmp_path / "a.txt")
    for i in range(len(text)):
        assert document.place(i, i + 1) == f"line {1 + text[:i].count(chr(10))}"


def test_pages_of_a_pdf(tmp_path):
    (tmp_path / "a.pdf").write_bytes(make_pdf([PAGES[0], "", *PAGES[1:]]))
    document = read_document(tmp_path / "a.pdf")
    for number, page in zip((1, 3, 4), PAGES, strict=True):
        start = document.text.index(page.splitlines()[0])
        assert document.place(start, start + 4) == f"page {number}"
        assert page.splitlines()[1] in document.text
    assert document.place(0, len(document.text)) == "pages 1-4"
    assert document.notes == ["1 of 4 pages hold no text and cannot be asked about: 2."]


def test_a_pdf_locked_with_the_empty_password_is_read(tmp_path):
    (tmp_path / "open.pdf").write_bytes(make_pdf(PAGES))
    writer = pypdf.PdfWriter(tmp_path / "open.pdf")
    writer.encrypt("", owner_password="owner", algorithm="RC4-128")
    writer.write(tmp_path / "locked.pdf")
    assert pypdf.PdfReader(tmp_path / "locked.pdf").is_encrypted
    assert read_document(tmp_path / "locked.pdf").text == read_document(tmp_path / "open.pdf").text


def encrypted(folder) -> bytes:
    (folder / "open.pdf").write_bytes(make_pdf(PAGES))
    writer = pypdf.PdfWriter(folder / "open.pdf")
    writer.encrypt("secret", algorithm="RC4-128")
    writer.write(folder / "locked.pdf")
    return (folder / "locked.pdf").read_bytes()


BAD = {
    "none.txt": (None, "no such file"),
    "folder": ("mkdir", "is a folder: give one file"),
    "a.docx": (b"PK", ".docx is none of .txt, .md, .pdf"),
    "name": (b"text", "a name without suffix is none of"),
    "empty.txt": (b"", "is empty (0 bytes)"),
    "empty.pdf": (b"", "is empty (0 bytes)"),
    "blank.md": (b" \n\t\n", "holds only white space"),
    "binary.txt": (b"text\0more", "binary file, not text (byte 4 is 0)"),
    "latin.txt": ("Grüße".encode("latin-1"), "is not UTF-8 (byte 2 is 0xfc)"),
    "no.pdf": (b"a text with the wrong suffix", "is not a PDF, or is broken"),
    "half.pdf": (make_pdf(PAGES)[:200], "is not a PDF, or is broken"),
    "scan.pdf": (make_pdf(["", ""]), "none of its 2 pages holds text; it is probably a scan"),
    "locked.pdf": (encrypted, "is encrypted. Remove its password"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_by_name(tmp_path, name):
    content, message = BAD[name]
    if content == "mkdir":
        (tmp_path / name).mkdir()
    elif content is not None:
        (tmp_path / name).write_bytes(content(tmp_path) if callable(content) else content)
    with pytest.raises(ValueError) as error:
        read_document(tmp_path / name)
    assert message in str(error.value) and name in str(error.value)


@pytest.mark.parametrize("url", ["https://example.com/book.txt", "file:///book.txt", "s3://bucket/book.pdf"])
def test_urls_are_no_paths(url):
    with pytest.raises(ValueError, match="is a URL, and only files can be read"):
        read_document(url)


@pytest.mark.parametrize("seed", range(8))
def test_no_damage_to_a_pdf_gives_another_error(tmp_path, seed):
    """Cut or with bytes changed, it is read or refused."""
    rng, data = random.Random(seed), bytearray(make_pdf(PAGES))
    for _ in range(40):
        damaged = bytearray(data[: rng.randrange(1, len(data))] if rng.random() < 0.5 else data)
        for _ in range(rng.randrange(12)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        (tmp_path / "a.pdf").write_bytes(bytes(damaged))
        try:
            assert read_document(tmp_path / "a.pdf").text
        except ValueError as error:
            assert "a.pdf" in str(error)
