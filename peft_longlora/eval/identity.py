"""Digests that identify a run: weights, tokenizer, versions. Runs that differ in one of them are different runs."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME, AuxiliaryTrainingWrapper
from transformers import PreTrainedTokenizerBase

from peft_longlora.hub.provenance import sha256
from peft_longlora.hub.writing import write_whole

# Files of a model's or adapter's folder that change its results; the tokenizer has its own digest.
WEIGHTS = (".safetensors", ".bin", ".pt", ".index.json")
CONFIGS = ("config.json", "adapter_config.json", "generation_config.json")
PROBE = "The 3 quick brown  foxes\n\tdef f(x): return x\n ü 漢字 😀 <s>"
# Which adapters a module of PEFT's uses. `_adapters_disabled` is a PeftModel's, the others are layers'.
OF_ADAPTERS = ("active_adapters", "merged_adapters", "disable_adapters", "_adapters_disabled")
# Of a config in memory: what says nothing about the numbers.
UNTOLD = ("use_cache", "_name_or_path", "name_or_path", "transformers_version", "dtype", "torch_dtype")


class Digests:
    """SHA-256 digests of files. They are stored, and reused while size, path and times of a file stay the same.

    Args:
        path: the file that stores them; None: nothing is stored.
    """

    def __init__(self, path: Path | None = None):
        self.path = path
        self._known: dict[str, Any] = {}
        if path is not None and path.is_file():
            try:
                known = json.loads(path.read_bytes())
                self._known = known if isinstance(known, dict) else {}
            except ValueError:  # it is only remembered: read again
                pass

    def of(self, files: Iterable[Path]) -> dict[Path, str]:
        """The digest of each file, several at a time."""
        files = list(files)
        with ThreadPoolExecutor(max(1, min(len(files), os.cpu_count() or 1, 16))) as pool:
            found = dict(zip(files, pool.map(self._digest, files), strict=True))
        if self.path is not None:
            write_whole(self.path, json.dumps(self._known, indent=1) + "\n")
        return found

    def _digest(self, file: Path) -> str:
        about = file.stat()
        # Of a file that is changed the system sets st_ctime_ns, which no program can set back.
        name = f"{file.name} {about.st_dev}:{about.st_ino}"
        state = [about.st_size, about.st_mtime_ns, about.st_ctime_ns]
        entry = self._known.get(name)
        if not isinstance(entry, list) or entry[:3] != state:
            entry = self._known[name] = [*state, sha256(file)]
        return entry[3]


def fingerprint(name: str, digests: Digests, commit: str | None = None) -> str:
    """A fingerprint of a model or an adapter: the Hub's commit, or a digest of all bytes of a folder's files.

    For a folder it is what `sha256sum *.safetensors config.json ... | sha256sum` prints, the files in order of name.

    Args:
        name: a folder, or an id on the Hub. commit: of the latter, if it is known.

    Raises: ValueError: an id without files on this machine.
    """
    folder = Path(name)
    if not folder.is_dir():
        if commit is not None:
            return commit
        for config in CONFIGS[:2]:
            if isinstance(found := try_to_load_from_cache(name, config), str):
                return Path(found).parent.name  # the cache names its folders by commit
        raise ValueError(f"{name} is not a folder, and the Hub's cache has no config of it. Load the model first.")
    files = sorted(f for f in folder.iterdir() if f.is_file() and (f.name.endswith(WEIGHTS) or f.name in CONFIGS))
    lines = [f"{digest}  {file.name}\n" for file, digest in digests.of(files).items()]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def weights_digest(adapter: str, digests: Digests) -> str | None:
    """SHA-256 of an adapter's weights file, which the Hub shows too; None if this machine has no such file."""
    file = Path(adapter, SAFETENSORS_WEIGHTS_NAME)
    if not Path(adapter).is_dir():
        found = try_to_load_from_cache(adapter, SAFETENSORS_WEIGHTS_NAME)
        file = Path(found) if isinstance(found, str) else file
    return digests.of([file])[file] if file.is_file() else None


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest of everything that turns text into tokens and back: vocabulary, rules, special tokens; not the chat
    template."""
    digest = hashlib.sha256()
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules = json.loads(backend.to_str())
        for state in ("truncation", "padding"):  # of the last call, and no part of the tokenizer
            rules.pop(state, None)
        digest.update(json.dumps(rules, sort_keys=True).encode())
    else:
        digest.update(json.dumps(sorted(tokenizer.get_vocab().items())).encode())
        for file in sorted(
            str(path) for name, path in tokenizer.init_kwargs.items() if name.endswith("_file") and path
        ):
            if Path(file).is_file():
                digest.update(Path(file).read_bytes())
    digest.update(json.dumps(_tried(tokenizer)).encode())
    digest.update(json.dumps({name: str(token) for name, token in tokenizer.special_tokens_map.items()}).encode())
    return digest.hexdigest()


def _tried(tokenizer: PreTrainedTokenizerBase) -> list[Any] | None:
    """What a tokenizer makes of a text: options of Python's side, such as a leading <bos>, are in no file of rules."""
    try:
        ids = tokenizer(PROBE, verbose=False)["input_ids"]
    except Exception:  # tokenizers' own: a vocabulary without an unknown token refuses what it does not hold
        return None
    return [ids, tokenizer.decode(ids), tokenizer.decode(ids, skip_special_tokens=True)]


