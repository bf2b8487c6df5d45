"""A thread beside the caller ends before Python does, however the caller ends."""

import subprocess
import sys
import threading
import time

import pytest

from peft_longlora.data.background import Background
from peft_longlora.data.prefetch import prefetch
from tests.helpers.paths import ROOT

# Without torch, so that each script takes no time.
SCRIPT = """
import importlib.util, threading, time
spec = importlib.util.spec_from_file_location("background", "{file}")
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
stop = threading.Event()
def work():
    while not stop.is_set():
        time.sleep(0.01)
    time.sleep(0.3)  # what torch is in the middle of
    print("ended", flush=True)
def ask():
    with module.Background(work, stop.set):
        yield 1
        yield 2
{how}
"""
WAYS = {
    "the block ends": "list(ask())",
    "a generator is not closed": "held = ask(); next(held)",
    "a generator is held by a module": "import builtins; builtins.held = ask(); next(builtins.held)",
    "an error": "held = ask(); next(held); raise SystemExit(0)",
}


@pytest.mark.parametrize("way", WAYS)
def test_the_thread_ends_before_python(way):
    script = SCRIPT.format(file=ROOT / "peft_longlora" / "data" / "background.py", how=WAYS[way])
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ended\n", "")


def test_ctrl_c_while_the_thread_starts_ends_it(monkeypatch):
    """It came there when the machine was busy: the answer went on behind the next prompt, and Python aborted."""
    start, stop, ended = threading.Thread.start, threading.Event(), threading.Event()

    def interrupted(thread):
        start(thread)
        raise KeyboardInterrupt

    def work():
        stop.wait(30)
        ended.set()

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt), Background(work, stop.set):
        pytest.fail("the block began")
    assert stop.is_set() and ended.is_set()


def test_a_thread_that_could_not_start_is_not_waited_for(monkeypatch):
    def fail(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", fail)
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="can't start"), Background(lambda: None, lambda: None):
        pass
    assert time.monotonic() - began < 20


def test_items_that_are_no_longer_wanted_are_not_made():
    made = []

    def items():
        for number in range(1000):
            made.append(number)
            yield number

    for number in prefetch(items(), 2):
        if number == 3:
            break
    count = len(made)
    time.sleep(0.3)
    assert len(made) == count < 20 and threading.active_count() < 50
