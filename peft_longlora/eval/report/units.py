"""How values are shown: percents, GiB, milliseconds. Read by the other files of this folder."""

from __future__ import annotations

from peft_longlora.hub.results import Row

PERCENT = {"accuracy", "recall", "f1", "rougeL", "verbatim"}
MOST = {"verbatim_tokens": 50}  # metrics that count what is right, and all that there is of it
OF_TEXT = ("perplexity", "bits_per_byte")  # metrics that belong to the text they are measured on
UNITS = {
    "bits_per_byte": ("bits per byte", 1),
    "peak_memory_bytes": ("peak memory, GiB", 2**30),
    "kv_cache_bytes": ("KV cache, MiB", 2**20),
    "seconds_to_first_token": ("first token, ms", 1e-3),
    "forward_tokens_per_second": ("forward, tokens/s", 1),
    "decode_tokens_per_second": ("decoding, tokens/s", 1),
}


def show(row: Row, value: float | None = None) -> str:
    """A value in its unit."""
    value = row.value if value is None else value
    if row.metric in PERCENT:
        return f"{100 * value:.1f}%"
    value /= UNITS.get(row.metric, ("", 1))[1]
    return f"{value:,.0f}" if abs(value) >= 99999.5 else f"{value:.5g}"


def show_metric(row: Row) -> str:
    """A metric's name with its unit."""
    return UNITS.get(row.metric, (row.metric, 1))[0]


def show_interval(row: Row) -> str:
    """An interval in brackets, or why there is none."""
    known = row.low is not None and row.high is not None
    return f"[{show(row, row.low)}, {show(row, row.high)}]" if known else too_few_of(row)


def too_few_of(row: Row) -> str:
    """What a row without an interval has too few of, in words; "" if it has one, or if lm-eval gave none for it."""
    if row.low is not None or row.protocol.startswith("lm-eval"):
        return ""
    return "too few " + ("documents" if row.metric in OF_TEXT else "runs" if row.task == "cost" else "prompts")


def show_length(row: Row) -> str:
    """A length, marked where it is above the window."""
    return ("" if row.length is None else str(row.length)) + ("†" if row.beyond_window else "")


def scale_of(metric: str) -> float:
    """The divisor for showing a metric's values."""
    return 0.01 if metric in PERCENT else UNITS.get(metric, ("", 1))[1]
