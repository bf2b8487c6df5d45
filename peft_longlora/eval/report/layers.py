"""The picture of `longlora reach`: how far each layer attends. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path

from peft_longlora.eval.report.style import AFTER, axes, fit_linear, shade, tokens


def plot_reach(shares: dict[int, float], chosen: list[int], beyond: int, file: Path) -> None:
    """Write a PNG: a bar for each layer in the order of the model, the chosen ones dark.

    Args:
        shares: the share of far attention of each layer, 0 to 1.
        beyond: tokens before the query from which attention is far.
    """
    layers = sorted(shares)
    figure, (ax,) = axes(f"Attention weight {tokens(beyond)} tokens and more before the query, by layer")
    colors = [AFTER if layer in chosen else shade(AFTER, 3, 4) for layer in layers]
    ax.bar(layers, [100 * shares[layer] for layer in layers], color=colors)
    fit_linear(ax, [100 * share for share in shares.values()])
    ax.set_xlabel("layer")
    ax.set_ylabel("% of its attention weight")
    for layer in chosen:
        ax.annotate(str(layer), (layer, 100 * shares[layer]), ha="center", va="bottom", fontsize=8)
    figure.savefig(file, metadata={"Software": None})
