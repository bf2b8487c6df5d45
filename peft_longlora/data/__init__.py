"""Long text: files and datasets become documents or records, and these become rows of tokens to train on.

Read `rows`, `documents`, `windows`; `encoding` tokenises long texts in little memory, `prefetch` reads ahead. The room
imports nothing of the package.
"""

from peft_longlora.data.documents import read_documents, read_records
from peft_longlora.data.windows import Counts, to_windows, tokenize_record, tokenize_records

__all__ = ["Counts", "read_documents", "read_records", "to_windows", "tokenize_record", "tokenize_records"]
