"""Escapes text from files and from other people, so that it stays text in Markdown.

Called by `card`, `lora_card` and the tables of eval.
"""

from __future__ import annotations

import html
import json
from typing import Any


def one_line(value: Any) -> str:
    """A value as one line, without control characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())


def cell(value: Any) -> str:
    """A value as text of a heading, a list or a table: HTML is escaped, and the cell cannot end early.

    Example: "a|b <i>" -> "a\\|b &lt;i&gt;".
    """
    return html.escape(one_line(value), quote=False).replace("|", "\\|").replace("`", "\\`")


def code(value: Any) -> str:
    """A value as inline code. Inline code has no escapes, so backticks become quotation marks."""
    return f"`{one_line(value).replace('`', chr(39)).replace('<!--', '< !--').replace('|', chr(92) + '|')}`"


def literal(value: Any) -> str:
    """A value as JSON, which is also a Python literal. Nothing in it looks like HTML or ends a code block."""
    return json.dumps(value, sort_keys=True).replace("<", "\\u003c").replace("`", "\\u0060")
