"""Models whose answers are known, and the words they speak: for the tests of `peft_longlora.eval`."""

import re
from types import SimpleNamespace

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, PreTrainedTokenizerFast

from peft_longlora.eval.subject import Subject


def byte_tokenizer(**options) -> PreTrainedTokenizerFast:
    """A token for each byte, so every text survives encoding and a token is a character of English text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)


def letter_tokenizer(order: str = "abcd") -> PreTrainedTokenizerFast:
    """Four letters, four tokens."""
    tokenizer = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(order)}, unk_token="d"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


class Bigrams(nn.Module):
    """Predicts by the last token alone: logits of the token after i are log P[i], whatever the position."""

    def __init__(self, probabilities: torch.Tensor):
        super().__init__()
        n = len(probabilities)
        self.embeddings = nn.Embedding.from_pretrained(torch.eye(n))
        self.head = nn.Linear(n, n, bias=False)
        self.head.weight = nn.Parameter(probabilities.log().T.contiguous())
        self.config = LlamaConfig(vocab_size=n, max_position_embeddings=32)
        self.device = torch.device("cpu")
        self.largest = 0  # most positions that logits were made for at a time

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> SimpleNamespace:
        logits = self.head(self.embeddings(input_ids))
        self.largest = max(self.largest, logits.shape[1])
        return SimpleNamespace(logits=logits)


class Scripted(nn.Module):
    """A model that writes what `script` makes of the prompt's text, one token a character."""

    def __init__(self, script, window: int = 100_000):
        super().__init__()
        self.script, self.tokenizer = script, byte_tokenizer()
        self.embeddings = nn.Embedding(len(self.tokenizer), 1)
        self.config = LlamaConfig(vocab_size=len(self.tokenizer), max_position_embeddings=window)
        self.device = torch.device("cpu")
        self.prompts: list[str] = []

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> None:
        """Nothing is asked of it but answers."""

    def generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, generation_config) -> torch.Tensor:
        prompt = self.tokenizer.decode(input_ids[0])
        self.prompts.append(prompt)
        answer = self.tokenizer(self.script(prompt))["input_ids"][: generation_config.max_new_tokens]
        return torch.cat([input_ids, torch.tensor([answer], dtype=torch.long)], dim=1)


def scripted_subject(script, **options) -> Subject:
    model = Scripted(script, **options)
    return Subject.of(model, model.tokenizer)


def read_passkey(prompt: str) -> str:
    """What a perfect reader of the passkey prompt writes."""
    return " " + re.search(r"The pass key is (\d+)\. Remember it\.", prompt).group(1) + ". Remember"


def read_needles(prompt: str) -> str:
    """All values of all keys that RULER's last question names."""
    query = re.findall(r"What (?:is|are all) the special magic \w+ for (.*) mentioned in the provided text\?", prompt)[
        -1
    ]
    keys = re.split(r", and |, ", query)
    pairs = re.findall(r"One of the special magic \w+ for (\S+) is: (\S+)\.", prompt)
    return ", ".join(value for key, value in pairs if key in keys)


def read_chain(prompt: str) -> str:
    """All variables that the last question's value reaches."""
    text = prompt[prompt.rindex("Memorize and track") :]
    value = re.search(r"assigned the value (\d+) in the text", text).group(1)
    found = {re.search(rf"VAR (\w+) = {value}", text).group(1)}
    assignments = re.findall(r"VAR (\w+) = VAR (\w+)", text)
    for _ in assignments:
        found |= {name for name, source in assignments if source in found}
    return " ".join(sorted(found))


def count_words(prompt: str) -> str:
    """The ten words said most often in the last list."""
    text = prompt[prompt.rindex("Below is a numbered list") :].partition("\nQuestion")[0]
    words = re.findall(r"\d+\. (\w+)", text)
    return " ".join(sorted(set(words), key=words.count, reverse=True)[:10])


def count_code(prompt: str) -> str:
    """The three words said most often, dots left out."""
    words = prompt.partition("coded words. ")[2].partition("\nQuestion")[0].split()
    ranked = sorted(set(words) - {"..."}, key=words.count, reverse=True)
    return ", ".join(ranked[:3])
