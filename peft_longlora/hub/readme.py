"""The README.md that exists in an adapter's folder: who wrote it, and how our part is put into it."""

from __future__ import annotations

import re
from pathlib import Path

import yaml
from huggingface_hub import ModelCard, ModelCardData

README = "README.md"
BEGIN = "<!-- peft-longlora: this part is written anew at every save; what stands outside of it is kept -->"
END = "<!-- peft-longlora: end -->"
_OUR_PART = re.compile(rf"^{re.escape(BEGIN)}$.*?^{re.escape(END)}$", re.DOTALL | re.MULTILINE)
_METADATA = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
# What huggingface_hub and yaml end in if metadata cannot be read.
UNREADABLE = (ValueError, TypeError, AttributeError, RecursionError, yaml.YAMLError)
_TRAINERS_DRAFT = "generated automatically according to the information the Trainer had"
# Lines that libraries write into a README, and that vary.
_LIBRARY_LINE = re.compile(
    r"- PEFT \S+|### Framework versions|## Training procedure|The following `bitsandbytes` quantization config .*"
    r"|- (_?load_in_|quant_method|llm_int8_|bnb_4bit_)\w*: .*|This is the model card of a \S+ transformers model .*"
)
_LISTS = ("tags", "datasets", "language")  # each holds a text or a list of texts
_TRL_HEADINGS = {"Quick start", "Training procedure", "Framework versions", "Citations"}


def read_readme(path: Path) -> str:
    """The text of a README, empty if there is none.

    Raises: ValueError: it is not UTF-8, or a folder has its name.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder, but the card is a file of this name. Move the folder.")
    try:
        return path.read_text(encoding="utf-8-sig") if path.is_file() else ""
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}). Convert it.") from error


def check_metadata(text: str, place: Path) -> None:
    """Refuse a README whose metadata, the YAML between two lines of ---, cannot be kept.

    Raises: ValueError.
    """
    try:
        kept = ModelCard(text or "---\n{}\n---\n").data.to_dict()
        for name in _LISTS:
            value = kept.get(name)
            values = value if isinstance(value, list) else [] if value is None else [value]
            if wrong := next((each for each in values if not isinstance(each, str)), None):
                raise ValueError(f"{name} holds {wrong!r}, which is not a text")
    except UNREADABLE as error:
        raise ValueError(
            f"The metadata at the top of {place} cannot be read: {' '.join(str(error).split())}. Correct it, or delete "
            f"the file."
        ) from error


def tags_of(text: str) -> list[str]:
    """The tags in a README's metadata: a list, or one text, which huggingface_hub before 1.34 takes for letters."""
    block = _METADATA.match(text)
    content = yaml.safe_load(block[1]) if block else None
    tags = content.get("tags") if isinstance(content, dict) else None
    return [tags] if isinstance(tags, str) else list(tags or ())


def with_our_part(text: str, part: str) -> str | None:
    """A README's text with our part replaced; None if a person wrote it and it has no part of ours."""
    part = f"{BEGIN}\n{part.strip()}\n{END}"
    if found := _OUR_PART.search(text):
        return text[: found.start()] + part + text[found.end() :]
    return f"\n{part}\n" if is_draft(text) else None


def is_draft(text: str) -> bool:
    """Whether a library wrote the whole text of a README, and no person changed it."""
    if not text.strip() or ("model card has been generated automatically" in text and "remove this comment" in text):
        return True
    if "It has been trained using [TRL]" in text:
        return {line.lstrip("# ") for line in text.splitlines() if line.startswith("##")} <= _TRL_HEADINGS
    empty = {line.strip() for line in ModelCard.from_template(ModelCardData()).text.splitlines()}
    lines = (line.strip() for line in text.splitlines())
    return all(line in empty or _LIBRARY_LINE.fullmatch(line) for line in lines)


def is_free(path: Path) -> bool:
    """Whether there is no README, or one that a library drafted. A README that cannot be read counts as a person's."""
    if not path.exists():
        return True
    try:
        return is_draft(ModelCard(read_readme(path), ignore_metadata_errors=True).text)
    except (OSError, *UNREADABLE):
        return False


def is_trainers_draft(path: Path) -> bool:
    """Whether transformers' Trainer has just drafted this README."""
    return path.is_file() and _TRAINERS_DRAFT in path.read_text(encoding="utf-8", errors="replace")


def merged_readmes(disk: str, hub: str) -> str:
    """One README from the adapter's own and the repository's, so that a push loses neither.

    Metadata is that of both; if both have an entry, that of the disk. The text is the repository's if a person wrote
    in it, and otherwise that of the disk.
    """
    try:
        ours, theirs = (ModelCard(text or "---\n{}\n---\n") for text in (disk, hub))
        tags = [*tags_of(hub), *tags_of(disk)]
    except UNREADABLE:  # `write_card` says what is wrong with it
        return hub or disk
    data = {**theirs.data.to_dict(), **ours.data.to_dict()}
    data |= {"tags": list(dict.fromkeys(tags))} if tags else {}
    text = theirs.text if _is_somebodys(theirs.text) or not ours.text.strip() else ours.text
    return f"---\n{yaml.safe_dump(data, sort_keys=False, allow_unicode=True)}---\n{text}"


def without_results(text: str) -> str:
    """A README without the results in its metadata; one whose metadata cannot be read stays as it is."""
    try:
        card = ModelCard(text)
    except UNREADABLE:
        return text
    data = {name: value for name, value in card.data.to_dict().items() if name != "model-index"}
    return f"---\n{yaml.safe_dump(data, sort_keys=False, allow_unicode=True)}---\n{card.text}"


def _is_somebodys(text: str) -> bool:
    """Whether a person wrote a part of a README's text."""
    return not is_draft(_OUR_PART.sub("", text))
