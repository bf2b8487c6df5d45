"""Files of a run that are cut short or broken: one line names the file and the cure, and the cure works."""

import json
import re
import resource
import shutil
from types import SimpleNamespace

import pytest

from peft_longlora.training import last_checkpoint
from peft_longlora.training.checkpoints import begin_output
from peft_longlora.training.identity import note_trained_on

pytest.importorskip("trl", minversion="1.16")
GIVEN = ("--save-steps", 1, "--max-steps")


@pytest.fixture(scope="module")
def begun(place, tmp_path_factory):
    """The output folder of a run of two steps, with a checkpoint after each."""
    from peft_longlora.cli.main import main

    folder = tmp_path_factory.mktemp("begun") / "out"
    main(["train", str(place / "recipe.yaml"), "--output-dir", str(folder), *map(str, (*GIVEN, 2))])
    return folder


def damaged(begun, tmp_path, name, change) -> None:
    shutil.copytree(begun, tmp_path / "out")
    text = (tmp_path / "out/run.yaml").read_text().replace(str(begun), str(tmp_path / "out"))
    (tmp_path / "out/run.yaml").write_text(text)
    path = tmp_path / "out" / name
    if change == "missing":
        path.unlink()
    elif change == "one byte":
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 255
        path.write_bytes(content)
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if change == "cut" else change)


def refused(said) -> str:
    code, _, err, _ = said
    assert code == 2 and "Traceback" not in err
    (line,) = [line for line in err.splitlines() if "error: " in line]
    return line


CHECKPOINT = ["adapter_model.safetensors", "adapter_config.json", "trainer_state.json", "optimizer.pt"]
CHECKPOINT += ["scheduler.pt", "rng_state.pth"]
CASES = [(name, "cut") for name in CHECKPOINT] + [(name, b"") for name in CHECKPOINT]
CASES += [("optimizer.pt", "missing"), ("scheduler.pt", "missing"), ("optimizer.pt", "one byte")]
CASES += [("trainer_state.json", b"{}"), ("trainer_state.json", b"\xff\xfe")]


@pytest.mark.parametrize(("name", "change"), CASES)
def test_a_damaged_checkpoint_is_named_with_its_cure(run, begun, tmp_path, name, change):
    damaged(begun, tmp_path, f"checkpoint-2/{name}", change)
    for more in ((), ("--dry-run",)):
        line = refused(run(*GIVEN, 3, *more))
        assert str(tmp_path / "out/checkpoint-2" / name) in line and re.search("is damaged: .|is missing", line)
        assert f"Delete {tmp_path / 'out/checkpoint-2'}: the run then goes on from" in line and "checkpoint-1." in line


def test_the_run_goes_on_from_the_checkpoint_before(run, begun, tmp_path):
    damaged(begun, tmp_path, "checkpoint-2/optimizer.pt", "cut")
    shutil.rmtree(tmp_path / "out/checkpoint-2")
    code, said, _, folder = run(*GIVEN, 3)
    assert code == 0 and f"Going on from {folder / 'checkpoint-1'}." in said
    assert last_checkpoint(folder).name == "checkpoint-3"
    shutil.rmtree(folder / "checkpoint-2")
    (folder / "checkpoint-3/scheduler.pt").write_bytes(b"")
    assert f"Delete {folder / 'checkpoint-3'}: the run then begins anew." in refused(run(*GIVEN, 4))


@pytest.mark.parametrize(
    ("name", "change", "cure"),
    [
        ("run.yaml", b"a: [", "Give another output_dir, or --overwrite"),
        ("run.yaml", b"", "Give another output_dir, or --overwrite"),
        ("trained_on.json", "cut", "Delete it if they are the same"),
        ("trained_on.json", b"[]", "Delete it if they are the same"),
    ],
)
def test_a_damaged_note_of_the_run_is_named_with_its_cure(run, begun, tmp_path, name, change, cure):
    damaged(begun, tmp_path, name, change)
    line = refused(run(*GIVEN, 3))
    assert f"{tmp_path / 'out' / name} is damaged: " in line and cure in line


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "trainer_state.json", "adapter_config.json"])
def test_a_complete_run_makes_a_damaged_result_again(run, begun, tmp_path, name):
    damaged(begun, tmp_path, name, "cut")
    code, said, _, folder = run(*GIVEN, 2)
    assert code == 0 and "missing, and made now: the adapter" in said
    if name.endswith("json"):
        json.loads((folder / name).read_text())
    else:
        assert (folder / name).read_bytes() == (begun / name).read_bytes()


def test_a_full_disk_leaves_the_notes_of_the_run(tmp_path):
    """A run that goes on writes them anew, and without them it could not."""
    recipe = SimpleNamespace(output_dir=tmp_path, run=SimpleNamespace(overwrite=False), values={"data": "a" * 99})
    begin_output(recipe)
    note_trained_on(tmp_path, {"rows": "1"})
    notes = {path: path.read_bytes() for path in tmp_path.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8, hard))
    try:
        with pytest.raises(OSError):
            begin_output(recipe)
        with pytest.raises(OSError):
            note_trained_on(tmp_path, {"rows": "1"})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == notes


def test_a_checkpoint_that_was_saved_without_its_optimizer_is_whole(run):
    saved = ("--save-only-model", "--save-steps", 1, "--max-steps")
    assert run(*saved, 1)[0] == 0
    code, said, _, folder = run(*saved, 2)
    assert code == 0 and "Going on from" in said and not (folder / "checkpoint-2/optimizer.pt").exists()
