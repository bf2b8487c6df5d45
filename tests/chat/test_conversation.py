"""Conversations: the answers are those of a plain `generate` on the whole row, and the document is computed once."""

import threading
import time

import pytest
import torch
from transformers import QuantizedCache

from peft_longlora.chat import Conversation
from peft_longlora.chat.dialogue import Turn
from peft_longlora.chat.kvcache import quantiser_options
from peft_longlora.chat.stream import Stop, Stopped, from_first_word, until
from tests.helpers.chat_models import TEXT, a_document, a_model, a_reader
from tests.helpers.releases import CACHE

QUESTIONS = ["Where is the key?", "And the coin?", "Why?"]


@torch.no_grad()
def plain_answer(conversation, question, max_new_tokens=24) -> list[int]:
    """The row that transformers' `generate` writes by itself: no cache of ours, no streamer, nothing in chunks."""
    row = conversation.dialogue.ids([*conversation.turns, Turn(question)])
    inputs = torch.tensor([row])
    out = conversation.model.generate(
        inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=max_new_tokens, do_sample=False
    )
    return out[0].tolist()


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("adapter", [True, False])
def test_answers_are_those_of_plain_generate(tmp_path, chat, adapter):
    conversation = Conversation(
        a_reader(chat=chat, adapter=adapter), a_document(tmp_path), chunk_size=100, max_new_tokens=24
    )
    for i, question in enumerate(QUESTIONS):
        want = plain_answer(conversation, question)
        text = "".join(conversation.ask(question))
        assert text == text.lstrip()
        assert conversation._row == want
        assert conversation.turns[i].answer == text.strip()
        assert conversation.tokens == len(want)
        assert conversation.usage == f"{len(want):,} of 2,048 tokens ({len(want) / 2048:.1%})" or not adapter
    conversation.forget()
    want = plain_answer(conversation, QUESTIONS[0])
    list(conversation.ask(QUESTIONS[0]))
    assert conversation._row == want and len(conversation.turns) == 1


def test_the_document_is_forwarded_once(tmp_path):
    conversation = Conversation(a_reader(chat=True), a_document(tmp_path), chunk_size=100, max_new_tokens=8)
    sizes, progress = [], []
    conversation.model.get_input_embeddings().register_forward_hook(lambda m, args, out: sizes.append(args[0].shape[1]))
    conversation.read(lambda done, total: progress.append(done))
    n = len(conversation.dialogue.start)
    assert sum(sizes) == n and max(sizes) == 100 and progress == [*range(100, n, 100), n]
    for question in QUESTIONS:
        sizes.clear()
        list(conversation.ask(question))
        assert sum(sizes) < 80 < n
    conversation.forget()
    sizes.clear()
    list(conversation.ask("Again?"))
    assert sum(sizes) < 80


def test_a_quantised_cache_gives_the_tokens_of_transformers_own_quantised_cache(tmp_path):
    pytest.importorskip("hqq")
    reader = a_reader(model=a_model(head_dim=32), chat=True)
    conversation = Conversation(reader, a_document(tmp_path), cache="quantised", max_new_tokens=24, chunk_size=5000)
    # The prompt in one piece, so that both quantise it once and alike: the document, then the rest at full precision.
    row = conversation.dialogue.ids([Turn("Why?")])
    inputs = torch.tensor([row])
    cache = QuantizedCache("hqq", reader.model.config, **quantiser_options("hqq", reader.model.config))
    with torch.no_grad():
        reader.model(inputs[:, : len(conversation.dialogue.start)], **{CACHE: cache}, use_cache=True)
        reader.model(inputs[:, len(conversation.dialogue.start) : -1], **{CACHE: cache}, use_cache=True)
    want = reader.model.generate(
        inputs, attention_mask=torch.ones_like(inputs), **{CACHE: cache}, max_new_tokens=24, do_sample=False
    )
    for _ in range(2):
        list(conversation.ask("Why?"))
        assert conversation._row == want[0].tolist()
        conversation.forget()


