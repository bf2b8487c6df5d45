"""Text for the examples: CPython's standard library, which is on every machine, and perplexity by position in it.

`pretrain_tiny.py` trains the embedded model on it and `quickstart.py` extends that model's window on it. Both hold
out the same modules by name, so that no model has seen the modules it is measured on.
"""

import sysconfig
import tokenize
from pathlib import Path

import torch
import torch.nn.functional as F

# Single files in CPython 3.10 to 3.13, each above 4096 tokens, with no near copy elsewhere in the library.
HELD_OUT = (
    "argparse.py",
    "configparser.py",
    "difflib.py",
    "ipaddress.py",
    "mailbox.py",
    "statistics.py",
    "subprocess.py",
    "tarfile.py",
)
# Tests, what pip installed, and tables written by programs rather than by people.
SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data"}
BUCKETS = ((0, 512), (512, 1024), (1024, 2048), (2048, 4096))


def read_stdlib(root: str | Path | None = None) -> tuple[dict[str, str], dict[str, str]]:
    """Source text of the standard library, as (training, held out), each {path below `root`: text} in sorted order.

    Args:
        root: folder of the library; None: that of the running Python.
    Raises:
        FileNotFoundError: a held-out module is missing, so `root` is no complete standard library.
    """
    root = Path(root or sysconfig.get_paths()["stdlib"])
    texts = {}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if SKIPPED.isdisjoint(name.parts) and not name.name.startswith("_sysconfigdata"):
            try:
                with tokenize.open(path) as file:  # honours each file's own coding line
                    texts[name.as_posix()] = file.read()
            except (SyntaxError, UnicodeDecodeError):
                continue  # deliberately broken sources
    missing = [name for name in HELD_OUT if name not in texts]
    if missing:
        raise FileNotFoundError(f"no {', '.join(missing)} under {root}: pass the folder of a complete standard library")
    return {n: t for n, t in texts.items() if n not in HELD_OUT}, {n: texts[n] for n in HELD_OUT}


def cut_windows(tokenizer, texts: dict[str, str], length: int, per_text: int | None = None) -> torch.Tensor:
    """(W, length) windows of each text in turn, without overlap: its first `per_text` ones, or all that are full."""
    windows = []
    for ids in map(torch.tensor, tokenizer(list(texts.values()))["input_ids"]):
        windows += ids[: len(ids) // length * length].view(-1, length)[:per_text]
    return torch.stack(windows)


@torch.no_grad()
def token_losses(model, windows: torch.Tensor, batch_size: int = 1) -> torch.Tensor:
    """(W, T - 1) float32 cross entropy in nats of tokens 1 ... T-1 of every window: token 0 follows nothing."""
    was_training = model.training
    model.eval()
    losses = []
    for batch in windows.to(model.device).split(batch_size):
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
        losses.append(loss.view(len(batch), -1).cpu())
    model.train(was_training)
    return torch.cat(losses)


def perplexity(losses: torch.Tensor, start: int, stop: int) -> float:
    """Perplexity of the tokens at positions start <= p < stop of their windows; `losses` as from `token_losses`."""
    return losses[:, max(start - 1, 0) : stop - 1].mean().exp().item()


def by_position(losses: torch.Tensor) -> dict[str, float]:
    """Perplexity in each bucket of positions that the windows reach, as {"0-512": ...}."""
    length = losses.shape[1] + 1
    return {f"{low}-{min(high, length)}": perplexity(losses, low, high) for low, high in BUCKETS if low < length}


def plot(curves: dict[str, torch.Tensor], path: Path, native_window: int) -> None:
    """Draw perplexity by position, in bins of 128 tokens."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=160, layout="constrained")
    styles = (("#d1495b", "-", 2.4), ("#8d99ae", "--", 1.8), ("#00798c", "-", 2.4))
    for (label, losses), (color, line, width) in zip(curves.items(), styles, strict=True):
        length = losses.shape[1] + 1
        starts = range(0, length, 128)
        values = [perplexity(losses, start, start + 128) for start in starts]
        axes.plot([start + 64 for start in starts], values, line, color=color, linewidth=width, label=label)
    axes.axvline(native_window, color="#444444", linestyle=":", linewidth=1.4)
    axes.text(
        native_window + length / 90,
        0.97,
        f"native window: {native_window} tokens",
        va="top",
        transform=axes.get_xaxis_transform(),
    )
    axes.set(yscale="log", xlim=(0, length), xlabel="position in the window (tokens)", ylabel="perplexity (log scale)")
    axes.set_xticks(range(0, length + 1, length // 8))
    axes.set_yticks([10, 20, 50, 100, 200, 500])
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_title(f"{native_window} to {length} tokens: held-out modules, dense attention", loc="left")
    axes.grid(axis="y", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)
