"""The site: every page is in the navigation once, links lead somewhere, and it is built without a warning."""

import importlib.util
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from peft_longlora.cli.main import COMMANDS
from tests.helpers.paths import ROOT
from tests.pages.test_docstrings import PUBLIC

SPEC = importlib.util.spec_from_file_location("docs_build", ROOT / "docs/build.py")
build = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(build)


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    build.write_pages(folder)
    return folder


def test_every_page_is_in_the_navigation_once(pages):
    named = re.findall(r'"([\w/]+\.md)"', re.search(r"^nav = (.*)$", (pages / "zensical.toml").read_text(), re.M)[1])
    written = {path.relative_to(pages / "pages").as_posix() for path in (pages / "pages").rglob("*.md")}
    assert sorted(named) == sorted(written) and len(named) == len(set(named))
    for path in (ROOT / "docs").glob("*.md"):
        assert path.name in written


def test_every_command_is_on_the_page_of_commands(pages):
    text = (pages / "pages/commands.md").read_text()
    assert {f"## longlora {name}" for name in COMMANDS} <= set(text.splitlines())
    assert "--tasks TASKS" in text and "\x1b" not in text


def test_a_new_page_is_taken_in():
    nav = build.navigation({"index.md": "Home", "api/x.md": "x", "something_new.md": "Something new"})
    assert {"More": [{"Something new": "something_new.md"}]} in nav and len(nav) == 4


def test_links_are_led_to_pages_and_to_the_repository():
    pages = {ROOT / "docs/a.md": "a.md", ROOT / "README.md": "overview.md", ROOT / "docs/sub/b.md": "sub/b.md"}
    text = "[x](../README.md#limits) ![y](images/quickstart.png) [z](../tests) [w](https://example.com/a.md)\n"
    found = build.convert(text, ROOT / "docs/a.md", pages)
    url = "https://github.com/peft-longlora/peft-longlora"
    assert found == (
        f"[x](overview.md#limits) ![y](images/quickstart.png) [z]({url}/tree/main/tests) [w](https://example.com/a.md)\n"
    )
    assert "](../overview.md)" in build.convert("[x](../../README.md)", ROOT / "docs/sub/b.md", pages)
    fenced = "```python\nx = y[0](../nowhere.md)\n```\n"
    assert build.convert(fenced, ROOT / "docs/a.md", pages) == fenced
    with pytest.raises(SystemExit, match="leads nowhere"):
        build.convert("[x](nowhere.md)", ROOT / "docs/a.md", pages)


def test_lists_are_those_that_github_shows():
    assert build.convert("Text:\n- a\n  b\n- c\n", ROOT / "docs/a.md", {}) == "Text:\n\n- a\n  b\n- c\n"
    assert build.convert("1. a:\n   - b\n   - c\n", ROOT / "docs/a.md", {}) == "1. a:\n    - b\n    - c\n"


class Page(HTMLParser):
    """The targets and the anchors of a page."""

    def __init__(self, path: Path):
        super().__init__()
        self.targets, self.anchors, self.pictures = [], set(), []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.anchors |= {values[key] for key in ("id", "name") if values.get(key)}
        self.targets += [values[key] for key in ("href", "src") if values.get(key)]
        self.pictures += [(values["src"], values.get("alt"))] if tag == "img" else []


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_holds_together(tmp_path):
    """zensical's own check, and every target of every page: files, anchors, and no file of another server."""
    pytest.importorskip("zensical", reason="needs the extra docs: pip install 'peft-longlora[docs]'")
    pytest.importorskip("mkdocstrings", reason="needs the extra docs: pip install 'peft-longlora[docs]'")
    command = [sys.executable, str(ROOT / "docs/build.py"), "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    site = tmp_path / "site"
    found = {path.resolve(): Page(path) for path in site.rglob("*.html")}
    assert len(found) > 20
    address = build.address("Documentation")
    for path, page in found.items():
        for target in page.targets:
            parts = urlsplit(target.replace(address, "/") if target.startswith(address) else target)
            if parts.scheme or parts.netloc or path.name == "404.html":
                continue
            file = (
                path
                if not parts.path
                else (site / parts.path[1:] if parts.path[0] == "/" else path.parent / parts.path)
            )
            file = Path(unquote(str(file))).resolve()
            file = file / "index.html" if file.is_dir() else file
            assert file.exists(), f"{path.relative_to(site)}: {target}"
            if parts.fragment and file in found and not parts.fragment.startswith("__"):
                assert unquote(parts.fragment) in found[file].anchors, f"{path.relative_to(site)}: {target}"
        foreign = [src for src, _ in page.pictures if src.startswith("http")]
        assert not foreign and all(alt for _, alt in page.pictures), path
    anchors = set().union(*(page.anchors for page in found.values()))
    missing = {name for name in PUBLIC if name not in anchors}
    assert not missing, "public names that the reference does not show"
