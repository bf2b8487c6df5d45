"""A process that talks to a hub on 127.0.0.1: huggingface_hub reads its environment when it is imported."""

from __future__ import annotations

import multiprocessing
import os
import time
import types
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from tests.helpers.loopback_hub import TOKEN, LoopbackHub


def start_process(hub: LoopbackHub, home: Path) -> ProcessPoolExecutor:
    environment = {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    before = dict(os.environ)
    os.environ.update(environment)
    try:
        process = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        process.submit(os.getpid)  # starts it with this environment
    finally:
        os.environ.clear()
        os.environ.update(before)
    return process


def answer(function, *args, **kwargs):
    """In the other process: call; an error comes back as text, since not all of them can be pickled."""
    # The client waits 1, 2, 4 ... seconds between its attempts at a broken upload.
    from huggingface_hub.utils import _http

    _http.time = types.SimpleNamespace(sleep=lambda seconds: None, time=time.time, monotonic=time.monotonic)
    try:
        return function(*args, **kwargs)
    except Exception as error:
        names = [base.__name__ for base in type(error).__mro__]
        return Failure(names, str(error), str(error.__cause__))


class Failure:
    def __init__(self, types: list[str], message: str, cause: str) -> None:
        self.types, self.message, self.cause = types, message, cause

    def __repr__(self) -> str:
        return f"Failure({self.types[0]}: {self.message} <- {self.cause})"
