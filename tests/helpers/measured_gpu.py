"""A GPU on which the peak of every step is known, and plans of memory with round numbers."""

import math

from peft_longlora.memory import MemoryPlan, fit
from peft_longlora.memory.peaks import Peaks
from peft_longlora.memory.plan import MEANS, TILE

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
    """A GPU on which a step's peak is known: 100 MB and so many bytes a token with each of the means.

    With tiles attention decides the peak of a long row. That of a short one is in a tile: 800 MB, and less a token.
    """

    A_TOKEN = (300_000, 200_000, 120_000, 110_000, 110_000)
    IN_TILE = 200_000  # bytes of each of its tokens; and a token of the row has 20,000 fewer then

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
        free, _, in_host = options.pop("free", 0), options.pop("keep"), options.pop("keep_in_host", 0)
        tile = options.get("tile_tokens")
        means = dict(options, tile_tokens=TILE) if tile else options
        in_attention = tokens * self.A_TOKEN[MEANS.index(means)]
        in_tile = self.IN_TILE * tile + in_attention - 20_000 * tokens if tile else 0
        beside = tokens * 10_000 * (self.kept() or bool(in_host and not free))
        # Blocks that keep everything are gone when a tile is computed.
        return int(1e8 + max(in_attention + tokens * 50_000 * free, in_tile) + beside)

    def kept(self):
        """How many of two blocks keep attention's output on the GPU."""
        free, keep, in_host = (self.now.get(name, 0) for name in ("free", "keep", "keep_in_host"))
        return (2 - free - in_host if keep else 0) if isinstance(keep, bool) else keep

    def peaks(self, model, tokens, loss):
        peak, free = self.peak(model, tokens, loss), self.now.get("free", 0)
        at_loss = int(1e8 + tokens * (60_000 + 50_000 * free + 10_000 * self.kept()))
        return Peaks(at_loss, peak, int(1e8) + model.get_input_embeddings().weight.nbytes)
