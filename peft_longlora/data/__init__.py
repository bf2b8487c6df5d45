"""Long text: files and datasets become documents or records, and these become rows of tokens to train on.

Data that cannot be used is refused with its file and line, and everything that is left out is counted. `load_rows` goes
all the way in one call, on one of these paths:

    read_documents -> to_windows        continued pre-training: every token of every document is in some window
    read_records   -> tokenize_records  instruction tuning: a loss only on the answer

    loading      the paths in one call; `arguments` checks what it is given, `counts` counts what comes in and is left
                 out, `held` what a Trainer keeps of it
    documents    from `rows` of files, `hub_rows` of datasets, a `repository` of source code or a `pdf`; `folders` finds
                 files. A stranger's file is read within `limits`, a PDF in a process of its own (`pdf_process`)
    shapes       the fields by which a record is read (`fields` reads their texts)
    digests      of documents and records: what is held out is not trained
    windows      tokens of documents (`encoding`); `records` and `conversations` are tokens with a loss on answers

`background` is a thread beside the caller that ends before Python does: `prefetch` reads ahead in it, and `chat/`
answers in it.
"""

from peft_longlora.data.counts import Counts
from peft_longlora.data.digests import check_held_out
from peft_longlora.data.documents import read_documents, read_records
from peft_longlora.data.encoding import encode_all
from peft_longlora.data.held import TokensHeldCallback, count_tokens
from peft_longlora.data.limits import Limits
from peft_longlora.data.loading import load_rows
from peft_longlora.data.prefetch import prefetch
from peft_longlora.data.records import tokenize_record, tokenize_records
from peft_longlora.data.windows import to_windows

__all__ = [
    "Counts",
    "Limits",
    "TokensHeldCallback",
    "check_held_out",
    "count_tokens",
    "encode_all",
    "load_rows",
    "prefetch",
    "read_documents",
    "read_records",
    "to_windows",
    "tokenize_record",
    "tokenize_records",
]
