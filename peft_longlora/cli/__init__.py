"""The command `longlora`: a parser, and for each command one file with its options and its run.

Read `main.py` first, then a command (`evaluate.py` with its `tasks.py`, `compare.py`, `chat.py`, `app.py`, `push.py`,
`reach.py`, `train.py`, `plan.py`). `arguments.py` holds what the commands share, `answering.py` what `chat` and `app`
share; `completion.py` is for the shell. No other room imports this one. Nothing here imports torch
before the command line is parsed, so `--help` and a wrong option are answered at once. The files import each other
relatively, because the console script loads this folder without the rest of the package (`longlora_command.py`).
"""
