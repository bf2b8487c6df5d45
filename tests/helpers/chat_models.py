"""What the tests of `longlora chat` read, and who reads: PDFs made by hand, a model with a token for each byte."""

from pathlib import Path

import torch

from peft_longlora.chat.document import Document, read_document
from peft_longlora.hub.loading import Loaded
from peft_longlora.rope.parameters import window_of
from tests.helpers.answering_models import byte_tokenizer
from tests.helpers.tiny import extend, make

CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] | trim }}</{{ m['role'] }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TEXT = "".join(
    f"Line {i}: the {word} is in the {i % 7}th box.\n" for i, word in enumerate(["key", "coin", "ring", "map"] * 5)
)


def make_pdf(pages: list[str]) -> bytes:
    """A PDF with lines of text on its pages; an empty string gives a page without text, as a scan does."""
    objects = ["<< /Type /Catalog /Pages 2 0 R >>", "", "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"]
    kids = []
    for page in pages:
        lines = "".join(f"({line}) Tj T* " for line in page.splitlines())
        stream = f"BT /F1 12 Tf 14 TL 72 720 Td {lines}ET" if page else ""
        objects.append(f"<< /Length {len(stream)} >>\nstream\n{stream}\nendstream")
        objects.append(
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents {len(objects)} 0 R "
            f"/Resources << /Font << /F1 3 0 R >> >> >>"
        )
        kids.append(f"{len(objects)} 0 R")
    objects[1] = f"<< /Type /Pages /Kids [{' '.join(kids)}] /Count {len(kids)} >>"
    out, offsets = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        offsets.append(len(out))
        out += f"{number} 0 obj\n{body}\nendobj\n".encode()
    table = "".join(f"{offset:010d} 00000 n \n" for offset in offsets)
    end = (
        f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}trailer\n<< /Size {len(objects) + 1} /Root 1 0 R >>\n"
    )
    return out + f"{end}startxref\n{len(out)}\n%%EOF\n".encode()


def a_model(model_type: str = "llama", adapter: bool = True, context_length: int = 2048, **changes):
    """A model that speaks bytes, its weights large enough for every token to matter; with a LongLoRA adapter on it."""
    changes = {"vocab_size": 256, "eos_token_id": 255, "bos_token_id": 254, **changes}
    model = make(model_type, **changes)
    if not adapter:
        return model
    model = extend(model, context_length=context_length)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    return model.eval()


def a_reader(model=None, chat: bool = False, **options) -> Loaded:
    """A model with its tokenizer, as `load_model` returns them."""
    model = model if model is not None else a_model(**options)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE if chat else None
    return Loaded(model, tokenizer, 64, window_of(model.config.get_text_config()))


def a_document(folder: Path, text: str = TEXT) -> Document:
    path = folder / "book.txt"
    path.write_text(text, encoding="utf-8")
    return read_document(path)
