"""Passages: the attention is that of one plain eager forward, and the best spans are the best."""

import pytest
import torch

from peft_longlora.chat import attention, passages
from peft_longlora.chat.conversation import Conversation
from peft_longlora.chat.kvcache import KVCache
from tests.helpers.chat_models import a_document, a_model, a_reader

IDS = torch.randint(3, 250, (180,), generator=torch.Generator().manual_seed(7)).tolist()


def eager_truth(model, row, start, layers) -> torch.Tensor:
    """output_attentions over the whole row, without a cache."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    before = base.config._attn_implementation
    base.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(input_ids=torch.tensor([row]), output_attentions=True, use_cache=False).attentions
    base.set_attn_implementation(before)
    return torch.stack([weights[i][0, :, start - 1 : -1, :start].mean((0, 1)) for i in layers]).mean(0)


@pytest.mark.parametrize(
    "options, layers",
    [
        (dict(), [0, 1]),
        (dict(adapter=False), [0, 1]),
        (dict(num_hidden_layers=6), [2, 3, 4, 5]),
        (dict(model_type="gpt_neox"), [0, 1]),
        (dict(model_type="qwen3", head_dim=8), [0, 1]),
        (
            dict(
                model_type="gemma3_text",
                head_dim=8,
                sliding_window=32,
                layer_types=["full_attention", "sliding_attention"],
            ),
            [0],
        ),
    ],
)
@pytest.mark.parametrize("rows", [1, 100])
def test_attention_is_that_of_one_eager_forward(options, layers, rows, monkeypatch):
    model, start = a_model(**options), 150
    monkeypatch.setattr(attention, "WEIGHTS", rows * 4 * len(IDS))  # so many rows of 4 heads at a time
    before = model.config._attn_implementation
    kv = KVCache(model, chunk_size=64)
    kv.fill(IDS)
    hooks = [len(module._forward_hooks) for module in model.modules()]
    found = attention.document_attention(kv, IDS, start)
    assert found.shape == (start,) and kv.ids == IDS[:-1]
    assert model.config._attn_implementation == before
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    torch.testing.assert_close(found, eager_truth(model, IDS, start, layers), rtol=1e-4, atol=1e-6)


def test_no_square_of_the_row_is_made():
    """Every tensor that attention hands over has at most the answer's rows."""
    model, shapes = a_model(), []
    kv = KVCache(model, chunk_size=64)
    kv.fill(IDS)
    for layer in attention.find_attention_modules(model).values():
        layer.register_forward_hook(
            lambda m, args, out: shapes.append(tuple(out[1].shape)) if out[1] is not None else None
        )
    attention.document_attention(kv, IDS, 150)
    assert shapes and all(rows <= len(IDS) - 150 + 1 for _, _, rows, _ in shapes)


def test_the_best_spans_are_the_best(tmp_path):
    text = "".join(f"Sentence {i} stands here.\n" for i in range(200))
    dialogue = Conversation(a_reader(chat=True), a_document(tmp_path, text)).dialogue
    scores = torch.zeros(len(dialogue.document_ids))
    for rank, i in enumerate((120, 10, 60)):
        at = text.index(f"Sentence {i} ")
        scores[at : at + 20] = 3.0 - rank
    found = attention.top_passages(scores, dialogue, 3)
    assert [f"Sentence {i} " in p.text for p, i in zip(found, (120, 10, 60), strict=True)] == [True] * 3
    assert [p.share for p in found] == pytest.approx([3 / 6, 2 / 6, 1 / 6])
    assert [p.reason for p in found] == [f"{n / 6:.1%} of the attention to the document" for n in (3, 2, 1)]
    for p in found:
        first, last = (int(n) for n in p.place.removeprefix("lines ").split("-"))
        assert p.text in "\n".join(text.splitlines()[first - 1 : last])
    assert len(attention.top_passages(scores, dialogue, 9)) == 3  # nothing is shown that got no attention


@pytest.mark.parametrize("text", ["".join(chr(0x4E00 + i * 7919 % 5000) for i in range(3000)), "x" * 3000])
def test_passages_of_text_without_spaces_are_short_and_apart(tmp_path, text):
    """A token is a byte here, three to a Chinese character."""
    dialogue = Conversation(a_reader(chat=True), a_document(tmp_path, text)).dialogue
    scores = torch.rand(len(dialogue.document_ids), generator=torch.Generator().manual_seed(0))
    best, width = len(scores) // 2, passages.span_of(len(scores))
    scores[best : best + width] += 5
    found = attention.top_passages(scores, dialogue, 3)
    assert len(found) == 3 and all(len(p.text) <= width for p in found)
    first, last = (dialogue.offsets[i][k] for i, k in ((best, 0), (best + width - 1, 1)))
    assert found[0].text == text[first:last]


@pytest.mark.parametrize("text", ["word " * 30, "one two", "a " + "b" * 100 + " c", "x" * 30, "y" * 100])
def test_words_are_whole_and_long_ones_are_not_followed(text):
    for start in range(len(text)):
        for end in range(start + 1, len(text) + 1):
            first, last = passages.whole_words(text, start, end)
            assert start - passages.WORD <= first <= start < end <= last <= end + passages.WORD
            for at, given in ((first, start), (last, end)):
                is_end = at in (0, len(text)) or text[at - 1].isspace() or text[at].isspace()
                assert is_end or at == given
            if first == start > 0 and not text[start - 1].isspace():  # a long word: there is no end within reach
                assert " " not in text[max(start - passages.WORD, 0) : start] and start > passages.WORD


def test_a_planted_answer_is_found(tmp_path):
    """A head that looks for the same byte: the answer's bytes stand in one line of the document alone."""
    text = "aaaa bbbb cccc\n" * 40 + "zzzz zzzz zzzz zzzz\n" + "dddd eeee ffff\n" * 40
    reader = a_reader(model=a_model(adapter=False, num_hidden_layers=1, tie_word_embeddings=True), chat=True)
    layer = reader.model.model.layers[0].self_attn
    with torch.no_grad():
        for projection in (layer.q_proj, layer.k_proj):
            size = projection.weight.shape[0]
            projection.weight.copy_(torch.eye(32)[:size] * 6)
        layer.q_proj.weight.copy_(torch.cat([torch.eye(32)[:8]] * 2 + [torch.eye(32)[8:16]] * 2) * 6)
        reader.model.model.rotary_emb.inv_freq.zero_()
    conversation = Conversation(reader, a_document(tmp_path, text), max_new_tokens=4)
    list(conversation.ask("?"))
    conversation._row = conversation._prompt + conversation.tokenizer("zzzzzz")["input_ids"]
    best = conversation.passages(1, by="attention")[0]
    assert "zzzz" in best.text and "41" in best.place and float(best.reason.partition("%")[0]) > 50


def test_there_is_nothing_to_show_before_an_answer(tmp_path):
    conversation = Conversation(a_reader(chat=True), a_document(tmp_path), max_new_tokens=8)
    with pytest.raises(ValueError, match="no answer yet"):
        conversation.passages(by="attention")
    conversation.dialogue.offsets = None
    list(conversation.ask("Where?"))
    with pytest.raises(ValueError, match="does not give the places"):
        conversation.passages(by="attention")


def test_asking_goes_on_after_passages_as_if_none_had_been_shown(tmp_path):
    found = []
    for show in (False, True):
        conversation = Conversation(a_reader(chat=True), a_document(tmp_path), max_new_tokens=16)
        for question in ("Where?", "Why?"):
            list(conversation.ask(question))
            if show:
                assert conversation.passages(by="attention")
        found.append(conversation._row)
    assert found[0] == found[1]
