"""The text of a PDF, page by page, or one error that names the file and the page.

Called by rows.py and by the chat. A damaged file makes pypdf raise errors of any kind: its own, Python's and other
libraries'. Each of them becomes a ValueError here.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from peft_longlora.data.limits import Limits

if TYPE_CHECKING:
    import pypdf


def read_pages(path: Path, limits: Limits) -> list[str]:
    """The text of each page, without white space around it; empty for a page without text.

    Raises:
        ValueError: not a PDF, a broken or encrypted one, or one beyond the limits. ImportError: pypdf is not installed.
    """
    return list(iterate_pages(path, limits, open_pdf(path, limits)))


def open_pdf(path: Path, limits: Limits) -> pypdf.PdfReader:
    """Open a PDF, and refuse one that cannot be read or has too many pages. Raises: as `read_pages`."""
    try:
        import pypdf
        from pypdf.errors import FileNotDecryptedError
    except ImportError:
        raise ImportError("Reading a PDF needs pypdf: pip install 'peft-longlora[chat]'") from None
    try:
        reader = pypdf.PdfReader(path)
        # Many files are locked with the empty password, which only forbids printing or copying.
        if reader.is_encrypted and not reader.decrypt(""):
            raise FileNotDecryptedError
        count = len(reader.pages)
    except Exception as error:
        raise _refusal(path, error, "is not a PDF, or is broken") from None
    limits.check_pages(path, count)
    return reader


def iterate_pages(path: Path, limits: Limits, reader: pypdf.PdfReader) -> Iterator[str]:
    """The text of one page after the other. Raises: as `read_pages`."""
    end, count, characters = time.monotonic() + limits.seconds, len(reader.pages), 0
    for number in range(count):
        try:
            text = reader.pages[number].extract_text()
        except Exception as error:
            raise _refusal(path, error, f"cannot be read: page {number + 1} of {count} is broken") from None
        # Broken font tables give lone surrogates, which no tokenizer accepts.
        text = text.encode("utf-8", "replace").decode("utf-8").replace("\0", "").strip()
        characters += len(text)
        limits.check_characters(path, characters)
        limits.check_time(path, end, f"page {number + 1} of {count}")
        yield text


def refuse_scan(path: Path, pages: list[str]) -> None:
    """Refuse a PDF of which no page holds text.

    Raises: ValueError.
    """
    if not any(pages):
        raise ValueError(
            f"{path}: none of its {len(pages)} pages holds text; it is probably a scan. Run OCR on it first "
            f"(ocrmypdf {path.name} text.pdf), or leave it out."
        )


def _refusal(path: Path, error: Exception, what: str) -> ValueError:
    from pypdf.errors import DependencyError, FileNotDecryptedError

    reason = " ".join(str(error).split()) or type(error).__name__
    # A package is also missing for some filters of images: only decryption is about a password.
    if isinstance(error, FileNotDecryptedError) or (isinstance(error, DependencyError) and "cryptography" in reason):
        return ValueError(
            f"{path} is encrypted. Remove its password first: qpdf --decrypt --password=... {path.name} open.pdf"
        )
    return ValueError(f"{path} {what} ({reason[:200]}). Print it to a new PDF, or save its text as .txt.")
