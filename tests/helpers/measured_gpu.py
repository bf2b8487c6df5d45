"""A GPU on which the peak of every step is known, and plans of memory with round numbers."""

import math

from peft_longlora.memory import MemoryPlan, fit
from peft_longlora.memory.peaks import Peaks
from peft_longlora.memory.plan import MEANS

GIB = 2**30
NAMED = math.ceil(10**10 / 0.97)  # a named budget of which 10 GB are filled
SIZES = dict(
    fixed=GIB // 4,
    token_bytes=100_000,
    loss_bytes=60_000,
    free_bytes=40_000,
    kept_bytes=8_000,
    input_bytes=4_000,
    blocks=8,
)


def plan(length=1000, budget=GIB, host=0, means=MEANS[0], **changes):
    return MemoryPlan(length, budget, host_budget=host, means=means, **{**SIZES, **changes})


class Machine:
    """A GPU on which a step's peak is known: 100 MB and so many bytes a token with each of the means."""

    A_TOKEN = (300_000, 200_000, 120_000, 110_000, 110_000)

    def __init__(self, monkeypatch, host=10**12):
        self.now = {}
        monkeypatch.setattr(fit, "checkpoint_blocks", lambda model, **options: setattr(self, "now", options))
        monkeypatch.setattr(fit, "measure_peaks", self.peaks)
        monkeypatch.setattr(fit, "host_budget", lambda: host)
        monkeypatch.setattr(fit.torch.cuda, "mem_get_info", lambda device: (10**11, 10**11))
        monkeypatch.setattr(fit, "_check", lambda *_: None)
        monkeypatch.setattr(fit, "use_liger", lambda *_, **__: ())

    def peak(self, model, tokens, loss):
        options = {**self.now}
        free, keep, in_host = options.pop("free", 0), options.pop("keep"), options.pop("keep_in_host", 0)
        kept = (2 - free - in_host if keep else 0) if isinstance(keep, bool) else keep
        return int(
            1e8
            + tokens
            * (self.A_TOKEN[MEANS.index(options)] + 50_000 * free + 10_000 * (kept or bool(in_host and not free)))
        )

    def peaks(self, model, tokens, loss):
        peak, free = self.peak(model, tokens, loss), self.now.get("free", 0)
        at_loss = int(1e8 + tokens * (60_000 + 50_000 * free))
        return Peaks(at_loss, peak, int(1e8) + model.get_input_embeddings().weight.nbytes)
