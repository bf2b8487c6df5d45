"""The examples' real text: CPython's standard library, present on every machine, and perplexity by position in it.

`pretrain_tiny.py` trains the embedded model on it and `quickstart.py` extends that model's window on it. Whole modules are
held out by name, in both, so that neither has seen what it is measured on.
"""

import sysconfig
import tokenize
from pathlib import Path

import torch
import torch.nn.functional as F

# Single files in every CPython from 3.10 to 3.14, each well above 4096 tokens, with no near copy elsewhere in the library.
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
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data"}


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
        if SKIPPED_FOLDERS.isdisjoint(name.parts) and not name.name.startswith("_sysconfigdata"):
            try:
                with tokenize.open(path) as file:  # honours each file's own coding line
                    texts[name.as_posix()] = file.read()
            except (SyntaxError, UnicodeDecodeError):
                continue  # deliberately broken sources
    missing = [name for name in HELD_OUT if name not in texts]
    if missing:
        raise FileNotFoundError(f"no {', '.join(missing)} under {root}: pass the folder of a complete standard library")
    return {n: t for n, t in texts.items() if n not in HELD_OUT}, {n: texts[n] for n in HELD_OUT}


def held_out_windows(tokenizer, texts: dict[str, str], length: int, per_text: int | None = None) -> torch.Tensor:
    """(W, length) windows cut from each text in turn without overlap, its first `per_text` ones (None: all that are full)."""
    windows = []
    for text in texts.values():
        ids = torch.tensor(tokenizer(text)["input_ids"])
        windows += ids[: len(ids) // length * length].view(-1, length)[:per_text]
    return torch.stack(windows)


@torch.no_grad()
def token_losses(model, windows: torch.Tensor, batch_size: int = 1) -> torch.Tensor:
    """(W, T - 1) float32 cross entropy in nats of tokens 1 ... T-1 of every window (token 0 has nothing to be predicted from)."""
    was_training = model.training
    model.eval()
    losses = []
    for batch in windows.to(model.device).split(batch_size):
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
        losses.append(F.cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none").cpu())
    model.train(was_training)
    return torch.cat(losses)


def perplexity(losses: torch.Tensor, start: int, stop: int) -> float:
    """Perplexity of the tokens at positions start <= p < stop of their windows; `losses` as from `token_losses`."""
    return losses[:, max(start - 1, 0) : stop - 1].mean().exp().item()