def test_sampling_repeats_itself_by_its_seed(tmp_path):
    reader, document = a_reader(chat=True), a_document(tmp_path)

    def answers(**options):
        conversation = Conversation(reader, document, max_new_tokens=16, **options)
        return ["".join(conversation.ask(q)) for q in QUESTIONS]

    hot = dict(temperature=5.0, top_p=0.9)
    assert answers(**hot, seed=1) == answers(**hot, seed=1) != answers(**hot, seed=2)
    torch.manual_seed(5)
    assert answers() == answers(seed=3)


def test_conversations_on_one_model_do_not_mix(tmp_path):
    """Two threads take turns at one model, stopped and started at random; each gets what it gets alone."""
    reader, lock = a_reader(chat=True), threading.Lock()
    books = [a_document(tmp_path, TEXT), a_document(tmp_path, TEXT[::-1])]

    def converse(book, lock, found):
        conversation = Conversation(reader, book, max_new_tokens=16, lock=lock, chunk_size=64)
        found += ["".join(conversation.ask(q)) for q in QUESTIONS]

    alone, together = [[], []], [[], []]
    for book, found in zip(books, alone, strict=True):
        converse(book, None, found)
    threads = [threading.Thread(target=converse, args=(b, lock, f)) for b, f in zip(books, together, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone and alone[0] != alone[1]


def test_an_answer_can_be_stopped_and_counts(tmp_path):
    conversation = Conversation(a_reader(chat=True), a_document(tmp_path), max_new_tokens=2000)
    pieces = conversation.ask("Where?")
    next(pieces)
    pieces.close()
    assert len(conversation.turns) == 1 and conversation.tokens < 2000
    conversation.max_new_tokens = 16
    want = plain_answer(conversation, "And?", 16)
    list(conversation.ask("And?"))
    assert conversation._row == want


def test_stopping_while_reading_keeps_what_was_read(tmp_path):
    """As Ctrl-C does during the first question: the second chunk is the first to find the sign."""
    conversation = Conversation(a_reader(chat=True), a_document(tmp_path), max_new_tokens=8, chunk_size=64)
    stop, seen = Stop(conversation.tokenizer, None), []
    hook = conversation.model.get_input_embeddings().register_forward_hook(
        lambda *_: seen.append(1) or (stop.set() if len(seen) == 2 else None)
    )
    with pytest.raises(Stopped):
        conversation._answer(Turn("Where?"), None, stop)
    hook.remove()
    assert conversation.turns == [] and len(conversation.kv.ids) == 128 < len(conversation.dialogue.start)
    want = plain_answer(conversation, "Where?", 8)
    list(conversation.ask("Where?"))
    assert conversation._row == want


def test_an_error_is_the_readers_and_the_next_question_is_answered(tmp_path):
    conversation = Conversation(a_reader(chat=True), a_document(tmp_path), max_new_tokens=8)
    want = plain_answer(conversation, "Where?", 8)
    calls = []

    def fail(module, args):
        calls.append(1)
        if len(calls) == 4:
            raise torch.OutOfMemoryError("out of memory")

    hook = conversation.model.get_base_model().model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(torch.OutOfMemoryError):
        list(conversation.ask("Where?"))
    hook.remove()
    assert conversation.turns == []
    list(conversation.ask("Where?"))
    assert conversation._row == want
    with pytest.raises(ValueError, match="question is empty"):
        list(conversation.ask("  "))


def test_what_exceeds_the_window_is_said_and_not_cut(tmp_path):
    document = a_document(tmp_path)
    for window, message in {
        64: "Nothing is cut",
        len(TEXT) + 10: "answers may run past the window",
        4096: None,
    }.items():
        reader = a_reader(chat=True)
        reader.window = window
        conversation = Conversation(reader, document, max_new_tokens=100)
        found = conversation.warnings()
        assert (message in found[0]) if message else found == []
        conversation.read()
        assert conversation.kv.ids == conversation.dialogue.start  # all of it, whatever the window
        assert conversation.document_tokens == len(document.text.encode())


@pytest.mark.parametrize(
    "pieces, want",
    [
        (["a\nQues", "tion: b", "c"], "a"),
        (["a", "\nQ", "ues", "b"], "a\nQuesb"),
        (["\n", "\nQuestion:"], "\n"),
        (["a\n"], "a\n"),
        ([], ""),
    ],
)
def test_a_stop_string_never_shows(pieces, want):
    found = list(until(iter(pieces), "\nQuestion:"))
    assert "".join(found) == want and "" not in found[:-1]
    assert "".join(until(iter(pieces), None)) == "".join(pieces)


def test_an_answer_begins_with_its_first_word():
    assert list(from_first_word(iter([" ", "\n\n a", " b", "\n"]))) == ["", "a", " b", "\n"]


def test_plain_answers_end_where_a_question_follows(tmp_path):
    """A model that always goes on with a question of its own: its answer ends there, in the stream and in the turn."""
    conversation = Conversation(a_reader(adapter=False), a_document(tmp_path), max_new_tokens=64)
    script = "the 1st box.\nQuestion: Why?\nAnswer: Because."
    ids = conversation.tokenizer(script)["input_ids"]
    head, start = conversation.model.lm_head, len(conversation.dialogue.ids([Turn("Where?")]))

    def say(module, args, output):
        step = conversation.kv.cache.get_seq_length() - start
        output.fill_(0)[..., ids[min(max(step, 0), len(ids) - 1)]] = 1

    head.register_forward_hook(say)
    assert "".join(conversation.ask("Where?")) == "the 1st box."
    assert conversation.turns[0].answer == "the 1st box."
    assert conversation.tokens < start + len(ids)


# -- several readers -----------------------------------------------------------------------------------------------


def test_a_question_that_waits_for_another_reader_is_stopped_at_once(tmp_path):
    """Stop before the first token: no turn is kept, and no passages are shown that belong to the answer before."""
    conversation = Conversation(a_reader(chat=True), a_document(tmp_path), max_new_tokens=8)
    for before in ([], ["Where?"]):
        for question in before:
            list(conversation.ask(question))
            assert conversation.has_answer and conversation.passages(by="attention")
        with conversation.lock:  # another reader has the model
            said = []
            asking = threading.Thread(target=lambda: said.extend(conversation.ask("Why?")))  # noqa: B023
            asking.start()
            time.sleep(0.2)
            assert asking.is_alive()
            conversation.stop()
            asking.join(timeout=30)
            assert not asking.is_alive()
        assert "".join(said) == "" and [turn.question for turn in conversation.turns] == before
        assert not conversation.has_answer
        with pytest.raises(ValueError, match="no answer yet"):
            conversation.passages()


@pytest.mark.parametrize("end", ["forget", "close"])
def test_an_answer_under_way_ends_first_and_does_not_come_back(tmp_path, end):
    conversation = Conversation(a_reader(chat=True), a_document(tmp_path), max_new_tokens=400)
    answer = conversation.ask("Why?")
    next(answer)
    getattr(conversation, end)()
    assert conversation.turns == [] and not conversation.has_answer and not conversation._running[0][1].is_alive()
    list(answer)
    assert conversation.turns == [] and conversation._running == []
    if end == "close":
        assert conversation.kv.ids == [] and "".join(conversation.ask("Why?")) == "" and conversation.turns == []
    else:
        assert "".join(conversation.ask("Why?"))


def test_reading_ends_when_the_reader_is_gone(tmp_path):
    conversation = Conversation(a_reader(chat=True), a_document(tmp_path), chunk_size=50)
    seen = []

    def leave(done: int, total: int) -> None:
        seen.append(done)
        if len(seen) == 2:
            threading.Thread(target=conversation.close).start()
            assert conversation._closed.wait(30)

    conversation.read(leave)
    assert seen == [50, 100]
    with conversation.lock:
        pass
    assert conversation.is_closed


def test_a_question_beyond_the_window_is_said_before_it_is_asked(tmp_path):
    conversation = Conversation(a_reader(chat=True, context_length=1024), a_document(tmp_path), max_new_tokens=8)
    assert conversation.warnings("Why?") == []
    room = conversation.window - len(conversation.dialogue.ids([Turn("x")])) + 1 - 8
    assert conversation.warnings("x" * room) == []
    assert "at token 1,017 of the window's 1,024" in conversation.warnings("x" * (room + 1))[0]
