"""Documents: every character is there, its place is the file's, and what cannot be read is refused by name."""

import io
import random
import re

import pytest

from peft_longlora.chat import Limits, read_document
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


# -- damaged PDFs ------------------------------------------------------------------------------------------------------


def compressed(folder) -> bytes:
    """As a word processor writes it: content streams deflated."""
    writer = pypdf.PdfWriter(clone_from=pypdf.PdfReader(io.BytesIO(make_pdf(PAGES))))
    for page in writer.pages:
        page.compress_content_streams()
    writer.write(folder / "compressed.pdf")
    return (folder / "compressed.pdf").read_bytes()


def drawn(folder, font_type: int) -> bytes:
    """As matplotlib draws it: fonts inside the file, with tables from glyphs to characters."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    with pyplot.rc_context({"pdf.fonttype": font_type, "pdf.compression": 0 if font_type == 3 else 6}):
        figure = pyplot.figure(figsize=(3, 2))
        for i, line in enumerate(PAGES):
            figure.text(0.1, 0.2 + i / 4, line)
        figure.savefig(folder / "drawn.pdf")
        pyplot.close(figure)
    return (folder / "drawn.pdf").read_bytes()


KINDS = {
    "plain": lambda folder: make_pdf(PAGES),
    "compressed": compressed,
    "type 3 fonts": lambda folder: drawn(folder, 3),
    "TrueType fonts": lambda folder: drawn(folder, 42),
}


def damage_and_read(folder, data: bytes, rng: random.Random) -> str:
    """Cut a PDF or change a few of its bytes; returns "read", or what the refusal says."""
    damaged = bytearray(data[: rng.randrange(1, len(data))] if rng.random() < 0.1 else data)
    for _ in range(rng.randrange(1, 6)):
        damaged[rng.randrange(len(damaged))] = rng.randrange(256)
    (folder / "a.pdf").write_bytes(bytes(damaged))
    try:
        assert read_document(folder / "a.pdf").text
    except ValueError as error:
        assert "a.pdf" in str(error) and "\n" not in str(error)
        return str(error)
    return "read"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [10, pytest.param(300, marks=pytest.mark.slow)])
def test_a_damaged_pdf_is_read_or_refused_by_name(tmp_path, kind, count):
    data, rng = KINDS[kind](tmp_path), random.Random(kind)
    (tmp_path / "a.pdf").write_bytes(data)
    assert read_document(tmp_path / "a.pdf").text
    said = [damage_and_read(tmp_path, data, rng) for _ in range(count)]
    assert "read" in said  # most bytes are not of that kind
    if count > 100:
        assert len(set(said)) > 5


FILTERS = {"/Fl": "Fl", "/JBIG2Decode": "", "/Nonsense": "Nonsense", "/BrotliDecode": "", "[/FlateDecode /LZW]": ""}


@pytest.mark.parametrize("name", FILTERS)
def test_a_page_that_cannot_be_decoded_is_named_and_not_called_encrypted(tmp_path, name):
    """The filter of page 2's stream: a short name, one of images, one that needs a package, one that nobody knows."""
    head, mark, tail = make_pdf(PAGES).decode().partition("stream\n")
    second = tail.index("<< /Length")
    content = (head + mark + tail[:second] + f"<< /Filter {name} /Length" + tail[second + 10 :]).encode()
    (tmp_path / "a.pdf").write_bytes(content)
    try:
        text = read_document(tmp_path / "a.pdf").text
    except ValueError as error:
        assert re.search(r"a\.pdf cannot be read: page 2 of 3 is broken \(.+\)", str(error))
        assert FILTERS[name] in str(error) and "encrypted" not in str(error)
    else:  # a version of pypdf that leaves out what it cannot decode
        assert "Page 1" in text and "Page 3" in text


@pytest.mark.parametrize("error", [RecursionError("deep"), MemoryError(), NotImplementedError("new"), Exception("odd")])
def test_any_error_of_the_parser_names_file_and_page(tmp_path, monkeypatch, error):
    (tmp_path / "a.pdf").write_bytes(make_pdf(PAGES))
    whole = pypdf.PageObject.extract_text

    def extract_text(page, *args, **kwargs):
        text = whole(page, *args, **kwargs)
        if "Page 3" in text:
            raise error
        return text

    monkeypatch.setattr(pypdf.PageObject, "extract_text", extract_text)
    said = str(error) or type(error).__name__
    with pytest.raises(ValueError, match=rf"a\.pdf cannot be read: page 3 of 3 is broken \({said}\)"):
        read_document(tmp_path / "a.pdf")


# -- limits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "limits, message",
    [
        (Limits(pages=2), "a.pdf has 3 pages, and at most 2 are read here"),
        (Limits(characters=40), "a.pdf holds 5[0-9] characters or more, and at most 40 are read here"),
        (Limits(seconds=-1), "takes longer to read than -1 seconds, which ended at page 1 of 3"),
    ],
)
def test_what_is_beyond_a_limit_is_refused(tmp_path, limits, message):
    (tmp_path / "a.pdf").write_bytes(make_pdf(PAGES))
    with pytest.raises(ValueError, match=message):
        read_document(tmp_path / "a.pdf", limits)
    (tmp_path / "a.txt").write_text("word " * 11)
    if limits.characters < 50:
        with pytest.raises(ValueError, match=r"a\.txt holds 54 characters"):
            read_document(tmp_path / "a.txt", limits)
    assert read_document(tmp_path / "a.pdf", Limits(pages=3, characters=90, seconds=600)).text
