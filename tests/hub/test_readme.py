"""One README from two: nothing that a person wrote is lost, on the disk or on the Hub."""

import pytest
from huggingface_hub import ModelCard

from peft_longlora.hub.readme import BEGIN, END, merged_readmes, without_results

OURS = f"{BEGIN}\nOur part.\n{END}\n"
INDEX = "model-index:\n- name: a\n  results:\n  - task:\n      type: text-generation\n"
INDEX += "    dataset:\n      type: b\n      name: b\n"
INDEX += "    metrics:\n    - type: perplexity\n      value: 7.5\n"


def readme(text: str, metadata: str = "") -> str:
    return f"---\n{metadata or '{}'}\n---\n{text}"


@pytest.mark.parametrize(
    ("disk", "hub", "kept"),
    [
        (OURS, "", "Our part."),
        ("", OURS, "Our part."),
        (f"{OURS}\nBy night.", OURS, "By night."),
        (OURS, f"{OURS}\nOn the Hub.", "On the Hub."),
        (f"{OURS}\nBy night.", "I wrote this.", "I wrote this."),
    ],
)
def test_what_a_person_wrote_stays(disk, hub, kept):
    text = merged_readmes(disk and readme(disk), hub and readme(hub))
    assert kept in text and text.count(BEGIN) <= 1


def test_metadata_of_both_is_kept_and_the_disks_wins():
    """One tag written as text is one tag."""
    disk = readme(OURS, "license: mit\ntags: books\ndatasets:\n- me/books")
    hub = readme(OURS, "license: llama2\nlanguage:\n- en\ntags:\n- mine\n- books")
    data = ModelCard(merged_readmes(disk, hub)).data.to_dict()
    assert data == {"license": "mit", "language": ["en"], "tags": ["mine", "books"], "datasets": ["me/books"]}


@pytest.mark.parametrize("broken", ["a: [", "- a list", "model-index: 7"])
def test_metadata_that_cannot_be_read_is_left_to_the_card(broken):
    """`write_card` says what is wrong; nothing is guessed here."""
    for disk, hub in ((readme("Disk", broken), readme("Hub")), (readme("Disk"), readme("Hub", broken))):
        assert "Hub" in merged_readmes(disk, hub)
    assert "Disk" in without_results(readme("Disk", broken))


def test_results_leave_the_metadata_and_nothing_else():
    card = ModelCard(without_results(readme(OURS, f"license: mit\n{INDEX}")))
    assert card.data.to_dict() == {"license": "mit"} and "Our part." in card.text
