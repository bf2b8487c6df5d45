"""Books as tokens: made once from text files, read by the runner.

    python experiments/books.py --model FOLDER --texts train/ --output tokens/train
    python experiments/books.py --model FOLDER --texts validation/ --output tokens/validation

Each call writes OUTPUT.npy (uint16 tokens of all books, end to end) and OUTPUT_off.npy (where each begins, and the
end). Any folder of long .txt or .txt.gz files will do; order is that of the file names, and no special token is added.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import numpy as np

from peft_longlora.cli.arguments import Parser


class Books:
    """Tokens of books: `books[i]` is the i-th as a (tokens,) array."""

    def __init__(self, tokens: np.ndarray, offsets: np.ndarray):
        self.tokens, self.offsets = tokens, offsets

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    @classmethod
    def read(cls, folder: str | Path, split: str) -> Books:
        """Read one split. Raises: FileNotFoundError."""
        return cls(*(np.load(Path(folder, f"{split}{part}.npy")) for part in ("", "_off")))


def train_rows(
    books: Books, window: int, count: int, seed: int, distinct: int | None = None
) -> list[dict[str, list[int]]]:
    """Windows at random places of random books longer than a window, as {"input_ids"}.

    Args:
        count: rows; the first n do not depend on it. distinct: how many differ, each then stands in several passes.

    Raises: ValueError: no book is longer than a window.
    """
    if not any(len(book) > window for book in books):
        longest = max(map(len, books), default=0)
        raise ValueError(f"window={window}: the longest training book has {longest} tokens, which must be more.")
    rng, rows = random.Random(1 + seed), []
    while len(rows) < min(count, distinct or count):
        book = books[rng.randrange(len(books))]
        if len(book) > window:
            start = rng.randrange(0, len(book) - window)
            rows.append({"input_ids": book[start : start + window].astype(np.int64).tolist()})
    return [rows[number % len(rows)] for number in range(count)]


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="whose tokenizer reads the books: a folder or a Hub id")
    parser.add_argument("--texts", required=True, help="a folder of .txt or .txt.gz files, one book each")
    parser.add_argument("--output", required=True, help="the files to write, without .npy")
    args = parser.parse_args()
    from transformers import AutoTokenizer

    from peft_longlora.data import read_documents

    files = sorted(path for path in Path(args.texts).glob("*") if path.name.endswith((".txt", ".txt.gz")))
    if not files:
        parser.error(f"--texts {args.texts}: there is no folder of this name with .txt or .txt.gz files")
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
    except (OSError, ValueError) as error:
        parser.error(f"--model {args.model}: {' '.join(str(error).split())}")
    if len(tokenizer) > 2**16:
        parser.error(f"--model {args.model} has {len(tokenizer)} tokens, more than uint16 can number")
    texts = (document["text"] for document in read_documents(list(map(str, files))))
    try:
        books = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts]
    except (OSError, ValueError) as error:
        parser.error(f"--texts {args.texts}: {error}")
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    np.save(f"{args.output}.npy", np.concatenate([np.asarray(book, dtype=np.uint16) for book in books]))
    np.save(f"{args.output}_off.npy", np.cumsum([0, *map(len, books)]))
    print(f"{args.output}.npy: {len(books)} books, {sum(map(len, books))} tokens", flush=True)


if __name__ == "__main__":
    main()
