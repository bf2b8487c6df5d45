"""A page in the browser for questions about a document: `longlora app`. Several readers share one model and take turns.

What a reader sees is made in `page`, which knows no web server; `serve` puts it on one, with gradio. The document of a
reader comes from a stranger: `guard` and the limits in `reader` say what it may cost and do.

    serve.py (gradio) -> page.py -> reader.py (one reader: document, questions) -> views.py (HTML)
    serve.py -> guard.py (what the server answers to anybody)
"""

from peft_longlora.app.page import Page
from peft_longlora.app.reader import LIMITS, Reader
from peft_longlora.app.views import View

__all__ = ["LIMITS", "Page", "Reader", "View"]
