"""Long texts are tokenised in pieces: the same tokens as at once, in memory that does not follow the text."""

import argparse
import inspect
import logging

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from peft_longlora.data import encoding
from peft_longlora.data.encoding import encode_all
from tests.helpers.memory import forget, highest, needs_linux
from tests.helpers.paths import EMBEDDED

CODE = inspect.getsource(argparse)  # 100,000 characters
UMLAUTS = "".join(f"Ähre {i}, 漢字 und 🙂\n\n\tnaïve  Zeile…" for i in range(1000))


def train(model, trainer, normalizer=None, pre_tokenizer=None) -> PreTrainedTokenizerFast:
    """A tokenizer of its kind on its own source of text, with a token before each text and one after."""
    tokenizer = Tokenizer(model)
    if normalizer:
        tokenizer.normalizer = normalizer
    if pre_tokenizer:
        tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.train_from_iterator([line for line in (CODE[:30000] + UMLAUTS[:3000]).splitlines() if line], trainer)
    first, last = (tokenizer.token_to_id(token) for token in ("<s>", "</s>"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", first), ("</s>", last)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    special = {"special_tokens": ["<s>", "</s>", "<unk>"], "show_progress": False}
    return {
        "byte-level": AutoTokenizer.from_pretrained(EMBEDDED),
        # Llama 2's kind: no words are cut beforehand, and a text begins as if with a space
        "sentencepiece": train(
            models.BPE(unk_token="<unk>", fuse_unk=True),
            trainers.BpeTrainer(vocab_size=400, **special),
            normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        ),
        "unigram": train(
            models.Unigram(),
            trainers.UnigramTrainer(vocab_size=400, unk_token="<unk>", **special),
            normalizers.NFKC(),
            pre_tokenizers.Metaspace(),
        ),
        "wordpiece": train(
            models.WordPiece(unk_token="<unk>"),
            trainers.WordPieceTrainer(vocab_size=400, **special),
            normalizers.BertNormalizer(),
            pre_tokenizers.BertPreTokenizer(),
        ),
    }


class Recorder:
    """A fast tokenizer that notes how many characters it is given at once."""

    is_fast = True

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self.tokenizer, self.given = tokenizer, []
        self.backend_tokenizer = self

    def __call__(self, texts, **options):
        self.given.append(sum(map(len, texts)))
        return self.tokenizer(texts, **options)

    def encode_batch_fast(self, texts):
        self.given.append(sum(map(len, texts)))
        return self.tokenizer.backend_tokenizer.encode_batch_fast(texts)


@pytest.fixture
def small(monkeypatch):
    """Pieces of 1,000 characters, three at once."""
    for name, value in {"BATCH_CHARACTERS": 3000, "PIECE": 1000, "OVERLAP": 200, "AGREED": 8}.items():
        monkeypatch.setattr(encoding, name, value)


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece", "unigram", "wordpiece"])
def test_pieces_have_the_tokens_of_the_whole(tokenizers, kind, small):
    tokenizer = Recorder(tokenizers[kind])
    # also lengths at which the last piece begins, ends, or is almost nothing
    texts = [CODE, UMLAUTS, *(CODE[500 : 500 + n] for n in (1, 3000, 3001, 3399, 3400, 3401, 4000, 4400, 4401, 5000))]
    for text, ids in zip(texts, encode_all(tokenizer, texts), strict=True):
        assert ids.tolist() == tokenizers[kind](text, verbose=False)["input_ids"]
    whole = sum(len(text) for text in texts if len(text) <= 3000)
    assert max(n for n in tokenizer.given if n != whole) <= 3 * (1000 + 3 * 200), "no long text was given at once"


def test_texts_without_a_joint_are_tokenised_whole(tokenizers, small, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("peft_longlora"), "propagate", True)
    digits = "7" * 10_000 + "-"  # one word, whose tokens hang on where it begins and ends
    tokenizer = tokenizers["wordpiece"]
    assert encode_all(tokenizer, [digits])[0].tolist() == tokenizer(digits, verbose=False)["input_ids"]
    assert "A text of 10001 characters is tokenised whole" in caplog.text


def test_tokenizers_without_places_are_given_whole_texts(small):
    tokenizer = ByT5Tokenizer()
    texts = [CODE[:5000], "Ähre"]
    assert [ids.tolist() for ids in encode_all(tokenizer, texts)] == tokenizer(texts)["input_ids"]


def test_a_saved_limit_cuts_no_text(tokenizers):
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)  # not the shared one, which is changed here
    tokenizer.backend_tokenizer.enable_truncation(5)
    tokenizer.backend_tokenizer.enable_padding(length=9)
    expected = tokenizers["byte-level"]([CODE, "def f"], verbose=False)["input_ids"]
    assert [ids.tolist() for ids in encode_all(tokenizer, [CODE, "def f"])] == expected


@needs_linux
def test_a_long_text_takes_no_more_memory_than_a_batch():
    """Whole, these 1.6 million characters take more than 140 MiB to become tokens, which are 2 MiB then."""
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    encode_all(tokenizer, [CODE])
    before = forget()
    [ids] = encode_all(tokenizer, [CODE * 16])
    assert len(ids) > 300_000
    assert highest() - before < 60 * 2**20
