"""Draw docs/images/attention_pattern.png: which keys each query of a straight and of a shifted head sees.

    python benchmarks/plot_pattern.py docs/images/attention_pattern.png

The picture comes from the reference implementation: a query sees the keys from which its output depends.
"""

import matplotlib
import torch
from options import Parser, new_file

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.colors import ListedColormap

from peft_longlora.reference import s2_attention_reference

GROUP = 8
DOCUMENTS = [26, 6]
PADDING = 4


def seen(segment_ids: torch.Tensor) -> torch.Tensor:
    """(2, S, S) bool: does query i of the straight, of the shifted head see key j; read off the attention weights."""
    length = segment_ids.shape[1]
    query = key = torch.zeros(1, 2, length, 4)
    value = torch.eye(length).expand(1, 2, length, length)  # the output is the weights themselves
    return s2_attention_reference(query, key, value, GROUP, segment_ids=segment_ids)[0].transpose(0, 1) > 0


def main(path: str) -> None:
    parts = [torch.full((n,), number) for number, n in enumerate(DOCUMENTS, 1)] + [
        torch.zeros(PADDING, dtype=torch.long)
    ]
    segment_ids = torch.cat(parts)[None]
    length = segment_ids.shape[1]
    causal = torch.ones(length, length).tril().bool()
    figure, axes = plt.subplots(1, 2, figsize=(8.6, 4.6), layout="constrained")
    titles = "straight heads", f"shifted heads (by G / 2 = {GROUP // 2})"
    colours = "#1f6fb4", "#d1662b"
    for axis, title, colour, see in zip(axes, titles, colours, seen(segment_ids), strict=True):
        assert not (see & ~causal).any(), "a token sees a later one"
        axis.imshow(causal & ~see, cmap=ListedColormap(["white", "#e9e9e9"]), interpolation="none")
        axis.imshow(torch.where(see, 1.0, torch.nan), cmap=ListedColormap([colour]), interpolation="none")
        for edge in torch.tensor(DOCUMENTS).cumsum(0).tolist():
            axis.axhline(edge - 0.5, color="black", linewidth=0.8)
            axis.axvline(edge - 0.5, color="black", linewidth=0.8)
        axis.set(title=title, xlabel="key token", ylabel="query token")
        axis.set_xticks(range(0, length, 4))
        axis.set_yticks(range(0, length, 4))
    names = ", ".join(str(n) for n in DOCUMENTS)
    figure.suptitle(
        f"S2-Attn, G = {GROUP}: documents of {names} tokens, {PADDING} of padding; grey: left out of full attention",
        fontsize=11,
    )
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    parser = Parser(__doc__)
    parser.add_argument("image", type=new_file)
    main(str(parser.parse_args().image))
