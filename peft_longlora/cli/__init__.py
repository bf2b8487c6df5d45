"""The command `longlora`: a parser, and one file a command with its options and its run. Nothing imports this room.

Read `main.py` first, then a command (`evaluate.py` with its `tasks.py`, `compare.py`, `chat.py`); `arguments.py` holds
what they share. Until a command line is parsed nothing here imports torch, so `--help` and a mistyped option are
answered at once. The files import each other relatively, because the console script loads them by themselves
(`longlora_command.py`).
"""
