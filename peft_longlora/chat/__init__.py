"""A long document and questions about it: a `Conversation` holds the keys and values, and answers from them.

Read `document`, `dialogue`, `kvcache`, `conversation`; `passages` shows what an answer attended to.
"""

from peft_longlora.chat.conversation import Conversation
from peft_longlora.chat.document import read_document
from peft_longlora.chat.kvcache import CACHES

__all__ = ["CACHES", "Conversation", "read_document"]
