"""Builds the site out of the pages in docs/ and the docstrings: `make docs`, then open build/site/index.html.

    python docs/build.py

A new file docs/NAME.md is in the navigation by itself, under "More" until NAVIGATION names it. Pages link to each other
and to files of the repository as GitHub shows them; here such links lead to the site's pages or to the repository.
"""

import argparse
import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
SETTINGS = DOCS / "zensical.toml"
# Pages from elsewhere, under their names on the site. Those that are not there yet are left out.
OUTSIDE = {
    "README.md": "overview.md",
    "examples/README.md": "examples.md",
    "experiments/README.md": "experiments.md",
    "model_cards/README.md": "model_cards.md",
    "recipes/README.md": "recipes.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}
LABELS = {"index.md": "Home", "tutorial.md": "Tutorial", "overview.md": "Overview"}  # where the title is too long
NAVIGATION = {
    "Start": ["index", "tutorial", "how_it_works", "recipe", "overview", "examples", "recipes"],
    "Guides": ["training", "data", "data_parallel", "scaling", "memory", "evaluation", "serving", "app"],
    "What it is worth": ["recipe", "results", "performance", "experiments", "attention"],
    "Models": ["architectures", "model_cards"],
    "More": [],
    "Reference": ["commands"],  # then the rooms of the package
    "Project": ["contributing", "changelog", "security"],
}
LINK = re.compile(r"(\]\()(?!https?:|mailto:|#)([^)#\s]+)(#[^)\s]*)?(\))")
FENCE = re.compile(r"^\s*(```|~~~)")


def address(name: str) -> str:
    """One of the project's addresses, as pyproject.toml has it."""
    return re.search(rf'^{name} = "([^"]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)[1]


def find_pages() -> dict[Path, str]:
    """Every page of the repository that is one of the site, with its name there."""
    pages = {path: path.relative_to(DOCS).as_posix() for path in sorted(DOCS.rglob("*.md"))}
    outside = {(ROOT / path).resolve(): name for path, name in OUTSIDE.items() if (ROOT / path).exists()}
    # A page of docs/ goes before one from elsewhere with the same name.
    return {path: name for path, name in outside.items() if name not in pages.values()} | pages


def convert(text: str, source: Path, pages: dict[Path, str]) -> str:
    """Links lead to the site's pages and to the repository, and lists are indented as Python's Markdown reads them.

    Badges are left out: they are pictures of other servers, and tell nothing about the site.
    """

    def lead(match: re.Match) -> str:
        target, anchor = (source.parent / match[2]).resolve(), match[3] or ""
        if target in pages:
            found = os.path.relpath(pages[target], Path(pages[source]).parent)
        elif target.is_relative_to(DOCS / "images"):
            found = os.path.relpath(target.relative_to(DOCS), Path(pages[source]).parent)
        elif target.exists():
            kind = "tree" if target.is_dir() else "blob"
            found = f"{address('Source')}/{kind}/main/{target.relative_to(ROOT).as_posix()}"
        else:
            raise SystemExit(f"{source.relative_to(ROOT)}: {match[2]} leads nowhere")
        return f"{match[1]}{found}{anchor}{match[4]}"

    lines, fenced, before = [], False, ""
    for line in text.splitlines():
        if line.startswith("[!["):
            continue
        if FENCE.match(line):
            fenced = not fenced
        elif not fenced:
            line = LINK.sub(lead, line)
            # On GitHub a list begins without an empty line and nests by two or three blanks; here it takes four.
            is_item = re.match(r"\s*([-*]|\d+\.) ", line)
            if is_item and before.strip() and not re.match(r"\s*([-*]|\d+\.) |\s{2,}", before):
                lines.append("")
            nested = re.match(r"( {2,3})(?=([-*]|\d+\.) )", line)
            line = "    " + line[len(nested[1]) :] if nested else line
        lines.append(line)
        before = line
    return "\n".join(lines) + "\n"


def title_of(text: str) -> str:
    return re.search(r"^# (.+)$", text, re.MULTILINE)[1].replace("`", "")


def api_pages() -> dict[str, str]:
    """A page for each room of the package that has public names: its paragraph, then every name of its `__all__`."""
    found = {}
    for init in [ROOT / "peft_longlora/__init__.py", *sorted((ROOT / "peft_longlora").glob("*/__init__.py"))]:
        tree = ast.parse(init.read_text(encoding="utf-8"))
        lists = [
            ast.literal_eval(node.value)
            for node in tree.body
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__"
        ]
        if lists:
            module = ".".join(init.parent.relative_to(ROOT).parts)
            # The room's own paragraph, without a heading of its own.
            options = "members: []", "show_root_heading: false", "show_root_toc_entry: false"
            room = "\n      ".join([f"::: {module}\n    options:", *options]) + "\n"
            parts = [f"# {module}", room, *(f"::: {module}.{name}" for name in lists[0])]
            found[f"api/{module.partition('.')[2] or 'top'}.md"] = "\n\n".join(parts) + "\n"
    found["api/reference.md"] = "# peft_longlora.reference\n\n::: peft_longlora.reference.s2_attention_reference\n"
    return found


def command_page() -> str:
    """What `longlora --help` and the help of each command say; no command imports torch for that."""

    def help_of(*words: str) -> str:
        environment = os.environ | {"COLUMNS": "88", "NO_COLOR": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, str(ROOT / "longlora_command.py"), *words, "--help"]
        return subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout

    whole = help_of()
    parts = ["# Commands", f"```text\n{whole}```"]
    for name in re.findall(r"^    ([a-z]+)  ", whole, re.MULTILINE):
        parts += [f"## longlora {name}", f"```text\n{help_of(name)}```"]
    return "\n\n".join(parts) + "\n"


def navigation(titles: dict[str, str]) -> list[dict]:
    """Every page once: under the heading that names it, or under "More"."""
    left = titles | {name: label for name, label in LABELS.items() if name in titles}
    sections = {}
    for heading, names in NAVIGATION.items():
        sections[heading] = [{left.pop(f"{name}.md"): f"{name}.md"} for name in names if f"{name}.md" in left]
    sections["Reference"] += [{title: name} for name, title in left.items() if name.startswith("api/")]
    sections["More"] += [{title: name} for name, title in left.items() if not name.startswith("api/")]
    sections["Project"].append({"Repository": address("Source")})
    return [{heading: entries} for heading, entries in sections.items() if entries]


def toml(value) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return json.dumps(value)


def write_pages(output: Path) -> Path:
    """All that zensical reads, in one folder; returns its settings."""
    shutil.rmtree(output / "pages", ignore_errors=True)
    shutil.copytree(DOCS / "images", output / "pages/images")
    shutil.copy(DOCS / "extra.css", output / "pages/extra.css")
    pages = find_pages()
    texts = {name: convert(path.read_text(encoding="utf-8"), path, pages) for path, name in pages.items()}
    texts |= api_pages() | {"commands.md": command_page()}
    for name, text in texts.items():
        (output / "pages" / name).parent.mkdir(parents=True, exist_ok=True)
        (output / "pages" / name).write_text(text, encoding="utf-8")
    nav = navigation({name: title_of(text) for name, text in texts.items()})
    settings = SETTINGS.read_text(encoding="utf-8").replace("nav = []", f"nav = {toml(nav)}", 1)
    settings = settings.replace('paths = [".."]', f"paths = {toml([str(ROOT)])}", 1)
    (output / "zensical.toml").write_text(settings, encoding="utf-8")
    return output / "zensical.toml"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "build", help="folder for pages/ and site/")
    args = parser.parse_args()
    settings = write_pages(args.output.resolve())
    # Strict: a link that leads nowhere ends the build. So does a docstring that griffe cannot read: it only warns.
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean", "--config-file", str(settings)]
    done = subprocess.run(command, cwd=args.output, stderr=subprocess.STDOUT, stdout=subprocess.PIPE, text=True)
    print(done.stdout, end="")
    if done.returncode or "griffe: " in done.stdout or "WARNING" in done.stdout:
        return done.returncode or 1
    print(f"The site is in {args.output / 'site'}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
