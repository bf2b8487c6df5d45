"""The command line: help at once, bad input with code 2 and one line, and how a run is stopped."""

import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from importlib.metadata import version

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer

from peft_longlora.chat.kvcache import CACHES
from peft_longlora.cli import answering, main, tasks
from peft_longlora.cli import compare as compare_command
from peft_longlora.cli.arguments import say_options
from peft_longlora.eval import Passkey, evaluate, load_subject
from tests.helpers.answering_models import read_passkey, scripted_subject
from tests.helpers.evaluated import longlora, save_base, save_texts
from tests.helpers.options import with_usual
from tests.helpers.paths import ROOT
from tests.helpers.tiny import extend, make


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return save_base(tmp_path_factory.mktemp("model") / "base")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    return save_texts(tmp_path_factory.mktemp("text") / "modules")


BAD = {
    "no such file": ["--data", "{tmp}/none.txt"],
    "empty.jsonl: nothing in it": ["--data", "{tmp}/empty.jsonl"],
    "holds no .txt": ["--data", "{tmp}/folder"],
    "not JSON": ["--data", "{tmp}/broken.jsonl"],
    "give no window of 4096 tokens": ["--data", "{text}", "--lengths", "4096", "--protocol", "longlora"],
    "needs --data": ["--tasks", "needle"],
    "needs --multidoc": ["--tasks", "multidoc"],
    "neither one of this package's nor one of lm-eval's": ["--tasks", "perplexitty", "--data", "{text}"],
    "not a list of numbers": ["--lengths", "4096,big"],
    "holds a percentage outside 0 to 100": ["--depths", "0,120"],
    "--model {tmp}/none: no such folder": ["--model", "{tmp}/none", "--data", "{text}"],
    "--model {tmp}/other is an adapter": ["--model", "{tmp}/other", "--data", "{text}"],
    "--adapter {tmp}/folder: no adapter_config.json": ["--adapter", "{tmp}/folder", "--data", "{text}"],
    "The tokenizer ({tmp}/big) knows token 4103, but the model has 4096": [
        "--tokenizer",
        "{tmp}/big",
        "--data",
        "{text}",
    ],
    "--output {tmp}/empty.jsonl: {tmp}/empty.jsonl is a file": ["--output", "{tmp}/empty.jsonl", "--data", "{text}"],
    "{tmp}/empty.jsonl is a file. Give a folder": ["--output", "{tmp}/empty.jsonl/out", "--data", "{text}"],
    "--buckets [512, 64] must be edges in rising order": ["--buckets", "512,64", "--data", "{text}"],
    "the prompt alone has": ["--tasks", "passkey", "--lengths", "16"],
    "--card needs an adapter in a folder: give --adapter": [
        "--tasks",
        "passkey",
        "--lengths",
        "128",
        "--seeds",
        "1",
        "--depths",
        "0",
        "--card",
    ],
    "--card is only for LongLoRA adapters; {tmp}/plain has type LORA": [
        "--adapter",
        "{tmp}/plain",
        "--card",
        "--data",
        "{text}",
    ],
    "made for a vocabulary of 97 tokens, but this model has 4096": ["--adapter", "{tmp}/other", "--data", "{text}"],
    "the following arguments are required": None,
    "--device mps: ": ["--device", "mps", "--data", "{text}"],
    "--output: '' is not a path. Give a folder": ["--output", "", "--data", "{text}"],
    "{tmp}/taken/run.json is a folder, but a file": ["--output", "{tmp}/taken", "--data", "{text}"],
    "--output /proc/none cannot be written": ["--output", "/proc/none", "--data", "{text}"],
    "prompt of 102399999998976 tokens does not fit": ["--tasks", "passkey", "--lengths", "99999999999k"],
    "'4k,8k' is not a number of 1 or more": ["--context-length", "4k,8k"],
    "device string: abacus. Use cpu, cuda": ["--device", "abacus", "--data", "{text}"],
    "--device abacus: ": ["--device", "abacus", "--data", "{text}"],
    "--device meta holds no numbers": ["--device", "meta", "--data", "{text}"],
    "--rope-type nonsense is unknown": ["--rope-type", "nonsense", "--data", "{text}"],
    "--rope-type linear has no effect without": ["--rope-type", "linear", "--data", "{text}"],
    "an adapter has its own scaling": ["--rope-type", "ntk", "--adapter", "{tmp}/other", "--data", "{text}"],
    "--context-length 32 is not above the model's own window of 64": ["--context-length", "32", "--data", "{text}"],
}


SLOW = "neither one of this package's nor one of lm-eval's"  # lm-eval reads all its tasks first


@pytest.mark.parametrize("message", [pytest.param(m, marks=pytest.mark.slow) if m == SLOW else m for m in BAD])
def test_bad_input_ends_with_code_2_and_one_line(message, tmp_path, base, text, capsys):
    if message == "--device mps: " and torch.backends.mps.is_available():
        pytest.skip("this machine has the device")
    options = BAD[message]
    (tmp_path / "folder").mkdir()
    (tmp_path / "taken" / "run.json").mkdir(parents=True)
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": ')
    if options and "{tmp}/big" in options:
        tokenizer = AutoTokenizer.from_pretrained(base)
        tokenizer.add_tokens([f"new{i}" for i in range(8)])
        tokenizer.save_pretrained(tmp_path / "big")
    if options and "{tmp}/other" in options:
        extend(make()).save_pretrained(tmp_path / "other")
    if options and "{tmp}/plain" in options:
        get_peft_model(load_subject(base).model, LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "plain")
    fill = dict(tmp=tmp_path, text=text)
    defaults = {"--model": base, "--tasks": "perplexity", "--lengths": "64", "--output": str(tmp_path / "out")}
    given = [] if options is None else with_usual(defaults, [option.format(**fill) for option in options])
    try:
        code = longlora("eval", *given)
    except SystemExit as error:
        code = error.code
    lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert code == 2 and len(lines) == 1
    assert message.format(**fill).lower() in lines[0].lower()
    assert not (tmp_path / "out").exists(), "it is said before anything is measured"


