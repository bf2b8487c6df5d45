"""A long document and questions about it: a `Conversation` holds its keys and values, and answers from them."""

from peft_longlora.chat.conversation import Conversation
from peft_longlora.chat.document import read_document
from peft_longlora.chat.kvcache import CACHES

__all__ = ["CACHES", "Conversation", "read_document"]