def template_digest(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A digest of the chat template; None if there is none."""
    template = getattr(tokenizer, "chat_template", None)
    return None if template is None else hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest()


def model_digest(model: torch.nn.Module) -> tuple[str, list[str]]:
    """A digest of a model in memory: all tensors, its config, and what adapters add.

    Returns: the digest, and the names of tensors that are not in memory and so not part of it.
    """
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    held = {name: tensor for name, tensor in tensors.items() if not tensor.is_meta}
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as pool:
        lines = [f"{name} {digest}" for name, digest in zip(held, pool.map(_tensor_digest, held.values()), strict=True)]
    for name, module in model.named_modules():
        if isinstance(module, PeftModel | BaseTunerLayer | AuxiliaryTrainingWrapper):
            scaling = getattr(module, "scaling", None)  # of LoRA's layers, by adapter
            states = [sorted(scaling.items())] if isinstance(scaling, dict) else []
            lines.append(f"{name} {[*states, *(getattr(module, state, None) for state in OF_ADAPTERS)]}")
    for name in ("config", "generation_config"):  # the latter names the tokens that end an answer
        config = getattr(model, name, None)
        told = config.to_dict() if hasattr(config, "to_dict") else vars(config) if hasattr(config, "__dict__") else {}
        lines.append(json.dumps({k: v for k, v in told.items() if k not in UNTOLD}, sort_keys=True, default=str))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest(), sorted(tensors.keys() - held.keys())


def _tensor_digest(tensor: torch.Tensor) -> str:
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    for part in _parts(tensor.detach()):
        # A copy of one tensor at a time: those of a GPU come over here by themselves.
        digest.update(part.contiguous().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Plain tensors that one is made of: quantised and sharded ones hold others."""
    if hasattr(tensor, "__tensor_flatten__") and type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _parts(getattr(tensor, name))
    elif tensor.numel():
        yield tensor


def content_digest(*parts: str | bytes | int | float | None) -> str:
    """Sixteen hexadecimal digits that identify a question by its text or its tokens."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def versions(*names: str) -> dict[str, str]:
    """The versions of Python, this package and the named packages, if they are installed."""
    found = {"python": platform.python_version(), "peft_longlora": sys.modules["peft_longlora"].__version__}
    for name in names:
        try:
            found[name.replace("-", "_")] = version(name)
        except PackageNotFoundError:
            continue
    return found


def device_name(device: torch.device) -> str:
    """What a model runs on, and whether its float32 products are rounded to TF32 or bfloat16."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})"
    precision = torch.get_float32_matmul_precision()
    return name if precision == "highest" else f"{name}, float32 products of {precision} precision"
