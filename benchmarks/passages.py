"""How often the passages shown for an answer hold the place where the book says it: six novels, ten questions each.

The ranking was chosen by the three novels of passages.json; the questions about those of passages_held_out.json were
written before a ranking was run on them. Each question has its right answer, in the words of the question's author, and
the lines of the book that give it. A question counts as found if one of the first three passages touches those lines.
Rows: the ranking by the words of question and answer as `longlora chat` does it; the same if the model says only every
second word of the answer, or the answer to the next question, which is wrong; and by the words of the question alone.
With --model also by attention: the model reads the whole book, and the passages are those that it attends to while it
is given the right answer.

    python benchmarks/passages.py --books FOLDER --tokenizer HuggingFaceTB/SmolLM2-135M --output passages.json

FOLDER holds the books as {Gutenberg number}.txt.gz; their SHA-256 are checked, because the lines are theirs.
Hardware: one CPU core, 20 seconds; --model needs what `longlora chat` needs for 100,000 tokens.
"""

import gzip
import hashlib
import json
import re
import shlex
import sys
import tempfile
from pathlib import Path

from options import Parser, new_file, old_file
from transformers import AutoTokenizer

from peft_longlora.chat import Conversation, Document, Passage, read_document
from peft_longlora.chat.dialogue import Dialogue, Turn
from peft_longlora.chat.words import WordIndex
from peft_longlora.hub import load_model

HERE = Path(__file__).parent
QUESTIONS = [HERE / "passages.json", HERE / "passages_held_out.json"]
SHOWN = 3


def read_book(folder: Path, book: dict) -> Document:
    """The book, if it is the one whose lines are known."""
    raw = gzip.decompress((folder / f"{book['gutenberg']}.txt.gz").read_bytes())
    if hashlib.sha256(raw).hexdigest() != book["sha256"]:
        sys.exit(f"{folder}/{book['gutenberg']}.txt.gz is another edition than the one whose lines are known.")
    with tempfile.TemporaryDirectory() as place:
        path = Path(place, f"{book['title']}.txt")
        path.write_bytes(raw)
        return read_document(path)


def is_found(passages: list[Passage], lines: list[list[int]]) -> bool:
    """Whether a passage touches one of the places, each (first line, last line)."""
    for passage in passages:
        numbers = [int(number) for number in re.findall(r"\d+", passage.place)]
        if any(numbers[0] <= last and first <= numbers[-1] for first, last in lines):
            return True
    return False


def half(answer: str) -> str:
    """Every second word of an answer."""
    return " ".join(answer.split()[1::2])


def by_attention(conversation: Conversation, question: dict) -> list[Passage]:
    """The passages that the model attends to while it is given the right answer."""
    turn = Turn(question["question"], question["answer"])
    prompt = conversation.dialogue.ids([Turn(turn.question)])
    answer = conversation.tokenizer(" " + turn.answer, add_special_tokens=False)["input_ids"]
    conversation.turns, conversation._prompt, conversation._row = [turn], prompt, [*prompt, *answer]
    return conversation.passages(SHOWN, by="attention")


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--books", type=Path, required=True)
    parser.add_argument("--questions", type=old_file, nargs="+", default=QUESTIONS)
    parser.add_argument("--tokenizer", required=True, help="whose tokens a passage is counted in")
    parser.add_argument("--model", help="also rank by this model's attention")
    parser.add_argument("--adapter")
    parser.add_argument("--output", type=new_file)
    args = parser.parse_args()
    with parser.refusing():
        books = [book for path in args.questions for book in json.loads(path.read_text(encoding="utf-8"))]
        documents = [read_book(args.books, book) for book in books]
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    loaded = load_model(args.model, args.adapter, tokenizer=args.tokenizer) if args.model else None
    rows = []
    for book, document in zip(books, documents, strict=True):
        index = WordIndex(Dialogue(tokenizer, document))
        answers = [question["answer"] for question in book["questions"]]
        wrong = dict(zip(answers, [*answers[1:], answers[0]], strict=True))
        ways = {
            "question and answer": lambda q, index=index: index.find(q["question"], q["answer"], SHOWN),
            "half of the answer": lambda q, index=index: index.find(q["question"], half(q["answer"]), SHOWN),
            "wrong answer": lambda q, index=index, wrong=wrong: index.find(q["question"], wrong[q["answer"]], SHOWN),
            "question alone": lambda q, index=index: index.find(q["question"], "", SHOWN),
        }
        if loaded:
            conversation = Conversation(loaded, document)
            ways["attention"] = lambda q, conversation=conversation: by_attention(conversation, q)
        found = {way: [is_found(find(q), q["lines"]) for q in book["questions"]] for way, find in ways.items()}
        rows.append({"title": book["title"], "questions": len(book["questions"]), **found})
        counts = ", ".join(f"{way} {sum(hits)} of {len(hits)}" for way, hits in found.items())
        print(f"{book['title']}: {counts}", flush=True)
    if args.output:
        args.output.write_text(json.dumps({"command": shlex.join(sys.argv), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
