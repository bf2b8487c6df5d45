"""A README.md that lies in the way: it never ends a training, and a card asked for by name says what is wrong."""

import pytest

from peft_longlora import LongLoraConfig
from peft_longlora.hub.card import write_card

ODD = {
    "a list": ("---\n- a\n- b\n---\n", "metadata at the top of .*README.md cannot be read"),
    "not YAML": ("---\na: [\n---\n", "metadata at the top of .*README.md cannot be read"),
    "numbers as tags": ("---\ntags: [1, 2]\n---\n", "tags holds 1, which is not a text"),
    "a number as tags": ("---\ntags: 7\n---\n", "metadata at the top of .*README.md cannot be read"),
    "an object as language": ("---\nlanguage: {a: 1}\n---\n", "language holds .* which is not a text"),
    "numbers as data sets": ("---\ndatasets: [3.5]\n---\n", "datasets holds 3.5, which is not a text"),
    "too deep": ("---\na: " + "[" * 900 + "]" * 900 + "\n---\n", "metadata at the top of .*README.md cannot be read"),
    "not UTF-8": (b"\xff\xfe\x00", "not UTF-8"),
    "a folder": (None, "README.md is a folder, but the card is a file of this name"),
}


@pytest.mark.parametrize("case", ODD)
@pytest.mark.parametrize("above", [False, True], ids=["beside", "above a checkpoint"])
def test_a_save_goes_on_and_the_readme_is_as_it_was(case, above, tmp_path, caplog):
    content, message = ODD[case]
    folder = tmp_path / "checkpoint-7"
    readme = (tmp_path if above else folder) / "README.md"
    folder.mkdir()
    if content is None:
        readme.mkdir()
    else:
        readme.write_bytes(content if isinstance(content, bytes) else content.encode())
    LongLoraConfig().save_pretrained(folder)
    assert (folder / "adapter_config.json").is_file()
    assert (
        readme.is_dir()
        if content is None
        else readme.read_bytes() == (content if isinstance(content, bytes) else content.encode())
    )
    if above:
        assert "LongLoRA" in (folder / "README.md").read_text()
    with pytest.raises(ValueError, match=message):
        write_card(LongLoraConfig(), readme.parent)


def test_one_tag_as_text_is_a_tag(tmp_path):
    (tmp_path / "README.md").write_text("---\ntags: mine\nlanguage: en\n---\n# Mine\n")
    text = write_card(LongLoraConfig(), tmp_path).read_text()
    assert "- mine\n" in text and "- m\n" not in text and "# Mine" in text
