"""Passages by their words: BM25 by its formula, and places that hold what the answer says."""

import math
from collections import Counter

import pytest

pytest.importorskip("bm25s")
pytest.importorskip("snowballstemmer")

import snowballstemmer

from peft_longlora.chat import Conversation, passages
from peft_longlora.chat.words import ANSWER, STEPS, WordIndex, split_words
from tests.helpers.chat_models import a_document, a_reader

FILLER = "".join(f"On day {i} nobody said a word about anything at all.\n" for i in range(200))


def an_index(folder, text: str) -> WordIndex:
    return WordIndex(Conversation(a_reader(chat=True), a_document(folder, text)).dialogue)


@pytest.mark.parametrize(
    "text, words",
    [
        ("Silver's parrot, Cap'n Flint!", ["silver", "parrot", "cap'n", "flint"]),
        ("Größe 3.5 km — ŽLUŤ", ["größe", "3", "5", "km", "žluť"]),
        ("鹦鹉学舌。鹦", ["鹦鹉", "鹉学", "学舌", "鹦"]),
        ("ไทย ok", ["ไท", "ทย", "ok"]),
        ("…  —", []),
    ],
)
def test_words(text, words):
    assert split_words(text) == words


def test_scores_are_those_of_the_formula(tmp_path):
    """BM25 with k1 = 1.5, b = 0.75 and Lucene's idf, over overlapping spans of a 16th of the document."""
    text = FILLER[:1500] + "The parrot is called Flint. " + FILLER[1500:3000]
    index = an_index(tmp_path, text)
    width = len(text) // 16
    said = [split_words(text[i : i + width]) for i in index.firsts]  # a token is a character here
    stem = snowballstemmer.stemmer("english").stemWord
    spans = [[stem(word) for word in words] for words in said]
    assert index.words == said and index.firsts[:3] == [0, width // STEPS, 2 * (width // STEPS)]
    mean = sum(map(len, spans)) / len(spans)
    having = Counter(word for span in spans for word in set(span))

    def score(span: list[str], query: list[str]) -> float:
        total = 0.0
        for word in query:
            idf = math.log(1 + (len(spans) - having[word] + 0.5) / (having[word] + 0.5))
            n = span.count(word)
            total += idf * n / (n + 1.5 * (1 - 0.75 + 0.75 * len(span) / mean))
        return total

    question, answer = ["parrot", "nobodi", "day"], ["flint", "call"]  # their stems, without "the" and "is"
    want = [score(span, question) + ANSWER * score(span, answer) for span in spans]
    found = index.find("The parrot? Nobody, days!", "Flint is called. Unheard-of.", 1)[0]
    best = want.index(max(want))
    assert found.text == passages.make_passage(index.dialogue, index.firsts[best], width, "").text
    held = sorted({*question, *answer} & set(spans[best]), key=lambda stem: (having[stem], stem))
    assert held[:3] == ["call", "flint", "parrot"]
    assert found.reason.startswith("holds called, flint, parrot")  # in the forms that stand there


def test_an_answer_is_found_where_it_stands_whatever_the_question_looks_like(tmp_path):
    lines = FILLER.splitlines()
    lines[50] = "The lieutenant buried seven cannons under the chapel."
    lines[120] = "Which weapons did they hide? Where did they hide the weapons? Nobody answered where."
    index = an_index(tmp_path, "\n".join(lines))
    question = "Where did they hide the weapons?"
    found = index.find(question, "Seven cannons were buried under the chapel.", 3)
    assert "seven cannons" in found[0].text and "chapel" in found[0].reason
    assert "hide the weapons" in index.find(question, "", 1)[0].text  # without an answer there is only the question
    places = [p.place for p in found]
    assert len(set(places)) == len(places)


def test_a_wrong_answer_leaves_one_passage_in_three_to_the_question(tmp_path):
    lines = FILLER.splitlines()
    lines[30], lines[80], lines[130] = ("A goat ate the cheese in a far valley.",) * 3
    lines[180] = "They keep the ferry's lantern in the boathouse."
    index = an_index(tmp_path, "\n".join(lines))
    found = index.find("Where is the lantern?", "A goat ate the cheese in a far valley.", 3)
    assert ["goat" in p.text for p in found] == [True, True, False]
    assert "boathouse" in found[2].text and found[2].reason == "holds lantern, of the question"
    found = index.find("Who is the plumber?", "A goat ate the cheese.", 3)  # no word of the question is in the text
    assert ["goat" in p.text for p in found] == [True] * 3 and not any("question" in p.reason for p in found)


def test_words_that_are_everywhere_name_no_passage(tmp_path):
    """A question and an answer that share only "and", "the" or "is" with a text have no passage in it."""
    index = an_index(tmp_path, FILLER + "The end and the beginning.")
    assert index.find("Is there a key and a box?", "It is in the house, and that is all.", 3) == []
    assert "beginning" in index.find("Where did it begin?", "At the beginning", 1)[0].reason


def test_text_without_spaces(tmp_path):
    filler = "".join(chr(0x4E00 + i * 7919 % 3000) for i in range(2000))
    at = 900
    text = filler[:at] + "鹦鹉叫做弗林特" + filler[at:]
    index = an_index(tmp_path, text)
    found = index.find("鹦鹉叫什么", "弗林特", 1)
    assert "鹦鹉" in found[0].text and "弗林" in found[0].reason and len(found[0].text) <= index.width


@pytest.mark.parametrize("text", ["x", "...... " * 40, "Nobody."])
def test_nothing_in_common_shows_nothing(tmp_path, text):
    assert an_index(tmp_path, text).find("Where is the key?", "In the box.", 3) == []


def test_a_conversation_shows_them_and_makes_the_index_once(tmp_path):
    conversation = Conversation(a_reader(chat=True), a_document(tmp_path), max_new_tokens=4)
    list(conversation.ask("Where is the ring?"))
    found = conversation.passages(2)
    index = conversation._index
    assert "ring" in found[0].text and "ring" in found[0].reason and len(found) == 2
    assert conversation.passages(2) == found and conversation._index is index
    with pytest.raises(ValueError, match="by='luck' is unknown"):
        conversation.passages(by="luck")


@pytest.mark.parametrize(
    "tokens, width", [(1, 1), (50, 50), (100, 64), (1024, 64), (2048, 128), (4096, 256), (10**6, 256)]
)
def test_a_passage_is_a_small_part_of_the_document(tokens, width):
    assert passages.span_of(tokens) == width
