"""The tokens of a run, over all its starts: on the card, in training.json and in the log."""

import json
import re

import pytest
from transformers import AutoTokenizer

from peft_longlora.training import last_checkpoint
from tests.helpers.tiny_base import prose

pytest.importorskip("trl", minversion="1.16")
STEPS = ("--no-packing", "--logging-steps", 3, "--save-steps", 2, "--save-total-limit", 9)


@pytest.fixture
def counts(place, tmp_path):
    """A text of rows of different lengths, and its tokens: the tokenizer's, with a start of sequence, and an end."""
    tokenizer, lines = AutoTokenizer.from_pretrained(place / "base"), [prose(20 + 9 * n, n) for n in range(6)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return tmp_path / "texts.jsonl", [len(tokenizer.tokenize(line)) + 2 for line in lines]


def said(folder) -> list[str]:
    """The numbers of tokens on the card and in training.json."""
    texts = ((folder / name).read_text() for name in ("README.md", "training.json"))
    return [re.findall(r"learning rate 0.01(?:, ([\d,]+) tokens)?", text) for text in texts]


def logged(folder) -> list[int]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["num_tokens"] for entry in history if "num_tokens" in entry]


def test_the_tokens_of_all_starts_are_counted(run, counts):
    """One epoch sees every token once, wherever it was stopped; a longer run of the same sees more."""
    data, each = counts
    for steps in (2, 3, 6):  # 3: its save is at the end, between two logs
        code, _, _, folder = run("--data", data, *STEPS, "--max-steps", steps)
        assert code == 0
    total = sum(each)
    assert said(folder) == [[f"{total:,}"]] * 2
    assert logged(folder) == sorted(logged(folder)) and logged(folder)[-1] == total
    assert json.loads((last_checkpoint(folder) / "trainer_state.json").read_text())["num_input_tokens_seen"] == total
    assert run("--data", data, *STEPS, "--max-steps", 12)[0] == 0
    assert said(folder) == [[f"{2 * total:,}"]] * 2


def test_a_run_without_a_count_states_none(run, counts):
    """Its checkpoint is of a version that counted from the last start; nor does any later start know."""
    data, _ = counts
    folder = run("--data", data, *STEPS, "--max-steps", 2)[3]
    path = folder / "checkpoint-2/trainer_state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_input_tokens_seen": 0}))
    for steps in (4, 6):
        assert run("--data", data, *STEPS, "--max-steps", steps)[0] == 0
        assert said(folder) == [[""], [""]]
    (folder / "README.md").unlink()  # of a run that is complete, the card is made again
    assert run("--data", data, *STEPS, "--max-steps", 6)[0] == 0 and said(folder) == [[""], [""]]
