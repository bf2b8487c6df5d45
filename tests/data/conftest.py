"""What the tests of peft_longlora.data share: the embedded tokenizer, and what the package logs."""

import pytest
from transformers import AutoTokenizer
from transformers.utils import logging

from tests.helpers.paths import EMBEDDED


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(EMBEDDED)


@pytest.fixture
def log(caplog):
    """What the package logs; transformers' loggers do not propagate by themselves."""
    logging.enable_propagation()
    yield caplog
    logging.disable_propagation()
