"""An option that is given twice: lists grow, and everything else is refused, in every command."""

import argparse
from itertools import chain

import pytest

from peft_longlora.cli import main
from peft_longlora.training import read_recipe
from tests.helpers.evaluated import longlora


def options() -> list[tuple[str, argparse.Action, list[argparse.Action]]]:
    """(command, option, the other options that the command needs) for every option of every command."""
    found = []
    (commands,) = (each for each in main.make_parser()._actions if isinstance(each.choices, dict))
    for name, parser in commands.choices.items():
        needed = [each for each in parser._actions if each.required]
        for option in parser._actions:
            if option.option_strings and not isinstance(option, argparse._HelpAction):
                found.append((name, option, [each for each in needed if each is not option]))
    return found


def words(action: argparse.Action) -> list[str]:
    """What is typed to give an option one value."""
    value = next(iter(action.choices)) if action.choices else VALUES.get(action.dest, "1")
    return [*action.option_strings[-1:], *[value] * (action.nargs if isinstance(action.nargs, int) else 1)]


VALUES = {"gpu_memory": "24GiB", "host_memory": "24GiB"}  # of the others, 1 is a value


@pytest.mark.parametrize(
    ("command", "option", "needed"), options(), ids=[f"{command} {option.dest}" for command, option, _ in options()]
)
def test_every_option_is_taken_once_or_grows(command, option, needed, capsys):
    """argparse alone keeps the last."""
    once = [command, *chain(*map(words, needed)), *words(option)]
    parser = main.make_parser()
    found = vars(parser.parse_args(once))
    assert option.dest in found and not any(name.startswith("_") for name in found)
    if option.nargs == "+" or option.dest == "ask":
        assert getattr(parser.parse_args([*once, *words(option)]), option.dest) == ["1", "1"]
        return
    with pytest.raises(SystemExit) as ended:
        parser.parse_args([*once, *words(option)])
    flag = "/".join(option.option_strings)
    assert ended.value.code == 2 and f"argument {flag}: given twice. Give it once (see" in capsys.readouterr().err


def test_a_list_grows_with_several_values_each_time():
    parser = main.make_parser()
    given = ["eval", "--model", "m", "--output", "o", "--data", "a", "b", "--data", "c", "--data=d"]
    for _ in range(2):  # nothing is left in the parser
        assert parser.parse_args(given).data == ["a", "b", "c", "d"]


LEAST = ["--model", "m", "--context-length", "64"]


def test_a_list_of_a_recipe_grows_and_wins_over_its_file(tmp_path):
    (tmp_path / "mine.yaml").write_text("data: [x, y]\neval_data: z\n")
    given = [*LEAST, "--data", "u", "--data", "v", "w", "--data=a"]
    run = read_recipe(tmp_path / "mine.yaml", given).run
    assert (run.data, run.eval_data) == (["u", "v", "w", "a"], ["z"])


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--learning-rate", "1e-4", "--learning_rate=2e-4"], "learning_rate is given twice: 0.0001, then 0.0002."),
        (["--packing", "--no-packing"], "packing is given twice: True, then False."),
        (["--r", "4", "--r", "4"], "r is given twice: 4, then 4."),
        (["--dry-run", "--dry-run"], "argument --dry-run: given twice."),
    ],
)
def test_a_key_that_is_given_twice_is_refused(more, said, capsys):
    try:
        code = longlora("train", *LEAST, "--data", "u", *more)
    except SystemExit as ended:
        code = ended.code
    assert code == 2 and f"longlora train: error: {said} Give it once" in capsys.readouterr().err


def test_a_key_in_two_spellings_in_a_file_is_refused(tmp_path):
    (tmp_path / "mine.yaml").write_text("learning-rate: 1e-4\nlearning_rate: 2e-4\n")
    with pytest.raises(ValueError, match=r"learning_rate is given twice: 0\.0001, then 0\.0002\. Give it once"):
        read_recipe(tmp_path / "mine.yaml", [*LEAST, "--data", "u"])
