"""`longlora chat` opens a file: the pages of a PDF are counted on a terminal, because some take hours."""

import pytest

pytest.importorskip("pypdf")

from peft_longlora.cli.chat import _open
from tests.helpers.chat_models import make_pdf


@pytest.mark.parametrize("is_terminal", [True, False])
def test_the_pages_of_a_pdf_are_counted(monkeypatch, tmp_path, capsys, is_terminal):
    monkeypatch.setattr("sys.stderr.isatty", lambda: is_terminal)
    (tmp_path / "a.pdf").write_bytes(make_pdf(["One page.", "Two pages."]))
    assert _open(str(tmp_path / "a.pdf")).text == "One page.\n\nTwo pages."
    said = capsys.readouterr().err
    assert said.endswith("\rOpening: 2 of 2 pages\n") if is_terminal else said == ""
