"""`longlora --completion`: what a shell offers on the Tab key is what the commands take."""

import shutil
import subprocess

import pytest

pytest.importorskip("shtab", reason="needs shtab: pip install 'peft-longlora[completion]'")

from peft_longlora.cli import main as cli

# The function that a script registers, called as bash calls it: the words so far, the last of them unfinished.
OFFER = """
source ./script
COMP_WORDS=({words}) COMP_CWORD={last}
_shtab_longlora longlora "${{COMP_WORDS[{last}]}}" "${{COMP_WORDS[{last}-1]}}"
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


def script(shell: str, capsys) -> str:
    with pytest.raises(SystemExit) as end:
        cli.main(["--completion", shell])
    assert end.value.code == 0
    return capsys.readouterr().out


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("longlora ch", {"chat"}),
        ("longlora chat --c", {"--cache", "--chunk"}),
        ("longlora chat --cache q", {"quantised"}),
        ("longlora push boo", {"books"}),
        ("longlora chat --file boo", {"book.txt", "books"}),
    ],
)
def test_bash_offers_commands_options_choices_and_files(tmp_path, capsys, words, offered):
    (tmp_path / "script").write_text(script("bash", capsys))
    (tmp_path / "books").mkdir()
    (tmp_path / "book.txt").write_text("")
    code = OFFER.format(words=words, last=len(words.split()) - 1)
    said = subprocess.run(["bash", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert {line.strip().rstrip("/") for line in said.splitlines() if line.strip()} == offered


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_know_every_command_and_option(shell, capsys):
    said = script(shell, capsys)
    for command in cli.COMMANDS:
        assert command in said
    for option in ("repetition-penalty", "with-base", "private"):
        assert option in said
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=said, text=True, check=True)


def test_an_unknown_shell_is_refused(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["--completion", "cmd"])
    assert end.value.code == 2 and "invalid choice: 'cmd'" in capsys.readouterr().err
