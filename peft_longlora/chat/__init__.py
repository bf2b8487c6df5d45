"""A long document and questions about it: a `Conversation` holds the document's keys and values and answers from them.

A question sees the document and all that was said before it. The document's keys and values are computed once, for all
questions, and each answer can show which passages of the document it attended to.

    document.py -> dialogue.py (tokens) -> kvcache.py (keys and values) -> conversation.py -> stream.py (an answer)
    passages.py (places in the document) from attention.py (what the answer saw) or words.py (the words it shares)
"""

from peft_longlora.chat.conversation import Conversation
from peft_longlora.chat.document import Document, read_document
from peft_longlora.chat.kvcache import CACHES, KVCache, OffloadedCache
from peft_longlora.chat.passages import Passage
from peft_longlora.data.limits import Limits

__all__ = ["CACHES", "Conversation", "Document", "KVCache", "Limits", "OffloadedCache", "Passage", "read_document"]
