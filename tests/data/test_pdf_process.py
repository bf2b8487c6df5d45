"""A PDF in a process of its own: the same text, and an end for what would never end."""

import os
import time
import zlib

import pytest

pytest.importorskip("pypdf", reason="needs pypdf: pip install 'peft-longlora[chat]'")

from peft_longlora.data.limits import Limits
from peft_longlora.data.pdf import read_pages
from peft_longlora.data.pdf_process import read_pages_apart
from tests.helpers.chat_models import make_pdf


def never() -> bool:
    return False


def make_endless_pdf(pages: int = 10_000) -> bytes:
    """1.5 MB: 10,000 pages that share one megabyte of operators, which pypdf needs seconds for, page by page."""
    stream = zlib.compress(b"BT /F1 12 Tf 72 720 Td " + b"(a) Tj " * 150_000 + b"ET")
    page = b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R "
    page += b"/Resources << /Font << /F1 3 0 R >> >> >>"
    kids = b" ".join(b"%d 0 R" % (5 + i) for i in range(pages))
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [%s] /Count %d >>" % (kids, pages),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
        b"<< /Length %d /Filter /FlateDecode >>\nstream\n%s\nendstream" % (len(stream), stream),
        *[page] * pages,
    ]
    out, offsets = bytearray(b"%PDF-1.4\n"), []
    for number, body in enumerate(objects, 1):
        offsets.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    start = len(out)
    out += b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
    out += b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    out += b"trailer\n<< /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (len(objects) + 1, start)
    return bytes(out)


@pytest.fixture(scope="module")
def endless(tmp_path_factory):
    path = tmp_path_factory.mktemp("endless") / "endless.pdf"
    path.write_bytes(make_endless_pdf())
    assert path.stat().st_size < 2e6
    return path


def children() -> set[str]:
    """Ids of this process's children, as Linux says them."""
    return set(open(f"/proc/self/task/{os.getpid()}/children").read().split())


def test_the_text_is_that_of_the_same_process(tmp_path):
    path = tmp_path / "book.pdf"
    path.write_bytes(make_pdf(["One.\nTwo \\351.", "", "Three."]))
    seen = []
    assert read_pages_apart(path, Limits(), never, lambda *done: seen.append(done)) == read_pages(path, Limits())
    assert seen[-1] == (3, 3)


@pytest.mark.parametrize("content", [b"no PDF", make_pdf(["One."])[:120]])
def test_errors_are_those_of_the_same_process(tmp_path, content):
    path = tmp_path / "book.pdf"
    path.write_bytes(content)
    with pytest.raises(ValueError) as plain:
        read_pages(path, Limits())
    with pytest.raises(ValueError) as apart:
        read_pages_apart(path, Limits(), never)
    assert str(plain.value) == str(apart.value)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (Limits(pages=3000), "has 10,000 pages, and at most 3,000 are read here"),
        (Limits(seconds=2), "takes longer to read than 2 seconds, which ended at page"),
    ],
)
def test_an_endless_pdf_ends_at_every_limit(endless, limits, message):
    before = children()
    with pytest.raises(ValueError, match=message):
        read_pages_apart(endless, limits, never)
    assert children() <= before


def test_it_ends_when_nobody_waits_any_more(endless):
    before, end = children(), time.monotonic() + 1
    with pytest.raises(ValueError, match="is no longer wanted"):
        read_pages_apart(endless, Limits(), lambda: time.monotonic() > end)
    assert children() <= before


def test_a_process_that_dies_is_said(tmp_path, monkeypatch):
    """As of one that may take no more memory."""
    path = tmp_path / "book.pdf"
    path.write_bytes(make_pdf(["One."]))
    monkeypatch.setattr("peft_longlora.data.pdf_process._CHILD", "raise SystemExit(1)")
    with pytest.raises(ValueError, match="took too much memory"):
        read_pages_apart(path, Limits(), never)
