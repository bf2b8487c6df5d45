"""What a run says at its start is what then happens: its steps, its checkpoints and its time."""

from types import SimpleNamespace

import pytest

from peft_longlora.training.outlook import OutlookCallback

pytest.importorskip("trl", minversion="1.16")


@pytest.mark.parametrize(
    ("given", "said", "kept"),
    [
        (("--save-steps", 3), "4 steps to train; a checkpoint every 3 steps and at the end.", [3, 4]),
        (("--save-steps", 4), "4 steps to train; no checkpoint before the end (save_steps=4), but Ctrl-C keeps one.",
         [4]),
        ((), "4 steps to train; no checkpoint before the end (save_steps=100), but Ctrl-C keeps one.", [4]),
        (("--save-strategy", "no"), "4 steps to train; no checkpoints, but Ctrl-C keeps one.", []),
        (("--save-strategy", "epoch"), "4 steps to train; a checkpoint after every epoch.", None),
    ],
)  # fmt: skip
def test_the_steps_and_the_checkpoints_come_true(run, given, said, kept):
    code, out, _, folder = run(*given)
    assert code == 0 and said in out.splitlines()
    found = sorted(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))
    assert found == (kept if kept is not None else found) and (kept == [] or found)
    assert "A step takes" not in out  # the rest is short


def test_a_run_that_goes_on_counts_what_is_left(run):
    assert run("--save-steps", 2, "--max-steps", 2)[0] == 0
    _, out, _, _ = run("--save-steps", 2, "--max-steps", 7)
    assert "5 steps to train; a checkpoint every 2 steps and at the end." in out.splitlines()


@pytest.mark.parametrize(
    ("start", "logged", "steps", "seconds", "said"),
    [
        (0, 1, 20, 40, ["A step takes about 40 s: about 13 min for the 19 steps left."]),
        (100, 110, 1110, 25, ["A step takes about 2.5 s: about 42 min for the 1,000 steps left."]),
        (0, 10, 10_010, 10, ["A step takes about 1 s: about 2.8 h for the 10,000 steps left."]),
        (0, 1, 20, 3, []),
        (0, 20, 20, 3000, []),
    ],
)
def test_the_time_is_said_once_after_the_first_log(start, logged, steps, seconds, said):
    lines, now = [], iter([1000.0, 1000.0 + seconds])
    outlook = OutlookCallback(lines.append, lambda: next(now))
    args = SimpleNamespace(save_strategy=SimpleNamespace(value="no"))
    state = SimpleNamespace(global_step=start, max_steps=steps, save_steps=100)
    outlook.on_train_begin(args, state, None)
    outlook.on_log(args, state, None)  # of an evaluation before the first step
    state.global_step = logged
    outlook.on_log(args, state, None)
    outlook.on_log(args, state, None)
    assert lines[1:] == said


def test_a_window_that_extends_nothing_is_said_before_the_weights_are_loaded(run, monkeypatch):
    lines = []
    monkeypatch.setattr("peft_longlora.adapter.fit.logger.warning", lines.append)
    assert run("--context-length", 58, "--dry-run")[0] == 0
    assert sum("context_length=58 is not above the base's own window of 64 tokens" in line for line in lines) == 1