def test_only_an_evaluation_goes_on_where_it_was_stopped(tmp_path, monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    for name, command in main.COMMANDS.items():
        monkeypatch.setitem(main.COMMANDS, name, replace(command, run=stop))
    assert longlora("eval", "--model", "a", "--output", tmp_path) == longlora("compare", "a", "b") == 130
    assert capsys.readouterr().err == "Stopped. The same command continues where this one ended.\nStopped.\n"


def test_a_reader_that_has_seen_enough_of_the_output_is_no_error(tmp_path, monkeypatch, capsys):
    """As with `longlora compare a b | head`: everything is in the files by then."""

    def print_into_a_closed_pipe(*_, **__):
        raise BrokenPipeError

    evaluate(scripted_subject(read_passkey), [Passkey(lengths=[1000], depths=[0], seeds=1)], tmp_path / "a")
    capsys.readouterr()
    with (tmp_path / "pipe").open("w") as pipe:
        monkeypatch.setattr("sys.stdout", pipe)
        monkeypatch.setattr(compare_command, "print", print_into_a_closed_pipe, raising=False)
        assert longlora("compare", tmp_path / "a", tmp_path / "a", "--output", tmp_path / "pair") == 141
    assert sorted(path.name for path in (tmp_path / "pair").iterdir()) == ["compare.md", "compare.png"]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("", "'' is not a path. Give a folder"),
        ("{tmp}/taken", "{tmp}/taken/compare.md is a folder, but a file of this name is written there. Move it."),
        ("/proc/none", "--output /proc/none: cannot be written ("),
    ],
)
def test_a_comparison_that_cannot_be_written_ends_with_code_2_and_one_line(tmp_path, capsys, output, said):
    evaluate(scripted_subject(read_passkey), [Passkey(lengths=[1000], depths=[0], seeds=1)], tmp_path / "a")
    (tmp_path / "taken" / "compare.md").mkdir(parents=True)
    capsys.readouterr()
    try:
        code = longlora("compare", tmp_path / "a", tmp_path / "a", "--output", output.format(tmp=tmp_path))
    except SystemExit as error:
        code = error.code
    out, err = capsys.readouterr()
    assert code == 2 and out == "" and len(err.splitlines()) == 1 and said.format(tmp=tmp_path) in err


# -- before a command runs -----------------------------------------------------------------------------------------

LIGHT = """
import sys, longlora_command
sys.argv[1:] = {arguments}
try:
    longlora_command.main()
finally:
    heavy = sorted({{"torch", "transformers", "peft", "numpy", "peft_longlora"}} & set(sys.modules))
    print("heavy:", heavy, file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--help"], 0, "ask questions of a long document"),
        (["eval", "--help"], 0, "documents (perplexity, native, memorised, needle, ruler)"),
        (["--version"], 0, f"transformers {version('transformers')}"),
        (["eval", "--lengths", "many"], 2, "'many' is not a list of numbers"),
    ],
)
def test_help_version_and_typing_errors_import_nothing_heavy(arguments, code, said):
    """They are what is asked for most often, and torch and peft take seconds."""
    command = [sys.executable, "-c", LIGHT.format(arguments=arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == code and said in done.stdout + done.stderr
    assert done.stderr.splitlines()[-1] == "heavy: []"


@pytest.mark.parametrize(
    "name",
    [
        "longlora_command",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("peft_longlora", "peft_longlora.cli")),
    ],
)
def test_the_console_script_and_the_module_are_one_command(name):
    done = subprocess.run(
        [sys.executable, "-m", name, "compare"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2
    missing = "the following arguments are required: first, second"
    assert done.stderr == f"longlora compare: error: {missing} (see longlora compare --help)\n"


def test_every_task_is_named_with_options_that_exist():
    parser = main.make_parser()
    defaults = vars(parser.parse_args(["eval", "--model", "m", "--output", "o"]))
    for name, entry in tasks.TASKS.items():
        assert {*entry.reads, *entry.needs} <= defaults.keys(), name
    assert answering.CACHES == CACHES


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model='a b' is an adapter. Give adapter=...", "--model a b is an adapter. Give --adapter"),
        ("context_length=32 is not above 64", "--context-length 32 is not above 64"),
        ("another run. Pass overwrite=True.", "another run. Pass --overwrite."),
        ("Give more text as books=...", "Give more text as --data"),
        (
            "use_cache=True and model_max_length=5 are no options",
            "use_cache=True and model_max_length=5 are no options",
        ),
    ],
)
def test_the_librarys_errors_are_said_in_options(text, said):
    args = Namespace(model="m", adapter=None, context_length=None, overwrite=False, data=None)
    assert say_options(text, args, {"books": "data"}) == said
