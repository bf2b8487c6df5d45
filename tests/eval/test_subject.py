"""What is evaluated: its identity, and that it is left as it was."""

import pytest

from peft_longlora.eval import Passkey, evaluate, load_subject
from tests.helpers.answering_models import letter_tokenizer
from tests.helpers.evaluated import save_base


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return save_base(tmp_path_factory.mktemp("model") / "base")


def test_a_tokenizer_of_another_model_is_named(tmp_path, base):
    """One that knows too many tokens is refused; one that knows few of the model's is a note beside the numbers."""
    letter_tokenizer().save_pretrained(tmp_path)
    assert load_subject(base).notes == []
    [note] = load_subject(base, tokenizer=str(tmp_path)).notes
    assert f"knows {len(letter_tokenizer())} tokens and the model has 4096 embeddings" in note


def test_the_model_is_left_as_it_was(tmp_path, base):
    subject = load_subject(base)
    subject.model.train()
    subject.model.model.layers[1].eval()  # as its user wants it
    modes = [module.training for module in subject.model.modules()]
    before = subject.model.config._attn_implementation
    evaluate(subject, [Passkey(lengths=[128], depths=[0], seeds=1)], tmp_path / "out")
    assert [module.training for module in subject.model.modules()] == modes
    assert subject.model.config._attn_implementation == before
