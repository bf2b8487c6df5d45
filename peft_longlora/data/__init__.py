"""Long text in: files and datasets as rows, documents and records, and windows of tokens to train on."""

from peft_longlora.data.documents import read_documents, read_records
from peft_longlora.data.windows import Counts, to_windows, tokenize_record, tokenize_records

__all__ = ["Counts", "read_documents", "read_records", "to_windows", "tokenize_record", "tokenize_records"]
